"""What a run and a sweep leave in a folder: the report, tables of requests, stages and runs, and the pictures.

Every file is whole or absent, and files of other names stay. Tables hold floats as Python writes them, so that reading
one gives the same number; text files are the same bytes for the same results. Pictures need the extra `plots`.
"""

import csv
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.files import atomic_write_text
from moesaic.simulate import figures
from moesaic.simulate.report import dumps
from moesaic.simulate.simulator import Run, Served, StageRow

Result = Mapping[str, Any]
Cells = Sequence[tuple[Mapping[str, Any], Result]]


class Column(NamedTuple):
    """Where a number of the table stands in a report, and what it says."""

    path: tuple[str, ...]
    words: str
    scale: float = 1.0


COLUMNS = {
    "hit_ratio": Column(("hit_ratio", "use"), "uses of an entry that found it there"),
    "kept.own": Column(("kept_ratio", "own"), "1 - loads / uses: prefetched entries count as loads"),
    "kept.lru": Column(("kept_ratio", "lru"), "the same accesses under LRU, without prefetch"),
    "kept.oracle": Column(("kept_ratio", "oracle"), "the same accesses under the oracle"),
    "mb_per_token": Column(("bytes_per_token",), "10^6 bytes moved for a token that was run", 1e-6),
    "stall_share": Column(("stall_share",), "of the stages' time, waited for entries"),
    "experts_per_step": Column(("experts_per_step",), "different experts a layer runs in one stage"),
    "ttft_p95_s": Column(("latency_s", "ttft", "p95"), "arrival to first token"),
    "tpot_mean_s": Column(("latency_s", "tpot", "mean"), "a further token"),
    "e2e_mean_s": Column(("latency_s", "end_to_end", "mean"), "arrival to last token"),
    "e2e_p95_s": Column(("latency_s", "end_to_end", "p95"), "the same, 95th percentile"),
    "normalised_mean_s": Column(("latency_s", "normalised", "mean"), "end to end over generated tokens"),
    "normalised_p95_s": Column(("latency_s", "normalised", "p95"), "the same, 95th percentile"),
    "tokens_per_s": Column(("throughput", "tokens_per_s"), "generated tokens a second"),
    "admission_wait_s": Column(("longest_wait_s", "admission"), "longest wait from arrival to first run"),
    "decode_wait_s": Column(("longest_wait_s", "decode"), "longest wait of a request between two of its steps"),
}
"""The numbers of a sweep's table, by name."""


def flat(result: Result) -> dict[str, float]:
    """The numbers of COLUMNS; NaN for what the run was not asked for (the kept ratios without bounds)."""
    return {name: _find(result, column.path) * column.scale for name, column in COLUMNS.items()}


def _find(result: Any, path: Sequence[str]) -> float:
    if path[0] == "kept_ratio" and path[0] not in result:
        return math.nan
    for key in path:
        result = result[key]
    return float(result)


# -- one run -------------------------------------------------------------------------------------------------------
def save(out: Path, result: Result, run: Run) -> list[str]:
    """Write report.json, requests.csv, stages.csv, latency.png and timeline.png; returns the names of what was written.

    Without matplotlib a warning names the pictures that are missing. Raises MoesaicError where `out` is a file.
    """
    _folder(out)
    atomic_write_text(out / "report.json", dumps(result))
    names = [field.name for field in fields(Served)]
    requests = ((i, *astuple(each)) for i, each in enumerate(run.requests))
    atomic_write_text(out / "requests.csv", _csv(("request", *names), requests))
    stages = ((i, *row) for i, row in enumerate(run.stages))
    atomic_write_text(out / "stages.csv", _csv(("stage", *StageRow._fields), stages))
    pictures: dict[str, Callable[[Path], None]] = {}
    if run.stages:
        pictures["latency.png"] = partial(figures.latency, result, run)
        pictures["timeline.png"] = partial(figures.timeline, result, run)
    return ["report.json", "requests.csv", "stages.csv", *_draw(out, pictures)]


# -- many runs -----------------------------------------------------------------------------------------------------
def save_table(results: Cells, out: Path, command: str) -> list[str]:
    """Write sweep.csv and sweep.md, capacity.png and load.png where such an axis has two values or more.

    Returns the names of what was written; `command` is what made the runs. Without matplotlib a warning names the
    pictures that are missing. Raises MoesaicError without a run, and where `out` is a file.
    """
    if not results:
        raise MoesaicError("a sweep without a run has no table: expected at least one cell and its report")
    _folder(out)
    axes = list(results[0][0])
    rows = [([_cell(cell[axis]) for axis in axes], flat(result)) for cell, result in results]
    atomic_write_text(out / "sweep.csv", _csv((*axes, *COLUMNS), ([*cell, *row.values()] for cell, row in rows)))
    pictures: dict[str, Callable[[Path], None]] = {}
    if figures.varies(results, "cache.capacity"):
        pictures["capacity.png"] = partial(figures.capacity, results)
    if any(figures.varies(results, axis) for axis in figures.LOADS):
        pictures["load.png"] = partial(figures.load, results)
    drawn = _draw(out, pictures)
    atomic_write_text(out / "sweep.md", markdown(axes, rows, command, drawn))
    return ["sweep.csv", "sweep.md", *drawn]


def markdown(
    axes: Sequence[str],
    rows: Sequence[tuple[Sequence[str], Mapping[str, float]]],
    command: str,
    pictures: Sequence[str],
) -> str:
    """sweep.md: the command, a row for each run in four digits, what the columns say, and the pictures."""
    lines = ["# Sweep", "", "```", command, "```", ""]
    lines += [_row([*axes, *COLUMNS]), _row(["---"] * len(axes) + ["---:"] * len(COLUMNS))]
    lines += [_row([*cell, *("–" if math.isnan(v) else f"{v:.4g}" for v in row.values())]) for cell, row in rows]
    lines += ["", "Seconds; ratios and shares in 0 to 1. sweep.csv has all digits.", ""]
    lines += [f"- `{name}`: {column.words}" for name, column in COLUMNS.items()]
    for name in pictures:
        lines += ["", f"![{name.removesuffix('.png')}]({name})"]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# -- shared --------------------------------------------------------------------------------------------------------
def _folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise MoesaicError(f"{out} is a file, expected a folder or nothing there; delete it or choose another name")


def _draw(out: Path, pictures: Mapping[str, Callable[[Path], None]]) -> list[str]:
    """Draw what can be drawn; everything else is complete without it."""
    try:
        for name, draw in pictures.items():
            draw(out / name)
    except MissingExtraError as error:
        warnings.warn(f"without {', '.join(pictures)}: {error}", stacklevel=3)
        return []
    return list(pictures)


def _csv(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")  # floats as repr writes them
    writer.writerow(names)
    writer.writerows(rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    """An axis value as it is typed: text bare, the rest as YAML reads it."""
    return value if isinstance(value, str) else json.dumps(value)
