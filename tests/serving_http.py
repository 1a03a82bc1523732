"""The HTTP API on a free port of a thread: shared by tests of the API."""

import json
import socket
import threading
import time
from typing import Any

import httpx
import uvicorn

from moesaic.serve.api.server import configured
from moesaic.serve.engine import Engine


class Live:
    """An app on a free port, served by a thread."""

    def __init__(self, app: Any) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(configured(app))
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.socket]), daemon=True)

    def __enter__(self) -> "Live":
        self.thread.start()
        wait_for(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)

    def post(self, content: bytes | dict[str, Any], path: str = "/v1/completions", **headers: str) -> Any:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        return httpx.post(self.url + path, content=data, headers={"Content-Type": "application/json", **headers})


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def slow_down(engine: Engine) -> None:
    """Every step takes 20 ms: time for something to happen while a request runs."""
    step = engine.runner.step
    engine.runner.step = lambda: (time.sleep(0.02), step())[1]  # type: ignore[method-assign]


def up(url: str) -> bool:
    """Whether a server accepts requests."""
    try:
        return bool(httpx.get(url + "/ready").status_code == 200)
    except httpx.HTTPError:
        return False
