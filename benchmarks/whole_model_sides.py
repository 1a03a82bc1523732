"""The sides of `whole_model.py`: each is called with (cell, token ids) and tells how long a forward takes.

Shapes: ids (B, S) int64; of a decode cell `context` tokens that are there already, then one for every step.
"""

import copy
import dataclasses
import gc
import importlib
import json
import shlex
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from serving_models import Size
from serving_sides import Watch, decode_rate, decode_window, distinct
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

import moesaic  # noqa: F401  (registers the Auto classes)
from moesaic.errors import MoesaicError
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.refactor.speed import Cell
from moesaic.serve.engine import Engine
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import Event, ExpertControl, Finished, Generation, Token

ATTEMPTS = 3


@dataclass
class Timing:
    """One side, one cell, one round: seconds of a forward, mean; experts: distinct ones in it, where there are any."""

    seconds: float
    experts: float | None = None


Side = Callable[[Cell, Tensor], Timing]


class Forward:
    """A model of transformers. Decode: one forward per token with the greedy choice, on keys that were filled before.

    Keys are kept, so that a cell's context runs once, not in every round.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = next(model.parameters()).device
        self._keys: dict[Cell, tuple[Tensor, Any]] = {}

    @torch.inference_mode()
    def __call__(self, cell: Cell, ids: Tensor) -> Timing:
        ids = ids.to(self.device)
        cache = self._context(cell, ids)
        begin, seconds, experts = 0 if cell.kind == "prefill" else cell.context, [], []
        gc.collect()
        gc.disable()
        try:
            for number in range(cell.forwards):
                first = begin + (number if cell.kind == "decode" else 0)
                part = ids[:, first : first + cell.length].contiguous()
                start = time.perf_counter()
                out = self.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                out.logits[:, -1].argmax(-1).tolist()
                seconds.append(time.perf_counter() - start)
                cache = out.past_key_values if cell.kind == "decode" else None
                chosen = getattr(out, "expert_index", None)
                experts += [] if chosen is None else [len(chosen.unique())]
        finally:
            gc.enable()
        return Timing(statistics.fmean(seconds), statistics.fmean(experts) if experts else None)

    def _context(self, cell: Cell, ids: Tensor) -> Any:
        if cell.kind == "prefill":
            return None
        context = ids[:, : cell.context].contiguous()
        kept = self._keys.get(cell)
        if kept is None or not torch.equal(kept[0], context):
            out = self.model(input_ids=context, use_cache=True, logits_to_keep=1)
            kept = self._keys[cell] = (context, out.past_key_values)
        return copy.deepcopy(kept[1])


def load_forward(folder: Path, dtype: str, prepared: str = "", device: str = "cpu") -> Forward:
    """The dense or the refactored model as users load it.

    prepared: "tuned" for the fastest way to compute its experts as measured here, "packed" for that and linear layers
    in oneDNN's order, where this version can do that.
    """
    options = dict(dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_pretrained(folder, **options).to(device)
    if prepared:
        try:
            tuning = importlib.import_module("moesaic.models.tuning")
        except ImportError:
            raise MoesaicError(
                f"this version cannot prepare a model: leave the sides that are {prepared} out"
            ) from None
        if isinstance(model, MoesaicForCausalLM):
            tuning.tune(model)
        if prepared == "packed":
            tuning.optimize(model)
    return Forward(model)


def stock_forward(size: Size, dtype: str, device: str = "cpu") -> Forward:
    """A random Qwen3MoE of that size, experts by transformers' own grouped product."""
    torch.manual_seed(0)
    config = size.moe_config()
    config.tie_word_embeddings = True
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.set_experts_implementation("grouped_mm")
    return Forward(model.to(device))


