"""Topologies, costs, collectives and the two-unit split, against enumerations and step-by-step simulations."""

import math
import os
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import MoesaicError
from moesaic.schedule.collective import (
    Step,
    all_to_all,
    allgather,
    allreduce,
    cheapest,
    coordinated,
    flat,
    hierarchical,
    hops,
    step_moves,
    step_traffic,
    two_dh,
)
from moesaic.schedule.cost import (
    ExpertShape,
    OpTimes,
    best_chunks,
    expert_table,
    expert_time,
    fit_roofline,
    layer_time,
    move_time,
    never_stalls,
    op_time,
    overlapped,
    read_op_times,
    stall_time,
)
from moesaic.schedule.split import coprocess, sections
from moesaic.schedule.topology import PRESETS, Link, Tier, Topology, Unit, preset

positive = st.floats(1e-3, 1e3)


# topology


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan])
def test_a_link_without_bandwidth_is_an_error(bandwidth: float) -> None:
    with pytest.raises(MoesaicError, match="link host->hbm: bandwidth"):
        Link("host", "hbm", bandwidth)


def test_broken_machines_are_errors() -> None:
    tier, unit = Tier("hbm", 1e9, 1e9), Unit("gpu", 1e12, 1e9, "hbm")
    with pytest.raises(MoesaicError, match=r"'hmb' is unknown .did you mean 'hbm'"):
        Topology("x", [tier], [Unit("gpu", 1e12, 1e9, "hmb")])
    with pytest.raises(MoesaicError, match="tier 'ddr' is unknown"):
        Topology("x", [tier], [unit], [Link("ddr", "hbm", 1e9)])
    with pytest.raises(MoesaicError, match="need an `intra` link"):
        Topology("x", [tier], [unit], devices=2, per_node=2)
    with pytest.raises(MoesaicError, match="need an `inter` link"):
        Topology("x", [tier], [unit], devices=2, per_node=1)
    with pytest.raises(MoesaicError, match="do not fill nodes"):
        Topology("x", [tier], [unit], devices=3, per_node=2)
    with pytest.raises(MoesaicError, match="same name"):
        Topology("x", [tier, tier], [unit])
    with pytest.raises(MoesaicError, match="capacity"):
        Tier("hbm", 0, 1e9)
    with pytest.raises(MoesaicError, match="did you mean 'h200'"):
        preset("h20")
    with pytest.raises(MoesaicError, match="no link hbm->disk; it has"):
        preset("a100-pcie").link("hbm", "disk")


def test_presets_are_whole() -> None:
    wanted = {"cpu-box", "a100-pcie", "h100-pcie", "h200", "2x8-a100-ib", "sn40l-node", "h100+logic-pim"}
    assert wanted <= set(PRESETS)
    assert all(machine.source and machine.links for machine in PRESETS.values())
    pair = preset("2x8-a100-ib")
    assert (pair.nodes, pair.node_of(7), pair.node_of(8)) == (2, 0, 1)
    with pytest.raises(MoesaicError, match="devices 0 to 15"):
        pair.node_of(16)
    pim, xpu = preset("h100+logic-pim").unit("pim"), preset("h100+logic-pim").unit("xpu")
    assert pim.ridge == pytest.approx(8) and xpu.ridge == pytest.approx(295, rel=0.01)


def test_switching_a_7b_model_takes_what_the_paper_says() -> None:
    size = 13.48e9
    times = [move_time(preset(name).links[0], size) for name in ("sn40l-node", "dgx-h100", "dgx-a100")]
    assert [round(t * 1e3, 1) for t in times] == [13.5, 210.6, 421.2]  # 2405.07518: 15.6 and 31 times slower


# cost


