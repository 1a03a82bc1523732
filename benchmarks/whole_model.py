"""A dense model against its refactoring, whole: transformers, the engine, a stock mixture and llama.cpp take turns.

    python benchmarks/whole_model.py --model wide --llama LLAMA --out benchmarks/results/whole_model-wide.json
    python benchmarks/whole_model.py --model 1b --cells decode --batches 1 8 --llama LLAMA

Sides:  dense   the random Llama, transformers' forward (sdpa, one forward a token, greedy)
        moe     its refactoring, the same way
        moe-tuned                 the same after moesaic.tune
        dense-packed, moe-packed  both after moesaic.optimize, which packs linear layers; the latter tuned too
        engine  the same checkpoint in the serving engine, every expert in memory; engine-int8, ... with --weights
        llama   llama-batched-bench on the same dense weights; llama-q8_0, ... with --llama-types
        stock   transformers' Qwen3MoE of as many experts of the same width (random weights of its own)
        engine-dense              the dense model in the engine, as a refactoring with one expert that has all channels

With --device cuda all but llama.cpp run there; no copies of experts are packed then, the engine's experts lie in its
slab and its decode steps are CUDA graphs.

Prompts mix all experts; of the requests of a decode batch, number i uses expert i mod E alone. Models and files are
made on the first run and kept in `--work`. Each side runs in a process of its own; a cell is done by all before the
next, and who begins moves on from round to round. Times are means over a cell's forwards, medians over rounds; ratios
are of rounds. "of floor" is the least time for what a side must read (or compute) at the machine's measured rates, over
its time; of weights in fewer bits only reading counts.
"""

import argparse
import itertools
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from command import command
from rich.console import Console
from rich.table import Table
from serving_models import Size
from serving_sides import Apart, llama_parts
from serving_throughput import QUIET, spread
from speed import EXPERTS, KEEP, commit
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Qwen3MoeForCausalLM
from whole_model_files import LLAMA_TYPES, MODELS, dense_folder, llama_config, llama_file, moe_folder, whole_folder
from whole_model_sides import LlamaBench, Served, Side, Timing, load_forward, served, stock_forward

from moesaic.progress import Progress
from moesaic.refactor.machine import Machine, big_array, measure_machine, read_bandwidth
from moesaic.refactor.receipts import environment
from moesaic.refactor.speed import Cell, Work, least_work

SIDES = ("dense", "moe", "engine", "llama", "stock")
PREPARED = ("moe-tuned", "dense-packed", "moe-packed")  # left out unless asked for
WHOLE = "engine-dense"  # likewise
WEIGHTS = {"stored": 16.0, "int8": 8.0, "int4": 4.0}  # bits, scales left out
PEERS = {"int8": "llama-q8_0", "int4": "llama-q4_0", "q8_0": "llama-q8_0", "q4_0": "llama-q4_0"}  # of as many bits
DENSE = {"moe-packed": "dense-packed"}  # prepared alike
LLAMA_BITS = dict(zip(LLAMA_TYPES, (16.0, 8.5, 4.5), strict=True))
WARM_STEPS = 12  # decode steps before anything counts: the engine copies experts once they are used often
SLACK = 512  # tokens of context that requests may run ahead of the last to begin
LEAST_TOKENS = 512  # of a prefill cell in a round: short prompts are repeated
Rounds = dict[Cell, dict[str, list[Timing]]]


