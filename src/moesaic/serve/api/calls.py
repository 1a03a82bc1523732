"""The engine's requests behind one HTTP call: their events on the event loop, their end when the client goes."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from starlette.requests import Request

from moesaic.serve.engine import Engine
from moesaic.serve.request import Event, Finished, Generation, Routed, Token


class Happened(NamedTuple):
    """An event of one of the call's requests."""

    choice: int
    event: Event


@dataclass
class Calls:
    """All requests of a call, `n` for each prompt: choice index = prompt * n + number.

    `cancel` must be called when the call ends, however it ends.
    """

    engine: Engine
    prompts: Sequence[Sequence[int]]
    n: int

    def __post_init__(self) -> None:
        self._events: asyncio.Queue[Happened] = asyncio.Queue()
        self._numbers: list[int] = []
        self._tokens = 0
        self._first: float | None = None  # when the first token came
        self._reasons: list[str] = []

    def submit(self, generation: Generation, loop: asyncio.AbstractEventLoop) -> None:
        """Queue all of them, or none: what is refused once is refused whole. From any thread; `loop` hears of them."""
        self._loop = loop
        count = len(self.prompts) * self.n
        if count > 1:
            self.engine.check_room(count)
        try:
            for index in range(count):
                own = generation
                if generation.seed is not None and self.n > 1:
                    own = replace(generation, seed=generation.seed + index % self.n)
                self._numbers.append(self.engine.submit(self.prompts[index // self.n], own, self._deliver(index)))
        except BaseException:
            self.cancel()
            raise

    def _deliver(self, index: int) -> Any:
        def deliver(event: Event) -> None:
            self._count(event)
            # never waits for a slow reader: a request has no more events than tokens
            self._loop.call_soon_threadsafe(self._events.put_nowait, Happened(index, event))

        return deliver

    def _count(self, event: Event) -> None:
        """On the engine's thread alone."""
        if isinstance(event, Token):
            self._tokens += 1
            self._first = self._first or time.perf_counter()
        elif isinstance(event, Finished):
            self._reasons.append(event.reason)

    def counts(self, begin: float) -> dict[str, Any]:
        """What logs say of a call that began then: tokens and times, no text."""
        return {
            "requests": len(self._numbers),
            "prompt_tokens": sum(map(len, self.prompts)),
            "output_tokens": self._tokens,
            "first_token_seconds": None if self._first is None else round(self._first - begin, 6),
            "finish": list(self._reasons),
        }

    def cancel(self) -> None:
        """End what still runs."""
        for number in self._numbers:
            self.engine.cancel(number)

    async def events(self) -> AsyncIterator[Happened]:
        """Everything that happens, until all requests have finished."""
        open_ = len(self._numbers)
        while open_:
            happened = await self._events.get()
            open_ -= isinstance(happened.event, Finished)
            yield happened

    async def results(self, request: Request) -> list["Result"] | None:
        """Every request's outcome; None if the client has gone, which ends them."""
        results = [Result([], []) for _ in self._numbers]

        async def collect() -> None:
            async for index, event in self.events():
                results[index].add(event)

        async def watch() -> None:
            while not await request.is_disconnected():
                await asyncio.sleep(0.05)

        tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return results if tasks[0].done() else None
        finally:
            for task in tasks:
                task.cancel()
            self.cancel()


@dataclass
class Result:
    """One request, from its first event to its last."""

    tokens: list[Token]
    routed: list[int]
    end: Finished | None = None

    def add(self, event: Event) -> None:
        """What happened next."""
        if isinstance(event, Token):
            self.tokens.append(event)
        elif isinstance(event, Routed):
            self.routed = list(event.experts or ())
        else:
            self.end = event

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(token.text for token in self.tokens) + (self.end.text if self.end else "")
