"""Every policy against plain Python written from its equation, and the invariants of plans, on ragged little inputs."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moesaic.errors import MoesaicError
from moesaic.routing.contract import EMPTY, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.policies import (
    ExpertChoice,
    Fixed,
    Random,
    RankK,
    Threshold,
    TopK,
    TopP,
    chosen,
    fixed,
)

GRID = st.integers(-12, 12).map(lambda quarter: quarter / 4)  # coarse, so that ties occur


@st.composite
def scores(draw):
    """Logits (N, E) as lists, from no token to a few: flat, all for one expert, or one token that no expert wants."""
    tokens, experts = draw(st.integers(0, 6)), draw(st.sampled_from([1, 2, 3, 5, 7]))
    rows = [[draw(GRID) for _ in range(experts)] for _ in range(tokens)]
    match draw(st.sampled_from(["plain", "one expert", "unwanted", "equal"])):
        case "one expert":
            rows = [[*row[:-1], 20.0] for row in rows]
        case "unwanted":
            rows[:1] = [[-20.0] * experts for _ in rows[:1]]
        case "equal":
            rows = [[0.5] * experts for _ in rows]
    return torch.tensor(rows).view(tokens, experts)


def route_input(tokens, draw=None, **fields):
    """`tokens` tokens in sequences 4, 7, ..., some padded, as `draw` says."""
    seq = torch.tensor([draw(st.sampled_from([4, 7])) for _ in range(tokens)] if draw else [0] * tokens).long()
    valid = torch.tensor([draw(st.booleans()) for _ in range(tokens)] if draw else [True] * tokens).bool()
    zeros = torch.zeros(tokens, dtype=torch.long)
    return RouteInput(ids=zeros, seq=seq, pos=torch.arange(tokens), valid=valid, **fields)


def softmax(row):
    exp = [math.exp(x - max(row)) for x in row]
    return [e / sum(exp) for e in exp]


def sigmoid(row):
    return [1 / (1 + math.exp(-x)) for x in row]


def slots(plan):
    """[{expert: weight} of each token], after the invariants are checked."""
    return [
        {int(e): float(w) for e, w in zip(index, weight, strict=True) if e != EMPTY}
        for index, weight in zip(plan.index, plan.weight, strict=True)
    ]


@given(scores(), st.data())
def test_top_k(logits, data):
    experts = logits.shape[1]
    k, weighting = data.draw(st.integers(1, experts)), data.draw(st.sampled_from(["one", "probs", "renorm"]))
    plan = TopK(k, weighting)(logits).check(experts)
    assert plan.index.shape == (len(logits), k) and plan.index.dtype == torch.int32
    for row, index, got in zip(logits.tolist(), plan.index.tolist(), plan.weight.tolist(), strict=True):
        assert [row[e] for e in index] == sorted(row, reverse=True)[:k]  # by value: any of equals may be taken
        best = [row[e] for e in index]
        wanted = {"one": [1.0] * k, "probs": [softmax(row)[e] for e in index], "renorm": softmax(best)}[weighting]
        assert got == pytest.approx(wanted, abs=1e-6)


@given(scores(), st.data())
def test_rank_k_is_the_last_slot_of_top_k(logits, data):
    experts = logits.shape[1]
    k, weighting = data.draw(st.integers(1, experts)), data.draw(st.sampled_from(["one", "probs"]))
    plan = RankK(k, weighting)(logits).check(experts)
    assert plan.index.shape == (len(logits), 1)
    for row, got in zip(logits.tolist(), slots(plan), strict=True):
        ((expert, weight),) = got.items()
        assert row[expert] == sorted(row, reverse=True)[k - 1]
        assert weight == pytest.approx(1.0 if weighting == "one" else softmax(row)[expert], abs=1e-6)


@given(scores(), st.floats(0.01, 1.0), st.one_of(st.none(), st.integers(1, 9)))
def test_top_p(logits, p, max_k):
    plan = TopP(p, max_k)(logits).check(logits.shape[1])
    for row, got in zip(logits.tolist(), slots(plan), strict=True):
        probs = softmax(row)
        wanted, before = [], 0.0
        for prob in sorted(probs, reverse=True):
            assume(abs(before - p) > 1e-6)  # a tie to rounding may fall either way
            if before < p and len(wanted) < (max_k or len(row)):
                wanted.append(prob)
            before += prob
        assert sorted(got.values(), reverse=True) == pytest.approx(wanted, abs=1e-6)
        assert got == pytest.approx({expert: probs[expert] for expert in got}, abs=1e-6)  # raw, not renormalised


def test_top_p_keeps_one_expert_however_sure_and_all_at_p_one():
    sure, flat = torch.tensor([[30.0, 0.0, 0.0]]), torch.zeros(1, 3)
    assert TopP(1e-9)(sure).used.sum() == 1
    assert TopP(1.0)(flat).used.sum() == 3
    assert TopP(1.0, max_k=2)(flat).used.sum() == 2


@given(scores(), st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_threshold(logits, threshold):
    plan = Threshold(threshold)(logits).check(logits.shape[1])
    for row, got in zip(logits.tolist(), slots(plan), strict=True):
        assume(all(abs(s - threshold) > 1e-6 or s == threshold for s in sigmoid(row)))
        assert got == pytest.approx({e: s for e, s in enumerate(sigmoid(row)) if s > threshold}, abs=1e-6)


@given(scores(), st.data())
def test_expert_choice(logits, data):
    tokens, experts = logits.shape
    capacity = data.draw(st.sampled_from([0.3, 0.5, 1.0, 2.0, 9.0]))
    scope, score = data.draw(st.sampled_from(["batch", "sequence"])), data.draw(st.sampled_from(["sigmoid", "softmax"]))
    weighting = data.draw(st.sampled_from(["probs", "one"]))
    inp = route_input(tokens, data.draw)
    plan = ExpertChoice(capacity, scope, score, weighting)(logits, inp).check(experts)
    got = slots(plan)
    probs = [(sigmoid if score == "sigmoid" else softmax)(row) for row in logits.tolist()]
    rows = [n for n in range(tokens) if inp.valid[n]]
    names = {"batch"} if scope == "batch" else {int(inp.seq[n]) for n in rows}
    assert all(not got[n] for n in range(tokens) if not inp.valid[n])  # padding takes no one's place
    for name in names:
        group = [n for n in rows if scope == "batch" or int(inp.seq[n]) == name]
        take = min(len(group), round(len(group) * capacity / experts))
        for expert in range(experts):
            taken = [n for n in group if expert in got[n]]
            wanted = sorted((probs[n][expert] for n in group), reverse=True)[:take]
            assert sorted((probs[n][expert] for n in taken), reverse=True) == pytest.approx(wanted, abs=1e-6)
            for n in taken:
                assert got[n][expert] == pytest.approx(1.0 if weighting == "one" else probs[n][expert], abs=1e-6)


def test_expert_choice_may_leave_a_token_to_no_expert_and_take_one_twice():
    logits = torch.tensor([[3.0, 3.0], [-9.0, -9.0], [2.0, 2.0], [-8.0, -8.0]])
    assert ExpertChoice()(logits).used.sum(-1).tolist() == [2, 0, 2, 0]


def splitmix(key):
    """splitmix64 on Python integers, from its published constants."""
    z = (key + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@given(st.data())
def test_random_is_the_hash_of_its_place(data):
    tokens, experts = data.draw(st.integers(0, 5)), data.draw(st.sampled_from([1, 2, 3, 7]))
    draw, seed = data.draw(st.sampled_from(["layer", "sequence", "token"])), data.draw(st.integers(-3, 2**62))
    inp = route_input(tokens, data.draw, layer=data.draw(st.integers(0, 99)), step=data.draw(st.integers(0, 10**6)))
    plan = Random(experts, draw, seed)(torch.zeros(tokens, experts), inp).check(experts)
    for n in range(tokens):
        key = 0
        parts = {"layer": [], "sequence": [inp.seq[n]], "token": [inp.seq[n], inp.pos[n]]}[draw]
        for part in (seed, inp.step, inp.layer, *map(int, parts)):
            key = splitmix(key + part)
        assert plan.index[n].tolist() == [(key >> 1) % 2**62 % experts]
    assert bool((plan.weight == 1).all())


def test_random_is_even_and_its_layers_are_independent():
    tokens, experts = 20_000, 5
    first, second = (Random(experts)(torch.zeros(1), route_input(tokens, layer=layer)).expert for layer in (0, 1))
    sigma = math.sqrt(tokens / experts * (1 - 1 / experts))
    assert (torch.bincount(first, minlength=experts) - tokens / experts).abs().max() < 5 * sigma
    agree = int((first == second).sum())
    assert abs(agree - tokens / experts) < 5 * sigma


@pytest.mark.parametrize("seed", [-1, 2**63 + 5, 2**64 - 1])
def test_random_takes_any_seed_a_generator_may_have(seed):
    Random(3)(torch.zeros(4, 3), route_input(4, generator=torch.Generator().manual_seed(seed))).check(3)


# -- sizes, and what is refused ---------------------------------------------------------------------------------------

ONE_OF_EACH = [
    TopK(2, "renorm"),
    TopK(2, "probs"),
    RankK(2, "probs"),
    TopP(0.4),
    Threshold(),
    ExpertChoice(),
    ExpertChoice(scope="sequence", score="softmax", weighting="one"),
    Random(3),
]


def named(policies):
    return pytest.mark.parametrize("policy", policies, ids=str)


@named(ONE_OF_EACH)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(policy, tokens):
    plan = policy(torch.randn(tokens, 3), route_input(tokens)).check(3)
    assert len(plan.index) == tokens


@named(ONE_OF_EACH)
def test_half_precision_logits_give_fp32_plans(policy):
    plan = policy(torch.randn(5, 3, dtype=torch.bfloat16), route_input(5)).check(3)
    assert plan.weight.dtype == torch.float32 and plan.index.dtype == torch.int32
    assert plan.scores is None or plan.scores.dtype == torch.float32


class Given(torch.nn.Module):
    """A scorer that answers with fixed logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.experts = logits, logits.shape[1]

    def forward(self, inp, state):
        return self.logits, state


