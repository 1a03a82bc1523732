"""Replicas under Ray: where requests go, the same tokens as one engine, and what a killed replica changes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import serving
from moesaic.errors import MoesaicError
from moesaic.serve.cluster.affinity import FRESH_S, Affinity, Holdings
from moesaic.serve.cluster.gate import load_gate
from moesaic.serve.cluster.merged import merged
from moesaic.serve.gate import Gate
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import ExpertControl, QueueFullError, RequestError, Token
from moesaic.serve.stats import Stats

HALF = Holdings([100, 100, 100], [1.0, 0.0, 0.0], capacity=100)
OTHER = Holdings([100, 100, 100], [0.0, 1.0, 0.0], capacity=100)


# -- where requests go, without Ray --------------------------------------------------------------------------------
def best(affinity: Affinity, wanted: dict[int, int], opened: dict[str, int] | None = None, now: float = 0.0) -> str:
    return affinity.ranked(wanted, {"a": HALF, "b": OTHER}, opened or {}, now)[0]


def test_a_request_goes_where_most_of_its_bytes_are() -> None:
    affinity = Affinity(8)
    assert best(affinity, {0: 5}) == "a"
    assert best(affinity, {1: 5}) == "b"
    assert best(affinity, {0: 3, 1: 4}) == "b"
    assert affinity.share({0: 1, 1: 3}, "a", HALF, 0.0) == pytest.approx(0.25)


def test_large_experts_weigh_more() -> None:
    replicas = {"a": Holdings([300, 100], [1.0, 0.0], 300), "b": Holdings([300, 100], [0.0, 1.0], 300)}
    assert Affinity(8).ranked({0: 1, 1: 2}, replicas, {}, 0.0)[0] == "a"


def test_a_long_queue_outweighs_what_is_in_memory() -> None:
    affinity = Affinity(8)
    assert best(affinity, {0: 1}, {"a": 7}) == "a"
    assert best(affinity, {0: 1}, {"a": 9}) == "b"


def test_experts_that_are_nowhere_spread_and_then_stay() -> None:
    affinity, chosen = Affinity(8), []
    replicas = {name: Holdings([100, 100], [0.0, 0.0], 100) for name in "ab"}
    for now, expert in enumerate([0, 1, 0, 1]):
        chosen.append(affinity.ranked({expert: 4}, replicas, {}, now / 10)[0])
        affinity.sent(chosen[-1], {expert: 4}, now / 10)
    assert chosen[0] != chosen[1] and chosen[2:] == chosen[:2]


def test_what_was_sent_counts_as_there_as_far_as_it_fits_and_until_a_report_shows_it() -> None:
    affinity, empty = Affinity(8), Holdings([100, 100, 100], [0.0, 0.0, 0.0], 200)
    for expert in range(3):
        affinity.sent("a", {expert: 1}, 1.0)
    assert [affinity.share({expert: 1}, "a", empty, 1.5) for expert in range(3)] == [0.0, 1.0, 1.0]
    assert affinity.share({2: 1}, "a", empty, 1.5 + FRESH_S) == 0.0


def test_failed_replicas_and_those_that_have_not_reported_come_last() -> None:
    failed = Holdings(HALF.bytes_E, HALF.share_E, 100, failed=True)
    assert Affinity(8).ranked({0: 1}, {"a": failed, "b": OTHER, "c": Holdings()}, {}, 0.0)[-1] == "a"
    assert Affinity(8).ranked({}, {"a": HALF, "b": OTHER}, {"a": 1}, 0.0) == ["b", "a"]


def test_counters_of_replicas_add_up(tmp_path: Path) -> None:
    with serving.engine(serving.served_folder(tmp_path / "tiny")) as own:
        serving.ask_all(own, serving.prompts(3), serving.greedy(4, ignore_eos=True))
        one = own.stats()
    both = merged([one, one])
    assert (both.steps, both.finished, both.ttft_s.total) == (2 * one.steps, {"length": 6}, 2 * one.ttft_s.total)
    assert (both.resident, both.hit_ratio) == (one.resident, one.hit_ratio)
    assert both.memory.budget == 2 * one.memory.budget
    assert merged([]) == Stats()


def test_the_pre_gate_alone_routes_as_the_engine_does(tmp_path: Path) -> None:
    folder = serving.served_folder(tmp_path / "tiny")
    gate = load_gate(folder)
    assert isinstance(gate, Gate)
    with serving.engine(folder) as own:
        for prompt in serving.prompts(5):
            heard = serving.ask(own, prompt, serving.greedy(1)).wait()
            assert heard.events[0].experts == tuple(gate.prompt(prompt).tolist())  # type: ignore[union-attr]


# -- two replicas --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.served_folder(tmp_path_factory.mktemp("replicas") / "tiny")


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'moesaic[ray]'")
    from moesaic.serve.cluster import runtime

    with runtime.running(6):
        yield runtime


@pytest.fixture(scope="module")
def cluster(ray_here: Any, folder: Path) -> Iterator[Any]:
    with started(ray_here, folder) as own:
        yield own


class started:
    """A cluster of two that ends with the block."""

    def __init__(self, runtime: Any, folder: Path, affinity: bool = True, app: str = "moesaic", **options: Any) -> None:
        from moesaic.serve.cluster.cluster import Cluster

        wanted = EngineOptions(**{"memory": "1GiB", "dtype": "float32", "prefix_reuse": False, **options})
        self.cluster = Cluster(folder, wanted, runtime.Replicas(2, 2, affinity), app=app)

    def __enter__(self) -> Any:
        return self.cluster

    def __exit__(self, *_: object) -> None:
        from ray import serve

        self.cluster.close()
        serve.delete(self.cluster.app)


def processes(cluster: Any) -> list[int]:
    """The replicas' process ids."""
    return [pid for pid in cluster.replicas("process") if isinstance(pid, int)]


