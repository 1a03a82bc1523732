"""The cache and its books against shadow books, and the work items that use it."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_traces import Moment, everyone, future, moment, run, sizes_of, trace
from moesaic.errors import MoesaicError
from moesaic.schedule.cache import Cache, Tally, share_slots
from moesaic.schedule.eviction import (
    FIFO,
    LFU,
    LRU,
    AllResident,
    Belady,
    Oracle,
    PredictedSet,
    Random,
)
from moesaic.schedule.work import ANY, Call, Key, Known, Layout, Request, WorkItem, keys_of, minimum_bytes, moments

# ---- the mechanism


@pytest.mark.parametrize("seed", range(12))
def test_room_for_everything_leaves_cold_misses_only(seed: int) -> None:
    moments = trace(seed)
    sizes = sizes_of(moments, lambda key: 1 + key.unit)
    total = sum(sizes.values())
    for policy in (*everyone(moments, seed, 3), Oracle(future(moments)), AllResident()):
        tally = run(policy, moments, total, sizes).tally
        assert (tally.uses - tally.use_hits, tally.evictions) == (len(sizes), 0)
        assert tally.moved_bytes == total


def test_capacity_below_one_layers_need_says_the_minimum() -> None:
    layout = Layout.blocks([[[0, 1], [1, 2]], [[0], [0, 1]]], [[10, 20, 30], [5, 5]])
    item = WorkItem(0, 0, "prefill", 4, layout.calls([{0: 1, 1: 3}]), Known.REQUEST)
    minimum = minimum_bytes([[item]], layout.bytes)
    assert minimum == 60
    cache = Cache(minimum - 1, layout.bytes, LRU())
    with pytest.raises(MoesaicError, match=r"layer 0 needs 60 bytes .* at least 60 bytes"):
        cache.use(moments([item])[0], 0)
    assert (cache.tally, len(cache), cache.taken) == (Tally(), 0, 0)  # a refusal changes nothing
    cache = Cache(minimum, layout.bytes, LRU())
    for now, calls in enumerate(moments([item])):
        cache.use(calls, now)
    assert cache.tally.moved_bytes == layout.total_bytes


@settings(max_examples=200)
@given(
    kind=st.integers(0, 5),
    capacity=st.integers(1, 14),
    operations=st.lists(
        st.tuples(
            st.sampled_from(["demand", "demand", "release", "prefetch", "start", "arrive", "expect"]),
            st.sets(st.integers(0, 7), max_size=3),
        ),
        min_size=20,
        max_size=120,
    ),
)
def test_budget_and_use_hold_under_any_interleaving(kind: int, capacity: int, operations: list) -> None:
    policy = (LRU, LFU, FIFO, Belady, PredictedSet, lambda: Random(0))[kind]()
    sizes = {Key(ANY, unit): 1 + unit % 4 for unit in range(8)}
    cache = Cache(capacity, sizes, policy)
    running: list[Moment] = []
    flying = []
    moved = 0
    for now, (what, units) in enumerate(operations):
        calls = moment(*sorted(units))
        used = {key for held in running for key in keys_of(held)}
        if what == "demand":
            fits = sum(sizes[key] for key in used | set(keys_of(calls))) <= capacity
            before = (cache.keys, cache.taken, Tally(**vars(cache.tally)))
            try:
                cache.demand(calls, now)
                running.append(calls)
                assert fits
            except MoesaicError:
                assert not fits  # refused only when it cannot be, and without a trace
                assert before == (cache.keys, cache.taken, cache.tally)
        elif what == "release" and running:
            cache.release(running.pop(len(units) % len(running)), now)
        elif what == "prefetch":
            cache.prefetch(keys_of(calls), now)
        elif what == "start" and (transfer := cache.start()):
            flying.append(transfer)
            moved += transfer.bytes
        elif what == "arrive" and flying:
            cache.arrived(flying.pop(len(units) % len(flying)))
        elif what == "expect":
            policy.expect(now % 3, now, keys_of(calls))
        used = {key for held in running for key in keys_of(held)}
        assert used <= set(cache.keys)  # nothing leaves while in use
        assert sum(sizes[key] for key in cache.keys) == cache.taken <= capacity
        assert cache.tally.moved_bytes == moved


def test_demand_moves_before_prefetch_and_stale_transfers_do_not_count() -> None:
    sizes = {Key(ANY, unit): 1 for unit in range(6)}
    cache = Cache(3, sizes, LRU())
    assert cache.prefetch([Key(ANY, 0), Key(ANY, 1), Key(ANY, 2)], 0) == tuple(Key(ANY, unit) for unit in range(3))
    begun = cache.start()
    assert begun is not None and (begun.key.unit, begun.demand) == (0, False)
    found = cache.demand(moment(2, 3), 0)  # 2 is on its way, 3 puts out 0, whose transfer has begun
    assert (found.late, found.misses, found.evicted) == ((Key(ANY, 2),), (Key(ANY, 3),), (Key(ANY, 0),))
    assert cache.tally.wasted_bytes == 1
    order = [cache.start() for _ in range(4)]
    assert [transfer and (transfer.key.unit, transfer.demand) for transfer in order] == [
        (3, True),
        (2, True),
        (1, False),
        None,
    ]
    assert not cache.arrived(begun)
    cache.release(moment(2, 3), 0)
    cache.demand(moment(0), 1)  # again on its way: the old transfer is not this one
    assert not cache.arrived(begun) and not cache.ready(Key(ANY, 0))
    assert cache.tally.late == 1 and cache.tally.use_hits == 0
    with pytest.raises(MoesaicError, match="nothing uses it"):
        cache.release(moment(5), 2)


def test_prefetch_does_not_put_out_what_is_worth_more() -> None:
    sizes = {Key(ANY, unit): 1 + (unit == 4) for unit in range(5)}
    policy = Belady()
    cache = Cache(2, sizes, policy)
    policy.expect("soon", 1, [Key(ANY, 0)])
    policy.expect("later", 2, [Key(ANY, 2)])
    policy.expect("last", 3, [Key(ANY, 4)])
    cache.use(moment(0, 1), 0)
    assert cache.prefetch([Key(ANY, 4)], 0) == ()  # needs both places, and 0 is used before 4
    assert set(cache.keys) == {Key(ANY, 0), Key(ANY, 1)}
    assert cache.prefetch([Key(ANY, 2), Key(ANY, 3)], 0) == (Key(ANY, 2),)
    assert set(cache.keys) == {Key(ANY, 0), Key(ANY, 2)}
    assert cache.prefetch([Key(ANY, unit) for unit in (0, 2, 1, 3)], 0) == ()


def test_prefetched_entries_do_not_put_each_other_out() -> None:
    cache = Cache(2, {Key(ANY, unit): 1 for unit in range(5)}, LRU())
    cache.use(moment(0), 0)
    assert [key.unit for key in cache.prefetch([Key(ANY, unit) for unit in (4, 3, 2, 1)], 0)] == [4, 3]
    assert [key.unit for key in cache.keys] == [4, 3]


def test_the_oracle_fetches_ahead_in_the_order_of_use() -> None:
    cache = Cache(
        2, {Key(ANY, unit): 1 for unit in range(4)}, Oracle([[Key(ANY, unit)] for unit in (0, 3, 3, 0, 1, 2)])
    )
    cache.use(moment(0), 0)
    cache.use(moment(3), 1)
    assert cache.prefetch([Key(ANY, 1)], 1) == ()  # 3 is used next, 0 after it, both before 1
    cache.use(moment(3), 2)
    assert cache.prefetch([Key(ANY, 1)], 2) == (Key(ANY, 1),)  # 3 is used no more


def test_a_cache_that_never_evicts_does_not_grow() -> None:
    policy = Belady()
    cache = Cache(8, {Key(ANY, unit): 1 for unit in range(8)}, policy)
    policy.expect("first", 0, [Key(ANY, 0)])
    for now in range(5000):
        policy.expect("next", now, [Key(ANY, now % 8), Key(ANY, 0)])
        cache.use(moment(now % 8), now)
    assert len(policy._heap) < 200 and sum(map(len, policy.uses._uses.values())) < 1000


# ---- the books


@given(seed=st.integers(0, 10**6), blocks=st.booleans())
def test_hits_by_every_definition_are_those_of_a_slow_count(seed: int, blocks: bool) -> None:
    rng = random.Random(seed)
    if blocks:
        layout = Layout.blocks(
            [[sorted(rng.sample(range(5), rng.randint(1, 3))) for _ in range(4)] for _ in range(2)],
            [[rng.randint(1, 9) for _ in range(5)] for _ in range(2)],
        )
    else:
        layout = Layout.layer_experts([[rng.randint(1, 9) for _ in range(4)] for _ in range(2)])
    steps = []
    for step in range(12):
        items = []
        for request in range(rng.randint(1, 3)):
            tokens = rng.randint(1, 3)
            routes = [Counter(rng.randrange(4) for _ in range(tokens)) for _ in range(2)]
            items.append(WorkItem(request, step, "prefill", tokens, layout.calls(routes), Known.REQUEST))
        steps.append(items)
    cache = Cache(minimum_bytes(steps, layout.bytes), layout.bytes, LRU())
    hit, every = Counter[str](), Counter[str]()
    now = 0
    for items in steps:
        for calls, layer in zip(moments(items), (0, 1), strict=True):
            there = set(cache.keys)
            seen = set()
            for item in items:
                for call in item.calls:
                    if call.layer != layer:
                        continue
                    whole = all(key in there for key in call.keys)
                    every["token"] += call.tokens
                    hit["token"] += call.tokens * whole
                    for thing, ok in ((call.expert, whole), *((key, key in there) for key in call.keys)):
                        if thing not in seen:
                            seen.add(thing)
                            kind = "call" if thing == call.expert and not isinstance(thing, Key) else "use"
                            every[kind] += 1
                            hit[kind] += ok
                            if isinstance(thing, Key):
                                every["byte"] += layout.bytes[thing]
                                hit["byte"] += ok * layout.bytes[thing]
            cache.use(calls, now)
            now += 1
    for by in ("use", "call", "token", "byte"):
        assert cache.tally.hit_ratio(by) == hit[by] / every[by]  # type: ignore[arg-type]
    tally = cache.tally
    assert tally.demand_bytes == tally.bytes - tally.byte_hits
    assert tally.wasted_bytes == 0
    if not blocks:
        assert (tally.uses, tally.use_hits) == (tally.calls, tally.call_hits)


def test_experts_that_share_blocks_share_bytes() -> None:
    shared = Layout.blocks([[[0, 1], [0, 2]]], [[100, 10, 10]])
    whole = Layout.layer_experts([[110, 110]])
    for layout, moved in ((shared, 120), (whole, 220)):
        cache = Cache(220, layout.bytes, LRU())
        for now, expert in enumerate((0, 1, 0, 1)):
            cache.use(layout.calls([{expert: 1}]), now)
        assert cache.tally.moved_bytes == moved


def test_an_entry_for_all_layers_has_the_ratio_of_its_layers() -> None:
    rng = random.Random(0)
    routes = [{rng.randrange(7): 1} for _ in range(200)]
    any_layer, per_layer = Layout.experts([30] * 7), Layout.layer_experts([[10] * 7] * 3)
    ratios = []
    for layout in (any_layer, per_layer):
        cache, now = Cache(90, layout.bytes, LRU()), 0
        for step, route in enumerate(routes):
            for calls in moments([WorkItem(0, step, "decode", 1, layout.calls([route]), Known.STEP)]):
                cache.use(calls, now)
                now += 1
        ratios.append((cache.tally.hit_ratio(), cache.tally.moved_bytes))
    assert ratios[0] == ratios[1]


# ---- work


def test_moments_merge_the_calls_of_a_step_layer_by_layer() -> None:
    layout = Layout.layer_experts([[1, 1, 1]] * 2)
    a = WorkItem(0, 0, "prefill", 3, layout.calls([{2: 1, 0: 2}, {1: 3}]), Known.REQUEST)
    b = WorkItem(1, 4, "decode", 1, layout.calls([{2: 1}, {0: 1}]), Known.STEP)
    assert [[call[:3] for call in calls] for calls in moments([b, a])] == [
        [(0, 0, 2), (0, 2, 2)],
        [(1, 0, 1), (1, 1, 3)],
    ]
    assert a.keys == (Key(0, 2), Key(0, 0), Key(1, 1)) and b.id == (1, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request(7, -1.0, 1, 1), r"request 7 arrives at -1.0 s"),
        (lambda: Request(7, float("nan"), 1, 1), "finite"),
        (lambda: Request(7, 0.0, 0, 1), "0 prompt"),
        (lambda: WorkItem(7, -1, "decode", 1, moment(0), Known.STEP), "step -1 of request 7"),
        (lambda: WorkItem(7, 0, "train", 1, moment(0), Known.STEP), "'train': expected one of prefill, decode"),
        (lambda: WorkItem(7, 0, "decode", 1, (), Known.STEP), "calls no expert"),
        (lambda: WorkItem(7, 0, "decode", 1, moment(0, 0), Known.STEP), "twice"),
        (
            lambda: WorkItem(7, 0, "decode", 1, (Call(0, 3, 2, (Key(0, 3),)),), Known.STEP),
            "2 tokens to expert 3 of layer 0",
        ),
        (lambda: Layout.layer_experts([[1, 0]]), r"Key\(layer=0, unit=1\) has 0 bytes"),
        (lambda: Layout.blocks([[[]]], [[1]]), "expert 0 of layer 0 is stored nowhere"),
        (lambda: Layout.blocks([[[1]]], [[1]]), "has None bytes"),
        (lambda: Layout.layer_experts([[1, 1]]).calls([{2: 1}]), "layer 0 has no expert 2: the layout stores 2"),
        (lambda: Layout.layer_experts([[1]] * 3).calls([{0: 1}] * 2), "routes of 2 layers: expected 3, or 1"),
        (lambda: Cache(0, {}, LRU()), "expected at least 1"),
        (lambda: Cache(9, {}, LRU()).use(moment(3), 0), "has no size"),
        (lambda: share_slots({0: 0.0}, 4), "above zero"),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(MoesaicError, match=message):
        make()


def test_slots_follow_predicted_demand() -> None:
    assert share_slots({0: 4, 1: 1}, 4) == {0: 3, 1: 1}  # the example of 2410.17954
    for total in range(20):
        assert sum(share_slots({0: 1.5, 1: 0.0, 2: 3.7, 3: 3.7}, total).values()) == total
