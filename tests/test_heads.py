"""Heads as experts: the dense block when all run, silence of heads not chosen, no leak, a router that learns."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from families import FAMILIES, tiny
from moesaic.errors import MoesaicError
from moesaic.experts.pool import all_on
from moesaic.models.heads import HeadLayer, attach_heads, find_heads, gates
from moesaic.routing.contract import EMPTY, Caps, RoutePlan, Router, RouterState
from moesaic.routing.family import build_router


class AllHeads(Router):
    caps = Caps(reads=frozenset({"nothing"}))

    def __init__(self, groups, weight=None):
        nn.Module.__init__(self)
        self.groups, self.weight = groups, weight

    @property
    def experts(self):
        return self.groups

    def plan(self, inp, state=None):
        plan = all_on(len(inp.ids), self.groups)
        if self.weight is not None:
            plan.weight = self.weight.expand(len(inp.ids), -1)
            plan.index = plan.index.masked_fill(plan.weight == 0, EMPTY)
        return plan, RouterState()


def make(family="gpt2", router=None):
    model = attach_heads(tiny(family), router)
    for head in model.router.scorer.heads:
        nn.init.normal_(head.weight, std=0.5)
    return model


def prompt(batch=3, length=13):
    return torch.randint(3, 96, (batch, length))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_heads_are_the_dense_model(family):
    dense, ids = tiny(family), prompt()
    groups = find_heads(dense)[1]
    model = attach_heads(dense, AllHeads(groups))
    assert groups > 1 and len(model.config.places) == 2
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_the_block_is_the_sum_of_its_head_groups(family):
    """Groups one by one add up to the dense attention; in a GQA model a group is all heads of one key-value head."""
    dense, ids = tiny(family), prompt()
    places, groups = find_heads(dense)
    path = places[0][0]
    outputs = {}

    def catch(model, name):
        module = model.get_submodule(path)
        handle = module.register_forward_hook(lambda _, args, out: outputs.update({name: out[0]}))
        model(ids)
        handle.remove()

    catch(dense, "dense")
    bias = getattr(dense.get_submodule(path), places[0][1]).bias
    for group in range(groups):
        model = attach_heads(dense, AllHeads(groups, torch.eye(groups)[group]))
        handle = model.backbone.get_submodule(path).register_forward_hook(
            lambda _, args, out, group=group: outputs.update({group: out[0]})
        )
        model(ids)
        handle.remove()
    total = sum(outputs[group] for group in range(groups))
    if bias is not None:
        total = total - (groups - 1) * bias  # the bias belongs to no head: every run has it once
    torch.testing.assert_close(total, outputs["dense"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_head_not_chosen_is_silent_for_that_token_but_heard_as_key_and_value():
    model = attach_heads(tiny("gpt2"), AllHeads(4))
    layer = next(m for m in model.backbone.modules() if isinstance(m, HeadLayer))
    output = layer.attention.c_proj
    index = torch.arange(4, dtype=torch.int32).repeat(6, 1)
    index[2, 1] = EMPTY
    z = torch.randn(1, 6, 32)
    with layer.plan.use(RoutePlan(index, (index != EMPTY).float())):
        change = output(z) - output.linear(z)
    assert (change[0, [0, 1, 3, 4, 5]] == 0).all()
    torch.testing.assert_close(change[0, 2], -(z[0, 2, 8:16] @ output.linear.weight[8:16]), rtol=1e-4, atol=1e-5)


def test_gates_ignore_empty_slots():
    plan = RoutePlan(torch.tensor([[2, EMPTY], [0, 1]]), torch.tensor([[0.5, 0.0], [0.25, 2.0]]))
    assert gates(plan, 3).tolist() == [[0.0, 0.0, 0.5], [0.25, 2.0, 0.0]]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "falcon", "phi3"])
@torch.no_grad()
def test_nothing_leaks_and_a_cache_works(family):
    router = {"name": "top-k", "k": 1, "weighting": "probs"}
    model, ids = make(family, router), prompt()
    logits = model(ids, use_cache=False).logits
    chosen = torch.stack([plan.expert for plan in model.plans()])
    assert len(chosen.unique()) > 1
    later = ids.clone()
    later[:, -1] = 3 + (ids[:, -1] + 40) % 90
    assert float((model(later).logits - logits)[:, :-1].abs().max()) == 0
    out, parts = None, []
    for start, stop in ((0, 6), (6, 7), (7, 10), (10, 13)):
        past = None if out is None else out.past_key_values
        out = model(ids[:, start:stop], past_key_values=past, use_cache=True)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-4, atol=2e-5)


def test_the_probe_sees_a_leak_and_such_routers_are_refused():
    class Peeking(AllHeads):
        def plan(self, inp, state=None):
            plan, state = super().plan(inp, state)
            last = inp.hidden.view(3, 13, -1)[:, -1:, :4].expand(3, 13, 4).reshape(-1, 4)
            plan.weight = last.sigmoid()
            return plan, state

    model, ids = attach_heads(tiny("gpt2"), Peeking(4)), prompt()
    later = ids.clone()
    later[:, -1] = 3 + (ids[:, -1] + 40) % 90
    with torch.no_grad():
        assert float((model(later).logits - model(ids).logits)[:, :-1].abs().max()) > 1e-3
    with pytest.raises(MoesaicError, match="use UnionRouter"):
        attach_heads(tiny("gpt2"), build_router("union-data-selection", 32, 4, 2))


def test_the_gradient_reaches_the_router():
    model, ids = make("gpt2"), prompt()
    assert model.config.router == {"name": "union", "k": 2}
    model.train()(ids, labels=ids).loss.backward()
    assert all(head.weight.grad.abs().max() > 1e-4 for head in model.router.scorer.heads)
    assert model.activated() == 0.5


@torch.no_grad()
def test_equal_scores_over_all_groups_are_the_dense_model():
    dense, ids = tiny("gpt2"), prompt()
    model = attach_heads(dense, {"name": "union", "k": 4})
    for head in model.router.scorer.heads:
        nn.init.zeros_(head.weight)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_round_trip_and_errors(tmp_path):
    model, ids = make(), prompt()
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    with pytest.raises(MoesaicError, match="only inside its own forward"):
        model.backbone(ids)
    broken = tiny("gpt2")
    broken.transformer.h[1].attn = nn.Identity()
    broken.transformer.h[1].forward = lambda hidden, *args, **kwargs: hidden
    with pytest.raises(MoesaicError, match=r"h\.1 has 0 attention blocks"):
        find_heads(broken)
