"""Duo-LLM: big and small FFNs, random training routes, and an oracle that equals trying every route one by one."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from families import FAMILIES, tiny
from moesaic.analyze.oracle_routes import (
    RouterRoutes,
    RouteTable,
    control,
    count_routes,
    oracle_report,
    route_table,
    router_routes,
)
from moesaic.errors import MoesaicError
from moesaic.models.duo import attach_duo
from moesaic.models.ffn_sites import find_ffn_sites, get_ffn_weights
from moesaic.routing.big_small import BIG, SMALL, BigSmallRouter
from moesaic.routing.contract import Caps, Router, RouterState
from moesaic.routing.policies import fixed

SKIP = 2


class Route(Router):
    caps = Caps(reads=frozenset({"nothing"}))

    def __init__(self, route):
        torch.nn.Module.__init__(self)
        self.route = route

    def plan(self, inp, state=None):
        return fixed(torch.full((len(inp.ids),), self.route[inp.layer])), RouterState()


def prompt(batch=3, length=9):
    return torch.randint(3, 96, (batch, length))


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "llama-mlp-bias"])
@torch.no_grad()
def test_all_big_is_the_dense_model_and_skip_is_no_ffn(family):
    dense, ids = tiny(family), prompt()
    model = attach_duo(dense, skip=True)
    model.set_router(Route([BIG, BIG]))
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    big, small = model.pools()[0].bank.members
    assert (big.bank.hidden, small.bank.hidden) == (48, 3)
    model.set_router(Route([SKIP, SKIP]))
    for site in find_ffn_sites(dense):
        weights = get_ffn_weights(dense, site)
        weights.down.zero_()
        if weights.down_bias is not None:
            weights.down_bias.zero_()
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_where_small_ffns_start():
    dense = tiny("llama")
    mlp, x = dense.model.layers[1].mlp, torch.randn(5, 32)
    hidden = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)

    def small(**options):
        return attach_duo(dense, small=4, **options).pools()[1].bank.members[1](x)

    norms = mlp.down_proj.weight.norm(dim=0) * mlp.up_proj.weight.norm(dim=1) * mlp.gate_proj.weight.norm(dim=1)
    for options, kept in (
        ({"channels": "first"}, [0, 1, 2, 3]),
        ({"channels": "important"}, norms.topk(4).indices),
        ({"importance": [torch.arange(48.0)] * 2}, [44, 45, 46, 47]),
    ):
        torch.testing.assert_close(small(**options), hidden[:, kept] @ mlp.down_proj.weight[:, kept].T)
    assert small(channels="random").abs().max() < 0.1 < small().abs().max()


def test_bad_requests_are_named():
    for options, message in (
        ({"small": 48}, "small = 48"),
        ({"channels": "best"}, "channels = 'best'"),
        ({"train_skip": True}, "skip=True"),
    ):
        with pytest.raises(MoesaicError, match=message):
            attach_duo(tiny("llama"), **options)


def test_stage_one_draws_each_half_the_time_for_every_token_and_layer():
    model, ids = attach_duo(tiny("llama"), skip=True).train(), prompt(8, 128)
    draws = []
    for step in range(4):
        model.step = step
        model(ids)
        draws.append(torch.stack([plan.expert for plan in model.plans()]))
    drawn = torch.stack(draws).float()  # (step, layer, N)
    assert set(drawn.unique().tolist()) == {BIG, SMALL}  # never skip, as in the paper
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.02)
    for first, second in ((drawn[0], drawn[1]), (drawn[:, 0], drawn[:, 1]), (drawn[..., 1:], drawn[..., :-1])):
        assert float((first == second).float().mean()) == pytest.approx(0.5, abs=0.05)
    model.step = 3
    model(ids)
    assert torch.equal(torch.stack([plan.expert for plan in model.plans()]).float(), drawn[3])
    three = attach_duo(tiny("llama"), skip=True, train_skip=True).train()
    three(ids)
    assert torch.bincount(three.plans()[0].expert).tolist() == pytest.approx([1024 / 3] * 3, rel=0.15)


def test_stage_three_trains_only_the_router_towards_its_budget():
    model, ids = attach_duo(tiny("llama"), small=4), prompt(4, 16)
    router = model.train().learn_routes(budget=0.25)
    assert isinstance(router, BigSmallRouter)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"router"}
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for step in range(60):
        router.schedule(step, 60)
        optimizer.zero_grad()
        out = model(ids, labels=ids)
        (out.loss + 10 * model.losses(["budget"])["budget"]).backward()
        optimizer.step()
    share = torch.stack([plan.scores[:, BIG] for plan in model.plans()]).mean()
    assert float(share.detach()) == pytest.approx(0.25, abs=0.08)
    model.eval()(ids)
    assert all((plan.weight == 1).all() and plan.index.shape[1] == 1 for plan in model.plans())


@torch.no_grad()
def test_round_trip(tmp_path):
    model, ids = attach_duo(tiny("gpt2"), skip=True), prompt()
    for folder in ("stage1", "stage3"):
        model.save_pretrained(tmp_path / folder)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(again(ids).logits, model(ids).logits)
        model.learn_routes()


# -- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_tree_is_brute_force(family):
    model, ids = attach_duo(tiny(family), small=4, skip=True), prompt()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    table = route_table(model, ids, options=(BIG, SMALL, SKIP), padding_mask=mask)
    assert table.calls == 3 + 9  # not 2 * 9
    assert [tuple(route) for route in table.routes.tolist()] == list(itertools.product(range(3), repeat=2))
    assert table.rows.tolist() == [*range(8), *range(12, 17), *range(18, 26)]
    for route, losses in zip(table.routes.tolist(), table.losses, strict=True):
        model.set_router(Route(route))
        own = router_routes(model, ids, mask)
        torch.testing.assert_close(losses, own.losses)
        assert (own.routes == torch.tensor(route)).all()


@torch.no_grad()
def test_budgets_prune_the_tree():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, vocab_size=96, num_hidden_layers=4)
    model, ids = attach_duo(LlamaForCausalLM(LlamaConfig(**sizes))), prompt()
    whole, some = route_table(model, ids), route_table(model, ids, budgets=[1])
    assert whole.calls == 2 + 4 + 8 + 16 and len(whole.routes) == 16
    assert some.calls == 2 + 3 + 4 + 4 and sorted(some.routes.tolist()) == [
        [0, 1, 1, 1],
        [1, 0, 1, 1],
        [1, 1, 0, 1],
        [1, 1, 1, 0],
    ]
    torch.testing.assert_close(some.losses, whole.losses[whole.budgets == 1])
    assert count_routes(12, (BIG, SMALL, SKIP), [6]) == 924 * 2**6
    with pytest.raises(MoesaicError, match="0 routes"):
        route_table(model, ids, budgets=[5])
    with pytest.raises(MoesaicError, match="numbered from 0"):
        route_table(model, ids, options=(BIG, SKIP))


def made_up(losses, layers=2):
    routes = torch.tensor(list(itertools.product((BIG, SMALL), repeat=layers)))
    return RouteTable(routes, torch.tensor(losses), torch.arange(len(losses[0])), 0)


def test_the_report_on_a_table_by_hand():
    #                bb          bs          sb          ss
    table = made_up([[1.0, 4.0], [2.0, 1.0], [3.0, 3.0], [4.0, 4.0]])
    other = made_up([[9.0, 9.0], [5.0, 6.0], [7.0, 8.0], [9.0, 9.0]])
    router = RouterRoutes(torch.tensor([2.5, 2.0]), torch.tensor([[BIG, SMALL], [SMALL, SMALL]]))
    report = oracle_report(table, router=router, other=other, draws=400)
    assert report.oracle == {0: 4.0, 1: 1.5, 2: 2.5}
    assert report.fixed == {0: 4.0, 1: 1.5, 2: 2.5}
    assert report.random == {0: 4.0, 1: 2.25, 2: 2.5}
    assert report.usage == {0: [0.0, 0.0], 1: [1.0, 0.0], 2: [1.0, 1.0]}
    assert report.transfer[1] == (5.5, 5.5)
    assert report.oracle_any == report.best_of_random == 1.0
    assert report.difficulty.tolist() == [3.0, 3.0] and report.hopeless == 0.0
    assert report.router == {
        "loss": 2.25,
        "table_loss": 3.0,
        "agreement": 0.5,
        "exact": 0.0,
        "budget": 0.5,
        "regret": 1.25,
    }
    with pytest.raises(MoesaicError, match="other routes or tokens"):
        oracle_report(table, other=made_up([[1.0]] * 4))


def test_the_control_tells_information_from_chance():
    """With nothing but noise the control is as low as the oracle; where routes suit tokens by their kind, it is not."""
    generator = torch.Generator().manual_seed(0)
    noise = 3 + torch.randn(8, 4096, generator=generator)
    shuffled = control(noise, generator)
    assert shuffled == pytest.approx(float(noise.min(0).values.mean()), abs=0.05)
    assert shuffled < float(noise.mean()) - 1  # low by selection alone
    kinds = torch.full((8, 4096), 3.0)
    kinds[torch.arange(4096) % 8, torch.arange(4096)] = 1.0  # each token has one good route, always
    assert control(kinds, generator) > float(kinds.min(0).values.mean()) + 0.5


def test_routes_chosen_on_noise_do_not_transfer():
    torch.manual_seed(1)
    shape, routes = (16, 3000), torch.tensor(list(itertools.product((BIG, SMALL), repeat=4)))
    good = 0.5 * torch.randn(shape)
    tables = [RouteTable(routes, 3 + torch.randn(shape) + extra, torch.arange(3000), 0) for extra in (0, 0, good, good)]
    noise, truth = (oracle_report(a, other=b) for a, b in (tables[:2], tables[2:]))
    assert noise.oracle[2] < noise.fixed[2] - 0.8
    assert noise.transfer[2][0] == pytest.approx(3, abs=0.06)  # nothing survives
    assert truth.transfer[2][0] < truth.transfer[2][1] - 0.1
