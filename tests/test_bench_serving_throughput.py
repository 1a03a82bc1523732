"""The serving benchmark's arithmetic by hand, and its transformers sides on a tiny model; never a bound on a time."""

import argparse
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.errors import MoesaicError
from moesaic.serve.request import Finished, Token

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SIZE = dict(layers=2, hidden=32, experts=4, width=16, heads=4, kv_heads=2, vocabulary=300, positions=128)


@pytest.fixture(scope="module")
def bench() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import serving_models
        import serving_sides
        import serving_throughput

        names = {**vars(serving_models), **vars(serving_sides), **vars(serving_throughput)}
        yield SimpleNamespace(**names)


@pytest.fixture(scope="module")
def folder(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "peer"
    bench.write_peer(bench.Size(**SIZE), folder)
    return folder


@pytest.fixture(scope="module")
def peer(bench: Any, folder: Path) -> Any:
    return bench.load_peer(folder)


def test_window_begins_when_all_have_begun(bench: Any) -> None:
    early, late = [0.0, 1.0, 2.0, 3.0, 5.0], [2.0, 3.0, 5.0]
    assert bench.decode_window([early, late], 2) == [(2, 4), (0, 2)]
    assert bench.decode_rate([early, late], 2) == pytest.approx(4 / 3)
    # tokens of one step are delivered one after the other: whoever comes after the last to begin gains nothing
    assert bench.decode_rate([[0.0, 1.0, 2.0], [0.1, 1.1, 2.1]], 1) == pytest.approx(2)
    for short in ([early, late[:2]], [early, []]):
        with pytest.raises(MoesaicError, match="fewer than 2 tokens"):
            bench.decode_window(short, 2)


def test_distinct(bench: Any) -> None:
    experts = torch.tensor([[0, 1, 2], [0, 3, 1], [0, 3, 0]])
    assert bench.distinct(experts, 4) == pytest.approx((1 + 2 + 3) / 3)


def test_distinct_by_layer_counts_what_the_experts_get(bench: Any, peer: Any) -> None:
    texts = bench.Cell(3, 9).prompts(SIZE["vocabulary"], 0)
    layers = [[] for _ in peer.model.layers]
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda module, args, into=into: into.append(args[1].view(3, 9)))
        for layer, into in zip(peer.model.layers, layers, strict=True)
    ]
    with torch.inference_mode():
        peer.model(input_ids=torch.tensor(texts), use_cache=False)
    for hook in hooks:
        hook.remove()
    sets = [len(set(into[0][:, place].tolist())) for into in layers for place in range(4, 8)]
    assert bench.distinct_by_layer(peer, texts, first=4, steps=4) == pytest.approx(sum(sets) / len(sets))


def test_step_bytes(bench: Any, peer: Any) -> None:
    """With every expert all weights but the embedding are read, of that one row per request; keys as cached."""
    size, cell, steps = bench.Size(**SIZE), bench.Cell(3, 10), 4
    embedding = peer.model.embed_tokens.weight
    weights = sum(p.numel() for p in peer.parameters()) - embedding.numel() + cell.batch * SIZE["hidden"]
    cache = peer(input_ids=torch.ones(cell.batch, 12, dtype=torch.long), use_cache=True).past_key_values
    keys = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    routers = sum(layer.mlp.gate.weight.numel() for layer in peer.model.layers)
    whole = bench.step_bytes(size, cell, steps, SIZE["experts"], pregate=False)
    assert whole == 2 * (weights + keys)
    one = 2 * SIZE["layers"] * 3 * SIZE["hidden"] * SIZE["width"]
    assert bench.step_bytes(size, cell, steps, SIZE["experts"] - 1.5, pregate=False) == whole - 1.5 * one
    width = size.pregate_config().width
    block = 3 * width**2 + 3 * width + 3 * (width**2 + width) + 2 * width  # qkv, out, up, down, norms
    gate = block + width + SIZE["experts"] * width + cell.batch * width * (1 + 2 * 12)
    assert bench.step_bytes(size, cell, steps, SIZE["experts"], pregate=True) == whole - 2 * routers + 4 * gate


def test_transformers_sides_decode_alike(bench: Any, folder: Path) -> None:
    prompts = bench.Cell(3, 8).prompts(SIZE["vocabulary"], 1)
    sides = bench.Generate(folder), bench.ContinuousBatching(folder)
    for side in sides:
        side.model.float()
    one, two = (side(prompts, 4) for side in sides)
    assert [len(text) for text in one.texts] == [8 + 5] * 3
    assert [text[:13] for text in two.texts] == one.texts
    assert one.tokens_per_s > 0 and two.tokens_per_s > 0


