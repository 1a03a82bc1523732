"""An FFN alone beside what the machine can do: bytes over the bandwidth, useful FLOP over the matrix products' rate.

    python benchmarks/ffn_floor.py --dtypes bfloat16 --out benchmarks/results/ffn_floor-bfloat16.json

Random weights, experts of half the channels. Sides are every way to compute channel blocks, what is `chosen` of them,
the engine's experts (`served`), the dense FFN, plain and packed, and the experts of transformers' Qwen3MoE. Each pass
goes over so many layers that their experts are larger than any cache; the sides take turns, who begins moves on,
medians over rounds. Token i uses expert i mod E. Useful is what the tokens' experts are: their bytes once, products of
their channels alone; of the dense FFN all of it.
"""

import argparse
import copy
import importlib
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from command import command
from rich.console import Console
from rich.table import Table
from serving_throughput import QUIET
from speed import EXPERTS, KEEP, commit, random_masks
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from moesaic.experts import compute
from moesaic.experts.channel_blocks import ChannelBlocks, FFNWeights, layout_from_masks
from moesaic.experts.compute import TokenGroups
from moesaic.experts.packed import pack_linears
from moesaic.progress import Progress
from moesaic.refactor.machine import Machine, measure_machine
from moesaic.refactor.receipts import environment
from moesaic.serve.experts import HOT, BlockExperts, Packs
from moesaic.serve.step import TokenOrder

SHAPES = {  # model width, channels of the dense FFN: experts have half of them
    "512": (1024, 1024),
    "1024": (1024, 2048),
    "2048": (1024, 4096),  # the wide model's
    "1b": (2048, 8192),
    "tiny": (32, 64),
}
TOKENS = (1, 4, 8, 16, 32, 128, 512, 2048)
FEW = 32  # up to so many tokens a cell is of decoding
TOGETHER = 160 * 2**20  # bytes of one expert in all layers
MOST_FLOP = 40e9  # of a pass, but for a single layer
PLAIN = ("masked", "packed", "grouped")
TARGETS = {"decode": (3, 0.85), "prefill": (4, 0.85)}
FROM = 512  # tokens of a prompt that target 4 begins with

Side = Callable[[int, Tensor], Tensor]  # (layer, tokens) -> what the FFN makes of them


def paths(blocks: ChannelBlocks) -> dict[str, Any]:
    """The ways to compute these blocks by name: (blocks, tokens, groups) -> tokens."""
    try:
        found = importlib.import_module("moesaic.experts.backends").BACKENDS
    except ImportError:  # a version that has no registry
        return {name: getattr(compute, name) for name in PLAIN}
    return {name: backend.path for name, backend in found.items() if backend.suits(blocks)}


