"""One healing step against one training step of the dense model: time, memory, and what the difference is made of.

    python benchmarks/healing_step.py --model wide --out benchmarks/results/healing_step.json

Sides:  dense                    next-token training of the random dense model
        experts                  the expert stage by default: next-token loss, distillation from the dense model
        experts, no distillation the paper's recipe
        router                   the router stage: the pre-gate learns from the dense model's activations

All take the same batches, the same optimizer and precision, and the same training loop, each in a process of its own;
they take turns, who begins moves on, medians over rounds. Memory is the process's peak while it trains over what it
held before any model was loaded; every healing side holds the dense model, which the stages take turns to need. "by
arithmetic" is what FLOP and bytes of weights, gradients, optimizer and teacher say, activations left out.
"""

import argparse
import ctypes
import gc
import os
import resource
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from command import command
from rich.console import Console
from rich.table import Table
from serving_sides import Apart
from serving_throughput import QUIET, spread
from speed import EXPERTS, commit, random_masks
from torch import Tensor
from transformers import AutoModelForCausalLM
from whole_model_files import MODELS, dense_folder, llama_config, moe_folder

import moesaic  # noqa: F401  (registers the Auto classes)
from moesaic.progress import Progress
from moesaic.refactor.heal import HealConfig, expert_step
from moesaic.refactor.pregate import OverlapTeacher, router_step
from moesaic.refactor.receipts import environment
from moesaic.refactor.speed import least_work
from moesaic.training.loop import _Trainer, make_accelerator
from moesaic.training.losses import next_token_loss
from moesaic.training.schedule import Stage
from moesaic.training.state import Position

DENSE, EXPERT, PLAIN, ROUTER = "dense", "experts", "experts, no distillation", "router"
SIDES = (DENSE, EXPERT, PLAIN, ROUTER)
TIME, MEMORY = 1.15, 1.10  # target 6: at most so many times the dense model's
PARTS = ("teacher", "forward", "backward", "optimizer", "rest")


@dataclass(frozen=True)
class Batches:
    """Random tokens by step; `domain` is what a router's labels would be."""

    vocabulary: int
    rows: int
    length: int
    fingerprint: str = "random"

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(1, self.vocabulary, (self.rows, self.length), generator=generator)
        return {"input_ids": ids, "domain": torch.arange(self.rows) % EXPERTS}


@dataclass
class Step:
    """Of one round: seconds of a step, of its parts, and the bytes at most held."""

    seconds: float
    parts: dict[str, float]
    peak: int