@pytest.mark.slow
def test_tokens_are_those_of_one_engine_over_http(cluster: Any, folder: Path) -> None:
    pytest.importorskip("fastapi")
    openai = pytest.importorskip("openai")
    from moesaic.serve.api.app import create_app
    from test_serve_api import Live

    wanted = serving.prompts(4)
    with serving.engine(folder) as own, Live(create_app(own)) as one, Live(create_app(cluster)) as two:
        clients = [openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) for live in (one, two)]
        ask = {"model": "tiny", "prompt": wanted, "max_tokens": 12, "extra_body": {"ignore_eos": True}, "logprobs": 1}
        for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}, {"temperature": 0, "n": 2}):
            left, right = (client.completions.create(**ask, **options) for client in clients)
            assert [c.text for c in right.choices] == [c.text for c in left.choices]
            assert [c.logprobs.tokens for c in right.choices] == [c.logprobs.tokens for c in left.choices]
            assert right.usage.completion_tokens == left.usage.completion_tokens
            streams = [
                "".join(
                    p.choices[0].text
                    for p in c.completions.create(**ask | {"prompt": wanted[0]}, stream=True, **options)
                    if p.choices and p.choices[0].index == 0
                )
                for c in clients
            ]
            assert streams[0] == streams[1] == left.choices[0].text
        with pytest.raises(openai.BadRequestError, match="the context is"):
            clients[1].completions.create(model="tiny", prompt=[5] * 1000, max_tokens=1)
        assert clients[1].models.list().data[0].id == "tiny"


@pytest.mark.slow
def test_refusals_come_as_the_engine_raises_them(cluster: Any) -> None:
    with pytest.raises(RequestError) as refused:
        serving.ask(cluster, [5, 6], serving.greedy(2, logit_bias={5000: 1.0}))
    assert refused.value.parameter == "logit_bias"
    with pytest.raises(RequestError):
        serving.ask(cluster, [], serving.greedy(2))
    with pytest.raises(RequestError):
        serving.ask(cluster, [5], serving.greedy(2, experts=ExpertControl(pin=7)))
    with pytest.raises((QueueFullError, RequestError)):
        cluster.check_room(10**6)


