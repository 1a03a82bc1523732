"""What the engine has counted since it started, and the snapshot clients read from any thread."""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.schedule.work import Key, WorkItem
from moesaic.serve.arena import resident_bytes
from moesaic.serve.sequence import Sequence as Request
from moesaic.serve.stats import SIZES, Histogram, Memory, Stats

if TYPE_CHECKING:
    from moesaic.serve.runner import Runner

RECENT = 64  # ends of requests from which the time until a place is free is told


@dataclass(frozen=True)
class StepCount:
    """One step: what ran, its seconds, of them waiting for entries and bookkeeping, and its unique experts."""

    items: Sequence[WorkItem]
    seconds: float
    stall_s: float
    overhead_s: float
    experts: int


class Counters:
    """Written by the engine's thread; single numbers may be read from any."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.rejected = self.steps = self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        self.busy_s = self.stall_s = self.overhead_s = 0.0
        self.finished: Counter[str] = Counter()
        self.by_expert: Counter[int] = Counter()
        self.ttft, self.tpot, self.step_s, self.wait = Histogram(), Histogram(), Histogram(), Histogram()
        self.experts, self.batch = Histogram(SIZES), Histogram(SIZES)
        self._ends: deque[float] = deque(maxlen=RECENT)

    def arrived(self, seconds: float) -> None:
        """A request was routed and queued in `seconds`, between steps."""
        self.overhead_s += seconds
        self.busy_s += seconds

    def waited(self, request: Request, now: float) -> None:
        """Something of the request is about to run; the first time, its wait ends."""
        if not request.started:
            self.wait.add(now - request.arrival_s)

    def token(self, request: Request, now: float) -> None:
        """A token was sampled."""
        self.output_tokens += 1
        if request.first_s is None:
            request.first_s = now
            self.ttft.add(now - request.arrival_s)
        request.last_s = now

    def step(self, count: StepCount) -> None:
        """A step has run."""
        self.steps += 1
        self.busy_s += count.seconds
        self.stall_s += count.stall_s
        self.overhead_s += count.overhead_s
        self.step_s.add(count.seconds)
        self.experts.add(count.experts)
        self.batch.add(len(count.items))
        for item in count.items:
            self.prompt_tokens += item.tokens if item.phase == "prefill" else 0
            for call in item.at(item.calls[0].layer):
                self.by_expert[call.expert] += call.tokens

    def ended(self, request: Request, reason: str) -> None:
        """A request has ended."""
        self.finished[reason] += 1
        self.cached_tokens += request.cached
        self._ends.append(time.perf_counter())
        if request.first_s is not None and len(request.output) > 1:
            self.tpot.add((request.last_s - request.first_s) / (len(request.output) - 1))

    def retry_s(self) -> float:
        """Seconds in which one request ends, by the last ones; 1 if nobody can tell."""
        ends = list(self._ends)
        return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 1.0

    def snapshot(self, model: str, opened: int, runner: "Runner") -> Stats:
        """Everything, now."""
        with runner.machine.store.lock() as residency:
            tally = residency.tally
            shares = resident_shares(residency.layout.entries, residency.layout.bytes, residency.ready)
            capacity = sum(cache.capacity for cache in residency.pools)
        experts = len(shares[0]) if shares else 0
        waiting = Counter[int]()
        for ready in list(runner.batcher.ready.values()):
            waiting[ready.expert or 0] += ready.tokens
        running = len(runner.running)
        split = runner.machine.memory
        return Stats(
            model=model,
            uptime_s=time.perf_counter() - self.begin,
            waiting=max(opened - running, 0),
            running=running,
            finished=dict(self.finished),
            rejected=self.rejected,
            queued_tokens_by_expert=[waiting[e] for e in range(experts)],
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            tokens_by_expert=[self.by_expert[e] for e in range(experts)],
            busy_s=self.busy_s,
            stall_s=self.stall_s,
            overhead_s=self.overhead_s,
            uses=tally.uses,
            use_hits=tally.use_hits,
            loads=tally.loads,
            evictions=tally.evictions,
            demand_bytes=tally.demand_bytes,
            prefetch_bytes=tally.prefetch_bytes,
            wasted_bytes=tally.wasted_bytes,
            resident=shares,
            ttft_s=self.ttft.copy(),
            tpot_s=self.tpot.copy(),
            step_s=self.step_s.copy(),
            wait_s=self.wait.copy(),
            experts_per_step=self.experts.copy(),
            batch=self.batch.copy(),
            memory=Memory(
                budget=split.budget,
                dense=split.dense,
                buffers=split.buffers,
                pool=split.pool,
                experts_capacity=capacity,
                experts=runner.machine.store.memory.resident,
                kv=runner.pool.taken,
                process=resident_bytes(),
            ),
        )


def resident_shares(
    entries: Mapping[tuple[int, int], tuple[Key, ...]], sizes: Mapping[Key, int], ready: Callable[[Key], bool]
) -> list[list[float]]:
    """(L, E): of each expert's bytes, the share that is there."""
    layers: dict[int, list[float]] = {}
    for (layer, _), keys in sorted(entries.items()):
        there = sum(sizes[key] for key in keys if ready(key))
        layers.setdefault(layer, []).append(there / sum(sizes[key] for key in keys))
    return [row for _, row in sorted(layers.items())]