class Training:
    """A side: called with the number of the round, it trains `steps` steps, after one that counts for nothing."""

    def __init__(self, side: str, work: Path, model: str, config: HealConfig, steps: int) -> None:
        self.steps, self.before = steps, resident()
        self.clock = Clock()
        shape = llama_config(model)
        dense = owned(dense_folder(work, model, "float32"))
        stage, trained, loss = self._stage(side, work, model, config, dense)
        batches = Batches(shape.vocab_size, config.batch_size, config.length)
        self.folder = tempfile.TemporaryDirectory()
        accelerator = make_accelerator()
        self.trainer = _Trainer(
            stage, trained.train(), self.clock.of("forward", loss), batches, Path(self.folder.name), accelerator
        )
        accelerator.backward = self.clock.of("backward", accelerator.backward)
        for optimizer in self.trainer.optimizers:
            optimizer.step = self.clock.of("optimizer", optimizer.step)  # type: ignore[method-assign]
        self.position = Position()

    def _stage(
        self, side: str, work: Path, model: str, config: HealConfig, dense: Any
    ) -> tuple[Stage, Any, Callable[..., Any]]:
        cpu, hidden = torch.device("cpu"), dense.config.hidden_size
        stage = config.expert_stage(hidden, 0, cpu)
        if side == DENSE:
            return replace(stage, coefficients={"lm": 1.0}), dense.requires_grad_(True), partial(dense_loss, dense)
        dense.eval().requires_grad_(False)
        dense.forward = self.clock.of("teacher", dense.forward)
        moe = owned(moe_folder(work, model, "float32"))
        if side == ROUTER:
            dense.model.forward = self.clock.of("teacher", dense.model.forward)
            masks = random_masks(dense.config.num_hidden_layers, dense.config.intermediate_size, seed=0)
            teacher = OverlapTeacher(dense, masks, config.router_loss)
            moe.requires_grad_(False)
            moe.pregate.requires_grad_(True)
            stage = config.router_stage(moe.pregate.config.width, 0, cpu)
            return stage, moe.pregate, router_step(moe.pregate, teacher, config.router_loss)
        moe.requires_grad_(True)
        moe.pregate.requires_grad_(False)
        distil = side == EXPERT
        if not distil:
            stage = replace(stage, coefficients={"lm": 1.0})
        return stage, moe, expert_step(moe, dense, distil)

    def __call__(self, number: int) -> Step:
        self._step()
        forget_peak()
        self.clock.seconds.clear()
        begin = time.perf_counter()
        for _ in range(self.steps):
            self._step()
        seconds = (time.perf_counter() - begin) / self.steps
        parts = {name: self.clock.seconds.get(name, 0.0) / self.steps for name in PARTS}
        parts["forward"] -= parts["teacher"]  # which runs inside of it
        parts["rest"] = seconds - sum(parts.values())
        return Step(seconds, parts, peak() - self.before)

    def close(self) -> None:
        self.folder.cleanup()

    def _step(self) -> None:
        row = self.trainer.update(self.position)
        self.position = replace(self.position, step=row["step"] % self.trainer.stage.steps, tokens=row["tokens"])


def dense_loss(dense: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"lm": next_token_loss(dense(input_ids=batch["input_ids"], use_cache=False).logits, batch["input_ids"])}


class Clock:
    """Adds up the seconds of calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def of(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running(name):
                return call(*args, **kwargs)

        return timed

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def owned(folder: Path) -> Any:
    """The model in float32, in memory of its own: no pages of the file, which would not be counted alike."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    gc.collect()
    return model


# -- memory -----------------------------------------------------------------------------------------------------------
def _status(name: str) -> int | None:
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":")), None)


def resident() -> int:
    """Bytes the process holds, after what it does not need was given back."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return _status("VmRSS") or peak()


def forget_peak() -> None:
    """The peak counts from now on, where the system can do that (Linux)."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def peak() -> int:
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


# -- what arithmetic says ---------------------------------------------------------------------------------------------
def arithmetic(work: Path, model: str, config: HealConfig) -> dict[str, dict[str, float]]:
    """Of both expert stages over the dense step: FLOP of the union of experts, of each token's own channels; bytes.

    A backward takes twice the FLOP of a forward. Weights, gradients and AdamW's two moments take 16 bytes each.
    """
    dense = AutoModelForCausalLM.from_pretrained(dense_folder(work, model, "float32"))
    moe = AutoModelForCausalLM.from_pretrained(moe_folder(work, model, "float32"))
    ids = Batches(dense.config.vocab_size, config.batch_size, config.length).batch(0)["input_ids"]
    head = 2.0 * ids.numel() * dense.lm_head.weight.numel()  # all logits are needed, not the last alone
    teacher = least_work(dense, ids).flops + head
    union = least_work(moe.backbone, ids).flops + head
    own = least_work(moe.backbone, ids, ids.flatten() % EXPERTS).flops + head
    weights, student = (sum(p.numel() for p in each.parameters()) for each in (dense, moe.backbone))
    result = {}
    for side, extra, held in ((EXPERT, teacher, 4 * weights), (PLAIN, 0.0, 4 * weights)):
        result[side] = {
            "flop, union of experts": (3 * union + extra) / (3 * teacher),
            "flop, own channels": (3 * own + extra) / (3 * teacher),
            "weights, gradients, optimizer": (16 * student + held) / (16 * weights),
        }
    return result


