"""Where a step's time goes: the ways to compute an FFN under a mixed batch, and the parts of one decode step.

    python benchmarks/ffn_paths.py --out benchmarks/results/ffn_paths.json

Random weights, six experts of half the channels; all sides take turns, medians over rounds. Every backend of
`moesaic.experts.backends` that this machine can run, beside the dense FFNs as they are and packed as the backends'
copies are. The constants of `backends.py` come from the first table.
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
from speed import SHAPES, random_pair
from torch.utils._python_dispatch import TorchDispatchMode

from moesaic.experts.backends import BACKENDS, choose
from moesaic.experts.compute import TokenGroups
from moesaic.experts.copies import Stacked
from moesaic.refactor.receipts import environment

TOKENS = (1, 8, 32, 128, 512)


def medians(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def packed_dense(dense: Any) -> list[Stacked]:
    """The dense FFNs in oneDNN's order, gate and up in one product."""
    ffns = [layer.mlp for layer in dense.model.layers]
    return [
        Stacked(torch.cat([f.gate_proj.weight, f.up_proj.weight]), None, f.down_proj.weight, packed=True) for f in ffns
    ]


def ffns(dense: Any, packed: list[Stacked], moe: Any, cell: tuple[int, int], rounds: int) -> dict[str, float]:
    """All FFNs of the model on tokens of some number of experts: milliseconds by backend."""
    tokens, experts = cell
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, dense.config.hidden_size, generator=generator).to(dense.dtype)
    groups = TokenGroups(torch.randint(experts, (tokens,), generator=generator))
    act = dense.model.layers[0].mlp.act_fn
    sides: dict[str, Callable[[], Any]] = {
        "dense": lambda: [layer.mlp(x) for layer in dense.model.layers],
        "dense packed": lambda: [copy.project(copy.hidden(x, act, True)) for copy in packed],
    }
    for name, backend in BACKENDS.items():
        if all(backend.suits(blocks) for blocks in moe.ffns()):
            sides[name] = lambda path=backend.path: [path(blocks, x, groups) for blocks in moe.ffns()]
    sides["chosen"] = lambda: [choose(blocks, groups)(blocks, x, groups) for blocks in moe.ffns()]
    for side in sides.values():  # makes copies
        side()
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
    parser.add_argument("--shapes", nargs="+", default=["pocket", "wide"], choices=list(SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "environment": environment()}
    console = Console()
    with torch.no_grad():
        for shape in args.shapes:
            dense, moe = random_pair(shape, 0, getattr(torch, args.dtype))
            for blocks in moe.ffns():
                blocks.copies.limit = None
            packed, experts = packed_dense(dense), moe.config.experts
            cells = [(tokens, used) for tokens in TOKENS for used in (1, experts) if used <= tokens]
            rows = {cell: ffns(dense, packed, moe, cell, args.rounds) for cell in cells}
            times, calls = decode_step(dense, moe, args.rounds)
            names = [name for name in rows[1, 1] if name != "dense"]
            table = Table("tokens", "experts", "dense ms", *names, title=f"{shape}: speed over the dense FFNs")
            for (tokens, used), row in rows.items():
                ratios = (f"{row['dense'] / row[name]:.2f}" for name in names)
                table.add_row(str(tokens), str(used), f"{row['dense']:.2f}", *ratios)
            console.print(table)
            console.print("decode step:", {k: f"{times[k]:.2f} ms, {calls[k]} calls" for k in times})
            rows_ms = [{"tokens": tokens, "experts": used, **row} for (tokens, used), row in rows.items()]
            record[shape] = {"dtype": args.dtype, "ffn_ms": rows_ms, "decode_ms": times, "decode_calls": calls}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
