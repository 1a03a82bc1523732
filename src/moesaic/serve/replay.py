"""A trace's arrivals fired at a live server, and the table that `moesaic simulate` prints, measured.

Open loop: requests are sent when the trace says so, whatever the server does. Every request streams, goes on past the
end-of-sequence token for as many tokens as the trace has, and is timed at its client. Times in seconds.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from moesaic.errors import MoesaicError
from moesaic.progress import Progress
from moesaic.schedule.trace import Trace
from moesaic.simulate.report import latencies
from moesaic.simulate.simulator import Run, Served

RETRIES = 20  # after 429, before a request counts as refused
COUNTERS = ("steps", "uses", "use_hits", "loads", "evictions", "demand_bytes", "prefetch_bytes", "wasted_bytes")
TIMES = ("busy_s", "stall_s", "overhead_s")
NEEDED = {*COUNTERS, *TIMES, "experts_per_step", "uptime_s"}


@dataclass(frozen=True)
class Target:
    """Where to send. rate: arrivals this many times as fast as the trace's; timeout_s: of a single request."""

    url: str
    key: str | None = None
    rate: float = 1.0
    timeout_s: float = 600.0


@dataclass
class Outcome:
    """What happened to the requests; errors by kind, refusals are 429s that were tried again.

    lost: why the server's counters could not be read at the end; what clients measured is still there.
    """

    served: list[Served]
    errors: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False
    lost: str | None = None


