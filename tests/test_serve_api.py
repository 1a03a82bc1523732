"""The API as its users meet it: the official client, raw sockets, many streams at once, and readers of the schema."""

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import serving  # noqa: E402
from moesaic.errors import MoesaicError  # noqa: E402
from moesaic.serve.api import errors  # noqa: E402
from moesaic.serve.api.answers import Writer  # noqa: E402
from moesaic.serve.api.app import ApiOptions, Job, create_app  # noqa: E402
from moesaic.serve.api.calls import Calls, Happened  # noqa: E402
from moesaic.serve.engine import Engine  # noqa: E402
from moesaic.serve.request import Finished  # noqa: E402
from serving_http import Live, slow_down, wait_for  # noqa: E402

TEXT = "hello world"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.served_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with serving.engine(folder, experts=0.5) as engine:
        yield engine


@pytest.fixture(scope="module")
def live(engine: Engine) -> Iterator[Live]:
    with Live(create_app(engine)) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Any:
    return openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)


def alone(folder: Path, text: str, tokens: int) -> str:
    tokenizer = serving.letters()
    ids = serving.alone(serving.reference(folder), tokenizer(text).input_ids, tokens)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


# -- what clients ask -------------------------------------------------------------------------------------------------
def test_completion_is_generates(client: Any, engine: Engine, folder: Path) -> None:
    answer = client.completions.create(model=engine.name, prompt=TEXT, max_tokens=9, temperature=0)
    assert answer.choices[0].text == alone(folder, TEXT, 9)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 9, 20)


@pytest.mark.parametrize("chat", [False, True])
def test_streams_say_the_same_as_whole_answers(client: Any, engine: Engine, chat: bool) -> None:
    options: dict[str, Any] = {"model": engine.name, "max_tokens": 12, "temperature": 0}
    if chat:
        ask, options["messages"] = client.chat.completions.create, [{"role": "user", "content": TEXT}]
    else:
        ask, options["prompt"] = client.completions.create, TEXT
    whole = ask(**options)
    chunks = list(ask(**options, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join((choice.delta.content if chat else choice.text) or "" for choice in choices)
    assert text == (whole.choices[0].message.content if chat else whole.choices[0].text)
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_usage_of_streams_counts_each_prompt_once(live: Live, engine: Engine) -> None:
    """Also where choices of one prompt end between those of another."""
    job = Job(Calls(engine, [[5] * 3, [5] * 7], 2), Writer(engine.name, chat=False), [[], []], ["", ""], True)

    async def counts() -> dict[str, Any]:
        job.calls._numbers = [0] * 4
        for choice, prompt in ((0, 3), (2, 7), (1, 3), (3, 7)):
            job.calls._events.put_nowait(Happened(choice, Finished("length", "", prompt, 1)))
        lines = [line async for line in job.lines()]
        return dict(json.loads(lines[-2].removeprefix("data: "))["usage"])

    assert asyncio.run(counts())["prompt_tokens"] == 3 + 7


def test_offsets_of_streams_go_on(client: Any, engine: Engine) -> None:
    options = {"model": engine.name, "prompt": TEXT, "max_tokens": 5, "temperature": 0, "logprobs": 0}
    whole = client.completions.create(**options).choices[0].logprobs.text_offset
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)]
    assert [at for said in chunks if said for at in said.text_offset] == whole
    assert len(set(whole)) > 1


def test_many_streams_at_once_are_each_their_own(client: Any, engine: Engine, folder: Path) -> None:
    texts = [f"{TEXT} {number}" for number in range(24)]

    def ask(text: str) -> str:
        stream = client.completions.create(
            model=engine.name, prompt=text, max_tokens=8, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, texts))
    single = [ask(text) for text in texts]
    assert answers == single


def test_options(client: Any, engine: Engine) -> None:
    options = {"model": engine.name, "prompt": [TEXT, TEXT], "max_tokens": 10, "seed": 3, "n": 2}
    one, two = (client.completions.create(**options).choices for _ in range(2))
    assert [choice.index for choice in one] == [0, 1, 2, 3]
    assert [choice.text for choice in one] == [choice.text for choice in two]
    assert one[0].text == one[2].text != one[1].text
    biased = client.completions.create(model=engine.name, prompt=TEXT, max_tokens=4, logit_bias={"40": 100})
    assert biased.choices[0].text == serving.letters().decode([40]) * 4
    echoed = client.completions.create(model=engine.name, prompt=TEXT, max_tokens=1, echo=True)
    assert echoed.choices[0].text.startswith(TEXT)
    full = client.completions.create(model=engine.name, prompt=TEXT, max_tokens=30, temperature=0).choices[0].text
    stop = full[5:7]
    cut = client.completions.create(model=engine.name, prompt=TEXT, max_tokens=30, temperature=0, stop=[stop])
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (full[: full.index(stop)], "stop")


