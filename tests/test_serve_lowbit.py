"""Weights in 8 and 4 bits: products against floating point, and the engine's promises kept with them."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, MixtralConfig
from typer.testing import CliRunner

from families import COMMON
from moesaic.cli.main import app
from moesaic.errors import MoesaicError
from moesaic.experts import lowbit
from moesaic.experts.lowbit import QuantizedLinear, QuantizedWeight, available, quantize_linears
from moesaic.experts.lowbit_sizes import bits_of, matrix_bytes
from moesaic.experts.packed import PackedLinear
from moesaic.models.attach import attach
from moesaic.models.ffn_sites import find_ffn_sites
from moesaic.models.loading import load_model
from moesaic.pocket import pocket_path
from moesaic.serve.bench import BenchOptions, bench
from moesaic.serve.bench_work import Load, ModelWork
from moesaic.serve.loading import load
from moesaic.serve.memory_plan import plan
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import Token
from moesaic.serve.store import ExpertStore
from serving import alone, ask, ask_all, engine, greedy, prompts, reference, served_folder
from test_serve_stock import FAMILIES, stock_folder, stock_reference

TOKENS = 10
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(96, 128), (33, 50), (17, 7), (80, 96), (1, 64)]  # few are what the operators want


# -- products ---------------------------------------------------------------------------------------------------------
def made(product: QuantizedWeight) -> torch.Tensor:
    """The matrix that it multiplies by, in float32."""
    if product.bits == 8:
        weights, scales = product.tensors
        return (weights.float() * scales.float()[:, None])[: product.outputs, : product.inputs]
    return product(torch.eye(product.inputs, dtype=product.dtype)).float().T


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("native", [True, False])
def test_products(bits: int, dtype: torch.dtype, shape: tuple[int, int], native: bool) -> None:
    """Near the floating-point product of the matrix it stands for, which is near the matrix; row by row the same."""
    if native and not available(bits, dtype):
        pytest.skip("torch has no such operator here")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x, bias = torch.randn(40, shape[1], generator=generator).to(dtype), torch.randn(shape[0]).to(dtype)
    product = QuantizedWeight(weight, bits, native)
    whole, meant = product(x, bias), made(product)
    wanted = x.float() @ meant.T + bias.float()
    assert whole.dtype == dtype and whole.shape == (40, shape[0])
    assert (whole.float() - wanted).abs().max() < (1e-4 if dtype is torch.float32 else 0.03) * wanted.abs().max()
    assert (meant - weight.float()).norm() < (0.01 if bits == 8 else 0.12) * weight.float().norm()
    for rows in range(1, 41):
        assert torch.equal(product(x[:rows], bias), whole[:rows]), rows
        assert torch.equal(product(x[40 - rows :], bias), whole[40 - rows :]), rows
    assert product.bytes == matrix_bytes(shape, bits, dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_prompts_go_one_way_whoever_is_beside_them(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, x = torch.randn(shape).to(dtype), torch.randn(40, shape[1]).to(dtype)
    product = QuantizedWeight(weight, 8)
    answers, prompts = product(x), product(x, None, 0)
    assert (answers.float() - prompts.float()).abs().max() < 0.02 * answers.float().abs().max()
    for rows in range(1, 40):
        assert torch.equal(product(x, None, rows), torch.cat((answers[:rows], prompts[rows:])))
        assert torch.equal(product(x[rows:], None, 0), prompts[rows:])


@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_of_nothing_and_of_one_value(bits: int) -> None:
    x = torch.ones(3, 64)
    assert not QuantizedWeight(torch.zeros(16, 64), bits)(x).any()
    assert torch.allclose(QuantizedWeight(torch.full((16, 64), 0.3), bits)(x), torch.full((3, 16), 19.2))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_matrix_may_lie_the_other_way(bits: int, dtype: torch.dtype) -> None:
    weight, x = torch.randn(128, 96).to(dtype), torch.randn(3, 128).to(dtype)
    assert torch.equal(QuantizedWeight(weight.T, bits)(x), QuantizedWeight(weight.T.contiguous(), bits)(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_made_small_in_pieces(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 96)
    whole = QuantizedWeight(weight, bits)
    monkeypatch.setattr(lowbit, "AT_ONCE", 8192)
    assert all(torch.equal(*each) for each in zip(whole.tensors, QuantizedWeight(weight, bits).tensors, strict=True))


def test_linears_are_replaced_but_those_that_decide() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "gate": nn.Sequential(nn.Linear(32, 64)), "few": nn.Linear(32, 3)})
    a, x = model["a"], torch.randn(2, 5, 32)
    before = a(x)
    quantize_linears(model, 8, keep=[model["gate"]])
    assert isinstance(model["a"], QuantizedLinear)
    assert isinstance(model["gate"][0], PackedLinear) and isinstance(model["few"], PackedLinear)
    assert torch.allclose(model["a"](x), before, atol=0.03)


# -- the engine -------------------------------------------------------------------------------------------------------
KINDS = {"shared": served_folder, "untied": lambda path: served_folder(path, untied=True), "stock": stock_folder}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lowbit")
    return {kind: build(root / kind) for kind, build in KINDS.items()}


def as_quantized(linear_OI: torch.Tensor, bits: int) -> torch.Tensor:
    return made(QuantizedWeight(linear_OI.detach(), bits))


def quantized_reference(kind: str, folder: Path, bits: int) -> nn.Module:
    """transformers' own model with the matrices that few bits stand for."""
    model = reference(folder) if kind == "untied" else stock_reference(folder)
    if kind == "untied":
        for module in model.backbone.modules():
            if hasattr(module, "blocks"):
                for start, stop in (run for e in range(3) for run in module.blocks.layout.runs(e)):
                    for part in (module.blocks.gate, module.blocks.up):
                        part.data[start:stop] = as_quantized(part[start:stop], bits)
                    module.blocks.down.data[start:stop] = as_quantized(module.blocks.down[start:stop].T, bits).T
    backbone = model.backbone if kind == "untied" else model
    head = backbone.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # the embedding stays
    for module in backbone.modules():
        if type(module) is nn.Linear:
            module.weight.data = as_quantized(module.weight, bits)
        if hasattr(module, "gate_up_proj"):
            for part in (module.gate_up_proj, module.down_proj):
                for matrix in part.data:
                    matrix.copy_(as_quantized(matrix, bits))
    return model


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["untied", "stock"])
def test_tokens_are_those_of_the_matrices_that_are_meant(folders, kind: str, weights: str) -> None:
    """In float32, by generate(); experts that share channels have no such model, for their scales differ."""
    model, asked = quantized_reference(kind, folders[kind], bits_of(weights)), prompts(8)
    with engine(folders[kind], weights=weights, experts=0.5) as own:
        assert ask_all(own, asked, greedy(TOKENS)) == [alone(model, prompt, TOKENS) for prompt in asked]