def test_our_model_is_of_the_same_size_and_is_served(bench: Any, tmp_path: Path) -> None:
    size = bench.Size(**SIZE)
    folder = bench.make(tmp_path / "ours", lambda path: bench.write_ours(size, path))
    model = AutoModelForCausalLM.from_pretrained(folder)
    experts = sum(p.numel() for blocks in model.ffns() for p in blocks.parameters())
    assert experts == size.layers * size.experts * 3 * size.hidden * size.width
    for blocks in model.ffns():
        assert [blocks.layout.expert_width(expert) for expert in range(size.experts)] == [size.width] * size.experts
        assert blocks.layout.width == size.experts * size.width and blocks.layout.shared == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == size.vocabulary and tokenizer.eos_token_id == 0
    assert bench.make(folder, lambda path: pytest.fail("made again")) == folder
    side = bench.Ours(folder, requests=3, threads=1)
    try:
        decode = side(bench.Cell(3, 8).prompts(size.vocabulary, 0), 4)
        assert decode.tokens_per_s > 0 and 1 <= decode.experts <= 3
    finally:
        side.engine.close()


def test_a_side_apart_answers_and_fails_like_one_here(bench: Any, folder: Path) -> None:
    prompts = bench.Cell(2, 4).prompts(SIZE["vocabulary"], 1)
    apart = bench.Apart(partial(bench.Generate, folder), threads=1)
    try:
        assert apart(prompts, 3).texts == bench.Generate(folder)(prompts, 3).texts
        with pytest.raises(MoesaicError, match="process of a side ended"):
            apart(prompts, 0)
    finally:
        apart.close()


def test_llama_output(bench: Any) -> None:
    line = '{"pp": 16, "tg": 32, "pl": 8, "t_pp": 9.0, "t_tg": 2.0, "speed_tg": 1.0}'
    assert bench.llama_rate(f"\nload: noise\n{line}\n\n", 8) == 128
    with pytest.raises(MoesaicError, match="no result"):
        bench.llama_rate("error", 8)
    with pytest.raises(MoesaicError, match="no result for 1 "):
        bench.llama_rate(line, 1)
    with pytest.raises(MoesaicError, match="build llama"):
        bench.llama_parts(Path("nowhere"))


def test_ratios_are_of_rounds(bench: Any) -> None:
    row = bench.row({"moesaic": [10.0, 30.0, 20.0], "generate": [5.0, 10.0, 40.0]})
    assert row["sides"]["moesaic"] == {"tokens_per_s": {"median": 20, "min": 10, "max": 30}}
    assert row["sides"]["generate"]["ours_over_it"] == {"median": 2, "min": 0.5, "max": 3}
    assert "ours_over_it" not in bench.row({"generate": [5.0]})["sides"]["generate"]
    assert bench.mean([bench.Decode(30.0), bench.Decode(60.0, 2.0)]) == bench.Decode(40.0, 2.0)


def test_watch_ends_when_each_has_enough(bench: Any) -> None:
    watch = bench.Watch(2, steps=2)
    one, two = watch.deliver(0), watch.deliver(1)
    for who in (one, one, two, one, two, one):
        who(Token(5, "", expert=3))
    assert not watch.enough.is_set()  # the second has one token after the first that all have
    for who in (one, two):
        who(Token(5, "", expert=3))
    assert watch.enough.is_set() and not watch.ended.is_set()
    for who in (one, two):
        who(Finished("cancelled", "", 1, 1))
    assert watch.ended.is_set() and not watch.problem
    assert bench.decode_rate(watch.stamps, 2) > 0 and watch.experts == [[3] * 5, [3] * 3]


def test_watch_tells_of_a_failed_request(bench: Any) -> None:
    watch = bench.Watch(2, steps=2)
    watch.deliver(0)(Finished("error", "", 1, 0, message="out of memory"))
    assert watch.enough.is_set() and "out of memory" in watch.problem


def test_rounds_without_llama(bench: Any, tmp_path: Path) -> None:
    args = argparse.Namespace(
        work=tmp_path, sides=("generate", "continuous", "llama.cpp"), llama=None, rounds=2, steps=3, threads=1
    )
    size, cells = bench.Size(**SIZE), [bench.Cell(2, 5)]
    peers = bench.assemble(args, size, cells)
    assert list(peers.sides) == ["generate", "continuous"] and "--llama" in peers.missing[0]
    results = bench.play(peers, cells, args, size)
    row = bench.cell_row(peers, size, cells[0], results[cells[0]], args.steps, read_gb_s=1.0)
    assert all(len(rates) == 2 for rates in row["rounds"].values())
    for side in row["sides"].values():
        assert 1 <= side["experts_per_step"] <= 2 and math.isfinite(side["of_floor"])
    record = {"machine": {"name": "it", "threads": 1, "read_gb_s": 1.0}, "rounds": 2, "cells": [row]}
    assert [table.row_count for table in bench.tables(record)] == [1, 1]
    side = row["sides"]["generate"]
    row["sides"] = {"moesaic": side, "generate": {**side, "ours_over_it": bench.spread([2.0, 1.0, 3.0])}}
    assert list(list(bench.tables(record))[1].columns[1].cells) == ["2.00 (1.00 to 3.00)"]
