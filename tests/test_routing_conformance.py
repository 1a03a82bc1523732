"""What every router must pass, whatever its method: the contract, with known-bad routers that the same checks refuse.

The routers inside a model are in test_routing_in_models.py.
"""

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch

import moesaic.routing
from moesaic.balance.load_balance import expert_counts
from moesaic.errors import MoesaicError
from moesaic.experts.bank import FFNBank
from moesaic.experts.pool import Pool
from moesaic.routing.contract import Caps, Router, RouterState
from moesaic.routing.family import ROUTERS, router_class
from moesaic.routing.frozen_random import FrozenRandomRouter
from moesaic.routing.modality import ModalityRouter
from moesaic.routing.policies import ExpertChoice, TopK
from moesaic.routing.recurrent import RecurrentRouter
from moesaic.routing.scorers import FrozenRandom, Linear, Recurrent
from moesaic.routing.top_k import TopKRouter
from moesaic.routing.union import UnionRouter
from routers import (
    AUXILIARY,
    CAUSAL,
    EXACT,
    EXPERTS,
    LAYERS,
    NAMES,
    NON_CAUSAL,
    VOCAB,
    WIDTH,
    assert_same,
    batch,
    make,
    pick,
    run,
)

every_router = pytest.mark.parametrize("name", NAMES)
every_causal_router = pytest.mark.parametrize("name", CAUSAL)


# -- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "phase"), [(n, p) for p in ("train", "eval", "decode") for n in (CAUSAL if p == "decode" else NAMES)]
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5)], ids=str)
def test_plans_keep_the_invariants(name, phase, shape):
    router = make(name)
    for plan in run(router, batch(*shape, phase=phase)):
        tokens = shape[0] * shape[1]
        assert plan.index.dtype == torch.int32 and plan.weight.dtype == torch.float32 and len(plan.index) == tokens
        assert plan.scores is None or (plan.scores.shape == (tokens, EXPERTS) and plan.scores.dtype == torch.float32)
        assert plan.logits is None or plan.logits.dtype == torch.float32


@every_router
def test_no_tokens_at_all(name):
    assert all(len(plan.index) == 0 for plan in run(make(name), [pick(inp, slice(0)) for inp in batch()]))


@every_router
def test_plans_vary_in_these_tests(name):
    used = torch.stack([expert_counts(plan.index, EXPERTS) for plan in run(make(name), batch(9, 20))]).sum(0)
    assert bool((used > 0).all())


# -- causality, batch mates, order ------------------------------------------------------------------------------------


def changed_at(inputs, sequence, position, seed):
    """The same batch with another token, and so another hidden state, at one place."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for inp in inputs:
        place = (inp.seq == sequence) & (inp.pos == position)
        ids = torch.where(place, (inp.ids + 1 + seed) % VOCAB, inp.ids)
        hidden = torch.where(place[:, None], 9 * torch.randn(WIDTH, generator=generator), inp.hidden)
        result.append(replace(inp, ids=ids, hidden=hidden, modality=ids % 2))
    return result


def leaks(router, inputs):
    """Whether some token's plan depends on a later token or on another sequence."""
    before = run(router, inputs)
    for seed in range(5):
        after = run(router, changed_at(inputs, 1, 4, seed))
        untouched = ~((inputs[0].seq == 1) & (inputs[0].pos >= 4))
        for old, new in zip(before, after, strict=True):
            same = (old.index == new.index).all(-1) & torch.isclose(old.weight, new.weight, atol=1e-6).all(-1)
            if not bool(same[untouched].all()):
                return True
    return False


@every_router
def test_plans_look_neither_ahead_nor_at_batch_mates_as_the_caps_say(name):
    router = make(name)
    assert leaks(router, batch()) == (not router.caps.causal)  # the probe must also find what is not causal


@pytest.mark.parametrize("name", NON_CAUSAL)
def test_what_is_not_causal_may_not_decode_and_names_what_may(name):
    router, inputs = make(name), batch(phase="decode")
    with pytest.raises(MoesaicError, match=f"use {router.caps.causal_alternative}"):
        router.plan(inputs[0])
    names = [f"moesaic.routing.{module.name}" for module in pkgutil.iter_modules(moesaic.routing.__path__)]
    found = {getattr(importlib.import_module(name), router.caps.causal_alternative, None) for name in names} - {None}
    (alternative,) = found
    assert alternative.caps.causal


@every_causal_router
def test_a_sequence_alone_is_routed_as_in_the_batch(name):
    router, inputs = make(name), batch()
    together = run(router, inputs)
    for sequence in range(3):
        rows = inputs[0].seq == sequence
        assert_same(
            run(router, [pick(inp, rows) for inp in inputs]), [plan.select(rows) for plan in together], exact=False
        )


