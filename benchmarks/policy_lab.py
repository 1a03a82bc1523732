"""The policy lab's printed numbers: caches, batchers, granularity and speed on one recorded trace.

    python benchmarks/policy_lab.py --trace azure-conv.trace --out benchmarks/results/policy_lab.json

caches       known routes against LRU and the oracle on the same accesses, every capacity, short and long queues
batchers     adaptive against decode-first, prefill-first and the longest queue at 50, 80, 95 and 120 % load
granularity  channel blocks against whole experts: bytes moved per token in equal memory
speed        choices of experts a minute of one process

Everything but the speed is a function of the trace. Loads are shares of what decode-first serves when all requests come
at once, the same arrivals for all batchers of a row.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moesaic.files import atomic_write_json
from moesaic.progress import Progress
from moesaic.refactor.receipts import environment
from moesaic.schedule.trace import Trace
from moesaic.simulate.models import at_size, find_shape
from moesaic.simulate.sweep import arrival_rate, saturation, simulate
from moesaic.simulate.system import System, read_system

Row = dict[str, Any]

BATCHERS = ("decode-first", "prefill-first", "longest-queue", "adaptive")
LOADS = (0.5, 0.8, 0.95, 1.2)
SETTINGS = ((1.0, 512, 64), (1.0, 32, 64), (0.5, 512, 64), (0.5, 128, 128), (0.5, 32, 64))  # capacity, tokens, requests
QUEUES = ((512, 0.8), (16, 1.2))  # tokens a stage, load: mostly one batch waits; several do
CAPACITIES = (0.2, 0.35, 0.5, 0.65, 0.8)
CONTROLS = {"lru": ("lru", False), "known": ("belady", False), "known, sticky": ("belady", True)}


def system(**changes: Any) -> System:
    """The Read-ME preset with whole experts and the changes."""
    base = {"cache.granularity": "layer-expert", "cache.persist": True, "limits.max_requests": 64}
    return read_system("read-me", {**base, **{key.replace("__", "."): value for key, value in changes.items()}})


def loaded(trace: Trace, load: float, **changes: Any) -> Trace:
    """The trace at a share of decode-first's saturation."""
    rate = saturation(trace, system(batcher__kind="decode-first", **changes))
    return trace.scaled(load * rate / arrival_rate(trace))


def caches(trace: Trace) -> list[Row]:
    """Kept ratios of the policies on the box without a GPU, nothing fetched ahead."""
    rows = []
    for tokens, load in track(QUEUES, "caches"):
        own = {"device": "cpu-box", "limits__max_tokens": tokens, "batcher__kind": "decode-first"}
        own["predictor__lookahead"] = 0
        arriving = loaded(trace, load, cache__capacity=0.5, **{k: v for k, v in own.items() if k != "batcher__kind"})
        for capacity in CAPACITIES:
            for name, (policy, persist) in CONTROLS.items():
                changes = {"cache__policy": policy, "cache__persist": persist, "cache__capacity": capacity}
                result = simulate(arriving, system(**own, **changes))
                rows.append(
                    {"tokens": tokens, "load": load, "capacity": capacity, "policy": name} | result["kept_ratio"]
                )
    return rows


def batchers(trace: Trace) -> list[Row]:
    """Latencies on a GPU before host memory, four layers of a 7B model."""
    trace = at_size(trace, replace(find_shape("llama-2-7b"), layers=4))
    rows = []
    for capacity, tokens, requests in track(SETTINGS, "batchers"):
        own = {"cache__capacity": capacity, "limits__max_tokens": tokens, "limits__max_requests": requests}
        for load in LOADS:
            arriving = loaded(trace, load, **own)
            for kind in BATCHERS:
                result = simulate(arriving, system(batcher__kind=kind, **own), bounds=False)
                latency, waits = result["latency_s"]["normalised"], result["longest_wait_s"]
                rows.append(
                    {"capacity": capacity, "tokens": tokens, "requests": requests, "load": load, "batcher": kind}
                    | {"mean_s": latency["mean"], "p95_s": latency["p95"], "experts": result["experts_per_step"]}
                    | {"wait_decode_s": waits["decode"], "wait_admission_s": waits["admission"]}
                    | {"hit_ratio": result["hit_ratio"]["use"], "tokens_per_s": result["throughput"]["tokens_per_s"]}
                )
    return rows


def granularity(trace: Trace) -> list[Row]:
    """Bytes a token in equal memory, on the box without a GPU at 80 % load."""
    if trace.card.blocks is None:
        return []
    all_blocks = trace.layout("block").total_bytes
    arriving = loaded(trace, 0.8, device="cpu-box", cache__capacity=0.5)
    rows = []
    for share in track(CAPACITIES, "granularity"):
        row: Row = {"capacity_bytes": int(share * all_blocks), "share": share}
        for unit in ("layer-expert", "block"):
            own = system(device="cpu-box", cache__granularity=unit, cache__capacity=float(share * all_blocks))
            row[unit] = simulate(arriving, own, bounds=False)["bytes_per_token"]
        row["ratio"] = row["block"] / row["layer-expert"] if row["layer-expert"] else 1.0
        rows.append(row)
    return rows


def speed(trace: Trace) -> list[Row]:
    """Choices, calls and seconds of a run, by preset."""
    rows = []
    for name in ("read-me", "moesaic"):
        begin = time.perf_counter()
        result = simulate(trace, read_system(name), bounds=False)
        seconds = time.perf_counter() - begin
        rows.append({"system": name, **result["events"], "seconds": seconds})
        rows[-1]["choices_per_minute"] = result["events"]["choices"] / seconds * 60
    return rows


def track(items: tuple[Any, ...], label: str) -> Any:
    """One bar for a part; the runs' own bars are off."""
    with Progress(label, total=len(items), unit="settings") as progress:
        for item in items:
            yield item
            progress.advance()


def show(name: str, rows: list[Row]) -> None:
    """A table of the rows."""
    table = Table(title=name)
    for column in rows[0] if rows else ():
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=150, help="take the first of the trace")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    trace = Trace.load(args.trace).head(args.requests)
    result: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "trace": trace.info()}
    result["environment"] = environment()
    for part in (speed, granularity, caches, batchers):
        result[part.__name__] = part(trace)
        show(part.__name__, result[part.__name__])
    if args.out:
        atomic_write_json(args.out, json.loads(json.dumps(result)))


if __name__ == "__main__":
    main()
