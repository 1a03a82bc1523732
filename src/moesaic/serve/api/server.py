"""An app on a port: loopback unless told otherwise, JSON logs, and an end that lets running requests finish."""

import json
import logging
import socket
import sys
import threading
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from moesaic.errors import MoesaicError
from moesaic.serve.engine import Engine

log = logging.getLogger("moesaic.serve")


@dataclass(frozen=True)
class ServerOptions:
    """Where to listen, and how long running requests may take to finish when the server is told to stop."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain_s: float = 30.0


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, and the traceback of an exception."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.name == "uvicorn.access" and isinstance(record.args, tuple) and len(record.args) == 5:
            line |= zip(("client", "method", "path", "http", "status"), record.args, strict=True)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Server(uvicorn.Server):
    """Uvicorn that drains its engine first: new requests are refused with 503 while running ones finish."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_s: float) -> None:
        super().__init__(config)
        self.engine, self.drain_s = engine, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second stops at once."""
        if self.engine.ready:
            log.info("told to stop: running requests may finish within %g s", self.drain_s)
            threading.Thread(target=self._drain, name="moesaic-drain", daemon=True).start()
        else:
            super().handle_exit(sig, frame)

    def _drain(self) -> None:
        done = self.engine.drain(self.drain_s)
        log.info("drained" if done else "some requests did not finish in time and are cancelled")
        if not done:
            self.engine.stop()
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


def log_json() -> None:
    """Structured logs on standard error, for our own and uvicorn's loggers."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("moesaic", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def serve(engine: Engine, app: FastAPI, listening: socket.socket, options: ServerOptions) -> None:
    """Serve until told to stop; the engine is closed at the end."""
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5, lifespan="off")
    server = Server(config, engine, options.drain_s)
    try:
        server.run(sockets=[listening])
    finally:
        engine.close()
        listening.close()
