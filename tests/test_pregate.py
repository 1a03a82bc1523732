"""The pre-gate: incremental routing equals full-prefix routing, padding changes nothing, causality holds."""

import pytest
import torch
from transformers import DynamicCache

from moesaic.errors import MoesaicError
from moesaic.routing.contract import RoutePlan
from moesaic.routing.policies import TopK, fixed
from moesaic.routing.pregate import PreGate, PreGateConfig, positions


@pytest.fixture
def pregate() -> PreGate:
    torch.manual_seed(0)
    gate = PreGate(PreGateConfig(vocab_size=50, experts=5, width=32, mlp_width=32, layers=2)).eval()
    for parameter in gate.parameters():  # far from initialisation, so that routes vary with context
        torch.nn.init.normal_(parameter, std=0.4)
    return gate


def naive(gate: PreGate, ids: torch.Tensor) -> torch.Tensor:
    """One sequence, written from the equations: no cache, no mask tensor, attention by loops. (S, E)."""
    h = gate.embedding.weight[ids]
    half = gate.config.width // gate.config.heads // 2
    frequency = gate.config.rope_theta ** (-torch.arange(half) / half)
    for layer in gate.layers:
        q, k, v = layer.qkv(layer.attention_norm(h)).view(len(ids), 3, layer.heads, layer.head_width).unbind(1)
        out = torch.zeros_like(q)
        for t in range(len(ids)):
            for head in range(layer.heads):
                turned = []
                for vector, position in [(q[t, head], t), *((k[s, head], s) for s in range(t + 1))]:
                    a, b = vector.chunk(2)
                    cos, sin = (position * frequency).cos(), (position * frequency).sin()
                    turned.append(torch.cat([a * cos - b * sin, b * cos + a * sin]))
                scores = torch.stack([turned[0] @ key for key in turned[1:]]) / layer.head_width**0.5
                out[t, head] = scores.softmax(0) @ v[: t + 1, head]
        h = h + layer.out(out.flatten(1))
        h = h + layer.down(torch.nn.functional.silu(layer.up(layer.mlp_norm(h))))
    return gate.head(gate.norm(h))


@torch.no_grad()
def test_equals_the_equations(pregate):
    ids = torch.randint(50, (1, 9))
    torch.testing.assert_close(pregate(ids)[0], naive(pregate, ids[0]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 1, 5], [3, 9]])
def test_incremental_equals_full_prefix(pregate, chunks):
    ids, cache, parts = torch.randint(50, (3, 12)), DynamicCache(), []
    for piece in ids.split(chunks, dim=1):
        parts.append(pregate(piece, cache=cache))
    full = pregate(ids)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat(parts, 1).argmax(-1), full.argmax(-1))


@torch.no_grad()
def test_left_padding_changes_nothing(pregate):
    short, long = torch.randint(50, (1, 6)), torch.randint(50, (1, 11))
    batch = torch.cat([torch.cat([torch.full((1, 5), 49), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    together = pregate(batch, mask)
    torch.testing.assert_close(together[0, 5:], pregate(short)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1], pregate(long)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_left_padded_decoding_equals_full_prefix(pregate):
    ids = torch.randint(50, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    cache, parts, past = DynamicCache(), [], 0
    for piece in ids.split([6, 1, 1, 2], dim=1):
        past += piece.shape[1]
        parts.append(pregate(piece, mask[:, :past], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], pregate(ids, mask)[mask.bool()], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_causal_and_independent_of_batch_mates(pregate):
    ids = torch.randint(50, (2, 10))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 50
    before, after = pregate(ids), pregate(changed)
    torch.testing.assert_close(before[0, :6], after[0, :6])
    torch.testing.assert_close(before[1], after[1])
    assert not torch.allclose(before[0, 6], after[0, 6])


def test_router_scores_are_fp32_under_autocast(pregate):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = pregate(torch.randint(50, (1, 7)))
    assert logits.dtype == torch.float32


def test_label_gradient_reaches_every_parameter_and_the_plan_carries_none(pregate):
    ids = torch.randint(50, (2, 8))
    plan = pregate.plan(ids)
    assert not plan.weight.requires_grad and not pregate.caps.trainable
    pregate(ids).log_softmax(-1)[..., 0].sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in pregate.parameters())


def test_plan_invariants(pregate):
    plan = pregate.plan(torch.randint(50, (2, 8))).check(5)
    assert plan.index.shape == (16, 1) and plan.index.dtype == torch.int32
    assert torch.equal(plan.expert, plan.logits.argmax(-1))


def test_policies_keep_the_invariants():
    logits = torch.randn(11, 6)
    for weighting in ("one", "probs", "renorm"):
        TopK(3, weighting)(logits).check(6)
    assert torch.equal(fixed(torch.arange(5)).check(6).expert, torch.arange(5))


@pytest.mark.parametrize(
    ("index", "weight", "message"),
    [
        ([[7]], [[1.0]], "outside"),
        ([[-1]], [[1.0]], "empty slot"),
        ([[0]], [[float("nan")]], "finite"),
        ([[2, 2]], [[0.5, 0.5]], "two slots"),
    ],
)
def test_broken_plans_are_named(index, weight, message):
    with pytest.raises(ValueError, match=message):
        RoutePlan(torch.tensor(index).int(), torch.tensor(weight)).check(4)


def test_positions_skip_padding():
    ids, mask = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1]])
    assert positions(ids, mask, past=2).tolist() == [[0, 1, 2]]
    assert positions(ids, None, past=4).tolist() == [[4, 5, 6]]


def test_width_must_fit_the_heads():
    with pytest.raises(MoesaicError, match="multiple"):
        PreGateConfig(vocab_size=8, experts=2, width=30)


@torch.no_grad()
def test_positions_beyond_the_rotary_table_make_it_grow(pregate):
    ids, near, far = torch.randint(50, (1, 3)), torch.arange(3)[None], torch.arange(700, 703)[None]
    expected = pregate(ids, pos_BS=far)
    pregate._tables.clear()
    pregate(ids, pos_BS=near)
    assert len(pregate._tables[ids.device][0]) < 700
    assert torch.equal(pregate(ids, pos_BS=far), expected)
