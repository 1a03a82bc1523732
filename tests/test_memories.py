"""MoM: the chunked form, the step form and the paper's recurrence agree; nothing leaks between memories."""

import pytest
import torch
import torch.nn.functional as F

from moesaic.balance.load_balance import LoadBalance
from moesaic.errors import MoesaicError
from moesaic.experts import memories
from moesaic.experts.memories import MixtureOfMemories
from moesaic.routing.contract import EMPTY, RouteInput, RoutePlan
from moesaic.routing.top_k import TopKRouter

WIDTH, MEMORIES, HEADS = 12, 5, 2
UPDATES = ["linear", "gated_delta"]


def mixer(update="linear", **options):
    options = {"memories": MEMORIES, "k": 2, "heads": HEADS, "key_width": 3, "value_width": 5} | options
    return MixtureOfMemories(WIDTH, update=update, **options)


def router(k=2, experts=MEMORIES):
    made = TopKRouter(WIDTH, experts, 1, k=k)
    torch.nn.init.normal_(made.scorer.heads[0].weight)
    return made


def tokens(batch=2, length=11, k=2, valid=None):
    """Hidden states, and the plan a router makes of them."""
    x = torch.randn(batch, length, WIDTH)
    fields = {} if valid is None else {"valid": valid.flatten()}
    return x, router(k).plan(RouteInput.of(torch.zeros(batch, length, dtype=torch.long), x, **fields))[0]


def at(plan, batch, length, times):
    """The plan of some time steps."""
    return plan.select(torch.arange(batch * length).view(batch, length)[:, times].flatten())


def by_steps(mix, x, plan, state=None, valid=None):
    batch, length = x.shape[:2]
    state = mix.initial(batch) if state is None else state
    outs = []
    for t in range(length):
        y, state = mix.step(x[:, t], at(plan, batch, length, [t]), state, None if valid is None else valid[:, t])
        outs.append(y)
    return torch.stack(outs, 1), state