class Served:
    """The engine, every expert resident. Prefill: from submitting to the first token. Decode: request i at expert i."""

    def __init__(self, folder: Path, options: EngineOptions) -> None:
        self.engine = Engine(folder, options)
        self.engine.start()

    def __call__(self, cell: Cell, ids: Tensor) -> Timing:
        return self.prefill(cell, ids) if cell.kind == "prefill" else self.decode(cell, ids)

    def close(self) -> None:
        self.engine.close()

    def prefill(self, cell: Cell, ids: Tensor) -> Timing:
        seconds = []
        for _ in range(cell.forwards):
            first = _First()
            begin = time.perf_counter()
            self.engine.submit(ids[0].tolist(), Generation(max_tokens=1, temperature=0, ignore_eos=True), first)
            first.ended.wait()
            if first.problem:
                raise MoesaicError(f"the engine ended a prompt before its first token: {first.problem}")
            seconds.append(first.at - begin)
        return Timing(statistics.fmean(seconds), float(min(len(self.engine.expert_names), ids.shape[1])))

    def decode(self, cell: Cell, ids: Tensor) -> Timing:
        watch, experts = Watch(len(ids), cell.forwards), len(self.engine.expert_names)
        prompts = ids[:, : cell.context].tolist()
        requests = []
        for number, prompt in enumerate(prompts):
            pin = ExpertControl(pin=number % experts)
            generation = Generation(
                max_tokens=self.engine.context - len(prompt), temperature=0, ignore_eos=True, experts=pin
            )
            requests.append(self.engine.submit(prompt, generation, watch.deliver(number)))
        watch.enough.wait()
        for request in requests:
            self.engine.cancel(request)
        watch.ended.wait()
        if watch.problem:
            raise MoesaicError(f"the engine ended a request before it was timed: {watch.problem}")
        windows = decode_window(watch.stamps, cell.forwards)
        chosen = [row[first:last] for row, (first, last) in zip(watch.experts, windows, strict=True)]
        seconds = len(prompts) / decode_rate(watch.stamps, cell.forwards)
        return Timing(seconds, distinct(torch.tensor(chosen), experts))


class _First:
    """Notes when the first token comes."""

    def __init__(self) -> None:
        self.ended, self.problem, self.at = threading.Event(), "", 0.0

    def __call__(self, what: Event) -> None:
        if isinstance(what, Token) and not self.at:
            self.at = time.perf_counter()
        elif isinstance(what, Finished):
            self.problem = "" if self.at else f"{what.reason} {what.message}"
            self.ended.set()


def served(folder: Path, weights: str, **options: Any) -> Served:
    """The engine with its experts' weights as stored, or in fewer bits where this version's engine can do that."""
    if weights != "stored":
        if "weights" not in {each.name for each in dataclasses.fields(EngineOptions)}:
            raise MoesaicError(f"this version's engine has no weights in {weights}: leave --weights {weights} out")
        options["weights"] = weights
    return Served(folder, EngineOptions(experts=1.0, prefix_reuse=False, **options))


class LlamaBench:
    """llama-batched-bench, a process per cell; it loads and warms up before it times."""

    def __init__(self, binary: Path, model: Path, threads: int) -> None:
        self.command = [str(binary), "-m", str(model), "--output-format", "jsonl", "-t", str(threads)]
        self.command += ["-tb", str(threads)]

    def __call__(self, cell: Cell, ids: Tensor) -> Timing:
        prompt, steps = (cell.length, 1) if cell.kind == "prefill" else (cell.context, cell.forwards)
        # its log may lose what was written shortly before the end: something else comes last
        prompts, batches = (f"{prompt},8", "1") if cell.kind == "prefill" else (str(prompt), f"{cell.batch},1")
        room = cell.batch * -(-(prompt + steps) // 256) * 256
        shape = {"-c": room, "-npp": prompts, "-ntg": steps, "-npl": batches}
        command = [*self.command, *(str(word) for pair in shape.items() for word in pair)]
        for _ in range(ATTEMPTS):  # all of a short run's log may be lost
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise MoesaicError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
            if (seconds := llama_seconds(done.stdout, cell)) is not None:
                return Timing(seconds)
        raise MoesaicError(f"{shlex.join(command)} gave no result")


def llama_seconds(output: str, cell: Cell) -> float | None:
    """Of a forward, from the first JSON line of llama-batched-bench; None if that is not about the cell."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    wanted = cell.length if cell.kind == "prefill" else cell.context
    if not rows or rows[0]["pl"] != cell.batch or rows[0]["pp"] != wanted:
        return None
    return rows[0]["t_pp"] if cell.kind == "prefill" else rows[0]["t_tg"] / rows[0]["tg"]
