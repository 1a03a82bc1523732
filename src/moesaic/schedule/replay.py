"""Real arrivals with real routes: a recorded library of prompts lends its routes to the requests of a log.

Published logs have times and lengths but no texts; a library has texts, so routes, but no times. A request of the log
keeps its time and its token counts and takes the routes of one library sequence, repeated where that is shorter.
Shapes: R requests of the log, S sequences of the library.
"""

import csv
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MoesaicError
from moesaic.schedule.trace import Trace

Array = NDArray[Any]

NEAREST = 8
"""A request without a prompt takes one of so many library sequences, those of nearest prompt length."""

CSV_COLUMNS = ("arrival_s", "context_tokens", "generated_tokens")  # the Azure LLM inference traces of 2023, in seconds
JSON_COLUMNS = ("timestamp", "input_length", "output_length")  # Mooncake (2407.00079), milliseconds


@dataclass(frozen=True, eq=False)
class Arrivals:
    """A log: arrival_s, prompt_tokens, output_tokens (R,), sorted; prompt_id: which text each request sends, if known.

    Raises MoesaicError if the columns have different lengths or no request.
    """

    arrival_s: Array
    prompt_tokens: Array
    output_tokens: Array
    prompt_id: tuple[str, ...] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        columns = [self.arrival_s, self.prompt_tokens, self.output_tokens, self.prompt_id]
        sizes = {len(column) for column in columns if column is not None}
        if len(sizes) != 1 or 0 in sizes:
            raise MoesaicError(f"the log's columns have {sorted(sizes)} rows, expected as many each and at least one")

    def __len__(self) -> int:
        return len(self.arrival_s)

    def head(self, count: int) -> "Arrivals":
        """The first `count` requests."""
        return Arrivals(
            self.arrival_s[:count],
            self.prompt_tokens[:count],
            self.output_tokens[:count],
            None if self.prompt_id is None else self.prompt_id[:count],
            self.source,
        )


def read_arrivals(path: str | Path) -> Arrivals:
    """A log from a CSV (arrival_s, context_tokens, generated_tokens) or JSON lines (timestamp, input_length, ...).

    Either may name the text of each request in prompt_id. Raises MoesaicError with the line for a missing column, a
    cell that is no such number, or times that are not sorted.
    """
    path = Path(path)
    if not path.is_file():
        raise MoesaicError(f"no log of arrivals at {path}; expected a CSV or JSON lines")
    with path.open(encoding="utf-8") as file:
        start = file.read(1)
    names, rows, unit = (JSON_COLUMNS, _json_rows(path), 1e-3) if start == "{" else (CSV_COLUMNS, _csv_rows(path), 1.0)
    values: tuple[list[float], list[int], list[int]] = ([], [], [])
    ids: list[str] = []
    for line, row in rows:
        where = f"{path}, line {line}"
        time = _number(row, names[0], where, 0.0) * unit
        if values[0] and time < values[0][-1]:
            raise MoesaicError(f"{where}: arrival at {time} s after one at {values[0][-1]} s: sort the log by time")
        values[0].append(time)
        for column, name, least in ((values[1], names[1], 1), (values[2], names[2], 0)):
            column.append(_count(row, name, where, least))
        if row.get("prompt_id"):
            ids.append(str(row["prompt_id"]))
    if not values[0]:
        raise MoesaicError(f"{path} has no requests")
    if len(ids) not in (0, len(values[0])):
        raise MoesaicError(f"{path}: {len(ids)} of {len(values[0])} requests have a prompt_id; expected all or none")
    times, prompts, outputs = (np.asarray(column) for column in values)
    return Arrivals(times, prompts, outputs, tuple(ids) or None, path.name)


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or ()
        for name in CSV_COLUMNS:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"; is it {near[0]!r}?" if near else ""
                raise MoesaicError(f"{path}, line 1: no column {name!r}, expected {', '.join(CSV_COLUMNS)}{hint}")
        for row in reader:
            yield reader.line_num, row


