"""The speed receipt: dense source against refactored model, taking turns, each beside the least time its work can take.

Shapes: B batch, S new tokens per sequence, N = B * S tokens, W stored channels of an FFN, D model width.
"""

import contextlib
import copy
import gc
import inspect
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.experts.channel_blocks import ChannelBlocks
from moesaic.progress import Progress
from moesaic.refactor.machine import Machine, big_array, measure_machine, read_bandwidth, synchronize

PREFILL_REPEATS = 3  # forwards per round: a single one is at the mercy of whatever else runs
SIDES = ("dense", "moe")


@dataclass(frozen=True)
class Cell:
    """One line of the receipt: forwards of `length` new tokens for each of `batch` sequences."""

    kind: str  # "prefill" or "decode"
    batch: int
    length: int  # new tokens per sequence and forward
    context: int  # tokens already in the cache at the first forward
    forwards: int  # timed forwards per round and model

    @property
    def name(self) -> str:
        """What people read."""
        return f"prefill of {self.length}" if self.kind == "prefill" else f"decode at batch {self.batch}"


@dataclass(frozen=True)
class Work:
    """The least that one forward has to do, whatever the implementation."""

    weight_bytes: float  # weights to be read, each once
    cache_bytes: float  # keys and values to be read, each once
    flops: float  # 2 per weight and token, plus attention's
    experts: float | None = None  # distinct ones among the tokens; None for a model without routes

    def floor(self, read_gb_s: float, gemm_gflop_s: float) -> tuple[float, str]:
        """Seconds that no implementation on this machine can beat, and what sets them: "bandwidth" or "gemm"."""
        reading = (self.weight_bytes + self.cache_bytes) / (read_gb_s * 1e9)
        computing = self.flops / (gemm_gflop_s * 1e9)
        return (reading, "bandwidth") if reading >= computing else (computing, "gemm")


def measure_speed(
    dense: nn.Module,
    moe: nn.Module,
    prompt_ids: Tensor,
    *,
    prefill_tokens: int = 512,
    decode_context: int = 64,
    decode_steps: int = 16,
    batches: Sequence[int] = (1, 8, 32),
    rounds: int = 5,
    budget_s: float = 120.0,
) -> dict[str, Any]:
    """Time both models on the same tokens: prefill of one prompt, then decode at each batch size.

    The two take turns inside every round and swap who goes first, so that whatever else the machine does hits both.
    Decode feeds the text's own next token, so that both models, and the routes, see real text at every step.

    prompt_ids:     (B, S) int64, B >= the largest batch. Rows are shuffled, so that a batch mixes kinds of text, and
                    different rows are used in different rounds. A small S shortens the prefill and the context.
    rounds:         at most; no new round begins after `budget_s` seconds, but one is always made.

    Returns a JSON-able dict. Times are medians over all forwards of all rounds; a ratio is tokens/s of `moe` over
    tokens/s of `dense`, median, least and greatest over the rounds. "share" is the floor (see `Work`) over the time.

    Raises MoesaicError if `prompt_ids` is too small.
    """
    cells = _cells(prompt_ids, prefill_tokens, decode_context, decode_steps, batches)
    parameter = next(dense.parameters())
    runner = _Runner({"dense": dense, "moe": moe}, prompt_ids.to(parameter.device))
    with _undisturbed(dense, moe), Progress("speed", total=rounds, unit="rounds") as progress:
        deadline = time.monotonic() + budget_s
        works = {(cell, side): runner.work(cell, side) for cell in cells for side in SIDES}
        size = works[cells[-1], "dense"].weight_bytes
        machine = measure_machine(parameter.dtype, device=parameter.device, working_set=int(size))
        times: dict[tuple[Cell, str], list[list[float]]] = {key: [] for key in works}
        for number in range(rounds):
            for cell in cells:
                for side in SIDES if number % 2 == 0 else reversed(SIDES):
                    times[cell, side].append(runner.seconds(cell, side, number))
            progress.advance()
            if time.monotonic() > deadline:
                break
    rows = [_row(cell, {side: times[cell, side] for side in SIDES}, works, machine) for cell in cells]
    settings = {
        "prefill_tokens": cells[0].length,
        "decode_context": cells[-1].context,
        "decode_steps": decode_steps,
        "batches": list(batches),
        "rounds": len(times[cells[0], "dense"]),
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }
    return {"verdict": verdict(rows), "cells": rows, "machine": machine.to_dict(), "settings": settings}


