"""The accelerator's tier of the expert store: entries as rows of a slab on the device, main memory behind it.

    Slab         gate, up and down of as many channels as the budget holds. An entry takes any rows that are free, so
                 nothing fragments, and a channel that experts share is there once
    SlabMemory   what the store moves entries with, in place of ExpertMemory: disk -> main memory -> slab. Where main
                 memory has room for all entries they stay there, and nothing is ever copied back. Else an entry is in
                 one of them only: it leaves main memory when it enters the slab, and goes back when it is put out, as
                 long as there is room. Else the disk has it

Whatever reads and writes the slab's rows is ordered: uploads run on a stream of their own and are complete before the
store reports them; an entry's rows are given to others after the work that was queued when it left.
Shapes: S rows of the slab, W channels of an entry, D model width.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.experts.channel_blocks import ChannelBlocks
from moesaic.experts.triton_blocks import Stored
from moesaic.files import human_bytes
from moesaic.schedule.work import Key
from moesaic.serve.experts import Rows
from moesaic.serve.store import READ, ExpertMemory
from moesaic.serve.transfers import Transfers

Channels = Callable[[Key], Mapping[str, Tensor]]
"""Of an entry, its matrices (W, D) and biases (W,) in main memory, a row a channel; views."""


class Slab:
    """Rows of `capacity` bytes on a device. One entry shows which matrices there are.

    Raises MoesaicError if not a single row fits.
    """

    def __init__(self, like: Mapping[str, Tensor], capacity: int, device: torch.device) -> None:
        self.row_bytes = sum(part[0].numel() * part.element_size() for part in like.values())
        rows = capacity // self.row_bytes
        if rows < 1:
            raise MoesaicError(
                f"{human_bytes(capacity)} for experts on {device} hold no channel of {self.row_bytes} bytes: give more"
            )
        self.parts = {
            name: torch.zeros((rows, *part.shape[1:]), dtype=part.dtype, device=device) for name, part in like.items()
        }
        self._free = list(range(rows - 1, -1, -1))
        self.rows = rows

    @property
    def taken(self) -> int:
        """Rows in use."""
        return self.rows - len(self._free)

    def take(self, count: int) -> list[int]:
        """Rows for an entry, the lowest that are free. Raises MoesaicError if there are not so many."""
        if count > len(self._free):
            raise MoesaicError(
                f"{count} rows are wanted of the slab, {len(self._free)} are free: release entries first"
            )
        return [self._free.pop() for _ in range(count)]

    def give(self, rows: Sequence[int]) -> None:
        """The rows are free again."""
        self._free.extend(reversed(rows))


class SlabMemory:
    """The face of ExpertMemory, with entries on the device. One thread loads and releases.

    channels: of an entry, its rows in `host`.
    room:     bytes of main memory for entries that are not on the device, and for what passes through.

    Raises MoesaicError if `room` is less than the largest entry takes.
    """

    def __init__(self, host: ExpertMemory, channels: Channels, capacity: int, room: int, device: torch.device) -> None:
        self.host, self.channels, self.room = host, channels, room
        least = max(map(host.bytes, host.parts))
        if room < least:
            raise MoesaicError(
                f"host memory of {human_bytes(room)}: expected at least {least} bytes ({human_bytes(least)}), the "
                "largest entry, which passes through it"
            )
        self.stays = room >= host.whole  # main memory holds all entries for good
        self.slab = Slab(channels(next(iter(host.parts))), capacity, device)
        self.transfers = Transfers(device)
        self._rows: dict[Key, tuple[list[int], Tensor]] = {}  # of entries on the device: rows, and these as an index
        self._behind: dict[Key, None] = {}  # entries in main memory, those that left the device first come first
        self._marks: dict[Key, torch.cuda.Event | None] = {}
        self._before: list[torch.cuda.Event | None] = []  # uploads wait for these
        self.placed: Callable[[Key, Tensor], None] = lambda key, index: None  # hears where an entry lies

    @property
    def resident(self) -> int:
        """Bytes of the device that hold entries."""
        return self.slab.taken * self.slab.row_bytes

    @property
    def behind(self) -> int:
        """Bytes of main memory that hold entries."""
        return self.host.resident

    def index(self, key: Key) -> Tensor:
        """The rows of an entry that is there, (W,) int64 on the device."""
        return self._rows[key][1]

    def load(self, *keys: Key) -> None:
        """Bring entries to the device. Raises MoesaicError, naming the file, if some cannot be had: those are not."""
        new = [key for key in dict.fromkeys(keys) if key not in self._rows]
        for portion in self._portions(new):
            there = [key for key in portion if key in self._behind]
            for key in there:  # they are in use, so that none is forgotten to make room for its neighbours
                del self._behind[key]
            try:
                self._read([key for key in portion if key not in there])
            except MoesaicError:
                self._behind |= dict.fromkeys(there)
                raise
            with self.transfers.run():
                while self._before:  # whose rows these may be
                    self.transfers.after(self._before.pop())
                self._upload(portion)
            if self.stays:
                self._behind |= dict.fromkeys(portion)
                continue
            for key in portion:
                self.host.release(key)

    def left(self, key: Key) -> None:
        """The entry will be released: work that uses it is queued. Called by the thread that computes."""
        self._marks[key] = self.transfers.mark()

    def release(self, key: Key) -> None:
        """The entry's rows are free again; main memory takes it if it has room without what lies there longer."""
        mark = self._marks.pop(key, None)
        if key not in self._rows:
            return
        rows, index = self._rows.pop(key)
        if not self.stays and self._make_room(self.host.bytes(key)):
            self.host.hold(key)
            self._behind[key] = None
            with self.transfers.run():
                self.transfers.after(mark)
                for name, part in self.channels(key).items():
                    self.transfers.down(self.slab.parts[name][index], part)
        else:
            self._before.append(mark)
        self.slab.give(rows)

    def close(self) -> None:
        """Close the files."""
        self.host.close()

    def _portions(self, keys: Iterable[Key]) -> Iterator[list[Key]]:
        """Entries that pass through main memory together."""
        portion: list[Key] = []
        size = 0
        for key in keys:
            if portion and size + self.host.bytes(key) > min(READ, self.room):
                yield portion
                portion, size = [], 0
            portion.append(key)
            size += self.host.bytes(key)
        if portion:
            yield portion

    def _read(self, keys: Sequence[Key]) -> None:
        """Bring entries to main memory."""
        if keys and not self.stays:
            self._make_room(sum(map(self.host.bytes, keys)))
        if keys:
            self.host.load(*keys)

    def _make_room(self, size: int) -> bool:
        """Forget what left the device longest ago until `size` bytes more fit."""
        if size > self.room:
            return False
        while self._behind and self.host.resident + size > self.room:
            oldest = next(iter(self._behind))
            del self._behind[oldest]
            self.host.release(oldest)
        return True

    def _upload(self, keys: Sequence[Key]) -> None:
        parts = [self.channels(key) for key in keys]
        counts = [len(next(iter(own.values()))) for own in parts]
        taken = self.slab.take(sum(counts))
        index = torch.tensor(taken).to(self.transfers.device)
        for name, slab in self.slab.parts.items():
            slab.index_copy_(0, index, self.transfers.up([own[name] for own in parts]))
        rows = iter(taken)
        for key, count, places in zip(keys, counts, index.split(counts), strict=True):
            self.placed(key, places)
            self._rows[key] = list(islice(rows, count)), places


