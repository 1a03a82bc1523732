"""A model folder and options put together: every part of a running engine, none of them started."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moesaic.errors import MoesaicError
from moesaic.experts.lowbit_sizes import bits_of
from moesaic.models.loading import stored_dtype
from moesaic.schedule.family import BATCHERS, EVICTIONS, PREDICTORS, make
from moesaic.schedule.residency import Residency
from moesaic.schedule.work import Key, Layout
from moesaic.serve.counters import Counters
from moesaic.serve.experts import BlockExperts, Packs, experts_of
from moesaic.serve.gate import Gate
from moesaic.serve.intake import Intake
from moesaic.serve.kv import KVPool
from moesaic.serve.loading import Loaded, ServedMoesaic, fill_blocks, load, served_dtype
from moesaic.serve.lowbit_memory import QuantizedExperts, QuantizedMemory, entry_memory
from moesaic.serve.memory import MemorySplit
from moesaic.serve.memory_plan import MemoryPlan, plan
from moesaic.serve.model_files import ModelFiles
from moesaic.serve.options import EngineOptions
from moesaic.serve.prices import LivePrices
from moesaic.serve.runner import Machine, Runner
from moesaic.serve.step import Backbone
from moesaic.serve.stock import ServedStock, StockExperts, expert_matrices
from moesaic.serve.stock_step import StockBackbone
from moesaic.serve.store import ExpertMemory, ExpertStore

PRE_GATE, STICKY = "exact-pre-gate", "previous-step"  # what is expected, and what instead where no pre-gate knows


def assemble(folder: Path, options: EngineOptions, counters: Counters) -> tuple[Runner, Intake]:
    """What runs requests and what takes them in.

    Raises MoesaicError if the model cannot be served, or not within the memory that is given.
    """
    if not (folder / "config.json").is_file():
        raise MoesaicError(
            f"{folder} is no model folder: it has no config.json; give what moesaic refactor "
            "wrote, or a mixture of experts of transformers"
        )
    planned = plan(
        folder,
        memory=options.memory,
        experts=options.experts,
        context=options.context,
        max_requests=options.max_requests,
        max_tokens=options.max_tokens,
        dtype=options.dtype,
        weights=options.weights,
    )
    dtype = served_dtype(stored_dtype(folder), options.dtype)
    loaded = load(folder, dtype, options.pack, bits_of(options.weights))
    pool = KVPool(loaded.kv, options.max_requests, planned.context)
    store, memory = _store(loaded, options, planned)
    model, packs = loaded.model, Packs()
    places = experts_of(store.residency.layout.entries)
    store.on_left = lambda key: packs.drop(places(key))
    backbone = _backbone(loaded, store, pool, packs)
    gate = Gate(model.pregate, len(model.expert_names), len(loaded.kv) - _gate_layers(model))
    prices = LivePrices(store.residency, store)
    batcher = make(BATCHERS, "batcher", options.batcher, prices=prices, max_wait_s=options.max_wait_s)
    machine = Machine(backbone, gate, store, memory, packs)
    runner = Runner(machine, batcher, prices, options, counters)
    runner.eos = end_tokens(model, loaded.tokenizer)
    vocab = int(model.backbone.config.get_text_config(decoder=True).vocab_size)
    most = model.most if isinstance(model, ServedStock) else None
    return runner, Intake(loaded.tokenizer, vocab, runner.eos, list(model.expert_names), gate, pool, memory, most)


def _gate_layers(model: ServedMoesaic | ServedStock) -> int:
    return 0 if model.pregate is None else int(model.pregate.config.layers)


def _backbone(loaded: Loaded, store: ExpertStore, pool: KVPool, packs: Packs) -> Backbone:
    model = loaded.model
    if isinstance(model, ServedStock):
        return StockBackbone(model, _stock_layers(loaded.files, model, store.memory, packs), store, pool)
    experts: list[Any] = [BlockExperts(blocks, layer, packs) for layer, blocks in enumerate(model.blocks)]
    if isinstance(memory := store.memory, QuantizedMemory):
        layers = enumerate(zip(experts, model.blocks, strict=True))
        experts = [QuantizedExperts(memory, layer, own.activate, blocks.down_bias) for layer, (own, blocks) in layers]
    return Backbone(model, experts, store, pool)


def _stock_layers(files: ModelFiles, model: ServedStock, memory: Any, packs: Packs) -> list[Any]:
    source: ExpertMemory = memory.source if isinstance(memory, QuantizedMemory) else memory
    matrices = [expert_matrices(each, files, source.parts, source.tensor) for each in model.experts]
    if isinstance(memory, QuantizedMemory):
        return [QuantizedExperts(memory, each.layer, each.own._apply_gate) for each in model.experts]
    return [StockExperts(*each, packs) for each in zip(model.experts, matrices, strict=True)]


def _store(loaded: Loaded, options: EngineOptions, planned: MemoryPlan) -> tuple[ExpertStore, MemorySplit]:
    config, drop = loaded.model.config.to_dict(), options.page_cache == "drop"
    layout, source, memory = entry_memory(config, loaded.files, options.weights, loaded.dtype, drop)
    if isinstance(loaded.model, ServedMoesaic):
        for blocks, name in zip(loaded.model.blocks, loaded.model.names, strict=True):
            fill_blocks(blocks, name, source.tensor, loaded.files.tensors)
    elif options.predictor == PRE_GATE:
        options = replace(options, predictor=STICKY)
    split = MemorySplit(
        budget=planned.budget,
        dense=planned.dense,
        buffers=planned.buffers,
        least=planned.least_experts,
        all_experts=layout.total_bytes,
        fixed=planned.experts if options.experts is not None else None,
    )
    return ExpertStore(memory, partial(_residency, layout, options, split.for_experts(0))), split


def _residency(layout: Layout, options: EngineOptions, capacity: int, left: Callable[[Key], None]) -> Residency:
    policy = partial(make, EVICTIONS, "cache policy", options.policy, seed=options.seed, layers=len(layout.layers))
    most = max(Counter(key.layer for key in layout.bytes).values())
    predictor = make(PREDICTORS, "predictor", options.predictor, width=most)
    return Residency(
        layout,
        capacity,
        policy,
        predictor,
        lookahead=options.lookahead,
        persist=True,
        preload=sorted(layout.bytes),
        left=left,
    )


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: what generate() stops at."""
    named = getattr(model.generation_config, "eos_token_id", None)
    if named is None:
        named = tokenizer.eos_token_id
    if isinstance(named, torch.Tensor):
        named = named.tolist()
    return frozenset([named] if isinstance(named, int) else named or ())