@pytest.mark.slow
def test_a_cancelled_request_ends_in_its_replica_too(cluster: Any) -> None:
    heard = serving.ask(cluster, [5, 6, 7], serving.greedy(120, ignore_eos=True))
    cluster.cancel(heard.number)
    assert heard.wait().end.reason == "cancelled"
    until(lambda: cluster.stats().running == cluster.stats().waiting == 0)


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def misses(cluster: Any, requests: int) -> float:
    """Expert uses per use that had to wait, over requests of single experts in turn, after a warm-up."""

    def run(count: int) -> None:
        for i in range(count):
            pinned = serving.greedy(4, ignore_eos=True, experts=ExpertControl(pin=i % 2))
            serving.ask(cluster, [5 + i % 7, 6, 7], pinned).wait()

    run(8)
    before = cluster.stats()
    run(requests)
    after = cluster.stats()
    return 1 - (after.use_hits - before.use_hits) / (after.uses - before.uses)


@pytest.mark.slow
def test_requests_go_where_their_experts_are(ray_here: Any, folder: Path) -> None:
    missed = {}
    for affinity in (True, False):
        with started(ray_here, folder, affinity, f"affinity-{affinity}", experts=0.7, lookahead=0) as own:
            missed[affinity] = misses(own, 40)
    assert missed[True] < missed[False] / 2, missed


@pytest.mark.slow
def test_a_killed_replica_changes_no_tokens_and_is_replaced(cluster: Any, folder: Path) -> None:
    wanted = serving.prompts(12, longest=10)
    generations = [
        serving.greedy(100, ignore_eos=True),
        serving.greedy(100, ignore_eos=True, presence_penalty=0.5, stop=("@@@@",)),
    ]
    with serving.engine(folder) as own:
        expected = [serving.ask(own, p, generations[i % 2]).wait() for i, p in enumerate(wanted)]
    before = set(processes(cluster))
    assert len(before) == 2
    heard = [serving.ask(cluster, p, generations[i % 2]) for i, p in enumerate(wanted)]
    until(lambda: all(len(each.ids) > 3 for each in heard))
    os.kill(before.copy().pop(), signal.SIGKILL)
    assert not all(each.ended.is_set() for each in heard)
    for each, alone in zip(heard, expected, strict=True):
        assert each.wait(90).ids == alone.ids
        assert (each.text, each.end.reason) == (alone.text, alone.end.reason)
        assert sum(isinstance(event, Token) for event in each.events) == 100
    until(lambda: len(set(processes(cluster))) == 2 and set(processes(cluster)) != before)
    assert serving.ask(cluster, wanted[0], generations[0]).wait().ids == expected[0].ids


@pytest.mark.slow
def test_the_command_serves_and_leaves_no_process_behind(folder: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'moesaic[ray]'")
    httpx = pytest.importorskip("httpx")
    command = [sys.executable, "-m", "moesaic", "serve", str(folder), "--ray", "--replicas", "2", "--port", "0"]
    own = subprocess.Popen([*command, "--memory", "1GiB"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert own.stderr is not None
    try:
        for line in own.stderr:
            if " on http://" in line:
                break
        threading.Thread(target=own.stderr.read, daemon=True).start()
        url = line.split(" on ")[1].split(",")[0]
        answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 3})
        assert answer.status_code == 200, json.dumps(answer.json())
        below = descendants(own.pid)
        assert len(below) > 3
        own.send_signal(signal.SIGTERM)
        assert own.wait(timeout=60) == 0
        until(lambda: not [pid for pid in below if lives(pid)], 20)
    finally:
        own.kill()


def descendants(pid: int) -> list[int]:
    """The process's children, and theirs."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ranges_of_replicas() -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'moesaic[ray]'")
    from moesaic.serve.cluster.runtime import Replicas

    assert (Replicas.parse("2"), Replicas.parse("1:4")) == (Replicas(2, 2), Replicas(1, 4))
    for text in ("0", "3:2", "many", "1.5"):
        with pytest.raises(MoesaicError, match="replicas"):
            Replicas.parse(text)
