"""The live engine under a real arrival process: our policies beside FCFS batching and Read-ME's algorithm as printed.

    python benchmarks/serving_policies.py --model moe --trace azure-conv.trace --prompts texts.jsonl --out results.json

Requests have a trace's arrivals and its lengths divided by `--shorten`, so that they fit the model's context, and real
texts as prompts. The load is a share of what FCFS serves with the same memory when everything comes at once. Every
system gets the same requests; a latency is that of the client's callback; systems take turns in rounds. Tokens must be
equal in all runs: the count of requests that differ is printed. Expert files are read from the disk each time
(page_cache drop).
"""

import argparse
import shlex
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic.analyze.route_recording import read_prompts
from moesaic.files import atomic_write_json
from moesaic.progress import Progress
from moesaic.refactor.receipts import environment
from moesaic.schedule.trace import Trace
from moesaic.serve.engine import Engine
from moesaic.serve.options import EngineOptions
from moesaic.serve.replay import prompts_for
from moesaic.serve.request import Event, Finished, Generation, Token
from moesaic.simulate.report import latencies
from moesaic.simulate.simulator import Run, Served

SYSTEMS: dict[str, dict[str, Any]] = {
    "ours": {"batcher": "adaptive", "policy": "belady", "lookahead": 1},
    "fcfs": {"batcher": "fcfs", "policy": "lru", "lookahead": 0},
    "decode-first": {"batcher": "decode-first", "policy": "lru", "lookahead": 0},
    "read-me": {"batcher": "longest-queue", "policy": "belady", "lookahead": 1},
}
OURS = "ours"


class Client:
    """One request's times and tokens."""

    def __init__(self, served: Served, clock: Any, done: threading.Semaphore) -> None:
        self.served, self.clock, self.done = served, clock, done
        self.ids: list[int] = []
        self.reason = ""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Token):
            self.ids.append(event.id)
            if self.served.first_s < 0:
                self.served.first_s = self.clock()
        elif isinstance(event, Finished):
            self.reason = event.reason
            self.served.end_s = self.clock()
            self.done.release()


def serve(folder: Path, options: EngineOptions, trace: Trace, prompts: list[list[int]], rate: float) -> dict[str, Any]:
    """Run the requests at `rate` times the trace's arrivals; 0 = all at once."""
    engine = Engine(folder, options)
    engine.start()
    done = threading.Semaphore(0)
    begin = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - begin

    clients = []
    for number, output in enumerate(trace.output_tokens.tolist()):
        arrival = float(trace.arrival_s[number]) / rate if rate else 0.0
        time.sleep(max(arrival - clock(), 0))
        client = Client(Served(arrival, len(prompts[number]), output), clock, done)
        clients.append(client)
        engine.submit(prompts[number], Generation(max_tokens=output, temperature=0, ignore_eos=True), client)
    for _ in clients:
        done.acquire()
    seconds, stats = clock(), engine.stats()
    engine.close()
    assert all(client.reason == "length" for client in clients), "a request failed"
    return {
        "seconds": seconds,
        "requests_per_s": len(clients) / seconds,
        "latency_s": latencies(Run([client.served for client in clients])),
        "hit_ratio": stats.hit_ratio,
        "moved_bytes": stats.demand_bytes + stats.prefetch_bytes,
        "stall_share": stats.stall_s / stats.busy_s,
        "overhead_share": stats.overhead_s / stats.busy_s,
        "experts_per_step": stats.experts_per_step.sum / max(stats.experts_per_step.total, 1),
        "requests_per_step": stats.batch.sum / max(stats.batch.total, 1),
        "steps": stats.steps,
        "tokens": [client.ids for client in clients],
    }


