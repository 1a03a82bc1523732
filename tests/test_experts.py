"""Banks and pools against a loop over tokens, in outputs and all gradients; slices and copies of dense FFNs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from families import tiny
from moesaic.errors import MoesaicError
from moesaic.experts.bank import FFN, FFNBank, ModuleBank, dispatch
from moesaic.experts.channel_blocks import FFNWeights
from moesaic.experts.free import Constant, Copy, Zero, free_experts
from moesaic.experts.pool import Pool, all_on
from moesaic.experts.upcycle import fill_copies, fill_slices, slice_dense
from moesaic.models.routed import attach_router
from moesaic.routing.contract import EMPTY, Caps, RoutePlan, Router
from moesaic.routing.policies import fixed
from moesaic.routing.scorers import Nothing

WIDTH, HIDDEN = 6, 5
KINDS = [  # gated, biases
    pytest.param(True, False, id="gated"),
    pytest.param(True, True, id="gated-bias"),
    pytest.param(False, False, id="plain"),
    pytest.param(False, True, id="plain-bias"),
]


def make_bank(experts=3, gated=True, bias=False, hidden=HIDDEN):
    bank = FFNBank(experts, WIDTH, hidden, F.silu, gated=gated, up_bias=bias, down_bias=bias).double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.7)
    return bank


def random_plan(tokens, slots, experts, empty=0.3):
    """Distinct experts in random order, some slots empty."""
    index = torch.rand(tokens, experts).argsort(-1)[:, :slots].int()
    index[torch.rand(index.shape) < empty] = EMPTY
    weight = torch.rand(index.shape).masked_fill(index == EMPTY, 0).requires_grad_()
    return RoutePlan(index, weight).check(experts)


def ffn_of_one_token(bank, expert, x_D):
    """The equation of an FFN, one channel at a time, without a matrix product."""
    zero = x_D.new_zeros(())
    up_bias = [zero] * len(bank.gate_up[expert]) if bank.gate_up_bias is None else bank.gate_up_bias[expert]
    rows = [(row * x_D).sum() + b for row, b in zip(bank.gate_up[expert], up_bias, strict=True)]
    h = bank.hidden
    channels = [F.silu(rows[c]) * rows[h + c] if bank.gated else F.silu(rows[c]) for c in range(h)]
    out = sum(channel * column for channel, column in zip(channels, bank.down[expert].T, strict=True))
    return out if bank.down_bias is None else out + bank.down_bias[expert]


def one_by_one(bank, x_ND, plan, run=ffn_of_one_token):
    """sum_j weight_j Expert[index_j](x), a token and a slot at a time."""
    rows = []
    for n, x_D in enumerate(x_ND):
        y_D = torch.zeros_like(x_D)
        for j, expert in enumerate(plan.index[n].tolist()):
            if expert != EMPTY and expert < bank.experts:
                y_D = y_D + plan.weight[n, j] * run(bank, expert, x_D)
        rows.append(y_D)
    return torch.stack(rows) if rows else x_ND * 0


def assert_same_with_gradients(module, plan, x_ND, got, wanted):
    """Outputs, and the gradients of a random functional in the tokens, the weights and every parameter."""
    torch.testing.assert_close(got, wanted)
    leaves, probe = [x_ND, plan.weight, *module.parameters()], torch.randn_like(wanted)
    grads = [
        torch.autograd.grad((y * probe).sum(), leaves, allow_unused=True, materialize_grads=True)
        if y.requires_grad
        else ()
        for y in (got, wanted)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_bank_equals_the_loop(gated, bias, slots, tokens):
    bank, plan = make_bank(3, gated, bias), random_plan(tokens, slots, 3, empty=0.3 if tokens > 1 else 0)
    x = torch.randn(tokens, WIDTH, dtype=torch.double, requires_grad=True)
    assert_same_with_gradients(bank, plan, x, bank(x, plan), one_by_one(bank, x, plan))


@given(st.integers(0, 8), st.sampled_from([1, 2, 5]), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 9))
def test_bank_equals_the_loop_at_any_size(tokens, experts, empty, seed):
    torch.manual_seed(seed)
    bank, plan = make_bank(experts, hidden=1), random_plan(tokens, 1 + seed % experts, experts, empty)
    x = torch.randn(tokens, WIDTH, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(bank(x, plan), one_by_one(bank, x, plan))


@pytest.mark.parametrize("sizes", [[0, 0, 6], [2, 2, 2], [3, 0, 3], [6, 0, 0], [1, 4, 1]], ids=str)
def test_equal_loads_and_experts_without_tokens(sizes):
    bank = make_bank(3)
    plan = fixed(torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[torch.randperm(6)])
    plan.weight = torch.rand(6, 1, dtype=torch.double, requires_grad=True)
    x = torch.randn(6, WIDTH, dtype=torch.double, requires_grad=True)
    assert_same_with_gradients(bank, plan, x, bank(x, plan), one_by_one(bank, x, plan))


def test_sizes_may_come_back():
    bank = make_bank(3)
    for tokens in (5, 3, 5, 0, 1, 5):
        plan, x = random_plan(tokens, 2, 3), torch.randn(tokens, WIDTH, dtype=torch.double)
        torch.testing.assert_close(bank(x, plan), one_by_one(bank, x, plan))


def test_each_expert_is_run_once_on_its_tokens_in_order():
    plan = RoutePlan(torch.tensor([[1, 0], [0, EMPTY], [EMPTY, 1], [2, 1]]).int(), torch.ones(4, 2))
    plan.weight = plan.weight * plan.used
    x, calls = torch.arange(4.0)[:, None], {}

    def run(expert, rows):
        assert expert not in calls
        calls[expert] = rows.flatten().tolist()
        return rows

    y = dispatch(x, plan, run, 2)  # expert 2 belongs to someone else: a pool's free experts
    assert calls == {0: [0, 1], 1: [0, 2, 3]}
    assert y.flatten().tolist() == [0, 1, 2, 3]  # identity experts give x times the number of its slots
    assert dispatch(x + 1, plan, run_identity, 3).flatten().tolist() == [2, 2, 3, 8]


def run_identity(expert, rows):
    return rows


@pytest.mark.parametrize("index", [torch.empty(0, 2), torch.full((4, 2), EMPTY), torch.empty(4, 0)], ids=str)
def test_nothing_to_do_is_zero(index):
    plan = RoutePlan(index.int(), torch.zeros(index.shape))
    y = make_bank(3)(torch.randn(len(index), WIDTH, dtype=torch.double), plan)
    assert y.shape == (len(index), WIDTH) and not y.any()


def test_experts_of_different_shapes():
    bank = ModuleBank([FFN(WIDTH, 8), nn.Linear(WIDTH, WIDTH), nn.Identity()]).double()
    plan, x = random_plan(7, 2, 3), torch.randn(7, WIDTH, dtype=torch.double, requires_grad=True)
    wanted = one_by_one(bank, x, plan, lambda bank, expert, x_D: bank.members[expert](x_D[None])[0])
    assert_same_with_gradients(bank, plan, x, bank(x, plan), wanted)
    assert bank.expert_bytes == [3 * 8 * WIDTH * 8, (WIDTH + 1) * WIDTH * 8, 0]
    assert bank.flops_per_token == [2 * 3 * 8 * WIDTH, 2 * WIDTH * WIDTH, 0]


# -- pools: free and shared experts, the bias outside -----------------------------------------------------------------


def pool_of_one_token(pool, expert, x_D):
    if expert < pool.bank.experts:
        return ffn_of_one_token(pool.bank, expert, x_D)
    match pool.free[expert - pool.bank.experts]:
        case Zero():
            return x_D * 0
        case Copy():
            return x_D
        case Constant() as constant:
            a = [(row * x_D).sum().exp() for row in constant.mix.weight]
            return (a[0] * x_D + a[1] * constant.value) / (a[0] + a[1])


@pytest.mark.parametrize("tokens", [1, 7])
def test_pool_equals_the_loop(tokens):
    free = free_experts(WIDTH, 3, zero=1, copy=1, constant=2)
    pool = Pool(make_bank(3), free=free, shared=make_bank(2, hidden=2), bias=torch.randn(WIDTH)).double()
    assert pool.kinds == ["ffn"] * 3 + ["constant"] * 2 + ["copy", "zero"] and pool.experts == 7
    plan = random_plan(tokens, 4, 7)
    x = torch.randn(tokens, WIDTH, dtype=torch.double, requires_grad=True)
    wanted = one_by_one(pool, x, plan, pool_of_one_token) + pool.bias
    shared = [[ffn_of_one_token(pool.shared, expert, x_D) for x_D in x] for expert in range(2)]
    wanted = wanted + torch.stack([torch.stack(rows) for rows in shared]).sum(0)
    assert_same_with_gradients(pool, plan, x, pool(x, plan), wanted)


def test_shared_experts_run_for_a_token_that_no_expert_wants():
    pool = Pool(make_bank(2), shared=make_bank(1))
    x = torch.randn(3, WIDTH, dtype=torch.double)
    none = RoutePlan(torch.full((3, 2), EMPTY).int(), torch.zeros(3, 2))
    torch.testing.assert_close(pool(x, none), pool.shared.run(0, x))


def test_free_experts_weigh_next_to_nothing():
    pool = Pool(FFNBank(8, 64, 256), free=free_experts(64, 8))
    assert pool.kinds[8:] == ["constant", "copy", "zero"]  # the paper's default for 8 FFNs
    assert pool.expert_bytes == [3 * 64 * 256 * 4] * 8 + [3 * 64 * 4, 0, 0]
    assert max(pool.expert_bytes[8:]) < 0.01 * pool.expert_bytes[0]
    assert pool.flops_per_token == [2 * 3 * 64 * 256] * 8 + [0] * 3
    assert len(free_experts(4, 32)) == 8 and len(free_experts(4, 16)) == 4  # 32 FFNs: 6 constants; 16: 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_pool_answers_in_the_dtype_of_its_tokens(dtype):
    pool = Pool(FFNBank(2, WIDTH, 4), free=free_experts(WIDTH, 2, constant=1)).to(dtype)
    plan = random_plan(6, 3, 5)
    assert pool(torch.randn(6, WIDTH, dtype=dtype), plan).dtype == dtype


def test_a_plan_for_other_tokens_is_refused():
    with pytest.raises(MoesaicError, match="for 4 tokens, but 5"):
        Pool(make_bank(3))(torch.randn(5, WIDTH), random_plan(4, 1, 3))


def test_an_empty_bank_is_refused():
    with pytest.raises(MoesaicError, match="at least 1"):
        FFNBank(0, 4, 4)


def test_reset_leaves_no_bias_behind():
    bank = make_bank(2, bias=True)
    bank.reset(std=0.5)
    assert not bank.gate_up_bias.any() and not bank.down_bias.any()
    assert 0.2 < float(bank.gate_up.detach().std()) < 0.8


# -- from a dense FFN -------------------------------------------------------------------------------------------------


def dense(gated, bias, channels=12):
    """Weights of a dense FFN and the function they are."""
    gate, up = (torch.randn(channels, WIDTH) for _ in range(2))
    gate_bias, up_bias, down_bias = torch.randn(channels), torch.randn(channels), torch.randn(WIDTH)
    down = torch.randn(WIDTH, channels) / channels
    if not bias:
        gate_bias = up_bias = down_bias = None
    if not gated:
        gate = gate_bias = None

    def run(x):
        hidden = F.linear(x, up, up_bias)
        return F.linear(F.silu(F.linear(x, gate, gate_bias)) * hidden if gated else F.silu(hidden), down, down_bias)

    return FFNWeights(up, down, gate, gate_bias, up_bias, down_bias), run


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize(("experts", "shared"), [(1, 0), (4, 0), (12, 0), (3, 1), (2, 4)])
def test_all_slices_together_are_the_dense_ffn(gated, bias, experts, shared):
    weights, run = dense(gated, bias)
    pool = slice_dense(weights, experts, F.silu, shared=shared)
    x = torch.randn(9, WIDTH)
    torch.testing.assert_close(pool(x, all_on(9, experts)), run(x), rtol=1e-5, atol=1e-5)
    if experts > 1:  # and one of them is missed
        missing = all_on(9, experts)
        missing.index, missing.weight = missing.index.clone(), missing.weight.clone()
        missing.index[:, 0], missing.weight[:, 0] = EMPTY, 0
        assert (pool(x, missing) - run(x)).abs().max() > 1e-2


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_scaled_slices_make_up_for_weights_that_sum_to_one(gated, bias):
    weights, run = dense(gated, bias)
    pool, plan, x = slice_dense(weights, 3, F.silu, shared=1, scale=3.0), all_on(5, 3), torch.randn(5, WIDTH)
    plan.weight = torch.full((5, 3), 1 / 3)
    torch.testing.assert_close(pool(x, plan), run(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("gated", "bias"), KINDS)
def test_copies_are_exact_and_noise_parts_them(gated, bias):
    weights, run = dense(gated, bias)
    bank = FFNBank(3, WIDTH, 12, F.silu, gated=gated, up_bias=bias, down_bias=bias)
    fill_copies(bank, weights)
    x = torch.randn(7, WIDTH)
    for expert in range(3):
        torch.testing.assert_close(bank.run(expert, x), run(x), rtol=1e-6, atol=1e-6)
    fill_copies(bank, weights, noise=0.1)
    error = bank.down - weights.down
    assert not torch.equal(bank.down[0], bank.down[1])
    assert float(error.detach().std() / weights.down.std()) == pytest.approx(0.1, rel=0.3)


def test_what_does_not_fit_is_refused():
    weights, _ = dense(gated=True, bias=False)
    biased, _ = dense(gated=True, bias=True)
    with pytest.raises(MoesaicError, match="12 channels cannot be cut evenly into 4 \\+ 1"):
        slice_dense(weights, 4, F.silu, shared=1)
    for wrong in (FFNBank(2, WIDTH, 11), FFNBank(2, WIDTH, 12, gated=False), FFNBank(2, WIDTH + 1, 12)):
        with pytest.raises(MoesaicError, match="does not fill 2 experts"):
            fill_copies(wrong, weights)
    with pytest.raises(MoesaicError, match="does not fill"):
        fill_slices([FFNBank(2, WIDTH, 5)], weights)
    with pytest.raises(MoesaicError, match="up bias"):
        fill_copies(FFNBank(2, WIDTH, 12, down_bias=True), biased)
    with pytest.raises(MoesaicError, match="down bias"):
        fill_copies(FFNBank(2, WIDTH, 12, up_bias=True), biased)


# -- in a model -------------------------------------------------------------------------------------------------------


class AllOnRouter(Router):
    """Every expert with weight one."""

    caps = Caps(reads=frozenset({"nothing"}), trainable=False)

    def __init__(self, experts):
        super().__init__(Nothing(experts), lambda logits, inp: all_on(*logits.shape))


@pytest.mark.parametrize("family", ["llama", "llama-mlp-bias", "phi3", "gpt2", "opt"])
@torch.no_grad()
def test_a_model_in_slices_is_the_dense_model(family):
    model, ids = tiny(family), torch.randint(3, 96, (2, 7))
    sliced = attach_router(model, AllOnRouter(3), experts=3, shared=1, upcycle="split")
    torch.testing.assert_close(sliced(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-mlp-bias", "phi3", "gpt2", "opt"])
@torch.no_grad()
def test_a_model_of_copies_is_the_dense_model(family):
    model, ids = tiny(family), torch.randint(3, 96, (2, 7))
    copies = attach_router(model, {"name": "top-k", "k": 2}, experts=3)
    torch.testing.assert_close(copies(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
