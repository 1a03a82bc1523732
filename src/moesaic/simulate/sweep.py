"""Many runs of one trace: a grid over any keys of a system, in parallel, resumed where it stopped.

An axis is a dotted key of the system file with its values, `seed`, or one of two loads:
    load  share of the saturation rate: the requests per second that the unchanged system reaches when all of them come
          at once. It is the same rate for every cell, so that cells of one load face the same arrivals.
    rate  multiple of the trace's own arrival rate.
A run's report lies in OUT/runs under a name made from all that determines it, so finished runs are never repeated.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_text, sha256_file
from moesaic.progress import Progress, set_quiet
from moesaic.schedule.trace import Trace
from moesaic.simulate.assemble import assemble
from moesaic.simulate.calibration import Calibration, PageCache, read_calibration
from moesaic.simulate.calibration import simulator as calibrated
from moesaic.simulate.report import dumps, report
from moesaic.simulate.system import System, read_system

LOADS = ("load", "rate")
Cell = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """Costs and sizes of a calibration file in place of the system's device and the trace's own model."""

    path: Path
    page_cache: PageCache = "keep"

    @cached_property
    def calibration(self) -> Calibration:
        """What the file holds. Raises MoesaicError if it is none."""
        return read_calibration(self.path)


def simulate(
    trace: Trace, system: System, seed: int = 0, *, bounds: bool = True, measured: Measured | None = None
) -> dict[str, Any]:
    """One run and its report."""
    if measured is None:
        simulator = assemble(trace, system, seed)
    else:
        simulator = calibrated(trace, system, measured.calibration, seed, measured.page_cache)
    return report(simulator, simulator.run(system.name), system, seed, bounds=bounds)


def saturation(trace: Trace, system: System, seed: int = 0, measured: Measured | None = None) -> float:
    """Requests per second that the system serves when all requests are there from the start."""
    at_once = replace(trace, arrival_s=np.zeros_like(trace.arrival_s))
    result = simulate(at_once, system, seed, bounds=False, measured=measured)
    rate: float = result["throughput"]["requests_per_s"]
    return rate


def read_axes(given: Sequence[str]) -> dict[str, list[Any]]:
    """`key=a,b,c` as {key: values}, each value read as YAML. Raises MoesaicError for anything else."""
    axes: dict[str, list[Any]] = {}
    for each in given:
        key, sign, values = each.partition("=")
        if not sign or not values or not key:
            raise MoesaicError(f"axis {each!r}: expected key=value,value such as cache.capacity=0.25,0.5")
        if key in axes:
            raise MoesaicError(f"axis {key!r} is given twice: write all its values in one")
        axes[key] = [yaml.safe_load(value) for value in values.split(",")]
    return axes


@dataclass(frozen=True)
class Sweep:
    """A grid over `axes` around the system `source`, for the trace at `trace`."""

    trace: Path
    source: str
    axes: Mapping[str, Sequence[Any]]
    bounds: bool = True
    measured: Measured | None = None

    def cells(self) -> list[Cell]:
        """Every combination, the last axis fastest."""
        return [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]

    def system(self, cell: Mapping[str, Any]) -> System:
        """The system of a cell. Raises MoesaicError for keys it does not have."""
        return read_system(self.source, {key: value for key, value in cell.items() if key not in (*LOADS, "seed")})


def run_sweep(sweep: Sweep, out: Path, jobs: int = 1) -> list[tuple[Cell, dict[str, Any]]]:
    """Run every cell that has no report in `out` yet; returns all of them in the order of the grid.

    Raises MoesaicError for a cell that cannot run, after the others have finished; its name is in the message.
    """
    trace = Trace.load(sweep.trace)
    cells = sweep.cells()
    for cell in cells:
        sweep.system(cell)  # every misspelt key before the first run
    if sweep.measured is not None:
        sweep.measured.calibration.sized(trace)  # one that does not fit is found before the first run
    digest = sha256_file(sweep.trace)
    scale = _saturation(sweep, trace, out, digest) if "load" in sweep.axes else 0.0
    paths = [out / "runs" / f"{_name(sweep, cell, digest)}.json" for cell in cells]
    todo = [(cell, path) for cell, path in zip(cells, paths, strict=True) if not path.exists()]
    failed = []
    with Progress("sweep", total=len(cells), unit="runs", completed=len(cells) - len(todo)) as progress:
        for cell, error in _run_all(sweep, trace, todo, scale, jobs):
            if error is not None:
                failed.append(f"{_words(cell)}: {error}")
            progress.advance()
    if failed:
        raise MoesaicError(f"{len(failed)} of {len(cells)} runs failed, the others are kept. First: {failed[0]}")
    return [(cell, json.loads(path.read_text())) for cell, path in zip(cells, paths, strict=True)]


def _run_all(
    sweep: Sweep, trace: Trace, todo: list[tuple[Cell, Path]], scale: float, jobs: int
) -> Iterator[tuple[Cell, MoesaicError | None]]:
    if jobs == 1 or len(todo) < 2:
        for cell, path in todo:
            yield cell, _run(sweep, trace, cell, path, scale)
        return
    # spawned, not forked: a library's threads do not survive a fork
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (sweep,)) as pool:
        futures = {pool.submit(_run_there, cell, path, scale): cell for cell, path in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()


_there: tuple[Sweep, Trace]  # of a worker process


def _begin(sweep: Sweep) -> None:
    global _there
    set_quiet(True)
    _there = sweep, Trace.load(sweep.trace)


def _run_there(cell: Cell, path: Path, scale: float) -> MoesaicError | None:
    return _run(*_there, cell, path, scale)


def _run(sweep: Sweep, trace: Trace, cell: Cell, path: Path, scale: float) -> MoesaicError | None:
    """Run a cell and keep its report; returns the error of one that cannot run."""
    own = trace
    if "load" in cell:
        own = own.scaled(cell["load"] * scale / arrival_rate(trace))
    if "rate" in cell:
        own = own.scaled(cell["rate"])
    try:
        result = simulate(own, sweep.system(cell), cell.get("seed", 0), bounds=sweep.bounds, measured=sweep.measured)
    except MoesaicError as error:
        return error
    atomic_write_text(path, dumps(result))
    return None


def arrival_rate(trace: Trace) -> float:
    """Requests per second of the trace's arrivals."""
    span = float(trace.arrival_s[-1] - trace.arrival_s[0])
    if trace.requests < 2 or span <= 0:
        raise MoesaicError("the axis load needs a trace whose requests arrive over time; these come all at once")
    return (trace.requests - 1) / span


def _saturation(sweep: Sweep, trace: Trace, out: Path, digest: str) -> float:
    path = out / "runs" / f"saturation-{_name(sweep, {}, digest)}.json"
    if not path.exists():
        rate = saturation(trace, sweep.system({}), measured=sweep.measured)
        atomic_write_text(path, dumps({"requests_per_s": rate}))
    return float(json.loads(path.read_text())["requests_per_s"])


def _name(sweep: Sweep, cell: Cell, digest: str) -> str:
    """A name made from the system with its changes, the load, the seed and the trace."""
    loads = {key: cell[key] for key in (*LOADS, "seed") if key in cell}
    if "load" in cell:
        loads["of"] = repr(sweep.system({}))
    parts: list[Any] = [repr(sweep.system(cell)), loads, sweep.bounds, digest]
    if sweep.measured is not None:
        parts += [sha256_file(sweep.measured.path), sweep.measured.page_cache]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _words(cell: Cell) -> str:
    return ", ".join(f"{key}={value}" for key, value in cell.items())
