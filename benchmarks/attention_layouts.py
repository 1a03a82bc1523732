"""Attention of single tokens over keys that lie token by token, and head by head: seconds of the same products.

    python benchmarks/attention_layouts.py

Bfloat16 and float32, several requests, queries of a group folded; the sides take turns, medians of CPU seconds of one
thread. "of floor" is the least time in which the keys and values can be read at the measured bandwidth.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moesaic.refactor.machine import big_array, read_bandwidth

HEADS, GROUPS, WIDTH, STRIDE = 16, 4, 64, 2048
CELLS = ((1, 576), (8, 576), (32, 64), (32, 576), (32, 1984))  # requests, keys


def keys_of(requests: int, keys: int, dtype: torch.dtype, by_head: bool) -> Tensor:
    """(requests, G, keys, D), a view of a pool with room for STRIDE tokens."""
    if by_head:
        return torch.randn(requests, GROUPS, STRIDE, WIDTH).to(dtype)[:, :, :keys]
    return torch.randn(requests, STRIDE, GROUPS, WIDTH).to(dtype)[:, :keys].transpose(1, 2)


@torch.inference_mode()
def measure(requests: int, keys: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Milliseconds of each layout."""
    query = torch.randn(requests, GROUPS, HEADS // GROUPS, WIDTH).to(dtype)
    mask = torch.zeros(requests, 1, 1, keys, dtype=dtype)
    pools = {
        name: [keys_of(requests, keys, dtype, name == "by head") for _ in "kv"] for name in ("by token", "by head")
    }
    times: dict[str, list[float]] = {name: [] for name in pools}
    for number in range(rounds):
        for name in pools if number % 2 else reversed(pools):
            begin = time.thread_time()
            F.scaled_dot_product_attention(query, *pools[name], attn_mask=mask)
            times[name].append(1e3 * (time.thread_time() - begin))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bandwidth = read_bandwidth(big_array(torch.device("cpu")))
    table = Table(title=f"one layer, one thread that reads {bandwidth:.0f} GB/s; milliseconds")
    for heading in ("dtype", "requests", "keys", "by token", "by head", "ratio", "of floor"):
        table.add_column(heading, justify="right")
    for dtype in (torch.bfloat16, torch.float32):
        for requests, keys in CELLS:
            found = measure(requests, keys, dtype, args.rounds)
            floor = 2e-6 * requests * keys * GROUPS * WIDTH * dtype.itemsize / bandwidth
            ratio = found["by token"] / found["by head"]
            cells = [f"{found[name]:.3f}" for name in found]
            name = str(dtype).removeprefix("torch.")
            table.add_row(name, str(requests), str(keys), *cells, f"{ratio:.2f}", f"{floor / found['by head']:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
