"""The sides of `serving_throughput.py`, each called with (prompts, steps), and how fast they decode."""

import contextlib
import importlib
import json
import math
import multiprocessing
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, Qwen3MoeForCausalLM

from moesaic.errors import MoesaicError
from moesaic.serve.engine import Engine
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import Event, Finished, Generation, Token

Stamps = Sequence[Sequence[float]]  # of each request: when each of its tokens came, seconds

CB_TOKENS, CB_PAGE = 1024, 256  # tokens a step and a page of keys of transformers' continuous batching


@dataclass
class Decode:
    """One side, one cell, one round. Of `experts` and `texts` a side gives one; llama.cpp gives none."""

    tokens_per_s: float
    experts: float | None = None  # distinct per step and layer
    texts: list[list[int]] = field(default_factory=list)  # prompt and output
    overhead: float | None = None  # share of the engine's step time that batching, policies and the pre-gate take


Side = Callable[[list[list[int]], int], Decode]


def decode_window(stamps: Stamps, steps: int) -> list[tuple[int, int]]:
    """Of each request, the indices of the tokens between which its `steps` timed steps lie.

    They begin when all requests have their first token. Raises MoesaicError where a request has too few after that.
    """
    start = max((row[0] if row else math.inf) for row in stamps)
    firsts = [sum(stamp < start for stamp in row) for row in stamps]
    if any(first + steps >= len(row) for first, row in zip(firsts, stamps, strict=True)):
        raise MoesaicError(f"a request has fewer than {steps} tokens after all have begun: submit longer ones")
    return [(first, first + steps) for first in firsts]


def decode_rate(stamps: Stamps, steps: int) -> float:
    """Tokens/s of all requests together: the sum of what each makes of the same `steps` steps."""
    windows = decode_window(stamps, steps)
    return sum(steps / (row[last] - row[first]) for row, (first, last) in zip(stamps, windows, strict=True))


def distinct(expert_BS: Tensor, experts: int) -> float:
    """Different experts among the B tokens of a step, mean over the S steps."""
    return nn.functional.one_hot(expert_BS.long(), experts).any(0).sum(-1).double().mean().item()


@torch.inference_mode()
def distinct_by_layer(model: Qwen3MoeForCausalLM, texts: list[list[int]], first: int, steps: int) -> float:
    """The same with a router in every layer, mean over layers too; the steps run the tokens from place `first` on."""
    rows: list[Tensor] = []
    for text in texts:
        seen: list[Tensor] = []
        hooks = [
            layer.mlp.gate.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[2][:, 0]))
            for layer in model.model.layers
        ]
        model.model(input_ids=torch.tensor([text[: first + steps]]), use_cache=False)
        for hook in hooks:
            hook.remove()
        rows.append(torch.cat([expert[first:] for expert in seen]))  # (layers * steps)
    return distinct(torch.stack(rows), model.config.num_experts)


class Apart:
    """A side in a process of its own: OpenMP's threads of one would slow down those of the others."""

    def __init__(self, make: Callable[[], Callable[..., Any]], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, make, threads), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, *call: Any) -> Any:
        self._pipe.send(call)
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise MoesaicError("the process of a side ended: see its messages above") from None
        if isinstance(answer, MoesaicError):
            raise answer
        return answer

    def close(self) -> None:
        with contextlib.suppress(ConnectionError):  # it has ended already
            self._pipe.send(None)
        self._process.join()


def _answer(pipe: Any, make: Callable[[], Callable[..., Any]], threads: int) -> None:
    torch.set_num_threads(threads)
    side = make()
    try:
        while (call := pipe.recv()) is not None:
            try:
                pipe.send(side(*call))
            except MoesaicError as error:
                pipe.send(error)
    except EOFError:  # whoever asked has ended
        pass


def load_peer(folder: Path) -> Qwen3MoeForCausalLM:
    """The peers' model, experts by its grouped matrix product."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    model.set_experts_implementation("grouped_mm")
    model.generation_config = GenerationConfig()
    return model


class Generate:
    """transformers' generate on one batch."""

    def __init__(self, folder: Path) -> None:
        self.model = load_peer(folder)

    def __call__(self, prompts: list[list[int]], steps: int) -> Decode:
        ids = torch.tensor(prompts)
        clock = Clock()
        config = GenerationConfig(max_new_tokens=steps + 1, do_sample=False, pad_token_id=0)
        texts = self.model.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids), streamer=clock)
        stamps = [clock.stamps[1:]] * len(prompts)  # the first call brings the prompts
        return Decode(decode_rate(stamps, steps), texts=texts.tolist())


class Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, value: Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