def test_an_expert_is_bound_by_memory_then_by_compute() -> None:
    unit, shape = Unit("u", 100.0, 1.0, "t"), ExpertShape(64, 64, weight=2.0, activation=1e-9)
    assert expert_time(unit, shape, 0) == 0.0
    assert expert_time(unit, shape, 1) == pytest.approx(shape.bytes)  # flop per byte = tokens, the ridge is 100
    assert expert_time(unit, shape, 99) == pytest.approx(shape.bytes, rel=1e-6)
    assert expert_time(unit, shape, 200) == pytest.approx(2 * shape.bytes)
    assert op_time(unit, 300.0, 2.0) == 3.0
    with pytest.raises(MoesaicError, match="-1 tokens"):
        expert_time(unit, shape, -1)
    with pytest.raises(MoesaicError, match="above 0"):
        ExpertShape(0, 4)


def pipeline(comm: float, compute: float, chunks: int) -> float:
    """Each chunk is sent, then computed; one channel, one processor."""
    sent = done = 0.0
    for _ in range(chunks):
        sent += comm / chunks
        done = max(done, sent) + compute / chunks
    return done


@given(positive, positive, st.integers(1, 9))
def test_overlap_equals_the_pipeline(comm: float, compute: float, chunks: int) -> None:
    assert overlapped(comm, compute, chunks) == pytest.approx(pipeline(comm, compute, chunks))
    assert layer_time(1.0, [0.0, compute], comm, 2.0, chunks) == pytest.approx(3 + pipeline(comm, compute, chunks))


@given(positive, positive, st.floats(0, 100))
def test_the_best_overlap_degree(comm: float, compute: float, overhead: float) -> None:
    degree, seconds = best_chunks(comm, compute, overhead)
    assert degree in (1, 2, 4, 8)
    assert seconds == min(pipeline(comm, compute, d) + (d - 1) * overhead for d in (1, 2, 4, 8)) or math.isclose(
        seconds, min(pipeline(comm, compute, d) + (d - 1) * overhead for d in (1, 2, 4, 8))
    )
    assert best_chunks(comm, compute, 1e9)[0] == 1
    with pytest.raises(MoesaicError, match="at least 1 chunk"):
        overlapped(comm, compute, 0)


def stalls(misses: int, fetch: float, layer: float, lookahead: int, layers: int = 400) -> float:
    """Fetches of layer i are issued when layer i - lookahead starts; one link serves them in turn."""
    free, clock, waited = 0.0, 0.0, 0.0
    starts: list[float] = []
    ready = [0.0] * layers
    for i in range(layers):
        starts.append(clock)
        issue = [i + lookahead] if i else list(range(lookahead + 1))
        for target in issue:
            if target < layers:
                free = max(free, clock) + misses * fetch
                ready[target] = free if misses else clock
        wait = stall_time(clock, [ready[i]])
        waited += wait if i >= layers // 2 else 0.0  # the first layers have had no lead
        clock += wait + layer
    return waited


@given(st.integers(0, 4), st.integers(1, 40), st.integers(1, 40), st.integers(0, 4))
def test_the_no_stall_condition_against_a_queue(misses: int, fetch: int, layer: int, lookahead: int) -> None:
    link = Link("a", "b", 1.0, latency=0.5)
    never = never_stalls(misses, fetch - 0.5, link, layer, lookahead)
    assert never == (stalls(misses, float(fetch), float(layer), lookahead) == 0.0)


def test_stall_waits_for_the_last() -> None:
    assert stall_time(5.0, []) == 0.0 and stall_time(5.0, [1.0, 4.0]) == 0.0 and stall_time(5.0, [1.0, 7.5]) == 2.5


