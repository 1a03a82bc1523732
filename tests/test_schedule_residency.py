"""What is resident: what a policy hears of queued work, what is fetched ahead, waves, a second engine as witness."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import MoesaicError
from moesaic.schedule.cache import Cache
from moesaic.schedule.eviction import LRU, Belady, Eviction, PredictedSet
from moesaic.schedule.predict import ExactPreGate, Null, Predictor
from moesaic.schedule.residency import Residency
from moesaic.schedule.work import Call, Key, Known, Layout, WorkItem, keys_of

LAYERS, EXPERTS = 3, 6
LAYOUT = Layout.layer_experts([[1] * EXPERTS] * LAYERS)


def token(request: int, step: int, *experts: int) -> WorkItem:
    """A decode token that uses the experts in all layers."""
    calls = LAYOUT.calls([dict.fromkeys(experts, 1)])
    return WorkItem(request, step, "decode", 1, calls, Known.STEP if step else Known.REQUEST)


class Told(Belady):
    """A policy that remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(LAYERS)
        self.at: dict[object, float] = {}

    def expect(self, owner, at, keys):  # type: ignore[no-untyped-def]
        self.at[owner] = at
        super().expect(owner, at, keys)

    def done(self, owner):  # type: ignore[no-untyped-def]
        self.at.pop(owner, None)
        super().done(owner)


def resident(policy: Eviction, predictor: Predictor | None = None, capacity: int = 9, **options) -> Residency:  # type: ignore[no-untyped-def]
    return Residency(LAYOUT, capacity, lambda: policy, predictor or ExactPreGate(), **options)


def run(kept: Residency, items: list[WorkItem]) -> list[Key]:
    """One stage on a machine whose transfers take no time; returns what was not there when its layer asked."""
    missed = []
    moments = kept.begin(items)
    kept.ahead(0)
    settle(kept)
    for i in range(len(moments)):
        for wave in kept.waves(i):
            found = kept.demand(wave)
            missed += [*found.late, *found.misses]
            kept.ahead(i + 1)
            settle(kept)
            kept.release(wave)
    kept.finish()
    return missed


def settle(kept: Residency) -> None:
    while (transfer := kept.start()) is not None:
        kept.arrived(transfer)


def test_queued_work_is_expected_at_its_stage_and_forgotten_when_it_runs() -> None:
    policy = Told()
    kept = resident(policy)
    kept.queued([token(0, 0, 1)], stages=1)
    kept.queued([token(1, 0, 2)], stages=3)
    assert policy.at == {(0, 0): 1, (1, 0): 3}
    run(kept, [token(0, 0, 1)])
    assert policy.at == {(1, 0): 3}
    kept.forget(1)
    assert policy.at == {}


def test_what_was_passed_over_may_run_next() -> None:
    """An outdated place in the queue would look like the nearest use for ever."""
    policy = Told()
    kept = resident(policy)
    kept.queued([token(0, 0, 1)], stages=1)
    for stage in range(1, 5):
        run(kept, [token(9, 0, 3)])
        assert policy.at == {(0, 0): stage + 1}


def test_what_was_passed_over_and_may_not_run_soon_is_expected_no_longer() -> None:
    policy = Told()
    kept = resident(policy)
    kept.queued([token(0, 0, 1), token(1, 0, 2)], stages=1)
    kept.begin([token(9, 0, 3)], forecast=lambda request: 4 if request else None)
    assert {owner: at for owner, at in policy.at.items() if owner in ((0, 0), (1, 0))} == {(1, 0): 5}


def test_beyond_the_horizon_nothing_is_expected_yet() -> None:
    policy = Told()
    kept = resident(policy, horizon=1)
    kept.queued([token(0, 0, 1)], stages=3)
    seen = []
    for _ in range(4):
        seen.append(policy.at.get((0, 0)))
        run(kept, [token(9, 0, 3)])
    assert seen == [None, None, 3, 4]


