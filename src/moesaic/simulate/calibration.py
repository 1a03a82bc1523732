"""What a machine was measured to do with one model: the file that `moesaic bench` writes, and stages that cost that.

seconds of a stage = stage_s
                   + prefill_s, decode_s            of every token
                   + prefill_pair_s, decode_pair_s  of every token that one attends to
                   + call_s                         of every expert that a layer runs
                   + byte_s                         of every byte of its weights
A calibration is of one model, dtype, machine and number of threads. Units: seconds, bytes, flop.
"""

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_json
from moesaic.schedule.card import Card
from moesaic.schedule.topology import Link, Tier, Topology, Unit
from moesaic.schedule.trace import Trace
from moesaic.schedule.work import ANY, Call, Key
from moesaic.simulate.assemble import assemble
from moesaic.simulate.simulator import Simulator
from moesaic.simulate.stage_cost import LayerCost, StageCost, StageLoad
from moesaic.simulate.system import Parallel, System, build

SCHEMA, VERSION = "moesaic-calibration", 1
PageCache = Literal["keep", "drop"]


@dataclass(frozen=True)
class Costs:
    """Seconds, see the module. error: root mean square of the relative error over the cells that it was fitted to."""

    stage_s: float
    prefill_s: float
    decode_s: float
    prefill_pair_s: float
    decode_pair_s: float
    call_s: float
    byte_s: float
    error: float = 0.0

    def seconds(self, amounts: Sequence[float]) -> float:
        """Of a stage with these amounts, in the order of the fields: 1, tokens, ..., bytes."""
        return float(np.dot(astuple(self)[:-1], amounts))


@dataclass(frozen=True)
class Machine:
    """Where it was measured. load: programs that wanted a core just before, None where unknown."""

    cpu: str
    cores: int
    threads: int
    system: str
    torch: str
    load: float | None = None


@dataclass(frozen=True)
class Model:
    """What was measured. fingerprint: of its configuration and its tensors' shapes; bytes: of its files.

    weights: as stored, or the few bits that they were kept in.
    """

    name: str
    dtype: str
    fingerprint: str
    bytes: int
    weights: str = "stored"


@dataclass(frozen=True)
class Reads:
    """Reading entries of the checkpoint's files: `latency_s` each, and their bytes at `bytes_s`."""

    bytes_s: float
    latency_s: float


@dataclass(frozen=True)
class Floors:
    """Best rates: memory read, products in the model's dtype and in float32, entries from page cache and disk.

    disk: after the system was asked to forget the files; what lies below it may still have remembered them.
    """

    read_bytes_s: float
    flops: float
    flops_float32: float
    page_cache: Reads
    disk: Reads


@dataclass(frozen=True)
class Cell:
    """Steps of one kind. floor_s: least bytes or flop at the best rates; fit_s: what the costs say."""

    name: str
    requests: int
    tokens: int
    context: float
    experts: float
    steps: int
    mean_s: float
    best_s: float
    tokens_s: float
    floor_s: float
    limit: str
    fit_s: float

    @property
    def share(self) -> float:
        """Of the floor, at the mean."""
        return self.floor_s / self.mean_s


@dataclass(frozen=True)
class Check:
    """A burst of requests that the costs were not fitted to: live, and as the simulator replays it."""

    requests: int
    live_s: float
    simulated_s: float
    live_steps: int
    simulated_steps: int

    @property
    def error(self) -> float:
        """Of the simulated seconds, relative to the live ones."""
        return self.simulated_s / self.live_s - 1

    @property
    def step_error(self) -> float:
        """The same of the mean step."""
        return (self.simulated_s / self.simulated_steps) / (self.live_s / self.live_steps) - 1