@named(ONE_OF_EACH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused_before_any_policy_sees_them(policy, bad):
    logits = torch.randn(4, 3)
    logits[2, 1] = bad
    with pytest.raises(MoesaicError, match="layer 5 are not finite"):
        Router(Given(logits), policy).plan(route_input(4, layer=5), RouterState())


@named([TopK(4), RankK(4), TopK(0), TopK(-1), RankK(0), TopP(0.5, max_k=0), TopP(0.5, max_k=-2)])
def test_k_outside_the_experts_is_refused(policy):
    with pytest.raises(MoesaicError, match="k must be from 1"):
        policy(torch.randn(5, 3))


@pytest.mark.parametrize("p", [0.0, -0.1, 1.01, float("nan")])
def test_p_outside_its_range_is_refused(p):
    with pytest.raises(MoesaicError, match="above 0 and at most 1"):
        TopP(p)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(2, "softmax"),
        lambda: ExpertChoice(scope="micro"),
        lambda: ExpertChoice(score="tanh"),
        lambda: ExpertChoice(weighting="renorm"),
        lambda: Random(4, "batch"),
    ],
)
def test_an_unknown_option_never_means_another_one(make):
    with pytest.raises(MoesaicError, match="expected one of"):
        make()


def test_fixed_replays_and_refuses_other_tokens_and_more_layers():
    plans = [fixed(torch.tensor([0, 2, 1])), fixed(torch.tensor([1, 1, 1]))]
    replay = Fixed(plans)
    for layer, plan in enumerate(plans):
        assert replay(torch.zeros(3, 3), route_input(3, layer=layer)) is plan
    with pytest.raises(MoesaicError, match="for 3 tokens, but 4 are routed"):
        replay(torch.zeros(4, 3), route_input(4))
    with pytest.raises(MoesaicError, match="cover 2 layers, but layer 2"):
        replay(torch.zeros(3, 3), route_input(3, layer=2))


