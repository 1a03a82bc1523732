"""Batchers: nothing is lost or served twice, the budget holds, each keeps the order it promises."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import MoesaicError
from moesaic.schedule.batch import (
    FCFS,
    Batcher,
    ChunkedPrefill,
    ContinuousStage,
    DecodeFirst,
    Portion,
    PrefillFirst,
    Ready,
    Room,
    SerialRequests,
)
from moesaic.schedule.batch_by_expert import Adaptive, LongestQueue, Regroup
from moesaic.schedule.family import BATCHERS, make
from moesaic.schedule.work import Key

EXPERTS = 4


class Flat:
    """Prices of a machine on which an entry costs one second unless it is `here`."""

    def __init__(self, here: set[Key] = frozenset(), stage: float = 1.0, token: float = 0.01) -> None:  # type: ignore[assignment]
        self.here, self.stage_s, self.token_s, self.overlap = here, stage, token, False
        self.complete = False

    def fetch_s(self, key: Key) -> float:
        return 0.0 if key in self.here else 1.0

    def read_s(self, key: Key) -> float:
        return 0.1


def batcher(name: str) -> Batcher:
    return make(BATCHERS, "batcher", name, prices=Flat(), max_wait_s=5.0, batch=3)


def ready(request: int, phase: str = "decode", tokens: int = 1, since: float = 0.0, *, expert: int = 0) -> Ready:
    keys = (Key(0, expert),)
    fresh = phase == "prefill"
    return Ready(request, phase, tokens, float(request), since, fresh, keys, expert)  # type: ignore[arg-type]


class Engine:
    """Serves requests of (arrival, prompt, output) until none is left, and keeps what happened."""

    def __init__(self, kind: Batcher, requests: list[tuple[int, int, int]], room: Room, seed: int = 0) -> None:
        self.batcher, self.requests, self.room = kind, requests, room
        self.rng = random.Random(seed)
        self.prompt = {r: prompt for r, (_, prompt, _) in enumerate(requests)}
        self.output = {r: output for r, (_, _, output) in enumerate(requests)}
        self.ran: Counter[int] = Counter()
        self.stages: list[list[Portion]] = []
        self.waits: list[tuple[str, float]] = []
        self.running: set[int] = set()

    def add(self, request: int, now: float) -> None:
        phase = "prefill" if self.prompt[request] else "decode"
        fresh = request not in self.running
        expert = self.rng.randrange(EXPERTS)
        arrival = float(self.requests[request][0])
        self.batcher.add(
            Ready(request, phase, self.prompt[request] or 1, arrival, now, fresh, (Key(0, expert),), expert)  # type: ignore[arg-type]
        )

    def run(self) -> "Engine":
        waiting = sorted(range(len(self.requests)), key=lambda r: self.requests[r][0])
        now = 0.0
        while waiting or len(self.batcher):
            while waiting and self.requests[waiting[0]][0] <= now:
                self.add(waiting.pop(0), now)
            room = Room(self.room.tokens, self.room.admit - len(self.running))
            before = dict(self.batcher.ready)
            portions = self.batcher.form(now, room)
            if not portions and len(self.batcher):
                assert not room.admit, "a stage was possible, but none was formed"
                raise AssertionError("the batcher is stuck")
            self.check(before, portions, room)
            self.waits += [(before[r].phase, now - before[r].since_s) for r, _ in portions]
            now += 1.0
            for portion in portions:
                self.serve(portion, now)
            if portions:
                self.stages.append(portions)
        return self

    def check(self, before: dict[int, Ready], portions: list[Portion], room: Room) -> None:
        assert len({portion.request for portion in portions}) == len(portions), "a request twice in a stage"
        assert sum(before[r].fresh for r, _ in portions) <= room.admit
        assert all(1 <= tokens <= before[r].tokens for r, tokens in portions)
        if not isinstance(self.batcher, ContinuousStage):
            assert sum(tokens for _, tokens in portions) <= room.tokens
        assert set(self.batcher.ready) == set(before) - {r for r, _ in portions}
        assert self.batcher.tokens == sum(each.tokens for each in self.batcher.ready.values())

    def serve(self, portion: Portion, now: float) -> None:
        request, tokens = portion
        self.running.add(request)
        self.ran[request] += tokens
        if self.prompt[request]:
            self.prompt[request] -= tokens
        else:
            self.output[request] -= 1
        if self.prompt[request] or self.output[request] > 0:
            self.add(request, now)
        else:
            self.running.discard(request)
            self.batcher.ended(request)


requests_ = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30), st.integers(0, 6)), min_size=1, max_size=12)


@pytest.mark.parametrize("name", BATCHERS)
@given(requests=requests_, tokens=st.integers(1, 24), admit=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_everything_is_served_once(
    name: str, requests: list[tuple[int, int, int]], tokens: int, admit: int, seed: int
) -> None:
    engine = Engine(batcher(name), requests, Room(tokens, admit), seed).run()
    assert engine.ran == Counter({r: prompt + output for r, (_, prompt, output) in enumerate(requests)})


@pytest.mark.parametrize("name", BATCHERS)
def test_an_ended_request_leaves_the_queue(name: str) -> None:
    kind = batcher(name)
    for request in range(5):
        kind.add(ready(request))
    kind.ended(2)
    taken = [portion.request for _ in range(5) for portion in kind.form(0.0, Room(8, 8))]
    assert sorted(taken) == [0, 1, 3, 4]
    assert len(kind) == kind.tokens == 0


@pytest.mark.parametrize("name", BATCHERS)
def test_same_input_same_stages(name: str) -> None:
    requests = [(i // 3, 1 + i * 7 % 13, 1 + i % 4) for i in range(20)]
    runs = [Engine(batcher(name), requests, Room(10, 5), seed=3).run().stages for _ in range(2)]
    assert runs[0] == runs[1]


def formed(kind: Batcher, tokens: int, admit: int = 8) -> list[tuple[int, int]]:
    return [tuple(portion) for portion in kind.form(0.0, Room(tokens, admit))]


def filled(kind: Batcher) -> Batcher:
    """Prompts of 6 and 5 tokens that came first, then three decode tokens."""
    for each in (ready(0, "prefill", 6), ready(1, "prefill", 5), ready(2), ready(3), ready(4)):
        kind.add(each)
    return kind


def test_the_order_each_promises() -> None:
    assert formed(filled(FCFS()), 8) == [(0, 6)]  # request 1 does not fit, and nobody overtakes it
    assert formed(filled(DecodeFirst()), 9) == [(2, 1), (3, 1), (4, 1), (0, 6)]
    assert formed(filled(DecodeFirst()), 8) == [(2, 1), (3, 1), (4, 1)]
    assert formed(filled(ChunkedPrefill()), 8) == [(2, 1), (3, 1), (4, 1), (0, 5)]
    assert formed(filled(PrefillFirst()), 8) == [(0, 6)]
    assert formed(filled(PrefillFirst(mix=True)), 8) == [(0, 6), (2, 1), (3, 1)]
    assert formed(filled(ContinuousStage()), 1) == [(2, 1), (3, 1), (4, 1), (0, 6), (1, 5)]


def test_a_prompt_longer_than_any_stage_runs_in_pieces() -> None:
    for kind in (FCFS(), DecodeFirst(), PrefillFirst(), LongestQueue()):
        kind.add(ready(0, "prefill", 20))
        assert formed(kind, 8) == [(0, 8)]


def test_serial_requests_run_one_after_the_other_and_grouped_by_expert() -> None:
    kind = SerialRequests(batch=3)
    for request, expert in enumerate((1, 0, 1, 0)):
        kind.add(ready(request, "prefill", 4, expert=expert))
    served = []
    for _ in range(4):
        ((request, _),) = formed(kind, 100)
        served.append(request)
        kind.add(ready(request, expert=0))
        assert formed(kind, 100) == [(request, 1)]
        kind.ended(request)
    assert served == [1, 0, 2, 3]  # the batch of three: expert 0 first, then both of expert 1; then the next batch


def test_the_forecast_counts_what_stands_before() -> None:
    kind = DecodeFirst()
    queue = [ready(0, "prefill", 6), ready(1, "prefill", 5), ready(2), ready(3)]
    assert [kind.ahead(each) for each in queue[:1]] == [0]
    for each in queue:
        kind.add(each)
    assert [kind.ahead(each) for each in queue] == [0, 6, 0, 1]
    assert [kind.ahead(each) for each in (ready(7, "prefill", 2), ready(8))] == [11, 2]
    assert formed(kind, 8) == [(2, 1), (3, 1), (0, 6)]
    assert kind.ahead(queue[1]) == 0
    longest = LongestQueue()
    for request, expert in enumerate((0, 0, 0, 1, 1, 2)):
        longest.add(ready(request, expert=expert))
    assert [longest.ahead(ready(9, expert=expert)) for expert in range(3)] == [0, 3, 5]


def longest_by_hand(queues: dict[int, list[Ready]], budget: int) -> list[int]:
    """Algorithm 1, mended, as plainly as possible."""
    taken: list[int] = []
    left = budget
    while any(queues.values()):
        expert = max(
            queues, key=lambda e: (sum(r.tokens for r in queues[e]), -queues[e][0].request if queues[e] else 0)
        )
        while queues[expert]:
            head = queues[expert][0]
            if head.tokens > left:
                return taken
            left -= head.tokens
            taken.append(queues[expert].pop(0).request)
    return taken


@given(st.lists(st.tuples(st.integers(0, EXPERTS - 1), st.integers(1, 5)), min_size=1, max_size=20), st.integers(5, 30))
def test_longest_queue_is_algorithm_1(work: list[tuple[int, int]], budget: int) -> None:
    kind = LongestQueue()
    queues: dict[int, list[Ready]] = {expert: [] for expert in range(EXPERTS)}
    for request, (expert, tokens) in enumerate(work):
        each = ready(request, "prefill", tokens, expert=expert)
        kind.add(each)
        queues[expert].append(each)
    assert [request for request, _ in formed(kind, budget, admit=99)] == longest_by_hand(queues, budget)


def needed(half: list[tuple[int, int]], sets: dict[int, frozenset[Key]]) -> int:
    return len(frozenset().union(*(sets[request] for request, _ in half)))


@given(st.integers(0, 10_000))
def test_regrouping_never_needs_more(seed: int) -> None:
    rng = random.Random(seed)
    n = 8
    sets = {r: frozenset(Key(layer, rng.randrange(6)) for layer in range(3)) for r in range(n)}
    kind = Regroup()
    for request, keys in sets.items():
        kind.add(Ready(request, "decode", 1, 0.0, 0.0, False, tuple(sorted(keys)), 0))
    halves = formed(kind, n // 2), formed(kind, n // 2)
    assert sorted(r for half in halves for r, _ in half) == list(range(n))
    assert len(halves[0]) == len(halves[1]) == n // 2
    own = [(r, 1) for r in range(n // 2)], [(r, 1) for r in range(n // 2, n)]
    assert sum(needed(half, sets) for half in halves) <= sum(needed(half, sets) for half in own)


def test_regrouping_finds_two_topics() -> None:
    kind = Regroup()
    for request in range(16):
        topic = request % 2
        keys = (Key(0, topic), Key(1, topic), Key(2, 4 * topic + request // 2 % 2))
        kind.add(Ready(request, "decode", 1, 0.0, 0.0, False, keys, 0))
    first, second = formed(kind, 8), formed(kind, 8)
    assert {r % 2 for r, _ in first} != {r % 2 for r, _ in second}
    assert len({r % 2 for r, _ in first}) == len({r % 2 for r, _ in second}) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Room(0, 1),
        lambda: Regroup(rounds=0),
        lambda: SerialRequests(batch=0),
        lambda: Adaptive(Flat(), max_wait_s=-1.0),
        lambda: FCFS().add(ready(0, tokens=0)),
        lambda: [kind.add(ready(7)) for kind in [FCFS()] for _ in range(2)],
        lambda: make(BATCHERS, "batcher", "decode-frist"),
    ],
)
def test_bad_input_is_named(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MoesaicError, match=r"expected|queued already|did you mean 'decode-first'"):
        wrong()


@given(
    decodes=st.lists(st.tuples(st.integers(0, EXPERTS - 1), st.floats(0, 9)), max_size=8),
    prompts=st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=5),
    tokens=st.integers(1, 16),
    admit=st.integers(0, 3),
)
def test_nothing_is_reckoned_where_every_entry_is_there(decodes, prompts, tokens, admit):
    """And the stage is the one that reckoning finds, if it has room for all decode tokens."""
    chosen = []
    for complete in (True, False):
        prices = Flat({Key(0, expert) for expert in range(EXPERTS)})
        prices.complete = complete
        batcher = Adaptive(prices, max_wait_s=5.0)
        for number, (expert, since) in enumerate(sorted(decodes, key=lambda each: each[1])):
            batcher.add(ready(number, since=since, expert=expert))
        for number, (length, fresh) in enumerate(prompts, len(decodes)):
            batcher.add(ready(number, "prefill", length)._replace(fresh=fresh))
        chosen.append({(portion.request, portion.tokens) for portion in batcher.form(9.0, Room(tokens, admit))})
    if len(decodes) <= tokens:
        assert chosen[0] == chosen[1]
