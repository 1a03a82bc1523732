"""Structured logs: one JSON object a line, one line a request, and never a word of what it says."""

import json
import logging
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("moesaic.serve.access")

LONGEST = 200  # characters of a path


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, the record's `fields`, and the traceback of an exception."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class AccessLog:
    """An ASGI layer that logs each request when it has ended, whoever ended it.

    It puts an `id` into the scope's state, which answers carry; the app may put `calls` there, which counts tokens.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["id"] = uuid.uuid4().hex[:24]
        begin, status = time.perf_counter(), 500  # what an app that fails before it answers is answered for

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", state["id"].encode())]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            _write(scope, status, begin)


def _write(scope: Scope, status: int, begin: float) -> None:
    path, calls, client = scope["path"][:LONGEST], scope["state"].get("calls"), scope.get("client")
    fields = {
        "id": scope["state"]["id"],
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": path,
        "status": status,
        "seconds": round(time.perf_counter() - begin, 6),
    }
    if calls is not None:
        fields |= calls.counts(begin)
    log.info("%s %s %d", scope["method"], path, status, extra={"fields": fields})