def paper(mix, x, plan, valid=None):
    """Equations 3-8 for one sequence at a time, one head at a time: mix the memories, then read; no convolutions."""
    batch, length, keys = x.shape[0], x.shape[1], mix.heads * mix.key_width
    outs = torch.zeros(batch, length, mix.heads, mix.value_width)
    final = torch.zeros(batch, mix.memories + mix.shared, mix.heads, mix.key_width, mix.value_width)
    for b in range(batch):
        state = [torch.zeros(mix.heads, mix.key_width, mix.value_width) for _ in range(mix.memories + mix.shared)]
        for t in range(length):
            if valid is not None and not valid[b, t]:
                continue
            row = b * length + t
            gates = {int(m): w for m, w in zip(plan.index[row], plan.weight[row], strict=True) if m != EMPTY}
            gates |= {mix.memories: 1.0} if mix.shared else {}
            q = (mix.query.weight @ x[b, t]).view(mix.heads, -1)
            mixed = torch.zeros(mix.heads, mix.key_width, mix.value_width)
            for m, gate in gates.items():
                kv = x[b, t] @ mix.key_value[m]
                k, v = kv[:keys].view(mix.heads, -1), kv[keys:].view(mix.heads, -1)
                new = []
                for h in range(mix.heads):
                    if mix.update == "linear":
                        new.append(state[m][h] + torch.outer(k[h], v[h]))
                        continue
                    rates = x[b, t] @ mix.rates[m]
                    beta = rates[h].sigmoid()
                    decay = (-mix.log_decay[h].exp() * F.softplus(rates[mix.heads + h] + mix.decay_bias[h])).exp()
                    unit = k[h] / k[h].norm()
                    erase = torch.eye(mix.key_width) - beta * torch.outer(unit, unit)
                    new.append(decay * erase @ state[m][h] + beta * torch.outer(unit, v[h]))
                state[m] = torch.stack(new)
                mixed = mixed + gate * state[m]
            if mix.update == "gated_delta":
                q = q / q.norm(dim=-1, keepdim=True)
            outs[b, t] = torch.einsum("hx,hxy->hy", q, mixed)
        final[b] = torch.stack(state)
    scale = (outs.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    gated = (outs * scale * mix.norm.weight).flatten(-2) * F.silu(x @ mix.gate.weight.T)
    return gated @ mix.out.weight.T, final


def gradients(mix, y, x, plan):
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return torch.autograd.grad(loss, [*mix.parameters(), x, plan.weight], allow_unused=True)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("update", UPDATES)
def test_both_forms_are_the_papers_recurrence_in_outputs_states_and_gradients(update, shared, monkeypatch):
    monkeypatch.setattr(memories, "CHUNK", 4)  # several chunks, the last one ragged
    mix = mixer(update, shared=shared)
    x, plan = tokens(2, 13)
    x.requires_grad_()
    want, state = paper(mix, x, plan)
    expected = gradients(mix, want, x, plan)
    for form in (mix.forward, lambda *a: by_steps(mix, *a)):
        y, last = form(x, plan)
        torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(last.memories, state, atol=1e-4, rtol=1e-4)
        for got, twin in zip(gradients(mix, y, x, plan), expected, strict=True):
            torch.testing.assert_close(got, twin, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("conv", [0, 2, 4])
@pytest.mark.parametrize("update", UPDATES)
def test_chunked_equals_steps_over_several_chunks_and_from_a_state(update, conv):
    mix = mixer(update, conv=conv)
    x, plan = tokens(3, 150)
    y, last = mix(x, plan)
    steps, stepped = by_steps(mix, x, plan)
    torch.testing.assert_close(y, steps, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last.memories, stepped.memories, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last.recent, stepped.recent)
    first, state = mix(x[:, :67], at(plan, 3, 150, slice(0, 67)))
    rest, again = mix(x[:, 67:], at(plan, 3, 150, slice(67, 150)), state)
    torch.testing.assert_close(torch.cat([first, rest], 1), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.memories, last.memories, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("update", UPDATES)
def test_unselected_memories_stay_bitwise_as_they_are(update, conv):
    mix = mixer(update, conv=conv)
    x, plan = tokens(2, 20)
    _, state = mix(x, plan)
    before = state.memories.clone()
    only = RoutePlan(torch.tensor([[1, EMPTY], [3, 1]], dtype=torch.int32), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    for new in (mix.step(x[:, 0], only, state)[1], mix(x[:, :1], only, state)[1]):
        for b, chosen in enumerate([{1}, {1, 3}]):
            for m in range(MEMORIES + 1):
                written = m in chosen or m == MEMORIES
                assert torch.equal(new.memories[b, m], before[b, m]) != written
                if conv:
                    assert torch.equal(new.recent[b, m], state.recent[b, m]) != written
    assert torch.equal(state.memories, before)  # the old state is not touched


@pytest.mark.parametrize("conv", [0, 4])
@pytest.mark.parametrize("update", UPDATES)
def test_a_token_reaches_only_later_ones_of_its_sequence_through_a_common_memory(update, conv):
    mix = mixer(update, conv=conv, shared=False)
    x, _ = tokens(2, 9)
    index = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 3], [0, 3], [1, 0], [3, 4], [4, 1], [0, 1]])
    plan = RoutePlan(index.repeat(2, 1).int(), torch.full((18, 2), 0.5))
    y, last = mix(x, plan)
    changed = x.clone()
    changed[0, 3] += 1.0  # memories 2 and 3
    other, final = mix(changed, plan)
    same = (y == other).all(-1)
    common = torch.tensor([bool({2, 3} & set(row.tolist())) for row in index])
    expected = torch.stack([~(common & (torch.arange(9) >= 3)), torch.ones(9, dtype=torch.bool)])
    assert torch.equal(same, expected)
    assert [torch.equal(last.memories[0, m], final.memories[0, m]) for m in range(5)] == [
        True,
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("update", UPDATES)
def test_causal(update):
    mix = mixer(update, conv=4)
    x, plan = tokens(1, 30)
    whole, _ = mix(x, plan)
    part, _ = mix(x[:, :17], at(plan, 1, 30, slice(0, 17)))
    torch.testing.assert_close(whole[:, :17], part, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("update", UPDATES)
def test_padding_on_either_side_changes_nothing_and_reads_zero(update, conv):
    mix = mixer(update, conv=conv)
    valid = torch.ones(3, 10, dtype=torch.bool)
    valid[0, :4], valid[1, 7:], valid[2, [0, 4, 9]] = False, False, False
    x, plan = tokens(3, 10, valid=valid)
    y, last = mix(x, plan, None, valid)
    stepped, state = by_steps(mix, x, plan, valid=valid)
    torch.testing.assert_close(stepped, y, atol=1e-4, rtol=1e-4)
    assert (y[~valid] == 0).all() and (stepped[~valid] == 0).all()
    for b in range(3):
        rows = torch.arange(30).view(3, 10)[b][valid[b]]
        alone, final = mix(x[b][valid[b]][None], plan.select(rows))
        torch.testing.assert_close(y[b][valid[b]], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last.memories[b], final.memories[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state.recent[b], final.recent[0])
    _, untouched = mix(x, plan, last, torch.zeros_like(valid))
    assert torch.equal(untouched.memories, last.memories) and torch.equal(untouched.recent, last.recent)


def test_reading_is_linear_mix_then_read_is_read_then_mix():
    mix = mixer("gated_delta")
    x, plan = tokens(4, 8)
    _, state = mix(x, plan)
    q = F.normalize(mix.query(x[:, -1]).view(4, HEADS, -1), dim=-1)
    last = at(plan, 4, 8, [7])
    chosen = state.memories[torch.arange(4)[:, None], last.index.long()]  # (B, K, H, X, Y)
    mixed = torch.einsum("bhx,bhxy->bhy", q, torch.einsum("bk,bkhxy->bhxy", last.weight, chosen))
    read = torch.einsum("bk,bkhy->bhy", last.weight, torch.einsum("bhx,bkhxy->bkhy", q, chosen))
    torch.testing.assert_close(mixed, read)


@pytest.mark.parametrize("update", UPDATES)
def test_the_gradient_reaches_the_router_and_balance_applies_to_its_plans(update):
    made, mix = router(), mixer(update)
    x = torch.randn(2, 9, WIDTH)
    plan, _ = made.plan(RouteInput.of(torch.zeros(2, 9, dtype=torch.long), x))
    mix(x, plan)[0].square().sum().backward()
    assert made.scorer.heads[0].weight.grad.abs().max() > 1e-6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mix.parameters())
    assert float(LoadBalance()([plan], torch.ones(18, dtype=torch.bool)).detach()) > 0


def test_strong_decay_over_a_chunk_gives_finite_gradients():
    mix = mixer("gated_delta")
    with torch.no_grad():
        mix.log_decay.fill_(6.0)  # log decay of minus hundreds a step: its inverse overflows
        mix.decay_bias.fill_(3.0)
    x, plan = tokens(1, 70)
    x.requires_grad_()
    y, _ = mix(x, plan)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in mix.parameters())


def test_one_memory_with_weight_one_is_plain_linear_attention():
    mix = mixer("linear", memories=1, k=1, shared=False)
    x = torch.randn(2, 9, WIDTH)
    plan = RoutePlan(torch.zeros(18, 1, dtype=torch.int32), torch.ones(18, 1))
    q = mix.query(x).view(2, 9, HEADS, -1)
    k, v = (x @ mix.key_value[0]).split([HEADS * 3, HEADS * 5], -1)
    scores = torch.einsum("bshx,bthx->bhst", q, k.view(2, 9, HEADS, -1)).tril()
    read = torch.einsum("bhst,bthy->bshy", scores, v.view(2, 9, HEADS, -1))
    want = mix.out(mix.norm(read).flatten(-2) * F.silu(mix.gate(x)))
    torch.testing.assert_close(mix(x, plan)[0], want, atol=1e-5, rtol=1e-5)


def test_an_empty_slot_is_no_slot():
    mix = mixer()
    x, _ = tokens(1, 6)
    full = RoutePlan(torch.zeros(6, 1, dtype=torch.int32), torch.full((6, 1), 0.7))
    half = RoutePlan(torch.tensor([[0, EMPTY]] * 6, dtype=torch.int32), torch.tensor([[0.7, 0.0]] * 6))
    torch.testing.assert_close(mix(x, half)[0], mix(x, full)[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(by_steps(mix, x, half)[1].memories, mix(x, full)[1].memories, atol=1e-5, rtol=1e-5)


def test_state_size_is_fixed_and_counted():
    mix = mixer("linear", conv=4)
    x, plan = tokens(2, 40)
    state = mix(x, plan)[1]
    assert state.memories.shape == (2, MEMORIES + 1, HEADS, 3, 5)
    assert state.recent.shape == (2, MEMORIES + 1, 3, HEADS * (3 + 3 + 5))
    assert state.bytes == mix.initial(2).bytes == 4 * 2 * 6 * (2 * 3 * 5 + 3 * 22)


@pytest.mark.parametrize("update", UPDATES)
def test_memories_stay_fp32_in_half_precision_and_under_autocast(update):
    mix = mixer(update, conv=2)
    x, plan = tokens(2, 9)
    want, state = mix(x, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, last = mix(x, plan)
        mix.step(x[:, 0], at(plan, 2, 9, [0]), last)
    torch.testing.assert_close(y.float(), want, atol=0.1, rtol=0.1)
    assert last.memories.dtype == torch.float32
    half, low = mix.bfloat16()(x.bfloat16(), plan)
    half_step, low_step = mix.step(x[:, 0].bfloat16(), at(plan, 2, 9, [0]), low)
    assert half.dtype == half_step.dtype == torch.bfloat16
    assert low.memories.dtype == low_step.memories.dtype == torch.float32
    torch.testing.assert_close(low.memories, state.memories, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"update": "ema"}, "linear or gated_delta"),
        ({"k": 6}, "k = 6 of 5"),
        ({"k": 0}, "k = 0"),
        ({"conv": 1}, "conv = 1"),
        ({"key_width": -1}, "keys of -1"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(MoesaicError, match=words):
        mixer(**options)


def test_plans_states_and_masks_that_do_not_fit_are_named():
    mix = mixer()
    x, plan = tokens(2, 11)
    with pytest.raises(MoesaicError, match="plan is for 22 tokens"):
        mix(x[:, :5], plan)
    with pytest.raises(MoesaicError, match="takes top-2 of 5"):
        mix(*tokens(2, 11, k=3))
    with pytest.raises(MoesaicError, match="goes up to memory 7"):
        mix(x, RoutePlan(torch.full((22, 1), 7, dtype=torch.int32), torch.ones(22, 1)))
    with pytest.raises(MoesaicError, match="state is of 3 sequences"):
        mix(x, plan, mix.initial(3))
    with pytest.raises(MoesaicError, match="mask is"):
        mix(x, plan, None, torch.ones(2, 10, dtype=torch.bool))
