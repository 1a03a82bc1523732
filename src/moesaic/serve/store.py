"""The expert store: which entries are in memory is decided by `schedule.residency`; here their bytes are moved.

    ExpertMemory   the checkpoint's expert tensors mirrored in virtual memory: an entry's rows have one place, and pages
                   only while the entry is resident
    ExpertStore    a thread that reads what the residency asks for, demands before prefetches, and the waiting for it

The resident set is what the budget says: pages of entries that leave are given back before the next entry is read.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.files import human_bytes
from moesaic.schedule.cache import Transfer
from moesaic.schedule.residency import Residency
from moesaic.schedule.work import Call, Key, keys_of
from moesaic.serve.arena import PAGE, Arena
from moesaic.serve.model_files import ModelFiles, Part

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
POLL_S = 0.25  # how often a waiting engine looks whether the reading thread still lives
ATTEMPTS, PAUSE_S = 3, 0.05  # reads of an entry before it is given up, and the pause between them


class ExpertReadError(MoesaicError):
    """Entries whose bytes could not be read."""

    def __init__(self, message: str, keys: Sequence[Key]) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class ExpertMemory:
    """The tensors that hold entries, in `dtype`; a row has pages only while an entry that covers it is loaded.

    parts: of each entry, the byte ranges of the files it consists of.
    drop:  tell the system to forget what was read, so that memory outside the budget does not stand in for the disk.
    """

    def __init__(
        self, files: ModelFiles, parts: Mapping[Key, Sequence[Part]], dtype: torch.dtype, drop: bool = False
    ) -> None:
        self.files, self.parts, self.dtype, self.drop = files, parts, dtype, drop
        names = dict.fromkeys(part.tensor for ranges in parts.values() for part in ranges)
        self._places = {name: files.tensors[name] for name in names}
        self._starts: dict[str, int] = {}
        at = 0
        for name, place in self._places.items():
            self._starts[name] = at
            at += -(-_count(place.shape) * dtype.itemsize // PAGE) * PAGE
        self._arena = Arena(at)
        self._users = np.zeros(at // PAGE, np.int32)  # of each page, the entries that need it
        self._loaded: set[Key] = set()
        self._handles: dict[Path, tuple[int, os.stat_result]] = {}

    def tensor(self, name: str) -> Tensor:
        """A view of a whole tensor; rows of entries that are not loaded are zero."""
        return self._arena.tensor(self._starts[name], self._places[name].shape, self.dtype)

    @property
    def resident(self) -> int:
        """Bytes of pages that hold entries."""
        return int((self._users > 0).sum()) * PAGE

    def load(self, key: Key) -> None:
        """Read the entry's bytes. Raises MoesaicError, naming the file, where they cannot be had."""
        if key in self._loaded:
            return
        ranges = [self._target(part) for part in self.parts[key]]
        self._use(ranges, 1)
        self._loaded.add(key)
        try:
            for part, (start, stop) in zip(self.parts[key], ranges, strict=True):
                self._read(part, start, stop)
        except BaseException:
            self.release(key)
            raise

    def release(self, key: Key) -> None:
        """Give back the pages that no other loaded entry needs."""
        if key in self._loaded:
            self._loaded.discard(key)
            self._use([self._target(part) for part in self.parts[key]], -1)

    def close(self) -> None:
        """Close the files."""
        for handle, _ in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _target(self, part: Part) -> tuple[int, int]:
        place = self._places[part.tensor]
        stored = DTYPES[place.dtype].itemsize
        start, stop = (
            self._starts[part.tensor] + (at - place.start) // stored * self.dtype.itemsize
            for at in (part.start, part.stop)
        )
        return start, stop

    def _use(self, ranges: Sequence[tuple[int, int]], change: int) -> None:
        for start, stop in ranges:
            first, last = start // PAGE, -(-stop // PAGE)
            self._users[first:last] += change
            if change < 0:
                empty = np.flatnonzero(self._users[first:last] == 0)
                for run in np.split(empty, np.flatnonzero(np.diff(empty) > 1) + 1) if len(empty) else ():
                    self._arena.release((first + int(run[0])) * PAGE, (first + int(run[-1]) + 1) * PAGE)

    def _read(self, part: Part, start: int, stop: int) -> None:
        handle = self._handle(part.file)
        stored = DTYPES[self._places[part.tensor].dtype]
        if stored == self.dtype:
            _read_into(handle, part, self._arena.bytes(start, stop))
        else:
            raw = torch.empty(part.stop - part.start, dtype=torch.uint8)
            _read_into(handle, part, raw.numpy().data)
            count = (stop - start) // self.dtype.itemsize
            self._arena.tensor(start, (count,), self.dtype).copy_(raw.view(stored))
        if self.drop:
            _advise(handle, "DONTNEED", part.start, part.stop - part.start)

    def _handle(self, path: Path) -> int:
        """The open file; raises MoesaicError if it is another than when it was opened first."""
        if path not in self._handles:
            try:
                handle = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise MoesaicError(f"{path} cannot be opened: {error.strerror}; put the checkpoint back") from None
            _advise(handle, "RANDOM", 0, 0)  # nothing is read ahead but what the residency asks for
            self._handles[path] = handle, os.fstat(handle)
        handle, then = self._handles[path]
        now = os.fstat(handle)
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise MoesaicError(f"{path} was changed while it was served; restart the server on the new checkpoint")
        return handle


