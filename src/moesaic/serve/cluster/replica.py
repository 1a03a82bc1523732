"""An engine as a Ray Serve deployment: a process of its own, with a memory budget of its own."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.serve.cluster.affinity import Holdings
from moesaic.serve.cluster.messages import About, Accepted, Refused, Word
from moesaic.serve.cluster.router import REPORT
from moesaic.serve.engine import Engine
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import Event, Finished, Generation
from moesaic.serve.stats import Stats


class Replica:
    """Serve makes it in each replica's process; the API's process calls it through a handle."""

    def __init__(self, model: str, options: EngineOptions) -> None:
        self.engine = Engine(model, options)
        self.engine.start()
        layout = self.engine.runner.machine.store.residency.layout
        experts = range(len(self.engine.expert_names))
        self.sizes_LE = [
            [sum(layout.bytes[key] for key in layout.entries[layer, expert]) for expert in experts]
            for layer in layout.layers
        ]

    async def about(self) -> About:
        """What the API must know of the model."""
        return About(self.engine.context, self.engine.expert_names, self.engine.intake.vocab)

    async def generate(
        self, prompt: Sequence[int], generation: Generation, *, wanted: Mapping[int, int]
    ) -> AsyncIterator[list[Word]]:
        """Accepted and then the request's events, or Refused; as many at a time as there are. `wanted` is the router's.

        Raises RuntimeError if the engine fails: the request can run elsewhere.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            number = await asyncio.to_thread(self.engine.submit, prompt, generation, deliver)
        except MoesaicError as error:
            yield [Refused.of(error)]
            return
        try:
            yield [Accepted()]
            while True:
                batch = [await events.get()]
                while not events.empty():
                    batch.append(events.get_nowait())
                if self.engine.failure is not None and isinstance(batch[-1], Finished):
                    raise RuntimeError(self.engine.failure)
                yield list(batch)
                if isinstance(batch[-1], Finished):
                    return
        finally:
            self.engine.cancel(number)  # no error if it has ended

    async def stats(self) -> Stats:
        """What the engine counts."""
        return self.engine.stats()

    async def process(self) -> int:
        """The id of the replica's process."""
        return os.getpid()

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router asks for, once a period."""
        if not self.engine.expert_names:
            return {REPORT: asdict(Holdings(failed=not self.engine.ready))}  # no prompt's experts are known
        stats = self.engine.stats()
        bytes_E = [sum(sizes) for sizes in zip(*self.sizes_LE, strict=True)]
        there_E = [0.0] * len(bytes_E)
        for sizes, shares in zip(self.sizes_LE, stats.resident, strict=True):
            there_E = [there + size * share for there, size, share in zip(there_E, sizes, shares, strict=True)]
        holdings = Holdings(
            bytes_E,
            [round(there / size, 3) for there, size in zip(there_E, bytes_E, strict=True)],
            stats.memory.experts_capacity,
            failed=not self.engine.ready,
        )
        return {REPORT: asdict(holdings)}

    def check_health(self) -> None:
        """Raises RuntimeError if the engine has failed, upon which Serve replaces the replica."""
        if self.engine.failure is not None or not self.engine._thread.is_alive():
            raise RuntimeError(self.engine.failure or "the engine's thread has died")

    def __del__(self) -> None:
        """Serve calls it once running requests have ended, or their time is over."""
        if hasattr(self, "engine"):
            self.engine.close()
