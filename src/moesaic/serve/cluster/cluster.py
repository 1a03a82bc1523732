"""Replicas with the public face of one engine, for the API: it knows each prompt's experts and outlives replicas.

A request whose replica dies is run again on another one, from its prompt and with its seed: the same tokens come, and
those that the client has are not told twice. This holds for everything that samples by rules and a seed, constraints
and penalties included; if a token differs, the request ends with an error instead of two halves that do not belong
together.
"""

import asyncio
import concurrent.futures
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from moesaic.errors import MoesaicError
from moesaic.models.loading import load_tokenizer
from moesaic.serve.cluster.gate import load_gate
from moesaic.serve.cluster.merged import merged
from moesaic.serve.cluster.messages import About, Accepted, Refused, Word
from moesaic.serve.cluster.runtime import Replicas, alive, deploy, fitted
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import (
    Deliver,
    Finished,
    Generation,
    QueueFullError,
    RequestError,
    Routed,
    ShuttingDownError,
    Token,
)
from moesaic.serve.stats import Stats

log = logging.getLogger("moesaic.serve")

ATTEMPTS = 6  # replicas a request is given to before it is given up
PAUSE_S = 0.25  # before another attempt, times their number: a dead replica must first be known as dead
ANSWER_S = 5.0  # how long replicas may take to tell their counters
LOOK_S = 1.0  # between looks at which replicas there are


class DivergedError(MoesaicError):
    """A second run has said something else than the first."""


@dataclass
class Call:
    """A request on its way. sent: tokens that the client has."""

    prompt: list[int]
    generation: Generation
    wanted: dict[int, int]
    deliver: Deliver
    accepted: "concurrent.futures.Future[None]" = field(default_factory=concurrent.futures.Future)
    sent: list[int] = field(default_factory=list)
    routed: bool = False
    task: Any = None

    def hear(self, word: Word, place: int) -> Finished | None:
        """Pass on what is new; `place`: tokens that this run has told before. Returns the end, which is not passed on.

        Raises what a replica refused, and DivergedError.
        """
        if isinstance(word, Refused):
            raise word.error()
        if isinstance(word, Accepted):
            if not self.accepted.done():
                self.accepted.set_result(None)
        elif isinstance(word, Finished):
            return word
        elif isinstance(word, Routed):
            if not self.routed:
                self.deliver(word)
            self.routed = True
        elif place == len(self.sent):
            self.sent.append(word.id)
            self.deliver(word)
        elif self.sent[place] != word.id:
            raise DivergedError(
                f"the replica that ran this request died after {len(self.sent)} tokens, and another one continues it "
                f"differently from token {place} on: ask again"
            )
        return None


