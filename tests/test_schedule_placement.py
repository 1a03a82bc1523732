"""Placement: affinity against brute force, integer programme and chain; shards, hot copies, adaptive degrees."""

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.errors import MoesaicError
from moesaic.schedule import affinity, placement
from moesaic.schedule.adaptive import AdaptiveTable, Choice, Layer, best_degree, moved, valid_degrees
from moesaic.schedule.affinity import Counts, Devices, balanced, cost, crossing, flow, transitions
from moesaic.schedule.affinity_assign import Solver, _Descent, assign, staged
from moesaic.schedule.affinity_bounds import lower_bound, matching_bound, spectral_bound
from moesaic.schedule.affinity_exact import placements, solve_chain, solve_integer
from moesaic.schedule.placement import Placement, Shard, degrees, parallel, replicate_hot, whole


def routes(tokens: int, layers: int, experts: int, sharpness: float, seed: int) -> Devices:
    """Markov routes with doubly stochastic transitions (even load), (N, L); a small `sharpness` is sharp."""
    rng = np.random.default_rng(seed)
    move = rng.dirichlet(np.full(experts, sharpness), (layers - 1, experts)) + 1e-9
    for _ in range(50):
        move /= move.sum(1, keepdims=True)
        move /= move.sum(2, keepdims=True)
    index = np.zeros((tokens, layers), dtype=np.int64)
    index[:, 0] = rng.integers(experts, size=tokens)
    for j in range(layers - 1):
        chance = move[j].cumsum(1)[index[:, j]]
        index[:, j + 1] = np.minimum((rng.random((tokens, 1)) > chance).sum(1), experts - 1)
    return index


def markov(layers: int, experts: int, sharpness: float, seed: int, tokens: int = 3000) -> Counts:
    return transitions(routes(tokens, layers, experts, sharpness, seed), experts)


@st.composite
def counts(draw: st.DrawFn, most: int = 6) -> tuple[Counts, int]:
    """Small integer counts, ties and zeros included, and the number of devices."""
    devices, share = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 1), (2, 3), (3, 2)]))
    experts, layers = devices * share, draw(st.integers(2, 4))
    values = draw(st.lists(st.integers(0, most), min_size=experts**2, max_size=experts**2 * (layers - 1)))
    grid = np.resize(np.array(values, dtype=float), (layers - 1, experts, experts))
    return grid, devices


# counts and crossing


