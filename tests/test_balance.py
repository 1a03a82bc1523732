"""Losses over plans, each against its equation: scopes of the balance loss, padding, gradients, and two processes."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moesaic.balance.load_balance import (
    LoadBalance,
    device_balance_loss,
    expert_counts,
    expert_load,
    load_balancing_loss,
    scores_of,
)
from moesaic.balance.router_losses import consistency_loss, router_entropy, z_loss
from moesaic.errors import MoesaicError
from moesaic.routing.contract import EMPTY, RoutePlan
from moesaic.routing.policies import TopK, TopP, chosen, fixed
from moesaic.routing.zero_computation import heterogeneous_eta

TOKENS, EXPERTS, LAYERS = 12, 4, 3


def some_plans(tokens=TOKENS, layers=LAYERS, k=2, seed=0, experts=EXPERTS):
    generator = torch.Generator().manual_seed(seed)
    return [TopK(k, "renorm")(2 * torch.randn(tokens, experts, generator=generator)) for _ in range(layers)]


def all_valid(tokens=TOKENS):
    return torch.ones(tokens, dtype=torch.bool)


def even_plan(tokens=TOKENS, k=1, experts=EXPERTS):
    """Token n uses experts n, n + 1, ...; scores are flat."""
    index = (torch.arange(tokens)[:, None] + torch.arange(k)) % experts
    return RoutePlan(index.int(), torch.ones(tokens, k), logits=torch.zeros(tokens, experts))


def collapsed(expert, tokens=TOKENS, experts=EXPERTS, sure=20.0):
    """Every token to one expert, and sure of it."""
    logits = torch.zeros(tokens, experts)
    logits[:, expert] = sure
    return TopK(1, "probs")(logits)


def by_hand(plans, valid, eta=None, scale=None):
    """scale * sum_e eta_e f_e P_e, mean over layers, one number at a time."""
    losses = []
    for plan in plans:
        probs, experts = plan.logits.softmax(-1).tolist(), plan.logits.shape[1]
        rows = [n for n in range(len(probs)) if valid[n]]
        picks = [e for n in rows for e in plan.index[n].tolist() if e != EMPTY]
        share = [picks.count(e) / max(1, len(picks)) for e in range(experts)]
        mean = [sum(probs[n][e] for n in rows) / max(1, len(rows)) for e in range(experts)]
        weights = eta or [1.0] * experts
        factor = experts if scale is None else scale
        losses.append(factor * sum(h * f * p for h, f, p in zip(weights, share, mean, strict=True)))
    return sum(losses) / len(losses)


# -- counting ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 99))
def test_counts_are_the_used_slots_of_valid_tokens(tokens, k, seed):
    torch.manual_seed(seed)
    plan, valid = TopP(0.6, max_k=k)(torch.randn(tokens, 4)), torch.rand(tokens) < 0.7
    counts = expert_counts(plan.index, 4, valid)
    assert counts.sum() == plan.used[valid].sum()
    for expert in range(4):
        assert counts[expert] == sum(expert in row for row in plan.index[valid].tolist())
    load = expert_load(plan.index, 4, valid)
    assert float(load.sum()) == pytest.approx(1.0 if counts.any() else 0.0)


# -- one loss, its scopes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
def test_an_even_router_gives_one_whatever_k_is(k, scope):
    plans, seq = [even_plan(k=k)] * 2, torch.arange(TOKENS) // 4
    assert float(LoadBalance(scope)(plans, all_valid(), seq)) == pytest.approx(1)
    assert float(load_balancing_loss(even_plan().logits + torch.eye(4).repeat(3, 1))) == pytest.approx(1)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_micro_is_the_equation(tokens, k, seed):
    plans, valid = some_plans(tokens, 2, k, seed), torch.rand(tokens) < 0.7
    eta = heterogeneous_eta(3, 1, tau=0.25)
    assert float(LoadBalance()(plans, valid)) == pytest.approx(by_hand(plans, valid), abs=1e-6)
    assert float(LoadBalance(eta=eta, scale=2.0)(plans, valid)) == pytest.approx(
        by_hand(plans, valid, eta, 2), abs=1e-6
    )


def test_one_expert_for_all_gives_the_number_of_experts():
    assert float(LoadBalance()([collapsed(1)], all_valid())) == pytest.approx(EXPERTS, rel=1e-5)


def test_complementary_collapse_of_two_layers_is_not_balance():
    plans = [collapsed(layer) for layer in range(EXPERTS)]  # pooled over layers, every expert has its quarter
    pooled = RoutePlan(
        torch.cat([p.index for p in plans]), torch.cat([p.weight for p in plans]), torch.cat([p.logits for p in plans])
    )
    assert float(LoadBalance()([pooled], all_valid(TOKENS * EXPERTS))) == pytest.approx(1, rel=1e-5)
    for scope in ("micro", "global", "sequence"):
        loss = LoadBalance(scope)(plans, all_valid(), torch.arange(TOKENS) // 6)
        assert float(loss) == pytest.approx(EXPERTS, rel=1e-5)


def test_perfect_specialisation_is_fine_for_the_global_scope_alone():
    micro, whole = LoadBalance("micro"), LoadBalance("global")
    batches = [[collapsed(expert)] for expert in range(EXPERTS)]  # each micro-batch one domain, with its own expert
    for plans in batches:
        assert float(micro(plans, all_valid())) == pytest.approx(EXPERTS, rel=1e-5)
        last = whole(plans, all_valid())
    assert float(last) == pytest.approx(1, rel=1e-5)


def test_sequence_scope_is_the_mean_over_sequences():
    plans, seq = some_plans(), torch.tensor([7] * 5 + [2] * 4 + [9] * 3)
    valid = torch.tensor([True] * 4 + [False] + [True] * 4 + [False] * 3)  # sequence 9 is all padding
    wanted = (by_hand(plans, valid & (seq == 7)) + by_hand(plans, valid & (seq == 2))) / 2
    assert float(LoadBalance("sequence")(plans, valid, seq)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
def test_padding_is_excluded(scope):
    plans, valid, seq = some_plans(), torch.arange(TOKENS) % 3 != 0, torch.arange(TOKENS) // 6
    alone = LoadBalance(scope)([plan.select(valid) for plan in plans], all_valid(int(valid.sum())), seq[valid])
    torch.testing.assert_close(LoadBalance(scope)(plans, valid, seq), alone)
    changed = [plan.select(torch.arange(TOKENS)) for plan in plans]
    for plan in changed:
        plan.index[~valid], plan.logits[~valid] = 0, 99.0
    torch.testing.assert_close(LoadBalance(scope)(changed, valid, seq), alone)


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
def test_nothing_but_padding_is_no_loss(scope):
    loss = LoadBalance(scope)(some_plans(), ~all_valid(), torch.zeros(TOKENS).long())
    assert float(loss) == 0


# -- global: gradient accumulation ------------------------------------------------------------------------------------


def test_mean_of_local_terms_with_global_shares_is_the_loss_of_the_whole_batch():
    """2501.11873: eq. 4 equals eq. 6 for micro-batches of equal size."""
    plans, valid = some_plans(), all_valid()
    parts = torch.arange(TOKENS).split(TOKENS // 3)
    whole = LoadBalance("micro")(plans, valid)
    balance, total = LoadBalance("global"), 0.0
    counts = torch.stack([expert_counts(plan.index, EXPERTS) for plan in plans])
    for part in parts:
        own = [plan.select(part) for plan in plans]
        others = counts - torch.stack([expert_counts(plan.index, EXPERTS) for plan in own])
        balance.counts_LE = others  # as if every other micro-batch had been counted
        total = total + balance(own, all_valid(len(part)))
    torch.testing.assert_close(total / 3, whole)
    micro = torch.stack([LoadBalance()([p.select(part) for p in plans], all_valid(4)) for part in parts]).mean()
    assert abs(float(micro - whole)) > 1e-3  # eq. 3 is another loss


def test_global_counts_grow_until_reset():
    balance, plans = LoadBalance("global"), some_plans()
    halves = [[plan.select(torch.arange(start, start + 6)) for plan in plans] for start in (0, 6)]
    first = balance(halves[0], all_valid(6))
    torch.testing.assert_close(first, LoadBalance()(halves[0], all_valid(6)))  # the first sees itself alone
    second = balance(halves[1], all_valid(6))
    counts = torch.stack([expert_counts(plan.index, EXPERTS) for plan in plans])
    assert torch.equal(balance.counts_LE, counts)
    share = counts / counts.sum(-1, keepdim=True)
    mean = torch.stack([plan.scores.mean(0) for plan in halves[1]])
    torch.testing.assert_close(second, EXPERTS * (share * mean).sum(-1).mean())
    balance.reset()
    torch.testing.assert_close(balance(halves[0], all_valid(6)), first)


def test_micro_floor_adds_its_share_of_the_micro_loss():
    plans, valid = some_plans(), all_valid()
    plain, micro = LoadBalance("global")(plans, valid), LoadBalance()(plans, valid)
    torch.testing.assert_close(LoadBalance("global", micro_floor=0.01)(plans, valid), plain + 0.01 * micro)


def two_processes(rank, store, results):
    """One rank of a real process group: the loss and gradient of its half of the batch, two accumulation steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        balance, valid = LoadBalance("global"), all_valid(6)
        for step in range(2):
            plans = [plan.select(torch.arange(rank * 6, rank * 6 + 6)) for plan in some_plans(seed=step)]
            for plan in plans:
                plan.logits = plan.logits.clone().requires_grad_()
            loss = balance(plans, valid)
            loss.backward()
            results[rank, step, 0, 0, 0] = loss.detach()
            results[rank, step, 1:] = torch.stack([plan.logits.grad for plan in plans])
    finally:
        dist.destroy_process_group()


