"""Who leaves a full cache. A policy sees which entries are loaded, used, idle and expected; it names the next to go.

    LRU, LFU, FIFO, Random
    Belady      farthest next use among the uses known now, then LRU (2410.19123, section 5)
    Oracle      farthest next use with the whole future: Belady's optimum for entries of equal size, without prefetch
    PredictedSet   entries outside the predicted set first, then LRU (PLEC, 2410.17954)
    Pinned, AllResident   some or all entries never leave
    SectionRoundRobin     memory in sections, each in turn (2409.01141, section V-C)

With unequal sizes farthest-first is a heuristic, and one that knows less can win on a trace: the bound is most_hits.
A decision costs O(log n): idle entries wait in a heap whose outdated items are skipped when they come up.
"""

import heapq
import math
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Literal

from moesaic.errors import MoesaicError
from moesaic.schedule.work import Key


class Eviction:
    """The idle entry of the smallest `rank` goes first; this base ranks by last use, which is LRU.

    A cache calls loaded and used as it happens, idle and busy as entries start and cease to be evictable, gone when one
    has left. `now` counts moments (one layer of one step). expect and done tell of uses to come: most policies ignore
    them, so every policy can be driven the same way; `listens` says which do not.
    """

    listens = False

    def __init__(self) -> None:
        self._touch: dict[Key, int] = {}  # resident key -> running number of its last load or use
        self._touches = 0
        self._heap: list[tuple[tuple[float, ...], int, Key]] = []
        self._live: dict[Key, int] = {}  # idle key -> stamp of its valid item in the heap
        self._ranked: dict[Key, tuple[float, ...]] = {}  # idle key -> its rank there
        self._stamp = 0

    def rank(self, key: Key, now: int) -> tuple[float, ...]:
        """Smaller leaves earlier; must not change while the entry is idle, unless it is pushed again."""
        return (self._touch[key],)

    def loaded(self, key: Key, now: int) -> None:
        """The entry got its place."""
        self._touches += 1
        self._touch[key] = self._touches

    def used(self, key: Key, now: int) -> None:
        """A layer needs the entry."""
        self._touches += 1
        self._touch[key] = self._touches

    def idle(self, key: Key, now: int) -> None:
        """Nothing uses the entry any longer: it may leave."""
        rank = self.rank(key, now)
        if key in self._live and self._ranked[key] == rank:
            return
        self._stamp += 1
        self._live[key] = self._stamp
        self._ranked[key] = rank
        heapq.heappush(self._heap, (rank, self._stamp, key))
        if len(self._heap) > 2 * len(self._live) + 64:  # a cache that never evicts must not grow without end
            self._heap = [item for item in self._heap if self._live.get(item[2]) == item[1]]
            heapq.heapify(self._heap)

    def busy(self, key: Key) -> None:
        """The entry must not leave."""
        self._live.pop(key, None)

    def gone(self, key: Key) -> None:
        """The entry has left."""
        self._live.pop(key, None)
        self._touch.pop(key, None)

    def victim(self) -> Key | None:
        """The entry that leaves next, or None if none may."""
        while self._heap:
            _, stamp, key = self._heap[0]
            if self._live.get(key) == stamp:
                return key
            heapq.heappop(self._heap)
        return None

    def evictable(self, key: Key) -> bool:
        """Whether the entry may ever leave; constant per key."""
        return True

    def worth(self, key: Key, victim: Key) -> bool:
        """Whether to prefetch `key` in the place of `victim`."""
        return True

    def expect(self, owner: Hashable, at: float, keys: Iterable[Key]) -> None:
        """`owner`, a queued item or a prediction, will use `keys`, in the order of `at`; replaces what it expected."""

    def done(self, owner: Hashable) -> None:
        """`owner` runs now, or never will: call it before its entries are released."""


class LRU(Eviction):
    """Least recently used."""


class FIFO(Eviction):
    """First loaded, first out."""

    def used(self, key: Key, now: int) -> None:
        pass


class LFU(Eviction):
    """Least often used since the start, also while it was away; ties by last use."""

    def __init__(self) -> None:
        super().__init__()
        self._count: Counter[Key] = Counter()

    def rank(self, key: Key, now: int) -> tuple[float, ...]:
        return self._count[key], self._touch[key]

    def used(self, key: Key, now: int) -> None:
        super().used(key, now)
        self._count[key] += 1


