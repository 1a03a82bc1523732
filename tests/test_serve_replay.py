"""moesaic replay: a trace at a live server, what failed is counted, and the report has the simulator's fields."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

import serving
from moesaic.analyze.route_recording import Prompt, record
from moesaic.errors import MoesaicError
from moesaic.schedule.trace import Trace
from moesaic.serve.api.app import create_app
from moesaic.serve.replay import NEEDED, Target, prompts_for, replay, report
from test_serve_api import Live, slow_down, wait_for

REQUESTS, TOKENS = 10, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return serving.served_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def trace(folder) -> Trace:
    """Recorded from the model itself: it holds its prompts' tokens."""
    asked = [Prompt(str(number), f"text {number} " * (1 + number % 3)) for number in range(REQUESTS)]
    arrivals = np.linspace(0, 0.5, REQUESTS).tolist()
    return record(serving.reference(folder), serving.letters(), asked, TOKENS, arrival_s=arrivals)


def test_every_request_is_served_and_timed(folder, trace):
    texts = [
        trace.token_ids[row : row + count].tolist()
        for row, count in zip(trace.prompt_row, trace.prompt_rows, strict=True)
    ]
    with serving.engine(folder, experts=0.5) as engine, Live(create_app(engine)) as live:
        outcome = replay(trace, prompts_for(trace, texts), Target(live.url, rate=2.0))
        stats = engine.stats()
    result = report(outcome)
    assert result["finished"] == REQUESTS == stats.finished["length"]
    assert result["errors"] == {}
    assert stats.output_tokens == REQUESTS * TOKENS
    for served in outcome.served:
        assert served.arrival_s <= served.start_s <= served.first_s <= served.end_s
    assert result["latency_s"]["normalised"]["mean"] > 0
    assert result["stages"] == stats.steps
    assert result["hit_ratio"]["use"] == pytest.approx(stats.hit_ratio)
    assert outcome.seconds >= 0.25, "arrivals are twice as fast as the trace's 0.5 s"


def test_a_full_server_is_asked_again(folder, trace):
    with serving.engine(folder, max_requests=1, max_waiting=0) as engine, Live(create_app(engine)) as live:
        outcome = replay(trace.head(4), [[5, 6]] * 4, Target(live.url, rate=1000.0))
    assert report(outcome)["finished"] == 4
    assert outcome.refused > 0


def test_failures_are_counted_by_kind(folder, trace):
    with serving.engine(folder) as engine, Live(create_app(engine)) as live:
        outcome = replay(trace.head(3), [[5], [6], [10**6]], Target(live.url))
    assert dict(outcome.errors) == {"status 400": 1}
    assert report(outcome)["finished"] == 2


def test_prompts_are_cut_and_repeated_to_the_traces_lengths(trace):
    prompts = prompts_for(trace, [[1, 2, 3]])
    assert [len(prompt) for prompt in prompts] == trace.prompt_tokens.tolist()
    assert prompts[0][:7] == [1, 2, 3, 1, 2, 3, 1]


def test_no_server_is_one_line(trace):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(MoesaicError, match="no moesaic server answers"):
            replay(trace, [[5]] * REQUESTS, Target(url))


def test_command(folder, trace, tmp_path: Path):
    trace.save(tmp_path / "t.trace")
    with serving.engine(folder) as engine, Live(create_app(engine)) as live:
        command = [sys.executable, "-m", "moesaic", "replay", str(tmp_path / "t.trace"), "--url", live.url]
        done = subprocess.run(
            [*command, "--system", "read-me", "--json"], capture_output=True, text=True, timeout=120, check=True
        )
        shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    result = json.loads(done.stdout)
    assert result["finished"] == REQUESTS
    assert result["simulated"]["requests"] == REQUESTS
    assert "normalised p95" in shown


COUNTS = {"counts": [0], "sum": 0.0}
TOKEN = 'data: {"choices": [{"text": "a"}], "moesaic": {"experts": [0]}}\n\n'
ERROR, DONE = 'data: {"error": {"message": "no"}}\n\n', "data: [DONE]\n\n"