SETTINGS = {
    "half": {"experts": 0.5},
    "no prefetch": {"experts": 0.5, "lookahead": 0},
    "one at a time": {"max_requests": 1},
    "small steps": {"experts": 0.7, "max_tokens": 7, "chunk": 5, "policy": "lru"},
    "from the disk": {"experts": 0.5, "page_cache": "drop"},
    "unpacked": {"pack": False},
}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_depend_on_what_is_in_memory(folders, kind: str, weights: str) -> None:
    folder, asked = folders[kind], prompts(8, seed=3)
    options = {"weights": weights, "prefix_reuse": False, "dtype": "float32"}
    with engine(folder, **options) as own:
        wanted = ask_all(own, asked, greedy(TOKENS))
        stats = own.stats()
        least = own.runner.machine.memory.least
    assert stats.memory.experts == own.runner.residency.layout.total_bytes == stats.memory.experts_capacity
    for setting in [*SETTINGS.values(), {"experts": least}]:
        with engine(folder, **options, **setting) as own:
            assert ask_all(own, asked, greedy(TOKENS)) == wanted, setting


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["shared", "stock"])
def test_batch_mates_change_no_bit(folders, kind: str, weights: str) -> None:
    asked = prompts(9, seed=5)
    options = {"weights": weights, "dtype": "bfloat16", "prefix_reuse": False}

    def tokens(heard):
        return [event for event in heard.wait().events if isinstance(event, Token)]

    with engine(folders[kind], max_requests=1, **options) as own:
        single = [tokens(ask(own, prompt, greedy(TOKENS, logprobs=3))) for prompt in asked]
    with engine(folders[kind], experts=0.5, **options) as own:
        heard = [ask(own, prompt, greedy(TOKENS, logprobs=3)) for prompt in asked]
        assert [tokens(each) for each in heard] == single
    with engine(folders[kind], batcher="decode-first", **options) as own:
        kinds, run = set(), own.runner.machine.backbone.run

        def watched(parts, complete=False):
            kinds.add(frozenset(part.prompt for part in parts))
            return run(parts, complete)

        own.runner.machine.backbone.run = watched
        first = ask(own, prompts(1)[0], greedy(80))
        heard = []
        for prompt in asked:  # each beside the first one's answer
            seen = len(first.ids)
            while len(first.ids) == seen and not first.ended.is_set():
                time.sleep(1e-4)
            heard.append(ask(own, prompt, greedy(TOKENS, logprobs=3)))
        assert [tokens(each) for each in heard] == single
        assert frozenset({True, False}) in kinds, "prompts and answers in one step"