class Random(Eviction):
    """Any idle entry with equal chance, seeded; the entry it has named stays named until something changes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._keys: list[Key] = []
        self._place: dict[Key, int] = {}
        self._named: Key | None = None

    def idle(self, key: Key, now: int) -> None:
        if key not in self._place:
            self._place[key] = len(self._keys)
            self._keys.append(key)
            self._named = None

    def busy(self, key: Key) -> None:
        place = self._place.pop(key, None)
        if place is not None:
            last = self._keys.pop()
            if last != key:
                self._keys[place], self._place[last] = last, place
            self._named = None

    def gone(self, key: Key) -> None:
        self.busy(key)
        super().gone(key)

    def victim(self) -> Key | None:
        if self._named is None and self._keys:
            self._named = self._random.choice(self._keys)
        return self._named


class KnownUses:
    """Next uses that are known now, as owners come and go; every call O(log n) per key."""

    def __init__(self) -> None:
        self._uses: dict[Key, list[tuple[float, int]]] = {}  # heaps of (at, serial of the owner's announcement)
        self._owners: dict[Hashable, tuple[int, tuple[Key, ...], float]] = {}
        self._alive: set[int] = set()
        self._count: Counter[Key] = Counter()  # living announcements of each key
        self._serial = 0

    def expect(self, owner: Hashable, at: float, keys: Iterable[Key]) -> tuple[Key, ...]:
        """Announce; returns the keys whose next use may have changed."""
        kept = tuple(dict.fromkeys(keys))
        if self._owners.get(owner, (0, (), 0.0))[1:] == (kept, at):
            return ()
        before = self.done(owner)
        self._serial += 1
        self._alive.add(self._serial)
        self._owners[owner] = self._serial, kept, at
        for key in kept:
            uses = self._uses.setdefault(key, [])
            self._count[key] += 1
            heapq.heappush(uses, (at, self._serial))
            if len(uses) > 2 * self._count[key] + 64:  # withdrawn announcements behind a living one
                uses[:] = [use for use in uses if use[1] in self._alive]
                heapq.heapify(uses)
        return tuple(dict.fromkeys(before + kept))

    def done(self, owner: Hashable) -> tuple[Key, ...]:
        """Withdraw; returns the keys whose next use may have changed."""
        serial, keys, _ = self._owners.pop(owner, (0, (), 0.0))
        self._alive.discard(serial)
        for key in keys:
            self._count[key] -= 1
        return keys

    def next(self, key: Key) -> float:
        """The earliest `at` anyone announced for the key, infinite if nobody did."""
        uses = self._uses.get(key)
        if uses is None:
            return math.inf
        while uses[0][1] not in self._alive:
            heapq.heappop(uses)
            if not uses:
                del self._uses[key]
                return math.inf
        return uses[0][0]


class Belady(Eviction):
    """Farthest next use among the known ones; entries nobody is known to need go first, least recently used first.

    Known is what `expect` was told: queued prompts and one decode step. It is not the oracle, and does not claim to be.
    layers: with it, uses are expected at steps, and a step runs its layers 0 to layers - 1 in turn; 0 if `at` says all.
    """

    listens = True

    def __init__(self, layers: int = 0) -> None:
        super().__init__()
        self.layers = layers
        self.uses = KnownUses()
        self._moved: dict[Key, None] = {}  # keys whose next use may have changed: ranked anew when one must leave

    def next(self, key: Key) -> float:
        """When the key is known to be used next."""
        at = self.uses.next(key)
        return at * self.layers + key.layer if self.layers else at

    def rank(self, key: Key, now: int) -> tuple[float, ...]:
        return -self.next(key), self._touch[key]

    def worth(self, key: Key, victim: Key) -> bool:
        return self.next(key) < self.next(victim)

    def expect(self, owner: Hashable, at: float, keys: Iterable[Key]) -> None:
        self._again(self.uses.expect(owner, at, keys))

    def done(self, owner: Hashable) -> None:
        self._again(self.uses.done(owner))

    def _again(self, keys: Iterable[Key]) -> None:
        self._moved.update(dict.fromkeys(keys))

    def victim(self) -> Key | None:
        for key in self._moved:
            if key in self._live:
                self.idle(key, 0)
        self._moved.clear()
        return super().victim()


class PredictedSet(Belady):
    """Entries outside the predicted set go first, then those in it; least recently used first in both (PLEC).

    One pool for all layers, so slots move to the layers of high predicted demand, as in the paper; for its code's fixed
    slots take one cache per layer.
    """

    def rank(self, key: Key, now: int) -> tuple[float, ...]:
        return self.uses.next(key) < math.inf, self._touch[key]

    def worth(self, key: Key, victim: Key) -> bool:
        return self.uses.next(victim) == math.inf


class Oracle(Eviction):
    """Farthest next use in the whole future; ties by last use.

    future: the keys of every moment that will come; moment i is the one run with now = i.
    """

    def __init__(self, future: Sequence[Iterable[Key]]) -> None:
        super().__init__()
        self._when: dict[Key, list[int]] = {}
        for moment, keys in enumerate(future):
            for key in dict.fromkeys(keys):
                self._when.setdefault(key, []).append(moment)
        self._now = 0

    def _next(self, key: Key, now: int) -> float:
        when = self._when.get(key, [])
        place = bisect_right(when, now)
        return when[place] if place < len(when) else math.inf

    def rank(self, key: Key, now: int) -> tuple[float, ...]:
        self._now = max(self._now, now)
        return -self._next(key, now), self._touch[key]

    def worth(self, key: Key, victim: Key) -> bool:
        return self._next(key, self._now) < self._next(victim, self._now)


class Pinned(Eviction):
    """The pinned entries (the most popular, say) stay once they are loaded; the others are LRU."""

    def __init__(self, pinned: Iterable[Key]) -> None:
        super().__init__()
        self.pinned = frozenset(pinned)

    def evictable(self, key: Key) -> bool:
        return key not in self.pinned

    def idle(self, key: Key, now: int) -> None:
        if self.evictable(key):
            super().idle(key, now)


class AllResident(Eviction):
    """Nothing ever leaves: every entry that is used must fit."""

    def evictable(self, key: Key) -> bool:
        return False

    def idle(self, key: Key, now: int) -> None:
        pass


class SectionRoundRobin(Eviction):
    """Units are dealt over the sections in turn; each section loses its oldest entry in turn, so none is drained.

    Two compute units can then work without touching the same section. Where all fits, nothing leaves, as in the paper;
    what leaves where it does not is ours.
    """

    def __init__(self, sections: int = 4) -> None:
        super().__init__()
        if sections < 1:
            raise MoesaicError(f"got {sections} sections of memory: expected at least 1")
        self.sections = sections
        self._loads = [0] * sections
        self._round: dict[Key, int] = {}

    def section(self, key: Key) -> int:
        """Where the entry lives."""
        return key.unit % self.sections

    def rank(self, key: Key, now: int) -> tuple[float, ...]:
        return self._round[key], self.section(key)

    def loaded(self, key: Key, now: int) -> None:
        super().loaded(key, now)
        self._loads[self.section(key)] += 1
        self._round[key] = self._loads[self.section(key)]

    def gone(self, key: Key) -> None:
        super().gone(key)
        self._round.pop(key, None)


def most_hits(
    future: Sequence[Iterable[Key]], sizes: Mapping[Key, int], capacity: int, by: Literal["use", "byte"] = "use"
) -> float:
    """Hits (or bytes of hits) that no policy without prefetch exceeds, whatever the sizes; O(n log n).

    To hit, an entry must stay from one use to the next, beside what the moments between need: that costs its bytes
    times those moments. The bound spends all the free byte-moments of the trace on the cheapest stays
    (PFOO-L, Berger, Beckmann and Harchol-Balter, 1711.03709, with the moments' own needs taken out of the budget).
    """
    last: dict[Key, int] = {}
    stays: list[tuple[int, int]] = []  # moments between, size
    budget = 0
    for moment, keys in enumerate(future):
        need = tuple(dict.fromkeys(keys))
        budget += capacity - sum(sizes[key] for key in need)
        stays += [(moment - last[key] - 1, sizes[key]) for key in need if key in last]
        last.update(dict.fromkeys(need, moment))
    total = 0.0
    for between, size in sorted(stays, key=lambda stay: (stay[0] * (stay[1] if by == "use" else 1), stay)):
        gain = size if by == "byte" else 1
        if between * size > budget:
            return total + gain * budget / (between * size)
        budget -= between * size
        total += gain
    return total
