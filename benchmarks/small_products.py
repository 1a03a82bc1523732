"""How long products of few tokens take: by rows, packed and plain, and after another thread has computed too.

    python benchmarks/small_products.py --out benchmarks/results/small_products.json

Weights are many and together larger than any cache, so that memory is read. `experts.buckets` fills rows up to numbers
that the first table gives; the second is why a serving engine computes in one thread alone.
"""

import argparse
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from moesaic.experts.packed import _pack, _product
from moesaic.files import atomic_write_json
from moesaic.refactor.receipts import environment

ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
SHAPES = ((1024, 1024), (2048, 1024))  # outputs, inputs
TOGETHER = 200 * 2**20  # bytes of all weights of a shape
PASSES = 9


def microseconds(call: Callable[[int], Any], count: int) -> float:
    """Of one call, in the fastest of some passes over `count` weights."""
    call(0)
    best = float("inf")
    for _ in range(PASSES):
        begin = time.perf_counter()
        for number in range(count):
            call(number)
        best = min(best, (time.perf_counter() - begin) / count)
    return 1e6 * best


@torch.inference_mode()
def by_rows(dtype: torch.dtype, shape: tuple[int, int], rows: int, packed: bool) -> float:
    """Microseconds of one product."""
    count = max(1, TOGETHER // (shape[0] * shape[1] * dtype.itemsize))
    weights = [torch.randn(shape).to(dtype) for _ in range(count)]
    x = torch.randn(rows, shape[1]).to(dtype)
    if not packed:
        return microseconds(lambda i: F.linear(x, weights[i]), count)
    weights = [_pack(weight) for weight in weights]
    return microseconds(lambda i: _product(x, weights[i], None), count)


def in_a_thread(first_elsewhere: bool) -> float:
    """Microseconds of a packed product in a second thread; `first_elsewhere`: the first one has computed before."""
    if first_elsewhere:
        _ = torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    out: list[float] = []
    thread = threading.Thread(target=lambda: out.append(by_rows(torch.bfloat16, SHAPES[0], 6, packed=True)))
    thread.start()
    thread.join()
    return out[0]


def alone(first_elsewhere: bool) -> float:
    """The same in a process of its own: a team of threads lasts as long as the thread it belongs to."""
    command = [sys.executable, __file__, "--thread", str(int(first_elsewhere))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--thread", type=int, help=argparse.SUPPRESS)
    args, console = parser.parse_args(), Console()
    if args.thread is not None:
        sys.stdout.write(json.dumps(in_a_thread(bool(args.thread))))
        return
    teams = {"only the second thread computes": alone(False), "the first has computed too": alone(True)}
    rows: dict[str, dict[int, float]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            for packed in (True, False):
                name = f"{str(dtype)[6:]} {shape[1]} to {shape[0]}, {'packed' if packed else 'plain'}"
                rows[name] = {count: by_rows(dtype, shape, count, packed) for count in ROWS}
    table = Table("microseconds by rows", *map(str, ROWS))
    for name, times in rows.items():
        table.add_row(name, *(f"{each:.0f}" for each in times.values()))
    console.print(table)
    for name, each in teams.items():
        console.print(f"{name}: {each:.0f} microseconds")
    if args.out:
        record = {"command": shlex.join(["python", *sys.argv]), "environment": environment()}
        atomic_write_json(
            args.out, {**record, "threads": torch.get_num_threads(), "microseconds": rows, "teams": teams}
        )


if __name__ == "__main__":
    main()