class ContinuousBatching:
    """transformers' generate_batch.

    Its own choice of memory is 60 % of the machine's and much slower to set up. All prompts of a cell run in few steps;
    requests get as many tokens more as the first may be ahead of the last.
    """

    def __init__(self, folder: Path) -> None:
        self.model = load_peer(folder)

    def __call__(self, prompts: list[list[int]], steps: int) -> Decode:
        ahead = -(-len(prompts) * len(prompts[0]) // (CB_TOKENS - len(prompts))) + 1
        tokens = steps + 1 + ahead
        pages = len(prompts) * -(-(len(prompts[0]) + tokens) // CB_PAGE)
        cb_config = ContinuousBatchingConfig(
            page_size=CB_PAGE,
            num_blocks=math.ceil(1.25 * pages) + 1,  # below 15 % of free ones it admits no more requests
            max_batch_tokens=CB_TOKENS,
            max_requests_per_batch=len(prompts),
            allow_block_sharing=False,
        )
        results = self.model.generate_batch(
            prompts,
            generation_config=GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=-1),
            continuous_batching_config=cb_config,
            record_timestamps=True,
            warmup=False,
        )
        if len(results) < len(prompts) or any(result.error for result in results.values()):
            raise MoesaicError("transformers' continuous batching lost requests: see its log above")
        texts = [result.prompt_ids + result.generated_tokens for result in results.values()]
        return Decode(decode_rate([result.timestamps for result in results.values()], steps), texts=texts)


class Llama:
    """llama-batched-bench, a process per cell; it loads and warms up before it times."""

    def __init__(self, binary: Path, model: Path, threads: int) -> None:
        self.command = [str(binary), "-m", str(model), "--output-format", "jsonl"]
        self.command += ["-t", str(threads), "-tb", str(threads)]

    def __call__(self, prompts: list[list[int]], steps: int) -> Decode:
        batch, context = len(prompts), len(prompts[0])
        room = batch * -(-(context + steps) // 256) * 256
        # its log may lose what was written shortly before the end: something else comes last
        shape = {"-c": room, "-npp": context, "-ntg": steps, "-npl": f"{batch},1"}
        command = [*self.command, *(str(word) for pair in shape.items() for word in pair)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise MoesaicError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
        return Decode(llama_rate(done.stdout, batch))


def llama_rate(output: str, batch: int) -> float:
    """Decoded tokens/s from the first JSON line of llama-batched-bench, which is about `batch` sequences."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not rows or rows[0]["pl"] != batch:
        raise MoesaicError(f"llama-batched-bench gave no result for {batch} sequence(s)")
    return rows[0]["pl"] * rows[0]["tg"] / rows[0]["t_tg"]


class Ours:
    """The engine, every expert resident; requests go in together and are cancelled at the end."""

    def __init__(self, folder: Path, requests: int, threads: int) -> None:
        options = EngineOptions(
            experts=1.0, dtype="bfloat16", max_requests=requests, prefix_reuse=False, threads=threads
        )
        self.engine = Engine(folder, options)
        self.engine.start()

    def __call__(self, prompts: list[list[int]], steps: int) -> Decode:
        watch, before = Watch(len(prompts), steps), self.engine.stats()
        tokens = self.engine.context - len(prompts[0])
        generation = Generation(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        requests = [self.engine.submit(ids, generation, watch.deliver(i)) for i, ids in enumerate(prompts)]
        watch.enough.wait()
        for request in requests:
            self.engine.cancel(request)
        watch.ended.wait()
        if watch.problem:
            raise MoesaicError(f"the engine ended a request before it was timed: {watch.problem}")
        windows = decode_window(watch.stamps, steps)
        experts = [row[first:last] for row, (first, last) in zip(watch.experts, windows, strict=True)]
        after = self.engine.stats()
        overhead = (after.overhead_s - before.overhead_s) / (after.busy_s - before.busy_s)
        used = distinct(torch.tensor(experts), len(self.engine.expert_names))
        return Decode(decode_rate(watch.stamps, steps), used, overhead=overhead)


class Watch:
    """Notes when each token of each request comes and which expert runs it, on the engine's thread."""

    def __init__(self, requests: int, steps: int) -> None:
        self.steps = steps
        self.stamps: list[list[float]] = [[] for _ in range(requests)]
        self.experts: list[list[int]] = [[] for _ in range(requests)]
        self.enough, self.ended = threading.Event(), threading.Event()
        self.problem = ""
        self._begun = self._ended = 0
        self._left: list[int] = []

    def deliver(self, index: int) -> Callable[[Event], None]:
        def event(what: Event) -> None:
            if isinstance(what, Token):
                self.token(index, what.expert)
            elif isinstance(what, Finished):
                self._ended += 1
                if not self.enough.is_set():
                    self.problem = f"{what.reason} {what.message}"
                    self.enough.set()
                if self._ended == len(self.stamps):
                    self.ended.set()

        return event

    def token(self, index: int, expert: int | None) -> None:
        now = time.perf_counter()
        self._begun += not self.stamps[index]
        self.stamps[index].append(now)
        self.experts[index].append(-1 if expert is None else expert)
        if self._begun < len(self.stamps):
            return
        if not self._left:
            self._left = [self.steps + 1] * len(self.stamps)
        self._left[index] -= 1
        if max(self._left) <= 0:
            self.enough.set()


def llama_parts(llama: Path) -> tuple[Path, Any]:
    """llama-batched-bench and the gguf package, from a built checkout or from the path of the program."""
    binary = llama if llama.is_file() else llama / "build" / "bin" / "llama-batched-bench"
    if not binary.is_file():
        raise MoesaicError(f"{binary} does not exist: build llama.cpp's target llama-batched-bench")
    if (llama / "gguf-py").is_dir():
        sys.path.append(str(llama / "gguf-py"))
    try:
        return binary.resolve(), importlib.import_module("gguf")
    except ImportError:
        raise MoesaicError("no package gguf: give --llama a checkout, or pip install gguf") from None