@given(st.integers(0, 10_000), st.integers(1, 3), st.booleans())
def test_transitions_count_every_pair(seed: int, slots: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    index = rng.integers(-1, 5, (20, 4, slots))
    weight = rng.random(index.shape) if weighted else np.ones(index.shape)
    slow = np.zeros((3, 5, 5))
    for n, j, a, b in product(range(20), range(3), range(slots), range(slots)):
        here, there = index[n, j, a], index[n, j + 1, b]
        if here >= 0 and there >= 0:
            slow[j, here, there] += weight[n, j, a] * weight[n, j + 1, b]
    assert np.allclose(transitions(index, 5, weight if weighted else None), slow)
    if slots == 1:
        assert np.allclose(transitions(index[..., 0], 5, weight[..., 0]), slow)


def test_bad_routes_and_counts_are_named() -> None:
    with pytest.raises(MoesaicError, match="experts 0 to 7, but there are 0 to 3"):
        transitions(np.array([[0, 7]]), 4)
    with pytest.raises(MoesaicError, match="integers of shape"):
        transitions(np.array([0.5, 1.0]), 4)
    for bad, devices, message in (
        (np.zeros((2, 3)), 1, "shape"),
        (np.zeros((0, 3, 3)), 1, "at least two layers"),
        (-np.ones((1, 2, 2)), 1, "at least 0"),
        (np.ones((1, 6, 6)), 4, "6 experts a layer do not divide over 4 devices"),
    ):
        for solver in (assign, solve_chain, solve_integer, lower_bound):
            with pytest.raises(MoesaicError, match=message):
                solver(bad, devices)


@given(st.integers(0, 10_000))
def test_crossing_and_flow_follow_the_tokens(seed: int) -> None:
    rng = np.random.default_rng(seed)
    index, device_LE = rng.integers(6, size=(50, 3)), rng.integers(4, size=(3, 6))
    pairs = Counter(
        (int(device_LE[j, index[n, j]]), int(device_LE[j + 1, index[n, j + 1]])) for n in range(50) for j in range(2)
    )
    table = transitions(index, 6)
    moving = {pair: count for pair, count in pairs.items() if pair[0] != pair[1]}
    assert cost(table, device_LE) == sum(moving.values())
    assert crossing(table, device_LE) == pytest.approx(sum(moving.values()) / 100)
    got = flow(table, device_LE, devices=4, per_node=2)
    inter = sum(count for (a, b), count in moving.items() if a // 2 != b // 2)
    assert got.inter == pytest.approx(inter / 100) and got.intra == pytest.approx(
        sum(moving.values()) / 100 - inter / 100
    )
    assert got.stay == pytest.approx(1 - sum(moving.values()) / 100)
    assert got.busiest == pytest.approx(max(moving.values(), default=0) / 100)
    assert crossing(np.zeros((2, 6, 6)), device_LE) == 0.0


# the exact solvers


def layer_places(experts: int, devices: int) -> list[tuple[int, ...]]:
    return sorted(set(permutations(np.repeat(range(devices), experts // devices).tolist())))


def brute_force(table: Counts, devices: int) -> float:
    choices = layer_places(table.shape[1], devices)
    return min(cost(table, np.array(rows)) for rows in product(choices, repeat=len(table) + 1))


@given(counts())
@settings(max_examples=25)
def test_chain_is_the_brute_force_optimum(case: tuple[Counts, int]) -> None:
    table, devices = case
    table = table[:2] if placements(table.shape[1], devices) <= 20 else table[:1]
    solved = solve_chain(table, devices)
    assert placements(table.shape[1], devices) == len(layer_places(table.shape[1], devices))
    assert balanced(solved.device_LE, devices) and solved.proven
    assert solved.cost == cost(table, solved.device_LE)
    if placements(table.shape[1], devices) ** (len(table) + 1) <= 9000:
        assert solved.cost == pytest.approx(brute_force(table, devices))


@pytest.mark.parametrize(
    ("layers", "experts", "devices", "sharpness"),
    [(3, 6, 3, 0.3), (3, 6, 2, 1.0), (4, 6, 2, 0.1), (3, 8, 2, 0.1), (5, 4, 2, 1.0)],
)
def test_integer_programme_and_chain_agree(layers: int, experts: int, devices: int, sharpness: float) -> None:
    table = markov(layers, experts, sharpness, seed=1)
    solved = solve_integer(table, devices)
    assert solved.proven and balanced(solved.device_LE, devices)
    assert solved.cost == cost(table, solved.device_LE)
    assert solved.cost == pytest.approx(solve_chain(table, devices).cost)


def test_too_large_for_a_proof_says_what_to_do() -> None:
    with pytest.raises(MoesaicError, match="use solve_integer with a time limit, or affinity_bounds"):
        solve_chain(np.ones((1, 16, 16)), 4)
    with pytest.raises(MoesaicError, match="raise time_limit"):
        solve_integer(markov(6, 16, 0.1, 0), 4, time_limit=0.0)


# the fast solver

CASES = [
    (layers, experts, devices, sharpness, seed)
    for layers, experts, devices in [(3, 6, 3), (4, 8, 4), (12, 8, 4), (6, 8, 2), (5, 9, 3), (8, 10, 5)]
    for sharpness, seed in [(0.1, 0), (0.1, 1), (1.0, 2)]
    if placements(experts, devices) <= 10_000
]


@pytest.mark.parametrize(("layers", "experts", "devices", "sharpness", "seed"), CASES)
def test_assignment_equals_the_proven_optimum(
    layers: int, experts: int, devices: int, sharpness: float, seed: int
) -> None:
    table = markov(layers, experts, sharpness, seed)
    found = assign(table, devices, exact=False)
    assert balanced(found, devices)
    assert cost(table, found) == cost(table, assign(table, devices)) == pytest.approx(solve_chain(table, devices).cost)


def test_assignment_is_near_the_optimum_where_only_parts_can_be_regrouped() -> None:
    table = markov(4, 14, 0.1, 0)  # 3,432 placements a layer: too many for one move
    found = assign(table, 2)
    assert balanced(found, 2)
    assert cost(table, found) <= 1.01 * solve_chain(table, 2).cost


def test_joining_takes_the_good_layers_of_each_whatever_the_names() -> None:
    table, rng = markov(9, 8, 0.1, 4), np.random.default_rng(0)
    best = solve_chain(table, 4)
    pool = [np.array(names)[best.device_LE] for names in ([0, 1, 2, 3], [1, 2, 3, 0], [2, 0, 3, 1])]
    for which, good in enumerate([slice(0, 4), slice(3, 7), slice(6, 9)]):
        spoilt = np.ones(9, dtype=bool)
        spoilt[good] = False
        pool[which][spoilt] = rng.permuted(pool[which][spoilt], axis=1)
    assert min(cost(table, places) for places in pool) > best.cost
    assert cost(table, _Descent(table, 4).join(pool)) == pytest.approx(best.cost)


@given(counts(most=3))
@settings(max_examples=40)
def test_assignment_equals_the_optimum_on_ties_and_zeros(case: tuple[Counts, int]) -> None:
    table, devices = case
    found = assign(table, devices, restarts=10, kicks=10, exact=False)
    assert balanced(found, devices)
    assert cost(table, found) == pytest.approx(solve_chain(table, devices).cost)


@given(counts())
def test_bounds_are_below_the_optimum(case: tuple[Counts, int]) -> None:
    table, devices = case
    best = solve_chain(table, devices).cost
    assert matching_bound(table, devices) <= best + 1e-6
    assert spectral_bound(table, devices, rounds=15) <= best + 1e-6
    assert 0 <= lower_bound(table, devices, rounds=15) <= best + 1e-6


def test_bounds_say_something() -> None:
    table = markov(6, 8, 1.0, 0)
    best = solve_chain(table, 2).cost
    assert spectral_bound(table, 2) > 0.9 * best and matching_bound(table, 2) > 0.5 * best
    assert spectral_bound(table, 2, rounds=60) > spectral_bound(table, 2, rounds=1)
    assert spectral_bound(table, 1) == 0.0


@pytest.mark.parametrize(("layers", "experts", "devices"), [(6, 16, 4), (4, 24, 6)])
def test_crossing_free_routes_are_found_however_they_are_named(layers: int, experts: int, devices: int) -> None:
    rng = np.random.default_rng(0)
    hidden = np.stack([rng.permutation(experts) for _ in range(layers)])  # expert e of layer 0 is followed by hidden
    index = hidden[:, rng.integers(experts, size=2000)].T
    assert crossing(transitions(index, experts), assign(transitions(index, experts), devices)) == 0.0


def test_routes_shared_by_all_layers_need_no_crossing() -> None:
    chosen = np.random.default_rng(0).integers(8, size=(500, 1))
    table = transitions(np.repeat(chosen, 6, axis=1), 8)
    assert crossing(table, assign(table, 4, restarts=0)) == crossing(table, affinity.contiguous(6, 8, 4)) == 0.0


def test_sharp_routes_cross_less_on_other_tokens() -> None:
    index = routes(12_000, 6, 8, 0.1, seed=0)
    fit, held_out = transitions(index[:5000], 8), transitions(index[5000:], 8)
    usual = crossing(held_out, affinity.contiguous(6, 8, 4))
    assert 0.65 < usual < 0.80 and crossing(held_out, assign(fit, 4)) < 0.45


def test_the_same_seed_gives_the_same_places() -> None:
    table = markov(5, 16, 0.3, 3)
    assert np.array_equal(assign(table, 4, kicks=5, seed=1), assign(table, 4, kicks=5, seed=1))
    worse = cost(table, assign(table, 4, restarts=0, kicks=0))
    assert cost(table, assign(table, 4)) <= worse <= cost(table, affinity.contiguous(5, 16, 4))


@pytest.mark.parametrize("solver", [assign, lambda table, devices: solve_chain(table, devices).device_LE])
def test_staged_serves_the_slow_link_first(solver: Solver) -> None:
    table = markov(4, 8, 0.1, 2)
    places = staged(table, 2, 2, solver)
    assert balanced(places, 4) and balanced(places // 2, 2)
    got = flow(table, places, 4, 2)
    assert got.inter * table.sum() == pytest.approx(solve_chain(table, 2).cost)  # stage one is optimal
    direct = flow(table, solve_chain(table, 4).device_LE, 4, 2)
    assert got.inter <= direct.inter + 1e-9 and got.stay <= direct.stay + 1e-9


# shards


@given(st.integers(1, 3), st.integers(1, 13), st.integers(1, 6))
def test_simple_placements_are_even(layers: int, experts: int, devices: int) -> None:
    for make in (placement.contiguous, placement.round_robin):
        made = make(layers, experts, devices)
        held_LP = made.held_LP()
        assert (held_LP.sum(1) == experts).all() and held_LP.max() - held_LP.min() <= 1
    assert (placement.round_robin(1, experts, devices).device_LE()[0] == np.arange(experts) % devices).all()
    assert (np.diff(placement.contiguous(1, experts, devices).device_LE()[0]) >= 0).all()
    if experts % devices == 0:
        rows = placement.contiguous(layers, experts, devices).device_LE()
        assert np.array_equal(rows, affinity.contiguous(layers, experts, devices))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_parallel_degrees_share_memory_and_work(expert: int, share: int, tensor: int, data: int) -> None:
    experts = expert * share
    made = parallel(2, experts, expert, tensor, data)
    assert made.devices == expert * tensor * data
    assert np.allclose(made.held_LP(), share / tensor)
    tokens = np.arange(2 * experts, dtype=float).reshape(2, experts)
    load = made.load_LP(tokens)
    assert np.allclose(load.sum(1), tokens.sum(1))
    slow = tokens.reshape(2, expert, share).sum(2) / (tensor * data)
    assert np.allclose(load, np.tile(np.repeat(slow, tensor, axis=1), data))
    for shards in made.shards.values():  # a copy's parts are neighbours: one node
        for copy in range(data):
            where = [shard.device for shard in shards if shard.copy == copy]
            assert where == list(range(where[0], where[0] + tensor)) and where[0] % tensor == 0


def test_deepspeed_degrees() -> None:
    assert [degrees(128, experts) for experts in (32, 64, 128, 256)] == [
        (32, 4, 1),
        (64, 2, 1),
        (128, 1, 1),
        (128, 1, 1),
    ]
    with pytest.raises(MoesaicError, match="one must divide the other"):
        degrees(6, 4)


def test_broken_placements_are_named() -> None:
    with pytest.raises(MoesaicError, match="missing or unknown"):
        Placement(1, 2, 1, {(0, 0): (Shard(0),)})
    with pytest.raises(MoesaicError, match="expert 0 of layer 0 is on device 3"):
        whole([[3]], 2)
    with pytest.raises(MoesaicError, match="each of parts 0 to 1 once"):
        Placement(1, 1, 2, {(0, 0): (Shard(0, 0),)}, parts=2)
    with pytest.raises(MoesaicError, match="copies numbered from 0"):
        Placement(1, 1, 2, {(0, 0): ()})
    with pytest.raises(MoesaicError, match="holds the same part twice"):
        Placement(1, 1, 2, {(0, 0): (Shard(0), Shard(0, copy=1))})
    with pytest.raises(MoesaicError, match="crossing is not defined"):
        parallel(1, 2, 2, 2).device_LE()
    with pytest.raises(MoesaicError, match="first must divide"):
        parallel(1, 3, 2)
    with pytest.raises(MoesaicError, match=r"tokens of shape \(1, 2\)"):
        placement.contiguous(1, 2, 2).load_LP([1.0])
    with pytest.raises(MoesaicError, match="whole experts"):
        replicate_hot(parallel(1, 2, 2, 2), [[1.0, 1.0]], 1)


@given(st.lists(st.integers(0, 30), min_size=6, max_size=6), st.integers(1, 4), st.integers(0, 8))
def test_hot_copies_follow_the_greedy_rule(tokens: list[int], devices: int, extra: int) -> None:
    start = placement.contiguous(1, 6, devices)
    made = replicate_hot(start, [tokens], extra)
    where = [[shard.device for shard in start.shards[0, e]] for e in range(6)]

    def load(device: int) -> float:
        return sum(tokens[e] / len(where[e]) for e in range(6) if device in where[e])

    got = [[shard.device for shard in made.shards[0, e]] for e in range(6)]
    for _ in range(extra):  # the slow twin: look at every expert and device each time
        can = [e for e in range(6) if len(where[e]) < devices and tokens[e]]
        if not can:
            break
        hot = max(can, key=lambda e: (tokens[e] / len(where[e]), -e))
        idle = min(load(d) for d in range(devices) if d not in where[hot])
        chosen = got[hot][len(where[hot])]
        assert load(chosen) <= idle + 1e-9  # ties may fall either way in floats
        where[hot].append(chosen)
    assert got == where
    assert np.isclose(made.load_LP([tokens]).sum(), sum(tokens))
    assert all(len(set(each)) == len(each) for each in got)


def test_one_hot_expert_is_spread() -> None:
    made = replicate_hot(placement.contiguous(1, 4, 4), [[100.0, 1.0, 2.0, 3.0]], 2)
    assert [shard.device for shard in made.shards[0, 0]] == [0, 1, 2]
    assert made.load_LP([[100.0, 1.0, 2.0, 3.0]]).max() == pytest.approx(100 / 3 + 2)


# adaptive degree


def test_tutel_degrees_by_capacity_factor() -> None:
    factors = (1, 2, 4, 8, 16)
    large, small = (Layer(devices=64, experts=16, tokens=tokens, d=2048, ffn=32768) for tokens in (4096, 1024))
    assert [best_degree(large, f) for f in factors] == [4, 2, 1, 1, 1]
    assert [best_degree(small, f) for f in factors] == [4, 4, 4, 2, 1]
    tiny = Layer(devices=8, experts=4, tokens=10_000, d=16, ffn=16)
    assert best_degree(tiny, 4) == 0  # little to gather, much to send
    assert valid_degrees(12) == [0, 1, 2, 3, 4, 6, 12] and Layer(4, 16, 1, 1, 1).owners == 1
    with pytest.raises(MoesaicError, match="r = 3 is not among"):
        moved(large, 1.0, 3)
    with pytest.raises(MoesaicError, match="at least 1"):
        Layer(0, 1, 1, 1, 1)


def test_the_table_measures_each_bucket_once() -> None:
    calls: list[tuple[int, Choice]] = []

    def measure(capacity: int, choice: Choice) -> float:
        calls.append((capacity, choice))
        return abs(choice.r - (4 if capacity < 256 else 1)) + 1 / choice.chunks + (choice.kind == "2dh")

    table = AdaptiveTable(4, measure)
    assert table.lookup(130) == Choice(4, 8, "flat") == table.lookup(255)
    assert len(calls) == 4 * 4 * 2 and {capacity for capacity, _ in calls} == {130}
    assert table.lookup(256) == Choice(1, 8, "flat") and set(table.known) == {1, 2}
    with pytest.raises(MoesaicError, match="at least 0"):
        table.lookup(-1)