def test_chosen_uses_exactly_the_mask_and_carries_the_gradient():
    probs = torch.rand(4, 3, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
    plan = chosen(mask, probs).check(3)
    assert torch.equal(plan.used, mask)
    plan.weight.sum().backward()
    assert torch.equal(probs.grad, mask.float())


@given(scores(), st.randoms(use_true_random=False))
def test_select_is_the_plan_of_those_tokens(logits, random):
    rows = torch.tensor([random.randrange(len(logits)) for _ in range(3)] if len(logits) else []).long()
    plan = TopP(0.6)(logits)
    plan.aux = {"per token": torch.arange(len(logits)), "scalar": torch.tensor(2.0)}
    some, again = plan.select(rows), TopP(0.6)(logits[rows])
    assert torch.equal(some.index, again.index) and torch.equal(some.weight, again.weight)
    assert torch.equal(some.aux["per token"], rows) and some.aux["scalar"] == 2


@pytest.mark.parametrize(
    ("index", "weight", "message"),
    [
        ([[0], [1]], [[1.0]], "differ"),
        ([[3]], [[1.0]], "outside"),
        ([[-2]], [[0.0]], "outside"),
        ([[0, EMPTY]], [[1.0, 0.1]], "empty slot"),
        ([[0]], [[-0.5]], "negative"),
        ([[0]], [[float("inf")]], "finite"),
        ([[1, 0, 1]], [[0.2, 0.2, 0.2]], "two slots"),
    ],
)
def test_check_finds_each_broken_invariant(index, weight, message):
    with pytest.raises(ValueError, match=message):
        RoutePlan(torch.tensor(index).int(), torch.tensor(weight)).check(3)
