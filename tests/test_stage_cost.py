"""What a stage costs: hand-computed rooflines, the two-unit split, the published switch times, speed."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import MoesaicError
from moesaic.schedule.adaptive import Choice
from moesaic.schedule.card import Card
from moesaic.schedule.collective import all_to_all, allgather
from moesaic.schedule.cost import ExpertShape, expert_time, move_time
from moesaic.schedule.placement import contiguous, parallel
from moesaic.schedule.topology import Tier, Topology, Unit, preset
from moesaic.schedule.work import Call, Layout
from moesaic.simulate.cluster_cost import AdaptiveCost, ClusterCost
from moesaic.simulate.stage_cost import CostSpec, LayerCost, Overhead, StageCost, StageLoad, calibrated, stage_cost

CARD = Card("small", 2, 4, 1, "request", d=10, ffn=20, heads=4, kv_heads=2, head_dim=5, vocab=100)
MIXTRAL = Card("mixtral", 32, 8, 2, "gate", 4096, 14336, 32, 8, 128, 32000)
LLAMA = Card("llama-2-7b", 32, 8, 1, "prompt", 4096, 11008, 32, 32, 128, 32000)
LAYOUT = Layout.layer_experts(CARD.expert_bytes())
MACHINE = Topology("one", (Tier("ram", 1e6, 10.0),), (Unit("cpu", 1000.0, 10.0, "ram"),))
DECODE = StageLoad(0, 1, 0, 1, 0, 1)


def moment(layout: Layout, tokens: dict[int, int]) -> tuple[Call, ...]:
    """The calls of the layout's first layer."""
    layer = layout.layers[0]
    return tuple(Call(layer, e, n, layout.entries[layer, e]) for e, n in tokens.items())


def cost_of(card: Card, machine: Topology, spec: CostSpec | None = None) -> StageCost:
    return stage_cost(card, Layout.layer_experts(card.expert_bytes()).bytes, machine, spec)


def test_hand_computed_stage() -> None:
    cost = stage_cost(CARD, LAYOUT.bytes, MACHINE, CostSpec(overhead=Overhead(step=1.0, layer=2.0, op=3.0)))
    load = StageLoad(prefill_tokens=3, decode_tokens=2, prefill_pairs=6, decode_pairs=50, prefill_context=3, outputs=3)
    projections = max(2 * 5 * 600 / 1000, 600 * 2 / 10)  # q, o: 10 x 20 each, k, v: 10 x 10 each
    prefill, decode = max(4 * 6 * 20 / 1000, 3 * 40 / 10), max(4 * 50 * 20 / 1000, 50 * 40 / 10)
    assert cost.attention(load) == pytest.approx(projections + prefill + decode + 2.0)
    assert cost.ends(load) == pytest.approx(max(2 * 3 * 1000 / 1000, 2000 / 10) + 1.0)
    assert cost.kv_bytes(7) == 7 * 2 * 40
    layer = cost.experts(moment(LAYOUT, {0: 4, 2: 1}), load)
    one, four = (max(2 * m * 600 / 1000, (1200 + m * 2 * 3 * 30) / 10) for m in (1, 4))
    assert layer.experts_s == pytest.approx(one + four + 6.0)
    assert layer == LayerCost(layer.experts_s, 0.0, 0.0, 0.0, (layer.experts_s,))


def test_an_entry_agrees_with_the_expert_roofline() -> None:
    cost, unit = cost_of(MIXTRAL, preset("h100-pcie")), preset("h100-pcie").units[0]
    layout = Layout.layer_experts(MIXTRAL.expert_bytes())
    for tokens in (1, 64, 4096):
        seconds = cost.experts(moment(layout, {3: tokens}), DECODE).experts_s
        assert seconds == pytest.approx(expert_time(unit, ExpertShape(4096, 14336), tokens))