def test_two_processes_share_counts_but_not_gradients(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    results = torch.zeros(2, 2, 1 + LAYERS, 6, EXPERTS).share_memory_()
    torch.multiprocessing.spawn(two_processes, (str(tmp_path / "store"), results), nprocs=2)
    # Step 0: the mean over ranks is the loss of the whole batch (eq. 4 = eq. 6), and so are the gradients.
    plans = some_plans(seed=0)
    for plan in plans:
        plan.logits.requires_grad_()
    whole = LoadBalance()(plans, all_valid())
    whole.backward()
    torch.testing.assert_close(results[:, 0, 0, 0, 0].mean(), whole.detach())
    for layer, plan in enumerate(plans):
        torch.testing.assert_close(torch.cat(list(results[:, 0, 1 + layer])) / 2, plan.logits.grad)
    # Step 1: shares over both ranks and both steps, P of this step.
    both = [some_plans(seed=step) for step in range(2)]
    counts = torch.stack([sum(expert_counts(p.index, EXPERTS) for p in layer) for layer in zip(*both, strict=True)])
    mean = torch.stack([plan.scores.mean(0) for plan in both[1]])
    wanted = EXPERTS * (counts / counts.sum(-1, keepdim=True) * mean).sum(-1).mean()
    torch.testing.assert_close(results[:, 1, 0, 0, 0].mean(), wanted)
    local = [LoadBalance()([p.select(torch.arange(r * 6, r * 6 + 6)) for p in both[0]], all_valid(6)) for r in range(2)]
    assert abs(float(torch.stack(local).mean() - whole.detach())) > 1e-3  # without the all-reduce it would be this


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_the_gradient_comes_through_the_mean_score_alone(scope):
    plans = some_plans()
    for plan in plans:
        plan.logits.requires_grad_()
    LoadBalance(scope)(plans, all_valid()).backward()
    for plan in plans:
        logits = plan.logits.detach().clone().requires_grad_()
        share = torch.bincount(plan.index.flatten().long(), minlength=EXPERTS) / plan.index.numel()
        (EXPERTS * (share * logits.softmax(-1).mean(0)).sum() / LAYERS).backward()
        torch.testing.assert_close(plan.logits.grad, logits.grad)


def test_descending_the_loss_evens_the_load():
    x, weight = torch.randn(256, 8), torch.nn.Parameter(torch.randn(8, EXPERTS) + torch.tensor([3.0, 0, 0, 0]))
    x[:, 0] = x[:, 0].abs()
    optimizer, peak = torch.optim.Adam([weight], lr=0.05), []
    for _ in range(60):
        plan = TopK(1, "probs")(x @ weight)
        peak.append(float(expert_load(plan.index, EXPERTS).max()))
        loss = LoadBalance()([plan], all_valid(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert peak[-1] < 0.4 < peak[0]


# -- devices, entropy, z, consistency ---------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0, 1, 2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]]], ids=str)
def test_device_balance_is_one_when_even_and_the_equation_otherwise(groups):
    assert float(device_balance_loss([even_plan(k=2)] * 2, groups, all_valid())) == pytest.approx(1)
    plans, valid = some_plans(), torch.arange(TOKENS) % 5 != 0
    wanted = 0.0
    for plan in plans:
        tokens, k = int(valid.sum()), plan.index.shape[1]
        f = [EXPERTS / (k * tokens) * sum(e in row for row in plan.index[valid].tolist()) for e in range(EXPERTS)]
        p = plan.scores[valid].mean(0).tolist()
        wanted += sum(sum(f[e] for e in group) / len(group) * sum(p[e] for e in group) for group in groups) / LAYERS
    assert float(device_balance_loss(plans, groups, valid)) == pytest.approx(wanted, abs=1e-6)


def test_devices_may_be_even_while_their_experts_are_not():
    logits = torch.full((2, 4), -20.0)
    logits[0, 0] = logits[1, 2] = 20.0  # two experts idle, one on each device
    plans = [TopK(1)(logits)]
    assert float(device_balance_loss(plans, [[0, 1], [2, 3]], all_valid(2))) == pytest.approx(1)
    assert float(LoadBalance()(plans, all_valid(2))) == pytest.approx(2)


def test_entropy_is_positive_and_least_for_a_sure_router():
    valid = all_valid()
    flat, sure = router_entropy([even_plan()], valid), router_entropy([collapsed(2, sure=200.0)], valid)
    assert float(flat) == pytest.approx(math.log(EXPERTS)) and float(sure) == pytest.approx(0, abs=1e-6)
    logits = torch.tensor([[1.0, 0.0]], requires_grad=True)
    router_entropy([TopK(1)(logits)], all_valid(1)).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]  # descent sharpens: the sign the method needs
    assert not router_entropy([collapsed(2, sure=1e4)], valid).isnan()


def test_entropy_and_z_are_means_over_layers_and_valid_tokens():
    plans, valid = some_plans(), torch.arange(TOKENS) % 4 != 1
    rows = [plan.logits[n].tolist() for plan in plans for n in range(TOKENS) if valid[n]]
    sums = [sum(math.exp(x) for x in row) for row in rows]
    entropy = [
        -sum(math.exp(x) / z * math.log(math.exp(x) / z) for x in row) for row, z in zip(rows, sums, strict=True)
    ]
    assert float(router_entropy(plans, valid)) == pytest.approx(sum(entropy) / len(rows), rel=1e-5)
    assert float(z_loss(plans, valid)) == pytest.approx(sum(math.log(z) ** 2 for z in sums) / len(rows), rel=1e-5)


def test_consistency_is_the_symmetric_divergence_of_two_forwards():
    first, second = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    valid, total = torch.tensor([True, False, True]), 0.0
    for n in (0, 2):
        p, q = first[n].softmax(-1).tolist(), second[n].softmax(-1).tolist()
        there, back = (sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in ((p, q), (q, p)))
        total += (there + back) / 2
    loss = consistency_loss(first, second, valid)
    assert float(loss.detach()) == pytest.approx(total / 2, rel=1e-4)
    torch.testing.assert_close(loss.detach(), consistency_loss(second, first.detach(), valid))
    assert float(consistency_loss(second, second, valid)) == 0
    loss.backward()
    assert first.grad[valid].any() and not first.grad[1].any()
    extreme = consistency_loss(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]).half(), all_valid(1))
    assert float(extreme) == pytest.approx(200, rel=1e-4)  # logs of softmax, not softmax then log


