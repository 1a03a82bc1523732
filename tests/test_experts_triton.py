"""The Triton kernels: run in the interpreter and, where there is one, on a GPU; compiled for GPUs on any machine."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.experts import backends, compute, triton_blocks, triton_kernels
from moesaic.experts.channel_blocks import ChannelBlocks, TokenGroups, layout_from_masks

ROOT = Path(__file__).resolve().parent.parent
MASK = torch.rand(3, 70, generator=torch.Generator().manual_seed(0)) < 0.5

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, of the extra gpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make(dtype=torch.float32, *, gated=True, bias=False, activation=F.silu):
    layout, _ = layout_from_masks(MASK)
    blocks = ChannelBlocks(layout, 96, activation, gated=gated, up_bias=bias, down_bias=bias).to(dtype)
    return blocks.requires_grad_(False)


@needs_triton
@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("cases", ["triton_cases", "serve_triton_cases"])
def test_kernels_compute_what_the_plain_paths_do(cases, where):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if where == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{cases}.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["gpu_blocks"], ["whole_model", "--device", "cuda"]], ids=lambda each: each[0])
def test_benchmarks_say_that_they_were_not_run(command):
    line = [sys.executable, f"benchmarks/{command[0]}.py", *command[1:]]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{command[0]}: not run, there is no GPU that torch can use\n"


# -- compiled -------------------------------------------------------------------------------------------------------

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
# Bytes that one program may have: on the smallest GPUs of compute capability 8 and up, and on an H100 or H200.
SHARED = {80: 99 * 1024, 90: triton_blocks.LARGE_SHARED}


def signatures(blocks, kernel, moved):
    """Types of a kernel's arguments in the order of its parameters, as in the launches of `triton_blocks`."""
    x = POINTERS[blocks.up.dtype]
    gate, bias = "constexpr" if blocks.gate is None else x, "constexpr" if blocks.up_bias is None else x
    ffn, tiles, owned = (gate, x, "constexpr" if gate == "constexpr" else bias, bias), ("*i32",) * 3, ("*i32",) * 2
    rows = "*i32" if moved else "constexpr"
    return {
        "decode_hidden": [x, ffn, rows, "*u8", "*i64", x, "*u8", "i32", "i32"],
        "decode_down": [x, x, rows, "*u8", "*fp32", "i32", "i32"],
        "decode_sum": ["*fp32", x, "i32", "i32"],
        "token_part": [x, ffn, x, rows, owned, "*i64", "*fp32"],
        "prefill_hidden": [x, ffn, rows, "*i64", tiles, owned, x, "i32"],
        "prefill_down": [x, x, rows, "*i64", tiles, owned, x, "i32"],
    }[kernel]


def compiled(blocks, kernel, capability, moved):
    """The kernel as triton compiles it for an NVIDIA GPU, with pointers as aligned as torch's are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = triton_kernels.kernels()[kernel]
    types = signatures(blocks, kernel, moved)
    constants, options = {"SPLITS": 32, "BLOCK": 256}, {}
    launches = triton_blocks.SMALL if capability == 80 else triton_blocks.LARGE
    if (tiles := getattr(launches, kernel, None)) is not None:
        if kernel == "token_part":
            tiles = tiles._replace(columns=128)
        constants = {function.arg_names[-1]: triton_blocks.tiling(blocks, tiles, triton_blocks.DECODE_TOKENS)}
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    aligned = {}
    for at, kind in enumerate(types):
        parts = [((at,), kind)] if isinstance(kind, str) else [((at, i), part) for i, part in enumerate(kind)]
        constants |= {path: None for path, part in parts if part == "constexpr"}
        aligned |= {path: [["tt.divisibility", 16]] for path, part in parts if part.startswith("*")}
    rest = ["constexpr"] * (len(function.arg_names) - len(types))
    signature = dict(zip(function.arg_names, types + rest, strict=True))
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton only interprets in this process")
@pytest.mark.parametrize(
    "kernel", ["decode_hidden", "decode_down", "decode_sum", "token_part", "prefill_hidden", "prefill_down"]
)
@pytest.mark.parametrize(
    ("dtype", "capability", "moved"), [(torch.float32, 80, False), (torch.bfloat16, 90, True)], ids=str
)
def test_kernels_compile_for_a_gpu(kernel, dtype, capability, moved, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = ((True, False), (True, True), (False, False)) if kernel.endswith(("hidden", "part")) else ((True, False),)
    for gated, bias in kinds:
        built = compiled(make(dtype, gated=gated, bias=bias), kernel, capability, moved)
        assert built.asm["cubin"]
        assert built.metadata.shared <= SHARED[capability]
        if kernel not in ("decode_sum", "token_part") and dtype == torch.bfloat16:
            assert "mma" in built.asm["ptx"], "products should run on tensor cores"


# -- what surrounds the kernels -------------------------------------------------------------------------------------


def test_activations_are_known_by_what_they_compute():
    names = ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2"]
    expected = ["silu", "silu", "gelu", "gelu_tanh", "gelu_tanh", "quick_gelu", "relu", "relu_squared"]
    assert [triton_blocks.activation_name(ACT2FN[name]) for name in names] == expected
    assert set(expected) == set(triton_blocks.FUNCTIONS) == set(triton_kernels.ACTIVATIONS)
    for other in (torch.tanh, F.mish, F.relu6, nn.PReLU(), F.glu, lambda x: F.silu(x).clamp(max=7)):
        assert triton_blocks.activation_name(other) is None


@torch.no_grad()
def test_plain_paths_stay_where_kernels_do_not_suit():
    blocks, groups = make(), TokenGroups(torch.tensor([0, 1, 2]))
    assert not triton_blocks.suits(blocks)
    assert backends.choose(blocks, groups) in (compute.masked, compute.masked_prepacked)


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes tensors of the CPU")
@torch.no_grad()
def test_tensors_of_the_cpu_are_refused():
    for kernel in (triton_blocks.masked_decode, triton_blocks.grouped_prefill):
        with pytest.raises(MoesaicError, match=r"run on a GPU, but tokens are on cpu: use compute.masked"):
            kernel(make(), torch.randn(2, 96), TokenGroups(torch.tensor([0, 1])))


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingExtraError, match=r"'triton' is not installed.*moesaic\[gpu\]"):
        triton_kernels.kernels.__wrapped__()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.sampled_from([1, 4, 16]))
def test_token_tiles_hold_each_token_once_under_its_expert(experts, rows):
    groups = TokenGroups(torch.tensor(experts))
    expert_T, start_T, stop_T = (column.tolist() for column in groups.tiles(rows))
    assert [0, *stop_T] == [*start_T, len(experts)]
    for expert, start, stop in zip(expert_T, start_T, stop_T, strict=True):
        assert 0 < stop - start <= rows
        assert {experts[token] for token in groups.order[start:stop].tolist()} == {expert}
    assert len(expert_T) == sum(-(-experts.count(expert) // rows) for expert in set(experts))


@pytest.mark.parametrize("untied", [False, True])
def test_owned_channels_are_those_of_the_mask(untied):
    layout, _ = layout_from_masks(MASK, untied=untied)
    channels, begins = ChannelBlocks(layout, 8, F.silu).owned(torch.device("cpu"))
    for expert in range(layout.experts):
        owned = channels[begins[expert] : begins[expert + 1]].tolist()
        assert owned == layout.mask()[expert].nonzero()[:, 0].tolist()