class Cluster:
    """Stands where the API expects an Engine. Ray must be running; see `runtime.running`.

    Raises MoesaicError if the model cannot be served or the replicas do not come up.
    """

    def __init__(
        self,
        model: str | Path,
        options: EngineOptions | None = None,
        replicas: Replicas | None = None,
        *,
        drain_s: float = 30.0,
        app: str = "moesaic",
    ) -> None:
        model, replicas = Path(model).resolve(), replicas or Replicas()
        self.options = fitted(model, options or EngineOptions(), replicas)
        self.name, self.app = model.name, app
        self.failure: str | None = None  # a cluster heals
        self.tokenizer: Any = load_tokenizer(model)
        self._gate = load_gate(model)
        self._handle = deploy(app, model, self.options, replicas, drain_s)
        about: About = self._handle.about.remote().result()
        self.context, self.expert_names = about.context, about.expert_names
        self.intake = SimpleNamespace(vocab=about.vocab)  # what the API asks of an engine's
        self._seeds = random.Random()
        self._lock = threading.Lock()
        self._open: dict[int, Call] = {}
        self._next = 0
        self._closing = False
        self._alive = replicas.least
        self._last = Stats(model=self.name)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="moesaic-cluster", daemon=True)
        self._thread.start()
        self._watch = asyncio.run_coroutine_threadsafe(self._look(), self._loop)

    # -- the face of an engine --------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        """Whether requests are accepted: there is a replica."""
        return self._alive > 0 and not self._closing

    def submit(self, prompt_ids: Sequence[int], generation: Generation, deliver: Deliver) -> int:
        """As Engine.submit; returns when a replica has taken the request."""
        if not self.ready:
            why = "the server shuts down" if self._closing else "no replica is running; one is being started"
            raise ShuttingDownError(why)
        if generation.seed is None:
            generation = replace(generation, seed=self._seeds.getrandbits(63))  # so that it can be run again
        call = Call(list(prompt_ids), generation, self._wanted(prompt_ids, generation), deliver)
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._open[number] = call
        call.task = asyncio.run_coroutine_threadsafe(self._run(number, call), self._loop)
        call.accepted.result()
        return number

    def check_room(self, count: int) -> None:
        """As Engine.check_room, over the replicas there are."""
        opened = len(self._open)
        most = (self.options.max_requests + self.options.max_waiting) * max(self._alive, 1)
        if count > most:
            raise RequestError(f"{count} requests at once: this server holds {most} at most")
        if opened + count > most:
            raise QueueFullError(f"{opened} requests are open, {most} at most", LOOK_S)

    def cancel(self, request: int) -> None:
        """End a request; unknown and finished ones are no error."""
        with self._lock:
            call = self._open.get(request)
        if call is not None:
            self._loop.call_soon_threadsafe(call.task.cancel)

    def stats(self) -> Stats:
        """The sum over the replicas that answer; the last known one if none does."""
        if answers := [answer for answer in self.replicas("stats") if isinstance(answer, Stats)]:
            self._last = merged(answers)
        return self._last

    def replicas(self, method: str) -> list[Any]:
        """What every replica answers to a call, or the exception in its place; nothing while there is none."""
        try:
            return list(self._handle.broadcast(method).results(timeout_s=ANSWER_S, return_exceptions=True))
        except (RayError, RayServeException, TimeoutError) as error:
            log.warning("the replicas do not answer: %s", type(error).__name__)
            return []

    def drain(self, timeout_s: float) -> bool:
        """Accept nothing new and wait until all requests have ended; False if some have not in time."""
        self._closing = True
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with self._lock:
                if not self._open:
                    return True
            time.sleep(0.02)
        return False

    def stop(self) -> None:
        """Cancel what runs."""
        self._closing = True
        with self._lock:
            numbers = list(self._open)
        for number in numbers:
            self.cancel(number)

    def close(self) -> None:
        """Cancel what runs; the replicas end with Ray."""
        self.stop()
        self.drain(5.0)
        self._watch.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- on the cluster's loop ----------------------------------------------------------------------------------------
    def _wanted(self, prompt: Sequence[int], generation: Generation) -> dict[int, int]:
        """{expert: tokens} of a prompt, by the pre-gate; nothing for one that a replica will refuse."""
        if self._gate is None:
            return {}
        bias = self._gate.bias(generation.experts)
        if not 0 < len(prompt) < self.context or not all(0 <= token < self.intake.vocab for token in prompt):
            return {}
        return dict(Counter(self._gate.prompt(prompt, bias).tolist()))

    async def _look(self) -> None:
        """Know how many replicas there are."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                self._alive = await asyncio.to_thread(alive, self.app)
            except (RayError, RayServeException) as error:
                log.warning("Ray does not say which replicas run: %s", type(error).__name__)

    async def _run(self, number: int, call: Call) -> None:
        """A request from its first word to its last; told to the client whatever happens."""
        try:
            end = await self._answered(call)
        except asyncio.CancelledError:
            end = self._ended(call, "cancelled", "the server shuts down" if self._closing else "")
        except MoesaicError as error:
            if not call.accepted.done():
                call.accepted.set_exception(error)
            end = self._ended(call, "error", str(error))
        except Exception as error:  # as in the engine: nobody else would hear of it
            log.exception("request %d failed", number)
            end = self._ended(call, "error", f"the request failed: {type(error).__name__}: {error}")
        with self._lock:
            self._open.pop(number, None)
        if call.accepted.done() and call.accepted.exception() is None:
            call.deliver(end)
        elif not call.accepted.done():
            call.accepted.set_exception(ShuttingDownError(end.message or "the request was cancelled"))

    @staticmethod
    def _ended(call: Call, reason: Any, message: str) -> Finished:
        return Finished(reason, "", len(call.prompt), len(call.sent), message=message)

    async def _answered(self, call: Call) -> Finished:
        """Give the request to replicas until one has finished it."""
        trouble = ""
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(PAUSE_S * attempt)
            try:
                return await self._attempt(call)
            except (RayError, RayServeException, ShuttingDownError) as error:
                trouble = type(error).__name__ if isinstance(error, RayError) else str(error)
                log.warning("a replica was lost after %d tokens of a request: %s", len(call.sent), trouble)
        raise ShuttingDownError(f"{ATTEMPTS} replicas were lost under this request; the last: {trouble}")

    async def _attempt(self, call: Call) -> Finished:
        """One run on one replica. Raises RayError if it is lost."""
        stream = self._handle.options(stream=True).generate.remote(call.prompt, call.generation, wanted=call.wanted)
        place = 0
        try:
            async for words in stream:
                for word in words:
                    end = call.hear(word, place)
                    if end is not None:
                        return end
                    place += isinstance(word, Token)
            raise ShuttingDownError("a replica ended its answer too early")
        except BaseException:
            stream.cancel()
            raise
