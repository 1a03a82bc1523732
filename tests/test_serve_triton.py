"""The Triton kernels of attention, compiled for GPUs on any machine; `test_experts_triton.py` runs them."""

import importlib.util
import os

import pytest

from moesaic.serve import triton_attention

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, of the extra gpu")


ATTENTION = {  # types of the kernels' arguments, as they are launched
    "place_token": (["x", ("x", "x"), ("i", "i"), "x", ("x", "x"), "i32"], {"HEADS": 8, "GROUPS": 2, "HALF": 32}),
    "attend_part": (["x", "x", "x", "i", "i", ("f", "f", "f"), "fp32", "fp32"], {}),
    "attend_whole": ([("f", "f", "f"), "i", "x"], {}),
}


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="triton only interprets in this process")
@pytest.mark.parametrize("kernel", ATTENTION)
@pytest.mark.parametrize(("dtype", "capability"), [("*fp32", 80), ("*bf16", 90)])
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("window", [0, 100])
def test_attention_compiles_for_a_gpu(kernel, dtype, capability, width, window, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = triton_attention._kernels()[kernel]
    words = {"x": dtype, "i": "*i64", "f": "*fp32"}
    types, constants = ATTENTION[kernel]
    types = [tuple(map(words.get, each)) if isinstance(each, tuple) else words.get(each, each) for each in types]
    block = triton_attention.block_of(width, 4 if dtype == "*fp32" else 2)
    sizes = triton_attention.Sizes(8, 2, 16, width, width, 1024, 256, 4, block, window, False)
    constants = {**constants, "PADDED": 32} if constants else {"SIZES": sizes}
    signature = dict(zip(function.arg_names, types + ["constexpr"] * len(constants), strict=True))
    source = ASTSource(function, signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert built.asm["cubin"]
    assert built.metadata.shared <= 99 * 1024, "of the smallest GPUs"