def test_logprobs(client: Any, engine: Engine) -> None:
    old = client.completions.create(model=engine.name, prompt=TEXT, max_tokens=3, temperature=0, logprobs=2)
    said = old.choices[0].logprobs
    assert [max(top.values()) for top in said.top_logprobs] == said.token_logprobs
    chat = client.chat.completions.create(
        model=engine.name,
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    entries = chat.choices[0].logprobs.content
    assert [entry.top_logprobs[0].logprob for entry in entries] == [entry.logprob for entry in entries]
    assert all(bytes(entry.bytes).decode() == entry.token for entry in entries)


def test_structured_output(client: Any, engine: Engine) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    answer = client.chat.completions.create(
        model=engine.name,
        messages=[{"role": "user", "content": TEXT}],
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "t", "schema": schema}},
        logit_bias={str(serving.letters().convert_tokens_to_ids("Ġ")): -100},
    )
    assert json.loads(answer.choices[0].message.content)["a"] in ("x", "yy")
    chosen = client.completions.create(
        model=engine.name, prompt=TEXT, max_tokens=9, extra_body={"guided_choice": ["abc", "xyz"]}
    )
    assert chosen.choices[0].text in ("abc", "xyz")


def test_experts_are_told_and_chosen(client: Any, engine: Engine) -> None:
    def ask(**experts: Any) -> Any:
        extra = {"return_experts": True, "experts": experts}
        answer = client.completions.create(model=engine.name, prompt=TEXT, max_tokens=4, extra_body=extra)
        return answer.choices[0].model_extra["moesaic"]

    assert ask(pin="beta")["prompt_experts"] == [1] * 11
    assert ask(pin=2)["experts"] == [2, 2, 2, None]
    assert not {0, "alpha"} & set(ask(deny=["alpha"])["prompt_experts"])
    assert ask(allow=["gamma"])["prompt_tokens"] == list(TEXT)


def test_models(client: Any, engine: Engine) -> None:
    assert [model.id for model in client.models.list()] == [engine.name]
    assert client.models.retrieve(engine.name).owned_by == "moesaic"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt=TEXT)


# -- what is refused --------------------------------------------------------------------------------------------------
REFUSED = {
    b'{"prompt": ': "not JSON",
    b"\xff\xfe\x00": "cannot be read",
    b'{"prompt": "\xc3\x28"}': "cannot be read",
    b"[]": "expected a JSON object",
    b"": "expected a JSON object",
    b"\x00": "not JSON",
    b"[" * 100_000: "cannot be read",
    b'{"prompt": "a", "metadata": ' + b'{"a": ' * 500 + b"1" + b"}" * 501: "metadata",
    b'{"prompt": "a", "prompt": "b"}': "'prompt' is given twice",
    b'{"prompt": "a", "temperature": 1e400}': "1e400 is not a finite number",
    b'{"prompt": "a", "seed": -Infinity}': "-Infinity is not a finite number",
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}": "cannot be read",
    b'{"prompt": "a", "max_tokens": ' + b"9" * 400 + b"}": "the context is 128",
    b'{"prompt": [' + b"9" * 400 + b'], "echo": true}': "outside the vocabulary",
    b'{"prompt": "\\u0000"}': "the prompt is empty",
    b'{"prompt": "a", "\\ud800": 1}': "unicode",
    b"{}": "prompt: Field required",
    b'{"prompt": "a", "bogus": 1}': "unknown field 'bogus'",
    b'{"prompt": "a", "tools": []}': "unknown field 'tools'",
    b'{"prompt": "a", "max_tokens": 99999999999}': "the context is 128",
    b'{"prompt": "a", "max_tokens": 0}': "max_tokens",
    b'{"prompt": "a", "max_tokens": "5"}': "max_tokens",
    b'{"prompt": "a", "temperature": -1}': "temperature",
    b'{"prompt": "a", "temperature": NaN}': "NaN is not a finite number",
    b'{"prompt": []}': "0 requests",
    b'{"prompt": ""}': "the prompt is empty",
    b'{"prompt": [1, 2, 1000000]}': "token 1000000",
    b'{"prompt": [-1]}': "token -1",
    b'{"prompt": [-1], "echo": true}': "token -1",
    b'{"prompt": "\\ud800"}': "surrogate",
    b'{"prompt": "a", "echo": true, "logprobs": 1}': "echo has no log-probabilities",
    b'{"prompt": "a", "n": 500}': "n: ",
    b'{"prompt": "a", "stop": ["a", ""]}': "empty stop string",
    b'{"prompt": "a", "logit_bias": {"x": 1}}': "expected token ids",
    b'{"prompt": "a", "experts": {"pin": "alfa"}}': "did you mean 'alpha'",
    b'{"prompt": "a", "experts": {"pin": 7}}': "no expert 7",
    b'{"prompt": "a", "guided_regex": "(("}': "grammar",
    b'{"prompt": "a", "response_format": {"type": "json_schema"}}': "json_schema.schema",
}


