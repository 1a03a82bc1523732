"""The table of measured backends: which one is fastest, by shape of the layer, tokens and experts among them.

One JSON file for all models: machine -> shape -> cell -> microseconds of each backend. It is a cache: a damaged or
foreign file counts as an empty one. Written by `moesaic tune` and `moesaic.tune` only, read once a process.

    MOESAIC_CACHE       the folder, instead of moesaic/ in XDG_CACHE_HOME or ~/.cache
    MOESAIC_TUNE=off    no table is read
"""

import contextlib
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moesaic.files import atomic_write_json

if TYPE_CHECKING:
    from moesaic.experts.bank import FFNBank
    from moesaic.experts.channel_blocks import ChannelBlocks

FORMAT = 1
MOST_TOKENS = 512  # measured; more are taken for as many
MARGIN = 0.05  # by how much a backend must be faster than a simpler one to be preferred

Cell = tuple[int, int]
"""Tokens, and distinct experts among them."""
Times = dict[Cell, dict[str, float]]
"""Microseconds of each backend, in the order of simplicity."""


@dataclass
class Shape:
    """What was measured for layers of one shape."""

    times: Times = field(default_factory=dict)
    _found: dict[Cell, tuple[str, ...]] = field(default_factory=dict)

    def ranking(self, tokens: int, used: int) -> tuple[str, ...]:
        """Backends, best first, of the nearest cell: first in tokens, then in experts. None if all are far off."""
        if (tokens, used) not in self._found:
            if len(self._found) > 4096:
                self._found.clear()
            cell = min(self.times, key=lambda c: (_apart(c[0], tokens), _apart(c[1], used)))
            near = _apart(cell[0], min(tokens, MOST_TOKENS)) <= 2
            self._found[tokens, used] = rank(self.times[cell]) if near else ()
        return self._found[tokens, used]


def _apart(one: int, other: int) -> float:
    return abs(math.log2(max(1, one) / max(1, other)))


def rank(times: Mapping[str, float]) -> tuple[str, ...]:
    """Names, best first; `times` has the simpler ones first, and they go first unless clearly slower."""
    left, ranked = dict(times), []
    while left:
        best = next(iter(left))
        for name, time in left.items():
            if time < (1 - MARGIN) * left[best]:
                best = name
        ranked.append(best)
        del left[best]
    return tuple(ranked)


_loaded: dict[str, Shape] | None = None


def empty() -> bool:
    """Whether nothing was measured on this machine, or is not to be used."""
    global _loaded
    if _loaded is None:
        _loaded = {} if os.environ.get("MOESAIC_TUNE") == "off" else load()
    return not _loaded


def ranking(shape: str, tokens: int, used: int) -> tuple[str, ...]:
    """Backends for a layer of this shape, best first; none where it was not measured on this machine."""
    if empty():
        return ()
    assert _loaded is not None
    found = _loaded.get(f"{shape} {torch.get_num_threads()} threads")
    return found.ranking(tokens, used) if found and found.times else ()


def measured(shape: str) -> Times:
    """What the file says about layers of this shape under as many threads as torch uses now."""
    found = load().get(f"{shape} {torch.get_num_threads()} threads")
    return found.times if found else {}


def reload() -> None:
    """Read the file again when it is next asked for."""
    global _loaded
    _loaded = None


def cache_file() -> Path:
    """Where the table is."""
    if folder := os.environ.get("MOESAIC_CACHE"):
        return Path(folder) / "compute.json"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moesaic" / "compute.json"


def load() -> dict[str, Shape]:
    """This machine's part of the file, by shape and threads."""
    return {shape: Shape(times) for shape, raw in _mine(_read()).items() if (times := _times(raw))}


def save(shape: str, times: Times) -> Path:
    """Add what was measured with torch's threads as they are; what others wrote meanwhile stays. Returns the file."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        whole = _read()
        rows = {f"{tokens} {used}": {k: round(v, 2) for k, v in row.items()} for (tokens, used), row in times.items()}
        shapes = {**_mine(whole), f"{shape} {torch.get_num_threads()} threads": rows}
        atomic_write_json(path, {"format": FORMAT, "machines": {**_machines(whole), machine(): shapes}})
    reload()
    return path


def _read() -> Any:
    try:
        return json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _machines(whole: Any) -> dict[str, Any]:
    known = isinstance(whole, dict) and whole.get("format") == FORMAT and isinstance(whole.get("machines"), dict)
    return whole["machines"] if known else {}


def _mine(whole: Any) -> dict[str, Any]:
    mine = _machines(whole).get(machine())
    return mine if isinstance(mine, dict) else {}


def _times(raw: Any) -> Times:
    """The cells that are whole; others are left out."""
    times: Times = {}
    for key, row in raw.items() if isinstance(raw, dict) else ():
        numbers = re.fullmatch(r"([1-9]\d{0,8}) ([1-9]\d{0,8})", key)
        good = isinstance(row, dict) and row and all(isinstance(v, int | float) and 0 < v < 1e12 for v in row.values())
        if numbers and good:
            times[int(numbers[1]), int(numbers[2])] = {str(name): float(value) for name, value in row.items()}
    return times


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, where the system has locks; elsewhere the last one wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def machine() -> str:
    """What times depend on and no model changes: processor, cores, torch."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        if match := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            name = match[1].strip()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def blocks_shape(blocks: "ChannelBlocks") -> str:
    """What the times of channel blocks depend on: layers that differ by little share their times."""
    kind = "blocks" if blocks.gate is not None else "plain blocks"
    return f"{kind} {str(blocks.up.dtype)[6:]} D{blocks.up.shape[1]} {blocks.layout.shape}"


def bank_shape(bank: "FFNBank") -> str:
    """What the times of a bank depend on."""
    kind = "bank" if bank.gated else "plain bank"
    bias = " bias" if bank.gate_up_bias is not None or bank.down_bias is not None else ""
    return f"{kind} {str(bank.gate_up.dtype)[6:]} D{bank.width} H{bank.hidden} E{bank.experts}{bias}"