def test_persist_expects_the_same_again_until_the_truth_is_known() -> None:
    policy = Told()
    kept = resident(policy, persist=True)
    run(kept, [token(0, 0, 1)])
    assert policy.at == {(0, 1): 2}
    assert policy.next(Key(0, 1)) == 2 * LAYERS
    kept.queued([token(0, 1, 4)])
    assert policy.next(Key(0, 1)) == float("inf")
    assert policy.next(Key(2, 4)) == 2 * LAYERS + 2


def test_the_pre_gate_fetches_ahead_and_only_what_it_knows() -> None:
    assert run(resident(LRU(), lookahead=1), [token(0, 0, 1)]) == []
    assert len(run(resident(LRU(), lookahead=0), [token(0, 0, 1)])) == LAYERS
    assert len(run(resident(LRU(), Null(), lookahead=1), [token(0, 0, 1)])) == LAYERS
    late = WorkItem(0, 0, "decode", 1, LAYOUT.calls([{1: 1}]), Known.GATE)
    assert len(run(resident(LRU(), lookahead=1), [late])) == LAYERS


@given(st.integers(0, 10_000), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_waves_fit_and_leave_nothing_out(seed: int, capacity: int, blocks: bool) -> None:
    rng = random.Random(seed)
    owned = [[sorted(rng.sample(range(5), 2)) for _ in range(4)] for _ in range(2)]
    layout = Layout.blocks(owned, [[1] * 5] * 2) if blocks else Layout.layer_experts([[1] * 4] * 2)
    capacity = max(capacity, 2)
    kept = Residency(layout, capacity, LRU, Null(), lookahead=0)
    for step in range(3):
        calls = layout.calls([dict.fromkeys(rng.sample(range(4), rng.randint(1, 4)), 1) for _ in range(2)])
        moments = kept.begin([WorkItem(0, step, "decode", 1, calls, Known.GATE)])
        for i, moment in enumerate(moments):
            waves = kept.waves(i)
            assert Counter(call for wave in waves for call in wave) == Counter(moment)
            for wave in waves:
                assert len(keys_of(wave)) <= capacity
                kept.demand(wave)
                settle(kept)
                kept.release(wave)
        assert kept.taken <= capacity


@given(st.integers(0, 10_000), st.integers(3, 18))
@settings(max_examples=60, deadline=None)
def test_without_fetching_ahead_it_is_one_cache(seed: int, capacity: int) -> None:
    rng = random.Random(seed)
    kept, plain = resident(LRU(), Null(), capacity, lookahead=0), Cache(capacity, LAYOUT.bytes, LRU())
    now = 0
    for step in range(12):
        item = token(0, step, *rng.sample(range(EXPERTS), rng.randint(1, 3)))
        missed = run(kept, [item])
        expected: list[Key] = []
        for layer in range(LAYERS):
            expected += plain.use(tuple(sorted(item.at(layer))), now).misses
            now += 1
        assert missed == expected
    assert kept.tally == plain.tally


def test_a_cache_a_layer_shares_the_bytes() -> None:
    kept = Residency(LAYOUT, 7, PredictedSet, ExactPreGate(), per_layer=True)
    assert [cache.capacity for cache in kept.pools] == [2, 2, 2]
    run(kept, [token(0, 0, 1, 2)])
    assert all(Key(layer, unit) in kept for layer in range(LAYERS) for unit in (1, 2))
    assert kept.taken == 6


def test_bad_input() -> None:
    with pytest.raises(MoesaicError, match="look-ahead of -1"):
        resident(LRU(), lookahead=-1)
    kept = Residency(Layout.layer_experts([[5]]), 4, LRU, Null())
    kept.begin([WorkItem(0, 0, "decode", 1, (Call(0, 0, 1, (Key(0, 0),)),), Known.GATE)])
    with pytest.raises(MoesaicError, match="at least 5 bytes"):
        kept.demand(kept.waves(0)[0])
