"""The discrete-event run of a trace: one clock, one engine, the policies of `schedule/` deciding, costs from a model.

A stage runs its layers in turn. Of each layer: attention, then the demand for its entries, the stall until they are
there (the link works on meanwhile, for this layer first and then ahead), then the experts. Events are arrivals, the
ends of transfers and the ends of layers; nothing is random, so equal input gives an equal run. Times in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moesaic.errors import MoesaicError
from moesaic.progress import Progress
from moesaic.schedule.batch import Batcher, Portion, Ready, Room
from moesaic.schedule.residency import Residency
from moesaic.schedule.work import ANY, Key, WorkItem, keys_of
from moesaic.simulate.channel import Channel
from moesaic.simulate.stage_cost import LayerCost, StageCost, StageLoad
from moesaic.simulate.workload import Workload


@dataclass(frozen=True)
class Limits:
    """What one stage and one engine hold: `max_tokens` tokens a stage, `max_requests` running requests."""

    max_tokens: int = 512
    max_requests: int = 64

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.max_requests) < 1:
            raise MoesaicError(f"{self}: a stage needs room for at least one token of one request")


@dataclass
class Served:
    """One request: when it came, first ran, gave its first token and ended; its longest wait between decode steps."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    start_s: float = -1.0
    first_s: float = -1.0
    end_s: float = -1.0
    longest_wait_s: float = 0.0
    done_prompt: int = 0
    done_output: int = 0
    step: int = 0
    since_s: float = 0.0


class StageRow(NamedTuple):
    """What is kept of a stage."""

    start_s: float
    seconds: float
    stall_s: float
    attention_s: float
    experts_s: float
    collective_s: float
    prefill_tokens: int
    decode_tokens: int
    requests: int
    calls: int  # expert calls of all items
    choices: int  # of a token, in a layer, for an expert: the events of the trace
    experts: float  # unique experts, mean over layers
    entries: float  # unique entries, mean over layers
    intra_bytes: float
    inter_bytes: float
    queued: int  # portions that were ready and stayed behind
    queued_tokens: int
    running: int
    resident_bytes: int


@dataclass
class Run:
    """A finished run: its requests and stages, the keys of every moment, and what the parts counted."""

    requests: list[Served]
    stages: list[StageRow] = field(default_factory=list)
    moments: list[tuple[Key, ...]] = field(default_factory=list)
    end_s: float = 0.0
    link_busy_s: float = 0.0
    unit_busy_s: dict[str, float] = field(default_factory=dict)  # seconds each unit ran experts
    most_context: int = 0  # largest sum of contexts of running requests: the key-value cache in tokens


@dataclass
class _Sums:
    """What a stage adds up over its layers."""

    stall_s: float = 0.0
    experts_s: float = 0.0
    collective_s: float = 0.0
    intra: float = 0.0
    inter: float = 0.0
    needed: list[tuple[Key, ...]] = field(default_factory=list)

    def add(self, stall: float, layer: LayerCost) -> None:
        self.stall_s += stall
        self.experts_s += layer.experts_s
        self.collective_s += layer.collective_s
        self.intra += layer.intra_bytes
        self.inter += layer.inter_bytes