@given(st.floats(1e9, 1e15), st.floats(1e8, 1e13), st.integers(0, 1000))
def test_the_roofline_fit_finds_what_made_the_times(flops: float, bandwidth: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    work = 10 ** rng.uniform(6, 12, 60)
    size = work / (flops / bandwidth * 10 ** rng.uniform(-2, 2, 60))
    exact = np.maximum(work / flops, size / bandwidth)
    fit = fit_roofline(work, size, exact)
    assert (fit.flops, fit.bandwidth) == (pytest.approx(flops), pytest.approx(bandwidth)) and fit.error < 1e-9
    noisy = fit_roofline(work, size, exact * rng.lognormal(0, 0.05, 60))
    assert noisy.flops == pytest.approx(flops, rel=0.1) and noisy.bandwidth == pytest.approx(bandwidth, rel=0.1)
    assert 0.01 < noisy.error < 0.1
    assert noisy.unit("u", "t").flops == noisy.flops


def test_a_side_that_was_not_measured_gets_a_bound() -> None:
    fit = fit_roofline([1.0, 2.0, 4.0], [100.0, 100.0, 100.0], [1.0, 1.0, 1.0])  # always 100 bytes/s
    assert fit.bandwidth == pytest.approx(100) and fit.flops == pytest.approx(4) and fit.error < 1e-9
    with pytest.raises(MoesaicError, match="as many"):
        fit_roofline([1.0], [1.0, 2.0], [1.0])
    with pytest.raises(MoesaicError, match="positive"):
        fit_roofline([1.0], [1.0], [0.0])


@given(st.dictionaries(st.integers(1, 500), st.floats(0, 10), min_size=1, max_size=12))
def test_measured_times_never_fall(times: dict[int, float]) -> None:
    tokens = sorted(times)
    table = OpTimes(tokens, {"op": [times[n] for n in tokens]})
    curve = table.table(["op"], 600)
    assert curve[0] == 0.0 and (np.diff(curve[1:]) >= -1e-9).all()
    assert min(times.values()) - 1e-9 <= curve[tokens[0]] and curve[tokens[-1]] <= max(times.values()) + 1e-9
    rising = sorted(times.values())
    exact = OpTimes(tokens, {"op": rising})
    inside = np.arange(tokens[0], tokens[-1] + 1)
    assert np.allclose([exact.time("op", int(n)) for n in inside], np.interp(inside, tokens, rising))


def test_measured_times_outside_the_measured_range() -> None:
    table = OpTimes([2, 4, 8, 16], {"a": [1.0, 1.0, 2.0, 4.0], "b": [1.0, 1.0, 1.0, 1.0]})
    assert table.time("a", 1) == 1.0 and table.time("a", 32) == pytest.approx(8.0) and table.time("a", -3) == 0.0
    assert table.total(["a", "b"], 6) == pytest.approx(2.5)
    with pytest.raises(MoesaicError, match="'c' was not measured; there are a, b"):
        table.time("c", 1)
    with pytest.raises(MoesaicError, match="rising token counts"):
        OpTimes([2, 2], {"a": [1.0, 1.0]})
    with pytest.raises(MoesaicError, match="needs 2 times"):
        OpTimes([1, 2], {"a": [1.0]})


HEAD = "gpu,num_tokens,tensor_parallel,mlp,attn\n"


def test_operator_times_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "times.csv"
    file.write_text(HEAD + "a100,8,1,4,1\na100,1,1,1,1\na100,1,1,3,1\na100,1,1,2,1\nh100,1,1,9,9\na100,1,2,7,7\n")
    table = read_op_times(file, "a100")
    assert table.tokens == (1, 8) and set(table.ops) == {"mlp", "attn"}
    assert table.time("mlp", 1) == pytest.approx(2e-3) and table.time("mlp", 8) == pytest.approx(4e-3)
    assert read_op_times(file, "a100", 2).time("mlp", 1) == pytest.approx(7e-3)
    with pytest.raises(MoesaicError, match=r"no times of b200 .*a100 x1, a100 x2, h100 x1"):
        read_op_times(file, "b200")
    with pytest.raises(MoesaicError, match="no file"):
        read_op_times(tmp_path / "absent.csv", "a100")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu,num_tokens,mlp\n", "lacks the column of tensor_parallel"),
        ("gpu,num_tokens,tensor_parallel\n", "lacks the column of an operator"),
        (HEAD + "a100,1,1,1,1\na100,2,1,fast,1\n", "line 3: mlp is 'fast'"),
        (HEAD + "a100,1,1,1\n", "line 2: attn is None"),
        (HEAD + "a100,1,1,-1,1\n", "line 2: mlp is '-1'"),
        (HEAD + "a100,1,1,nan,1\n", "line 2: mlp is 'nan'"),
    ],
)
def test_a_broken_file_of_times_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "times.csv"
    file.write_text(text)
    with pytest.raises(MoesaicError, match=message):
        read_op_times(file, "a100")


