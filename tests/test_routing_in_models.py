"""Every router inside a model: caches, padding, checkpoints, casts, gradient checkpointing, replay of plans."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from families import tiny
from moesaic.errors import MoesaicError
from moesaic.models.routed import RoutedCall, RoutedForCausalLM, attach_router
from moesaic.routing.contract import Caps, Router
from moesaic.routing.family import ROUTERS, build_router, router_class
from moesaic.routing.modality import AuxiliaryRouter, ModalityRouter
from moesaic.routing.policies import Fixed
from moesaic.routing.scorers import Nothing

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

WIDTH, EXPERTS, LAYERS = 32, 4, 2
OPTIONS = {
    "recurrent": {"state_width": 8},
    "fine-grained": {"k": 2},
    "modality": {"groups": [2, 2]},
    "frozen-random": {"k": 2},
    "embedding-random": {"k": 2},
}
AUXILIARY = "auxiliary"
CAUSAL = [*(name for name in ROUTERS if router_class(name).caps.causal), AUXILIARY]
NON_CAUSAL = [name for name in ROUTERS if not router_class(name).caps.causal]
TRAINED = [name for name in ROUTERS if router_class(name).caps.trainable]
every_causal_router = pytest.mark.parametrize("name", CAUSAL)


def parity(ids):
    """The modality of these tests."""
    return ids % 2


def routed(name, dense=None, **options):
    """A tiny model of slices under the router, which is far from initialisation."""
    spec = {"name": name, **OPTIONS.get(name, {})}
    if name == AUXILIARY:
        spec = AuxiliaryRouter(ModalityRouter(WIDTH, EXPERTS, LAYERS, groups=[2, 2]), WIDTH, LAYERS)
    if name == "zero-computation":
        options = {"free": {"zero": 1, "copy": 1, "constant": 1}, **options}
    model = attach_router(dense or tiny("llama"), spec, experts=EXPERTS, upcycle="split", **options)
    model.modality = parity
    torch.manual_seed(5)
    for parameter in model.router.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def prompt(batch=2, length=9):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(2))


def greedy(model, ids, **options):
    return model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, **options)


def by_place(model, batch):
    """[(index, weight) of each layer], (B, S, K): the plans of the last forward."""
    return [
        (p.index.view(batch, -1, p.index.shape[1]), p.weight.view(batch, -1, p.index.shape[1])) for p in model.plans()
    ]


def assert_plans(got, wanted):
    for (index, weight), (other_index, other_weight) in zip(got, wanted, strict=True):
        assert torch.equal(index, other_index)
        torch.testing.assert_close(weight, other_weight, rtol=1e-4, atol=1e-5)


# -- decoding ---------------------------------------------------------------------------------------------------------


@every_causal_router
@torch.no_grad()
def test_incremental_decoding_equals_one_forward(name):
    model, ids, cache = routed(name), prompt(), DynamicCache()
    logits, plans = [], []
    for piece in ids.split([4, 1, 1, 3], dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
        plans.append(by_place(model, 2))
        assert model.last.inp.phase == ("decode" if len(plans) > 1 else "eval")
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-4, atol=1e-4)
    joined = [tuple(torch.cat(part, 1) for part in zip(*layer, strict=True)) for layer in zip(*plans, strict=True)]
    assert_plans(joined, by_place(model, 2))


@every_causal_router
@torch.no_grad()
def test_generation_with_and_without_cache(name):
    model, ids = routed(name), prompt()
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


@every_causal_router
@torch.no_grad()
def test_left_padding_and_batch_mates_change_nothing(name):
    model, short, long = routed(name), prompt(1, 5), prompt(1, 9)
    ids = torch.cat([nn.functional.pad(short, (4, 0)), long])
    mask = (torch.arange(9) >= torch.tensor([[4], [0]])).long()
    together = model(ids, attention_mask=mask).logits
    plans = by_place(model, 2)
    # A sequence's random experts hang on its number in the call, so alone only the first keeps them.
    for row, alone in enumerate([short] if name == "random" else [short, long]):
        start = 9 - alone.shape[1]
        torch.testing.assert_close(together[row, start:], model(alone).logits[0], rtol=1e-4, atol=1e-4)
        assert_plans(
            [(i[row, start:], w[row, start:]) for i, w in plans], [(i[0], w[0]) for i, w in by_place(model, 1)]
        )
        generated = greedy(model, ids, attention_mask=mask)[row, 9:]
        assert torch.equal(generated, greedy(model, alone)[0, alone.shape[1] :])


@pytest.mark.parametrize("name", NON_CAUSAL)
@torch.no_grad()
def test_what_is_not_causal_scores_text_but_does_not_generate(name):
    model = routed(name)
    assert model(prompt()).logits.isfinite().all()
    with pytest.raises(MoesaicError, match=f"use {model.router.caps.causal_alternative}"):
        greedy(model, prompt())


# -- checkpoints, casts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_checkpoint_round_trip(name, tmp_path):
    model, ids = routed(name), prompt()
    logits, plans = model(ids).logits, by_place(model, 2)
    model.save_pretrained(tmp_path)
    again = RoutedForCausalLM.from_pretrained(tmp_path)
    again.modality = parity
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-5, atol=1e-5)
    assert_plans(by_place(again, 2), plans)
    saved = again.state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_the_hash_of_token_ids_stays_when_the_embedding_is_trained(tmp_path):
    model, ids = routed("embedding-random"), prompt()
    with torch.no_grad():
        model(ids)
        before = by_place(model, 2)
        model.get_input_embeddings().weight.add_(torch.randn(96, WIDTH))
        model.save_pretrained(tmp_path)
        for later in (model, RoutedForCausalLM.from_pretrained(tmp_path)):
            later(ids)
            assert_plans(by_place(later, 2), before)


@torch.no_grad()
def test_the_modality_function_is_not_saved_and_its_lack_is_named(tmp_path):
    routed("modality").save_pretrained(tmp_path)
    with pytest.raises(MoesaicError, match="needs the modality of each token"):
        RoutedForCausalLM.from_pretrained(tmp_path)(prompt())


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_cast_moves_the_backbone_but_rounds_no_router(name):
    model = routed(name)
    before = {key: value.clone() for key, value in model.router.state_dict().items()}
    assert model.to(torch.bfloat16)(prompt()).logits.dtype == torch.bfloat16
    assert all(torch.equal(value, before[key]) for key, value in model.router.state_dict().items())
    assert all(plan.weight.dtype == torch.float32 for plan in model.plans())
    assert next(model.pools()[0].parameters()).dtype == torch.bfloat16


@torch.no_grad()
def test_loading_in_half_precision_keeps_the_router(tmp_path):
    model = routed("recurrent")
    model.save_pretrained(tmp_path)
    half = RoutedForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(prompt()).logits.dtype == torch.bfloat16
    assert all(torch.equal(p, q) for p, q in zip(half.router.parameters(), model.router.parameters(), strict=True))


# -- training, with and without gradient checkpointing ----------------------------------------------------------------


def gradients(model, ids, loss=None):
    model.zero_grad()
    out = model(ids, labels=ids)
    (out.loss if loss is None else loss(model)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def counted_plans(model):
    """How often the router is asked, in a list of one."""
    count, plan = [0], model.router.plan

    def counting(*args):
        count[0] += 1
        return plan(*args)

    model.router.plan = counting
    yield count
    del model.router.plan


@pytest.mark.parametrize("name", TRAINED)
def test_gradient_checkpointing_changes_no_gradient(name):
    model, ids = routed(name, losses={"load_balance": 0.5, "z": 0.1}).train(), prompt()
    plain = gradients(model, ids)
    assert any("router" in key and bool(grad.any()) for key, grad in plain.items())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with counted_plans(model) as count:
        checkpointed = gradients(model, ids)
    assert count[0] == 2 * LAYERS  # every layer is planned again for the backward pass
    assert plain.keys() == checkpointed.keys()
    for key, grad in plain.items():
        torch.testing.assert_close(checkpointed[key], grad, rtol=1e-5, atol=1e-6)
    assert len(model.plans()) == LAYERS


def last_scores(model):
    """A loss of the last layer's scores alone."""
    return (model.plans()[-1].logits * torch.linspace(-1, 1, EXPERTS)).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_recurrent_gradient_reaches_the_first_layer(checkpointing, monkeypatch):
    model, ids = routed("recurrent").train(), prompt()
    for pool in model.pools():
        nn.init.zeros_(pool.bank.down)  # so that hidden states carry nothing of the router's from layer to layer
    key = "router.scorer.project.0.weight"
    wanted = gradients(model, ids, last_scores)[key]
    assert bool(wanted.any())
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.testing.assert_close(gradients(model, ids, last_scores)[key], wanted)

    class Forgets(RoutedCall):
        """Known bad: the state reaches the next layer without its graph, as a naive checkpoint would leave it."""

        def plan(self, router, layer, x_ND):
            result = super().plan(router, layer, x_ND)
            state = self.states[layer + 1]
            self.states[layer + 1] = type(state)(state.depth.detach(), state.time)
            return result

    monkeypatch.setattr("moesaic.models.routed.RoutedCall", Forgets)
    assert key not in gradients(model, ids, last_scores) or not gradients(model, ids, last_scores)[key].any()