def test_shared_blocks_run_once_over_all_their_rows() -> None:
    blocks = (((12, (0, 1)), (8, (0,)), (8, (1, 2, 3))),) * 2
    card = replace(CARD, blocks=blocks)
    layout = Layout.blocks([[[0, 1], [0, 2], [2], [2]]] * 2, [[card.bytes_of(n) for n in (12, 8, 8)]] * 2)
    cost = stage_cost(card, layout.bytes, MACHINE)
    both = cost.experts(moment(layout, {0: 2, 1: 3}), DECODE).experts_s
    sizes = ((12, 5), (8, 2), (8, 3))
    assert both == pytest.approx(sum(max(2 * m * 30 * c / 1000, (60 * c + 6 * m * (10 + c)) / 10) for c, m in sizes))


def test_a_call_of_all_layers_costs_what_its_layers_do() -> None:
    every = Layout.experts([sum(sizes) for sizes in zip(*CARD.expert_bytes(), strict=True)])
    spec = CostSpec(overhead=Overhead(op=0.5))
    one = stage_cost(CARD, LAYOUT.bytes, MACHINE, spec).experts(moment(LAYOUT, {1: 3}), DECODE)
    all_layers = stage_cost(CARD, every.bytes, MACHINE, spec).experts(moment(every, {1: 3}), DECODE)
    assert all_layers.experts_s == pytest.approx(CARD.layers * one.experts_s)


def test_the_ffn_all_tokens_share_is_part_of_a_layer() -> None:
    without, with_it = (cost_of(replace(CARD, shared_params=n), MACHINE).attention(DECODE) for n in (0, 600))
    assert with_it - without == pytest.approx(1200 / 10)


def test_memory_bound_decode_is_bytes_over_bandwidth() -> None:
    machine = replace(MACHINE, units=(Unit("cpu", 1e12, 10.0, "ram"),))
    cost = cost_of(CARD, machine, CostSpec(efficiency=0.5))
    moved = 1200 + 2 * 3 * 30  # the weights, and one row in and out of three matrices
    assert cost.experts(moment(LAYOUT, {0: 1}), DECODE).experts_s == moved / 5.0


@given(st.dictionaries(st.integers(0, 3), st.integers(1, 5000), min_size=1), st.integers(0, 3), st.integers(1, 100))
def test_more_tokens_are_never_faster(tokens: dict[int, int], expert: int, more: int) -> None:
    for spec in (CostSpec(), CostSpec(split="coprocess")):
        cost = cost_of(CARD, preset("h100+logic-pim"), spec)
        before = cost.experts(moment(LAYOUT, tokens), DECODE).experts_s
        added = {**tokens, expert: tokens.get(expert, 0) + more}
        assert cost.experts(moment(LAYOUT, added), DECODE).experts_s >= before * (1 - 1e-12)


def duplex(split: str) -> StageCost:
    return cost_of(MIXTRAL, preset("h100+logic-pim"), CostSpec(split=split))


@pytest.mark.parametrize(
    ("tokens", "pim", "split"), [(32, 0.28, 0.23), (64, 0.50, 0.34), (128, 0.99, 0.50), (1024, 7.4, 0.88)]
)
def test_the_published_band_of_the_second_unit(tokens: int, pim: float, split: float) -> None:
    """Seconds relative to the first unit alone, mean of random routes (2409.01141, section V-B)."""
    rng, layout = np.random.default_rng(0), Layout.layer_experts(MIXTRAL.expert_bytes())
    sums = dict.fromkeys(("xpu", "pim", "coprocess"), 0.0)
    costs = {name: duplex(name) for name in sums}
    for _ in range(100):
        chosen = rng.random((tokens, 8)).argsort(1)[:, :2]
        counts = np.bincount(chosen.ravel(), minlength=8)
        calls = moment(layout, {e: int(n) for e, n in enumerate(counts) if n})
        times = {name: cost.experts(calls, DECODE).experts_s for name, cost in costs.items()}
        assert times["coprocess"] <= min(times["xpu"], times["pim"]) * (1 + 1e-12)
        sums = {name: sums[name] + times[name] for name in sums}
    assert sums["pim"] / sums["xpu"] == pytest.approx(pim, rel=0.15)
    assert sums["coprocess"] / sums["xpu"] == pytest.approx(split, rel=0.15)