@pytest.mark.parametrize("content", REFUSED)
def test_refusals_say_what_is_wrong(live: Live, content: bytes) -> None:
    answer = live.post(content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert REFUSED[content] in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "", "multipart/form-data", "application/x-www-form-urlencoded"])
def test_other_kinds_of_bodies_are_refused(live: Live, kind: str) -> None:
    answer = live.post(b'{"prompt": "a", "max_tokens": 1}', **{"Content-Type": kind})
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "option", ["seed", "top_k", "temperature", "top_p", "user", "stop", "experts", "guided_regex", "guided_choice"]
)
def test_odd_values_harm_nobody(live: Live, engine: Engine, option: str) -> None:
    """Allowed ones are served, others refused; and the next request is answered."""
    odd = [-(10**400), 10**400, 5e-324, -0.0, "", "\ud800", "\0", [], ["\0"], ["\ud800"], {"deny": [0, 1, 2]}]
    for value in odd:
        answer = live.post({"prompt": "a", "max_tokens": 2, option: value})
        assert answer.status_code in (200, 400), (value, answer.text)
    assert live.post({"prompt": "a", "max_tokens": 1}).status_code == 200
    assert engine.failure is None


def test_what_cannot_be_encoded_is_still_an_error_body() -> None:
    """As a chat template's own words may be."""
    assert json.loads(bytes(errors.answer(400, "no \ud800").body))["error"]["message"] == "no ?"


