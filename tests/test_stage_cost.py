"""What a stage costs: hand-computed rooflines, the two-unit split, the published switch times, speed."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.errors import MoesaicError
from moesaic.schedule.card import Card
from moesaic.schedule.cost import ExpertShape, expert_time, move_time
from moesaic.schedule.topology import Tier, Topology, Unit, preset
from moesaic.schedule.work import Call, Layout
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