class SlabExperts:
    """Where experts lie in the slab: of an expert that is there, rows of gate, up, down and biases.

    entries: of (layer, expert), its entries in the order of its channels.
    """

    def __init__(self, memory: SlabMemory, entries: Mapping[tuple[int, int], Sequence[Key]]) -> None:
        self.memory, self.entries = memory, entries
        self._index: dict[tuple[int, int], Tensor] = {}

    def drop(self, places: Iterable[tuple[int, int]]) -> None:
        """Entries of these experts leave: they will lie elsewhere."""
        for at in places:
            self._index.pop(at, None)

    def rows(self, layer: int) -> Rows:
        """What `BlockExperts` of the layer reads."""
        return lambda name, expert: [self._gathered(name, layer, expert)]

    def stored(self, blocks: Sequence[ChannelBlocks]) -> list[Stored]:
        """Of each layer, what the kernels read; rows change in place as entries come."""
        device, parts = self.memory.transfers.device, self.memory.slab.parts
        tables = [torch.zeros(own.layout.width, dtype=torch.int32, device=device) for own in blocks]

        def placed(key: Key, index: Tensor) -> None:
            block = blocks[key.layer].layout.blocks[key.unit]
            tables[key.layer][block.start : block.stop].copy_(index)

        self.memory.placed = placed
        gate, biases = parts.get("gate"), (parts.get("gate_bias"), parts.get("up_bias"))
        return [Stored(gate, parts["up"], *biases, parts["down"], table) for table in tables]

    def matrices(self, layer: int, count: int) -> Sequence[Sequence[Tensor]]:
        """What `StockExperts` of the layer reads, of `count` experts."""
        return _Matrices(self, layer, count)

    def _gathered(self, name: str, layer: int, expert: int) -> Tensor:
        at = layer, expert
        if at not in self._index:
            self._index[at] = torch.cat([self.memory.index(key) for key in self.entries[at]])
        return self.memory.slab.parts[name][self._index[at]]


class _Matrices(Sequence[Sequence[Tensor]]):
    """Of each expert of a layer gate, up (W, D) and down (D, W), gathered when they are asked for."""

    def __init__(self, experts: SlabExperts, layer: int, count: int) -> None:
        self._experts, self._layer, self._count = experts, layer, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, expert: Any) -> Any:
        gate, up, down = (self._experts._gathered(name, self._layer, expert) for name in ("gate", "up", "down"))
        return gate, up, down.T


def block_channels(blocks: Sequence[ChannelBlocks]) -> Channels:
    """The channels of a refactored model's entries, (layer, block)."""

    def channels(key: Key) -> dict[str, Tensor]:
        own = blocks[key.layer]
        block = own.layout.blocks[key.unit]
        parts = {name: getattr(own, name) for name in ("gate", "up", "down", "gate_bias", "up_bias")}
        return {name: part[block.start : block.stop] for name, part in parts.items() if part is not None}

    return channels


def stock_channels(matrices: Sequence[Sequence[Sequence[Tensor]]]) -> Channels:
    """The channels of a stock mixture's entries, (layer, expert); matrices: those of `stock.expert_matrices`."""

    def channels(key: Key) -> dict[str, Tensor]:
        *first, down = matrices[key.layer][key.unit]
        gate, up = first if len(first) == 2 else first[0].chunk(2)
        return {"gate": gate, "up": up, "down": down.T}

    return channels