def says(stream: str, states: list[object] | None = None) -> Starlette:
    """A server on the wire whose every answer is `stream`, and whose counters are `states` in turn."""
    zero = {name: 0 for name in NEEDED} | {"experts_per_step": COUNTS}
    left: Iterator[object] = iter(states or [zero, zero])

    async def counters(_: object) -> JSONResponse:
        own = next(left, None)
        return JSONResponse(zero if own == "zero" else own, status_code=503 if own is None else 200)

    async def complete(_: object) -> StreamingResponse:
        return StreamingResponse(iter([stream]), media_type="text/event-stream")

    return Starlette(
        routes=[Route("/v1/moesaic/state", counters), Route("/v1/completions", complete, methods=["POST"])]
    )


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (TOKEN + ERROR + DONE, "error event"),
        (TOKEN + ERROR, "error event"),
        (TOKEN, "stream cut"),
        (TOKEN + DONE, "too few tokens"),
        ("data: [1]\n\n", "bad chunk"),
        ('data: {"moesaic": null}\n\n', "bad chunk"),
    ],
)
def test_a_failed_request_is_counted_once(trace, stream, kind):
    with Live(says(stream)) as live:
        outcome = replay(trace, [[5]] * REQUESTS, Target(live.url, rate=100.0))
    assert dict(outcome.errors) == {kind: REQUESTS}
    result = report(outcome)
    assert result["finished"] == 0
    assert result["latency_s"] == {}, "nothing finished: no latency is known, and none is 0"


def test_what_was_measured_outlives_the_server(trace):
    with Live(says(TOKEN * TOKENS + DONE, ["zero"])) as live:
        result = report(replay(trace, [[5]] * REQUESTS, Target(live.url, rate=100.0)))
    assert result["finished"] == REQUESTS
    assert result["latency_s"]["end_to_end"]["mean"] > 0
    assert "503" in result["server_lost"]
    assert "hit_ratio" not in result


def test_counters_of_a_server_started_anew_are_not_subtracted(trace):
    old = {name: 9 for name in NEEDED} | {"experts_per_step": COUNTS}
    with Live(says(TOKEN * TOKENS + DONE, [old, "zero"])) as live:
        result = report(replay(trace, [[5]] * REQUESTS, Target(live.url, rate=100.0)))
    assert "started anew" in result["server_lost"]
    assert "stages" not in result


@pytest.mark.parametrize("state", [{"a": 1}, [1]])
def test_another_kind_of_server_is_one_line(trace, state):
    with Live(says(DONE, [state])) as live, pytest.raises(MoesaicError, match="no moesaic server of this version"):
        replay(trace, [[5]] * REQUESTS, Target(live.url))


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://127.0.0.1:99999", "127.0.0.1:8000", "ftp://127.0.0.1", "http://"]
)
def test_no_address_is_one_line(trace, url):
    with pytest.raises(MoesaicError, match="expected an address"):
        replay(trace, [[5]] * REQUESTS, Target(url))


def test_an_interrupted_replay_keeps_its_report(folder, trace, tmp_path: Path):
    trace.save(tmp_path / "t.trace")
    out = tmp_path / "report.json"
    with serving.engine(folder) as engine, Live(create_app(engine)) as live:
        slow_down(engine)
        command = [sys.executable, "-m", "moesaic", "replay", str(tmp_path / "t.trace"), "--url", live.url]
        running = subprocess.Popen(
            [*command, "--rate", "0.01", "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        wait_for(lambda: engine.stats().finished.get("length", 0) > 0, 60)
        time.sleep(1)  # the client hears of it a little later; the next request is seconds away
        running.send_signal(signal.SIGINT)
        shown, _ = running.communicate(timeout=30)
    result = json.loads(out.read_text())
    assert running.returncode == 130
    assert result["interrupted"]
    assert 1 <= result["finished"] <= result["sent"] < REQUESTS
    assert result["stages"] > 0
    assert "interrupted after" in shown
