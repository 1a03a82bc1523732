"""`moesaic bench`: what this machine does with a model, measured; the costs of its steps, fitted; both checked.

First the machine's best rates, then steps of the real engine at several batches, then a burst of requests that is
replayed in the simulator at the fitted costs: how far that is off is part of the result.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from moesaic.errors import MoesaicError
from moesaic.progress import Progress
from moesaic.refactor.machine import big_array, gemm_rate, read_bandwidth, using_threads
from moesaic.schedule.card import Card
from moesaic.schedule.trace import Trace
from moesaic.schedule.work import Key
from moesaic.serve.bench_steps import Burst, Kind, Step, burst, kinds, mean_experts, mean_load, measure
from moesaic.serve.bench_work import ModelWork
from moesaic.serve.engine import Engine
from moesaic.serve.lowbit_memory import entry_memory
from moesaic.serve.options import EngineOptions
from moesaic.serve.store import EntryMemory
from moesaic.simulate.calibration import (
    Calibration,
    Cell,
    Check,
    Costs,
    Floors,
    Machine,
    Reads,
    cpu_name,
    fit,
    simulator,
)
from moesaic.simulate.simulator import Limits
from moesaic.simulate.system import BatcherOptions, CacheOptions, PredictorOptions, System

T = TypeVar("T")

BATCHER = "decode-first"  # every running request in every step: steps of the sizes that were asked for
OUTLIER = 2.0  # steps slower than this many medians of their cell are left out: something else ran
READ_S = 3.0  # the longest that entries are read for, each time
CPU = torch.device("cpu")


@dataclass(frozen=True)
class BenchOptions:
    """memory, dtype, weights, threads: as the server is started. seconds: of measuring, about; seed of the prompts."""

    memory: int | str | None = None
    dtype: str = "auto"
    weights: str = "stored"
    context: int | None = None
    threads: int | None = None
    seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 86400:
            raise MoesaicError(f"{self.seconds} seconds of measuring: expected above 0, up to a day")
        if self.threads is not None and self.threads < 1:
            raise MoesaicError(f"{self.threads} threads: expected at least 1")

    @property
    def engine(self) -> EngineOptions:
        """The engine that is measured: no prefix is reused, so that every prompt runs."""
        return EngineOptions(
            memory=self.memory,
            dtype=self.dtype,  # type: ignore[arg-type]
            weights=self.weights,  # type: ignore[arg-type]
            context=self.context,
            threads=self.threads,
            batcher=BATCHER,
            prefix_reuse=False,
            seed=self.seed,
        )


def bench(folder: str | Path, options: BenchOptions = BenchOptions()) -> Calibration:
    """Measure the machine with the model in `folder`. Raises MoesaicError if the model cannot be served."""
    work, load = ModelWork(folder, options.dtype, options.weights), _load()
    floors, threads = _alone(lambda: measure_floors(work, options.threads))
    steps, crowd, capacity = _measure_engine(folder, work, options)
    costs = fit_steps(work, steps)
    floors = _alone(lambda: _once_more(floors, work, options.threads))
    rates = _alone(lambda: _read_rates(work, floors, steps, options.threads))
    cells = tuple(_cell(kind, work, floors, costs, rates[kind.name], own) for kind, own in steps)
    draft = Calibration(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        moesaic=version("moesaic"),
        machine=Machine(
            cpu_name(), os.cpu_count() or 1, threads, platform.platform(), torch.__version__.split("+")[0], load
        ),
        model=work.model,
        card=work.card,
        floors=floors,
        cells=cells,
        costs=costs,
        check=Check(len(crowd.heard), crowd.seconds, crowd.seconds, crowd.steps, crowd.steps),
    )
    return replace(draft, check=check(draft, crowd, options.engine, capacity))


def _alone(call: Callable[[], T]) -> T:
    """Run in a thread of its own: its OpenMP team ends with it and does not get in the way of the engine's."""
    with ThreadPoolExecutor(1, "moesaic-bench") as pool:
        return pool.submit(call).result()


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# -- the machine ------------------------------------------------------------------------------------------------------
def measure_floors(work: ModelWork, threads: int | None) -> tuple[Floors, int]:
    """Best rates, and the threads they were measured with."""
    dtype = getattr(torch, work.dtype)
    with using_threads(threads), Progress("machine", total=5, unit="rates") as progress:
        read = 1e9 * read_bandwidth(big_array(CPU))
        progress.advance(read_gb_s=read / 1e9)
        flops32 = 1e9 * gemm_rate(torch.float32)
        progress.advance(float32_gflop_s=flops32 / 1e9)
        flops = flops32 if dtype is torch.float32 else 1e9 * gemm_rate(dtype)
        progress.advance()
        read_entries(work, dtype, drop=False)  # into the page cache
        cached = read_entries(work, dtype, drop=False)
        progress.advance(page_cache_gb_s=cached.bytes_s / 1e9)
        read_entries(work, dtype, drop=True)  # and out of it
        disk = read_entries(work, dtype, drop=True)
        progress.advance(disk_gb_s=disk.bytes_s / 1e9)
        return Floors(read, flops, flops32, cached, disk), torch.get_num_threads()


