"""Decode throughput of four engines on models of one size: ours, transformers (two ways) and llama.cpp, all bfloat16.

    python benchmarks/serving_throughput.py --llama path/to/llama.cpp --out benchmarks/results/serving_throughput.json

The peers run one random Qwen3MoE with a router in every layer; ours is a dense Qwen3 cut into as many experts of as
many channels, behind a pre-gate. Both are made on the first run and kept in `--work`. llama.cpp needs a built checkout
(its gguf-py writes the model file) or the path of llama-batched-bench and an installed `gguf` package.

Every request gets random prompt tokens and goes on greedily, with no end of sequence; llama-batched-bench alone feeds
random tokens at every step. Timed are the first `--steps` steps in which all requests of a cell decode. Ours routes and
turns tokens into text on the way, the peers do not. The sides take turns, a cell at a time, each in a process of its
own, and swap who goes first.

A layer-wise router and a pre-gate spread tokens differently, which decides how many experts a step reads: that count
stands beside every speed, and "of floor" is the least time a side's own bytes take at the measured bandwidth over its
time.
"""

import argparse
import itertools
import os
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from serving_models import Cell, Size, make, step_bytes, write_gguf, write_ours, write_peer
from serving_sides import (
    Apart,
    ContinuousBatching,
    Decode,
    Generate,
    Llama,
    Ours,
    Side,
    distinct_by_layer,
    llama_parts,
    load_peer,
)
from speed import commit
from transformers import Qwen3MoeForCausalLM

from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_json
from moesaic.progress import Progress
from moesaic.refactor.machine import measure_machine
from moesaic.refactor.receipts import environment

OURS = "moesaic"
WARM_CONTEXT = 16
QUIET = 1.3  # load average; loading the models is part of it
REPEATS = 4  # of a single request in each round, which takes a fraction of a second; larger batches fewer


@dataclass
class Peers:
    """The sides that can run here, the peers' model, and a line for each side that cannot."""

    model: Qwen3MoeForCausalLM
    sides: dict[str, Side]
    missing: list[str]


def assemble(args: argparse.Namespace, size: Size, cells: Sequence[Cell]) -> Peers:
    work = args.work / str(size)
    peer = make(work / "qwen3moe", lambda path: write_peer(size, path))
    model = load_peer(peer)
    peers = Peers(model, {}, [])
    if OURS in args.sides:
        ours = make(work / "moesaic", lambda path: write_ours(size, path))
        requests = max(cell.batch for cell in cells)
        peers.sides[OURS] = Apart(partial(Ours, ours, requests, args.threads), args.threads)
    if "generate" in args.sides:
        peers.sides["generate"] = Apart(partial(Generate, peer), args.threads)
    if "continuous" in args.sides:
        peers.sides["continuous"] = Apart(partial(ContinuousBatching, peer), args.threads)
    if "llama.cpp" in args.sides and args.llama is None:
        peers.missing.append("llama.cpp is left out: --llama does not say where it is")
    elif "llama.cpp" in args.sides:
        binary, gguf = llama_parts(args.llama)
        file = make(work / "qwen3moe.gguf", lambda path: write_gguf(gguf, model, path))
        peers.sides["llama.cpp"] = Llama(binary, file, args.threads)
    return peers


Results = dict[Cell, dict[str, list[Decode]]]


