"""What holds of the Triton kernels wherever they run: `test_experts_triton.py` runs this file in a process of its own.

With TRITON_INTERPRET=1, which has to be set before triton is imported, in the interpreter; without, on a GPU.
"""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from moesaic.errors import MoesaicError
from moesaic.experts import backends, compute, triton_blocks, triton_kernels
from moesaic.experts.channel_blocks import ChannelBlocks, TokenGroups, layout_from_masks

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KERNELS = [triton_blocks.masked_decode, triton_blocks.grouped_prefill]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(mask, *, hidden=36, gated=True, bias=False, untied=False, activation=F.silu, dtype=torch.float32):
    """Random blocks; outputs are of the order of 1."""
    torch.manual_seed(0)
    layout, _ = layout_from_masks(mask, untied=untied)
    blocks = ChannelBlocks(layout, hidden, activation, gated=gated, up_bias=bias, down_bias=bias)
    with torch.no_grad():
        for parameter in blocks.parameters():
            parameter.normal_(std=0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return blocks.to(DEVICE, dtype).requires_grad_(False)


def batch(tokens, experts, *, hidden=36, dtype=torch.float32):
    x = torch.randn(tokens, hidden, device=DEVICE, dtype=dtype)
    return x, TokenGroups(torch.randint(experts, (tokens,), device=DEVICE))


def assert_as_plain(kernel, blocks, x, groups):
    """Against the plain path in float32: the kernels round to the dtype twice, activations and result."""
    dtype = x.dtype
    actual = kernel(blocks, x, groups)
    assert actual.dtype == dtype and actual.shape == x.shape
    expected = compute.grouped(blocks.float(), x.float(), groups)
    blocks.to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


MASK = torch.rand(4, 133, generator=torch.Generator().manual_seed(3)) < 0.5


@each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("untied", [False, True], ids=["shared", "untied"])
def test_equals_the_plain_path(kernel, dtype, untied):
    x, groups = batch(40, 3, dtype=dtype)  # expert 3 has no token
    assert_as_plain(kernel, make(MASK, dtype=dtype, untied=untied), x, groups)


@each_kernel
@pytest.mark.parametrize(("gated", "bias"), [(True, True), (False, True), (False, False)])
def test_blocks_without_gate_and_with_biases(kernel, gated, bias):
    x, groups = batch(5, 4)
    assert_as_plain(kernel, make(MASK, gated=gated, bias=bias), x, groups)


@each_kernel
@pytest.mark.parametrize("name", triton_blocks.FUNCTIONS)
def test_activations(kernel, name):
    x, groups = batch(3, 4)
    assert_as_plain(kernel, make(MASK, activation=triton_blocks.FUNCTIONS[name]), 4 * x, groups)


@st.composite
def layouts(draw):
    experts, width = draw(st.integers(1, 5)), draw(st.integers(1, 100))
    shift = draw(st.integers(0, 1000))
    mask = torch.rand(experts, width, generator=torch.Generator().manual_seed(shift)) < draw(st.floats(0, 1))
    mask[torch.arange(experts), (torch.arange(experts) * 7 + shift) % width] = True  # nobody is empty
    return mask


@each_kernel
@given(layouts(), st.sampled_from([1, 2, 17, 64]), st.integers(1, 150), st.booleans())
@settings(max_examples=8)
def test_any_layout_and_width(kernel, mask, tokens, hidden, untied):
    x, groups = batch(tokens, len(mask), hidden=hidden)
    assert_as_plain(kernel, make(mask, hidden=hidden, untied=untied), x, groups)


def test_an_expert_of_several_token_tiles():
    x, _ = batch(150, 4)
    experts = torch.tensor([0] * 130 + [2] * 20, device=DEVICE)[torch.randperm(150)]
    assert_as_plain(triton_blocks.grouped_prefill, make(MASK), x, TokenGroups(experts))


@pytest.mark.parametrize("kernel", [*KERNELS, triton_blocks.token_decode], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("bias", [False, True])
def test_channels_may_lie_anywhere(kernel, bias):
    blocks = make(MASK, bias=bias)
    x, groups = batch(1 if kernel is triton_blocks.token_decode else 40, 4)
    width = blocks.layout.width
    rows = torch.randperm(2 * width, device=DEVICE)[:width]

    def moved(parameter):
        there = torch.full((2 * width, *parameter.shape[1:]), float("nan"), device=DEVICE)
        return there.index_copy_(0, rows, parameter.detach())

    own = triton_blocks.stored(blocks)
    parts = [None if part is None else moved(part) for part in own[:5]]
    at = triton_blocks.Stored(*parts, rows=rows.to(torch.int32))
    assert torch.equal(kernel(blocks, x, groups, at), kernel(blocks, x, groups))


@each_kernel
def test_channels_of_experts_without_tokens_are_not_read(kernel):
    mask = torch.zeros(2, 128, dtype=torch.bool)
    mask[0, :64], mask[1, 64:] = True, True
    blocks = make(mask)
    x, groups = batch(6, 1)
    expected = kernel(blocks, x, groups)
    for weight in (blocks.gate, blocks.up, blocks.down):
        weight[64:] = float("nan")
    assert expected.isfinite().all() and torch.equal(kernel(blocks, x, groups), expected)


def test_decode_skips_tiles_that_no_token_needs():
    mask = torch.zeros(2, 128, dtype=torch.bool)
    mask[0, :64], mask[1, 64:] = True, True
    blocks = make(mask)
    x, groups = batch(6, 1)
    hidden, live = torch.full((6, 128), 7.0, device=DEVICE), torch.full((128,), 7, dtype=torch.uint8, device=DEVICE)
    ffn, owners = (blocks.gate, blocks.up, None, None), blocks.mask(torch.uint8, x.device)
    kernel, tiles = triton_kernels.kernels()["decode_hidden"], triton_blocks.SMALL.decode_hidden
    tiling = triton_blocks.tiling(blocks, tiles, 6)
    kernel[(4,)](x, ffn, None, owners, groups.expert_N, hidden, live, 6, 128, TILING=tiling)
    assert live.tolist() == [1] * 64 + [0] * 64
    assert (hidden[:, :64] != 7).all() and (hidden[:, 64:] == 7).all()


@each_kernel
def test_results_repeat_and_do_not_depend_on_batch_mates(kernel):
    blocks = make(MASK)
    x, groups = batch(13, 4)
    together = kernel(blocks, x, groups)
    assert torch.equal(kernel(blocks, x, groups), together)
    alone = [kernel(blocks, x[i : i + 1], TokenGroups(groups.expert_N[i : i + 1])) for i in range(13)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True), (False, False)])
