"""The expert store: which entries are in memory is decided by `schedule.residency`; here their bytes are moved.

    ExpertMemory   the checkpoint's expert tensors mirrored in virtual memory: an entry's rows have one place, and pages
                   only while the entry is resident
    ExpertStore    a thread that reads what the residency asks for, demands before prefetches, and the waiting for it

The resident set is what the budget says: pages of entries that leave are given back before the next entries are read.
Entries may be small (blocks of some rows): those asked for together are read together, neighbours in the file at once.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.files import human_bytes
from moesaic.schedule.cache import Tally, Transfer
from moesaic.schedule.residency import Residency
from moesaic.schedule.work import Call, Key, WorkItem, keys_of, moments
from moesaic.serve.arena import PAGE, Arena
from moesaic.serve.model_files import ModelFiles, Part

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
POLL_S = 0.25  # how often a waiting engine looks whether the reading thread still lives
ATTEMPTS, PAUSE_S = 3, 0.05  # reads of an entry before it is given up, and the pause between them
KEPT = 256  # sums of steps
READ = 4 * 2**20  # bytes in one go of what is waited for
AHEAD = 2**18  # of what is fetched ahead: a demand must not wait long behind it


class ExpertReadError(MoesaicError):
    """Entries whose bytes could not be read."""

    def __init__(self, message: str, keys: Sequence[Key]) -> None:
        super().__init__(message)
        self.keys = tuple(keys)
        self.slots: frozenset[int] = frozenset()  # of the requests that need them, where only the step knew


class Piece(NamedTuple):
    """Bytes `start` to `stop` of a file, within a tensor, by its number."""

    tensor: int
    start: int
    stop: int


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
        self._numbers = {name: number for number, name in enumerate(names)}
        self._places = [files.tensors[name] for name in names]
        sizes = [-(-_count(place.shape) * dtype.itemsize // PAGE) * PAGE for place in self._places]
        self._starts = [0, *accumulate(sizes)]
        self._arena = Arena(self._starts[-1])
        self._users = np.zeros(self._starts[-1] // PAGE, np.int32)  # of each page, the entries that need it
        self._pieces = {key: [self._piece(part) for part in ranges] for key, ranges in parts.items()}
        self._pages = {key: self._pages_of(pieces) for key, pieces in self._pieces.items()}
        self._loaded: set[Key] = set()
        self._held = 0  # pages
        self._handles: dict[Path, tuple[int, os.stat_result]] = {}

    def tensor(self, name: str) -> Tensor:
        """A view of a whole tensor; rows of entries that are not loaded are zero."""
        number = self._numbers[name]
        return self._arena.tensor(self._starts[number], self._places[number].shape, self.dtype)

    @property
    def resident(self) -> int:
        """Bytes of pages that hold entries."""
        return self._held * PAGE

    def bytes(self, key: Key) -> int:
        """Bytes of the pages that an entry needs; neighbours may share some."""
        return len(self._pages[key]) * PAGE

    @property
    def whole(self) -> int:
        """Bytes of all entries together; pages that they share count once."""
        return len(np.unique(np.concatenate(list(self._pages.values())))) * PAGE

    def hold(self, key: Key) -> None:
        """Count the entry as loaded: somebody else fills its rows."""
        if key not in self._loaded:
            self._loaded.add(key)
            pages = self._pages[key]
            self._users[pages] += 1
            self._held += int((self._users[pages] == 1).sum())

    def load(self, *keys: Key) -> None:
        """Read the bytes of entries, neighbours in one go. Raises MoesaicError, naming the file, if some cannot be had.

        Then none of them is loaded that was not before.
        """
        new = [key for key in dict.fromkeys(keys) if key not in self._loaded]
        for key in new:
            self.hold(key)
        try:
            for piece in merged(piece for key in new for piece in self._pieces[key]):
                self._read(piece)
        except BaseException:
            for key in new:
                self.release(key)
            raise

    def release(self, key: Key) -> None:
        """Give back the pages that no other loaded entry needs."""
        if key not in self._loaded:
            return
        self._loaded.discard(key)
        pages = self._pages[key]
        self._users[pages] -= 1
        empty = pages[self._users[pages] == 0]
        self._held -= len(empty)
        for run in np.split(empty, np.flatnonzero(np.diff(empty) > 1) + 1) if len(empty) else ():
            self._arena.release(int(run[0]) * PAGE, (int(run[-1]) + 1) * PAGE)

    def close(self) -> None:
        """Close the files."""
        for handle, _ in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _piece(self, part: Part) -> Piece:
        return Piece(self._numbers[part.tensor], part.start, part.stop)

    def _target(self, piece: Piece) -> tuple[int, int]:
        """Where the bytes go: their range in the arena."""
        place = self._places[piece.tensor]
        stored = DTYPES[place.dtype].itemsize
        base = self._starts[piece.tensor]
        start, stop = (base + (at - place.start) // stored * self.dtype.itemsize for at in piece[1:])
        return start, stop

    def _pages_of(self, pieces: Sequence[Piece]) -> NDArray[np.int64]:
        """The pages that an entry touches, ascending."""
        ranges = map(self._target, pieces)
        return np.unique(np.concatenate([np.arange(start // PAGE, -(-stop // PAGE)) for start, stop in ranges]))

    def _read(self, piece: Piece) -> None:
        place = self._places[piece.tensor]
        handle = self._handle(place.file)
        start, stop = self._target(piece)
        stored = DTYPES[place.dtype]
        if stored == self.dtype:
            _read_into(handle, place.file, piece.start, self._arena.bytes(start, stop))
        else:
            raw = torch.empty(piece.stop - piece.start, dtype=torch.uint8)
            _read_into(handle, place.file, piece.start, raw.numpy().data)
            count = (stop - start) // self.dtype.itemsize
            self._arena.tensor(start, (count,), self.dtype).copy_(raw.view(stored))
        if self.drop:
            _advise(handle, "DONTNEED", piece.start, piece.stop - piece.start)

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


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """The same bytes, tensor by tensor, neighbours in one piece of at most `READ` bytes (or a single one's)."""
    out: list[Piece] = []
    for piece in sorted(pieces):
        tensor, start, stop = piece
        if out and out[-1][0] == tensor and out[-1][2] == start and stop - out[-1][1] <= READ:
            out[-1] = Piece(tensor, out[-1][1], stop)
        else:
            out.append(piece)
    return out


def _read_into(handle: int, path: Path, start: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(handle, [target[done:]], start + done)
        except OSError as error:
            raise MoesaicError(f"{path} cannot be read at byte {start + done}: {error.strerror}") from None
        if not count:
            raise MoesaicError(f"{path} ends at byte {start + done}: it is truncated; copy it again")
        done += count


def _advise(handle: int, advice: str, start: int, length: int) -> None:
    if hasattr(os, "posix_fadvise"):  # not everywhere; it changes no result
        os.posix_fadvise(handle, start, length, getattr(os, f"POSIX_FADV_{advice}"))


def _count(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


class EntryMemory(Protocol):
    """What an ExpertStore moves entries with: ExpertMemory, or one whose entries live elsewhere."""

    @property
    def resident(self) -> int:
        """Bytes that hold entries, where they are computed with."""
        ...

    def load(self, *keys: Key) -> None:
        """Bring entries; raises MoesaicError if some cannot be had."""
        ...

    def release(self, key: Key) -> None:
        """Its bytes are no longer needed."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class ExpertStore:
    """A residency whose transfers are real. The engine's thread calls everything; one thread of the store's own reads.

    residency: makes it, given what it shall tell of entries that leave.
    stall_s:   seconds the engine has waited for entries; books_s: that it spent deciding, within steps of the backbone.
    complete:  every entry is there, and nothing is moved until the residency shrinks.
    bytes_s:   bytes a second of recent reads, None before the first.
    """

    def __init__(self, memory: EntryMemory, residency: Callable[[Callable[[Key], None]], Residency]) -> None:
        self.memory = memory
        self.stall_s = self.books_s = 0.0
        self.complete = False
        self.bytes_s: float | None = None
        self._changed = threading.Condition()
        self._broken: dict[Key, str] = {}
        self._leaving: list[Key] = []
        self._batch: list[Transfer] = []  # under way
        self._next_batch: Transfer | None = None  # begins the one after
        self._deaths = 0  # of the reading thread, since it last brought something
        self._closed = False
        self._sums: dict[tuple[tuple[int, int], ...], Tally] = {}  # of the experts of a step, tokens left out
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
        self.memory.load(*(key for key in self.residency.preloaded if key in self.residency))
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

    def held(self, i: int, wave: Sequence[Call]) -> AbstractContextManager[None]:
        """The entries of a wave of moment i, there for as long as the block runs.

        Raises ExpertReadError, with nothing held, if some cannot be read.
        """
        return self._held([wave], i + 1)

    def all_held(self) -> AbstractContextManager[None]:
        """The entries of all layers of the stage, where they can be there `at_once`; raises as `held`."""
        layers = range(len(self.residency.moments))
        return self._held((wave for i in layers for wave in self.residency.waves(i)), len(layers))

    @contextmanager
    def _held(self, waves: Iterable[Sequence[Call]], after: int) -> Iterator[None]:
        """Entries of waves that are there together; moments from `after` on are fetched ahead."""
        begin, demanded, missing = time.perf_counter(), list[Sequence[Call]](), list[Key]()
        with self._changed:
            try:
                for wave in waves:
                    found = self.residency.demand(wave)
                    demanded.append(wave)
                    missing += found.late + found.misses
                self.residency.ahead(after)
                self._wake()
                self.books_s += time.perf_counter() - begin
                self._wait(missing)
            except BaseException:
                for wave in demanded:
                    self._give_up(wave)
                raise
        try:
            yield
        finally:
            begin = time.perf_counter()
            with self._changed:
                for wave in demanded:
                    self.residency.release(wave)
            self.books_s += time.perf_counter() - begin

    def passed(self, items: Sequence[WorkItem]) -> None:
        """A stage while `complete`, counted as `Residency.pass_by` does. Under the lock.

        A step uses hundreds of entries, always all of the same experts: what these add up to is kept.
        """
        routes = moments(items)
        experts = tuple(call[:2] for calls in routes for call in calls)
        kept = self._sums.get(experts)
        if kept is None:
            kept, layout = Tally(), self.residency.layout
            for calls in routes:
                kept.count([call._replace(tokens=0) for call in calls], layout.bytes.keys(), layout.bytes)
            if len(self._sums) >= KEPT:
                self._sums.clear()
            self._sums[experts] = kept
        tokens = sum(call.tokens for calls in routes for call in calls)
        tally = self.residency.pools[0].tally
        for name, count in vars(kept).items():
            if count:
                setattr(tally, name, getattr(tally, name) + count)
        tally.tokens += tokens
        tally.token_hits += tokens
        self.residency.stage += 1

    def at_once(self) -> bool:
        """Whether the entries of all layers of the stage can be there together."""
        pools = self.residency.pools
        keys = keys_of([call for calls in self.residency.moments for call in calls])
        return len(pools) == 1 and pools[0].minimum(keys) <= pools[0].capacity

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
        """The reading thread has died: another takes up the transfers it left, unless they are what kills it."""
        self._deaths += 1
        if self._deaths > ATTEMPTS:
            for transfer in self._batch:
                if transfer.key not in missing and not self.residency.ready(transfer.key):
                    self.residency.caches[transfer.key.layer].failed(transfer.key)
            self._deaths, self._batch = 0, []
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
                while not self._closed and not self._leaving and not self._taken():
                    self._changed.wait()
                if self._closed:
                    return
                leaving, self._leaving = self._leaving, []
                gone = [key for key in leaving if key not in self.residency]
                batch = self._taken()
            for key in gone:
                self.memory.release(key)
            if batch:
                self._move(batch)

    def _taken(self) -> list[Transfer]:
        """The transfers under way, or the next ones: all that a layer waits for, or some of what is fetched ahead."""
        if self._batch:
            return self._batch
        size = 0
        while not self._batch or size < (READ if self._batch[0].demand else AHEAD):
            transfer, self._next_batch = self._next_batch or self.residency.start(), None
            if transfer is None:
                break
            if self._batch and transfer.demand != self._batch[0].demand:
                self._next_batch = transfer
                break
            self._broken.pop(transfer.key, None)  # tried anew
            self._batch.append(transfer)
            size += transfer.bytes
        return self._batch

    def _move(self, batch: Sequence[Transfer]) -> None:
        """Read entries; each has arrived, or is known to be broken once it was tried several times."""
        begin = time.perf_counter()
        try:
            self.memory.load(*(transfer.key for transfer in batch))
            problems: dict[Key, str] = {}
        except MoesaicError:
            tried = {transfer.key: self._tried(transfer.key) for transfer in batch}
            problems = {key: problem for key, problem in tried.items() if problem is not None}
        seconds = max(time.perf_counter() - begin, 1e-9)
        with self._changed:
            self._batch, self._deaths = [], 0
            for transfer in batch:
                key = transfer.key
                if key in problems:
                    self._broken[key] = f"expert {key.unit} of layer {key.layer}: {problems[key]}"
                elif not self.residency.arrived(transfer) and key not in self.residency:
                    self._leaving.append(key)
            if not problems:
                self.complete = self.residency.complete
                rate = sum(transfer.bytes for transfer in batch) / seconds
                self.bytes_s = rate if self.bytes_s is None else 0.9 * self.bytes_s + 0.1 * rate
            self._changed.notify_all()

    def _tried(self, key: Key) -> str | None:
        """Read an entry alone, several times if need be; what is wrong with it."""
        problem = None
        for attempt in range(ATTEMPTS):
            try:
                self.memory.load(key)
                return None
            except MoesaicError as error:
                problem = str(error)
                time.sleep(PAUSE_S * (attempt + 1))
        return problem

    def __str__(self) -> str:
        capacity = sum(cache.capacity for cache in self.residency.pools)
        return f"{human_bytes(self.memory.resident)} of {human_bytes(capacity)} for experts"
