"""Steps of a live engine, each with what ran in it and the seconds it took: told from what clients hear.

Requests are sent so that steps are of one kind; everything a step did shows in the tokens it delivers, since every
request that ran sampled one (prompts here fit into one step).
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moesaic.errors import MoesaicError
from moesaic.serve.bench_work import Load
from moesaic.serve.engine import Engine
from moesaic.serve.request import Event, ExpertControl, Finished, Generation, Routed, Token

PATIENCE_S = 600  # for one round of requests


@dataclass
class Step:
    """One step. busy_s, stall_s: what the engine had counted after it."""

    number: int
    busy_s: float
    stall_s: float
    load: Load = field(default_factory=Load)
    seconds: float | None = None  # without stalls, with the routing of prompts that came before it


@dataclass
class Heard:
    """One request: its prompt's experts, then those of its tokens; the last token has none, for it never runs."""

    prompt: Sequence[int]
    prompt_experts: tuple[int, ...] = ()
    experts: list[int | None] = field(default_factory=list)
    end: Finished | None = None
    end_s: float = 0.0


class Recorder:
    """Listens to all requests of a round; made while the engine is idle."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: list[Step] = []
        self.heard: list[Heard] = []
        self._before = self._now()
        self._left = threading.Semaphore(0)

    def send(self, prompt: Sequence[int], outputs: int, expert: int | None) -> None:
        """Submit a request, whose tokens all go to `expert` unless that is None."""
        heard = Heard(prompt)
        self.heard.append(heard)
        control = ExpertControl() if expert is None else ExpertControl(pin=expert)
        generation = Generation(max_tokens=outputs, temperature=0, ignore_eos=True, experts=control)
        self.engine.submit(prompt, generation, self._listener(heard))

    def wait(self) -> "Recorder":
        """Until every request has ended. Raises MoesaicError if one ended otherwise than it should."""
        for _ in self.heard:
            if not self._left.acquire(timeout=PATIENCE_S):
                raise MoesaicError(
                    f"a round of {len(self.heard)} requests took over {PATIENCE_S} s: give it fewer cells"
                )
        for heard in self.heard:
            if heard.end is not None and heard.end.reason != "length":
                raise MoesaicError(f"a request ended as {heard.end.reason}: {heard.end.message or 'nothing was said'}")
        for before, step in zip([self._before, *self.steps], self.steps, strict=False):
            if step.number == before.number + 1:
                step.seconds = max(step.busy_s - before.busy_s - (step.stall_s - before.stall_s), 1e-9)
        return self

    def _listener(self, heard: Heard) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if isinstance(event, Routed):
                heard.prompt_experts = event.experts or (0,) * len(heard.prompt)
            elif isinstance(event, Token):
                self._ran(heard)
                heard.experts.append(event.expert)
            else:
                heard.end, heard.end_s = event, time.perf_counter()
                self._left.release()

        return hear

    def _ran(self, heard: Heard) -> None:
        """The request's prompt, or its last token, was in the step that has just ended."""
        now = self._now()
        if not self.steps or self.steps[-1].number != now.number:
            self.steps.append(now)
        load, length = self.steps[-1].load, len(heard.prompt)
        load.outputs += 1
        if not heard.experts:
            load.prefill += length
            load.prefill_pairs += length * (length + 1) // 2
            load.rows.update(heard.prompt_experts)
        else:
            load.decode += 1
            load.decode_pairs += length + len(heard.experts)
            load.rows[heard.experts[-1] or 0] += 1

    def _now(self) -> Step:
        counters = self.engine.counters
        return Step(counters.steps, counters.busy_s, counters.stall_s)


@dataclass(frozen=True)
class Kind:
    """Steps that are measured: `requests` decode tokens, or one prompt.

    prompt, outputs: tokens of each request, of several prompts the longest.
    spread: experts that requests are pinned to in turn; 0 = as routed.
    """

    name: str
    requests: int
    prompt: int
    outputs: int
    spread: int = 0

    def matches(self, load: Load) -> bool:
        """Whether a step was of this kind."""
        if self.outputs == 1:
            return load.prefill == self.prompt and not load.decode
        return load.decode == self.requests and not load.prefill


