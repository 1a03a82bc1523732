"""The HTTP face of an engine: OpenAI's endpoints, probes, metrics, state, and the dashboard."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from moesaic.errors import MoesaicError
from moesaic.serve.api import errors, prompts
from moesaic.serve.api.answers import Writer, usage
from moesaic.serve.api.bodies import StrictRoute
from moesaic.serve.api.calls import Calls
from moesaic.serve.api.limits import Gatekeeper
from moesaic.serve.api.logs import AccessLog
from moesaic.serve.api.metrics import Metrics
from moesaic.serve.api.schemas import Chat, Completion
from moesaic.serve.engine import Engine
from moesaic.serve.request import Finished, RequestError, Routed, Token

DASHBOARD = Path(__file__).parent.parent / "dashboard"
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": errors.ErrorBody, "description": text}
    for status, text in {
        400: "The request cannot be served as it is",
        401: "No valid API key",
        404: "No such model",
        413: "The body is too large",
        429: "Too many requests, or the queue is full; see Retry-After",
        500: "The server failed",
        503: "The server starts, drains or has failed",
    }.items()
}


@dataclass(frozen=True)
class ApiOptions:
    """keys: who may ask; none = everybody. per_minute: requests a key may make; 0 = any number.

    most_bytes: of a body. most_output: tokens of a request that names no number; None = what the context leaves.
    most_requests: of one call, prompts times n.

    Raises MoesaicError for limits out of range, and for keys that open the server to everybody or to nobody.
    """

    keys: tuple[str, ...] = ()
    per_minute: int = 0
    most_bytes: int = 4 * 2**20
    most_output: int | None = None
    most_requests: int = 16

    def __post_init__(self) -> None:
        if any(not key or key != key.strip() or not key.isascii() for key in self.keys):
            raise MoesaicError("an API key is empty, has spaces around it or is not ASCII: no client could send it")
        for name, least in (("per_minute", 0), ("most_bytes", 1), ("most_output", 1), ("most_requests", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise MoesaicError(f"{name} is {value}: expected at least {least}")


class Stream(StreamingResponse):
    """Server-sent events that end their requests when the client goes, also before the first event."""

    def __init__(self, calls: Calls, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.calls.cancel()


@dataclass
class Job:
    """A completion on its way: its requests, its prompts' texts, and how it is written."""

    calls: Calls
    writer: Writer
    pieces: list[list[str]]
    echo: list[str]
    include_usage: bool = False

    async def lines(self) -> AsyncIterator[str]:
        """The stream; an error of one choice ends it with an error event."""
        ends: dict[int, Finished] = {}  # by choice: they end in any order
        yield ": queued\n\n"  # a comment, so that the client has its headers before its first token
        async with aclosing(self.calls.events()) as events:  # type: ignore[type-var]
            async for index, event in events:
                prompt = index // self.calls.n
                if isinstance(event, Routed):
                    yield _line(self.writer.prompt(index, self.pieces[prompt], event.experts, self.echo[prompt]))
                elif isinstance(event, Token):
                    if event.text or self.writer.experts or event.logprob is not None:
                        yield _line(self.writer.chunk(index, event.text, event))
                elif event.reason in ("error", "cancelled"):
                    yield _line(errors.body(500, event.message or "the request was cancelled"))
                    return
                else:
                    ends[index] = event
                    if event.text:
                        yield _line(self.writer.chunk(index, event.text))
                    yield _line(self.writer.chunk(index, None, end=event))
        if self.include_usage:
            counts = usage([ends[index] for index in sorted(ends)], self.calls.n)
            yield _line({**self.writer.head(chunk=True), "choices": [], "usage": counts})
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> Response:
        """The answer in one piece; nothing of it is worth sending if the client has gone."""
        results = await self.calls.results(request)
        if results is None:
            return Response(status_code=499)
        for result in results:
            if result.end is None or result.end.reason in ("error", "cancelled"):
                message = result.end.message if result.end else ""
                return errors.answer(500, message or "the request was cancelled")
        return JSONResponse(self.writer.whole(results, self.pieces, self.echo))


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'), allow_nan=False)}\n\n"


