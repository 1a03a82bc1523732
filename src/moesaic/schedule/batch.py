"""Which portions run together: requests that are ready go in, the next stage comes out.

    FCFS, DecodeFirst, PrefillFirst, ChunkedPrefill   by arrival and phase alone
    ContinuousStage   every running request in every stage (Orca; Duplex, 2409.01141)
    SerialRequests    a router's batch of prompts, then one request after the other (2405.07518)

`batch_by_expert` has those that read routes. A portion is a decode token or (part of) a prompt: attention keeps a
sequence together. A batcher never sees the future: what is ready was told to it by `add`. Times in seconds; n ready
portions; a decision costs O(log n) per portion taken.
"""

import heapq
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from moesaic.errors import MoesaicError
from moesaic.schedule.work import Key, Phase


class Ready(NamedTuple):
    """The next portion of a request: it can run now.

    tokens:  1 for a decode step; what is left of the prompt for a prefill.
    since_s: when it became ready; waits count from here.
    fresh:   nothing of the request has run: taking it admits the request.
    keys:    the entries it is known to need; empty where routes are not known yet.
    expert:  the expert most of its tokens go to, None where that is not known.
    """

    request: int
    phase: Phase
    tokens: int
    arrival_s: float
    since_s: float
    fresh: bool = False
    keys: tuple[Key, ...] = ()
    expert: int | None = None


class Portion(NamedTuple):
    """`tokens` tokens of a request, for one stage."""

    request: int
    tokens: int


@dataclass(frozen=True)
class Room:
    """What a stage may hold: `tokens` in all, and `admit` requests of which nothing has run yet.

    Raises MoesaicError unless a token fits.
    """

    tokens: int
    admit: int

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.admit < 0:
            raise MoesaicError(
                f"a stage of {self.tokens} tokens that may admit {self.admit}: expected at least 1 and 0"
            )


class Stage:
    """A stage being filled."""

    def __init__(self, room: Room) -> None:
        self.budget, self.tokens, self.admit = room.tokens, room.tokens, room.admit
        self.portions: list[Portion] = []

    def take(self, ready: Ready, *, cut: bool = False) -> bool:
        """Take it whole if it fits. With `cut`, and always for a prompt longer than any stage, take what fits."""
        tokens = ready.tokens
        if ready.fresh and not self.admit:
            return False
        if tokens > self.tokens:
            if not self.tokens or not (cut or tokens > self.budget):
                return False
            tokens = self.tokens
        self.tokens -= tokens
        self.admit -= ready.fresh
        self.portions.append(Portion(ready.request, tokens))
        return True


class Batcher:
    """Base: two queues by phase, each in the order of readiness; subclasses say what a stage takes.

    The engine calls add when a portion is ready (after a cut prefill, with what is left), form for the next stage,
    ended when a request has finished or was cancelled. What form returns has left the queue.
    """

    def __init__(self) -> None:
        self.ready: dict[int, Ready] = {}
        self.prefills: OrderedDict[int, Ready] = OrderedDict()
        self.decodes: OrderedDict[int, Ready] = OrderedDict()
        self.tokens = 0  # of all that is ready
        self._entered: Counter[str] = Counter()  # tokens by phase, ever
        self._left: Counter[str] = Counter()
        self._place: dict[int, int] = {}  # request -> tokens that had entered before it

    def __len__(self) -> int:
        return len(self.ready)

    def add(self, ready: Ready) -> None:
        """A portion became ready. Raises MoesaicError if the request has one already, or it has no token."""
        if ready.request in self.ready:
            raise MoesaicError(f"request {ready.request} is queued already: it has one next portion at a time")
        if ready.tokens < 1:
            raise MoesaicError(f"request {ready.request} queues {ready.tokens} tokens: expected at least 1")
        self.ready[ready.request] = ready
        self.tokens += ready.tokens
        self._place[ready.request] = self._entered[ready.phase]
        self._entered[ready.phase] += ready.tokens
        (self.decodes if ready.phase == "decode" else self.prefills)[ready.request] = ready
        if ready.phase == "prefill" and not ready.fresh:
            self.prefills.move_to_end(ready.request, last=False)  # the rest of a prompt that was cut goes on first
            self._place[ready.request] = 0
        self._added(ready)

    def ended(self, request: int) -> None:
        """The request has ended; what it had queued is dropped."""
        if request in self.ready:
            self._remove(self.ready[request])

    def form(self, now: float, room: Room) -> list[Portion]:
        """The next stage; empty if nothing may run (no request may be admitted, say)."""
        stage = Stage(room)
        self._fill(stage, now)
        for portion in stage.portions:
            self._remove(self.ready[portion.request])
        return stage.portions

    def ahead(self, ready: Ready) -> int:
        """Tokens of its phase that are queued before this portion, which may be queued or not: a forecast for caches.

        Exact while the queue is served in order: what entered before it minus what has left.
        """
        entered = self._place.get(ready.request, self._entered[ready.phase])
        return max(0, entered - self._left[ready.phase])

    def _fill(self, stage: Stage, now: float) -> None:
        raise NotImplementedError

    def _added(self, ready: Ready) -> None:
        pass

    def _removed(self, ready: Ready) -> None:
        pass

    def _remove(self, ready: Ready) -> None:
        del self.ready[ready.request]
        self.tokens -= ready.tokens
        self._left[ready.phase] += ready.tokens
        del self._place[ready.request]
        (self.decodes if ready.phase == "decode" else self.prefills).pop(ready.request)
        self._removed(ready)


