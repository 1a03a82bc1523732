"""The speed benchmarks at their smallest: what they compare computes the same, and what they print follows from it."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moesaic.errors import MoesaicError
from moesaic.refactor.speed import Cell, least_work
from moesaic.serve.model_files import ModelFiles
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import Generation, Token

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("whole_model", "whole_model_files", "whole_model_sides", "ffn_floor", "healing_step", "start")


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield SimpleNamespace(**{name: __import__(name) for name in MODULES})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole-model")


@pytest.fixture(scope="module")
def moe(bench: Any, work: Path) -> Path:
    return bench.whole_model_files.moe_folder(work, "tiny", "float32")


def arguments(bench: Any, work: Path, *words: str) -> Any:
    return bench.whole_model.parse(["--quick", "--work", str(work), "--dtype", "float32", *words])


# -- models -----------------------------------------------------------------------------------------------------------
def test_routes_are_known(bench: Any, moe: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe)
    ids = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(input_ids=ids).expert_index, ids % bench.whole_model.EXPERTS)
    dense = AutoModelForCausalLM.from_pretrained(moe.with_name("dense"))
    everything = model.backbone(input_ids=ids).logits  # no mask: all channels that are kept
    assert not torch.equal(everything, dense(input_ids=ids).logits)
    for blocks in model.ffns():
        assert {blocks.layout.expert_width(e) for e in range(bench.whole_model.EXPERTS)} == {32}


def test_tokenizer_has_the_vocabulary(bench: Any, moe: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(moe)
    assert len(tokenizer) == 512 and tokenizer.eos_token_id == 0
    text = "héllo, wörld"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert max(tokenizer.decode([number]).__len__() for number in range(1, 512)) == 2  # it does merge
    assert bench.whole_model_files.moe_folder(moe.parent.parent, "tiny", "float32") == moe


def test_queries_turn_as_in_llama(bench: Any) -> None:
    """Rotating neighbours of the reordered rows is rotating the halves of the original."""
    config = bench.whole_model_files.llama_config("tiny")
    heads, width = config.num_attention_heads, config.head_dim
    weight, x = torch.randn(heads * width, config.hidden_size), torch.randn(config.hidden_size)
    moved = bench.whole_model_files._as_llama("model.layers.0.self_attn.q_proj.weight", weight, config)
    angle = torch.rand(width // 2)
    one, two = (weight @ x).view(heads, 2, width // 2).unbind(1)
    halves = torch.stack((one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()), 1)
    one, two = (moved @ x).view(heads, width // 2, 2).unbind(2)
    neighbours = torch.stack((one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()), 2)
    torch.testing.assert_close(halves.transpose(1, 2).reshape(-1), neighbours.reshape(-1))
    assert bench.whole_model_files._as_llama("model.layers.0.self_attn.v_proj.weight", weight, config) is weight


# -- sides ------------------------------------------------------------------------------------------------------------
def test_engine_and_transformers_say_the_same(bench: Any, moe: Path) -> None:
    """The sides `moe` and `engine` run the same model: greedy tokens in float32 are equal."""
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    model.generation_config = GenerationConfig()
    served = bench.whole_model_sides.served(moe, "stored", dtype="float32", threads=1, max_requests=2, context=64)
    try:
        for seed in range(2):
            ids = torch.randint(1, 512, (1, 12), generator=torch.Generator().manual_seed(seed))
            wanted = model.generate(
                ids, generation_config=GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
            )
            tokens: list[int] = []
            watch = bench.whole_model_sides._First()

            def hear(event: Any, tokens: list[int] = tokens, watch: Any = watch) -> None:
                tokens += [event.id] if isinstance(event, Token) else []
                watch(event)

            served.engine.submit(ids[0].tolist(), Generation(max_tokens=8, temperature=0, ignore_eos=True), hear)
            assert watch.ended.wait(60) and not watch.problem
            assert tokens == wanted[0, 12:].tolist()
    finally:
        served.engine.close()


def test_sides_of_one_model(bench: Any, moe: Path) -> None:
    """Experts of a decode cell are those that its tokens name, in transformers and in the engine."""
    served = bench.whole_model_sides.served(moe, "stored", dtype="float32", threads=1, max_requests=4, context=96)
    forward = bench.whole_model_sides.load_forward(moe, "float32")
    try:
        for cell, experts in ((Cell("decode", 3, 1, 8, 4), 3), (Cell("prefill", 1, 32, 0, 2), 6)):
            ids = bench.whole_model.token_ids(cell, 512, 0)
            for side in (served, forward):
                timing = side(cell, ids)
                assert timing.seconds > 0 and timing.experts == experts
        kept = forward._keys[Cell("decode", 3, 1, 8, 4)][1]
        assert kept.get_seq_length() == 8  # steps ran on copies
        with pytest.raises(MoesaicError, match="not accepting requests"):
            served.engine.stop()
            served.prefill(cell, ids)
    finally:
        served.engine.close()


def test_weights_the_engine_does_not_have(bench: Any, moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [each for each in bench.whole_model_sides.dataclasses.fields(EngineOptions) if each.name != "weights"]
    monkeypatch.setattr(bench.whole_model_sides.dataclasses, "fields", lambda of: fields)
    with pytest.raises(MoesaicError, match="int8"):
        bench.whole_model_sides.served(moe, "int8")


def test_prepared_models_need_a_version_that_has_it(bench: Any, moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moesaic.models.tuning", None)
    with pytest.raises(MoesaicError, match="tuned"):
        bench.whole_model_sides.load_forward(moe, "float32", "tuned")


def test_llama_seconds(bench: Any) -> None:
    seconds = bench.whole_model_sides.llama_seconds
    line = '{"pp": 64, "tg": 16, "pl": 8, "t_pp": 9.0, "t_tg": 2.0}'
    assert seconds(f"noise\n{line}\n", Cell("decode", 8, 1, 64, 16)) == 2.0 / 16
    assert seconds(line, Cell("decode", 1, 1, 64, 16)) is None and seconds("", Cell("decode", 8, 1, 64, 16)) is None
    line = '{"pp": 128, "tg": 1, "pl": 1, "t_pp": 9.0, "t_tg": 2.0}'
    assert seconds(line, Cell("prefill", 1, 128, 0, 4)) == 9.0


# -- the whole --------------------------------------------------------------------------------------------------------
def test_whole_model_quick(bench: Any, moe: Path) -> None:
    args = arguments(bench, moe.parent.parent, "--sides", "dense", "moe", "engine", "llama")
    record = bench.whole_model.run(args, Console(quiet=True))
    json.dumps(record, allow_nan=False)
    assert "--llama" in record["left_out"][0]
    assert [row["name"] for row in record["cells"]] == ["prefill of 32", "decode at batch 1", "decode at batch 3"]
    for row in record["cells"]:
        assert list(row["sides"]) == ["dense", "moe", "engine"]
        assert all(len(rounds) == 2 for rounds in row["seconds"].values())
        assert all(side["of_floor"] > 0 for side in row["sides"].values())
    assert [row["sides"]["engine"]["experts"] for row in record["cells"]] == [6, 1, 3]
    assert {each["target"] for each in record["targets"]} == {1}  # the others are about another shape
    assert [table.row_count for table in bench.whole_model.tables(record)] == [9, 2]


def test_stock_side(bench: Any) -> None:
    side = bench.whole_model_sides.stock_forward(bench.whole_model.stock_size("tiny"), "float32")
    cell = Cell("decode", 2, 1, 6, 3)
    assert side(cell, bench.whole_model.token_ids(cell, 512, 0)).seconds > 0
    experts = side.model.model.layers[0].mlp.experts
    assert tuple(experts.down_proj.shape) == (6, 32, 32)


def test_floor_of_a_step(bench: Any, moe: Path) -> None:
    """Bytes of a step are those of the models as they are loaded; fewer bits are so many times fewer bytes."""
    machine = SimpleNamespace(gemm_gflop_s={"float32": 1.0}, read_gb_s=1.0)
    args = arguments(bench, moe.parent.parent)
    floors = bench.whole_model.Floors(args, machine)
    cell = Cell("decode", 3, 1, 8, 4)
    ids, timing = bench.whole_model.token_ids(cell, 512, 0), bench.whole_model_sides.Timing(1.0)
    for side, folder in (("dense", moe.with_name("dense")), ("engine", moe)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        cache = model(input_ids=ids[:, :10], use_cache=True).past_key_values
        cache.layers = cache.layers[:2]  # the backbone's
        new = ids[:, 8:9]
        wanted = least_work(model, new, new.flatten() % 6 if side == "engine" else None, 10, cache)
        found = floors.work(side, cell, ids, timing)
        assert (found.weight_bytes, found.cache_bytes) == (wanted.weight_bytes, wanted.cache_bytes)
        assert found.flops == wanted.flops
    half = (
        floors.work("llama-q8_0", cell, ids, timing).weight_bytes / floors.work("dense", cell, ids, timing).weight_bytes
    )
    assert half == pytest.approx(8.5 / 32)
    assert floors.work("stock", cell, ids, timing).weight_bytes > 0


def test_targets(bench: Any) -> None:
    def row(kind: str, batch: int, **seconds: list[float]) -> dict[str, Any]:
        return {"name": f"{kind} {batch}", "kind": kind, "batch": batch, "seconds": seconds}

    rows = [
        row("prefill", 1, dense=[2.0, 2.0], engine=[1.0, 2.0], llama=[1.0, 1.0]),
        row("decode", 1, dense=[3.0, 3.0], engine=[1.0, 2.0], llama=[2.0, 2.0]),
        row("decode", 8, dense=[1.0, 1.0], engine=[2.0, 2.0], llama=[2.0, 2.0]),
    ]
    small = list(bench.whole_model.targets(rows, "wide"))
    assert [(each["target"], each["is"], each["met"]) for each in small] == [(1, 0.5, False)]
    assert small[0]["what"].endswith("worst of 3 cells: decode 8")
    large = list(bench.whole_model.targets(rows, "1b"))
    assert [(each["target"], each["is"], each["met"]) for each in large] == [
        (1, 0.5, False),
        (2, 2.25, True),
        (2, 0.5, False),
        (5, 1.5, True),
    ]


def test_ffn_floor_quick(bench: Any) -> None:
    record = bench.ffn_floor.run(bench.ffn_floor.parse(["--quick"]), Console(quiet=True))
    json.dumps(record, allow_nan=False)
    assert [(each["dtype"], each["tokens"]) for each in record["cells"]] == [
        (dtype, tokens) for dtype in ("bfloat16", "float32") for tokens in (1, 3, 512)
    ]
    assert {"dense", "stock", "masked", "chosen", "served"} <= set(record["cells"][0]["sides"])
    assert [each["target"] for each in record["targets"]] == [3, 4, 3, 4]
    assert len(list(bench.ffn_floor.tables(record))) == 3


def test_ffn_sides_compute_the_same(bench: Any) -> None:
    case = bench.ffn_floor.Case("tiny", torch.float32)
    with torch.inference_mode():
        layers = bench.ffn_floor.Layers(case)
        expert_N = torch.arange(7) % bench.ffn_floor.EXPERTS
        x = torch.randn(7, case.hidden)
        out = {name: side(1, x) for name, side in layers.sides(expert_N).items()}
        torch.testing.assert_close(out["dense packed"], out["dense"])
        for name in (*bench.ffn_floor.paths(layers.blocks[1]), "chosen", "served"):
            torch.testing.assert_close(out[name], out["masked"], msg=lambda text, name=name: f"{name}: {text}")
        stock, one = layers.stock[1], layers.stock[1].down_proj[2]
        gate, up = (stock.gate_up_proj[2] @ x[2]).chunk(2)
        torch.testing.assert_close(out["stock"][2], one @ (torch.nn.functional.silu(gate) * up))
    read, flop = bench.ffn_floor.needed(layers, "masked", expert_N[:1])
    assert (read, flop) == (3 * 32 * 32 * 4, 2 * 3 * 32 * 32)
    assert bench.ffn_floor.needed(layers, "dense", expert_N) == (3 * 32 * 64 * 4, 2 * 7 * 3 * 32 * 64)


def test_healing_quick(bench: Any, work: Path) -> None:
    args = bench.healing_step.parse(["--quick", "--work", str(work), "--sides", "dense", "experts", "router"])
    record = bench.healing_step.run(args, Console(quiet=True))
    json.dumps(record, allow_nan=False)
    assert [each["what"] for each in record["targets"]] == [
        "experts: time",
        "experts: memory",
        "router: time",
        "router: memory",
    ]
    for name, side in record["sides"].items():
        parts = side["parts"]
        assert (parts["teacher"] > 0) == (name != "dense") and parts["backward"] > 0
        assert len(side["rounds"]) == 2
    assert len(list(bench.healing_step.tables(record))) == 3
    says = record["arithmetic"]["experts"]
    assert says["flop, own channels"] < says["flop, union of experts"] < 4 / 3


def test_peak_of_memory(bench: Any) -> None:
    bench.healing_step.forget_peak()
    before, size = bench.healing_step.resident(), 2**27
    torch.ones(size // 4)
    assert bench.healing_step.peak() - before > 0.9 * size


def test_a_healing_side_trains_what_it_should(bench: Any, work: Path) -> None:
    config = bench.healing_step.HealConfig(batch_size=2, length=8, tokens=10**6, dtype="fp32")
    make = partial(bench.healing_step.Training, work=work, model="tiny", config=config, steps=1)
    sizes = {}
    for name in ("dense", "experts", "router"):
        side = make(name)
        before = {key: value.detach().clone() for key, value in side.trainer.trainable.items()}
        step = side(0)
        assert all(
            not torch.equal(before[key], value) for key, value in side.trainer.trainable.items() if value.ndim > 1
        )
        assert sum(step.parts.values()) == pytest.approx(step.seconds)
        sizes[name] = sum(value.numel() for value in before.values())
    assert sizes["router"] < sizes["experts"] < sizes["dense"]  # channels that no expert owns are gone


def test_start_quick(bench: Any, moe: Path) -> None:
    args = bench.start.parse(["--quick", "--work", str(moe.parent.parent), "--dtype", "float32"])
    record = bench.start.run(args)
    json.dumps(record, allow_nan=False)
    assert list(record["parts_s"]) == ["interpreter", "imports", "load", "experts", "first prompt"]
    assert sum(record["parts_s"].values()) == pytest.approx(record["start_s"])
    assert 0 < sum(record["inside_load_s"].values()) < record["parts_s"]["load"]
    assert [each["target"] for each in record["targets"]] == [7]
    assert len(list(bench.start.tables(record))) == 2


def test_needed_bytes(bench: Any, moe: Path) -> None:
    """All experts need all bytes; one needs the dense part and its own channels."""
    files = ModelFiles(moe)
    total = sum(place.stop - place.start for place in files.tensors.values())
    everything = bench.start.needed(moe, range(6))
    assert sum(stop - start for _, start, stop in everything) == total
    experts = sum(place.stop - place.start for name, place in files.tensors.items() if ".blocks." in name)
    one = bench.start.needed(moe, [2])
    assert sum(stop - start for _, start, stop in one) == total - experts + 2 * 3 * 32 * 32 * 4
    assert bench.start.read(one)["bytes"] == sum(stop - start for _, start, stop in one)
