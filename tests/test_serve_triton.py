"""The engine with the Triton kernels: in the interpreter and, where there is one, on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, of the extra gpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_triton
@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])
def test_the_engine_computes_with_kernels(where):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if where == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/serve_triton_cases.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