def test_a_single_token(dtype, gated, bias):
    blocks = make(MASK, gated=gated, bias=bias, dtype=dtype)
    x, groups = batch(4, 4, dtype=dtype)
    for row in range(4):
        assert_as_plain(
            triton_blocks.token_decode, blocks, x[row : row + 1], TokenGroups(groups.expert_N[row : row + 1])
        )
    with pytest.raises(MoesaicError, match="4 tokens for token_decode: expected one"):
        triton_blocks.token_decode(blocks, x, groups)


@given(layouts(), st.integers(1, 150), st.booleans(), st.integers(0, 4))
@settings(max_examples=8)
def test_a_single_token_in_any_layout(mask, hidden, untied, expert):
    groups = TokenGroups(torch.tensor([expert % len(mask)], device=DEVICE))
    x = torch.randn(1, hidden, device=DEVICE)
    assert_as_plain(triton_blocks.token_decode, make(mask, hidden=hidden, untied=untied), x, groups)


@each_kernel
def test_no_tokens(kernel):
    assert kernel(make(MASK), *batch(0, 4)).shape == (0, 36)


@each_kernel
def test_what_cannot_be_computed_is_refused(kernel):
    x, groups = batch(3, 4)
    with pytest.raises(MoesaicError, match=r"the activation .* is none of silu"):
        kernel(make(MASK, activation=torch.sin), x, groups)
    with pytest.raises(MoesaicError, match=r"weights are torch.float64"):
        kernel(make(MASK, dtype=torch.float64), x.double(), groups)
    with pytest.raises(MoesaicError, match=r"tokens are torch.bfloat16"):
        kernel(make(MASK), x.bfloat16(), groups)


def test_too_many_tokens_to_decode_are_refused():
    with pytest.raises(MoesaicError, match="65 tokens for masked_decode: expected at most 64; use grouped_prefill"):
        triton_blocks.masked_decode(make(MASK), *batch(65, 4))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@torch.no_grad()
def test_inference_on_a_gpu_takes_the_kernels():
    blocks = make(MASK)
    kernels = {1: triton_blocks.token_decode, 64: triton_blocks.masked_decode, 65: triton_blocks.grouped_prefill}
    for tokens, kernel in kernels.items():
        x, groups = batch(tokens, 4)
        assert backends.choose(blocks, groups) is kernel
        assert torch.equal(blocks(x, groups), kernel(blocks, x, groups))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_sides_of_the_benchmark_agree(dtype, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import gpu_blocks

    blocks = gpu_blocks.random_blocks(48, 64, 3, dtype, torch.device(DEVICE))
    torch_grouped = gpu_blocks.GroupedMM(blocks) if dtype == torch.bfloat16 else None
    x, groups = gpu_blocks.random_batch(blocks, 20)
    sides = gpu_blocks.sides_of(blocks, torch_grouped, x, groups)
    assert len(sides) == (5 if torch_grouped else 4)
    gpu_blocks.compare(sides)
    with pytest.raises(MoesaicError, match="wrong differs from masked by"):
        gpu_blocks.compare({**sides, "wrong": lambda: 1.5 * sides["masked"]()})
    union = blocks.layout.union_width(groups.used)
    width = {blocks.layout.expert_width(expert) for expert in range(3)}
    assert width == {32}
    assert gpu_blocks.work(blocks, groups) == (3 * 48 * union * blocks.up.element_size(), 2 * 3 * 48 * 32 * 20)