def _once_more(floors: Floors, work: ModelWork, threads: int | None) -> Floors:
    """Rates of memory and products measured a second time, the better ones: the first may have been disturbed."""
    with using_threads(threads):
        read, flops = 1e9 * read_bandwidth(big_array(CPU)), 1e9 * gemm_rate(getattr(torch, work.dtype))
    return replace(floors, read_bytes_s=max(floors.read_bytes_s, read), flops=max(floors.flops, flops))


def read_entries(work: ModelWork, dtype: torch.dtype, drop: bool) -> Reads:
    """Read entries one by one, as the store does, for at most READ_S seconds; each is let go again."""
    _, _, memory = entry_memory(work.config, work.files, work.weights, dtype, drop)
    points = []
    try:
        end = time.perf_counter() + READ_S
        for key in sorted(work.parts):
            points.append((work.layout.bytes[key], _read(memory, key)))
            if time.perf_counter() > end:
                break
    finally:
        memory.close()
    return fit_reads(points)


def _read(memory: EntryMemory, key: Key) -> float:
    begin = time.perf_counter()
    memory.load(key)
    seconds = time.perf_counter() - begin
    memory.release(key)
    return seconds


def fit_reads(points: Sequence[tuple[int, float]]) -> Reads:
    """seconds = latency + bytes / rate; where sizes do not tell the two apart, all of it is the rate's."""
    sizes, seconds = np.array(points, float).T
    slope, start = np.polyfit(sizes, seconds, 1) if len(set(sizes)) > 1 else (0.0, 0.0)
    if slope <= 0 or start < 0:
        return Reads(float(sizes.sum() / seconds.sum()), 0.0)
    return Reads(float(1 / slope), float(start))


# -- the engine -------------------------------------------------------------------------------------------------------
def _measure_engine(
    folder: str | Path, work: ModelWork, options: BenchOptions
) -> tuple[list[tuple[Kind, list[Step]]], Burst, int]:
    """Steps by kind, the burst, and the bytes that experts may take."""
    engine = Engine(folder, options.engine)
    try:
        engine.start()
        wanted = kinds(engine.context, engine.options.max_requests, engine.options.max_tokens, len(engine.expert_names))
        share, steps = options.seconds / (len(wanted) + 1), []
        with Progress("engine", total=len(wanted) + 1, unit="cells") as progress:
            for number, kind in enumerate(wanted):
                own = measure(engine, kind, work.card.vocab, share, options.seed + number)
                if own:
                    steps.append((kind, _undisturbed(own)))
                progress.advance(cell=kind.name)
            crowd = burst(engine, work.card.vocab, share, options.seed)
            progress.advance(cell="burst")
        return steps, crowd, engine.stats().memory.experts_capacity
    finally:
        engine.close()


def _undisturbed(steps: Sequence[Step]) -> list[Step]:
    middle = statistics.median(step.seconds or 0.0 for step in steps)
    return [step for step in steps if (step.seconds or 0.0) <= OUTLIER * middle]