def _read_into(handle: int, part: Part, target: memoryview) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(handle, [target[done:]], part.start + done)
        except OSError as error:
            raise MoesaicError(f"{part.file} cannot be read at byte {part.start + done}: {error.strerror}") from None
        if not count:
            raise MoesaicError(f"{part.file} ends at byte {part.start + done}: it is truncated; copy it again")
        done += count


def _advise(handle: int, advice: str, start: int, length: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not everywhere; it changes no result
        os.posix_fadvise(handle, start, length, getattr(os, f"POSIX_FADV_{advice}"))


def _count(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


class ExpertStore:
    """A residency whose transfers are real. The engine's thread calls everything; one thread of the store's own reads.

    residency: makes it, given what it shall tell of entries that leave.
    stall_s:   seconds the engine has waited for entries; books_s: that it spent deciding, within steps of the backbone.
    complete:  every entry is there, and nothing is moved until the residency shrinks.
    bytes_s:   bytes a second of recent reads, None before the first.
    """

    def __init__(self, memory: ExpertMemory, residency: Callable[[Callable[[Key], None]], Residency]) -> None:
        self.memory = memory
        self.stall_s = self.books_s = 0.0
        self.complete = False
        self.bytes_s: float | None = None
        self._changed = threading.Condition()
        self._broken: dict[Key, str] = {}
        self._leaving: list[Key] = []
        self._transfer: Transfer | None = None  # under way
        self._deaths = 0  # of the reading thread, since it last brought something
        self._closed = False
        self._thread: threading.Thread | None = None
        self.on_left: Callable[[Key], None] = lambda key: None  # what else must know, on the engine's thread
        self.residency = residency(self._left)

    def _left(self, key: Key) -> None:
        """The residency's entry has left; its pages go before the next entry is read. Called under the lock."""
        self.complete = False
        self._leaving.append(key)
        self.on_left(key)

    def start(self) -> None:
        """Read what was preloaded, then serve transfers."""
        for key in self.residency.preloaded:
            if key in self.residency:
                self.memory.load(key)
        self.complete = self.residency.complete
        self._run()

    def _run(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="moesaic-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop reading and close the files."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self.memory.close()

    @contextmanager
    def lock(self) -> Iterator[Residency]:
        """The residency, for calls that move nothing: queued, begin, finish, forget, resize."""
        with self._changed:
            yield self.residency
            self._wake()

    @contextmanager
    def held(self, i: int, wave: Sequence[Call]) -> Iterator[None]:
        """The entries of a wave of moment i, there for as long as the block runs.

        Raises ExpertReadError, with nothing held, if some cannot be read.
        """
        begin = time.perf_counter()
        with self._changed:
            found = self.residency.demand(wave)
            self.residency.ahead(i + 1)
            self._wake()
            self.books_s += time.perf_counter() - begin
            try:
                self._wait(found.late + found.misses)
            except BaseException:
                self._give_up(wave)
                raise
        try:
            yield
        finally:
            begin = time.perf_counter()
            with self._changed:
                self.residency.release(wave)
            self.books_s += time.perf_counter() - begin

    def _wake(self) -> None:
        """Wake the reading thread if there is something to do: waking costs more than all bookkeeping of a layer."""
        if self._leaving or self.residency.asking:
            self._changed.notify_all()

    def _wait(self, keys: Sequence[Key]) -> None:
        if not keys:
            return
        begin = time.perf_counter()
        while missing := [key for key in keys if not self.residency.ready(key)]:
            if broken := [key for key in missing if key in self._broken]:
                raise ExpertReadError(self._broken[broken[0]], broken)
            if self._thread is None or not self._thread.is_alive():
                self._revive(missing)
            self._changed.wait(POLL_S)
        self.stall_s += time.perf_counter() - begin

    def _revive(self, missing: Sequence[Key]) -> None:
        """The reading thread has died: another takes up the transfer it left, unless that is what kills it."""
        self._deaths += 1
        if self._deaths > ATTEMPTS:
            self._deaths, self._transfer = 0, None
            raise ExpertReadError(f"the reading thread died {ATTEMPTS + 1} times over the same entries", missing)
        self._run()

    def _give_up(self, wave: Sequence[Call]) -> None:
        """Let go of a wave; entries that are not there are forgotten, so that the next demand asks anew."""
        self.residency.release(wave)
        for key in keys_of(wave):
            if self._broken.pop(key, None) is not None or not self.residency.ready(key):
                self.residency.caches[key.layer].failed(key)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not self._leaving and self._next() is None:
                    self._changed.wait()
                if self._closed:
                    return
                leaving, self._leaving = self._leaving, []
                gone = [key for key in leaving if key not in self.residency]
                transfer = self._next()
            for key in gone:
                self.memory.release(key)
            if transfer is not None:
                self._move(transfer)

    def _next(self) -> Transfer | None:
        if self._transfer is None:
            self._transfer = self.residency.start()
            if self._transfer is not None:
                self._broken.pop(self._transfer.key, None)  # tried anew
        return self._transfer

    def _move(self, transfer: Transfer) -> None:
        """Read an entry; it has arrived, or is known to be broken once it was tried several times."""
        begin, problem = time.perf_counter(), None
        for attempt in range(ATTEMPTS):
            try:
                self.memory.load(transfer.key)
                problem = None
                break
            except MoesaicError as error:
                problem = str(error)
                time.sleep(PAUSE_S * (attempt + 1))
        seconds = max(time.perf_counter() - begin, 1e-9)
        with self._changed:
            self._transfer, self._deaths = None, 0
            if problem is not None:
                self._broken[transfer.key] = f"expert {transfer.key.unit} of layer {transfer.key.layer}: {problem}"
            elif self.residency.arrived(transfer):
                self.complete = self.residency.complete
                rate = transfer.bytes / seconds
                self.bytes_s = rate if self.bytes_s is None else 0.9 * self.bytes_s + 0.1 * rate
            elif transfer.key not in self.residency:
                self._leaving.append(transfer.key)
            self._changed.notify_all()

    def __str__(self) -> str:
        capacity = sum(cache.capacity for cache in self.residency.pools)
        return f"{human_bytes(self.memory.resident)} of {human_bytes(capacity)} for experts"
