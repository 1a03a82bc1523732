"""Progress of long work: a live bar with time left in a terminal, a plain line every ten seconds elsewhere.

Everything goes to stderr. Nothing is shown with the environment variable MOESAIC_PROGRESS=0 or after `set_quiet(True)`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")

PLAIN_INTERVAL = 10.0  # seconds between two plain lines
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Switch all progress of this process off (for --json and the like) or on again."""
    global _quiet
    _quiet = quiet


def track(iterable: Iterable[T], description: str, total: int | None = None, unit: str = "steps") -> Iterator[T]:
    """Yield the items of `iterable` while showing how many are done; `total` is read from its length if it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(description, total=total, unit=unit) as progress:
        for item in iterable:
            yield item
            progress.advance()


class Progress:
    """One line of progress as a context; several may be open at once, each with its own line.

    `completed` is where the work starts (a resumed run); the time left counts only what was done since.
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "steps", completed: int = 0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.completed = self._started_at = completed
        self.fields: dict[str, Any] = {}
        self._start = self._printed = time.monotonic()
        self._task: int | None = None

    def __enter__(self) -> Progress:
        self._start = self._printed = time.monotonic()
        if enabled() and sys.stderr.isatty():
            self._task = _bars.open(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._task is not None:
            _bars.close(self._task)
            self._task = None

    def advance(self, amount: int = 1, **fields: Any) -> None:
        """Count `amount` more as done and show `fields` (the latest loss, rate...) beside the bar."""
        self.completed += amount
        self.update(**fields)

    def update(self, **fields: Any) -> None:
        """Show `fields` beside the bar."""
        self.fields.update(fields)
        if self._task is not None:
            _bars.show(self._task, self)
        elif enabled() and time.monotonic() - self._printed >= PLAIN_INTERVAL:
            self._printed = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def seconds_left(self) -> float | None:
        """Estimated from the mean rate so far; None while unknown."""
        done = self.completed - self._started_at
        if self.total is None or done <= 0:
            return None
        return (time.monotonic() - self._start) / done * max(0, self.total - self.completed)

    def line(self) -> str:
        """The plain form: `heal: 120/200 steps, 0:01:20 left, loss 2.31`."""
        count = f"{self.completed}/{self.total}" if self.total is not None else f"{self.completed}"
        left = self.seconds_left()
        seconds = round(left or 0)
        clock = [] if left is None else [f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"]
        return ", ".join([f"{self.description}: {count} {self.unit}", *clock, *self._fields()])

    def _fields(self) -> list[str]:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in self.fields.items()}
        return [f"{key} {value}" for key, value in shown.items()]


def enabled() -> bool:
    """Whether progress is shown at all."""
    return not _quiet and os.environ.get("MOESAIC_PROGRESS", "1") != "0"


class _Bars:
    """The terminal's one live display: rich allows a single one, so all open bars share it."""

    def __init__(self) -> None:
        self._display: Any = None

    def open(self, progress: Progress) -> int | None:
        if self._display is None:
            try:
                from rich import progress as rich
                from rich.console import Console
            except ImportError:
                return None  # plain lines then
            self._display = rich.Progress(
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[unit]}", markup=False),
                rich.TimeRemainingColumn(),
                rich.TextColumn("{task.fields[latest]}", markup=False),
                console=Console(stderr=True),
            )
            self._display.start()
        return int(
            self._display.add_task(
                progress.description, total=progress.total, completed=progress.completed, unit=progress.unit, latest=""
            )
        )

    def show(self, task: int, progress: Progress) -> None:
        self._display.update(task, completed=progress.completed, latest=", ".join(progress._fields()))

    def close(self, task: int) -> None:
        self._display.stop_task(task)
        if all(item.stop_time is not None for item in self._display.tasks):
            self._display.stop()
            self._display = None


_bars = _Bars()