def shortened(trace: Trace, by: int, context: int) -> Trace:
    """Lengths divided by `by`, at least one token each, and short enough for the context."""
    output = (trace.output_tokens // by).clip(2, context // 2)
    prompt = (trace.prompt_tokens // by).clip(1, context - output)
    return replace(trace, prompt_tokens=prompt, output_tokens=output)


def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    from moesaic.models.loading import load_tokenizer

    trace = shortened(Trace.load(args.trace).head(args.requests), args.shorten, args.context)
    tokenizer = load_tokenizer(args.model)
    texts = [list(tokenizer(prompt.text).input_ids) for prompt in read_prompts(args.prompts)]
    prompts = prompts_for(trace, [ids for ids in texts if ids])
    span = float(trace.arrival_s[-1])
    rows, wanted = [], None
    with Progress("policies", total=len(args.budgets) * len(args.systems) * args.rounds, unit="runs") as progress:
        for budget in args.budgets:
            base = EngineOptions(
                memory=args.memory,
                experts=budget,
                dtype=args.dtype,
                max_tokens=args.max_tokens,
                max_requests=args.max_requests,
                prefix_reuse=False,
                page_cache="drop",
                context=args.context,
            )
            saturated = serve(args.model, replace(base, **SYSTEMS["fcfs"]), trace, prompts, 0)["requests_per_s"]
            rate = args.load * saturated / (len(prompts) / span)
            turns = [turn(args.systems, number) for number in range(args.rounds)]
            for number, name in ((number, name) for number, names in enumerate(turns) for name in names):
                row = serve(args.model, replace(base, **SYSTEMS[name]), trace, prompts, rate)
                tokens = row.pop("tokens")
                wanted = wanted or tokens
                differing = sum(one != two for one, two in zip(tokens, wanted, strict=True))
                own = {"budget": budget, "system": name, "round": number, "saturated": saturated}
                rows.append({**own, "differing": differing, **row})
                progress.advance(1)
    return rows


def turn(names: list[str], number: int) -> list[str]:
    """Who goes first differs from round to round."""
    first = number % len(names)
    return names[first:] + names[:first]


def show(rows: list[dict[str, Any]]) -> Table:
    """Medians over rounds; ratios are medians of those within a round."""
    table = Table(title="seconds a generated token; ratios to ours, by rounds, in brackets")
    for name in ("experts", "system", "mean", "p95", "TTFT p95", "hits", "moved", "stall", "experts/step", "differing"):
        table.add_column(name, justify="right")
    for budget, system in dict.fromkeys((row["budget"], row["system"]) for row in rows):
        own = [row for row in rows if (row["budget"], row["system"]) == (budget, system)]
        ours = {row["round"]: row for row in rows if (row["budget"], row["system"]) == (budget, OURS)}
        cells = []
        for key in ("mean", "p95"):
            seconds = [row["latency_s"]["normalised"][key] for row in own]
            ratios = sorted(
                value / ours[row["round"]]["latency_s"]["normalised"][key]
                for value, row in zip(seconds, own, strict=True)
                if row["round"] in ours
            )
            over = f" ({median(ratios):.2f}; {ratios[0]:.2f} to {ratios[-1]:.2f})" if ratios else ""
            cells.append(f"{median(seconds):.4f}{over}")
        table.add_row(
            f"{budget:.0%}",
            system,
            *cells,
            f"{median(row['latency_s']['ttft']['p95'] for row in own):.2f}",
            f"{median(row['hit_ratio'] for row in own):.3f}",
            f"{median(row['moved_bytes'] for row in own) / 2**20:.0f} MiB",
            f"{median(row['stall_share'] for row in own):.1%}",
            f"{median(row['experts_per_step'] for row in own):.2f}",
            str(sum(row["differing"] for row in own)),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--shorten", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5, 0.7, 1.0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3, help="a run is short: its latencies swing with the machine")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-requests", type=int, default=32)
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = bench(args)
    Console(width=170).print(show(rows))
    if args.out is not None:
        command = "python " + " ".join(shlex.quote(Path(arg).name if "/" in arg else arg) for arg in sys.argv)
        settings = {
            name: value for name, value in vars(args).items() if name not in ("model", "trace", "prompts", "out")
        }
        atomic_write_json(args.out, {"command": command, "settings": settings, **environment(), "rows": rows})


if __name__ == "__main__":
    main()