def _cells(ids_BS: Tensor, prefill: int, context: int, steps: int, batches: Sequence[int]) -> list[Cell]:
    if ids_BS.ndim != 2 or ids_BS.shape[0] < max(batches) or ids_BS.shape[1] <= steps:
        raise MoesaicError(
            f"prompt_ids has shape {tuple(ids_BS.shape)}; at least {max(batches)} rows of {steps + 1} tokens are needed"
        )
    length = ids_BS.shape[1]
    decode = [Cell("decode", batch, 1, min(context, length - steps), steps) for batch in batches]
    return [Cell("prefill", 1, min(prefill, length), 0, PREFILL_REPEATS), *decode]


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """One plain sentence about all cells: which are slower than dense, or by how much all are faster."""
    ratios = {row["name"]: row["ratio"]["median"] for row in rows}
    slower = [f"{name} ({ratio:.2f}x)" for name, ratio in ratios.items() if round(ratio, 2) < 1]
    if slower:
        return f"slower than dense in: {', '.join(slower)}"
    return f"at least as fast as dense in every cell ({min(ratios.values()):.2f}x to {max(ratios.values()):.2f}x)"


@torch.no_grad()
def least_work(
    model: nn.Module, ids_BS: Tensor, expert_N: Tensor | None = None, context: int = 0, cache: Any = None
) -> Work:
    """What one forward of `ids_BS` must do: `context` tokens are cached already, only the last token needs logits.

    Of an embedding table only the rows of the distinct tokens count, but a table that is also the output head counts in
    full; of channel blocks only the union of the channels of the experts in `expert_N` (N,).

    cache:  as it stands after the forward; its keys and values are added to what must be read.
    """
    batch, length = ids_BS.shape
    tokens, distinct = batch * length, len(ids_BS.unique())
    head = model.get_output_embeddings()  # type: ignore[operator]
    weight_bytes, flops = 0.0, 0.0
    seen: set[int] = set()
    for module in (head, *model.modules()):
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen] if module is not None else []
        seen.update(map(id, own))
        read, used = 1.0, float(tokens)  # share of the parameters that is read, tokens that each is applied to
        if isinstance(module, ChannelBlocks) and expert_N is not None:
            read, per_token = channel_shares(module, expert_N)
            used = tokens * per_token
        elif module is head:
            used = batch
        elif isinstance(module, nn.Embedding):
            read, used = min(1.0, distinct / module.num_embeddings), 0.0
        weight_bytes += sum(read * p.numel() * p.element_size() for p in own)
        flops += sum(2 * used * p.numel() for p in own if p.ndim > 1)
    keys_seen = batch * (length * context + length * (length + 1) / 2)
    flops += 4 * keys_seen * _attention_width(model)
    return Work(weight_bytes, _cache_bytes(cache), flops, None if expert_N is None else len(expert_N.unique()))


def channel_shares(blocks: ChannelBlocks, expert_N: Tensor) -> tuple[float, float]:
    """Of the stored channels: the share in the union over all tokens' experts, and the mean share one token uses."""
    ids, counts = expert_N.unique(return_counts=True)
    union, applied = 0, 0.0
    for block in blocks.layout.blocks:
        users = sum(int(n) for e, n in zip(ids.tolist(), counts.tolist(), strict=True) if e in block.owners)
        union += (block.stop - block.start) * (users > 0)
        applied += (block.stop - block.start) * users / expert_N.numel()
    width = max(1, max((block.stop for block in blocks.layout.blocks), default=0))
    return union / width, applied / width


def _attention_width(model: nn.Module) -> int:
    """Sum over layers of the width of all heads: each key seen costs 4 FLOP (score and mix) per unit of it."""
    backbone: Any = getattr(model, "backbone", model)
    config = backbone.config.get_text_config(decoder=True)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    router = getattr(getattr(model, "pregate", None), "config", None)
    extra = router.layers * router.width if router is not None else 0
    return int(config.num_hidden_layers * config.num_attention_heads * head + extra)


def _cache_bytes(cache: Any) -> float:
    layers = getattr(cache, "layers", [])
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return float(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)))


