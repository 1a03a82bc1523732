"""The server as a process: how it starts, what it says, what it logs, and how it ends."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

import serving  # noqa: E402
from moesaic.cli.main import main  # noqa: E402
from moesaic.errors import MoesaicError  # noqa: E402
from moesaic.serve.api.app import create_app  # noqa: E402
from moesaic.serve.api.logs import JsonLines  # noqa: E402
from moesaic.serve.api.server import ServerOptions, bound, serve  # noqa: E402
from moesaic.serve.engine import Engine  # noqa: E402
from moesaic.serve.options import EngineOptions  # noqa: E402
from serving_http import Live, up, wait_for  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.served_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    with serving.engine(folder) as engine, Live(create_app(engine)) as live:
        yield live


class Process:
    """`moesaic serve` as users start it."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "moesaic", "serve", str(folder), "--port", "0", "--dtype", "float32", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})
        assert self.process.stderr is not None
        self.said: list[str] = []  # before the first line
        for line in self.process.stderr:
            if "http://" in line or "error" in line:
                break
            self.said.append(line)
        self.first = line
        self.url = self.first.split(" on ")[-1].split(",")[0]


def test_sigterm_lets_running_requests_finish(folder: Path) -> None:
    own = Process(folder, "--memory", "1GiB", "--host", "0.0.0.0")
    url = own.url.replace("0.0.0.0", "127.0.0.1")
    assert own.said[0].startswith("warning: whoever reaches 0.0.0.0"), "there are no keys"
    try:
        wait_for(lambda: up(url))
        body = {"prompt": "secretive", "max_tokens": 100, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            own.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert own.process.wait(20) == 0
    finally:
        own.process.kill()
    assert own.process.stderr is not None
    logged = [json.loads(line) for line in own.process.stderr]
    assert "secret" not in json.dumps(logged)
    (line,) = [line for line in logged if line.get("path") == "/v1/completions"]
    assert (line["method"], line["status"], line["finish"]) == ("POST", 200, ["length"])
    assert (line["requests"], line["prompt_tokens"], line["output_tokens"]) == (1, 9, 100)
    assert 0 < line["first_token_seconds"] < line["seconds"]
    assert line["id"] == answer.headers["x-request-id"] == json.loads(rest[0].removeprefix("data: "))["id"][5:]


def test_every_request_is_logged_once(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "moesaic.serve.access"):
        live.post({"prompt": "secretive", "n": 2, "max_tokens": 3, "ignore_eos": True})
        live.post({"prompt": "secretive", "bogus": 1})
        httpx.get(live.url + "/health")
        wait_for(lambda: len(caplog.records) == 3)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    assert [line["status"] for line in lines] == [200, 400, 200]
    assert [line.get("output_tokens") for line in lines] == [6, None, None]
    assert len({line["id"] for line in lines}) == 3
    assert "secret" not in json.dumps(lines)


START_UP = {
    "no config.json": ["{other}"],
    "minimum": ["{folder}", "--memory", "10MiB"],
    "did you mean 'adaptive'": ["{folder}", "--batcher", "adaptiv"],
    "an API key is empty": ["{folder}", "--api-key", " "],
    "most_output is 0": ["{folder}", "--most-output", "0"],
    "infinite": ["{folder}", "--memory", "1e400"],
    "cannot listen on 127.0.0.1": ["{folder}", "--port", "{taken}"],
}


@pytest.mark.parametrize("message", START_UP)
def test_start_up_errors_are_one_line(
    message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers.utils.logging.disable_progress_bar()  # as the command does before it loads the library
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        known = {"folder": folder, "other": tmp_path, "taken": taken.getsockname()[1]}
        given = [argument.format(**known) for argument in START_UP[message]]
        monkeypatch.setattr(sys, "argv", ["moesaic", "serve", "--port", "0", *given])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_start_up_errors_of_the_real_command(folder: Path) -> None:
    own = Process(folder, "--memory", "10MiB")
    assert own.process.wait(20) == 2
    assert own.process.stderr is not None
    assert [*own.said, *own.process.stderr] == []
    assert "minimum" in own.first


# -- while the model loads --------------------------------------------------------------------------------------------
def listening() -> tuple[socket.socket, str]:
    own = bound("127.0.0.1", 0)
    return own, f"http://127.0.0.1:{own.getsockname()[1]}"


def test_probes_are_answered_while_the_model_loads(folder: Path) -> None:
    own, url = listening()
    looked_at = threading.Event()

    def load() -> tuple[Engine, Any]:
        assert looked_at.wait(20)
        engine = Engine(folder, EngineOptions(memory="2GiB", dtype="float32"))
        engine.start()
        return engine, create_app(engine)

    def look() -> tuple[list[Any], Any]:
        try:
            wait_for(lambda: httpx.get(url + "/health").status_code == 200)
            early = [httpx.get(url + "/ready"), httpx.post(url + "/v1/completions", json={"prompt": "a"})]
            looked_at.set()
            wait_for(lambda: up(url))
            return early, httpx.post(url + "/v1/completions", json={"prompt": "a", "max_tokens": 1})
        finally:
            looked_at.set()
            os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        serve(load, own, ServerOptions())
    early, late = looking.result()
    for answer in early:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")
        assert int(answer.headers["Retry-After"]) >= 1
    assert late.status_code == 200


def test_ctrl_c_ends_a_server_that_loads() -> None:
    own, url = listening()
    never = threading.Event()

    def load() -> tuple[Engine, Any]:
        never.wait(20)
        raise MoesaicError("nobody waits for this")

    def stop() -> None:
        wait_for(lambda: httpx.get(url + "/health").status_code == 200)
        os.kill(os.getpid(), signal.SIGINT)

    begin = time.monotonic()
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        pool.submit(stop)
        serve(load, own, ServerOptions())
    assert time.monotonic() - begin < 5
    never.set()