def test_the_second_unit_is_idle_at_4096_tokens() -> None:
    calls = moment(Layout.layer_experts(MIXTRAL.expert_bytes()), dict.fromkeys(range(8), 1024))
    one, both = (duplex(name).experts(calls, DECODE) for name in ("xpu", "coprocess"))
    assert both.experts_s == one.experts_s and both.busy == (one.experts_s, 0.0)


def test_entries_of_different_bytes_split_no_worse_than_one_unit() -> None:
    layout = Layout.layer_experts([[1200, 1200, 2400, 600]])
    machine = preset("h100+logic-pim")
    calls = moment(layout, {0: 300, 1: 5, 2: 40, 3: 1000})
    names = ("xpu", "pim", "coprocess")
    x, p, both = (
        stage_cost(CARD, layout.bytes, machine, CostSpec(split=each)).experts(calls, DECODE) for each in names
    )
    assert both.experts_s <= min(x.experts_s, p.experts_s)


def test_prefill_and_decode_scores_run_on_two_units_at_once() -> None:
    mixed = StageLoad(1024, 64, 1024 * 512, 64 * 2048, 1024, 65)
    both, x, p = (duplex(name).attention(mixed) for name in ("coprocess", "xpu", "pim"))
    assert both < min(x, p)


def test_tensor_ranks_share_the_weights_and_reduce_the_rows() -> None:
    machine = preset("h100+logic-pim")
    one, eight = (cost_of(MIXTRAL, machine, CostSpec(split="xpu", tensor=n)) for n in (1, 8))
    calls = moment(Layout.layer_experts(MIXTRAL.expert_bytes()), dict.fromkeys(range(8), 2))
    load = StageLoad(0, 8, 0, 8 * 100, 0, 8)
    alone, shared = (cost.experts(calls, load) for cost in (one, eight))
    assert shared.experts_s == pytest.approx(alone.experts_s / 8)
    size = 8 * 4096 * 2
    assert shared.intra_bytes == pytest.approx(2 * 7 / 8 * size)
    assert shared.collective_s == pytest.approx(2 * 7 * (0.8e-6 + size / 8 / 450e9))
    assert alone.collective_s == 0


@pytest.mark.parametrize(("name", "ms"), [("sn40l-node", 13.5), ("dgx-h100", 211), ("dgx-a100", 421)])
def test_switching_a_whole_model(name: str, ms: float) -> None:
    """13.48 GB over the pool's link (2405.07518), and decode that reads the model once a token."""
    params = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096
    machine = preset(name)
    assert move_time(machine.links[0], params * 2) * 1e3 == pytest.approx(ms, rel=0.01)
    layout = Layout.experts([params * 2] * 8)
    cost = stage_cost(LLAMA, layout.bytes, machine, CostSpec(efficiency=0.85))
    seconds = cost.experts(moment(layout, {5: 1}), DECODE).experts_s
    assert seconds == pytest.approx(params * 2 / (0.85 * machine.units[0].bandwidth), rel=1e-3)