class _Runner:
    """Runs cells on both models; keeps prefilled caches so that later rounds need not build them again."""

    def __init__(self, models: dict[str, nn.Module], prompt_ids: Tensor) -> None:
        order = torch.randperm(len(prompt_ids), generator=torch.Generator().manual_seed(0))
        self.models, self.prompts, self.device = models, prompt_ids[order.to(prompt_ids.device)], prompt_ids.device
        self._caches: dict[tuple[str, int, int], Any] = {}
        # As generate() does: only the last token's logits are computed.
        self._options = {
            side: {"use_cache": True} | ({"logits_to_keep": 1} if _takes_logits_to_keep(model) else {})
            for side, model in models.items()
        }

    def work(self, cell: Cell, side: str) -> Work:
        """The mean least work of the cell's forwards in round 0; serves as warm-up too."""
        model, works = self.models[side], []
        cache = self._cache(cell, side, 0)
        for step in range(1 if cell.kind == "prefill" else cell.forwards):
            ids = self._ids(cell, 0, step)
            out = model(input_ids=ids, past_key_values=cache, **self._options[side])
            cache = out.past_key_values
            expert = getattr(out, "expert_index", None)
            read = cache if cell.kind == "decode" else None
            expert_N = None if expert is None else expert.flatten()
            works.append(least_work(model, ids, expert_N, cell.context + step, read))
        experts = [work.experts for work in works if work.experts is not None]
        return Work(
            weight_bytes=statistics.fmean(work.weight_bytes for work in works),
            cache_bytes=statistics.fmean(work.cache_bytes for work in works),
            flops=statistics.fmean(work.flops for work in works),
            experts=statistics.fmean(experts) if experts else None,
        )

    def seconds(self, cell: Cell, side: str, number: int) -> list[float]:
        """Seconds of each of the cell's forwards in round `number`."""
        model, times = self.models[side], []
        cache = self._cache(cell, side, number)
        for step in range(cell.forwards):
            ids = self._ids(cell, number, step)
            synchronize(self.device)
            start = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, **self._options[side])
            synchronize(self.device)
            times.append(time.perf_counter() - start)
            cache = out.past_key_values if cell.kind == "decode" else None
        return times

    def _rows(self, cell: Cell, number: int) -> tuple[Tensor, int]:
        """The prompts of round `number`, (batch, S), and the index of the first."""
        first = number * cell.batch % len(self.prompts)
        return self.prompts.roll(-first, 0)[: cell.batch], first

    def _ids(self, cell: Cell, number: int, step: int) -> Tensor:
        rows, _ = self._rows(cell, number)
        start = cell.context + step if cell.kind == "decode" else 0
        return rows[:, start : start + cell.length].contiguous()

    def _cache(self, cell: Cell, side: str, number: int) -> Any:
        """A fresh copy of the cache the model builds for the cell's context; None where there is none."""
        if cell.context == 0:
            return None
        rows, first = self._rows(cell, number)
        key = (side, cell.batch, first)
        if key not in self._caches:
            out = self.models[side](input_ids=rows[:, : cell.context].contiguous(), **self._options[side])
            self._caches[key] = out.past_key_values
        return copy.deepcopy(self._caches[key])


def _takes_logits_to_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(getattr(model, "backbone", model).forward).parameters


@contextlib.contextmanager
def _undisturbed(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, no autograd, no garbage collection; all put back afterwards."""
    modes, collects = [model.training for model in models], gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            for model in models:
                model.eval()
            yield
    finally:
        if collects:
            gc.enable()
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _row(
    cell: Cell, times: dict[str, list[list[float]]], works: dict[tuple[Cell, str], Work], machine: Machine
) -> dict[str, Any]:
    """One cell of the receipt."""
    per_round = [[statistics.median(forwards) for forwards in times[side]] for side in SIDES]
    ratios = [dense / moe for dense, moe in zip(*per_round, strict=True)]
    row: dict[str, Any] = {"name": cell.name, "kind": cell.kind, "batch": cell.batch, "tokens": cell.length}
    for side in SIDES:
        seconds = statistics.median(time for forwards in times[side] for time in forwards)
        row[side] = _side(cell, seconds, works[cell, side], machine)
    row["ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return row


def _side(cell: Cell, seconds: float, work: Work, machine: Machine) -> dict[str, Any]:
    read = machine.read_gb_s
    size, device = int(work.weight_bytes + work.cache_bytes), torch.device(machine.device)
    if size < big_array(device):  # then part of it, or all, is still in the cache from the step before
        read = max(read, read_bandwidth(size, device))
    floor, limit = work.floor(read, next(iter(machine.gemm_gflop_s.values())))
    return {
        "ms": 1e3 * seconds,
        "tokens_per_second": cell.batch * cell.length / seconds,
        "floor_ms": 1e3 * floor,
        "share": floor / seconds,
        "limit": limit,
        "read_gb_s": read,
        **{key: value for key, value in asdict(work).items() if value is not None},
    }