def _json_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise MoesaicError(f"{path}, line {line}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise MoesaicError(f"{path}, line {line}: a {type(row).__name__}, expected an object")
            yield line, row


def _number(row: Mapping[str, Any], name: str, where: str, least: float) -> float:
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= least):
        raise MoesaicError(f"{where}: {name} is {row.get(name)!r}, expected a finite number of at least {least:g}")
    return value


def _count(row: Mapping[str, Any], name: str, where: str, least: int) -> int:
    value = _number(row, name, where, least)
    if value != int(value):
        raise MoesaicError(f"{where}: {name} is {row[name]!r}, expected a whole number")
    return int(value)


def replay(arrivals: Arrivals, library: Trace, seed: int = 0, keys: Sequence[str] | None = None) -> Trace:
    """The log's requests with the library's routes.

    keys: the prompt id of each library sequence; None = the library's own, meta["prompt_ids"].

    A request with a prompt id takes that sequence. One without takes, drawn evenly, one of the NEAREST sequences of
    nearest prompt length. What is longer than its sequence repeats it (`Trace.stretched`); what is shorter takes its
    first rows. Raises MoesaicError for an unknown prompt id, or a sequence without output for a request that has some.
    """
    which = _choose(arrivals, library, seed) if arrivals.prompt_id is None else _named(arrivals, library, keys)
    decode = np.maximum(arrivals.output_tokens - 1, 0)
    decode_rows = library.decode_rows[which]
    if (bad := (decode > 0) & (decode_rows == 0)).any():
        r = int(np.flatnonzero(bad)[0])
        raise MoesaicError(
            f"request {r} has {arrivals.output_tokens[r]} output tokens, but sequence {which[r]} of the library was "
            "recorded without any: record the library with more output tokens"
        )
    trace = replace(
        library,
        arrival_s=arrivals.arrival_s,
        prompt_tokens=arrivals.prompt_tokens,
        output_tokens=arrivals.output_tokens,
        prompt_row=library.prompt_row[which],
        prompt_rows=np.minimum(library.prompt_rows[which], arrivals.prompt_tokens),
        decode_row=library.decode_row[which],
        decode_rows=np.minimum(decode_rows, decode),
        meta={"source": "replay", "arrivals": arrivals.source, "seed": seed, "library": library.meta},
    )
    return trace.head(len(arrivals))


def _named(arrivals: Arrivals, library: Trace, keys: Sequence[str] | None) -> Array:
    """(R,) the sequence of each request's prompt id."""
    keys = library.meta.get("prompt_ids") if keys is None else keys
    if keys is None or len(keys) != library.requests:
        raise MoesaicError(
            f"the log names prompts, but the library has {0 if keys is None else len(keys)} prompt ids for its "
            f"{library.requests} sequences: record it from prompts with an id, or leave prompt_id out of the log"
        )
    place = {key: number for number, key in enumerate(keys)}
    for r, name in enumerate(arrivals.prompt_id or ()):
        if name not in place:
            near = difflib.get_close_matches(name, place, 1)
            raise MoesaicError(
                f"request {r} sends the prompt {name!r}, which is not among the library's {len(place)}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return np.array([place[name] for name in arrivals.prompt_id or ()], dtype=np.int64)


def _choose(arrivals: Arrivals, library: Trace, seed: int) -> Array:
    """(R,) a sequence for each request, by prompt length."""
    rng = np.random.default_rng(seed)
    order = np.argsort(library.prompt_tokens, kind="stable")
    lengths = library.prompt_tokens[order]
    places = np.searchsorted(lengths, arrivals.prompt_tokens)
    draws = rng.integers(0, min(NEAREST, len(order)), len(arrivals))
    chosen = np.empty(len(arrivals), dtype=np.int64)
    for r, (tokens, place, draw) in enumerate(zip(arrivals.prompt_tokens, places, draws, strict=True)):
        first = max(0, place - NEAREST)
        distance = np.abs(lengths[first : place + NEAREST] - tokens)
        chosen[r] = order[first + np.argsort(distance, kind="stable")[draw]]
    return chosen