MALFORMED = {
    "request line": b"nonsense\r\n\r\n",
    "target": b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "header": b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    "long header": b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 100_000,
    "length": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    "chunk": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


def sent(live: Live, data: bytes) -> tuple[bytes, bytes]:
    """Head and body of all that comes back until the server hangs up."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(data)
        with raw.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    return head, body


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_http_gets_an_error_body(live: Live, what: str) -> None:
    head, body = sent(live, MALFORMED[what])
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"Content-Type: application/json" in head
    error = json.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "malformed_http")
    assert httpx.get(live.url + "/ready").status_code == 200


def test_paths_and_methods(live: Live) -> None:
    assert httpx.get(live.url + "/v1/nothing").json()["error"]["type"] == "not_found_error"
    wrong = httpx.delete(live.url + "/v1/completions")
    assert wrong.status_code == 405
    declared = httpx.get(live.url + "/openapi.json").json()["paths"]
    assert all("405" in operation["responses"] for path in declared.values() for operation in path.values())
    assert "DELETE" in wrong.json()["error"]["message"]


def test_size_is_limited_announced_or_not(engine: Engine) -> None:
    with Live(create_app(engine, ApiOptions(most_bytes=1000))) as live:
        assert live.post(b"x" * 2000).status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(50):
                yield b" " * 100

        answer = httpx.post(live.url + "/v1/completions", content=pieces())
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]
        assert live.post({"prompt": "a", "max_tokens": 1}).status_code == 200


def test_keys_and_rates(engine: Engine) -> None:
    with Live(create_app(engine, ApiOptions(keys=("one", "two"), per_minute=12))) as live:
        body = {"prompt": "a", "max_tokens": 1}
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic one"}):
            answer = live.post(body, **header)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert [live.post(body, Authorization="Bearer one").status_code for _ in range(3)] == [200, 200, 429]
        limited = live.post(body, Authorization="Bearer one")
        assert 1 <= int(limited.headers["Retry-After"]) <= 5
        assert live.post(body, Authorization="Bearer two").status_code == 200, "a limit for each key"
        assert httpx.get(live.url + "/health").status_code == 200
        assert httpx.get(live.url + "/").status_code == 200
        assert httpx.get(live.url + "/v1/moesaic/state").status_code == 401
        assert httpx.get(live.url + "/metrics").status_code == 401


@pytest.mark.parametrize("key", ["", " ", " a", "schl\u00fcssel"])
def test_keys_that_nobody_or_everybody_has_are_refused(key: str) -> None:
    with pytest.raises(MoesaicError, match="API key"):
        ApiOptions(keys=("good", key))


def test_full_queue_is_429(folder: Path) -> None:
    with serving.engine(folder, max_requests=1, max_waiting=1) as own, Live(create_app(own)) as live:
        slow_down(own)
        body = {"prompt": "a", "max_tokens": 100, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", live.url + "/v1/completions", json=body) as first:
            lines = first.iter_lines()  # held: a dropped iterator hangs up
            assert next(lines) == ": queued"
            with httpx.stream("POST", live.url + "/v1/completions", json=body):
                third = live.post(body)
                assert third.status_code == 429
                assert int(third.headers["Retry-After"]) >= 1
                assert third.json()["error"]["code"] == "queue_full"


def test_a_call_is_queued_whole_or_not_at_all(folder: Path) -> None:
    with (
        serving.engine(folder, max_requests=1, max_waiting=3) as own,
        Live(create_app(own, ApiOptions(most_requests=5))) as live,
    ):
        slow_down(own)
        many = live.post({"prompt": ["a", "b", "c"], "n": 2})
        assert (many.status_code, many.json()["error"]["param"]) == (400, "n")
        assert "6 requests in one call" in many.json()["error"]["message"]
        never = live.post({"prompt": ["a"] * 5})
        assert (never.status_code, "4 at most" in never.json()["error"]["message"]) == (400, True)
        body = {"prompt": "a", "max_tokens": 100, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", live.url + "/v1/completions", json=body) as first:
            lines = first.iter_lines()
            assert next(lines) == ": queued"
            crowded = live.post({"prompt": "a", "n": 4, "max_tokens": 1})
            assert (crowded.status_code, crowded.json()["error"]["code"]) == (429, "queue_full")
            assert int(crowded.headers["Retry-After"]) >= 1
            stats = own.stats()
            assert (stats.running + stats.waiting, stats.finished, stats.rejected) == (1, {}, 4)
            assert live.post({"prompt": "a", "n": 3, "max_tokens": 1}).status_code == 200


def test_answers_without_a_number_of_tokens_are_limited(engine: Engine) -> None:
    with Live(create_app(engine, ApiOptions(most_output=7))) as live:
        for body, tokens in (({}, 7), ({"max_tokens": 9}, 9)):
            answer = live.post({"prompt": "a", "ignore_eos": True, **body}).json()
            assert answer["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"guided_regex": "(("}, "guided_regex"),
        ({"guided_choice": ["x" * 99999]}, "guided_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "response_format"),
        ({"guided_choice": ["x"], "guided_regex": "x"}, "guided_choice"),
        ({"max_tokens": 9999}, "max_tokens"),
        ({"max_completion_tokens": 9999}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "a" * 999}]}, "messages"),
    ],
)
def test_refusals_name_the_field_that_was_given(live: Live, changes: dict[str, Any], field: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], **changes}
    answer = live.post(body, "/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("limit", ["most_output", "most_requests", "most_bytes"])
def test_limits_out_of_range_are_refused(limit: str) -> None:
    with pytest.raises(MoesaicError, match=f"{limit} is 0: expected at least 1"):
        ApiOptions(**{limit: 0})


# -- clients that leave, servers that stop ----------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_memory(folder: Path, stream: bool) -> None:
    with serving.engine(folder, prefix_reuse=False, max_tokens=2) as own, Live(create_app(own)) as live:
        body = json.dumps({"prompt": "a" * 100, "max_tokens": 25, "stream": stream, "ignore_eos": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        slow_down(own)
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(head.encode() + body)
            wait_for(lambda: own.stats().running)
        wait_for(lambda: own.stats().finished.get("cancelled"))
        stats = own.stats()
    assert (stats.running, stats.memory.kv) == (0, 0)
    assert stats.output_tokens < 25


def test_metrics_and_state_agree(live: Live, engine: Engine) -> None:
    live.post({"prompt": "abc", "max_tokens": 3})
    state = httpx.get(live.url + "/v1/moesaic/state").json()
    lines = httpx.get(live.url + "/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["moesaic_output_tokens_total"]) == state["output_tokens"] > 0
    assert float(values["moesaic_hit_ratio"]) == pytest.approx(state["hit_ratio"])
    assert float(values['moesaic_memory_bytes{use="experts"}']) == state["memory"]["experts"]
    assert float(values["moesaic_time_to_first_token_seconds_count"]) == sum(state["ttft_s"]["counts"])
    assert state["expert_names"] == serving.NAMES
    assert state["ready"] is True


# -- the published schema ---------------------------------------------------------------------------------------------
def test_schema_is_honest(live: Live) -> None:
    """Whatever follows the schema, or nearly, is answered in a way that it declares; nothing is a server error."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(live.url + "/openapi.json")
    declared = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    asked = 0
    for operation, mode in product(schema.get_all_operations(), GenerationMode):

        @settings(max_examples=5, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            nonlocal asked
            case.validate_response(case.call(timeout=20), checks=declared)
            asked += 1

        with suppress(Unsatisfiable):  # what takes no input cannot be asked wrongly
            ask()
    assert asked > 20
