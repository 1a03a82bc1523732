"""moesaic replay: a trace at a live server, what failed is counted, and the report has the simulator's fields."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

import serving
from moesaic.analyze.route_recording import Prompt, record
from moesaic.errors import MoesaicError
from moesaic.schedule.trace import Trace
from moesaic.serve.api.app import create_app
from moesaic.serve.replay import Target, prompts_for, replay, report
from test_serve_api import Live

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
