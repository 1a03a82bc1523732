"""The speed receipt: its shape, its arithmetic by hand, and never a bound on a time."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic.errors import MoesaicError
from moesaic.models.attach import attach
from moesaic.refactor import machine as machine_module
from moesaic.refactor.machine import Machine, gemm_rate, measure_machine, read_bandwidth, using_threads
from moesaic.refactor.speed import Work, channel_shares, least_work, measure_speed, verdict

VOCABULARY, HIDDEN, WIDTH, LAYERS, HEADS, EXPERTS = 64, 32, 48, 2, 4, 3


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "SECONDS_EACH", 0.0)
    monkeypatch.setattr(machine_module, "BIG_ARRAY", (2**20, 2**20))
    monkeypatch.setattr(machine_module, "GEMM_SIZES", {True: (16, 32), False: (16, 32)})


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def masks() -> list[Tensor]:
    """Expert 0 owns channels 0..31, expert 1 owns 16..47, expert 2 owns 0..15; so every channel has an owner."""
    mask = torch.zeros(EXPERTS, WIDTH, dtype=torch.bool)
    mask[0, :32] = mask[1, 16:] = mask[2, :16] = True
    return [mask] * LAYERS


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    dense = llama()
    return dense, attach(dense, masks(), ["a", "b", "c"])


SMALL = dict(prefill_tokens=12, decode_context=5, decode_steps=3, batches=(1, 2), rounds=2)


def prompts() -> Tensor:
    return torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in numbers(item)]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, int | float) else []


def test_result(pair: tuple[Any, Any]) -> None:
    dense, moe = pair
    result = measure_speed(dense, moe, prompts(), **SMALL)  # type: ignore[arg-type]
    assert [cell["name"] for cell in result["cells"]] == ["prefill of 12", "decode at batch 1", "decode at batch 2"]
    assert result["settings"]["rounds"] == 2
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert all(math.isfinite(x) for x in numbers(result))
    for cell in result["cells"]:
        assert 0 < cell["ratio"]["min"] <= cell["ratio"]["median"] <= cell["ratio"]["max"]
        for side in ("dense", "moe"):
            values = cell[side]
            tokens = cell["batch"] * cell["tokens"]
            assert values["tokens_per_second"] == pytest.approx(tokens / values["ms"] * 1000)
            assert values["share"] == pytest.approx(values["floor_ms"] / values["ms"])
            assert values["limit"] in ("bandwidth", "gemm")
    assert 1 <= result["cells"][2]["moe"]["experts"] <= 2 and "experts" not in result["cells"][2]["dense"]


def test_same_model_twice_does_the_same_work(pair: tuple[Any, Any]) -> None:
    dense, _ = pair
    for cell in measure_speed(dense, dense, prompts(), **SMALL)["cells"]:  # type: ignore[arg-type]
        for key in ("weight_bytes", "cache_bytes", "flops"):
            assert cell["dense"][key] == cell["moe"][key]
        assert 0.01 < cell["ratio"]["median"] < 100


def test_models_and_prompts_are_left_alone(pair: tuple[Any, Any]) -> None:
    dense, moe = pair
    before = {name: parameter.clone() for name, parameter in moe.named_parameters()}
    dense.train()
    try:
        measure_speed(dense, moe, prompts(), **SMALL)  # type: ignore[arg-type]
        assert dense.training and not moe.training
    finally:
        dense.eval()
    assert all(torch.equal(before[name], parameter) for name, parameter in moe.named_parameters())
    moe(input_ids=prompts(), labels=prompts()).loss.backward()  # nothing inferred without gradients was kept
    moe.zero_grad(set_to_none=True)


def test_no_round_begins_after_the_budget(pair: tuple[Any, Any]) -> None:
    dense, moe = pair
    result = measure_speed(dense, moe, prompts(), **{**SMALL, "rounds": 50}, budget_s=0.0)  # type: ignore[arg-type]
    assert result["settings"]["rounds"] == 1


@pytest.mark.parametrize("shape", [(1, 12), (5, 3), (12,)])
def test_too_few_tokens(pair: tuple[Any, Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(MoesaicError, match="2 rows of 4 tokens are needed"):
        measure_speed(*pair, torch.zeros(shape, dtype=torch.long), **SMALL)  # type: ignore[arg-type]


def test_short_prompts_shorten_the_cells(pair: tuple[Any, Any]) -> None:
    result = measure_speed(*pair, prompts()[:, :7], **SMALL)  # type: ignore[arg-type]
    assert result["cells"][0]["name"] == "prefill of 7"
    assert (result["settings"]["prefill_tokens"], result["settings"]["decode_context"]) == (7, 4)


# -- the floor, by hand --------------------------------------------------------------------------------------------

ATTENTION = 4 * HIDDEN * HIDDEN  # weights per layer
NORMS = (2 * LAYERS + 1) * HIDDEN
FFN = 3 * WIDTH * HIDDEN
HEAD = VOCABULARY * HIDDEN


def attended(batch: int, context: int, length: int) -> int:
    """2 FLOP for each of score and mix, per key seen and unit of width."""
    return 4 * batch * sum(context + i for i in range(1, length + 1)) * LAYERS * HIDDEN


def test_dense_decode() -> None:
    work = least_work(llama(), torch.tensor([[3], [3], [9]]), context=7)
    assert work.weight_bytes == 4 * (LAYERS * (ATTENTION + FFN) + NORMS + HEAD)  # a tied head is the whole table
    assert work.flops == 3 * 2 * (LAYERS * (ATTENTION + FFN) + HEAD) + attended(3, 7, 1)
    untied = least_work(llama(tied=False), torch.tensor([[3], [3], [9]]), context=7)
    assert untied.weight_bytes == work.weight_bytes + 4 * 2 * HIDDEN  # two distinct rows of the table


def test_dense_prefill() -> None:
    work = least_work(llama(), torch.arange(10)[None])
    assert work.flops == 10 * 2 * LAYERS * (ATTENTION + FFN) + 2 * HEAD + attended(1, 0, 10)


def test_bytes_follow_the_dtype() -> None:
    model, ids = llama(), torch.tensor([[1]])
    full = least_work(model, ids).weight_bytes
    assert least_work(model.bfloat16(), ids).weight_bytes == full / 2


@pytest.mark.parametrize(
    ("experts", "union", "mean"),
    [([0], 32, 32), ([2], 16, 16), ([0, 2], 32, 24), ([1, 2, 2, 2], 48, 20), ([0, 0, 1, 2], 48, 28)],
)
def test_moe(pair: tuple[Any, Any], experts: list[int], union: int, mean: float) -> None:
    _, moe = pair
    expert_N = torch.tensor(experts)
    assert channel_shares(moe.ffns()[0], expert_N) == (union / WIDTH, mean / WIDTH)
    ids = torch.arange(len(experts))[:, None]
    work = least_work(moe, ids, expert_N, context=7)
    router = [p for name, p in moe.pregate.named_parameters() if name != "embedding.weight"]
    weights = LAYERS * (ATTENTION + 3 * union * HIDDEN) + NORMS + HEAD + sum(p.numel() for p in router)
    assert work.weight_bytes == 4 * (weights + len(experts) * moe.pregate.config.width)
    products = LAYERS * (ATTENTION + 3 * mean * HIDDEN) + HEAD + sum(p.numel() for p in router if p.ndim > 1)
    keys = 4 * len(experts) * 8 * (LAYERS * HIDDEN + moe.pregate.config.layers * moe.pregate.config.width)
    assert work.flops == len(experts) * 2 * products + keys


def test_cache_is_read_once(pair: tuple[Any, Any]) -> None:
    dense, moe = pair
    for model, width in ((dense, LAYERS * HIDDEN), (moe, LAYERS * HIDDEN + moe.pregate.config.width)):
        out = model(input_ids=torch.ones(2, 6, dtype=torch.long), use_cache=True)
        work = least_work(model, torch.tensor([[1], [2]]), context=5, cache=out.past_key_values)
        assert work.cache_bytes == 4 * 2 * 2 * 6 * width  # float32, keys and values, two sequences of six


def test_floor() -> None:
    work = Work(weight_bytes=3e9, cache_bytes=1e9, flops=1e12)
    assert work.floor(read_gb_s=2, gemm_gflop_s=1000) == (2.0, "bandwidth")
    assert work.floor(read_gb_s=8, gemm_gflop_s=1000) == (1.0, "gemm")


def test_verdict() -> None:
    rows = [{"name": name, "ratio": {"median": ratio}} for name, ratio in (("a", 1.2), ("b", 0.97), ("c", 0.999))]
    assert verdict(rows) == "slower than dense in: b (0.97x)"
    assert verdict([rows[0], rows[2]]) == "at least as fast as dense in every cell (1.00x to 1.20x)"


# -- the machine ---------------------------------------------------------------------------------------------------


def test_measure_machine() -> None:
    before = torch.get_num_threads()
    found = measure_machine(torch.bfloat16, threads=1, working_set=4096)
    assert isinstance(found, Machine) and found.threads == 1 and found.working_set == 4096 and found.name
    assert list(found.gemm_gflop_s) == ["bfloat16"]
    assert all(x > 0 for x in (found.read_gb_s, found.cache_gb_s, *found.gemm_gflop_s.values()))
    assert torch.get_num_threads() == before
    json.dumps(found.to_dict(), allow_nan=False)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), using_threads(2):
        assert torch.get_num_threads() == 2
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu() -> None:
    assert read_bandwidth(2**20, "cuda") > 0 and gemm_rate(torch.bfloat16, "cuda") > 0