def fill(stage: Stage, queue: Iterable[Ready], *, cut: bool = False) -> None:
    """Take from the front until one does not fit: nobody is overtaken."""
    for ready in queue:
        if not stage.take(ready, cut=cut):
            return


class FCFS(Batcher):
    """By the arrival of the request, whatever the phase; stops at the first portion that does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self._heap: list[tuple[float, int]] = []

    def _added(self, ready: Ready) -> None:
        heapq.heappush(self._heap, (ready.arrival_s, ready.request))

    def _fill(self, stage: Stage, now: float) -> None:
        while self._heap:
            ready = self.ready.get(self._heap[0][1])
            if ready is not None and not stage.take(ready):
                return
            heapq.heappop(self._heap)  # taken, or ended while it waited


class DecodeFirst(Batcher):
    """All decode tokens, then whole prompts while they fit: what 2410.19123 calls decode-prioritised."""

    cut = False

    def _fill(self, stage: Stage, now: float) -> None:
        fill(stage, self.decodes.values())
        fill(stage, self.prefills.values(), cut=self.cut)


class ChunkedPrefill(DecodeFirst):
    """All decode tokens, then prompts up to the budget, the last one cut (Sarathi-Serve, 2403.02310)."""

    cut = True


class PrefillFirst(Batcher):
    """Whole prompts first; decode tokens run only when no prompt may (prefill-prioritised in 2410.19123).

    With `mix` decode tokens fill what prompts leave of the budget.
    """

    def __init__(self, mix: bool = False) -> None:
        super().__init__()
        self.mix = mix

    def _fill(self, stage: Stage, now: float) -> None:
        fill(stage, self.prefills.values())
        if self.mix or not stage.portions:
            fill(stage, self.decodes.values())


class ContinuousStage(Batcher):
    """Every running request in every stage, and the whole prompts of the newly admitted; only requests are capped."""

    def _fill(self, stage: Stage, now: float) -> None:
        stage.budget = stage.tokens = max(self.tokens, 1)
        fill(stage, self.decodes.values())
        fill(stage, self.prefills.values())


class SerialRequests(Batcher):
    """A router's batch of `batch` prompts, grouped by expert, then each request alone until it has ended.

    For experts that are whole models: unrelated prompts gain nothing from one another, and an expert serves its prompts
    in a row so that it is loaded once a batch.
    """

    def __init__(self, batch: int = 8) -> None:
        super().__init__()
        if batch < 1:
            raise MoesaicError(f"a router's batch of {batch} prompts: expected at least 1")
        self.batch = batch
        self._round: list[int] = []  # requests of this batch that have not begun, last first
        self._current: int | None = None

    def _fill(self, stage: Stage, now: float) -> None:
        if self._current in self.ready:
            stage.take(self.ready[self._current], cut=True)
            return
        self._round = [request for request in self._round if request in self.ready]
        if not self._round:
            first = list(islice(chain(self.decodes.values(), self.prefills.values()), self.batch))
            first.sort(
                key=lambda each: (math.inf if each.expert is None else each.expert, each.arrival_s, each.request)
            )
            self._round = [each.request for each in reversed(first)]
        if self._round and stage.take(self.ready[self._round[-1]], cut=True):
            self._current = self._round.pop()
