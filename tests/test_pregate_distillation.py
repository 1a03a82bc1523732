"""Distilling a router into a pre-gate: the recorder, the metrics and the regret against slow twins, and learning."""

import json
from pathlib import Path

import pytest
import torch
import transformers as t
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from families import COMMON
from moesaic.analyze.pregate_distillation import (
    DistillationConfig,
    RecordedPlans,
    agreement,
    baselines,
    distil,
    gate_among,
    gate_scores,
    loss,
    markdown,
    popularity,
    pregate_only,
    record,
    report,
    restrict,
    selection_loss,
    used_experts,
)
from moesaic.errors import MoesaicError
from moesaic.models.routed import RoutedForCausalLM, attach_router
from moesaic.models.stock import replace_gates
from moesaic.routing.contract import EMPTY, Caps, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.policies import TopK, TopP
from moesaic.routing.predicted_plan import PredictedPlanRouter

V, E, L, K = 48, 6, 3, 2
SHAPE = {**COMMON, "vocab_size": V, "num_hidden_layers": L}
TRUNK = {"width": 32, "mlp_width": 32, "heads": 2, "layers": 1}


def large(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def routed(router: str = "top-k", **options: object) -> RoutedForCausalLM:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(t.LlamaConfig(**SHAPE))
    return large(attach_router(dense, {"name": router, **options}, experts=E))


def stock(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {
        "mixtral": ("MixtralConfig", dict(num_local_experts=E)),
        "olmoe": ("OlmoeConfig", dict(num_experts=E)),
        "glm4": ("Glm4MoeConfig", dict(n_routed_experts=E, moe_intermediate_size=16, n_group=1, topk_group=1)),
    }[name]
    extra = {"first_k_dense_replace": 0} if name == "glm4" else {}
    config = getattr(t, options[0])(**SHAPE, **options[1], **extra, num_experts_per_tok=K)
    return large(AutoModelForCausalLM.from_config(config))


def batches(count: int, seed: int = 0, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(3, V, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :5] = 0
            mask[3, :2] = 0
        result.append({"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids})
    return result


def predictor(**options: object) -> PredictedPlanRouter:
    torch.manual_seed(3)
    router = PredictedPlanRouter(V, E, L, trunk=TRUNK, **options).eval()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return router


# -- the router -------------------------------------------------------------------------------------------------------
def test_all_plans_before_layer_0_equal_the_plans_layer_by_layer() -> None:
    router, inp = predictor(), RouteInput.of(batches(1)[0]["input_ids"])
    early, state = router.plan_all(inp, L), RouterState()
    for layer in range(L):
        inp.layer = layer
        alone, _ = router.plan(inp)
        late, state = router.plan(inp, state)
        for plan in (alone, late):
            assert torch.equal(plan.index, early[layer].index) and torch.equal(plan.weight, early[layer].weight)
        late.check(E)
    assert not torch.equal(early[0].index, early[2].index), "layers have heads of their own"
    with pytest.raises(MoesaicError, match="predicts 3 layers"):
        router.plan_all(inp, L + 1)


def test_groups_share_a_head_and_mass_scales_weights() -> None:
    router, inp = predictor(groups=2), RouteInput.of(batches(1)[0]["input_ids"])
    router.mass.copy_(torch.tensor([1.0, 2.0, 0.5]))
    plans = router.plan_all(inp, L)
    assert torch.equal(plans[0].index, plans[1].index) and not torch.equal(plans[1].index, plans[2].index)
    for plan, mass in zip(plans, (1.0, 2.0, 0.5), strict=True):
        torch.testing.assert_close(plan.weight.sum(-1), torch.full((48,), mass))
    with pytest.raises(MoesaicError, match="4 groups of 3 layers"):
        PredictedPlanRouter(V, E, L, groups=4)


def test_caps_say_whether_the_task_loss_trains_it() -> None:
    for weighting, k, trainable in [("renorm", 2, True), ("renorm", 1, False), ("one", 2, False), ("probs", 1, True)]:
        router = predictor(k=k, weighting=weighting)
        plan, _ = router.plan(RouteInput.of(batches(1)[0]["input_ids"]))
        head = router.scorer.pregate.head.weight
        grad = torch.autograd.grad(plan.weight.square().sum(), head)[0] if plan.weight.requires_grad else None
        reached = grad is not None and float(grad.abs().max()) > 1e-6
        assert reached == router.caps.trainable == trainable and router.caps.precompute == "exact"


def test_decoding_with_its_own_keys_equals_the_whole_text_with_left_padding() -> None:
    router = predictor(first_slot=0)
    batch = batches(1, padded=True)[0]
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def part(span: slice, phase: str) -> RouteInput:
        pos = (mask.cumsum(-1) - 1).clamp_min(0)[:, span].flatten()
        return RouteInput.of(ids[:, span], pos=pos, valid=mask[:, span].bool().flatten(), phase=phase)

    whole = router.plan_all(part(slice(None), "eval"), L)
    cache = DynamicCache()
    pieces = [router.plan_all(part(slice(0, 7), "eval"), L, cache)]
    pieces += [router.plan_all(part(slice(n, n + 1), "decode"), L, cache) for n in range(7, 12)]
    for layer in range(L):
        joined = torch.cat([p[layer].logits.unflatten(0, (4, -1)) for p in pieces], 1)
        want = whole[layer].logits.unflatten(0, (4, -1))
        torch.testing.assert_close(joined[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-4)
    with pytest.raises(MoesaicError, match="needs the keys of the text so far"):
        router.plan_all(part(slice(3, 4), "decode"), L)


def test_refuses_ragged_sequences() -> None:
    inp = RouteInput.of(batches(1)[0]["input_ids"])
    inp.seq = inp.seq.clone()
    inp.seq[:3] = 1
    with pytest.raises(MoesaicError, match="whole sequences of one length"):
        predictor().plan(inp)


# -- recording --------------------------------------------------------------------------------------------------------
def test_records_what_the_model_did() -> None:
    model = routed(k=K).train()
    known = record(model, batches(3, padded=True))
    assert model.training, "the model's mode is put back"
    assert (known.layers, known.experts, known.slots) == (L, E, K)
    assert known.tokens == 3 * (48 - 7) and known.renormalised
    model.eval()
    last = batches(3, padded=True)[2]
    model(**last)
    for layer, plan in enumerate(model.plans()):
        assert torch.equal(known.batches[2]["index"][:, :, layer].flatten(0, 1), plan.index)
        torch.testing.assert_close(known.batches[2]["weight"][:, :, layer].flatten(0, 1), plan.weight)
    torch.testing.assert_close(known.mass, torch.ones(L))
    assert not record(routed("fine-grained", k=K), batches(1)).renormalised
    assert record(model, batches(3)).fingerprint != record(model, batches(3, seed=1)).fingerprint
    with pytest.raises(MoesaicError, match="no calibration batch"):
        record(model, [])


def test_batches_start_over_reshuffled() -> None:
    known = record(routed(k=K), batches(5))
    firsts = [[int(known.batch(step)["input_ids"][0, 0]) for step in range(e * 5, e * 5 + 5)] for e in range(3)]
    assert sorted(firsts[0]) == sorted(firsts[1]) and len({tuple(row) for row in firsts}) > 1
    assert known.batch(7) is known.batch(7)


def test_ragged_plans_count_their_used_slots() -> None:
    known = record(routed("top-p", p=0.3), batches(2))
    used = (known.batches[0]["index"] != EMPTY).sum(-1).float()
    assert used.min() < used.max() and known.slots == round(
        float((known.batches[0]["index"] != EMPTY).sum(-1).float().mean())
    )


# -- losses and metrics -----------------------------------------------------------------------------------------------
def test_selection_loss_against_its_equation() -> None:
    logits, index = torch.randn(5, L, E), torch.stack([torch.randperm(E)[:K] for _ in range(15)]).view(5, L, K).int()
    index[0, 0, 1] = EMPTY
    want = 0.0
    for n in range(5):
        for layer in range(L):
            for e in range(E):
                p = float(torch.sigmoid(logits[n, layer, e]))
                want -= float(torch.tensor(p if e in index[n, layer].tolist() else 1 - p).log())
    assert float(selection_loss(logits, index)) == pytest.approx(want / 15, rel=1e-5)
    one = index[1:, :, :1]
    want = -sum(float(logits[n + 1, la].log_softmax(-1)[one[n, la, 0]]) for n in range(4) for la in range(L)) / 12
    assert float(selection_loss(logits[1:], one)) == pytest.approx(want, rel=1e-5)
    assert used_experts(torch.tensor([[2, EMPTY]]), 4).tolist() == [[False, False, True, False]]


def test_agreement_against_sets() -> None:
    known = record(routed("fine-grained", k=K), batches(2, padded=True))
    scores = {id(batch): torch.randn(4, 12, L, E) for batch in known.batches}
    got = agreement(lambda batch: scores[id(batch)], known)
    for layer in range(L):
        top, hits, wide, needed, tokens = 0, 0, 0, 0, 0
        for batch in known.batches:
            for b, s in batch["attention_mask"].nonzero().tolist():
                order = scores[id(batch)][b, s, layer].argsort(descending=True).tolist()
                used = batch["index"][b, s, layer].tolist()
                top += order[0] == used[int(batch["weight"][b, s, layer].argmax())]
                hits += len(set(order[:K]) & set(used))
                wide += len(set(order[: 2 * K]) & set(used))
                needed, tokens = needed + len(used), tokens + 1
        for name, value in (("top1", top / tokens), ("recall@k", hits / needed), ("recall@2k", wide / needed)):
            assert got[name][layer] == pytest.approx(value)


def test_baselines() -> None:
    model = routed(k=K)
    known, unseen = record(model, batches(4)), record(model, batches(2, seed=9))
    found = baselines(known, V)
    counts = torch.zeros(L, E)
    for batch in known.batches:
        for layer in range(L):
            for expert in batch["index"][:, :, layer].flatten().tolist():
                counts[layer, expert] += 1
    assert torch.equal(popularity(known), counts)
    batch = unseen.batches[0]
    order = found["previous token"](batch).topk(K, -1).indices
    for b, s, layer in [(0, 1, 0), (2, 5, 1), (3, 11, 2)]:
        assert set(order[b, s, layer].tolist()) == set(batch["index"][b, s - 1, layer].tolist())
    assert set(order[1, 0, 2].tolist()) == set(counts[2].topk(K).indices.tolist())
    table = found["token id"]({"input_ids": torch.tensor([[0]])})[0, 0]  # id 0 was never seen
    assert torch.equal(table.argmax(-1), counts.argmax(-1))
    assert agreement(found["token id"], known)["recall@k"][0] > agreement(found["popularity"], known)["recall@k"][0]


# -- regret -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [
        lambda: routed(k=K),
        lambda: routed("fine-grained", k=K),
        lambda: routed("top-p", p=0.5),
        lambda: stock("mixtral"),
        lambda: stock("olmoe"),
        lambda: stock("glm4"),
    ],
    ids=["renorm", "raw", "top-p", "mixtral", "olmoe", "sigmoid"],
)
def test_a_gate_among_all_experts_has_no_regret(make) -> None:
    """Choosing among all experts must rebuild the router's own plan, whatever its scores and weights are."""
    model = make()
    data = batches(2, padded=True)
    known = record(model, data)
    full = gate_among(model, lambda batch: torch.zeros(4, 12, L, E), E, known.renormalised)
    assert loss(model, data, full) == pytest.approx(loss(model, data), abs=2e-5)
    narrow = gate_among(model, lambda batch: torch.randn(4, 12, L, E), K, known.renormalised)
    assert abs(loss(model, data, narrow) - loss(model, data)) > 1e-3


def test_restrict_against_its_equation() -> None:
    logits = torch.randn(7, E)
    allowed = torch.rand(7, E).topk(3).indices
    mask = torch.zeros(7, E, dtype=torch.bool).scatter_(1, allowed, True)
    for weighting, renormalised in (("renorm", True), ("probs", False)):
        plan = restrict(TopK(K, weighting)(logits), mask, renormalised).check(E)
        for n in range(7):
            best = sorted(allowed[n].tolist(), key=lambda e: -float(logits[n, e]))[:K]
            assert plan.index[n].tolist() == best
            p = logits[n].softmax(-1)[best]
            torch.testing.assert_close(plan.weight[n], p / p.sum() if renormalised else p)
    few = restrict(TopP(0.3)(logits), torch.ones_like(mask), False)
    assert torch.equal(few.used.sum(-1), TopP(0.3)(logits).used.sum(-1))
    with pytest.raises(MoesaicError, match="no logits"):
        gate_scores(RoutePlan(torch.zeros(2, 1).int(), torch.ones(2, 1)))


def test_pregate_only_is_the_model_under_the_pregate() -> None:
    """Replaying plans made before layer 0 equals letting the pre-gate stand where the gates stood."""
    model, router = stock("mixtral"), predictor()
    for data in (batches(2), batches(2, padded=True)):
        early = loss(model, data, pregate_only(model, router))
        with replace_gates(model, router):
            assert loss(model, data) == pytest.approx(early, abs=1e-6)


def test_loss_is_the_models_own() -> None:
    model, data = routed(k=K), batches(1)
    ids = data[0]["input_ids"]
    assert loss(model, data) == pytest.approx(float(model(ids, labels=ids).loss.detach()), rel=1e-5)


# -- all of it --------------------------------------------------------------------------------------------------------
class ByToken(Router):
    """Plans that are a function of the token and the one before it, different in every layer."""

    caps = Caps(reads=frozenset({"ids"}), trainable=False)

    def __init__(self) -> None:
        torch.manual_seed(5)
        scorer = torch.nn.Module()
        super().__init__(scorer, TopK(K, "renorm"))  # type: ignore[arg-type]
        scorer.experts = E
        self.register_buffer("table", torch.randn(L, 2, V, E) * 2)

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        before = torch.where(inp.pos > 0, inp.ids.roll(1), 0)
        logits = self.table[inp.layer, 0, inp.ids] + self.table[inp.layer, 1, before]
        return self.policy(logits, inp), state or RouterState()


def test_a_pregate_learns_and_reports(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(t.LlamaConfig(**SHAPE))
    model = attach_router(dense, ByToken(), experts=E, noise=0.5).eval()
    known, unseen = record(model, batches(40)), record(model, batches(8, seed=1))
    config = DistillationConfig(steps=240, lr=2e-2, trunk=TRUNK, checkpoint_every=240)
    router = distil(model, known, tmp_path, config)
    result = report(model, router, known, unseen)
    assert json.loads(json.dumps(result)) == result
    rows = {name: row["recall@2k"]["mean"] for name, row in result["agreement"].items()}
    assert rows["pre-gate"] > 0.9 and rows["pre-gate"] > rows["token id"] > rows["popularity"] > rows["random"]
    assert rows["random"] == pytest.approx(4 / 6)
    assert 0 < result["kl"]["mean"] < 0.5 and len(result["kl"]["layers"]) == L
    assert result["regret"]["true gate among 2k predicted"] < result["regret"]["true gate among 2k by popularity"]
    text = markdown(result)
    assert "| pre-gate |" in text and f"recall@{2 * K}" in text and text.count("\n| ") >= 12
    again = distil(model, known, tmp_path, config)  # finished: loaded, not trained again
    for name, value in router.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    with pytest.raises(MoesaicError):
        distil(model, record(model, batches(3, seed=4)), tmp_path, config)


def test_top_1_and_scoreless_routers(tmp_path: Path) -> None:
    model = routed("random")
    known = record(model, batches(3))
    assert known.slots == 1 and "log_probs" not in known.batches[0]
    router = distil(model, known, tmp_path, DistillationConfig(steps=3, trunk=TRUNK))
    result = report(model, router, known, record(model, batches(1, seed=2)))
    assert result["kl"] is None and list(result["regret"]) == ["pre-gate's experts and weights"]
    assert router.scorer.first_slot == L and isinstance(known, RecordedPlans)
