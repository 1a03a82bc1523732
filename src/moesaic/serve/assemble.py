"""A model folder and options put together: every part of a running engine, none of them started."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from moesaic.serve.kernel_experts import KernelExperts, usable
from moesaic.serve.kv import KVPool
from moesaic.serve.loading import Loaded, ServedMoesaic, fill_blocks, load, served_device, served_dtype
from moesaic.serve.lowbit_memory import QuantizedExperts, QuantizedMemory, entry_memory
from moesaic.serve.memory import MemorySplit
from moesaic.serve.memory_plan import MemoryPlan, plan
from moesaic.serve.options import EngineOptions
from moesaic.serve.prices import LivePrices
from moesaic.serve.runner import Machine, Runner
from moesaic.serve.slab import SlabExperts, SlabMemory, block_channels, stock_channels
from moesaic.serve.step import Backbone
from moesaic.serve.stock import ServedStock, StockExperts, expert_matrices
from moesaic.serve.stock_step import StockBackbone
from moesaic.serve.store import EntryMemory, ExpertMemory, ExpertStore

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
        device=options.device,
        host_memory=options.host_memory,
    )
    device = None if options.device is None else served_device(options.device, planned.budget)
    if device is not None:
        options = replace(options, max_requests=planned.requests)
    dtype = served_dtype(stored_dtype(folder), options.dtype)
    loaded = load(folder, dtype, options.pack, device, bits_of(options.weights))
    pool = KVPool(loaded.kv, options.max_requests, planned.context, device)
    model, packs = loaded.model, Packs()
    config, drop = model.config.to_dict(), options.page_cache == "drop"
    layout, host, held = entry_memory(config, loaded.files, options.weights, loaded.dtype, drop)
    if isinstance(held, QuantizedMemory):
        experts = _quantized_experts(loaded, host, held)
    elif device is None:
        experts = _experts(loaded, host, layout, packs)
    else:
        experts = _slab_experts(loaded, host, layout, planned, device)
    store, memory = _store(layout, experts, loaded, options, planned)
    backbone: Backbone
    if isinstance(model, ServedStock):
        backbone = StockBackbone(model, experts.layers, store, pool)
    else:
        backbone = Backbone(model, experts.layers, store, pool)
        backbone.unions |= (
            loaded.dtype == torch.bfloat16
            and not options.batch_invariant
            and all(isinstance(each, BlockExperts) and each.own for each in experts.layers)
        )
    gate = Gate(model.pregate, len(model.expert_names), len(loaded.kv) - _gate_layers(model), pool)
    prices = LivePrices(store.residency, store, pool.device)
    batcher = make(BATCHERS, "batcher", options.batcher, prices=prices, max_wait_s=options.max_wait_s)
    machine = Machine(backbone, gate, store, memory, packs)
    runner = Runner(machine, batcher, prices, options, counters)
    runner.eos = end_tokens(model, loaded.tokenizer)
    vocab = int(model.backbone.config.get_text_config(decoder=True).vocab_size)
    most = model.most if isinstance(model, ServedStock) else None
    return runner, Intake(loaded.tokenizer, vocab, runner.eos, list(model.expert_names), gate, pool, memory, most)


def _gate_layers(model: ServedMoesaic | ServedStock) -> int:
    return 0 if model.pregate is None else int(model.pregate.config.layers)


@dataclass
class Experts:
    """The experts of every layer, what moves their entries, and what has to hear of entries that leave."""

    layers: list[Any]
    memory: EntryMemory
    left: Callable[[Key], None]


def _experts(loaded: Loaded, host: ExpertMemory, layout: Layout, packs: Packs) -> Experts:
    """In main memory."""
    model, layers = loaded.model, list[Any]()
    places = experts_of(layout.entries)
    if isinstance(model, ServedStock):
        layers += [StockExperts(*each, packs) for each in zip(model.experts, _matrices(loaded, host), strict=True)]
    else:
        _fill(loaded, host)
        layers += [BlockExperts(blocks, layer, packs) for layer, blocks in enumerate(model.blocks)]
    return Experts(layers, host, lambda key: packs.drop(places(key)))


def _quantized_experts(loaded: Loaded, host: ExpertMemory, memory: QuantizedMemory) -> Experts:
    """In main memory, in few bits; `host` only reads them."""
    model, layers = loaded.model, list[Any]()
    if isinstance(model, ServedStock):
        _matrices(loaded, host)  # are of the shapes that the model has
        layers += [QuantizedExperts(memory, each.layer, each.own._apply_gate) for each in model.experts]
    else:
        _fill(loaded, host)
        for layer, blocks in enumerate(model.blocks):
            activate = BlockExperts(blocks, layer, Packs()).activate
            layers.append(QuantizedExperts(memory, layer, activate, blocks.down_bias))
    return Experts(layers, memory, lambda key: None)


def _slab_experts(
    loaded: Loaded, host: ExpertMemory, layout: Layout, planned: MemoryPlan, device: torch.device
) -> Experts:
    """On a device, those that do not fit in main memory."""
    model, layers, packs = loaded.model, list[Any](), Packs()
    places = experts_of(layout.entries)
    if isinstance(model, ServedStock):
        channels = stock_channels(matrices := _matrices(loaded, host))
    else:
        _fill(loaded, host)
        channels = block_channels(model.blocks)
    memory = SlabMemory(host, channels, planned.experts, planned.host, device)
    slab = SlabExperts(memory, layout.entries)
    if isinstance(model, ServedStock):
        for layer, own in enumerate(model.experts):
            layers.append(StockExperts(own, slab.matrices(layer, len(matrices[layer])), packs))
    else:
        for blocks in model.blocks:
            if blocks.down_bias is not None:
                blocks.down_bias = torch.nn.Parameter(blocks.down_bias.to(device), requires_grad=False)
        if all(usable(blocks, device) for blocks in model.blocks):
            layers += [KernelExperts(*each) for each in zip(model.blocks, slab.stored(model.blocks), strict=True)]
        else:
            layers += [BlockExperts(own, layer, packs, slab.rows(layer)) for layer, own in enumerate(model.blocks)]

    def left(key: Key) -> None:
        slab.drop(places(key))
        memory.left(key)

    return Experts(layers, memory, left)


def _fill(loaded: Loaded, host: ExpertMemory) -> None:
    assert isinstance(loaded.model, ServedMoesaic)
    for blocks, name in zip(loaded.model.blocks, loaded.model.names, strict=True):
        fill_blocks(blocks, name, host.tensor, loaded.files.tensors)


def _matrices(loaded: Loaded, host: ExpertMemory) -> list[list[list[torch.Tensor]]]:
    return [expert_matrices(each, loaded.files, host.parts, host.tensor) for each in loaded.model.experts]


def _store(
    layout: Layout, experts: Experts, loaded: Loaded, options: EngineOptions, planned: MemoryPlan
) -> tuple[ExpertStore, MemorySplit]:
    if isinstance(loaded.model, ServedStock) and options.predictor == PRE_GATE:
        options = replace(options, predictor=STICKY)
    split = MemorySplit(
        budget=planned.budget,
        dense=planned.dense,
        buffers=planned.buffers,
        least=planned.least_experts,
        all_experts=layout.total_bytes,
        fixed=planned.experts if options.experts is not None or options.device is not None else None,
    )
    store = ExpertStore(experts.memory, partial(_residency, layout, options, split.for_experts(0)))
    store.on_left = experts.left
    return store, split


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
