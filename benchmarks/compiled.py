"""Does torch.compile pay in decoding on this CPU? Eager and compiled decode steps, dense and refactored, in turns.

    python benchmarks/compiled.py --out benchmarks/results/compiled.json

Random weights of `speed.py`. The first call compiles and is timed apart; TORCHINDUCTOR_CACHE_DIR keeps compiled
code for later processes (torch's default is a temporary folder).
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from ffn_paths import medians
from rich.console import Console
from rich.table import Table
from speed import SHAPES, random_pair

from moesaic.refactor.receipts import environment

CONTEXT = 64


def decoder(model: Any, runs: Callable[..., Any], batch: int) -> Callable[[], Any]:
    """One decode step after CONTEXT tokens, again and again: `runs` is the model, compiled or not."""
    ids = torch.randint(model.config.vocab_size, (batch, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    cache = model(input_ids=ids[:, :CONTEXT], use_cache=True).past_key_values

    def step() -> Any:
        logits = runs(input_ids=ids[:, CONTEXT:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        for layer in cache.layers:
            if layer.get_seq_length() > CONTEXT:
                layer.crop(-1)
        return logits

    return step


def compare(models: dict[str, Any], batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, seconds of the first compiled call, and the largest difference of logits, by model."""
    sides: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        eager = decoder(model, model, batch)
        compiled = decoder(model, torch.compile(model, dynamic=True), batch)  # keys grow with every token
        expected, start = eager(), time.perf_counter()
        first = compiled()
        found[name] = {"first_s": time.perf_counter() - start, "difference": float((first - expected).abs().max())}
        compiled()
        sides |= {f"{name} eager": eager, f"{name} compiled": compiled}
    times = medians(sides, rounds)
    for name, row in found.items():
        row |= {"eager_ms": times[f"{name} eager"], "compiled_ms": times[f"{name} compiled"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="wide", choices=list(SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 256  # every layer is a case of its own; at the limit it would run eagerly
    dense, moe = random_pair(args.shape, 0, getattr(torch, args.dtype))
    table = Table("batch", "model", "eager ms", "compiled ms", "first call s", "largest difference")
    cells = []
    with torch.no_grad():
        for batch in args.batches:
            for name, row in compare({"dense": dense, "refactored": moe}, batch, args.rounds).items():
                cells.append({"batch": batch, "model": name, **row})
                shown = (row["eager_ms"], row["compiled_ms"], row["first_s"], row["difference"])
                table.add_row(str(batch), name, *(f"{value:.3g}" for value in shown))
    Console().print(table)
    if args.out:
        command = shlex.join(["python", *sys.argv])
        record = {"command": command, "shape": args.shape, "dtype": args.dtype, "cells": cells}
        args.out.write_text(json.dumps({**record, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