# -- what is refused --------------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    plans, valid = some_plans(), all_valid()
    with pytest.raises(MoesaicError, match="micro, sequence, global"):
        LoadBalance("batch")
    with pytest.raises(MoesaicError, match="sequence number"):
        LoadBalance("sequence")(plans, valid)
    with pytest.raises(MoesaicError, match="at least one layer"):
        LoadBalance()([], valid)
    with pytest.raises(MoesaicError, match="no scores"):
        LoadBalance()([fixed(torch.zeros(TOKENS))], valid)
    with pytest.raises(MoesaicError, match="no logits"):
        z_loss([fixed(torch.zeros(TOKENS))], valid)
    with pytest.raises(MoesaicError, match="eta has 3 weights, but the plans choose among 4"):
        LoadBalance(eta=[1.0] * 3)(plans, valid)


def test_scores_are_the_plans_own_where_they_are_not_a_softmax():
    probs = torch.rand(4, 3)
    assert scores_of(chosen(probs > 0.5, probs, probs.logit())) is probs


def test_heterogeneous_eta_makes_free_experts_cheap():
    assert heterogeneous_eta(2, 3, 0.25) == [1.0, 1.0, 0.25, 0.25, 0.25]
    free, ffn = [collapsed(3)], [collapsed(0)]
    balance = LoadBalance(eta=heterogeneous_eta(3, 1, 0.25))
    assert float(balance(free, all_valid()) / balance(ffn, all_valid())) == pytest.approx(0.25, rel=1e-5)