def fit_steps(work: ModelWork, cells: Sequence[tuple[Kind, Sequence[Step]]]) -> Costs:
    """The costs of all steps, relative to the mean of their cell, every cell with the same weight.

    The error is that of the cells' means: single steps are off by what else the machine does.
    """
    steps = [(step, 1 / (len(own) * _mean(own) ** 2)) for _, own in cells for step in own]
    amounts = [work.amounts(step.load) for step, _ in steps]
    costs = fit(amounts, [step.seconds or 0.0 for step, _ in steps], [weight for _, weight in steps])
    errors = [_fitted(costs, work, own) / _mean(own) - 1 for _, own in cells]
    return replace(costs, error=float(np.sqrt(np.mean(np.square(errors)))))


def _fitted(costs: Costs, work: ModelWork, steps: Sequence[Step]) -> float:
    return statistics.fmean(costs.seconds(work.amounts(step.load)) for step in steps)


def _mean(steps: Sequence[Step]) -> float:
    return statistics.fmean(step.seconds or 0.0 for step in steps)


def _read_rates(
    work: ModelWork, floors: Floors, cells: Sequence[tuple[Kind, Sequence[Step]]], threads: int | None
) -> dict[str, float]:
    """Bytes a second that a step's weights can be read at: what fits into caches is read again and again from there."""
    sizes = {kind.name: work.least_bytes(mean_load(steps)) for kind, steps in cells}
    near = {name: 1 << size.bit_length() for name, size in sizes.items()}  # cells of about one size share a measurement
    with using_threads(threads):
        rates = {size: 1e9 * read_bandwidth(size) for size in set(near.values()) if size < big_array(CPU)}
    return {name: max(floors.read_bytes_s, rates.get(size, 0.0)) for name, size in near.items()}


def _cell(kind: Kind, work: ModelWork, floors: Floors, costs: Costs, rate: float, steps: Sequence[Step]) -> Cell:
    load = mean_load(steps)
    read, compute = work.least_bytes(load) / rate, work.least_flop(load) / floors.flops
    tokens = load.prefill + load.decode
    return Cell(
        name=kind.name,
        requests=kind.requests,
        tokens=tokens,
        context=(load.decode_pairs + load.prefill_pairs) / tokens,
        experts=mean_experts(steps),
        steps=len(steps),
        mean_s=_mean(steps),
        best_s=min(step.seconds or 0.0 for step in steps),
        tokens_s=tokens / _mean(steps),
        floor_s=max(read, compute),
        limit="read" if read > compute else "compute",
        fit_s=_fitted(costs, work, steps),
    )


# -- the check --------------------------------------------------------------------------------------------------------
def check(calibration: Calibration, crowd: Burst, options: EngineOptions, capacity: int) -> Check:
    """The burst as the simulator replays it, with the engine's batcher, limits and memory for experts."""
    trace = burst_trace(calibration.card, crowd)
    system = System(
        name="bench",
        cache=CacheOptions(policy=options.policy, granularity="block", capacity=capacity, persist=True),
        predictor=PredictorOptions(kind=options.predictor, lookahead=options.lookahead),
        batcher=BatcherOptions(kind=options.batcher),
        limits=Limits(options.max_tokens, options.max_requests),
    )
    run = simulator(trace, system, calibration).run("check")
    return Check(trace.requests, crowd.seconds, run.end_s, crowd.steps, len(run.stages))


def burst_trace(card: Card, crowd: Burst) -> Trace:
    """The requests of a burst with the routes that they had, all arriving at 0."""
    rows: list[int] = []
    columns: dict[str, list[int]] = {name: [] for name in ("prompt_row", "prompt_rows", "decode_row", "decode_rows")}
    for heard in crowd.heard:
        decode = [expert for expert in heard.experts[:-1] if expert is not None]
        for name, experts in (("prompt", list(heard.prompt_experts)), ("decode", decode)):
            columns[f"{name}_row"].append(len(rows))
            columns[f"{name}_rows"].append(len(experts))
            rows += experts
    return Trace(
        arrival_s=np.zeros(len(crowd.heard)),
        prompt_tokens=np.array([len(heard.prompt) for heard in crowd.heard]),
        output_tokens=np.array([len(heard.experts) for heard in crowd.heard]),
        routes=np.array(rows)[:, None, None],
        card=card,
        meta={"source": "moesaic bench"},
        **{name: np.array(values) for name, values in columns.items()},
    )
