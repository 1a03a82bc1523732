"""The serving engine: one thread that batches, routes, fetches, runs and samples, driving the policies of `schedule/`.

A loop of steps. Each: take what clients submitted or cancelled, let the batcher form a stage, tell the residency, run
the backbone, sample, route the sampled tokens, queue what goes on. Routes are known when work is queued: prompts on
arrival, tokens when sampled (2410.19123). Clients talk to it from any thread and hear of their requests by `deliver`.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from moesaic.errors import MoesaicError
from moesaic.serve.assemble import assemble
from moesaic.serve.counters import Counters
from moesaic.serve.intake import Intake
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import (
    Deliver,
    Finished,
    FinishReason,
    Generation,
    QueueFullError,
    RequestError,
    Routed,
    ShuttingDownError,
)
from moesaic.serve.runner import Runner
from moesaic.serve.sequence import Sequence as Request
from moesaic.serve.stats import Stats

log = logging.getLogger("moesaic.serve")

IDLE_S = 0.5  # how long an idle engine sleeps before it looks around


class Engine:
    """Serves one refactored model. `start` before `submit`; `close` at the end.

    Raises MoesaicError if the model cannot be served or does not fit.
    """

    def __init__(self, model: str | Path, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        self.counters = Counters()
        self._started = threading.Event()
        self._closing = self._stop = False
        loaded: Future[tuple[Runner, Intake]] = Future()
        self._thread = threading.Thread(
            target=self._life, args=(Path(model), loaded), name="moesaic-engine", daemon=True
        )
        self._thread.start()
        self.runner, self.intake = loaded.result()
        self.name = Path(model).resolve().name
        self.tokenizer: Any = self.intake.tokenizer
        self.context = self.intake.context
        self.expert_names = self.intake.expert_names
        self.failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[int, Request] = {}  # every request that has not finished
        self._next = 0

    # -- for clients, from any thread -----------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to run requests."""
        self.runner.machine.store.start()
        self._started.set()

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self._started.is_set() and not self._closing and self.failure is None

    def submit(self, prompt_ids: Sequence[int], generation: Generation, deliver: Deliver) -> int:
        """Queue a request and return its number; `deliver` is called on the engine's thread for all that happens to it.

        Raises RequestError if it can never be served, QueueFullError if too many wait, ShuttingDownError.
        """
        if not self.ready:
            raise ShuttingDownError(self.failure or "the server is not accepting requests: it starts or shuts down")
        request = self.intake.request(prompt_ids, generation, deliver, self.runner.now)
        with self._lock:
            self.check_room(1)
            request.id, self._next = self._next, self._next + 1
            self._open[request.id] = request
        self._commands.put(lambda: self._arrive(request))
        return request.id

    def check_room(self, count: int) -> None:
        """Raises QueueFullError if so many requests more cannot be queued now, RequestError if they never can."""
        opened, most = len(self._open), self.options.max_requests + self.options.max_waiting
        if count > most:
            raise RequestError(f"{count} requests at once: this server holds {most} at most")
        if opened + count > most:
            self.counters.rejected += count
            raise QueueFullError(f"{opened} requests are open, {most} at most", self.counters.retry_s())

    def cancel(self, request: int) -> None:
        """End a request; its memory is free within one step. Unknown and finished ones are no error."""
        self._commands.put(lambda: self._end(request, "cancelled"))

    def stats(self) -> Stats:
        """A snapshot of all counters."""
        with self._lock:
            opened = len(self._open)
        return self.counters.snapshot(self.name, opened, self.runner)

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
        """Cancel what runs; the threads stay until `close`."""
        self._closing = True
        self._commands.put(lambda: self._end_all("cancelled", "the server shuts down"))

    def close(self) -> None:
        """Cancel what runs, stop the threads, free the memory."""
        self._closing = self._stop = True
        self._commands.put(lambda: None)
        self._started.set()
        self._thread.join()
        self._end_all("cancelled", "the server shuts down")
        self.runner.machine.store.close()

    # -- on the engine's thread -----------------------------------------------------------------------------------
    def _life(self, model: Path, loaded: "Future[tuple[Runner, Intake]]") -> None:
        """Load, wait for `start`, run.

        In one thread, since OpenMP keeps a team of threads for each thread that computes: where their members outnumber
        the cores, they sleep between operators instead of waiting, and products of few tokens take 1.5 times as long.
        """
        try:
            if self.options.threads is not None:
                torch.set_num_threads(self.options.threads)
            loaded.set_result(assemble(model, self.options, self.counters))
        except BaseException as error:
            loaded.set_exception(error)
            return
        self._started.wait()
        self._loop()

    def _loop(self) -> None:
        try:
            while not self._stop:
                self._take_commands()
                if not self._stop:
                    self._step()
        except Exception as error:  # nobody else would hear of it: every client is told, and /ready says so
            log.exception("the engine has failed")
            self.failure = f"the engine has failed: {type(error).__name__}: {error}"
            self._end_all("error", self.failure)

    def _take_commands(self) -> None:
        """Do what clients asked for; wait for something if there is nothing to run."""
        wait = not self.runner.busy
        while True:
            try:
                command = self._commands.get(timeout=IDLE_S) if wait else self._commands.get_nowait()
            except queue.Empty:
                return
            wait = False
            command()

    def _arrive(self, request: Request) -> None:
        if request.id not in self._open:
            return  # cancelled before it was looked at
        try:
            self.runner.arrive(request)
        except MoesaicError as error:
            self._end(request.id, "error", str(error))
            return
        self._tell(request, Routed(tuple(request.experts.tolist()) if self.expert_names else None))

    def _step(self) -> None:
        """One step; its results go to the clients. What goes wrong for one request ends that one alone."""
        for request, events, reason, message in self.runner.step():
            for event in events:
                self._tell(request, event)
            if reason is not None:
                self._end(request.id, reason, message)

    def _tell(self, request: Request, event: Any) -> None:
        try:
            request.deliver(event)
        except Exception:  # a client's fault must not stop the others
            log.exception("request %d: its client failed to take an event", request.id)
            self._commands.put(lambda: self._end(request.id, "cancelled"))

    def _end(self, number: int, reason: FinishReason, message: str = "") -> None:
        with self._lock:
            request = self._open.pop(number, None)
        if request is None:
            return
        # what is not a number would reach requests that read over the end of their own keys; tokens prove there is none
        self.runner.end(request, keep=reason != "error" and len(request.output) > 0)
        self.counters.ended(request, reason)
        rest, stop = ("", None) if request.text is None else (request.text.flush(), request.text.stopped)
        if reason not in ("stop", "length"):
            rest = ""
        finished = Finished(
            reason, rest, len(request.prompt), len(request.output), request.cached, message=message, stop=stop
        )
        try:
            request.deliver(finished)
        except Exception:
            log.exception("request %d: its client failed to take its end", number)

    def _end_all(self, reason: FinishReason, message: str) -> None:
        for number in list(self._open):
            self._end(number, reason, message)