def kinds(context: int, requests: int, max_tokens: int, experts: int) -> list[Kind]:
    """What is measured, as far as context and places allow.

    Decode batches both with all tokens at one expert and spread over all of them, so that what experts cost is told
    from what tokens cost; one batch at a longer context tells what keys cost.
    """
    outputs = max(2, min(32, context // 4))
    short = max(1, min(64, context - outputs))
    found = []
    for batch in (1, 4, 8, 16, 32):
        if batch <= requests:
            if batch > 1 and experts > 1:
                found.append(Kind(f"decode {batch}, one expert", batch, short, outputs, 1))
            found.append(Kind(f"decode {batch}", batch, short, outputs, experts))
    batch = min(8, requests)
    longest = min(512, max_tokens - batch, context - outputs)  # the last prompt runs beside the others' tokens
    if longest > 2 * short:
        found.append(Kind(f"decode {batch}, context {longest}", batch, longest, outputs, experts))
    lengths = sorted({min(length, max_tokens, context - 1) for length in (32, 128, 512)})
    return found + [Kind(f"prefill {length}", 1, length, 1) for length in lengths]


def measure(engine: Engine, kind: Kind, vocab: int, seconds: float, seed: int) -> list[Step]:
    """Steps of the kind, for about `seconds` after a round that warms up; at least one round's."""
    rng = random.Random(seed)
    _round(engine, kind, vocab, rng)
    found: list[Step] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        steps = _round(engine, kind, vocab, rng).steps
        good = [step for step in steps if step.seconds is not None and kind.matches(step.load)]
        if not good:
            break  # the memory holds the keys of fewer requests
        found += good
    return found


def _round(engine: Engine, kind: Kind, vocab: int, rng: random.Random) -> Recorder:
    recorder = Recorder(engine)
    for number in range(kind.requests):
        expert = number % kind.spread if kind.spread else None
        # requests of one length would attend in fewer operations than those of real traffic
        length = kind.prompt if kind.outputs == 1 else rng.randint(-(-3 * kind.prompt // 4), kind.prompt)
        recorder.send(tokens(rng, vocab, length), kind.outputs, expert)
    return recorder.wait()


@dataclass(frozen=True)
class Burst:
    """Requests that came at once, what became of them, seconds until the last had ended, and steps."""

    heard: list[Heard]
    seconds: float
    steps: int


def burst(engine: Engine, vocab: int, seconds: float, seed: int, requests: int = 24) -> Burst:
    """Prompts and answers of many lengths at once, routed as the model does; for about `seconds` after a first time.

    All bursts are equal; the one of median seconds counts.
    """
    _crowd(engine, vocab, random.Random(seed), requests)
    found: list[Burst] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        found.append(_crowd(engine, vocab, random.Random(seed), requests))
    return sorted(found, key=lambda each: each.seconds)[(len(found) - 1) // 2]


def _crowd(engine: Engine, vocab: int, rng: random.Random, requests: int) -> Burst:
    most = max(1, min(256, engine.options.max_tokens, engine.context // 2))
    begin, before = time.perf_counter(), engine.counters.steps
    recorder = Recorder(engine)
    for _ in range(requests):
        outputs = rng.randint(2, max(2, min(48, engine.context - most)))
        recorder.send(tokens(rng, vocab, rng.randint(1, most)), outputs, None)
    recorder.wait()
    ended = max(heard.end_s for heard in recorder.heard)
    return Burst(recorder.heard, ended - begin, engine.counters.steps - before)


def tokens(rng: random.Random, vocab: int, count: int) -> list[int]:
    """Random ones: what they say costs nothing."""
    return [rng.randrange(vocab) for _ in range(count)]


def mean_experts(steps: Sequence[Step]) -> float:
    """Different experts in a step."""
    return sum(len(step.load.rows) for step in steps) / len(steps)


def mean_load(steps: Sequence[Step]) -> Load:
    """The middle step, by what it attends to: what the cell is compared with its floor at."""
    ordered = sorted(steps, key=lambda step: step.load.decode_pairs + step.load.prefill_pairs)
    load = ordered[len(ordered) // 2].load
    return Load(load.prefill, load.decode, load.prefill_pairs, load.decode_pairs, Counter(load.rows), load.outputs)
