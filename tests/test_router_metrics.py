"""Router metrics: estimates against closed forms and slow twins, padding, free experts, and active cost."""

import math

import numpy as np
import pytest
import torch

from families import tiny
from moesaic.analyze.router_metrics import (
    RouteCounts,
    cost_report,
    count_routes,
    first_choice,
    measure_router,
    next_token_sum,
    route_report,
)
from moesaic.balance.information import entropy, mutual_information, normalised_information
from moesaic.data.tokens import DomainTokens
from moesaic.errors import MoesaicError
from moesaic.models.routed import attach_router
from moesaic.routing.contract import EMPTY, RoutePlan
from moesaic.routing.policies import fixed


def plan(index: list[list[int]], weight: list[list[float]] | None = None) -> RoutePlan:
    slots = torch.tensor(index, dtype=torch.int32)
    return RoutePlan(slots, (slots != EMPTY).float() if weight is None else torch.tensor(weight))


def table(a: torch.Tensor, b: torch.Tensor, size: int) -> torch.Tensor:
    return torch.bincount(a * size + b, minlength=size * size).view(size, size)


def test_entropy_and_information_of_known_tables() -> None:
    even = torch.full((4,), 10_000)
    assert entropy(even) == pytest.approx(math.log(4) + 3 / 80_000)
    assert entropy(torch.zeros(3)) == 0
    same = torch.diag(torch.full((4,), 10_000))
    assert mutual_information(same) == pytest.approx(math.log(4), abs=1e-4)
    assert normalised_information(same) == pytest.approx(1, abs=1e-4)
    assert mutual_information(torch.full((4, 3), 1_000)) == pytest.approx(0, abs=1e-3)
    assert normalised_information(torch.tensor([[5.0], [0.0]])) == 0


def test_the_correction_takes_the_bias_away() -> None:
    """Independent routes of 8 experts, 300 tokens: plugged in they share 49 / 600 nats, corrected about nothing."""
    corrected, plugged = [], []
    for _ in range(200):
        counts = table(torch.randint(8, (300,)), torch.randint(8, (300,)), 8)
        corrected.append(mutual_information(counts))
        share = counts.double() / 300
        expected = share.sum(1, keepdim=True) * share.sum(0, keepdim=True)
        plugged.append(float(torch.special.xlogy(share, share / expected.clamp_min(1e-30)).sum()))
    assert np.mean(plugged) == pytest.approx(49 / 600, rel=0.15)
    assert abs(np.mean(corrected)) < 0.1 * np.mean(plugged)


def test_first_choice_is_the_heaviest_used_slot() -> None:
    plans = plan([[2, 0], [EMPTY, 1], [EMPTY, EMPTY], [3, 1]], [[0.2, 0.8], [0.0, 0.0], [0.0, 0.0], [0.5, 0.5]])
    assert first_choice(plans).tolist() == [0, 1, EMPTY, 3]


def test_counts_leave_out_padding_and_empty_slots_and_add_up() -> None:
    layers = [plan([[0, 1], [2, EMPTY], [1, 0], [2, 1]]), plan([[1, EMPTY], [2, 0], [EMPTY, EMPTY], [0, 1]])]
    valid = torch.tensor([True, True, True, False])
    counts = count_routes(layers, valid, 3)
    assert counts.tokens == 3
    assert counts.slots_LE.tolist() == [[2, 2, 1], [1, 1, 1]]
    # (0 -> 1), (2 -> 2), (1 -> none); symbol 0 is "none"
    pairs = torch.zeros(4, 4)
    pairs[1, 2] = pairs[3, 3] = pairs[2, 0] = 1
    assert torch.equal(counts.pairs_LEE[0].float(), pairs)
    assert counts.entropy_L is None  # these plans have no scores
    halves = [count_routes([layer.select(rows) for layer in layers], valid[rows], 3) for rows in _halves()]
    whole = halves[0] + halves[1]
    assert torch.equal(whole.slots_LE, counts.slots_LE) and torch.equal(whole.pairs_LEE, counts.pairs_LEE)


def _halves() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.arange(4)
    return rows < 2, rows >= 2


