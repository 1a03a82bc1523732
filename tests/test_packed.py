"""Products of few rows: what they compute, and that no bit of a row depends on how many rows there are."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moesaic.experts.buckets import LEAST, PLAIN_LEAST, bucket
from moesaic.experts.packed import PackedLinear, PackedWeight, available, pack_linears, steady

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(96, 32), (77, 256), (512, 2048)]


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def products(weight: torch.Tensor) -> dict[str, object]:
    sides = {"plain": lambda x: steady(x, weight), "copied": PackedWeight(weight, pack=False)}
    if available(weight.dtype):
        sides["packed"] = PackedWeight(weight)
    return sides


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_rows(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).to(dtype)
    x = torch.randn(64, shape[1], generator=generator).to(dtype)
    for name, product in products(weight).items():
        whole = product(x)
        for rows in (1, 3, 5, 11, 40):
            for first in range(0, 65 - rows, rows):
                assert torch.equal(product(x[first : first + rows]), whole[first : first + rows]), (name, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 7, 33])
def test_they_are_linear_layers(rows, dtype):
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(*shape).to(dtype) for shape in ((24, 16), (24,), (rows, 16)))
    for product in products(weight).values():
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(product(x), F.linear(x, weight), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(steady(x, weight, bias), F.linear(x, weight, bias), rtol=2e-2, atol=2e-2)


@given(rows=st.integers(1, 4096), least=st.sampled_from([LEAST, PLAIN_LEAST]))
def test_buckets_hold_their_rows_and_waste_little(rows, least):
    filled = bucket(rows, least)
    assert max(rows, least) <= filled <= max(least, 3 * rows // 2 + 3)
    assert bucket(filled, least) == filled


def test_models_get_packed_layers_and_say_the_same():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8, bias=False))
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        wanted = model(x)
        assert pack_linears(model) == 4 * (16 * 32 + 32 * 8)
        assert [type(layer) for layer in model] == [PackedLinear, torch.nn.ReLU, PackedLinear]
        torch.testing.assert_close(model(x), wanted)