def cells_of(args: argparse.Namespace) -> list[Cell]:
    prefill = [Cell("prefill", 1, length, 0, max(1, LEAST_TOKENS // length)) for length in args.prefill]
    decode = [Cell("decode", batch, 1, args.context, args.steps) for batch in args.batches]
    return prefill * ("prefill" in args.cells) + decode * ("decode" in args.cells)


def token_ids(cell: Cell, vocabulary: int, number: int) -> Tensor:
    """Random tokens (B, S); of a decode cell the same in every round, those of row i all of expert i mod E."""
    generator = torch.Generator().manual_seed(number if cell.kind == "prefill" else 1000 + cell.batch)
    length = cell.length if cell.kind == "prefill" else cell.context + cell.forwards
    ids = torch.randint(EXPERTS, vocabulary // EXPERTS * EXPERTS, (cell.batch, length), generator=generator)
    if cell.kind == "prefill":
        return ids
    return ids // EXPERTS * EXPERTS + torch.arange(cell.batch)[:, None] % EXPERTS


# -- the sides --------------------------------------------------------------------------------------------------------
def stock_size(model: str) -> Size:
    config = llama_config(model)
    return Size(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        experts=EXPERTS,
        width=round(KEEP * config.intermediate_size),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
    )


def assemble(args: argparse.Namespace) -> tuple[dict[str, Side], list[str]]:
    """The sides that can run here by name, and a line for each that cannot."""
    sides: dict[str, Side] = {}
    missing: list[str] = []
    where = (args.work, args.model, args.dtype)
    apart = (lambda make: make()) if args.quick else partial(Apart, threads=args.threads)
    for name in ("dense", "moe", *PREPARED):
        begin, _, prepared = name.partition("-")
        if name in args.sides:
            folder = (dense_folder if begin == "dense" else moe_folder)(*where)
            sides[name] = apart(partial(load_forward, folder, args.dtype, prepared, args.device))
    for weights in args.weights if "engine" in args.sides else ():
        name = "engine" if weights == "stored" else f"engine-{weights}"
        sides[name] = apart(partial(served, moe_folder(*where), weights, **engine_options(args)))
    if WHOLE in args.sides:
        sides[WHOLE] = apart(partial(served, whole_folder(*where), "stored", **engine_options(args)))
    if "stock" in args.sides:
        sides["stock"] = apart(partial(stock_forward, stock_size(args.model), args.dtype, args.device))
    if "llama" in args.sides and args.llama is None:
        missing.append("llama.cpp is left out: --llama does not say where it is")
    elif "llama" in args.sides:
        binary, gguf = llama_parts(args.llama)
        for kind in args.llama_types:
            name = "llama" if kind == "bf16" else f"llama-{kind}"
            sides[name] = LlamaBench(binary, llama_file(gguf, *where, kind), args.threads)
    return sides, missing


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    cells = cells_of(args)
    longest = max(cell.length if cell.kind == "prefill" else cell.context + cell.forwards + SLACK for cell in cells)
    return dict(
        dtype=args.dtype,
        threads=args.threads,
        memory=args.memory,
        device=None if args.device == "cpu" else args.device,
        chunk=args.chunk,
        max_tokens=max(args.chunk, 512),
        max_requests=max(cell.batch for cell in cells),
        context=min(longest + 8, llama_config(args.model).max_position_embeddings),
    )


def play(sides: dict[str, Side], cells: Sequence[Cell], vocabulary: int, rounds: int) -> Rounds:
    """All rounds. What runs before them and counts for nothing loads, packs and compiles what is used first."""
    with Progress("warm-up", total=len(sides) * len(cells), unit="cells") as progress:
        for (name, side), cell in itertools.product(sides.items(), cells):
            warm = replace(cell, forwards=WARM_STEPS if cell.kind == "decode" else 1)
            if not name.startswith("llama"):
                side(warm, token_ids(warm, vocabulary, rounds))
            progress.advance(side=name)
    results: Rounds = {cell: {name: [] for name in sides} for cell in cells}
    with Progress("whole model", total=rounds * len(cells), unit="cells") as progress:
        for number, cell in itertools.product(range(rounds), cells):
            ids = token_ids(cell, vocabulary, number)
            names = list(sides)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                results[cell][name].append(sides[name](cell, ids))
            progress.advance(cell=cell.name)
    return results


# -- the floor --------------------------------------------------------------------------------------------------------
class Floors:
    """The least that a side's forward takes on this machine. Models are built on no device, for their sizes."""

    def __init__(self, args: argparse.Namespace, machine: Machine) -> None:
        self.config, self.machine = llama_config(args.model), machine
        self.gemm, self.dtype = machine.gemm_gflop_s[args.dtype], getattr(torch, args.dtype)
        self._rates: dict[int, float] = {}
        folder = moe_folder(args.work, args.model, args.dtype)
        with torch.device("meta"):
            self.models = {
                "dense": LlamaForCausalLM(self.config),
                "moe": AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)),
            }
            stock = stock_size(args.model).moe_config()
            stock.tie_word_embeddings = True
            self.models["stock"] = Qwen3MoeForCausalLM(stock)
        for model in self.models.values():
            backbone = getattr(model, "backbone", model)
            backbone.to(self.dtype).tie_weights()

    def work(self, side: str, cell: Cell, ids: Tensor, timing: Timing) -> Work:
        """What one forward of `side` must do, at the middle of the cell."""
        begin, _, kind = ("dense" if side == WHOLE else side).partition("-")
        model = self.models[{"engine": "moe", "llama": "dense"}.get(begin, begin)]
        first = cell.context if cell.kind == "decode" else 0
        new, context = ids[:, first : first + cell.length], cell.context + cell.forwards / 2 * (cell.kind == "decode")
        experts = new.flatten() % EXPERTS if begin in ("moe", "engine") else None
        work = least_work(model, new, experts, int(context), self._keys(cell, context))
        if begin == "stock":
            # a router in every layer chooses at random; at least one expert is read and each token uses one
            hidden, width = self.config.hidden_size, round(KEEP * self.config.intermediate_size)
            unused = (EXPERTS - 1) * 3 * hidden * width * self.config.num_hidden_layers
            tokens = new.numel()
            work = replace(
                work,
                weight_bytes=work.weight_bytes - unused * self.dtype.itemsize,
                flops=work.flops - 2.0 * tokens * unused,
            )
        bits = {**WEIGHTS, **LLAMA_BITS}.get(kind)
        if bits is None:
            return work
        return replace(work, weight_bytes=work.weight_bytes * bits / (8 * self.dtype.itemsize), flops=0.0)

    def share(self, work: Work, seconds: float) -> tuple[float, str]:
        """The floor over the time, and what sets it."""
        size = int(work.weight_bytes + work.cache_bytes)
        rate = self.machine.read_gb_s
        device = torch.device(self.machine.device)
        if size < big_array(device):  # some of it, or all, is in the caches from the forward before
            near = 1 << size.bit_length()
            self._rates.setdefault(near, read_bandwidth(near, device))
            rate = max(rate, self._rates[near])
        floor, limit = work.floor(rate, self.gemm)
        return floor / seconds, limit

    def _keys(self, cell: Cell, context: float) -> Any:
        if cell.kind == "prefill":
            return None
        shape = (cell.batch, self.config.num_key_value_heads, int(context), self.config.head_dim)
        keys = torch.empty(shape, dtype=self.dtype, device="meta")
        return SimpleNamespace(layers=[SimpleNamespace(keys=keys, values=keys)] * self.config.num_hidden_layers)


# -- the result -------------------------------------------------------------------------------------------------------
def cell_row(cell: Cell, results: dict[str, list[Timing]], floors: Floors) -> dict[str, Any]:
    ids = token_ids(cell, floors.config.vocab_size, 0)
    seconds = {name: [timing.seconds for timing in rounds] for name, rounds in results.items()}
    row: dict[str, Any] = {"name": cell.name, "kind": cell.kind, "batch": cell.batch, "tokens": cell.length}
    row["seconds"], row["sides"] = seconds, {}
    for name, each in seconds.items():
        middle = statistics.median(each)
        work = floors.work(name, cell, ids, results[name][-1])
        share, limit = floors.share(work, middle)
        row["sides"][name] = {
            "tokens_per_s": spread([cell.batch * cell.length / value for value in each]),
            "of_floor": share,
            "limit": limit,
            "experts": results[name][-1].experts,
        }
    return row


def ratio(row: dict[str, Any], side: str, other: str) -> dict[str, float] | None:
    """How many times as fast as `other` `side` is, by rounds; None where one of them did not run."""
    seconds = row["seconds"]
    if side not in seconds or other not in seconds:
        return None
    return spread([theirs / own for own, theirs in zip(seconds[side], seconds[other], strict=True)])


TARGETS = (  # number, whom, beside whom, kind and batch of the cells (None: all), at least
    (1, "moe", "dense", None, None, 1.0),
    (1, "moe-tuned", "dense", None, None, 1.0),
    (1, "moe-packed", "dense-packed", None, None, 1.0),
    (1, "engine", "dense", None, None, 1.0),
    (2, "moe", "dense", "decode", 1, 1.45),
    (2, "moe-tuned", "dense", "decode", 1, 1.45),
    (2, "moe-packed", "dense-packed", "decode", 1, 1.45),
    (2, "engine", "dense", "decode", 1, 1.45),
    (2, "moe", "dense", "decode", 8, 1.15),
    (2, "moe-tuned", "dense", "decode", 8, 1.15),
    (2, "moe-packed", "dense-packed", "decode", 8, 1.15),
    (2, "engine", "dense", "decode", 8, 1.15),
    (5, "engine", "llama", "decode", 1, 1.2),
    (5, "engine-int8", "llama-q8_0", "decode", 1, 1.2),
)


def targets(rows: Sequence[dict[str, Any]], model: str) -> Iterator[dict[str, Any]]:
    """What was wanted of the cells that ran, and what came; of target 1 the worst cell. 2 and 5 are of the 1b shape."""
    for number, side, other, kind, batch, least in TARGETS:
        chosen = [row for row in rows if (kind is None or row["kind"] == kind) and batch in (None, row["batch"])]
        found = [(each["median"], row["name"]) for row in chosen if (each := ratio(row, side, other)) is not None]
        if found and (number == 1 or model == "1b"):
            value, cell = min(found)
            what = f"{side} / {other}, " + (f"worst of {len(found)} cells: {cell}" if kind is None else cell)
            yield {"target": number, "what": what, "at_least": least, "is": value, "met": value >= least}


def tables(record: dict[str, Any]) -> Iterator[Table]:
    machine, rows = record["machine"], record["cells"]
    title = f"{record['model']} {record['dtype']}, {machine['name']}, {machine['threads']} thread(s), "
    title += f"{record['rounds']} rounds; floor: {machine['read_gb_s']:.1f} GB/s, {record['gemm_gflop_s']:.0f} GFLOP/s"
    headings = ("", "side", "tokens/s", "over dense (min to max)", "over llama.cpp", "of floor", "experts")
    speeds = Table(*headings, title=title)
    for row in rows:
        for number, (name, side) in enumerate(row["sides"].items()):
            peer = PEERS.get(name.partition("-")[2], "llama")
            over = [ratio(row, name, other) if name != other else None for other in (DENSE.get(name, "dense"), peer)]
            speeds.add_row(
                "" if number else row["name"],
                name,
                f"{side['tokens_per_s']['median']:,.1f}",
                *(f"{x['median']:.2f} ({x['min']:.2f} to {x['max']:.2f})" if x else "" for x in over),
                f"{side['of_floor']:.0%} {side['limit']}",
                f"{side['experts']:.1f}" if side["experts"] is not None else "",
            )
        speeds.add_section()
    yield speeds
    if record["targets"]:
        wanted = Table("target", "what", "at least", "is", "", title="targets")
        for each in record["targets"]:
            met = "met" if each["met"] else "missed"
            wanted.add_row(str(each["target"]), each["what"], f"{each['at_least']:.2f}", f"{each['is']:.2f}", met)
        yield wanted


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wide", help="shape of the random model")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--sides", nargs="+", choices=(*SIDES, *PREPARED, WHOLE), default=SIDES)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["stored"], help="of the engine's experts")
    parser.add_argument("--llama", type=Path, help="built llama.cpp checkout, or the path of llama-batched-bench")
    parser.add_argument("--llama-types", nargs="+", choices=LLAMA_TYPES, default=["bf16"])
    parser.add_argument("--cells", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--prefill", type=int, nargs="+", default=[128, 512, 2048], help="lengths of prompts")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--context", type=int, default=64, help="tokens before the first decode step")
    parser.add_argument("--steps", type=int, default=16, help="timed decode steps per cell and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prompt that the engine runs in one step")
    parser.add_argument("--device", default="cpu", help="where the sides compute")
    parser.add_argument("--memory", help="the engine's budget, such as 10GiB")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("benchmark-work/whole-model"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps, one process: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(words)
    if args.quick:
        args.model, args.prefill, args.batches, args.rounds, args.steps, args.context = "tiny", [32], [1, 3], 2, 4, 8
        args.threads = 1
    return args


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    cells, load = cells_of(args), os.getloadavg()[0]
    if load > QUIET:
        console.print(f"the machine is busy (load {load:.1f}): spinning threads lose most, ratios mean little")
    sides, missing = assemble(args)
    for line in missing:
        console.print(line)
    try:
        dtype = getattr(torch, args.dtype)
        before = measure_machine(dtype, device=args.device)
        vocabulary = llama_config(args.model).vocab_size
        results = play(sides, cells, vocabulary, args.rounds)
        after = measure_machine(dtype, device=args.device)
    finally:
        for side in sides.values():
            if isinstance(side, Apart | Served):
                side.close()
    machine = max(before, after, key=lambda each: each.read_gb_s)
    gemm = max(before.gemm_gflop_s[args.dtype], after.gemm_gflop_s[args.dtype])
    machine = replace(machine, gemm_gflop_s={args.dtype: gemm})
    floors = Floors(args, machine)
    rows = [cell_row(cell, results[cell], floors) for cell in cells]
    return {
        "command": shlex.join(["python", *("LLAMA" if word == str(args.llama) else word for word in sys.argv)]),
        "commit": commit(),
        "environment": environment(),
        "machine": machine.to_dict(),
        "gemm_gflop_s": gemm,
        "load_before": load,
        "model": args.model,
        "dtype": args.dtype,
        "config": llama_config(args.model).to_diff_dict(),
        "experts": EXPERTS,
        "keep": KEEP,
        "rounds": args.rounds,
        "context": args.context,
        "chunk": args.chunk,
        "left_out": missing,
        "cells": rows,
        "targets": list(targets(rows, args.model)),
    }


if __name__ == "__main__":
    if (args := parse()).device.startswith("cuda") and not torch.cuda.is_available():
        Console().print("whole_model: not run, there is no GPU that torch can use")
    else:
        command(args, run, tables)