# -- the result -------------------------------------------------------------------------------------------------------
def summary(results: dict[str, list[Step]]) -> dict[str, dict[str, Any]]:
    """Of every side medians over rounds, and its ratios to the dense model's step, by rounds."""
    out: dict[str, dict[str, Any]] = {}
    for name, rounds in results.items():
        parts = {part: statistics.median(step.parts[part] for step in rounds) for part in PARTS}
        seconds, most = [step.seconds for step in rounds], max(step.peak for step in rounds)
        row = {"seconds": spread(seconds), "parts": parts, "peak_bytes": most, "rounds": seconds}
        if DENSE in results:
            dense = results[DENSE]
            pairs = zip(seconds, [step.seconds for step in dense], strict=True)
            row["time_over_dense"] = spread([own / theirs for own, theirs in pairs])
            row["memory_over_dense"] = most / max(step.peak for step in dense)
        out[name] = row
    return out


def targets(sides: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name, row in sides.items():
        if name != DENSE and "time_over_dense" in row:
            for what, value, most in (
                ("time", row["time_over_dense"]["median"], TIME),
                ("memory", row["memory_over_dense"], MEMORY),
            ):
                found.append(
                    {"target": 6, "what": f"{name}: {what}", "at_most": most, "is": value, "met": value <= most}
                )
    return found


def tables(record: dict[str, Any]) -> Iterator[Table]:
    shape = f"{record['model']}, {record['batch']} x {record['length']} tokens, {record['precision']}"
    headings = ("", "seconds", *PARTS, "over dense (min to max)", "peak MiB", "over dense")
    view = Table(*headings, title=f"one step of {shape}")
    for name, row in record["sides"].items():
        over = row.get("time_over_dense")
        view.add_row(
            name,
            f"{row['seconds']['median']:.3f}",
            *(f"{row['parts'][part]:.3f}" for part in PARTS),
            f"{over['median']:.2f} ({over['min']:.2f} to {over['max']:.2f})" if over else "",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            f"{row['memory_over_dense']:.2f}" if over else "",
        )
    yield view
    says = Table("", *next(iter(record["arithmetic"].values())), title="over the dense model's step, by arithmetic")
    for name, row in record["arithmetic"].items():
        says.add_row(name, *(f"{value:.2f}" for value in row.values()))
    yield says
    wanted = Table("target", "what", "at most", "is", "", title="targets")
    for each in record["targets"]:
        met = "met" if each["met"] else "missed"
        wanted.add_row(str(each["target"]), each["what"], f"{each['at_most']:.2f}", f"{each['is']:.2f}", met)
    yield wanted


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wide", help="shape of the random model")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--batch", type=int, default=HealConfig.batch_size)
    parser.add_argument("--length", type=int, default=HealConfig.length)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, default=Path("benchmark-work/whole-model"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps, one process: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(words)
    if args.quick:
        args.model, args.batch, args.length, args.rounds, args.threads = "tiny", 2, 16, 2, 1
    return args


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    load = os.getloadavg()[0]
    if load > QUIET:
        console.print(f"the machine is busy (load {load:.1f}): ratios mean little")
    config = HealConfig(batch_size=args.batch, length=args.length, dtype=args.precision, tokens=10**9)
    moe_folder(args.work, args.model, "float32")
    apart = (lambda make: make()) if args.quick else partial(Apart, threads=args.threads)
    sides = {name: apart(partial(Training, name, args.work, args.model, config, args.steps)) for name in args.sides}
    results: dict[str, list[Step]] = {name: [] for name in sides}
    try:
        with Progress("healing step", total=args.rounds, unit="rounds") as progress:
            for number in range(args.rounds):
                names = list(sides)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    results[name].append(sides[name](number))
                progress.advance()
    finally:
        for side in sides.values():
            side.close()
    found = summary(results)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "environment": environment(),
        "load_before": load,
        "model": args.model,
        "batch": args.batch,
        "length": args.length,
        "precision": config.precision(torch.device("cpu")),
        "steps": args.steps,
        "sides": found,
        "arithmetic": arithmetic(args.work, args.model, config),
        "targets": targets(found),
    }


if __name__ == "__main__":
    command(parse(), run, tables)
