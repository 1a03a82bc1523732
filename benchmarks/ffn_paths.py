"""Where a step's time goes: the ways to compute an FFN under a mixed batch, and the parts of one decode step.

    python benchmarks/ffn_paths.py --out benchmarks/results/ffn_paths.json

Random weights, six experts of half the channels; all sides take turns, medians over rounds. The thresholds of
`moesaic.experts.compute` come from the first table.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from speed import random_pair
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.experts import compute
from moesaic.experts.compute import TokenGroups
from moesaic.refactor.receipts import environment

TOKENS = (1, 8, 32, 128, 512)
PATHS = {"masked": compute.masked, "packed": compute.packed, "grouped": compute.grouped}


def medians(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def ffns(dense: Any, moe: Any, tokens: int, rounds: int) -> dict[str, float]:
    """All FFNs of the model on `tokens` tokens of mixed experts (one expert for one token): milliseconds by path."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, dense.config.hidden_size, generator=generator)
    groups = TokenGroups(torch.randint(moe.config.experts, (tokens,), generator=generator))
    sides = {"dense": lambda: [layer.mlp(x) for layer in dense.model.layers]}
    for name, path in PATHS.items():
        sides[name] = lambda path=path: [path(blocks, x, groups) for blocks in moe.ffns()]
    return medians(sides, rounds)


class Count(TorchDispatchMode):
    """Counts operator calls."""

    calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def decode_step(dense: Any, moe: Any, rounds: int) -> tuple[dict[str, float], dict[str, int]]:
    """One decode step of one sequence: milliseconds and operator calls of both models and of the pre-gate alone."""
    ids = torch.randint(dense.config.vocab_size, (1, 65), generator=torch.Generator().manual_seed(0))
    caches = {m: m(input_ids=ids[:, :64], use_cache=True).past_key_values for m in (dense, moe)}

    def back(cache: Any) -> None:
        for layer in cache.layers:
            if layer.get_seq_length() > 64:
                layer.crop(-1)

    def step(model: Any) -> None:
        model(input_ids=ids[:, 64:], past_key_values=caches[model], use_cache=True, logits_to_keep=1)
        back(caches[model])

    def gate() -> None:
        moe.plan(ids[:, 64:], past_key_values=caches[moe])
        back(caches[moe])

    sides = {"dense": lambda: step(dense), "refactored": lambda: step(moe), "pre-gate": gate}
    times, calls = medians(sides, rounds), {}
    for name, function in sides.items():
        with Count() as count:
            function()
        calls[name] = count.calls
    return times, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "environment": environment()}
    console = Console()
    with torch.no_grad():
        for shape in ("pocket", "wide"):
            dense, moe = random_pair(shape, seed=0)
            rows = {tokens: ffns(dense, moe, tokens, args.rounds) for tokens in TOKENS}
            times, calls = decode_step(dense, moe, args.rounds)
            table = Table("tokens", "dense ms", *PATHS, title=f"{shape}: speed over the dense FFNs")
            for tokens, row in rows.items():
                table.add_row(
                    str(tokens), f"{row['dense']:.2f}", *(f"{row['dense'] / row[name]:.2f}" for name in PATHS)
                )
            console.print(table)
            console.print("decode step:", {k: f"{times[k]:.2f} ms, {calls[k]} calls" for k in times})
            record[shape] = {"ffn_ms": rows, "decode_ms": times, "decode_calls": calls}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