def test_reentrant_checkpointing_would_lose_gradients_and_is_refused():
    with pytest.raises(MoesaicError, match="use_reentrant"):
        routed("recurrent").gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_each_forward_starts_with_an_empty_state():
    model, ids = routed("recurrent"), prompt()
    with torch.no_grad():
        first = model(ids).logits
        model(prompt(3, 5))
        assert torch.equal(model(ids).logits, first)


def test_the_balance_loss_of_a_model_leaves_padding_out():
    model, ids = routed("top-k", losses={"load_balance": 1.0}), prompt(1, 6)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    with torch.no_grad():
        model(ids)
        alone = model.losses(["load_balance", "entropy", "z"])
        model(padded, attention_mask=(torch.arange(11) >= 5).long()[None])
        for name, value in model.losses(["load_balance", "entropy", "z"]).items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_losses_of_another_training_stage_are_not_asked_for():
    model = routed(AUXILIARY)
    model(prompt())
    assert model.losses(["load_balance"])["load_balance"].isfinite()
    big_small = routed("big-small")
    big_small(prompt())
    assert big_small.losses(["budget"])["budget"] >= 0
    with pytest.raises(MoesaicError, match=r"unknown loss 'banlance'.*load_balance.*budget"):
        big_small.losses(["banlance"])