class Simulator:
    """A trace through one engine. `run` may be called once."""

    def __init__(
        self,
        work: Workload,
        residency: Residency,
        channel: Channel,
        batcher: Batcher,
        cost: StageCost,
        limits: Limits,
    ) -> None:
        self.work, self.residency, self.channel = work, residency, channel
        self.batcher, self.cost, self.limits = batcher, cost, limits
        self.now = 0.0
        lengths = zip(work.arrival_s, work.prompt_tokens, work.output_tokens, strict=True)
        self.served = [Served(*each) for each in lengths]
        self.run_ = Run(self.served)
        self.layers = work.trace.card.layers if work.layout.layers == (ANY,) else 1  # layers that a moment stands for
        self._units = [unit.name for unit in cost.units]
        self.run_.unit_busy_s = dict.fromkeys(self._units, 0.0)
        self._arrived = 0
        self._running: set[int] = set()
        self._context = 0  # tokens in the key-value cache
        self._items: dict[int, WorkItem] = {}  # the next portion of each queued request, as announced
        self._keys: dict[tuple[Key, ...], tuple[Key, ...]] = {}  # equal moments share one tuple

    def run(self, label: str = "simulate") -> Run:
        """Serve every request of the trace."""
        with Progress(label, total=len(self.served), unit="requests") as progress:
            while True:
                self._arrivals()
                room = Room(self.limits.max_tokens, self.limits.max_requests - len(self._running))
                portions = self.batcher.form(self.now, room)
                if portions:
                    ended = self._stage(portions)
                    progress.advance(ended)
                elif self._arrived < len(self.served):
                    self.now = max(self.now, self.served[self._arrived].arrival_s)
                elif len(self.batcher):
                    raise MoesaicError(f"{type(self.batcher).__name__} leaves {len(self.batcher)} requests for ever")
                else:
                    break
        self.run_.end_s, self.run_.link_busy_s = self.now, self.channel.busy_s
        return self.run_

    def _arrivals(self) -> None:
        while self._arrived < len(self.served) and self.served[self._arrived].arrival_s <= self.now:
            self.served[self._arrived].since_s = self.served[self._arrived].arrival_s
            self._queue(self._arrived)
            self._arrived += 1

    def _queue(self, request: int) -> None:
        """The request's next portion is ready. Of a long prompt, what one stage can take is announced."""
        state = self.served[request]
        left = state.prompt_tokens - state.done_prompt
        if left:
            item = self.work.prefill(request, state.step, state.done_prompt, min(left, self.limits.max_tokens))
        else:
            item = self.work.decode(request, state.step, state.done_output - 1)
        keys, expert = self.work.visible(item)
        self._items[request] = item
        fresh = not state.done_prompt
        ready = Ready(request, item.phase, left or 1, state.arrival_s, state.since_s, fresh, keys, expert)
        if (stages := self._stages(ready)) is not None:
            self.residency.queued((item,), stages)
        self.batcher.add(ready)

    def _stages(self, ready: Ready) -> int | None:
        """In how many stages from now the portion may run; nobody knows when a request ends and another is admitted."""
        if ready.fresh and len(self._running) >= self.limits.max_requests:
            return None
        return 1 + self.batcher.ahead(ready) // self.limits.max_tokens

    def _stage(self, portions: Sequence[Portion]) -> int:
        """Run a stage; returns how many requests it ended."""
        items = [self._taken(portion) for portion in portions]
        load, sums = self._load(items), _Sums()
        start, queued, queued_tokens = self.now, len(self.batcher), self.batcher.tokens
        again = 1 + len(self.batcher.decodes) // self.limits.max_tokens
        moments = self.residency.begin(items, again, lambda request: self._stages(self.batcher.ready[request]))
        attention = self.cost.attention(load) * self.layers
        self.channel.advance(start)
        self.residency.ahead(0)
        self.channel.kick(start)
        for i in range(len(moments)):
            self.now += attention
            self._moment(i, load, sums)
        self.now += self.cost.ends(load)
        self.channel.advance(self.now)
        self.residency.finish()
        self.run_.moments += sums.needed
        self.run_.stages.append(
            StageRow(
                start_s=start,
                seconds=self.now - start,
                stall_s=sums.stall_s,
                attention_s=attention * len(moments),
                experts_s=sums.experts_s,
                collective_s=sums.collective_s,
                prefill_tokens=load.prefill_tokens,
                decode_tokens=load.decode_tokens,
                requests=len(items),
                calls=sum(len(item.calls) for item in items),
                choices=sum(call.tokens for item in items for call in item.calls),
                experts=sum(map(len, moments)) / len(moments),
                entries=sum(map(len, sums.needed)) / len(moments),
                intra_bytes=sums.intra,
                inter_bytes=sums.inter,
                queued=queued,
                queued_tokens=queued_tokens,
                running=len(self._running),
                resident_bytes=self.residency.taken,
            )
        )
        return sum(self._after(item) for item in items)

    def _moment(self, i: int, load: StageLoad, sums: "_Sums") -> None:
        """One layer of the stage after its attention: wait for the entries of each wave, run its experts."""
        residency, channel, now = self.residency, self.channel, self.now
        for wave in residency.waves(i):
            channel.advance(now)
            found = residency.demand(wave)
            residency.ahead(i + 1)
            channel.kick(now)
            ready = channel.wait(found.late + found.misses, now)
            layer = self.cost.experts(wave, load)
            sums.add(ready - now, layer)
            keys = keys_of(wave)
            sums.needed.append(self._keys.setdefault(keys, keys))
            for name, seconds in zip(self._units, layer.busy, strict=True):
                self.run_.unit_busy_s[name] += seconds
            now = ready + layer.experts_s + layer.collective_s
            channel.advance(now)
            residency.release(wave)
        self.now = now

    def _taken(self, portion: Portion) -> WorkItem:
        """The portion as a work item; a prompt of another length than was announced is cut anew."""
        request, tokens = portion
        state, item = self.served[request], self._items.pop(request)
        if tokens != item.tokens:
            item = self.work.prefill(request, state.step, state.done_prompt, tokens)
        wait = self.now - state.since_s
        if state.start_s < 0:
            state.start_s = self.now
        else:
            state.longest_wait_s = max(state.longest_wait_s, wait)
        self._running.add(request)
        return item

    def _load(self, items: Sequence[WorkItem]) -> StageLoad:
        prefill = decode = prefill_pairs = decode_pairs = context = outputs = 0
        for item in items:
            state = self.served[item.request]
            if item.phase == "decode":
                decode += 1
                decode_pairs += state.prompt_tokens + state.done_output
                outputs += 1
            else:
                done, tokens = state.done_prompt, item.tokens
                prefill += tokens
                prefill_pairs += tokens * done + tokens * (tokens + 1) // 2
                context += done + tokens
                outputs += done + tokens == state.prompt_tokens
        self._context += prefill + decode
        self.run_.most_context = max(self.run_.most_context, self._context)
        return StageLoad(prefill, decode, prefill_pairs, decode_pairs, context, outputs)

    def _after(self, item: WorkItem) -> bool:
        """The item has run: its request goes on, or ends."""
        request = item.request
        state = self.served[request]
        state.step += 1
        if item.phase == "prefill":
            state.done_prompt += item.tokens
        if state.done_prompt == state.prompt_tokens:
            if state.first_s < 0:
                state.first_s = self.now
            state.done_output += 1
        state.since_s = self.now
        if state.done_prompt < state.prompt_tokens or state.done_output < state.output_tokens:
            self._queue(request)
            return False
        state.end_s = self.now
        self._running.discard(request)
        self._context -= state.prompt_tokens + max(state.output_tokens - 1, 0)
        self.residency.forget(request)
        self.batcher.ended(request)
        return True