def test_measured_times_replace_the_first_units_peaks(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Times that a roofline of 50 Tflop/s and 0.5 TB/s would have give these rates back."""
    path, d, ffn = tmp_path / "ops.csv", 4096, 11008
    lines = ["gpu,num_tokens,tensor_parallel,mlp_up_proj,mlp_down_proj"]
    for m in (1, 2, 8, 32, 512, 2048, 4096):
        sizes = ((d, 2 * ffn), (ffn, d))
        ms = [1e3 * max(2 * m * a * b / 50e12, 2 * (a * b + m * (a + b)) / 0.5e12) for a, b in sizes]
        lines.append(f"a40,{m},1,{ms[0]},{ms[1]}")
    path.write_text("\n".join(lines))
    unit = calibrated(preset("a100-pcie"), path, "a40").units[0]
    assert (unit.name, unit.tier) == ("gpu", "hbm")
    assert unit.flops == pytest.approx(50e12, rel=1e-6)
    assert unit.bandwidth == pytest.approx(0.5e12, rel=1e-6)


A100S = preset("2x8-a100-ib")
WIDE = Card("wide", 2, 16, 1, "gate", 1024, 4096, 16, 16, 64, 32000)
WIDE_LAYOUT = Layout.layer_experts(WIDE.expert_bytes())
EVEN = moment(WIDE_LAYOUT, dict.fromkeys(range(16), 64))
BUSY = StageLoad(0, 1024, 0, 1024 * 300, 0, 1024)
PLACED = CostSpec(placement=contiguous(2, 16, 16))


def cluster(**changes: object) -> ClusterCost:
    cost = cost_of(WIDE, A100S, replace(PLACED, **changes))  # type: ignore[arg-type]
    assert isinstance(cost, ClusterCost)
    return cost


def test_the_slowest_device_holds_up_the_others() -> None:
    unit, shape = A100S.units[0], ExpertShape(1024, 4096)
    calls = moment(WIDE_LAYOUT, {0: 1000, 1: 4, 9: 20})
    layer = cluster().experts(calls, BUSY)
    assert layer.experts_s == pytest.approx(expert_time(unit, shape, 1000))
    assert layer.busy[0] == pytest.approx(sum(expert_time(unit, shape, n) for n in (1000, 4, 20)) / 16)
    assert layer[1:4] == (0, 0, 0)  # without a collective all devices hold all tokens


def test_slices_and_copies_share_the_work() -> None:
    calls = moment(WIDE_LAYOUT, {3: 4000})
    whole = cluster().experts(calls, BUSY)
    copied = cluster(placement=parallel(2, 16, expert=8, data=2)).experts(calls, BUSY)
    sliced = cluster(placement=parallel(2, 16, expert=8, tensor=2)).experts(calls, BUSY)
    assert copied.experts_s == pytest.approx(expert_time(A100S.units[0], ExpertShape(1024, 4096), 2000))
    assert sliced.experts_s == pytest.approx(whole.experts_s / 2) and sliced.collective_s > 0


def test_attention_is_shared_by_the_data_parallel_groups() -> None:
    one = cost_of(WIDE, A100S)
    assert cluster().attention(BUSY) == pytest.approx(one.attention(StageLoad(0, 64, 0, 64 * 300, 0, 64)))
    two = StageLoad(0, 2, 0, 600, 0, 2)
    assert cluster().attention(two) == pytest.approx(one.attention(StageLoad(0, 1, 0, 300, 0, 1)))


@pytest.mark.parametrize("kind", ["flat", "hierarchical", "2dh"])
def test_two_all_to_alls_a_layer(kind: str) -> None:
    layer = cluster(collective=kind).experts(EVEN, BUSY)
    once = all_to_all(kind, A100S, 64 * 1024 * 2)  # type: ignore[arg-type]
    assert layer.collective_s == pytest.approx(2 * once.seconds)
    assert layer.intra_bytes == pytest.approx(2 * once.intra_bytes)
    assert layer.inter_bytes == pytest.approx(2 * once.inter_bytes)


def test_the_cheapest_variant_is_the_least() -> None:
    times = [cluster(collective=kind).experts(EVEN, BUSY).collective_s for kind in ("flat", "hierarchical", "2dh")]
    assert cluster(collective="cheapest").experts(EVEN, BUSY).collective_s == pytest.approx(min(times))


def test_coordinated_gathers_once() -> None:
    layer = cluster(collective="coordinated", tensor=8).experts(EVEN, BUSY)
    size = 512 * 1024 * 2  # a group of eight ranks holds the tokens of eight devices
    once, gather = all_to_all("coordinated", A100S, size, 8), allgather(A100S.spread(8, 8), size)
    assert layer.collective_s == pytest.approx(2 * once.seconds - gather.seconds)
    assert layer.inter_bytes == pytest.approx(2 * size / 8 / 2)


@given(st.floats(0.05, 1.0), st.floats(0.0, 1.0))
def test_one_all_to_all_is_half_of_two(leave: float, inter: float) -> None:
    shares = {"leave": leave, "inter_leave": leave * inter}
    two, one = (cluster(collective=kind, **shares) for kind in ("flat", "coherent"))
    assert one.experts(EVEN, BUSY).collective_s == pytest.approx(two.experts(EVEN, BUSY).collective_s / 2)
    gather = allgather(A100S, 64 * 16 * 1024 * 2).seconds
    assert one.ends(BUSY) - two.ends(BUSY) == pytest.approx(gather)


def test_a_coherent_stage_is_cheaper_from_a_few_layers_on() -> None:
    """At equal crossing L all-to-alls and an AllGather, against 2 L."""
    two, one = (cluster(collective=kind) for kind in ("flat", "coherent"))

    def stage(cost: StageCost, layers: int) -> float:
        return layers * cost.experts(EVEN, BUSY).collective_s + cost.ends(BUSY)

    assert stage(one, 24) < stage(two, 24)


def test_tokens_that_stay_cost_nothing() -> None:
    layer = cluster(collective="flat", leave=0.0).experts(EVEN, BUSY)
    assert layer[1:4] == (0, 0, 0)


def test_overlap_hides_no_more_than_the_shorter_part() -> None:
    plain, two, best = (cluster(collective="flat", overlap=n).experts(EVEN, BUSY) for n in (1, 2, "best"))
    comm, compute = plain.collective_s, plain.experts_s
    assert two.experts_s + two.collective_s == pytest.approx(max(comm, compute) + min(comm, compute) / 2)
    assert best.experts_s + best.collective_s == pytest.approx(max(comm, compute) + min(comm, compute) / 8)


def test_all_layers_at_once_exchange_once_a_layer() -> None:
    every = Layout.experts([sum(sizes) for sizes in zip(*WIDE.expert_bytes(), strict=True)])
    whole = stage_cost(WIDE, every.bytes, A100S, replace(PLACED, collective="2dh"))
    one, all_layers = (
        cluster(collective="2dh").experts(EVEN, BUSY),
        whole.experts(moment(every, dict.fromkeys(range(16), 64)), BUSY),
    )
    assert all_layers[:4] == pytest.approx([2 * each for each in one[:4]])


def test_slots_drop_what_does_not_fit_and_pad_the_rest() -> None:
    cost = cluster(capacity=1.0)
    layer = cost.experts(moment(WIDE_LAYOUT, {0: 24, 1: 8}), BUSY)  # 32 tokens, 16 experts: 2 slots each
    assert (cost.slots.asked, cost.slots.dropped, cost.slots.run) == (32, 28, 32)
    assert cost.slots.drop_share == 28 / 32 and cost.slots.padding_share == 28 / 32
    assert layer.experts_s == pytest.approx(expert_time(A100S.units[0], ExpertShape(1024, 4096), 2))


def adaptive(card: Card, **changes: object) -> AdaptiveCost:
    spec = CostSpec(placement=contiguous(card.layers, card.experts, 16), adaptive_r=True, overlap="best")
    cost = cost_of(card, A100S, replace(spec, **changes))  # type: ignore[arg-type]
    assert isinstance(cost, AdaptiveCost)
    return cost


def test_the_degree_falls_as_slots_grow() -> None:
    """Few tokens are sent to every owner, many stay and the weights are gathered (2206.03382, section 3.1)."""
    four = replace(WIDE, experts=4)
    cost = adaptive(four)
    chosen = [cost.table.lookup(capacity).r for capacity in (1, 1 << 10, 1 << 13, 1 << 20)]
    assert cost.owners == 4 and chosen == sorted(chosen, key=lambda r: -r) and len(set(chosen)) > 1
    assert chosen[0] == 4 and chosen[-1] == 0


def test_the_adaptive_layer_is_the_best_of_all_choices() -> None:
    four = replace(WIDE, experts=4)
    cost, calls = adaptive(four), moment(Layout.layer_experts(four.expert_bytes()), {0: 300, 2: 512})
    layer = cost.experts(calls, BUSY)
    tried = [Choice(r, d, kind) for r in (0, 1, 2, 4) for d in (1, 2, 4, 8) for kind in ("flat", "2dh")]
    assert layer.experts_s + layer.collective_s == pytest.approx(min(cost._run(512, each)[0] for each in tried))
    assert (cost.slots.dropped, cost.slots.run) == (0, 4 * 512)
    shape, unit = ExpertShape(1024, 4096), A100S.units[0]
    assert cost._products(512, 1) == pytest.approx(expert_time(unit, shape, 128))
    assert cost._products(512, 4) == pytest.approx(expert_time(unit, replace(shape, ffn=1024), 512))
    assert cost._weights(4).seconds == 0
    assert cost._weights(1).seconds == pytest.approx(3 * (0.8e-6 + shape.bytes / 4 / 300e9))


def test_a_cluster_that_does_not_fit_its_placement() -> None:
    with pytest.raises(MoesaicError, match="2 layers, 16 experts and 8 devices"):
        cluster(placement=contiguous(2, 16, 8))
    with pytest.raises(MoesaicError, match="need a placement"):
        cost_of(WIDE, A100S, CostSpec(collective="flat"))
    with pytest.raises(MoesaicError, match="no coherent"):
        adaptive(WIDE, collective="coherent")
    with pytest.raises(MoesaicError, match="divide"):
        adaptive(replace(WIDE, experts=6))
    blocks = replace(WIDE, blocks=(((4096, tuple(range(16))),),) * 2)
    with pytest.raises(MoesaicError, match="whole experts"):
        cost_of(blocks, A100S, replace(PLACED, capacity=1.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "coproces"}, "coprocess"),
        ({"collective": "2hd"}, "2dh"),
        ({"efficiency": 0.0}, "efficiency"),
        ({"capacity": -1.0}, "capacity"),
        ({"tensor": 0}, "tensor"),
        ({"overlap": 0}, "overlap"),
    ],
)
def test_a_spec_that_means_nothing(changes: dict[str, object], said: str) -> None:
    with pytest.raises(MoesaicError, match=said):
        CostSpec(**changes)  # type: ignore[arg-type]


def test_a_machine_that_cannot_run_the_spec() -> None:
    with pytest.raises(MoesaicError, match="two units"):
        cost_of(CARD, MACHINE, CostSpec(split="coprocess"))
    with pytest.raises(MoesaicError, match="'xpu' is unknown"):
        cost_of(CARD, MACHINE, CostSpec(split="xpu"))
    with pytest.raises(MoesaicError, match="3 tensor ranks"):
        cost_of(MIXTRAL, preset("2x8-a100-ib"), CostSpec(tensor=3))
    with pytest.raises(MoesaicError, match="at least 0"):
        Overhead(op=-1.0)


def test_a_moment_of_eight_entries_is_quick() -> None:
    layout = Layout.layer_experts(MIXTRAL.expert_bytes())
    cost, calls = cost_of(MIXTRAL, preset("h100-pcie")), moment(layout, dict.fromkeys(range(8), 2))
    best = min(_seconds(cost, calls) for _ in range(5))
    assert best < 50e-6  # 5 us measured; a forgotten memo or numpy in the loop exceeds this


def _seconds(cost: StageCost, calls: tuple[Call, ...]) -> float:
    start = time.perf_counter()
    for _ in range(200):
        cost.experts(calls, DECODE)
    return (time.perf_counter() - start) / 200
