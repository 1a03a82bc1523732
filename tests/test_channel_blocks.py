"""Channel blocks: the layout is exact, and every compute path equals a loop over tokens, gradients included."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from moesaic.errors import MoesaicError
from moesaic.experts import compute
from moesaic.experts.channel_blocks import BlockLayout, ChannelBlocks, FFNWeights, TokenGroups, layout_from_masks
from moesaic.experts.layout import few_runs_order


@st.composite
def masks(draw):
    experts, width = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    bits = draw(st.lists(st.integers(0, 2**experts - 1), min_size=width, max_size=width))
    mask = torch.tensor([[code >> e & 1 for code in bits] for e in range(experts)], dtype=torch.bool)
    mask[torch.arange(experts), torch.randint(width, (experts,))] = True  # nobody is empty
    return mask


@given(masks(), st.booleans())
def test_layout_gives_each_expert_exactly_its_channels(mask, untied):
    layout, order = layout_from_masks(mask, untied=untied)
    stored = layout.mask()
    assert stored.shape == (len(mask), layout.width) and len(order) == layout.width
    for expert in range(len(mask)):
        owned = order[stored[expert]].tolist()
        assert sorted(owned) == mask[expert].nonzero()[:, 0].tolist()
        assert layout.expert_width(expert) == len(owned)
        assert sum(stop - start for start, stop in layout.runs(expert)) == len(owned)
    if not untied:
        assert sorted(order.tolist()) == mask.any(0).nonzero()[:, 0].tolist(), "each kept channel exactly once"
        assert layout.union_width(range(len(mask))) == layout.width
        assert layout.shared == int(mask.all(0).sum())


@given(masks())
def test_layout_survives_json(mask):
    layout, _ = layout_from_masks(mask)
    assert BlockLayout.from_list(layout.to_list()) == layout


@given(masks())
def test_runs_are_maximal_and_match_the_mask(mask):
    layout, _ = layout_from_masks(mask)
    for expert in range(layout.experts):
        runs = layout.runs(expert)
        assert all(a[1] < b[0] for a, b in pairwise(runs)), "adjacent runs should be one"
        covered = torch.zeros(layout.width, dtype=torch.bool)
        for start, stop in runs:
            covered[start:stop] = True
        assert torch.equal(covered, layout.mask()[expert])


@given(st.sets(st.integers(1, 63), min_size=2, max_size=40))
def test_order_never_has_more_runs_than_sorted_signatures(codes):
    def runs(order):
        return sum((after & ~before).bit_count() for before, after in zip([0, *order], order, strict=False))

    assert runs(few_runs_order(sorted(codes))) <= runs(sorted(codes))


def test_an_expert_without_channels_is_refused():
    with pytest.raises(MoesaicError, match="expert 1 owns no channel"):
        layout_from_masks(torch.tensor([[True, True], [False, False]]))


# -- compute --------------------------------------------------------------------------------------------------------


def make(mask, *, hidden=7, gated=True, bias=False, untied=False, seed=0):
    torch.manual_seed(seed)
    width = mask.shape[1]
    weights = FFNWeights(
        up=torch.randn(width, hidden),
        down=torch.randn(hidden, width),
        gate=torch.randn(width, hidden) if gated else None,
        gate_bias=torch.randn(width) if gated and bias else None,
        up_bias=torch.randn(width) if bias else None,
        down_bias=torch.randn(hidden) if bias else None,
    )
    layout, order = layout_from_masks(mask, untied=untied)
    blocks = ChannelBlocks(layout, hidden, F.silu, gated=gated, up_bias=bias, down_bias=bias)
    blocks.load_dense(weights, order)
    return blocks, weights


def by_the_equation(weights, mask, x, expert):
    rows = []
    for token, e in zip(x, expert.tolist(), strict=True):
        up = weights.up @ token + (0 if weights.up_bias is None else weights.up_bias)
        if weights.gate is None:
            hidden = F.silu(up)
        else:
            hidden = F.silu(weights.gate @ token + (0 if weights.gate_bias is None else weights.gate_bias)) * up
        rows.append(weights.down @ (hidden * mask[e]) + (0 if weights.down_bias is None else weights.down_bias))
    return torch.stack(rows)


MASK = torch.rand(4, 29, generator=torch.Generator().manual_seed(3)) < 0.5
PATHS = [compute.masked, compute.grouped, compute.packed, compute.grouped_autograd]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.__name__)
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize("tokens", [1, 2, 13, 101])
@torch.no_grad()
def test_every_path_equals_the_equation(path, gated, bias, tokens):
    blocks, weights = make(MASK, gated=gated, bias=bias)
    x, expert = torch.randn(tokens, 7), torch.randint(3, (tokens,))  # expert 3 never occurs
    expected = by_the_equation(weights, MASK, x, expert)
    torch.testing.assert_close(path(blocks, x, TokenGroups(expert)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [compute.grouped, compute.packed, compute.grouped_autograd])
@torch.no_grad()
def test_untied_paths_equal_the_equation(path):
    blocks, weights = make(MASK, bias=True, untied=True)
    assert blocks.untied and blocks.layout.width == int(MASK.sum())
    x, expert = torch.randn(13, 7), torch.randint(4, (13,))
    expected = by_the_equation(weights, MASK, x, expert)
    torch.testing.assert_close(path(blocks, x, TokenGroups(expert)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("untied", [False, True])
def test_gradients_equal_the_equation(untied):
    blocks, weights = make(MASK, bias=True, untied=untied)
    for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        getattr(weights, name).requires_grad_(True)
    x, expert = torch.randn(13, 7), torch.randint(4, (13,))
    mine, theirs = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    blocks(mine, expert).square().sum().backward()
    by_the_equation(weights, MASK, theirs, expert).square().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-2)
    _, order = layout_from_masks(MASK, untied=untied)
    for name, dense in (("gate", weights.gate.grad), ("up", weights.up.grad), ("down", weights.down.grad.T)):
        stored = torch.zeros_like(dense).index_add_(0, order, getattr(blocks, name).grad)
        torch.testing.assert_close(stored, dense, rtol=1e-3, atol=1e-2, msg=name)
    torch.testing.assert_close(blocks.down_bias.grad, weights.down_bias.grad, rtol=1e-3, atol=1e-2)


def test_chosen_paths_can_be_trained_and_agree_with_inference():
    blocks, _ = make(MASK)
    x, expert = torch.randn(300, 7), torch.randint(4, (300,))
    trained = blocks(x, expert)
    assert trained.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(blocks(x, expert), trained, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batch_mates_change_nothing():
    blocks, _ = make(MASK)
    x, expert = torch.randn(600, 7), torch.randint(4, (600,))
    together = blocks(x, expert)
    alone = torch.cat([blocks(x[i : i + 1], expert[i : i + 1]) for i in range(0, 600, 50)])
    torch.testing.assert_close(together[::50], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_copies_follow_the_weights_and_are_not_saved():
    blocks, _ = make(MASK)
    x, expert = torch.randn(1, 7), torch.tensor([2])
    before = blocks(x, expert)
    blocks.down.mul_(2)
    torch.testing.assert_close(blocks(x, expert), 2 * before)
    assert len(blocks.copies) == 1 and len(copy.deepcopy(blocks).copies) == 0
    assert set(blocks.state_dict()) == {"up", "down", "gate"}


def test_bytes_are_those_of_the_union():
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]], dtype=torch.bool)
    blocks, _ = make(mask, hidden=10)
    channel = 3 * 10 * 4
    assert blocks.bytes([0]) == blocks.bytes([1]) == 3 * channel
    assert blocks.bytes([0, 1]) == blocks.bytes() == 4 * channel
    plain, _ = make(mask, hidden=10, gated=False, bias=True)
    assert plain.bytes() == 4 * (2 * 10 + 1) * 4 + 10 * 4
