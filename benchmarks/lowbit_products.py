"""How long products take by rows where weights are kept in 8 or 4 bits, beside packed bfloat16 and the bytes' floor.

    python benchmarks/lowbit_products.py --out benchmarks/results/lowbit_products.json

Weights are many and together larger than any cache, so that memory is read. The floor is the matrix's bytes at the rate
at which memory is read in the same run. "int8, prompts" is the way that rows of prompts go: the matrix made anew.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from small_products import microseconds

from moesaic.experts.lowbit import QuantizedWeight, available
from moesaic.experts.packed import PackedWeight
from moesaic.files import atomic_write_json
from moesaic.refactor.machine import big_array, read_bandwidth
from moesaic.refactor.receipts import environment

ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)
SHAPES = ((1024, 1024), (2048, 1024), (1024, 2816))  # outputs, inputs
TOGETHER = 100 * 2**20  # bytes of all weights of a shape
KINDS: dict[str, tuple[Callable[[torch.Tensor], Any], int | None]] = {
    "bfloat16, packed": (PackedWeight, None),
    "int8": (lambda weight: QuantizedWeight(weight, 8), None),
    "int8, prompts": (lambda weight: QuantizedWeight(weight, 8), 0),
    "int4": (lambda weight: QuantizedWeight(weight, 4), None),
}


@torch.inference_mode()
def by_rows(kind: str, shape: tuple[int, int]) -> tuple[int, dict[int, float]]:
    """Bytes of one matrix, and microseconds of a product of each number of rows."""
    make, prompts = KINDS[kind]
    one = make(torch.randn(shape).bfloat16())
    weights = [one] + [make(torch.randn(shape).bfloat16()) for _ in range(max(1, TOGETHER // one.bytes) - 1)]
    more = () if prompts is None else (None, prompts)
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).bfloat16()
        count = max(4, min(len(weights), 16 * len(weights) // rows))  # of many rows, reading is the smaller part
        found[rows] = microseconds(lambda number, x=x: weights[number](x, *more), count)
    return one.bytes, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args, console = parser.parse_args(), Console()
    rate = 1e9 * read_bandwidth(big_array(torch.device("cpu")))
    table = Table("microseconds by rows", "floor", *map(str, ROWS), title=f"memory is read at {rate / 1e9:.1f} GB/s")
    found: dict[str, Any] = {}
    for shape in SHAPES:
        for kind in KINDS:
            name = f"{kind}, {shape[1]} to {shape[0]}"
            size, times = by_rows(kind, shape)
            found[name] = {"bytes": size, "floor": 1e6 * size / rate, "microseconds": times}
            table.add_row(name, f"{1e6 * size / rate:.0f}", *(f"{each:.0f}" for each in times.values()))
    console.print(table)
    native = {f"{bits} bits": available(bits, torch.bfloat16) for bits in (8, 4)}
    if args.out:
        record = {"command": shlex.join(["python", *sys.argv]), "environment": environment()}
        threads = torch.get_num_threads()
        atomic_write_json(args.out, {**record, "threads": threads, "rate": rate, "native": native, "products": found})


if __name__ == "__main__":
    main()