@dataclass(frozen=True)
class Calibration:
    """The whole file. `card` has the model's sizes in the dtype that it was served in; created: when, UTC."""

    created: str
    moesaic: str
    machine: Machine
    model: Model
    card: Card
    floors: Floors
    cells: tuple[Cell, ...]
    costs: Costs
    check: Check

    @property
    def most_requests(self) -> int:
        """The largest batch of decode steps that was measured."""
        return max((cell.requests for cell in self.cells if cell.name.startswith("decode")), default=0)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        atomic_write_json(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        cells = [asdict(cell) | {"share": cell.share} for cell in self.cells]
        check = asdict(self.check) | {"error": self.check.error, "step_error": self.check.step_error}
        return {"schema": SCHEMA, "version": VERSION, **asdict(self), "cells": cells, "check": check}

    def elsewhere(self) -> str | None:
        """What differs between the machine that was measured and this one; None if nothing is known to."""
        here = (cpu_name(), os.cpu_count() or 1)
        there = (self.machine.cpu, self.machine.cores)
        if here == there:
            return None
        return f"the calibration was measured on {there[0]} with {there[1]} cores, this is {here[0]} with {here[1]}"

    def topology(self, page_cache: PageCache = "keep") -> Topology:
        """The machine for the simulator; entries come from the page cache, or with "drop" from the disk."""
        reads = self.floors.page_cache if page_cache == "keep" else self.floors.disk
        read, size = self.floors.read_bytes_s, float(self.model.bytes)
        return Topology(
            self.machine.cpu,
            (Tier("memory", size, read), Tier("files", size, reads.bytes_s, reads.latency_s)),
            (Unit("cpu", self.floors.flops, read, "memory"),),
            (Link("files", "memory", reads.bytes_s, reads.latency_s),),
            source=f"moesaic bench {self.model.name}, {self.created}, {self.machine.threads} threads",
        )

    def sized(self, trace: Trace) -> Trace:
        """The trace's routes in the model that was measured.

        Raises MoesaicError where the model cannot have made them.
        """
        slots = int(trace.routes.shape[2])
        if trace.card.experts != self.card.experts or trace.route_layers not in (1, self.card.layers) or slots > 1:
            raise MoesaicError(
                f"the trace of {trace.card.model} has {trace.card.experts} experts, {slots} a token, with routes of "
                f"{trace.route_layers} layers; the calibration is of {self.model.name}, with {self.card.experts} "
                f"experts, one a token, in {self.card.layers} layers: run moesaic bench on the traced model"
            )
        return replace(trace, card=replace(self.card, known_at=trace.card.known_at))


class CalibratedCost(StageCost):
    """Stages at measured costs, on one device. An expert reads all its entries, also those that others share."""

    def __init__(self, card: Card, sizes: Mapping[Key, int], machine: Topology, costs: Costs) -> None:
        super().__init__(card, sizes, machine)
        self.costs = costs

    def attention(self, load: StageLoad) -> float:
        """One layer's part of what tokens cost."""
        costs = self.costs
        seconds = costs.prefill_s * load.prefill_tokens + costs.decode_s * load.decode_tokens
        seconds += costs.prefill_pair_s * load.prefill_pairs + costs.decode_pair_s * load.decode_pairs
        return seconds / self.card.layers

    def experts(self, calls: Sequence[Call], load: StageLoad) -> LayerCost:
        """What experts cost beside their tokens."""
        seconds = 0.0
        for call in calls:
            layers = self.card.layers if call.layer == ANY else 1
            seconds += self.costs.call_s * layers + self.costs.byte_s * sum(self.sizes[key] for key in call.keys)
        return self._layer(calls, load, seconds, (seconds,))

    def ends(self, load: StageLoad) -> float:
        """What a stage costs however small."""
        return self.costs.stage_s


def simulator(
    trace: Trace, system: System, calibration: Calibration, seed: int = 0, page_cache: PageCache = "keep"
) -> Simulator:
    """A simulator of `system` on the machine and with the model that were measured.

    Raises MoesaicError for a system that spreads over devices, and a trace of other experts.
    """
    if system.parallel != Parallel():
        raise MoesaicError(
            f"system {system.name} spreads over devices or units, a calibration is of one machine: take another system"
        )
    trace = calibration.sized(trace)
    machine = calibration.topology(page_cache)
    layout = trace.layout(system.cache.granularity)  # type: ignore[arg-type]
    cost = CalibratedCost(trace.card, layout.bytes, machine, calibration.costs)
    return assemble(trace, system, seed, machine=machine, cost=cost)


def fit(amounts_NF: ArrayLike, seconds_N: ArrayLike, weight_N: ArrayLike) -> Costs:
    """The costs of least weighted squared error, each at least 0: every choice of those that are not 0 is tried."""
    weight = np.sqrt(np.asarray(weight_N, float))
    rows, wanted = np.asarray(amounts_NF, float) * weight[:, None], np.asarray(seconds_N, float) * weight
    scale = np.maximum(np.abs(rows).max(0), 1e-300)
    used = [f for f in range(rows.shape[1]) if np.any(rows[:, f])]
    best, least = np.zeros(rows.shape[1]), math.inf
    for count in range(1, len(used) + 1):
        for chosen in map(list, combinations(used, count)):
            found = np.linalg.lstsq(rows[:, chosen] / scale[chosen], wanted, rcond=None)[0]
            error = float(((rows[:, chosen] / scale[chosen] @ found - wanted) ** 2).sum())
            if found.min() >= 0 and error < least * (1 - 1e-9):
                least, best = error, np.zeros(rows.shape[1])
                best[chosen] = found / scale[chosen]
    return Costs(**dict(zip([each.name for each in fields(Costs)], best.tolist(), strict=False)))


def read_calibration(path: str | Path) -> Calibration:
    """Read what `save` wrote. Raises MoesaicError for a file that is missing, damaged, or none."""
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoesaicError(
            f"{path} cannot be read ({error.strerror}): moesaic bench MODEL --out {path} makes it"
        ) from None
    except ValueError:
        raise MoesaicError(f"{path} is no JSON: it is damaged or no calibration; run moesaic bench again") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise MoesaicError(f"{path} is no calibration: expected what moesaic bench wrote")
    if raw.get("version") != VERSION:
        raise MoesaicError(
            f"{path} is a calibration of version {raw.get('version')}, expected {VERSION}: run moesaic bench again"
        )
    try:
        return _calibration(raw)
    except (MoesaicError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = error if isinstance(error, MoesaicError) else repr(error)
        raise MoesaicError(f"{path} is damaged ({what}): run moesaic bench again") from None


def _calibration(raw: Mapping[str, Any]) -> Calibration:
    check = {name: value for name, value in raw["check"].items() if name not in ("error", "step_error")}
    cells = [{name: value for name, value in cell.items() if name != "share"} for cell in raw["cells"]]
    found = Calibration(
        created=str(raw["created"]),
        moesaic=str(raw["moesaic"]),
        machine=build(Machine, raw["machine"], "machine."),
        model=build(Model, raw["model"], "model."),
        card=Card.from_dict(raw["card"]),
        floors=build(Floors, raw["floors"], "floors."),
        cells=tuple(build(Cell, cell, "cells.") for cell in cells),
        costs=build(Costs, raw["costs"], "costs."),
        check=build(Check, check, "check."),
    )
    for name in (each.name for each in fields(Costs)):
        value = getattr(found.costs, name)
        if not (math.isfinite(value) and value >= 0):
            raise MoesaicError(f"costs.{name} is {value}, expected a finite number of at least 0")
    found.topology("keep"), found.topology("drop")  # rates above 0
    return found


def cpu_name() -> str:
    """What people call the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match[1].strip() if match else platform.processor() or platform.machine()