def test_without_the_operators(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices made anew for every product: slower, and in float32 the same tokens."""
    asked = prompts(6, seed=2)
    for weights in ("int8", "int4"):
        with engine(folders["shared"], weights=weights) as own:
            wanted = ask_all(own, asked, greedy(TOKENS))
        with monkeypatch.context() as patch:
            patch.setattr(lowbit, "available", lambda bits, dtype: False)
            with engine(folders["shared"], weights=weights, experts=0.5) as own:
                assert ask_all(own, asked, greedy(TOKENS)) == wanted


@pytest.mark.parametrize("kind", ["shared", "stock"])
def test_budget_is_kept(folders, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident pages never exceed the capacity, and hold the tensors that are there; nothing stays of what was read."""
    most, move = [], ExpertStore._move

    def watched(store, batch):
        move(store, batch)
        memory = store.memory
        tensors = [t for each in memory._loaded.values() for m in (each.first, each.down) for t in m.tensors]
        own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        most.append((memory.resident, own, memory.source.resident))

    monkeypatch.setattr(ExpertStore, "_move", watched)
    with engine(folders[kind], experts=0.5, weights="int8", prefix_reuse=False) as own:
        ask_all(own, prompts(8), greedy(TOKENS))
        capacity = own.stats().memory.experts_capacity
        assert own.stats().evictions > 0
    assert len(most) > 5
    assert all(own <= resident <= capacity and source == 0 for resident, own, source in most)


def test_a_file_that_cannot_be_read_leaves_nothing(folders) -> None:
    with engine(folders["stock"], experts=0.5, weights="int8") as own:
        memory = own.runner.machine.store.memory
        there, gone = set(memory._loaded), [key for key in memory.parts if key not in memory._loaded]
        own.close()

        def broken(*pieces):
            raise MoesaicError("the disk is gone")

        memory.source._read = broken
        with pytest.raises(MoesaicError, match="the disk is gone"):
            memory.load(*gone)
        assert set(memory._loaded) == there and memory.source.resident == 0


# -- plan, calibration, commands --------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "mixtral", "qwen2-moe", "olmoe"])
def test_the_plan_counts_what_is_loaded(tmp_path: Path, family: str, weights: str) -> None:
    stock = family in ("mixtral", "qwen2-moe", "olmoe")
    folder = (stock_folder if stock else served_folder)(tmp_path / "m", family)
    backbone = load(folder, torch.bfloat16, bits=bits_of(weights)).model.backbone
    assert backbone.get_output_embeddings().outputs, "the head knows that its rows are not the step's"
    counted = {id(p): p.numel() * p.element_size() for p in [*backbone.parameters(), *backbone.buffers()]}
    products = [m.product for m in backbone.modules() if isinstance(m, PackedLinear | QuantizedLinear)]
    biases = [m.bias for m in backbone.modules() if isinstance(m, PackedLinear | QuantizedLinear)]
    held = sum(counted.values()) + sum(product.bytes for product in products)
    held += sum(2 * bias.numel() for bias in biases if bias is not None)
    planned = plan(folder, memory="4GiB", dtype="bfloat16", weights=weights)
    pregate = plan(folder, memory="4GiB", dtype="bfloat16").dense - dense_without_pregate(folder)
    assert abs(planned.dense - pregate - held) < 2000, "but small things: norms in one, positions' angles"


def dense_without_pregate(folder: Path) -> int:
    from moesaic.serve.model_files import ModelFiles

    gate = sum(4 * place.elements for name, place in ModelFiles(folder).tensors.items() if name.startswith("pregate."))
    return plan(folder, memory="4GiB", dtype="bfloat16").dense - gate


def test_the_plan_and_the_engine_agree(folders) -> None:
    options = {"context": 64, "max_requests": 2, "max_tokens": 16, "weights": "int8"}
    planned = plan(folders["shared"], dtype="float32", memory="2GiB", **options)
    with engine(folders["shared"], **options) as own:
        memory = own.runner.machine.memory
        assert (memory.dense, memory.least) == (planned.dense, planned.least_experts)
        assert own.runner.residency.layout.total_bytes == planned.all_experts
    with engine(folders["shared"], memory=planned.least_budget, **options) as own:
        assert len(ask(own, [5, 6], greedy(3)).wait().ids) == 3
    with pytest.raises(MoesaicError, match="below the minimum of this model"):
        engine(folders["shared"], memory=planned.least_budget - 1, **options).__enter__()


def test_what_int8_saves_is_advised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MiB of experts: of smaller ones what making them small takes outweighs what it saves."""
    sizes = {**COMMON, "hidden_size": 256, "intermediate_size": 1024}
    config = MixtralConfig(**sizes, num_local_experts=16, num_experts_per_tok=2)
    monkeypatch.setitem(FAMILIES, "large", lambda: config)
    folder = stock_folder(tmp_path / "m", "large")
    stored, small = (plan(folder, memory="2GiB", dtype="float32", weights=each) for each in ("stored", "int8"))
    assert 0.25 < small.all_experts / stored.all_experts < 0.26
    with pytest.raises(MoesaicError, match="--weights int8 saves"):
        plan(folder, memory="1MiB", dtype="float32")
    assert any("--weights int8 saves" in text for text in plan(folder, memory="550MiB", dtype="float32").advice)
    with pytest.raises(MoesaicError) as caught:
        plan(folder, memory="1MiB", dtype="float32", weights="int8")
    assert "--weights int8" not in str(caught.value)


def test_other_weights_are_refused(folders) -> None:
    for call in (lambda: EngineOptions(weights="int3"), lambda: plan(folders["stock"], weights="int3")):
        with pytest.raises(MoesaicError, match="weights 'int3': expected stored, int8 or int4"):
            call()
    result = CliRunner().invoke(app, ["plan", str(folders["stock"]), "--weights", "int3"])
    assert isinstance(result.exception, MoesaicError)


def test_the_command_plans(folders) -> None:
    arguments = ["plan", str(folders["stock"]), "--weights", "int8", "--memory", "2GiB"]
    assert "weights in int8" in " ".join(CliRunner().invoke(app, arguments).output.split())
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert told["weights"] == "int8"


def test_a_calibration_is_of_its_weights(folders, tmp_path: Path) -> None:
    folder, path = folders["shared"], tmp_path / "c.json"
    found = bench(folder, BenchOptions(memory="2GiB", dtype="float32", weights="int8", threads=1, seconds=0.3))
    found.save(path)
    assert found.model.weights == "int8" and found.card.weight_bytes < 4
    arguments = ["plan", str(folder), "--memory", "2GiB", "--dtype", "float32", "--calibration", str(path)]
    result = CliRunner().invoke(app, arguments)
    assert "measured with weights int8, this plan is with stored" in str(result.exception)
    assert CliRunner().invoke(app, [*arguments, "--weights", "int8"]).exit_code == 0


def test_least_work(folders) -> None:
    """The same flop, fewer bytes."""
    load = Load(decode=1, decode_pairs=10, outputs=1)
    load.rows[0] = 1
    stored, small = (ModelWork(folders["untied"], "float32", weights) for weights in ("stored", "int8"))
    assert stored.least_flop(load) == small.least_flop(load)
    assert stored.least_bytes(load) > small.least_bytes(load)


def test_int8_says_mostly_what_bfloat16_says(tmp_path: Path) -> None:
    """A trained model, most of its channels in both experts; compared token by token until the first that differs."""
    dense = load_model(str(pocket_path()))
    masks = [torch.ones(2, site.width, dtype=torch.bool) for site in find_ffn_sites(dense)]
    for mask in masks:
        mask[0, -8:] = mask[1, :8] = False
    attach(dense, masks, ["a", "b"]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    tokenizer.save_pretrained(tmp_path)
    asked = [
        tokenizer(text)["input_ids"] for text in ("def add(a, b):\n", "The licence", "for i in range(", "12 + 7 =")
    ]
    said = {}
    for weights in ("stored", "int8", "int4"):
        with engine(tmp_path, dtype="bfloat16", weights=weights) as own:
            said[weights] = ask_all(own, asked, greedy(16))

    def same(weights: str) -> float:
        pairs = [zip(*each, strict=True) for each in zip(said["stored"], said[weights], strict=True)]
        return sum(a == b for pair in pairs for a, b in pair) / (16 * len(asked))

    print(f"as bfloat16: int8 {same('int8'):.0%}, int4 {same('int4'):.0%}")
    assert same("int8") > 0.4


def test_few_bits_are_for_cpus(folders) -> None:
    with pytest.raises(MoesaicError, match="only CPUs have these products"):
        plan(folders["stock"], weights="int8", device="cpu", memory="2GiB")
