"""What a client asks of the engine, and what the engine tells it: plain data that crosses from thread to thread."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moesaic.errors import MoesaicError

FinishReason = Literal["stop", "length", "cancelled", "error"]


class RequestError(MoesaicError):
    """A request that cannot be served. `parameter` names the option at fault, None where it is none in particular."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class QueueFullError(MoesaicError):
    """The queue is full; `retry_after_s` is when a place may be free, from the recent rate of finished requests."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ShuttingDownError(MoesaicError):
    """The engine takes no new requests: it drains or has failed."""


@dataclass(frozen=True)
class ExpertControl:
    """Which experts the tokens of a request may use; ids of experts.

    allow: only these; empty = all. deny: never these. pin: every token goes to this one.

    Raises RequestError where they contradict each other.
    """

    allow: tuple[int, ...] = ()
    deny: tuple[int, ...] = ()
    pin: int | None = None

    def __post_init__(self) -> None:
        if self.pin is not None and (self.allow or self.deny):
            raise RequestError("experts.pin sends every token to one expert: leave allow and deny out", "experts")
        if self.allow and not set(self.allow) - set(self.deny):
            raise RequestError("experts.deny forbids every expert that experts.allow names", "experts")

    def __bool__(self) -> bool:
        return bool(self.allow or self.deny or self.pin is not None)


@dataclass(frozen=True)
class Generation:
    """How a request is continued. Raises RequestError, naming the option, for values out of range.

    temperature 0 = greedy. top_k 0 = no limit. seed None = a new one each time. logprobs: how many alternatives are
    reported beside the sampled token, None = no log-probabilities. logit_bias: token id -> addition to its logit.
    grammar: a constraint on the text, see `constraint`. ignore_eos: go on past the end-of-sequence token, which is then
    never sampled. experts_per_token: how many experts the routers of a stock mixture choose in each layer, None = as
    the model says.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: Mapping[str, Any] | None = None
    ignore_eos: bool = False
    experts: ExpertControl = ExpertControl()
    experts_per_token: int | None = None

    def __post_init__(self) -> None:
        self._range("max_tokens", self.max_tokens, 1, math.inf)
        self._range("temperature", self.temperature, 0, 100)
        self._range("top_p", self.top_p, 0, 1)
        self._range("top_k", self.top_k, 0, math.inf)
        self._range("min_p", self.min_p, 0, 1)
        self._range("presence_penalty", self.presence_penalty, -2, 2)
        self._range("frequency_penalty", self.frequency_penalty, -2, 2)
        self._range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)
        if self.experts_per_token is not None:
            self._range("experts_per_token", self.experts_per_token, 1, math.inf)
        if self.logprobs is not None:
            self._range("logprobs", self.logprobs, 0, 20)
        if any(not stop for stop in self.stop):
            raise RequestError("an empty stop string would end the text before it begins", "stop")

    @staticmethod
    def _range(name: str, value: float, low: float, high: float) -> None:
        if not (low <= value <= high):
            raise RequestError(f"{name} is {value}: expected {low:g} to {high:g}", name)


@dataclass(frozen=True)
class Routed:
    """The pre-gate has read the prompt: the expert of each of its tokens, None where routes are known per layer."""

    experts: tuple[int, ...] | None


@dataclass(frozen=True)
class Token:
    """One sampled token.

    text:    what can be sent now; empty while bytes of a character or of a possible stop string are held back.
    expert:  the one that runs it, None where routes are known layer by layer.
    logprob, top: log-probability of the token, and of the likeliest alternatives [(id, text, logprob)].
    """

    id: int
    text: str
    expert: int | None = None
    logprob: float | None = None
    piece: str = ""  # the token's own text, for reports of log-probabilities
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The request has ended; `text` is what was still held back. cached_tokens: prompt tokens reused from a prefix."""

    reason: FinishReason
    text: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    message: str = ""  # what went wrong, where reason is "error"
    stop: str | None = None  # the stop string that ended it


Event = Routed | Token | Finished
Deliver = Callable[[Event], None]
"""Called on the engine's thread for every event of a request, `Finished` last and exactly once. Must return at once."""
