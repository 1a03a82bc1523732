"""Batchers that read routes: the longest expert queue, a stage priced by what it moves, two halves of a double batch.

    LongestQueue   Algorithm 1 of 2410.19123, mended: it ends when all queues are empty, and counts tokens
    Regroup        two batches dealt anew so that each needs fewer entries (2410.17954)

n ready portions, E experts; a decision costs O(log n) per portion taken (Regroup: O(n) set operations per stage).
"""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Mapping
from itertools import chain
from typing import Protocol

from moesaic.errors import MoesaicError
from moesaic.schedule.batch import Batcher, Ready, Room, Stage, fill
from moesaic.schedule.work import Key


class LongestQueue(Batcher):
    """One queue per expert, the one with most tokens first; stops at a queue that does not fit whole.

    A prompt of several experts stands in the queue of the one most of its tokens go to: the paper leaves it open. As in
    the paper nothing bounds a wait: a request whose queue stays short can wait for ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fresh: OrderedDict[int, Ready] = OrderedDict()  # in no expert's queue before they may be admitted
        self._admitted: set[int] = set()  # of these, in a queue now
        self._queues: dict[int | None, OrderedDict[int, Ready]] = {}
        self._lengths: dict[int | None, int] = {}
        self._heap: list[tuple[int, int, int | None]] = []  # (-tokens, first request, expert), outdated ones skipped

    def _added(self, ready: Ready) -> None:
        if ready.fresh:
            self._fresh[ready.request] = ready
        else:
            self._enqueue(ready)

    def _removed(self, ready: Ready) -> None:
        self._admitted.discard(ready.request)
        if self._fresh.pop(ready.request, None) is None:
            del self._queues[ready.expert][ready.request]
            self._lengthen(ready.expert, -ready.tokens)

    def ahead(self, ready: Ready) -> int:
        """The tokens of longer queues; of a prompt that is in no queue yet, what arrived before it too."""
        own = self._lengths.get(ready.expert, 0)
        longer = sum(length for expert, length in self._lengths.items() if expert != ready.expert and length > own)
        return longer + (super().ahead(ready) if ready.request in self._fresh or ready.fresh else 0)

    def _enqueue(self, ready: Ready) -> None:
        queue = self._queues.setdefault(ready.expert, OrderedDict())
        queue[ready.request] = ready
        if ready.phase == "prefill" and not ready.fresh:
            queue.move_to_end(ready.request, last=False)
        self._lengthen(ready.expert, ready.tokens)

    def _lengthen(self, expert: int | None, tokens: int) -> None:
        self._lengths[expert] = self._lengths.get(expert, 0) + tokens
        if self._lengths[expert]:
            heapq.heappush(self._heap, (-self._lengths[expert], next(iter(self._queues[expert])), expert))

    def _fill(self, stage: Stage, now: float) -> None:
        while self._fresh and len(self._admitted) < stage.admit:
            _, ready = self._fresh.popitem(last=False)
            self._admitted.add(ready.request)
            self._enqueue(ready)
        seen = set()
        while self._heap:
            length, _, expert = heapq.heappop(self._heap)
            if expert in seen or -length != self._lengths[expert]:
                continue
            seen.add(expert)
            before = len(stage.portions)
            fill(stage, self._queues[expert].values())
            if len(stage.portions) - before < len(self._queues[expert]):
                break
        for expert in seen:  # what is left of them must be found again
            self._lengthen(expert, 0)


class Prices(Protocol):
    """What a stage costs, in seconds, as far as a batcher's choice changes it.

    stage_s, token_s: a stage without experts, and each of its tokens. overlap: fetching hides behind running.
    complete: every entry is there.
    """

    @property
    def stage_s(self) -> float: ...
    @property
    def token_s(self) -> float: ...
    @property
    def overlap(self) -> bool: ...
    @property
    def complete(self) -> bool: ...
    def fetch_s(self, key: Key) -> float:
        """To bring the entry in; 0 if it is there."""
        ...

    def read_s(self, key: Key) -> float:
        """To run it for few tokens: its bytes are read once, however many want it."""
        ...


class Adaptive(Batcher):
    """Leaves decode tokens out of a stage only while fetching for them costs more than their waiting.

    1  What has waited `max_wait_s` since it was ready joins at any price, oldest first.
    2  Prompts that fit whole beside all decode tokens join: they bring in most experts, for everybody.
    3  Decode tokens are grouped by the expert most of their work goes to. A group that needs nothing fetched joins;
       another joins if the stage's rate, tokens weighted by their wait over seconds, does not fall. Best groups first.
    4  Prompts fill what is left of the budget, the last one cut.

    Where all entries are there this is chunked prefill, and nothing is reckoned. Where they are not, groups take turns:
    a group that waits gets heavier, with its members' waits and with those who join it.
    """

    def __init__(self, prices: Prices, max_wait_s: float = 1.0) -> None:
        super().__init__()
        if not max_wait_s >= 0:
            raise MoesaicError(f"a wait bound of {max_wait_s} s: expected at least 0")
        self.prices, self.max_wait_s = prices, max_wait_s
        self._groups: dict[int | None, OrderedDict[int, Ready]] = {}

    def _added(self, ready: Ready) -> None:
        if ready.phase == "decode":
            self._groups.setdefault(ready.expert, OrderedDict())[ready.request] = ready

    def _removed(self, ready: Ready) -> None:
        if ready.phase == "decode":
            del self._groups[ready.expert][ready.request]

    def _fill(self, stage: Stage, now: float) -> None:
        if self.prices.complete and len(self.decodes) <= stage.tokens:
            fill(stage, self.decodes.values())
            fill(stage, self.prefills.values(), cut=True)
            return
        bill = _Bill(self.prices)
        for ready in self.decodes.values():  # in the order of readiness: the overdue come first
            if now - ready.since_s < self.max_wait_s or not stage.take(ready):
                break
            bill.add(ready, now)
        others = len(self.decodes) - len(stage.portions)
        for ready in self.prefills.values():
            if ready.tokens > stage.tokens - others or not stage.take(ready):
                break
            bill.add(ready, now)
        self._fill_groups(stage, bill, now)
        taken = {portion.request for portion in stage.portions}
        fill(stage, (ready for request, ready in self.prefills.items() if request not in taken), cut=True)

    def _fill_groups(self, stage: Stage, bill: "_Bill", now: float) -> None:
        taken = {portion.request for portion in stage.portions}
        groups = [[r for r in group.values() if r.request not in taken] for group in self._groups.values()]
        groups = [group[: stage.tokens] for group in groups if group and stage.tokens]
        offers = sorted(((bill.rate_with(group, now), i) for i, group in enumerate(groups)), reverse=True)
        for _, i in offers:
            if bill.fetches(groups[i]) and bill.rate_with(groups[i], now) < bill.rate:
                continue
            for ready in groups[i]:
                if not stage.take(ready):
                    return
                bill.add(ready, now)


class _Bill:
    """Seconds and weighted tokens of a stage being filled."""

    def __init__(self, prices: Prices) -> None:
        self.prices = prices
        self.keys: set[Key] = set()
        self.fetch, self.run, self.value = 0.0, prices.stage_s, 0.0

    @property
    def rate(self) -> float:
        """Weighted tokens a second of what the stage holds."""
        return self.value / self._seconds(self.fetch, self.run)

    def rate_with(self, group: list[Ready], now: float) -> float:
        """The rate if the group joined."""
        new = set().union(*{ready.keys for ready in group}) - self.keys
        fetch = self.fetch + sum(map(self.prices.fetch_s, new))
        run = self.run + sum(map(self.prices.read_s, new)) + len(group) * self.prices.token_s
        value = self.value + sum(self._weight(ready, now) for ready in group)
        return value / self._seconds(fetch, run)

    def fetches(self, group: list[Ready]) -> bool:
        """Whether the stage would have to fetch something for it."""
        return any(map(self.prices.fetch_s, set().union(*{ready.keys for ready in group}) - self.keys))

    def add(self, ready: Ready, now: float) -> None:
        """The portion is in the stage."""
        new = set(ready.keys) - self.keys
        self.keys |= new
        self.fetch += sum(map(self.prices.fetch_s, new))
        self.run += sum(map(self.prices.read_s, new)) + ready.tokens * self.prices.token_s
        self.value += self._weight(ready, now)

    def _seconds(self, fetch: float, run: float) -> float:
        return max(fetch, run) if self.prices.overlap else fetch + run

    def _weight(self, ready: Ready, now: float) -> float:
        return 1.0 + (now - ready.since_s) / self.prices.stage_s


class Regroup(Batcher):
    """Two batches at a time, decode tokens first, dealt into two halves that need fewer entries together.

    Minimises |R1| + |R2|, R the union of what a half's portions need, by a two-means loop over Hamming distances from
    two portions far apart (2410.17954, Eq 2); the queue's own halves stay if that is not better. The second half runs
    in the next stage. Portions are request-steps: attention keeps a sequence together.
    """

    def __init__(self, rounds: int = 10) -> None:
        super().__init__()
        if rounds < 1:
            raise MoesaicError(f"{rounds} rounds of regrouping: expected at least 1")
        self.rounds = rounds
        self._second: list[int] = []

    def _fill(self, stage: Stage, now: float) -> None:
        fill(stage, [self.ready[request] for request in self._second if request in self.ready])
        self._second = []
        if not stage.portions:
            first, second = self._two(stage)
            if second:
                first, second = self._regrouped(first, second, stage.budget)
            self._second = [each.request for each in second]
            fill(stage, first)

    def _two(self, stage: Stage) -> tuple[list[Ready], list[Ready]]:
        """What the next two stages would take as the queue stands."""
        halves: tuple[list[Ready], list[Ready]] = [], []
        trial, now = Stage(Room(stage.budget, stage.admit)), 0
        for ready in chain(self.decodes.values(), self.prefills.values()):
            if not trial.take(ready):
                if now or not halves[0]:
                    break
                now, trial = 1, Stage(Room(stage.budget, trial.admit))
                if not trial.take(ready):
                    break
            halves[now].append(ready)
        return halves

    def _regrouped(self, a: list[Ready], b: list[Ready], budget: int) -> tuple[list[Ready], list[Ready]]:
        """The better of the halves given and those of the two-means loop."""
        everyone = a + b
        sets = {ready.request: frozenset(ready.keys) for ready in everyone}
        size = (sum(ready.tokens for ready in everyone) + 1) // 2
        best, before = (a, b), None
        centre = _farthest(everyone, sets, sets[everyone[0].request])
        centres = sets[centre.request], sets[_farthest(everyone, sets, sets[centre.request]).request]
        for _ in range(self.rounds):
            halves = _nearer(everyone, sets, centres, size)
            chosen = {ready.request for ready in halves[0]}
            if chosen == before or not all(halves):
                break
            before = chosen
            fits = all(sum(ready.tokens for ready in half) <= budget for half in halves)
            if fits and _needed(halves, sets) < _needed(best, sets):
                best = halves
            centres = _middle(halves[0], sets), _middle(halves[1], sets)
        return best


Sets = Mapping[int, frozenset[Key]]
Halves = tuple[list[Ready], list[Ready]]


def _needed(halves: Halves, sets: Sets) -> int:
    """|R1| + |R2|."""
    return sum(len(frozenset().union(*(sets[ready.request] for ready in half))) for half in halves)


def _farthest(everyone: list[Ready], sets: Sets, centre: frozenset[Key]) -> Ready:
    return max(everyone, key=lambda ready: len(sets[ready.request] ^ centre))


def _nearer(everyone: list[Ready], sets: Sets, centres: tuple[frozenset[Key], frozenset[Key]], size: int) -> Halves:
    """Those that lean most to the first centre, up to `size` tokens, and the rest."""
    lean = {r: len(keys ^ centres[0]) - len(keys ^ centres[1]) for r, keys in sets.items()}
    halves: Halves = [], []
    left = size
    for ready in sorted(everyone, key=lambda ready: lean[ready.request]):
        near = ready.tokens <= left
        left -= ready.tokens if near else 0
        halves[not near].append(ready)
    return halves


def _middle(half: list[Ready], sets: Sets) -> frozenset[Key]:
    """The set with the least sum of distances to the others: sum over its keys of n - 2 count, up to a constant."""
    count = Counter(key for ready in half for key in sets[ready.request])
    return min(
        (sets[ready.request] for ready in half), key=lambda keys: sum(len(half) - 2 * count[key] for key in keys)
    )
