"""Keys and values of running requests: a slot each in virtual memory, of which only written pages exist.

A slot has room for the whole context in every layer; its pages appear as tokens come and leave with the request. Ended
requests may stay as prefixes: a new request with an equal beginning takes the slot over, or copies from it.
A head's keys lie side by side, so that attention reads them in one run (benchmarks/attention_layouts.py).
Shapes: S slots, T context, H key-value heads, D head width, N tokens of a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.serve.arena import PAGE, Arena, DeviceRange


class KVShape(NamedTuple):
    """One layer's keys (and values): H heads of width D."""

    heads: int
    width: int
    dtype: torch.dtype

    @property
    def row(self) -> int:
        """Bytes of one token's key in one head."""
        return self.width * self.dtype.itemsize


@dataclass
class _Slot:
    ids: list[int] = field(default_factory=list)  # tokens whose keys are there, or will be after this step
    reserved: int = 0  # bytes it may grow to; of a free slot, those it holds
    free: bool = True
    used: int = 0  # when it ended, in ends of slots


class KVPool:
    """Slots for `slots` requests of at most `context` tokens. Slots that are acquired hold a reservation of bytes.

    device: None = main memory, where pages appear as they are written; elsewhere all slots exist from the beginning.
    taken: bytes reserved by running requests and held by prefixes; both count against the budget.
    """

    def __init__(self, shapes: Sequence[KVShape], slots: int, context: int, device: torch.device | None = None) -> None:
        if not shapes or slots < 1 or context < 1:
            raise MoesaicError(f"{len(shapes)} layers, {slots} slots, context {context}: expected at least 1 of each")
        self.shapes, self.context = tuple(shapes), context
        self._slots = [_Slot() for _ in range(slots)]
        # Heads begin on pages, so that their rows come and go alone; they have some more than needed.
        whole = 1 if device is not None else max(PAGE // math.gcd(PAGE, shape.row) for shape in shapes)
        self.stride = -(-context // whole) * whole  # rows of a head in a slot
        sizes = [shape.row * self.stride * shape.heads * slots for shape in shapes for _ in "kv"]
        self._starts = [0, *accumulate(sizes)]
        self._arena = Arena(self._starts[-1]) if device is None else DeviceRange(self._starts[-1], device)
        self._matrices = [
            self._arena.tensor(start, (slots, shape.heads, self.stride, shape.width), shape.dtype)
            for start, shape in zip(self._starts, (shape for shape in shapes for _ in "kv"), strict=False)
        ]
        self._ends = 0
        self.taken = 0

    @property
    def slots(self) -> int:
        """Requests that may run at a time."""
        return len(self._slots)

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self._matrices[0].device

    def bytes_for(self, tokens: int) -> int:
        """Bytes of pages that `tokens` tokens of one request take."""
        return sum(2 * shape.heads * (-(-shape.row * tokens // PAGE) * PAGE) for shape in self.shapes)

    @property
    def free_slots(self) -> int:
        """Slots that no request runs in."""
        return sum(slot.free for slot in self._slots)

    @property
    def running(self) -> int:
        """Bytes reserved by running requests: what cannot be given back before one ends."""
        return sum(slot.reserved for slot in self._slots if not slot.free)

    def places(self, heads: int, slot_N: Tensor, pos_N: Tensor) -> Tensor:
        """Where tokens go in layers of so many heads: (N * H,), for `write`."""
        head_NH = slot_N[:, None] * heads + torch.arange(heads, device=slot_N.device)
        return (head_NH * self.stride + pos_N[:, None]).flatten()

    def write(self, layer: int, places: Tensor, keys_NHD: Tensor, values_NHD: Tensor) -> None:
        """Store a step's keys and values at `places`."""
        for matrix, rows in zip(self._matrices[2 * layer : 2 * layer + 2], (keys_NHD, values_NHD), strict=True):
            width = matrix.shape[-1]
            matrix.view(-1, width).index_copy_(0, places, rows.reshape(-1, width))

    def matrices(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, (S, H, stride, D)."""
        keys, values = self._matrices[2 * layer : 2 * layer + 2]
        return keys, values

    def read(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the slot's first `length` tokens, (H, length, D) views."""
        keys, values = self._matrices[2 * layer : 2 * layer + 2]
        return keys[slot, :, :length], values[slot, :, :length]

    def read_slots(self, layer: int, first: int, count: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values of `count` slots from `first` on, (count, H, length, D) views."""
        keys, values = self._matrices[2 * layer : 2 * layer + 2]
        return keys[first : first + count, :, :length], values[first : first + count, :, :length]

    def match(self, ids: Sequence[int]) -> tuple[int | None, int]:
        """The slot, running or not, with the longest beginning in common with `ids`, and its length."""
        best, length = None, 0
        for number, slot in enumerate(self._slots):
            common = _common(slot.ids, ids)
            if common > length:
                best, length = number, common
        return best, length

    def acquire(self, ids: Sequence[int], tokens: int, reuse: bool = True) -> tuple[int, int]:
        """A slot for a request of at most `tokens` tokens: (slot, how many of `ids` need not run).

        At least the last of `ids` is left to run: its output is wanted. Raises MoesaicError if no slot is free.
        """
        source, length = self.match(ids) if reuse else (None, 0)
        length = min(length, len(ids) - 1)
        free = [number for number, slot in enumerate(self._slots) if slot.free]
        if not free:
            raise MoesaicError("every slot is taken: admit no more requests than slots")
        if length and source in free:
            slot = source
        else:  # one without a prefix, else the prefix unused for longest
            slot = min(free, key=lambda number: (self._slots[number].reserved, self._slots[number].used))
            self.drop(slot)
            if length and source is not None:
                self._copy(source, slot, length)
        assert slot is not None
        state = self._slots[slot]
        self.taken += self.bytes_for(tokens) - state.reserved
        state.ids, state.free, state.reserved = list(ids[:length]), False, self.bytes_for(tokens)
        return slot, length

    def _copy(self, source: int, target: int, length: int) -> None:
        for matrix in self._matrices:
            matrix[target, :, :length] = matrix[source, :, :length]

    def extend(self, slot: int, ids: Sequence[int]) -> None:
        """The next tokens of the slot's request are about to be written."""
        self._slots[slot].ids.extend(ids)

    def free(self, slot: int, written: int, keep: bool) -> None:
        """The request has ended with `written` tokens in its slot; `keep` leaves them as a prefix for others."""
        state = self._slots[slot]
        self._ends += 1
        state.free, state.used, state.ids = True, self._ends, state.ids[:written]
        held = self.bytes_for(written) if keep else 0
        self.taken += held - state.reserved
        state.reserved = held
        self._release(slot, written if keep else 0)
        if not keep:
            state.ids = []

    def drop(self, slot: int) -> None:
        """Forget the prefix in a free slot."""
        state = self._slots[slot]
        assert state.free
        self.taken -= state.reserved
        state.reserved, state.ids = 0, []
        self._release(slot, 0)

    def trim(self, most: int) -> None:
        """Forget prefixes, unused for longest first, until at most `most` bytes are taken or none is left."""
        held = sorted((s for s in range(len(self._slots)) if self._slots[s].free), key=lambda s: self._slots[s].used)
        for slot in held:
            if self.taken <= most:
                return
            if self._slots[slot].reserved:
                self.drop(slot)

    def _release(self, slot: int, keep: int) -> None:
        for number, start in enumerate(self._starts[:-1]):
            shape = self.shapes[number // 2]
            size = shape.row * self.stride  # of a head
            for head in range(slot * shape.heads, (slot + 1) * shape.heads):
                first = start + head * size
                self._arena.release(first + -(-shape.row * keep // PAGE) * PAGE, first + size)


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    length = min(len(one), len(two))
    if one[:length] == list(two[:length]):
        return length
    return next(i for i in range(length) if one[i] != two[i])