@pytest.mark.skipif("MOESAIC_OP_TIMES" not in os.environ, reason="MOESAIC_OP_TIMES names no profile of operator times")
def test_a_real_profile_fits_a_roofline_of_the_card() -> None:
    table = read_op_times(os.environ["MOESAIC_OP_TIMES"], "a100")
    tokens = np.array([n for n in table.tokens if n <= 4096])
    d, width = 4096, 2 * 11008  # Llama-2-7B's gate and up together
    flops, size = 2.0 * tokens * d * width, 2.0 * (tokens * d + d * width + tokens * width)
    fit = fit_roofline(flops, size, [table.time("mlp_up_proj", int(n)) for n in tokens])
    assert 0.4 < fit.flops / 312e12 < 1 and 0.4 < fit.bandwidth / 2.039e12 < 1 and fit.error < 0.25


# collectives: each variant against its messages, one by one


def machine(nodes: int, per_node: int, latency: tuple[float, float] = (1.0, 7.0)) -> Topology:
    intra, inter = Link("d", "d", 10.0, latency[0]), Link("n", "n", 2.0, latency[1])
    tier, unit = Tier("hbm", 1e9, 100.0), Unit("gpu", 1e3, 100.0, "hbm")
    return Topology("m", [tier], [unit], (), nodes * per_node, per_node, intra, inter)


Message = tuple[int, int, float]  # from, to, bytes