@dataclass(frozen=True)
class Case:
    """A shape in a dtype."""

    shape: str
    dtype: torch.dtype

    @property
    def hidden(self) -> int:
        return SHAPES[self.shape][0]

    @property
    def width(self) -> int:
        return SHAPES[self.shape][1]

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * round(KEEP * self.width) * self.dtype.itemsize

    @property
    def layers(self) -> int:
        """So many that one expert of all of them fits no cache."""
        return max(1, -(-TOGETHER // self.expert_bytes)) if self.shape != "tiny" else 2


class Layers:
    """The FFNs of all layers of a case, in every form that is compared."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        config = LlamaConfig(hidden_size=case.hidden, intermediate_size=case.width)
        masks = random_masks(case.layers, case.width, seed=0)
        self.dense = nn.ModuleList(LlamaMLP(config).to(case.dtype) for _ in masks).eval().requires_grad_(False)
        self.blocks = nn.ModuleList(
            _blocks(mlp, mask) for mlp, mask in zip(self.dense, masks, strict=True)
        ).requires_grad_(False)
        for blocks in self.blocks:
            if hasattr(blocks, "copies"):
                blocks.copies.limit = None  # as many as all ways need at once
        self.stock = nn.ModuleList(_stock(case) for _ in masks).requires_grad_(False)
        self.packed = copy.deepcopy(self.dense)
        pack_linears(self.packed)
        packs = Packs(limit=2**62)
        self.served = [BlockExperts(blocks, layer, packs) for layer, blocks in enumerate(self.blocks)]
        for layer in self.served:  # the engine copies what is used often
            for expert in range(EXPERTS):
                for _ in range(HOT):
                    layer.run(expert, torch.zeros(1, case.hidden, dtype=case.dtype))

    def sides(self, expert_N: Tensor, wanted: Sequence[str] | None = None) -> dict[str, Side]:
        groups, order = TokenGroups(expert_N), TokenOrder(expert_N.numpy(), len(expert_N), torch.device("cpu"))
        weights = torch.ones(len(expert_N), 1, dtype=self.case.dtype)

        def served(layer: int, x_ND: Tensor) -> Tensor:
            x_ND = order.gather(x_ND)
            y_ND = torch.empty_like(x_ND)
            for expert, rows in order.slices.items():
                y_ND[rows] = self.served[layer].run(expert, x_ND[rows])
            return order.scatter(y_ND)

        found: dict[str, Side] = {
            "dense": lambda layer, x: self.dense[layer](x),
            "dense packed": lambda layer, x: self.packed[layer](x),
            "stock": lambda layer, x: self.stock[layer](x, expert_N[:, None], weights),
        }
        for name, path in paths(self.blocks[0]).items():
            found[name] = lambda layer, x, path=path: path(self.blocks[layer], x, groups)
        found["chosen"] = lambda layer, x: self.blocks[layer](x, groups)
        found["served"] = served
        return {name: side for name, side in found.items() if wanted is None or name in wanted}


def _blocks(mlp: Any, mask: Tensor) -> ChannelBlocks:
    layout, order = layout_from_masks(mask)
    hidden = mlp.gate_proj.in_features
    blocks = ChannelBlocks(layout, hidden, mlp.act_fn).to(mlp.up_proj.weight.dtype)
    blocks.load_dense(FFNWeights(mlp.up_proj.weight, mlp.down_proj.weight, mlp.gate_proj.weight), order)
    return blocks.eval()


def _stock(case: Case) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(
        hidden_size=case.hidden,
        moe_intermediate_size=round(KEEP * case.width),
        num_experts=EXPERTS,
        num_experts_per_tok=1,
        experts_implementation="grouped_mm",
    )
    experts = Qwen3MoeExperts(config).to(case.dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


# -- times and what they are held against -----------------------------------------------------------------------------
def needed(layers: Layers, side: str, expert_N: Tensor) -> tuple[float, float]:
    """Bytes and FLOP that a layer of this side has to read and do for these tokens, mean over layers."""
    case, used = layers.case, expert_N.unique().tolist()
    channel = 3 * case.hidden
    if side.startswith("dense"):
        return float(channel * case.width * case.dtype.itemsize), 2.0 * len(expert_N) * channel * case.width
    width = round(KEEP * case.width)
    flop = 2.0 * len(expert_N) * channel * width
    if side == "stock":
        return float(len(used) * channel * width * case.dtype.itemsize), flop
    return statistics.fmean(float(blocks.bytes(used)) for blocks in layers.blocks), flop


def layers_of_a_pass(case: Case, tokens: int) -> int:
    """All of them where memory is read; fewer where products take the time."""
    flop = 6.0 * tokens * case.hidden * case.width
    return case.layers if tokens <= FEW else min(case.layers, max(1, int(MOST_FLOP / flop)))


@torch.inference_mode()
def measure(
    case: Case, layers: Layers, tokens: int, rounds: int, wanted: Sequence[str] | None
) -> dict[str, list[float]]:
    """Seconds of a layer, by side and round; before them one pass that packs and compiles."""
    expert_N = torch.arange(tokens) % EXPERTS
    x = torch.randn(tokens, case.hidden, generator=torch.Generator().manual_seed(tokens)).to(case.dtype)
    sides, count = layers.sides(expert_N, wanted), layers_of_a_pass(case, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, rounds):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            begin = time.perf_counter()
            for layer in range(count):
                sides[name](layer, x)
            if number >= 0:
                seconds[name].append((time.perf_counter() - begin) / count)
    return seconds


@dataclass(frozen=True)
class Measured:
    """A cell before its limits are known. needs: bytes and FLOP by side."""

    case: Case
    tokens: int
    seconds: dict[str, list[float]]
    needs: dict[str, tuple[float, float]]


def cell(own: Measured, machine: Machine) -> dict[str, Any]:
    """Of every side its median time and its shares of both limits."""
    case, tokens, seconds = own.case, own.tokens, own.seconds
    peak = machine.gemm_gflop_s[str(case.dtype).removeprefix("torch.")]
    sides = {}
    for name, each in seconds.items():
        middle = statistics.median(each)
        read, flop = own.needs[name]
        sides[name] = {
            "ms": 1e3 * middle,
            "of_bandwidth": read / middle / (machine.read_gb_s * 1e9),
            "of_gemm": flop / middle / (peak * 1e9),
            "over_dense": statistics.median(seconds["dense"]) / middle if "dense" in seconds else None,
            "rounds_ms": [1e3 * value for value in each],
        }
    kind = "decode" if tokens <= FEW else "prefill"
    return {"shape": case.shape, "dtype": str(case.dtype)[6:], "kind": kind, "tokens": tokens, "sides": sides}


def targets(cells: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The best of our paths in every cell that a target is about: decoding of one token, prompts of 512 and more."""
    for each in cells:
        if not (each["tokens"] == 1 or each["tokens"] >= FROM):
            continue
        number, least = TARGETS[each["kind"]]
        share = "of_bandwidth" if each["kind"] == "decode" else "of_gemm"
        ours = {n: s[share] for n, s in each["sides"].items() if n != "stock" and not n.startswith("dense")}
        if ours:
            name = max(ours, key=lambda name: ours[name])
            what = f"{each['shape']} {each['dtype']}, {each['tokens']} token(s): {name}"
            yield {"target": number, "what": what, "at_least": least, "is": ours[name], "met": ours[name] >= least}


def tables(record: dict[str, Any]) -> Iterator[Table]:
    shares = {"decode": "of_bandwidth", "prefill": "of_gemm"}
    names = list(dict.fromkeys(name for each in record["cells"] for name in each["sides"]))
    view = Table("experts, tokens", "of", *names, title=f"share of the limit; {record['limits']}")
    times = Table("experts, tokens", *names, title="times as fast as the dense FFN")
    for each in record["cells"]:
        first, sides = f"{each['shape']} {each['dtype']}, {each['tokens']}", each["sides"]
        key = shares[each["kind"]]
        view.add_row(first, key[3:], *(f"{sides[name][key]:.0%}" if name in sides else "" for name in names))
        over = [sides.get(name, {}).get("over_dense") for name in names]
        times.add_row(first, *("" if value is None else f"{value:.2f}" for value in over))
    yield from (view, times)
    wanted = Table("target", "best path", "at least", "is", "", title="targets")
    for each in record["targets"]:
        met = "met" if each["met"] else "missed"
        wanted.add_row(str(each["target"]), each["what"], f"{each['at_least']:.0%}", f"{each['is']:.0%}", met)
    yield wanted


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=shapes, help="channels of an expert, or 1b")
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--sides", nargs="+", help="paths by name, default all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a tiny FFN, few rounds: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(words)
    if args.quick:
        args.shapes, args.tokens, args.rounds, args.threads = ["tiny"], [1, 3, 512], 2, 1
    return args


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    load = os.getloadavg()[0]
    if load > QUIET:
        console.print(f"the machine is busy (load {load:.1f}): the shares mean little")
    cells, machines = [], {}
    total = len(args.dtypes) * len(args.shapes) * len(args.tokens)
    with Progress("FFN floor", total=total, unit="cells") as progress:
        for dtype in args.dtypes:
            machine, found = measure_machine(getattr(torch, dtype)), []
            for shape in args.shapes:
                case = Case(shape, getattr(torch, dtype))
                with torch.inference_mode():
                    layers = Layers(case)
                for tokens in args.tokens:
                    seconds = measure(case, layers, tokens, args.rounds, args.sides)
                    needs = {name: needed(layers, name, torch.arange(tokens) % EXPERTS) for name in seconds}
                    found.append(Measured(case, tokens, seconds, needs))
                    progress.advance(cell=f"{shape} {dtype} {tokens}")
                del layers
            again = measure_machine(getattr(torch, dtype))
            machine = better(machine, again, dtype)
            machines[dtype] = machine.to_dict()
            cells += [cell(each, machine) for each in found]
    limits = ", ".join(
        f"{dtype}: {each['read_gb_s']:.1f} GB/s, {each['gemm_gflop_s'][dtype]:.0f} GFLOP/s"
        for dtype, each in machines.items()
    )
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "environment": environment(),
        "machine": machines,
        "limits": limits,
        "load_before": load,
        "experts": EXPERTS,
        "rounds": args.rounds,
        "cells": cells,
        "targets": list(targets(cells)),
    }


def better(one: Machine, other: Machine, dtype: str) -> Machine:
    """Measured before and after: the better rates, since the others were disturbed."""
    gemm = max(each.gemm_gflop_s[dtype] for each in (one, other))
    return replace(max(one, other, key=lambda each: each.read_gb_s), gemm_gflop_s={dtype: gemm})


if __name__ == "__main__":
    command(parse(), run, tables)