def prompts_for(trace: Trace, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids for every request: `texts` in turn, repeated and cut to the trace's prompt lengths."""
    prompts = []
    for request, wanted in enumerate(trace.prompt_tokens.tolist()):
        own = list(texts[request % len(texts)])
        if not own:
            raise MoesaicError("a prompt without a token cannot be cut to a length: leave empty texts out")
        prompts.append((own * (-(-wanted // len(own))))[:wanted])
    return prompts


def replay(trace: Trace, prompts: Sequence[Sequence[int]], target: Target) -> Outcome:
    """Send every request of the trace and wait for all answers; after Ctrl-C, what was measured until then.

    Raises MoesaicError if there is no server at the start. What fails for single requests is counted.
    """
    _check_url(target.url)
    return asyncio.run(_replay(trace, prompts, target))


def _check_url(url: str) -> None:
    try:
        own = httpx.URL(url)
        good = own.scheme in ("http", "https") and bool(own.host) and (own.port is None or 0 < own.port < 2**16)
    except httpx.InvalidURL:
        good = False
    if not good:
        raise MoesaicError(f"--url {url}: expected an address such as http://127.0.0.1:8000")


async def _replay(trace: Trace, prompts: Sequence[Sequence[int]], target: Target) -> Outcome:
    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(target.timeout_s, connect=30)
    outcome = Outcome([])
    async with httpx.AsyncClient(base_url=target.url, headers=headers, limits=limits, timeout=timeout) as client:
        outcome.before = await state(client)
        begin = time.perf_counter()
        outputs = trace.output_tokens.tolist()
        with Progress("replay", total=trace.requests, unit="requests") as progress:
            tasks = []
            for number, arrival in enumerate((trace.arrival_s / target.rate).tolist()):
                served = Served(arrival, len(prompts[number]), outputs[number])
                outcome.served.append(served)
                own = _Request(client, outcome, served, begin, list(prompts[number]), target.timeout_s)
                tasks.append(asyncio.create_task(own.run()))
                tasks[-1].add_done_callback(lambda _: progress.advance(1))
            try:
                await asyncio.gather(*tasks)
            except asyncio.CancelledError:  # Ctrl-C: an hour of measurements is worth a report
                outcome.interrupted = True
        outcome.seconds = time.perf_counter() - begin
        await _read_end(client, outcome)
    return outcome


async def _read_end(client: httpx.AsyncClient, outcome: Outcome) -> None:
    """The counters after the run, unless the server is gone or counts anew."""
    try:
        after = await state(client)
    except MoesaicError as error:
        outcome.lost = str(error)
        return
    if after["uptime_s"] < outcome.before["uptime_s"]:
        outcome.lost = "the server was started anew during the replay, and its counters with it"
    else:
        outcome.after = after


async def state(client: httpx.AsyncClient) -> dict[str, Any]:
    """The server's counters; raises MoesaicError, in one line, if it does not answer."""
    try:
        answer = await client.get("/v1/moesaic/state", timeout=30)
        answer.raise_for_status()
        counters = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise MoesaicError(
            f"no moesaic server answers at {client.base_url}: {error or type(error).__name__}; start one with "
            "moesaic serve MODEL"
        ) from None
    if not isinstance(counters, dict) or not counters.keys() >= NEEDED:
        raise MoesaicError(
            f"{client.base_url} is no moesaic server of this version: its counters are not those expected"
        )
    return counters


@dataclass
class _Request:
    """One request on its way."""

    client: httpx.AsyncClient
    outcome: Outcome
    served: Served
    begin: float
    prompt: list[int]
    timeout_s: float
    failed: bool = False

    async def run(self) -> None:
        await asyncio.sleep(max(self.served.arrival_s - self._now(), 0))
        self.served.start_s = self._now()
        for _ in range(RETRIES):
            try:
                async with asyncio.timeout(self.timeout_s):
                    wait = await self._once()
            except (httpx.TimeoutException, TimeoutError):
                self._fail("timeout")
                return
            except (httpx.HTTPError, ValueError) as error:  # no JSON, no number of seconds
                self._fail(type(error).__name__)
                return
            if wait is None:
                return
            self.outcome.refused += 1
            await asyncio.sleep(wait)
        self._fail("refused")

    def _now(self) -> float:
        return time.perf_counter() - self.begin

    def _fail(self, kind: str) -> None:
        """Count a request once, by what went wrong first."""
        self.outcome.errors[kind] += not self.failed
        self.failed = True

    async def _once(self) -> float | None:
        """Ask and listen; the seconds to wait before asking again, None when it is over."""
        body = {
            "prompt": self.prompt,
            "max_tokens": self.served.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_experts": True,  # an event for every token, also for one whose text is held back
        }
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 429:  # as the server counts, in seconds
                return float(answer.headers.get("Retry-After", 1))
            if answer.status_code != 200:
                self._fail(f"status {answer.status_code}")
                return None
            async for line in answer.aiter_lines():
                if self.failed:
                    return None
                if line == "data: [DONE]":
                    if self.served.done_output == self.served.output_tokens:
                        self.served.end_s = self._now()
                    else:
                        self._fail("too few tokens")
                    return None
                if line.startswith("data: "):
                    self._hear(json.loads(line[6:]))
        self._fail("stream cut")
        return None

    def _hear(self, chunk: Mapping[str, Any]) -> None:
        try:
            if "error" in chunk:
                self._fail("error event")
            tokens = len(chunk.get("moesaic", {}).get("experts", ()))
        except (AttributeError, TypeError):  # JSON, but of another form
            self._fail("bad chunk")
            return
        if tokens and self.served.first_s < 0:
            self.served.first_s = self._now()
        self.served.done_output += tokens


def report(outcome: Outcome) -> dict[str, Any]:
    """The numbers of `simulate.report` that a live server has; counters are what this replay added to them."""
    finished = [each for each in outcome.served if each.end_s >= 0]
    sent = [each for each in outcome.served if each.start_s >= 0]
    tokens = sum(each.output_tokens for each in finished)
    span = max(outcome.seconds - min((each.arrival_s for each in outcome.served), default=0.0), 1e-12)
    return {
        "requests": len(outcome.served),
        "sent": len(sent),
        "finished": len(finished),
        "errors": dict(outcome.errors),
        "refused": outcome.refused,
        "interrupted": outcome.interrupted,
        "server_lost": outcome.lost,
        **(_counted(outcome) if outcome.after else {}),
        "sent_late_s": max((each.start_s - each.arrival_s for each in sent), default=0.0),
        "latency_s": latencies(Run(outcome.served)) if finished else {},
        "throughput": {
            "tokens_per_s": tokens / span,
            "requests_per_s": len(finished) / span,
        },
        "seconds": outcome.seconds,
    }


def _counted(outcome: Outcome) -> dict[str, Any]:
    """What the server's counters grew by."""
    grown = {name: outcome.after[name] - outcome.before[name] for name in (*COUNTERS, *TIMES)}
    busy = grown["busy_s"] or 1e-12
    return {
        "stages": grown["steps"],
        "hit_ratio": {"use": grown["use_hits"] / grown["uses"] if grown["uses"] else 1.0},
        "moved_bytes": grown["demand_bytes"] + grown["prefetch_bytes"],
        "wasted_bytes": grown["wasted_bytes"],
        "stall_share": grown["stall_s"] / busy,
        "overhead_share": grown["overhead_s"] / busy,
        "experts_per_step": _mean_growth(outcome, "experts_per_step"),
    }


def _mean_growth(outcome: Outcome, name: str) -> float:
    before, after = outcome.before[name], outcome.after[name]
    count = sum(after["counts"]) - sum(before["counts"])
    return float((after["sum"] - before["sum"]) / count) if count else 0.0
