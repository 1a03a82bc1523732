"""A cache of stored entries under a byte budget, and the one place where hits are counted.

The cache decides what is where and keeps the books; a backend moves the bytes: it takes transfers from `start` and
reports them with `arrived`. The live engine and the simulator are two such backends. A use is one entry in one layer of
one step; it is a hit if the entry's bytes are there when the layer asks. `now` counts moments (one layer of one step).
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moesaic.errors import MoesaicError
from moesaic.schedule.eviction import Eviction
from moesaic.schedule.work import Call, Key, keys_of

Definition = Literal["use", "call", "token", "byte"]


@dataclass
class Tally:
    """What a cache was asked for, by each definition of a hit in use; counted by `count` alone.

    use:   an entry in a layer of a step, however many experts and tokens want it. The default. An entry that holds all
           layers of an expert has one use per step; its layers hit or miss together, so the ratio is the same.
    call:  an expert in a layer of a step; a hit if all its entries are (2410.17954's code; equal to use where an expert
           is one entry).
    token: a call for every token that makes it.
    byte:  a use, weighted by the bytes of its entry.

    demand_bytes and prefetch_bytes are of transfers that have begun; wasted_bytes of those, what left before any use.
    """

    uses: int = 0
    use_hits: int = 0
    calls: int = 0
    call_hits: int = 0
    tokens: int = 0
    token_hits: int = 0
    bytes: int = 0
    byte_hits: int = 0
    late: int = 0  # misses whose prefetch was under way
    evictions: int = 0
    loads: int = 0  # transfers begun, on demand and ahead
    demand_bytes: int = 0
    prefetch_bytes: int = 0
    wasted_bytes: int = 0

    def count(self, calls: Sequence[Call], ready: Set[Key], sizes: Mapping[Key, int]) -> None:
        """One moment: the calls of one layer of one step, and which of their entries were there."""
        for key in keys_of(calls):
            hit = key in ready
            self.uses += 1
            self.use_hits += hit
            self.bytes += sizes[key]
            self.byte_hits += hit * sizes[key]
        for call in calls:
            hit = all(key in ready for key in call.keys)
            self.calls += 1
            self.call_hits += hit
            self.tokens += call.tokens
            self.token_hits += hit * call.tokens

    def hit_ratio(self, by: Definition = "use") -> float:
        """Hits over all, in 0..1; 1 if nothing was asked for."""
        count, hits = getattr(self, f"{by}s"), getattr(self, f"{by}_hits")
        return hits / count if count else 1.0

    @property
    def moved_bytes(self) -> int:
        """Into the cache, on demand and ahead."""
        return self.demand_bytes + self.prefetch_bytes


class Transfer(NamedTuple):
    """The bytes of one entry on their way in."""

    key: Key
    bytes: int
    demand: bool
    ticket: int


class Demand(NamedTuple):
    """What a layer found: entries that are there, on their way, or asked for only now, and what left for them."""

    hits: tuple[Key, ...]
    late: tuple[Key, ...]
    misses: tuple[Key, ...]
    evicted: tuple[Key, ...]


@dataclass(slots=True)
class _Entry:
    ticket: int
    demand: bool
    uses: int = 0  # layers that run with it now
    started: bool = False
    ready: bool = False
    loose: bool = False  # may leave
    wanted: bool = False  # by any layer since it was loaded


class Cache:
    """Entries under a budget of `capacity` bytes.

    Invariants: the bytes of entries present or on their way never exceed the capacity; an entry in use never leaves;
    what a layer waits for moves before what is fetched ahead. Entries are read-only, so leaving costs nothing.

    left: told of every entry that leaves, so that a backend can give its memory back.

    Raises MoesaicError if the capacity is below 1.
    """

    def __init__(
        self,
        capacity: int,
        sizes: Mapping[Key, int],
        policy: Eviction,
        left: Callable[[Key], None] = lambda key: None,
    ) -> None:
        if capacity < 1:
            raise MoesaicError(f"the cache has {capacity} bytes: expected at least 1")
        self.capacity = capacity
        self.sizes = sizes
        self.policy = policy
        self.left = left
        self.tally = Tally()
        self.taken = 0  # bytes of all entries
        self._loose = 0  # bytes of those that may leave
        self._entries: dict[Key, _Entry] = {}
        self._queue: list[tuple[bool, int, Key, int]] = []  # (ahead, order, key, ticket)
        self._tickets = self._order = 0

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Entries present or on their way."""
        return tuple(self._entries)

    def ready(self, key: Key) -> bool:
        """Whether the entry's bytes are there."""
        entry = self._entries.get(key)
        return entry is not None and entry.ready

    def demand(self, calls: Sequence[Call], now: int) -> Demand:
        """A layer is about to run `calls`: hold their entries, make room for the missing ones and ask for them.

        Raises MoesaicError, and changes nothing, if they do not fit beside what is in use.
        """
        keys = keys_of(calls)
        self._check(keys)
        hits = tuple(key for key in keys if self.ready(key))
        late = tuple(key for key in keys if key in self._entries and not self.ready(key))
        misses = tuple(key for key in keys if key not in self._entries)
        self.tally.count(calls, set(hits), self.sizes)
        self.tally.late += len(late)
        for key in hits + late:  # all of them before the first one leaves for a neighbour
            self._hold(key)
        evicted: list[Key] = []
        for key in misses:
            leaving = self._room(self.sizes[key])
            assert leaving is not None, "the policy names fewer entries than it calls evictable"
            evicted += leaving
            self._load(key, now, demand=True)
            self._hold(key)
        for key in late:
            self._ask(key, demand=True)
        for key in keys:
            self._entries[key].wanted = True
            self.policy.used(key, now)
        return Demand(hits, late, misses, tuple(evicted))

    def release(self, calls: Iterable[Call], now: int) -> None:
        """The layer has run `calls`.

        Raises MoesaicError if an entry is not in use.
        """
        keys = keys_of(calls)
        for key in keys:
            if key not in self._entries or not self._entries[key].uses:
                raise MoesaicError(f"{key} is released, but nothing uses it: demand and release the same calls, once")
        for key in keys:
            entry = self._entries[key]
            entry.uses -= 1
            if not entry.uses:
                self._loosen(key, now)

    def prefetch(self, keys: Iterable[Key], now: int) -> tuple[Key, ...]:
        """Ask for entries ahead, most urgent first, and return those that got a place.

        Stops at the first that does not fit without putting out an entry in use, one of `keys`, or one that the policy
        holds to be worth more. A demand may put out an entry on its way; its transfer, once begun, is wasted.
        """
        asked = tuple(dict.fromkeys(keys))
        self._known(asked)
        keep = frozenset(asked)
        taken = []
        for key in asked:
            if key in self._entries:
                continue
            if self._room(self.sizes[key], now, ahead=key, keep=keep) is None:
                break
            self._load(key, now, demand=False)
            self._loosen(key, now)
            taken.append(key)
        return tuple(taken)

    @property
    def complete(self) -> bool:
        """Whether every entry there is has arrived: nothing can miss until the capacity shrinks."""
        return len(self._entries) == len(self.sizes) and all(entry.ready for entry in self._entries.values())

    @property
    def asking(self) -> bool:
        """Whether transfers may be waiting to begin."""
        return bool(self._queue)

    def start(self) -> Transfer | None:
        """The next transfer to begin: what a layer waits for first, in the order asked; None if there is none."""
        while self._queue:
            _, _, key, ticket = heapq.heappop(self._queue)
            entry = self._entries.get(key)
            if entry is None or entry.ticket != ticket or entry.started:
                continue  # it left before its transfer began, or was asked for a second time
            entry.started = True
            self.tally.loads += 1
            size = self.sizes[key]
            if entry.demand:
                self.tally.demand_bytes += size
            else:
                self.tally.prefetch_bytes += size
            return Transfer(key, size, entry.demand, ticket)
        return None

    def arrived(self, transfer: Transfer) -> bool:
        """The bytes of a transfer are there; False if the entry has left meanwhile."""
        entry = self._entries.get(transfer.key)
        if entry is None or entry.ticket != transfer.ticket:
            return False
        entry.ready = True
        return True

    def failed(self, key: Key) -> None:
        """The entry's bytes could not be had: it leaves, so that it is asked for anew. Nothing may use it."""
        entry = self._entries[key]
        if entry.uses:
            raise MoesaicError(f"{key} is in use: release it before it is given up")
        if entry.loose:
            self.policy.busy(key)
        else:
            self._loose += self.sizes[key]
        self._evict(key)

    def resize(self, capacity: int) -> bool:
        """Another capacity, from now on; entries leave until they fit. False if what is in use does not fit."""
        self.capacity = capacity
        return self._room(0) is not None

    def preload(self, keys: Iterable[Key]) -> None:
        """Fill the cache with the first of `keys` that fit, and count nothing."""
        for key in keys:
            if key not in self._entries and self.taken + self.sizes[key] <= self.capacity:
                self.prefetch([key], 0)
        self.settle()
        self.tally = Tally()

    def settle(self) -> list[Transfer]:
        """Start and finish every transfer at once: a backend without time."""
        moved = []
        while (transfer := self.start()) is not None:
            self.arrived(transfer)
            moved.append(transfer)
        return moved

    def use(self, calls: Sequence[Call], now: int) -> Demand:
        """One whole moment with transfers that take no time: demand, settle, release."""
        found = self.demand(calls, now)
        self.settle()
        self.release(calls, now)
        return found

    def _known(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if key not in self.sizes:
                raise MoesaicError(
                    f"{key} has no size: the layout that cuts the calls must also give the cache's sizes"
                )

    def minimum(self, keys: Iterable[Key]) -> int:
        """Bytes that must be there at once for these entries: theirs, and what is in use or pinned beside them."""
        loose = self._loose
        missing = 0
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                missing += self.sizes[key]
            elif entry.loose:
                loose -= self.sizes[key]
        return self.taken - loose + missing

    def _check(self, keys: tuple[Key, ...]) -> None:
        self._known(keys)
        minimum = self.minimum(keys)
        if minimum > self.capacity:
            raise MoesaicError(
                f"layer {keys[0].layer} needs {sum(self.sizes[key] for key in keys)} bytes at once, and with what is "
                f"in use or pinned {minimum}, but the cache has {self.capacity}: give it at least {minimum} bytes, or "
                "run fewer tokens in a step"
            )

    def _hold(self, key: Key) -> None:
        entry = self._entries[key]
        if not entry.uses:
            if entry.loose:
                self._loose -= self.sizes[key]
                entry.loose = False
            self.policy.busy(key)
        entry.uses += 1

    def _loosen(self, key: Key, now: int) -> None:
        if self.policy.evictable(key):
            self._loose += self.sizes[key]
            self._entries[key].loose = True
        self.policy.idle(key, now)

    def _load(self, key: Key, now: int, demand: bool) -> None:
        self._tickets += 1
        self._entries[key] = _Entry(self._tickets, demand)
        self.taken += self.sizes[key]
        self.policy.loaded(key, now)
        self._ask(key, demand)

    def _ask(self, key: Key, demand: bool) -> None:
        entry = self._entries[key]
        if not entry.started:
            entry.demand = demand
            self._order += 1
            heapq.heappush(self._queue, (not demand, self._order, key, entry.ticket))

    def _room(
        self, size: int, now: int = 0, ahead: Key | None = None, keep: frozenset[Key] = frozenset()
    ) -> list[Key] | None:
        """Put entries out until `size` bytes are free; for a prefetch, None if that is not worth it: nothing leaves."""
        leaving: list[Key] = []
        free = self.capacity - self.taken
        while free < size:
            victim = self.policy.victim()
            if victim is None or (ahead is not None and (victim in keep or not self.policy.worth(ahead, victim))):
                for key in leaving:
                    self.policy.idle(key, now)
                return None
            self.policy.busy(victim)
            leaving.append(victim)
            free += self.sizes[victim]
        for key in leaving:
            self._evict(key)
        return leaving

    def _evict(self, key: Key) -> None:
        entry = self._entries.pop(key)
        size = self.sizes[key]
        self.policy.gone(key)
        self.taken -= size
        self._loose -= size
        self.tally.evictions += 1
        if entry.started and not entry.wanted:
            self.tally.wasted_bytes += size
        self.left(key)


def share_slots(demand: Mapping[int, float], total: int) -> dict[int, int]:
    """Deal `total` slots over layers in proportion to their predicted demand, by largest remainder (2410.17954).

    Ties go to the earlier layer. Raises MoesaicError if a demand is negative or all are zero.
    """
    whole = sum(demand.values())
    if whole <= 0 or min(demand.values()) < 0:
        raise MoesaicError("slots are dealt by demand: expected no negative demand and at least one above zero")
    share = {layer: total * wanted / whole for layer, wanted in demand.items()}
    slots = {layer: int(part) for layer, part in share.items()}
    rest = sorted(share, key=lambda layer: (slots[layer] - share[layer], layer))[: total - sum(slots.values())]
    return {layer: count + (layer in rest) for layer, count in slots.items()}
