"""Bodies as JSON in its narrow sense: readers that take more than the standard allows disagree about what was meant."""

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response


class Strictly(Request):
    """A request whose JSON has each name once and finite numbers."""

    async def json(self) -> Any:
        """The body; raises JSONDecodeError."""
        return json.loads(await self.body(), object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)


class StrictRoute(APIRoute):
    """A route that reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI has it."""
        handler = super().get_route_handler()

        async def own(request: Request) -> Response:
            return await handler(Strictly(request.scope, request.receive))

        return own


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise json.JSONDecodeError(f"{twice[:40]!r} is given twice", "", 0)
    return names


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise json.JSONDecodeError(f"{text[:40]} is not a finite number", "", 0)
    return number
