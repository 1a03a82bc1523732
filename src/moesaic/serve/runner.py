"""What the engine does in a step: form, fetch, run, sample, route, queue. One thread calls everything but `prepare`.

The order in which batcher and residency hear of events is that of `simulate.simulator`, so that both see the same hits.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from moesaic.schedule.batch import Batcher, Portion, Ready, Room
from moesaic.schedule.residency import Residency
from moesaic.schedule.work import WorkItem
from moesaic.serve.attention import RaggedAttention, Segment
from moesaic.serve.counters import Counters, StepCount
from moesaic.serve.experts import Packs
from moesaic.serve.gate import Gate
from moesaic.serve.memory import MemorySplit
from moesaic.serve.options import EngineOptions
from moesaic.serve.prices import LivePrices
from moesaic.serve.request import Event, FinishReason, Token
from moesaic.serve.sampling import Choice, sample
from moesaic.serve.sequence import Calls, majority
from moesaic.serve.sequence import Sequence as Request
from moesaic.serve.step import Backbone, Part, segments
from moesaic.serve.store import ExpertReadError, ExpertStore

Outcome = tuple[Request, list[Event], FinishReason | None, str]
"""A request after a step: what happened to it, and why it ended, None if it goes on, with what went wrong."""


@dataclass
class Machine:
    """What runs and moves: everything below the policies."""

    backbone: Backbone
    gate: Gate
    store: ExpertStore
    memory: MemorySplit
    packs: Packs


class Runner:
    """Requests in the queue and in slots, and the steps that take them further."""

    def __init__(
        self, machine: Machine, batcher: Batcher, prices: LivePrices, options: EngineOptions, counters: Counters
    ) -> None:
        self.machine, self.batcher, self.prices, self.options, self.counters = (
            machine,
            batcher,
            prices,
            options,
            counters,
        )
        self.residency: Residency = machine.store.residency
        self.pool = machine.backbone.pool
        self.gated = not machine.gate.experts  # every layer's router chooses, when it runs
        self.calls = Calls(self.residency.layout, self.gated)
        self.eos: frozenset[int] = frozenset()
        self.requests: dict[int, Request] = {}  # queued or running
        self.running: set[int] = set()
        self._items: dict[int, WorkItem] = {}  # the next portion of each, as announced
        self._begin = time.perf_counter()
        self._own_s = 0.0  # of the engine's thread in batching, policies and the pre-gate

    @property
    def now(self) -> float:
        """Seconds since the engine was built."""
        return time.perf_counter() - self._begin

    @property
    def busy(self) -> bool:
        """Whether anything is queued."""
        return len(self.batcher) > 0

    # -- the life of a request ------------------------------------------------------------------------------------
    def arrive(self, request: Request) -> None:
        """Route its prompt and queue it."""
        books = self._books_s
        with self._books():
            request.experts = self.machine.gate.prompt(request.prompt, request.bias)
            request.since_s = request.arrival_s
            self.requests[request.id] = request
            self._queue(request)
        self.counters.arrived(self._books_s - books)

    def end(self, request: Request, keep: bool) -> None:
        """It has finished or was cancelled: nothing of it stays but, with `keep`, its prefix."""
        if self.requests.pop(request.id, None) is None:
            return
        self._items.pop(request.id, None)
        self.running.discard(request.id)
        self.batcher.ended(request.id)
        with self.machine.store.lock() as residency:
            residency.forget(request.id)
        if request.slot is not None:
            self.pool.free(request.slot, request.done, keep and self.options.prefix_reuse and request.plain)
            request.slot = None
            self._balance()

    def _queue(self, request: Request) -> None:
        """Its next portion is ready. Of a long prompt, what one step can take is announced."""
        item = request.item(self.calls, self.options.max_tokens)
        self._items[request.id] = item
        ready = Ready(
            request.id,
            item.phase,
            request.left or 1,
            request.arrival_s,
            request.since_s,
            not request.started,
            item.keys,
            majority(item),
        )
        if not self.machine.store.complete and (stages := self._stages(ready)) is not None:
            with self.machine.store.lock() as residency:
                residency.queued((item,), stages)
        self.batcher.add(ready)

    def _stages(self, ready: Ready) -> int | None:
        """In how many stages from now the portion may run; nobody knows when a request ends and another is admitted."""
        if ready.fresh and len(self.running) >= self.options.max_requests:
            return None
        return 1 + self.batcher.ahead(ready) // self.options.max_tokens

    def _admit(self) -> int:
        """How many fresh requests may begin: slots, and memory for the keys of the largest that waits."""
        places = self.options.max_requests - len(self.running)
        waiting = [request for request in self.requests.values() if not request.started]
        if not waiting or places < 1:
            return max(places, 0)
        spare = self.machine.memory.most_kv - self.pool.running
        if spare < places * self.pool.bytes_for(self.pool.context):
            largest = max(request.most_tokens for request in waiting)
            places = min(places, spare // self.pool.bytes_for(largest))
        return places

    def _balance(self) -> None:
        """Keys take what they need of the shared memory, prefixes what neither they nor experts want."""
        memory = self.machine.memory
        self.pool.trim(memory.prefixes_until(self.pool.running))
        if self.options.pack:
            self.machine.packs.trim(memory.for_packs(self.pool.taken))
        capacity = memory.for_experts(self.pool.taken)
        if capacity != self.residency.pools[0].capacity:
            with self.machine.store.lock() as residency:
                residency.pools[0].resize(capacity)

    # -- a step ---------------------------------------------------------------------------------------------------
    def step(self) -> list[Outcome]:
        """Form a stage and run it; what became of its requests, and of those whose experts could not be read."""
        begin, stall, books = time.perf_counter(), self.machine.store.stall_s, self._books_s
        used = self._used_bytes
        with self._books():
            portions = self.batcher.form(self.now, Room(self.options.max_tokens, self._admit()))
            staged = [self._taken(portion) for portion in portions]
        if not staged:
            time.sleep(1e-3)  # what is ready may not begin yet
            return []
        failed: list[Outcome] = []
        while staged:
            try:
                outcomes = self._stage(staged)
                break
            except ExpertReadError as error:
                lost = [
                    request
                    for request, item in staged
                    if set(error.keys) & set(item.keys) or request.slot in error.slots
                ]
                lost = lost or [request for request, _ in staged]
                failed += [(request, [], "error", str(error)) for request in lost]
                staged = [(request, item) for request, item in staged if request not in lost]
        else:
            return failed
        seconds, stalled = time.perf_counter() - begin, self.machine.store.stall_s - stall
        items = self.machine.backbone.routes or [item for _, item in staged]
        self._count(items, seconds, stalled, self._books_s - books)
        self.prices.step(
            sum(item.tokens for item in items),
            max(seconds - stalled - (self._used_bytes - used) / self.prices.memory_rate, 0.0),
        )
        return failed + outcomes

    @contextmanager
    def _books(self) -> Iterator[None]:
        """What the block takes is overhead: batching, policies, the pre-gate."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._own_s += time.perf_counter() - begin

    @property
    def _used_bytes(self) -> int:
        """Bytes of entries that layers have used, ever."""
        return sum(cache.tally.bytes for cache in self.residency.pools)

    @property
    def _books_s(self) -> float:
        return self._own_s + self.machine.store.books_s

    def _taken(self, portion: Portion) -> tuple[Request, WorkItem]:
        """The portion as a work item; one of another length than was announced is cut anew."""
        request = self.requests[portion.request]
        item = self._items.pop(request.id)
        self.counters.waited(request, self.now)
        if request.slot is None:
            request.slot, request.cached = self.pool.acquire(
                request.prompt, request.most_tokens, self.options.prefix_reuse and request.plain
            )
            request.done = request.cached
            request.started = True
            self.running.add(request.id)
            self._balance()
        if request.cached or portion.tokens != item.tokens:
            item = request.item(self.calls, portion.tokens)
        return request, item

    def _stage(self, staged: Sequence[tuple[Request, WorkItem]]) -> list[Outcome]:
        """Run work items; returns what became of them."""
        again = 1 + len(self.batcher.decodes) // self.options.max_tokens
        items = [item for _, item in staged]
        with self._books(), self.machine.store.lock() as residency:
            if complete := self.machine.store.complete:
                self.machine.store.passed(items)
            else:
                residency.begin(items, again, lambda request: self._stages(self.batcher.ready[request]))
                residency.ahead(0)
        # Prompts last, as a step wants them; decode tokens of one expert side by side: mostly nothing needs sorting.
        ordered = sorted(staged, key=lambda each: (each[0].left > 0, *(call.expert for call in each[1].calls[:1])))
        parts = [self._part(request, item) for request, item in ordered]
        with self._books():
            self._gate_keys(parts)
        logits = self.machine.backbone.run(parts, complete)
        if not complete:
            with self._books(), self.machine.store.lock() as residency:
                residency.finish()
        for (request, item), part in zip(ordered, parts, strict=True):
            if request.plain:  # else nobody may continue on its keys
                self.pool.extend(part.slot, part.ids)
            request.done += item.tokens
            request.step += 1
        sampled = [request for (request, _), part in zip(ordered, parts, strict=True) if part.last]
        outcomes = self._sampled(sampled, sample(logits, [request.sampler for request in sampled]))
        for request, part in zip((request for request, _ in ordered), parts, strict=True):
            if not part.last:
                request.since_s = self.now
                with self._books():
                    self._queue(request)
        return outcomes

    def _part(self, request: Request, item: WorkItem) -> Part:
        start, stop = request.done, request.done + item.tokens
        assert request.slot is not None
        ids, experts = request.ids[start:stop], request.experts[start:stop]
        return Part(
            slot=request.slot,
            past=start,
            ids=ids,
            experts=experts,
            prompt=item.phase == "prefill",
            last=stop >= len(request.prompt),
            item=item,
            experts_per_token=request.generation.experts_per_token,
        )

    def _gate_keys(self, parts: Sequence[Part]) -> None:
        """Prompts were routed on arrival; now that they have slots, their keys in the pre-gate are written too."""
        prompts = [part for part in parts if part.prompt]
        if prompts:
            step = RaggedAttention(self.pool, segments(prompts))
            self.machine.gate.extend([token for part in prompts for token in part.ids], step)

    def _sampled(self, requests: Sequence[Request], choices: Sequence[Choice]) -> list[Outcome]:
        """Requests have their next tokens: end them, or route the tokens and queue them."""
        outcomes: list[Outcome] = []
        going: list[tuple[Request, Choice, str]] = []
        for request, choice in zip(requests, choices, strict=True):
            if choice.error is not None:
                outcomes.append((request, [], "error", choice.error))
                continue
            request.ids.append(choice.id)
            self.counters.token(request, self.now)
            text = request.text.push(choice.id)
            reason = self._reason(request, choice.id)
            if reason is None:
                going.append((request, choice, text))
            else:
                outcomes.append((request, [_event(request, choice, text, None)], reason, ""))
        if going:
            with self._books():
                experts = self._route([request for request, _, _ in going])
            for (request, choice, text), expert in zip(going, experts, strict=True):
                request.experts = np.append(request.experts, expert)
                request.since_s = self.now
                with self._books():
                    self._queue(request)
                told = None if self.gated else int(expert)
                outcomes.append((request, [_event(request, choice, text, told)], None, ""))
        return outcomes

    def _route(self, requests: Sequence[Request]) -> np.ndarray:
        """The experts of newly sampled tokens, whose keys in the pre-gate are written."""
        rows = [Segment(request.slot or 0, row, 1, request.done) for row, request in enumerate(requests)]
        biases = [request.bias for request in requests]
        return self.machine.gate.sampled(
            [request.ids[-1] for request in requests], rows, biases if any(bias is not None for bias in biases) else ()
        )

    def _reason(self, request: Request, token: int) -> FinishReason | None:
        if token in self.eos and not request.generation.ignore_eos:
            return "stop"
        if request.text.stopped is not None or request.sampler.finished:
            return "stop"
        return "length" if len(request.output) >= request.generation.max_tokens else None

    def _count(self, items: Sequence[WorkItem], seconds: float, stalled: float, overhead: float) -> None:
        experts = len({call.expert for item in items for call in item.at(item.calls[0].layer)})
        self.counters.step(StepCount(items, seconds, stalled, overhead, experts))


def _event(request: Request, choice: Choice, text: str, expert: int | None) -> Token:
    top = tuple((token, request.text.piece(token), logprob) for token, logprob in choice.top)
    piece = request.text.piece(choice.id) if choice.logprob is not None else ""
    return Token(choice.id, text, expert, choice.logprob, piece, top)