def play(peers: Peers, cells: Sequence[Cell], args: argparse.Namespace, size: Size) -> Results:
    """All rounds. What runs before them and counts for nothing loads, packs and compiles what is used first."""
    for side, batch in itertools.product(peers.sides.values(), sorted({cell.batch for cell in cells})):
        side(Cell(batch, WARM_CONTEXT).prompts(size.vocabulary, args.rounds), args.steps)
    results: Results = {cell: {name: [] for name in peers.sides} for cell in cells}
    with Progress("serving throughput", total=args.rounds * len(cells), unit="cells") as progress:
        for number, cell in itertools.product(range(args.rounds), cells):
            prompts = cell.prompts(size.vocabulary, number)
            names = list(peers.sides)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                repeats = [peers.sides[name](prompts, args.steps) for _ in range(max(1, REPEATS // cell.batch))]
                results[cell][name].append(mean(repeats))
            progress.advance()
    return results


def mean(repeats: Sequence[Decode]) -> Decode:
    """All tokens over all time."""
    return replace(repeats[-1], tokens_per_s=statistics.harmonic_mean([each.tokens_per_s for each in repeats]))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def row(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Of every side its tokens/s, and of every peer how many times its speed ours has, by round."""
    sides = {name: {"tokens_per_s": spread(values)} for name, values in rates.items()}
    for name in set(rates) - {OURS} if OURS in rates else ():
        pairs = zip(rates[OURS], rates[name], strict=True)
        sides[name]["ours_over_it"] = spread([ours / peer for ours, peer in pairs])
    return {"sides": sides, "rounds": rates}


def cell_row(
    peers: Peers, size: Size, cell: Cell, results: dict[str, list[Decode]], steps: int, read_gb_s: float
) -> dict[str, Any]:
    out = row({name: [each.tokens_per_s for each in rounds] for name, rounds in results.items()})
    for name, rounds in results.items():
        side = out["sides"][name]
        if name == OURS:
            experts = statistics.mean(each.experts for each in rounds if each.experts is not None)
            side["overhead_share"] = statistics.mean(each.overhead for each in rounds if each.overhead is not None)
        else:
            random = Cell(cell.batch, cell.context + steps).prompts(size.vocabulary, 0)  # as llama-batched-bench does
            experts = distinct_by_layer(peers.model, rounds[-1].texts or random, cell.context, steps)
        least = step_bytes(size, cell, steps, experts, pregate=name == OURS)
        seconds = cell.batch / side["tokens_per_s"]["median"]
        side |= {"experts_per_step": experts, "least_bytes": least, "of_floor": least / (read_gb_s * 1e9) / seconds}
    return {"batch": cell.batch, "context": cell.context, **out}


def tables(record: dict[str, Any]) -> Iterator[Table]:
    machine, first = record["machine"], "requests x context"
    names = list(record["cells"][0]["sides"])
    peers = [name for name in names if name != OURS] if OURS in names else []
    titles = (
        f"decode, tokens/s ({machine['name']}, {machine['threads']} thread(s), {record['rounds']} rounds)",
        f"{OURS} over each, by rounds",
        f"experts per step; of floor at {machine['read_gb_s']:.1f} GB/s",
    )
    speeds, ratios, floors = (
        Table(first, *headings, title=title) for headings, title in zip((names, peers, names), titles, strict=True)
    )
    for cell in record["cells"]:
        sides, label = cell["sides"], str(Cell(cell["batch"], cell["context"]))
        over = [sides[name]["ours_over_it"] for name in peers]
        speeds.add_row(label, *(f"{sides[name]['tokens_per_s']['median']:,.0f}" for name in names))
        ratios.add_row(label, *(f"{each['median']:.2f} ({each['min']:.2f} to {each['max']:.2f})" for each in over))
        floors.add_row(
            label, *(f"{sides[name]['experts_per_step']:.2f}; {sides[name]['of_floor']:.0%}" for name in names)
        )
    yield from (speeds, ratios, floors) if peers else (speeds, floors)


def machine_now(size: Size, cell: Cell, steps: int) -> dict[str, Any]:
    working_set = step_bytes(size, cell, steps, experts=1, pregate=False)
    return measure_machine(torch.bfloat16, working_set=int(working_set)).to_dict()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = (OURS, "generate", "continuous", "llama.cpp")
    parser.add_argument("--llama", type=Path, help="built llama.cpp checkout, or the path of llama-batched-bench")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=32, help="timed decode steps per cell")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[16, 512])
    parser.add_argument("--sides", nargs="+", choices=sides, default=sides)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("benchmark-work/serving-throughput"))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    args, size, console = parse(), Size(), Console()
    torch.set_num_threads(args.threads)
    cells = [Cell(batch, context) for context in args.contexts for batch in args.batches]
    peers = assemble(args, size, cells)
    for line in peers.missing:
        console.print(line)
    before = machine_now(size, cells[0], args.steps)
    if (before["load"] or 0) > QUIET:
        console.print(
            f"the machine is busy (load {before['load']:.1f}): spinning threads lose most, ratios mean little"
        )
    results = play(peers, cells, args, size)
    machine = max(before, machine_now(size, cells[0], args.steps), key=lambda each: each["read_gb_s"])
    rows = [cell_row(peers, size, cell, results[cell], args.steps, machine["read_gb_s"]) for cell in cells]
    record = {
        "command": shlex.join(["python", *("LLAMA" if word == str(args.llama) else word for word in sys.argv)]),
        "commit": commit(),
        "environment": environment(),
        "machine": machine,
        "size": asdict(size),
        "load_before": before["load"],
        "steps": args.steps,
        "rounds": args.rounds,
        "left_out": peers.missing,
        "cells": rows,
    }
    for table in tables(record):
        console.print(table)
    if args.out:
        atomic_write_json(args.out, record)
    for side in peers.sides.values():
        if isinstance(side, Apart):
            side.close()


if __name__ == "__main__":
    try:
        main()
    except MoesaicError as error:
        sys.exit(f"error: {error}")