@every_causal_router
def test_one_token_at_a_time_is_routed_as_in_the_sequence(name):
    router, inputs = make(name), batch(2, 5)
    together = run(router, inputs)
    for token in range(10):
        rows = torch.tensor([token])
        alone = run(router, [replace(pick(inp, rows), phase="decode") for inp in inputs])
        assert_same(alone, [plan.select(rows) for plan in together], exact=False)


@every_router
def test_plans_and_depth_state_follow_the_tokens_through_a_permutation(name):
    router, inputs = make(name), batch()
    order = torch.randperm(len(inputs[0].ids))
    plans = run(router, inputs)
    assert_same(run(router, [pick(inp, order) for inp in inputs]), [plan.select(order) for plan in plans], exact=False)
    state = RouterState()  # and in the middle of the stack
    for inp in inputs[:-1]:
        _, state = router.plan(inp, state)
    moved, _ = router.plan(pick(inputs[-1], order), state.select(order))
    assert_same([moved], [plans[-1].select(order)], exact=False)


# -- determinism ------------------------------------------------------------------------------------------------------


@every_router
@pytest.mark.parametrize("phase", ["train", "eval"])
def test_equal_inputs_give_equal_plans_and_no_global_randomness_is_used(name, phase):
    router, inputs = make(name), batch(phase=phase, generator=torch.Generator().manual_seed(5))
    first, before = run(router, inputs), torch.get_rng_state()
    second = run(router, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(first, second)  # nothing of the first forward, its depth state included, is left for the second


@every_router
def test_only_routers_that_say_so_depend_on_the_generator(name):
    router = make(name)
    one, two = (run(router, batch(generator=torch.Generator().manual_seed(seed))) for seed in (1, 2))
    differ = any(not torch.equal(a.index, b.index) for a, b in zip(one, two, strict=True))
    assert differ == router.caps.stochastic_eval


def test_random_draws_change_with_the_step_while_training_only():
    router = make("random")
    for phase, changes in (("train", True), ("eval", False)):
        plans = [torch.stack([p.expert for p in run(router, batch(phase=phase, step=step))]) for step in range(6)]
        assert any(not torch.equal(plans[0], other) for other in plans[1:]) == changes
    assert all(len(p.expert.unique()) == 1 for p in run(router, batch(phase="train")))  # one draw for the whole batch


# -- gradients --------------------------------------------------------------------------------------------------------

FIRST_LAYER_HAS_NONE = "carry.0."  # the weights of what layer 0 would take over from the layer before


def check_gradient(router):
    """The task loss, through a small pool in every layer, reaches all of the router's parameters or none."""
    pools = [Pool(FFNBank(router.experts, WIDTH, 4)) for _ in range(LAYERS)]
    for pool in pools:
        pool.bank.reset(std=0.5)
    inputs = batch(phase="train")
    loss = sum(
        (pool(x.hidden, plan) * torch.randn(WIDTH)).sum()
        for pool, x, plan in zip(pools, inputs, run(router, inputs), strict=True)
    )
    loss.backward()
    names = {name for name, _ in router.named_parameters() if FIRST_LAYER_HAS_NONE not in name}
    reached = {name for name, p in router.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 1e-7}
    assert reached == (names if router.caps.trainable else set())
    assert names or not router.caps.trainable


@every_router
def test_the_task_loss_trains_the_router_exactly_if_it_says_so(name):
    check_gradient(make(name))


@pytest.mark.parametrize(
    ("cls", "options", "trainable"),
    [
        (TopKRouter, {"k": 1}, False),
        (TopKRouter, {"k": 1, "weighting": "probs"}, True),
        (TopKRouter, {"k": 2, "weighting": "one"}, False),
        (UnionRouter, {"k": 1}, False),
        (RecurrentRouter, {"k": 1, "state_width": 4}, False),
    ],
)
def test_one_renormalised_weight_is_a_constant_and_the_caps_know(cls, options, trainable):
    router = cls(WIDTH, EXPERTS, LAYERS, **options)
    assert router.caps.trainable == trainable
    check_gradient(router)


class Claims(Router):
    """A router that says it is trained by the task loss."""

    caps = Caps(reads=frozenset({"hidden"}))


class Detached(TopKRouter):
    def plan(self, inp, state=None):
        plan, state = super().plan(inp, state)
        plan.weight = plan.weight.detach()
        return plan, state


class TrainsInSecret(Claims):
    caps = Caps(reads=frozenset({"hidden"}), trainable=False)


def scorer():
    return Linear(WIDTH, EXPERTS, LAYERS)


KNOWN_BAD = {
    "detached weights": lambda: Detached(WIDTH, EXPERTS, LAYERS),
    "unweighted, experts choose (the released Union of Experts)": lambda: Claims(
        scorer(), ExpertChoice(2.0, "sequence", "softmax", "one")
    ),
    "unweighted, tokens choose": lambda: Claims(scorer(), TopK(2, "one")),
    "argmax, weight one": lambda: Claims(scorer(), TopK(1, "one")),
    "argmax, renormalised": lambda: Claims(scorer(), TopK(1, "renorm")),
    "nothing to train": lambda: Claims(FrozenRandom(WIDTH, EXPERTS, LAYERS), TopK(2, "renorm")),
    "frozen by word only": lambda: TrainsInSecret(scorer(), TopK(2, "renorm")),
}


@pytest.mark.parametrize("bad", KNOWN_BAD)
def test_the_gradient_check_finds(bad):
    with pytest.raises(AssertionError):
        check_gradient(KNOWN_BAD[bad]())


class Forgets(Recurrent):
    """The ablation that is worse than no recurrence: the state is passed on without its gradient."""

    def forward(self, inp, state):
        logits, state = super().forward(inp, state)
        return logits, replace(state, depth=state.depth.detach())


def reached_through_depth(router, parameter):
    """Whether the last layer's scores send a gradient to a parameter of layer 0 that no hidden state depends on."""
    plan = run(router, batch(phase="train"))[-1]
    (grad,) = torch.autograd.grad((plan.logits * torch.randn(EXPERTS)).sum(), parameter, allow_unused=True)
    return grad is not None and bool(grad.any())


def test_the_gradient_flows_through_depth():
    recurrent, prior, plain = make("recurrent"), make("zero-computation"), make("top-k")
    assert reached_through_depth(recurrent, recurrent.scorer.project[0].weight)
    assert reached_through_depth(prior, prior.scorer.scorer.heads[0].weight)
    assert not reached_through_depth(plain, plain.scorer.heads[0].weight)
    forgetful = make("recurrent")
    forgetful.scorer = Forgets(WIDTH, 8, EXPERTS, LAYERS)
    assert not reached_through_depth(forgetful, forgetful.scorer.project[0].weight)


@every_router
def test_depth_state_is_kept_exactly_by_those_who_read_the_previous_plan(name):
    router, inputs = make(name), batch()
    _, state = router.plan(inputs[0])
    assert (state.depth is not None) == ("previous_plan" in router.caps.reads)
    if state.depth is not None:
        second, forgot = router.plan(inputs[1], state)[0], router.plan(inputs[1])[0]
        assert not torch.allclose(second.logits, forgot.logits)


# -- padding, precision, precomputed plans ----------------------------------------------------------------------------


@every_router
def test_padding_is_not_counted_and_changes_nothing(name):
    inputs = batch(valid=torch.rand(21) < 0.6)
    valid, router = inputs[0].valid, make(name)
    plans = run(router, inputs)
    for plan in plans:
        assert float(expert_counts(plan.index, EXPERTS, valid).sum()) == int(plan.used[valid].sum())
        assert router.caps.choice != "expert" or not bool(plan.used[~valid].any())  # it takes no token's place
    rubbish = [replace(x, hidden=torch.where(valid[:, None], x.hidden, 50 * torch.randn(WIDTH))) for x in inputs]
    assert_same([p.select(valid) for p in run(router, rubbish)], [p.select(valid) for p in plans], exact=False)


@every_router
@pytest.mark.parametrize("phase", ["train", "eval"])
def test_scores_are_fp32_under_autocast(name, phase):
    router, inputs = make(name), batch(phase=phase)
    plain = run(router, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run(router, inputs)
    assert_same(mixed, plain)
    for one, other in zip(mixed, plain, strict=True):
        assert one.weight.dtype == torch.float32
        assert one.logits is None or torch.equal(one.logits, other.logits)


@every_router
def test_hidden_states_that_are_not_finite_are_refused(name):
    router, inputs = make(name), batch()
    inputs[0].hidden[3, 2] = float("nan")
    if "hidden" not in router.caps.reads:
        assert_same(run(router, inputs), run(router, batch()))
        return
    for phase in ("train", "eval"):
        with pytest.raises(MoesaicError, match="layer 0 are not finite"):
            router.plan(replace(inputs[0], phase=phase))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("phase", ["train", "eval", "decode"])
def test_plans_known_before_layer_0_are_the_plans_of_the_layers(name, phase):
    router, inputs = make(name), batch(phase=phase)
    ahead = router.plan_all(replace(inputs[0], hidden=None), LAYERS)
    pool = Pool(FFNBank(EXPERTS, WIDTH, 4))
    for inp, early, late in zip(inputs, ahead, run(router, inputs), strict=True):
        assert_same([early], [late])
        assert torch.equal(pool(inp.hidden, early), pool(inp.hidden, late))


@every_router
def test_whoever_needs_hidden_states_cannot_plan_ahead_and_says_so(name):
    router, blind = make(name), replace(batch()[0], hidden=None)
    if name in EXACT:
        assert "hidden" not in router.caps.reads
        return
    with pytest.raises(MoesaicError, match="before the layers run; distil a pre-gate"):
        router.plan_all(blind, LAYERS)
    with pytest.raises(MoesaicError, match="reads hidden states"):
        router.plan(blind)


@every_router
def test_state_dict_round_trip(name):
    router, other, inputs = make(name), make(name, seed=9), batch()
    if not name.startswith("random"):  # which has no weights: its seed is in the config
        pairs = zip(run(router, inputs), run(other, inputs), strict=True)
        assert any(not torch.equal(a.index, b.index) or not torch.equal(a.weight, b.weight) for a, b in pairs)
        other.load_state_dict(router.state_dict())
    assert_same(run(other, inputs), run(router, inputs))


def test_frozen_routers_are_buffers_that_no_optimizer_can_reach():
    for name in ("frozen-random", "embedding-random"):
        assert not list(make(name).parameters()) and make(name).state_dict()


# -- any k, modalities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ROUTERS if router_class(name).caps.any_k])
def test_any_k_uses_the_same_ranking_and_keeps_the_scale(name):
    router, inputs = make(name), batch()
    every = run(router, inputs)[0].logits.argsort(-1, descending=True)
    for k in range(1, EXPERTS + 1):
        router.set_k(k)
        for plan in run(router, inputs)[:1]:
            assert torch.equal(plan.index.long(), every[:, :k])
            torch.testing.assert_close(plan.weight.sum(-1), torch.ones(len(every)))
    for k in (0, EXPERTS + 1):
        with pytest.raises(MoesaicError, match=f"k = {k} of {EXPERTS} experts"):
            router.set_k(k)


def test_k_of_a_frozen_router_grows_and_holds():
    for growth in ("linear", "cosine", "exponential"):
        router, ks = FrozenRandomRouter(WIDTH, 16, 1, k_min=8, growth=growth, hold=0.2), []
        for step in range(100):
            router.schedule(step, 100)
            ks.append(router.policy.k)
        assert ks[0] == 8 and ks == sorted(ks) and ks[80:] == [16] * 20
    small = FrozenRandomRouter(WIDTH, 16, 1, k=2)  # below the half at which growth starts by default
    assert (small.k_min, small.k_max, small.policy.k) == (2, 2, 2)


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"k": 17}, {"k_min": 0}, {"k": 4, "k_min": 5}, {"growth": "fast"}], ids=str
)
def test_an_impossible_growth_is_refused(wrong):
    with pytest.raises(MoesaicError):
        FrozenRandomRouter(WIDTH, 16, 1, **wrong)


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("modality", AUXILIARY)])
def test_a_token_reaches_the_experts_of_its_modality_and_must_have_one(name):
    router, inputs = make(name), batch()
    for plan, inp in zip(run(router, inputs), inputs, strict=True):
        owner = torch.where(plan.used, plan.index // 2, inp.modality[:, None])
        assert bool((owner == inp.modality[:, None]).all())
        foreign = torch.arange(EXPERTS) // 2 != inp.modality[:, None]
        assert float(plan.scores[foreign].detach().max()) < 1e-9 < float(plan.scores[~foreign].detach().min())
    with pytest.raises(MoesaicError, match="needs the modality"):
        router.plan(replace(inputs[0], modality=None))
    for wrong in (2, -1):
        with pytest.raises(MoesaicError, match=r"outside 0\.\.1"):
            router.plan(replace(inputs[0], modality=torch.full_like(inputs[0].modality, wrong)))
    with pytest.raises(MoesaicError, match="sum to the 4 experts"):
        ModalityRouter(WIDTH, EXPERTS, LAYERS, groups=[3, 2])


def test_the_auxiliary_router_learns_the_main_routers_choice_and_its_rate():
    router, inputs = make(AUXILIARY), batch(20, 20, layers=1)
    target = run(router.main, inputs)
    optimizer = torch.optim.Adam(router.scorer.parameters(), lr=0.02)
    first = router.losses(target, inputs[0])["selection"].item()
    for _ in range(150):
        loss = router.losses(target, inputs[0])["selection"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first
    used = target[0].used
    router.calibrate(0, run(router, inputs)[0].logits.sigmoid(), used)
    plan = run(router, inputs)[0]
    assert torch.equal(plan.used.sum(0), used.sum(0))  # as often as in training
    assert (plan.used == used).float().mean() > 0.9
    both = plan.used & used
    torch.testing.assert_close(plan.weight[both], target[0].weight[both])  # the main router still weighs