def listed(kind: str, nodes: int, m: int, size: float, tensor: int = 1) -> list[Message]:
    """Messages of all devices; every block of data is followed to where it belongs."""
    p = nodes * m
    devices = range(p)
    if kind == "flat" or (kind == "2dh" and 1 in (nodes, m)):
        return [(a, b, size / p) for a, b in product(devices, devices) if a != b]
    if kind in ("hierarchical", "2dh"):
        messages: Counter[tuple[int, int]] = Counter()
        for a, b in product(devices, devices):  # block a -> b: inside the node to b's local rank, then across
            via = a // m * m + b % m
            for step in ((a, via), (via, b)):
                if step[0] != step[1]:
                    messages[step] += 1
        return [(a, b, count * size / p) for (a, b), count in messages.items()]
    same = [(a, b, size / p) for a, b in product(devices, devices) if a != b and a % tensor == b % tensor]
    ranks = [(a, a // tensor * tensor + r, size / tensor) for a in devices for r in range(tensor)]
    return same + [each for each in ranks if each[0] != each[1]]


@given(
    st.sampled_from(["flat", "hierarchical", "2dh", "coordinated"]),
    st.integers(1, 5),
    st.sampled_from([1, 2, 4, 6]),
    st.sampled_from([1, 2]),
    st.floats(1, 1e4),
)
def test_all_to_all_sends_the_listed_messages(kind: str, nodes: int, m: int, tensor: int, size: float) -> None:
    tensor = tensor if m % tensor == 0 else 1
    traffic = all_to_all(kind, machine(nodes, m), size, tensor)  # type: ignore[arg-type]
    sent = [each for each in listed(kind, nodes, m, size, tensor) if each[0] == 0]
    intra = [each for each in sent if each[1] // m == 0]
    inter = [each for each in sent if each[1] // m != 0]
    assert (traffic.intra_messages, traffic.inter_messages) == (len(intra), len(inter))
    intra_bytes, inter_bytes = sum(x[2] for x in intra), sum(x[2] for x in inter)
    assert traffic.intra_bytes == pytest.approx(intra_bytes) and traffic.inter_bytes == pytest.approx(inter_bytes)
    seconds = len(intra) + intra_bytes / 10 + 7 * len(inter) + inter_bytes / 2 + 2 * traffic.copied / 100
    assert traffic.seconds == pytest.approx(seconds)
    copies = kind == "hierarchical" or (kind == "2dh" and 1 not in (nodes, m))
    assert traffic.copied == (2 * size if copies else 0.0)


def test_deepspeed_counts_128_24_16_hops() -> None:
    assert [hops("flat", 128, 8), hops("hierarchical", 128, 8), hops("coordinated", 128, 8, 8)] == [128, 24, 16]
    assert hops("2dh", 128, 8) == 24 and hops("2dh", 8, 8) == hops("2dh", 8, 1) == 8
    real = machine(16, 8)
    assert [flat(real, 1.0).messages, hierarchical(real, 1.0).messages] == [127, 22]  # without the one to itself
    assert coordinated(real, 1.0, 8).messages == 15 + 7  # and AllGather over 8
    with pytest.raises(MoesaicError, match="3 tensor ranks"):
        hops("coordinated", 16, 8, 3)
    with pytest.raises(MoesaicError, match="'ring' is unknown"):
        hops("ring", 16, 8)  # type: ignore[arg-type]
    with pytest.raises(MoesaicError, match="'ring' is unknown"):
        all_to_all("ring", real, 1.0)  # type: ignore[arg-type]
    with pytest.raises(MoesaicError, match="do not fill"):
        hops("flat", 9, 8)


def test_hierarchy_pays_for_small_messages_only() -> None:
    many = preset("2x8-a100-ib").spread(256, 8)
    assert two_dh(many, 1e5).seconds < flat(many, 1e5).seconds
    assert two_dh(many, 1e10).seconds > flat(many, 1e10).seconds
    assert cheapest(many, 1e5)[0] == "2dh" and cheapest(many, 1e10)[0] == "flat"
    assert cheapest(many, 1e5, tensor=8)[0] == "coordinated"
    assert cheapest(preset("h200"), 1e5)[1].messages == 0  # one device talks to nobody


@given(st.integers(1, 9), st.floats(1, 1e3))
def test_allgather_is_a_ring(p: int, size: float) -> None:
    has = [{device} for device in range(p)]
    steps, sent = 0, 0.0
    while any(len(each) < p for each in has):
        has = [has[d] | {(d - 1 - steps) % p} for d in range(p)]  # the neighbour passes on what came last
        steps, sent = steps + 1, sent + size / p
    for traffic, factor in ((allgather(machine(1, p), size), 1), (allreduce(machine(1, p), size), 2)):
        assert traffic.intra_messages == factor * steps and traffic.intra_bytes == pytest.approx(factor * sent)
        assert traffic.seconds == pytest.approx(factor * (steps + sent / 10))
    assert allgather(machine(p, 1), size).inter_messages == steps


def test_context_coherence_halves_the_all_to_alls() -> None:
    pair = machine(2, 4)
    step = Step(layers=24, tokens=64, width=100.0, leave=0.6, inter_leave=0.2)
    twice, once = (step_traffic(step, pair, coherent=each) for each in (False, True))
    gather = allgather(pair, 64 * 100.0 * 8)
    assert once.seconds - gather.seconds == pytest.approx(twice.seconds / 2)
    assert twice.intra_bytes == pytest.approx(2 * 24 * 64 * 100 * 0.4)
    assert twice.inter_bytes == pytest.approx(2 * 24 * 64 * 100 * 0.2)
    assert step_moves(step, 8, coherent=False) == pytest.approx(2 * 64 * 8 * 24 * 0.6)
    assert step_moves(step, 8, coherent=True) == pytest.approx(64 * 8 * (24 * 0.6 + 7))
    with pytest.raises(MoesaicError, match="shares that leave"):
        Step(1, 1, 1.0, 0.1, 0.2)


# split


def tables(first: list[float], second: list[float]) -> tuple[list[float], list[float]]:
    return [0.0, *np.cumsum(first)], [0.0, *np.cumsum(second)]


@given(
    st.lists(st.integers(0, 6), max_size=7),
    st.lists(st.floats(0, 5), min_size=6, max_size=6),
    st.lists(st.floats(0, 5), min_size=6, max_size=6),
    st.floats(0, 3),
)
def test_the_split_is_the_best_prefix(tokens: list[int], one: list[float], two: list[float], join: float) -> None:
    first, second = tables(one, two)
    split = coprocess(tokens, first, second, join=join)
    busy = sorted((e for e, n in enumerate(tokens) if n), key=lambda e: (-tokens[e], e))
    assert [*split.first, *split.second] == busy

    def makespan(on_first: set[int]) -> float:
        a = sum(first[tokens[e]] for e in busy if e in on_first)
        b = sum(second[tokens[e]] for e in busy if e not in on_first)
        return max(a, b) + (join if 0 < len(on_first) < len(busy) else 0.0)

    assert split.seconds == pytest.approx(makespan(set(split.first)))
    assert split.seconds == pytest.approx(min(makespan(set(busy[:cut])) for cut in range(len(busy) + 1)))
    assert split.seconds <= min(makespan(set()), makespan(set(busy))) + 1e-9
    subsets = product([False, True], repeat=len(busy))
    best = min(makespan({e for e, yes in zip(busy, mask, strict=True) if yes}) for mask in subsets)
    assert split.seconds >= best - 1e-9


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(1, 4))
def test_sections_stay_together(tokens: list[int], count: int) -> None:
    groups = sections(len(tokens), count)
    split = coprocess(tokens, lambda n: 3.0 + n, lambda n: 2.0 * n, groups)
    for group in groups:
        busy = {e for e in group if tokens[e]}
        assert busy <= set(split.first) or busy <= set(split.second)
    assert split.seconds == max(split.first_seconds, split.second_seconds)


def test_bad_splits_are_named() -> None:
    with pytest.raises(MoesaicError, match="negative"):
        coprocess([-1], [0.0], [0.0])
    with pytest.raises(MoesaicError, match="second unit's table ends at 1 tokens, but an expert has 2"):
        coprocess([2], [0.0, 1.0, 2.0], [0.0, 1.0])
    with pytest.raises(MoesaicError, match="each of the 2 experts once"):
        coprocess([1, 1], [0.0, 1.0], [0.0, 1.0], [[0], [0, 1]])


def test_duplex_curve_of_a_mixtral_layer() -> None:
    """Time relative to the processor alone, 8 experts, top 2: PIM wins below 128 tokens, the split everywhere."""
    duplex, shape = preset("h100+logic-pim"), ExpertShape(4096, 14336)
    first, second = (expert_table(duplex.unit(name), shape, 4096) for name in ("xpu", "pim"))
    rng, curve = np.random.default_rng(0), {}
    for tokens in (8, 32, 64, 128, 1024, 4096):
        both, alone, other = 0.0, 0.0, 0.0
        for _ in range(50):
            chosen = rng.random((tokens, 8)).argsort(1)[:, :2]
            counts = np.bincount(chosen.ravel(), minlength=8).tolist()
            split = coprocess(counts, first, second)
            xpu, pim = sum(first[n] for n in counts), sum(second[n] for n in counts)
            assert split.seconds <= min(xpu, pim) * (1 + 1e-12)
            both, alone, other = both + split.seconds, alone + xpu, other + pim
        curve[tokens] = other / alone, both / alone
    wanted = {32: (0.28, 0.23), 64: (0.50, 0.34), 128: (0.99, 0.50), 1024: (7.4, 0.88)}
    for tokens, values in wanted.items():
        assert curve[tokens] == pytest.approx(values, rel=0.15), tokens
    assert curve[8][1] <= curve[8][0] < 1 and curve[4096][1] == pytest.approx(1, rel=0.15)
