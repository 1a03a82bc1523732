"""Do token ids tell a batch's experts in every layer, better than the past does? ExpertFlow's predictor (2410.17954).

    python benchmarks/route_predictor.py --out benchmarks/results/route_predictor.json

On a recorded trace (--trace), or on one made here: a small layer-wise mixture of `pregate_distillation.py`, trained
briefly, generates from held-out installed texts. A quarter of the requests is held out; every seed draws its own
quarter and its own model. Bacc = share of the experts a batch needs that were predicted, mean over layers; it is
printed with the number of experts predicted per layer, because predicting all would reach 1.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from pregate_distillation import MIXTURES, build, save
from rich.console import Console
from transformers import AutoTokenizer

from moesaic import pocket_path
from moesaic.analyze.route_predictor import FitConfig, fit
from moesaic.analyze.route_recall import measure
from moesaic.analyze.route_recording import Prompt, Sampling, record
from moesaic.analyze.route_sequences import split
from moesaic.data import TokenBatches, installed_domains, tokenize_domains
from moesaic.schedule.trace import Trace


def recorded(args: argparse.Namespace) -> Trace:
    """Routes of the mixture while it continues held-out texts; made once."""
    path = args.work / f"{args.mixture}-{args.each}-{args.prompt}-{args.output}.trace"
    if path.exists():
        return Trace.load(path)
    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    domains = tokenize_domains(installed_domains(args.max_bytes), tokenizer)
    options = MIXTURES[args.mixture]
    model = build(
        options, TokenBatches(tuple(domains), 8, 128, seed=1), 1e-3, args.work / f"{args.mixture}-{options['steps']}"
    )
    windows = [(domain.name, domain.windows(args.prompt, args.each)) for domain in domains]
    texts = [(f"{name}-{i}", tokenizer.decode(row)) for name, rows in windows for i, row in enumerate(rows.tolist())]
    prompts = [Prompt(name, text) for name, text in texts if text.strip()]
    sampling = Sampling(temperature=0.8, seed=0)
    trace = record(model, tokenizer, prompts, args.output, sampling=sampling, prompt_tokens=args.prompt)
    trace.save(path)
    return trace


def one(trace: Trace, mixer: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    train, held_out = split(trace, args.held_out, seed)
    start = time.perf_counter()
    model, history = fit(trace, train, held_out, FitConfig(steps=args.steps, seed=seed, sizes={"mixer": mixer}))
    seconds = time.perf_counter() - start
    found = measure(model, trace, train, held_out, args.batches, seed=seed)
    stored = 4 * model.parameter_count
    return {"mixer": mixer, "seed": seed, "fit_seconds": seconds, "bytes": stored, "history": history, **found}


def mean(runs: list[dict[str, Any]], *path: str) -> tuple[float, float]:
    """Over seeds, with the standard deviation."""
    values = []
    for run in runs:
        value: Any = run
        for step in path:
            value = value[step]
        values.append(float(value))
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: a row per predictor; recall of single decode rows, then Bacc and experts predicted by batch size."""
    sizes = list(runs[0]["batch"])
    head = ["predictor", "recall@k", "recall@2k", *(f"Bacc {size} (experts)" for size in sizes)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in [name for name in runs[0]["batch"][sizes[0]] if name != "needed"]:
        cells = [name]
        for recall in ("recall@k", "recall@2k"):
            known = name in runs[0]["token"]
            cells.append("{:.3f} ± {:.3f}".format(*mean(runs, "token", name, "decode", recall)) if known else "")
        for size in sizes:
            recall, predicted = (mean(runs, "batch", size, name, each) for each in ("recall", "predicted"))
            cells.append("{:.3f} ± {:.3f} ({:.1f})".format(*recall, predicted[0]))
        lines.append(f"| {' | '.join(cells)} |")
    needed = ", ".join(f"{mean(runs, 'batch', size, 'needed')[0]:.1f} for {size} rows" for size in sizes)
    return "\n".join([*lines, "", f"Experts needed per layer: {needed}."])


def main() -> None:
    """Record, then fit and measure for every mixer and seed; save after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="measured instead of one made here")
    parser.add_argument("--mixture", choices=list(MIXTURES), default="top-2")
    parser.add_argument("--each", type=int, default=40, help="prompts of each domain")
    parser.add_argument("--prompt", type=int, default=48, help="tokens")
    parser.add_argument("--output", type=int, default=65, help="tokens; all but the last are run")
    parser.add_argument("--mixers", nargs="*", default=["gru"])
    parser.add_argument("--steps", type=int, default=FitConfig.steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the requests")
    parser.add_argument("--batches", type=int, nargs="*", default=[2, 8, 32])
    parser.add_argument("--max-bytes", type=int, default=1_000_000, help="of text in each domain")
    parser.add_argument("--work", type=Path, default=Path("benchmark-work/route-predictor"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=160)
    args.work.mkdir(parents=True, exist_ok=True)
    trace = Trace.load(args.trace) if args.trace else recorded(args)
    results: dict[str, Any] = {"trace": trace.info(), "runs": []}
    for mixer in args.mixers:
        runs = []
        for seed in range(args.seeds):
            runs.append(one(trace, mixer, seed, args))
            results["runs"].append(runs[-1])
            save(args, results)
        size, seconds = runs[0]["bytes"], mean(runs, "fit_seconds")[0]
        console.print(f"## {mixer}: {size:,} bytes, fitted in {seconds:.0f} s\n\n{table(runs)}\n", markup=False)


if __name__ == "__main__":
    main()
