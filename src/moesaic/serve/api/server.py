"""An app on a port: loopback unless told otherwise, JSON logs, and an end that lets running requests finish."""

import ipaddress
import json
import logging
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from moesaic.errors import MoesaicError
from moesaic.serve.api import errors
from moesaic.serve.api.logs import JsonLines
from moesaic.serve.engine import Engine

log = logging.getLogger("moesaic.serve")

LOADING_RETRY_S = 5


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and how long running requests may take to finish when the server is told to stop."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 30.0


class Protocol(H11Protocol):
    """HTTP whose own refusals, of what never reaches the app, have the API's form."""

    def send_400_response(self, msg: str) -> None:
        """Answer and hang up; an answer that is on its way ends where it is."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            text = "malformed HTTP: the request line, a header or a chunk is invalid, or the headers are too long"
            data = json.dumps(errors.body(400, text, code="malformed_http")).encode()
            head = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: application/json\r\n"
            self.transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.transport.close()


class Opening:
    """The app while its engine loads: it lives and is not ready. `app` takes over once it is there."""

    app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["path"] == "/health":
            await JSONResponse({"status": "alive"})(scope, receive, send)
        else:
            await errors.answer(503, "the model is loading", code="loading", retry_s=LOADING_RETRY_S)(
                scope, receive, send
            )


class Server(uvicorn.Server):
    """Uvicorn that drains its engine first: new requests are refused with 503 while running ones finish."""

    def __init__(self, config: uvicorn.Config, drain_s: float) -> None:
        super().__init__(config)
        self.engine: Engine | None = None  # while it loads
        self.drain_s = drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second stops at once."""
        if self.engine is not None and self.engine.ready:
            log.info("told to stop: running requests may finish within %g s", self.drain_s)
            threading.Thread(target=self._drain, args=(self.engine,), name="moesaic-drain", daemon=True).start()
        else:
            super().handle_exit(sig, frame)

    def _drain(self, engine: Engine) -> None:
        done = engine.drain(self.drain_s)
        log.info("drained" if done else "some requests did not finish in time and are cancelled")
        if not done:
            engine.stop()
        self.should_exit = True


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises MoesaicError if there can be none, so that nothing is loaded in vain."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    own = socket.socket(family, socket.SOCK_STREAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, port))
        own.listen(2048)  # now, so that a second server fails before it has loaded anything
    except (OSError, OverflowError) as error:
        own.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise MoesaicError(f"cannot listen on {host}:{port}: {reason}; choose another with --port") from None
    return own


def open_to_others(listening: socket.socket) -> bool:
    """Whether other machines may reach a socket."""
    return not ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


def log_json() -> None:
    """Structured logs on standard error, for our own and uvicorn's loggers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("moesaic", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def configured(app: ASGIApp) -> uvicorn.Config:
    """Uvicorn as the API wants it: its own refusals in our form, our logs instead of its own."""
    return uvicorn.Config(
        app, http=Protocol, log_config=None, access_log=False, timeout_graceful_shutdown=5, lifespan="off"
    )


def serve(load: Callable[[], tuple[Engine, ASGIApp]], listening: socket.socket, options: ServerOptions) -> None:
    """Serve until told to stop; the engine is closed at the end.

    `load` runs in a thread meanwhile, so that probes are answered and a signal ends it at once. Raises what it raises.
    """
    opening = Opening()
    server = Server(configured(opening), options.drain_s)
    failed: list[BaseException] = []

    def open_() -> None:
        try:
            server.engine, opening.app = load()
        except BaseException as error:  # for the thread that waits
            failed.append(error)
            server.should_exit = True

    threading.Thread(target=open_, name="moesaic-load", daemon=True).start()
    try:
        server.run(sockets=[listening])
    finally:
        if server.engine is not None:
            server.engine.close()
        listening.close()
    if failed:
        raise failed[0]