# -- replay -----------------------------------------------------------------------------------------------------------


class ReplayRouter(Router):
    caps = Caps(reads=frozenset({"nothing"}), trainable=False, precompute="exact")

    def __init__(self, plans):
        super().__init__(Nothing(EXPERTS), Fixed(plans))


@pytest.mark.parametrize("name", ["top-k", "recurrent", "top-p", "random", "union-data-selection"])
@torch.no_grad()
def test_recorded_plans_replay_bit_exact_and_only_where_they_fit(name):
    dense, ids = tiny("llama"), prompt()
    model = routed(name, dense)
    logits, plans = model(ids).logits, model.plans()

    def replaying(recorded):
        return attach_router(dense, ReplayRouter(recorded), experts=EXPERTS, upcycle="split")

    assert torch.equal(replaying(plans)(ids).logits, logits)
    with pytest.raises(MoesaicError, match="for 18 tokens, but 16 are routed"):
        replaying(plans)(ids[:, 1:])
    with pytest.raises(MoesaicError, match="cover 1 layers, but layer 1"):
        replaying(plans[:1])(ids)


def test_names_and_options_are_checked():
    with pytest.raises(MoesaicError, match="did you mean 'recurrent'"):
        build_router("recurent", WIDTH, EXPERTS, LAYERS)
    with pytest.raises(MoesaicError, match="no option 'kk'"):
        build_router("top-k", WIDTH, EXPERTS, LAYERS, kk=1)


def test_a_bf16_model_comes_back_in_bf16_with_its_router_in_fp32(tmp_path):
    model = attach_router(tiny("llama").to(torch.bfloat16), "recurrent", experts=3)
    model.save_pretrained(tmp_path)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stored.dtype == torch.bfloat16 and stored.pools()[0].bank.down.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in stored.router.parameters()} == {torch.float32}
