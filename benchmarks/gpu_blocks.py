"""How fast are the Triton kernels of channel blocks on a GPU, beside the plain paths and torch's grouped product?

    python benchmarks/gpu_blocks.py --out benchmarks/results/gpu_blocks.json

One FFN of random weights, experts of half the channels each, batches of mixed experts. Results are compared before they
are timed. Sides take turns, medians over rounds. Decode is printed as a share of the memory bandwidth that the machine
reaches (bytes of the union of the experts in use), prefill as a share of its matrix product (multiplications and
additions of the experts' own channels). grouped_mm computes from one contiguous copy of every expert: what sharing
channels saves in memory it does not have. Without a GPU it says so and measures nothing.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.experts import compute, triton_blocks
from moesaic.experts.channel_blocks import ChannelBlocks, TokenGroups, layout_from_masks
from moesaic.refactor.machine import big_array, device_name, gemm_rate, read_bandwidth
from moesaic.refactor.receipts import environment

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = 8  # units in the last place of the largest result: the sides round at different points

Sides = dict[str, Callable[[], Tensor]]


def random_blocks(hidden: int, width: int, experts: int, dtype: torch.dtype, device: torch.device) -> ChannelBlocks:
    """Experts of half the channels: those that score highest by a common and a private random number."""
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(width, generator=generator), torch.randn(experts, width, generator=generator)
    top = (common + own).topk(width // 2, dim=1).indices
    layout, _ = layout_from_masks(torch.zeros(experts, width, dtype=torch.bool).scatter_(1, top, True))
    blocks = ChannelBlocks(layout, hidden, F.silu).to(device, dtype).requires_grad_(False)
    torch.manual_seed(0)
    for weight in blocks.parameters():
        weight.normal_(std=hidden**-0.5)
    return blocks


def random_batch(blocks: ChannelBlocks, tokens: int) -> tuple[Tensor, TokenGroups]:
    """Tokens of mixed experts."""
    generator = torch.Generator().manual_seed(tokens)
    weight = blocks.up
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    return x, TokenGroups(torch.randint(blocks.layout.experts, (tokens,), generator=generator).to(weight.device))


class GroupedMM:
    """torch's grouped product over contiguous copies of equally wide experts."""

    def __init__(self, blocks: ChannelBlocks) -> None:
        blocks.copies.limit = None
        copies = [blocks.copy_of(expert).tensors for expert in range(blocks.layout.experts)]
        self.blocks = blocks
        self.gate_up = torch.stack([gate_up for gate_up, _, _ in copies])
        self.down = torch.stack([down for _, _, down in copies])

    def __call__(self, x_ND: Tensor, groups: TokenGroups) -> Tensor:
        counts = torch.tensor(groups.counts + [0] * (len(self.down) - len(groups.counts)))
        ends = counts.cumsum(0).to(x_ND.device, torch.int32)
        gate, up = F.grouped_mm(x_ND[groups.order], self.gate_up.mT, offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(self.blocks.activation(gate) * up, self.down.mT, offs=ends)
        return torch.empty_like(y).index_copy_(0, groups.order, y)


def sides_of(blocks: ChannelBlocks, torch_grouped: GroupedMM | None, x: Tensor, groups: TokenGroups) -> Sides:
    """What takes turns on this batch."""
    sides: Sides = {
        "masked": lambda: compute.masked(blocks, x, groups),
        "grouped": lambda: compute.grouped(blocks, x, groups),
        "grouped_prefill": lambda: triton_blocks.grouped_prefill(blocks, x, groups),
    }
    if len(x) == 1:
        sides["token_decode"] = lambda: triton_blocks.token_decode(blocks, x, groups)
    if len(x) <= triton_blocks.DECODE_TOKENS:
        sides["masked_decode"] = lambda: triton_blocks.masked_decode(blocks, x, groups)
    if torch_grouped is not None:
        sides["grouped_mm"] = lambda: torch_grouped(x, groups)
    return sides


def compare(sides: Sides) -> float:
    """The largest difference from the masked path over its largest result; an error if it is more than rounding."""
    expected = sides["masked"]().float()
    scale = expected.abs().max().item()
    worst = 0.0
    for name, side in sides.items():
        result = side()
        difference = (result.float() - expected).abs().max().item() / scale
        if not difference <= TOLERANCE * torch.finfo(result.dtype).eps:
            raise MoesaicError(f"{name} differs from masked by {difference:.1e} of the largest result: do not time it")
        worst = max(worst, difference)
    return worst


def medians(sides: Sides, rounds: int) -> dict[str, float]:
    """Seconds of each side on the device, its caches cleared before; launches are queued, as graphs replay them."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(do_bench(side, warmup=5, rep=20, return_mode="median") / 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def work(blocks: ChannelBlocks, groups: TokenGroups) -> tuple[int, int]:
    """Bytes of the union of the experts in use, and FLOP of every token through its own expert."""
    channels = sum(count * blocks.layout.expert_width(expert) for expert, count in enumerate(groups.counts))
    return blocks.bytes(groups.used), 2 * 3 * blocks.up.shape[1] * channels


@torch.no_grad()
def measure(blocks: ChannelBlocks, all_tokens: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Times of all sides, with the device's limits and the shares of them."""
    device, dtype = blocks.up.device, blocks.up.dtype
    limits = {"read_gb_s": read_bandwidth(big_array(device), device), "gemm_gflop_s": gemm_rate(dtype, device)}
    torch_grouped = GroupedMM(blocks) if dtype == torch.bfloat16 else None  # it takes no other
    rows = []
    for tokens in all_tokens:
        x, groups = random_batch(blocks, tokens)
        sides = sides_of(blocks, torch_grouped, x, groups)
        difference = compare(sides)
        seconds = medians(sides, rounds)
        read, flop = work(blocks, groups)
        shares = {
            name: {"bandwidth": read / s / 1e9 / limits["read_gb_s"], "peak": flop / s / 1e9 / limits["gemm_gflop_s"]}
            for name, s in seconds.items()
        }
        rows.append({"tokens": tokens, "difference": difference, "seconds": seconds, "shares": shares})
    return {"device": device_name(device), "limits": limits, "rows": rows}


def table_of(found: dict[str, Any]) -> Table:
    """Microseconds of each side and its share of what limits it: bandwidth in decode, the product in prefill."""
    names = ("masked", "grouped", "grouped_mm", "token_decode", "masked_decode", "grouped_prefill")
    table = Table("tokens", *names, title=f"{found['device']}: µs, and share of bandwidth (b) or peak (p)")
    for row in found["rows"]:
        limit = "bandwidth" if row["tokens"] <= triton_blocks.DECODE_TOKENS else "peak"
        cells = (
            f"{1e6 * row['seconds'][name]:.0f} {row['shares'][name][limit]:.0%} {limit[0]}"
            if name in row["seconds"]
            else "-"
            for name in names
        )
        table.add_row(str(row["tokens"]), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--experts", type=int, default=6)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    console = Console()
    if not torch.cuda.is_available():
        console.print("gpu_blocks: not run, there is no GPU that torch can use")
        return
    blocks = random_blocks(args.hidden, args.width, args.experts, DTYPES[args.dtype], torch.device("cuda"))
    found = measure(blocks, TOKENS, args.rounds)
    console.print(table_of(found))
    if args.out:
        shape = {name: getattr(args, name) for name in ("hidden", "width", "experts", "dtype", "rounds")}
        record = {"command": shlex.join(["python", *sys.argv]), "environment": environment(), "shape": shape, **found}
        args.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