def test_report_of_experts_that_are_domains() -> None:
    """Layer 0 sends each domain to its expert, layer 1 everything to expert 0."""
    tokens = 1_000
    counts = {
        name: count_routes([fixed(torch.full((tokens,), e)), fixed(torch.zeros(tokens))], torch.ones(tokens).bool(), 2)
        for e, name in enumerate("ab")
    }
    report = route_report(counts)
    assert report["domain_nmi"] == pytest.approx([1, 0], abs=1e-3)
    assert report["load"] == [[0.5, 0.5], [1, 0]]
    assert report["load_by_domain"]["b"] == [[0, 1], [1, 0]]
    assert report["load_entropy"] == pytest.approx([math.log(2), 0], abs=1e-3)
    assert report["adjacent_layers_information"] == pytest.approx([0], abs=1e-3)
    assert report["experts_per_token"] == [1, 1] and report["router_entropy"] is None


def test_one_layer_has_no_neighbours() -> None:
    counts = count_routes([fixed(torch.tensor([0, 1]))], torch.ones(2).bool(), 2)
    assert route_report({"a": counts})["adjacent_layers_information"] == []


def test_next_token_sum_leaves_out_padding() -> None:
    logits, ids = torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    total, count = next_token_sum(logits, ids, mask)
    pairs = [(0, 1), (0, 2), (1, 0)]
    expected = sum(-float(logits[b, s].log_softmax(-1)[ids[b, s + 1]]) for b, s in pairs)
    assert count == 3 and float(total) == pytest.approx(expected, rel=1e-5)


def test_cost_counts_slots_and_nothing_for_free_experts() -> None:
    """Pools of 4 experts, 1 shared and 2 free ones; layer 0 uses 1.5 of the 4 per token, layer 1 none."""
    model = attach_router(
        tiny("llama"), "zero-computation", experts=4, upcycle="scratch", hidden=6, shared=1, free={"zero": 1, "copy": 1}
    )
    slots_LE = torch.tensor([[10.0, 5, 0, 0, 3, 2], [0, 0, 0, 0, 10, 10]])
    cost = cost_report(model, slots_LE.double(), 10)
    one = 3 * 32 * 6  # parameters of an expert: gate, up, down
    assert cost["expert_flops_per_token"] == pytest.approx(2 * one * (1.5 + 1 + 1))
    assert cost["shared_flops_per_token"] == 2 * one * 2
    assert cost["parameters"] == sum(p.numel() for p in model.parameters())
    assert cost["active_parameters"] == pytest.approx(cost["parameters"] - 2 * 4 * one + 1.5 * one)


def domains(count: int = 2) -> list[DomainTokens]:
    rng = np.random.default_rng(0)
    streams = [rng.integers(3, 90, size=400).astype(np.int32) for _ in range(2 * count)]
    return [DomainTokens(f"d{i}", streams[2 * i], streams[2 * i + 1], 2.0) for i in range(count)]


def test_measures_of_a_model_are_those_of_its_forwards() -> None:
    model = attach_router(tiny("llama"), {"name": "top-p", "p": 0.5}, experts=4, noise=0.2)
    model.train()
    found = measure_router(model, domains(), windows=3, length=16, batch_size=2)
    assert model.training
    model.eval()
    ids = torch.cat([d.windows(16, 3) for d in domains()])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    used = [float(p.used.sum(-1).float().mean()) for p in model.plans()]
    assert found["experts_per_token"] == pytest.approx(used)
    assert any(1 < value < 4 for value in used), "top-p is ragged here"
    loss = float(next_token_sum(logits, ids)[0]) / (6 * 15)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["bits_per_byte"]["d0"] == pytest.approx(found["loss_by_domain"]["d0"] / 2 / math.log(2))
    scores = model.plans()[1].scores
    assert scores is not None
    assert found["router_entropy"][1] == pytest.approx(float(-(scores * scores.log()).sum(-1).mean()), rel=1e-4)
    assert found["tokens"] == 96 and found["tokens_per_second"] > 0


def test_no_domain_is_refused() -> None:
    with pytest.raises(MoesaicError, match="at least one domain"):
        measure_router(attach_router(tiny("llama"), experts=2), [])


def test_counts_of_routers_without_scores_stay_without() -> None:
    one = RouteCounts(1, torch.ones(1, 2), torch.zeros(0), torch.ones(1))
    other = RouteCounts(1, torch.ones(1, 2), torch.zeros(0), None)
    assert (one + one).entropy_L is not None and (one + other).entropy_L is None