class Service:
    """The endpoints' common part."""

    def __init__(self, engine: Engine, options: ApiOptions) -> None:
        self.engine, self.options = engine, options

    def check_model(self, name: str | None) -> None:
        """Raises MissingModelError for a model that is not served; none named is the one there is."""
        if name is not None and name != self.engine.name:
            raise MissingModelError(f"there is no model {name[:100]!r}: this server has {self.engine.name!r}")

    async def answer(self, body: Completion | Chat, request: Request) -> Response:
        """Run a completion, streamed or whole."""
        try:
            self.check_model(body.model)
        except MissingModelError as error:
            return errors.answer(404, str(error), "model", "model_not_found")
        job = await run_in_threadpool(self._submitted, body, asyncio.get_running_loop())
        job.writer.id, request.state.calls = request.state.id, job.calls
        if body.stream:
            return Stream(job.calls, job.lines())
        return await job.whole(request)

    def _submitted(self, body: Completion | Chat, loop: asyncio.AbstractEventLoop) -> Job:
        """On a thread: long texts and grammars must not stop the others."""
        count, most = prompts.requests(body), self.options.most_requests
        if not 1 <= count <= most:
            field = "n" if count else "prompt"
            raise RequestError(f"{count} requests in one call, prompts times n: expected 1 to {most}", field)
        job = self._prepared(body)
        room = self.engine.context - max(map(len, job.calls.prompts))
        if self.options.most_output is not None:
            room = min(room, self.options.most_output)
        names = self.engine.expert_names
        try:
            job.calls.submit(body.generation(room, names, len(names)), loop)
        except RequestError as error:
            raise RequestError(str(error), body.field_of(error.parameter)) from None
        return job

    def _prepared(self, body: Completion | Chat) -> Job:
        """Texts to tokens."""
        tokenizer, engine = self.engine.tokenizer, self.engine
        if isinstance(body, Chat):
            ids = [prompts.of_chat(body, tokenizer)]
            echo = [""]
        else:
            ids = prompts.of_completion(body, tokenizer)
            known = self._valid(ids)
            echo = [tokenizer.decode(one, skip_special_tokens=True) if body.echo else "" for one in known]
        writer = Writer(engine.name, isinstance(body, Chat), bool(body.return_experts))
        wanted = [prompts.pieces(one, tokenizer) if body.return_experts else [] for one in self._valid(ids)]
        stream = body.stream_options
        return Job(Calls(engine, ids, body.n or 1), writer, wanted, echo, bool(stream and stream.include_usage))

    def _valid(self, ids: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Only ids that exist can be turned into text; the others are refused when they are submitted."""
        vocab = self.engine.intake.vocab
        return [[token for token in one if 0 <= token < vocab] for one in ids]


class MissingModelError(MoesaicError):
    """Another model than the one that is served."""


def create_app(engine: Engine, options: ApiOptions | None = None) -> FastAPI:
    """The API of a started engine."""
    options = options or ApiOptions()
    service = Service(engine, options)
    app = FastAPI(
        title="moesaic",
        version=version("moesaic"),
        description="OpenAI-compatible API of a router-decoupled mixture of experts.",
        docs_url=None,
        redoc_url=None,
    )
    app.router.route_class = StrictRoute
    errors.install(app)
    _completions(app, service)
    _models(app, engine)
    _operations(app, engine)
    errors.honest(app)
    if (DASHBOARD / "index.html").is_file():
        app.mount("/", Dashboard(directory=DASHBOARD, html=True), name="dashboard")
    app.add_middleware(Gatekeeper, keys=options.keys, per_minute=options.per_minute, most_bytes=options.most_bytes)
    app.add_middleware(AccessLog)
    return app


class Dashboard(StaticFiles):
    """The page's files, which may load nothing from elsewhere."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """As StaticFiles', with the policy."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(
            {
                "Content-Security-Policy": POLICY,
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache",
            }
        )
        return response


def _completions(app: FastAPI, service: Service) -> None:
    streams: dict[int | str, dict[str, Any]] = {
        200: {"description": "The answer, or with stream: true its pieces", "content": {"text/event-stream": {}}}
    }

    @app.post("/v1/completions", responses={**streams, **REFUSALS}, response_model=None)
    async def completions(body: Completion, request: Request) -> Response:
        """Continue texts or token lists."""
        return await service.answer(body, request)

    @app.post("/v1/chat/completions", responses={**streams, **REFUSALS}, response_model=None)
    async def chat(body: Chat, request: Request) -> Response:
        """Answer a conversation."""
        return await service.answer(body, request)


def _models(app: FastAPI, engine: Engine) -> None:
    refusals: dict[int | str, dict[str, Any]] = {status: REFUSALS[status] for status in (401, 404)}

    def card() -> dict[str, Any]:
        return {"id": engine.name, "object": "model", "created": 0, "owned_by": "moesaic"}

    @app.get("/v1/models", responses={401: REFUSALS[401]}, response_model=None)
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model}", responses=refusals, response_model=None)
    async def model(model: str) -> Response:
        """The model, by its name."""
        if model != engine.name:
            return errors.answer(404, f"there is no model {model[:100]!r}", "model", "model_not_found")
        return JSONResponse(card())


def _operations(app: FastAPI, engine: Engine) -> None:
    metrics = Metrics(engine.stats)

    @app.get("/health", response_model=None)
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    @app.get("/ready", responses={503: REFUSALS[503]}, response_model=None)
    async def ready() -> Response:
        """Whether requests are accepted."""
        if engine.ready:
            return JSONResponse({"status": "ready"})
        return errors.answer(503, engine.failure or "the server is not accepting requests", code="unavailable")

    @app.get("/metrics", responses={401: REFUSALS[401]}, response_class=PlainTextResponse)
    def scrape() -> Response:
        """Counters for Prometheus."""
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/moesaic/state", responses={401: REFUSALS[401]}, response_model=None)
    def state() -> dict[str, Any]:
        """Everything the engine counts, for the dashboard and for reports."""
        stats = engine.stats()
        return {
            **asdict(stats),
            "hit_ratio": stats.hit_ratio,
            "ready": engine.ready,
            "context": engine.context,
            "expert_names": engine.expert_names,
            "options": asdict(engine.options),
        }
