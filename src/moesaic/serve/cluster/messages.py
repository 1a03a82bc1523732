"""What crosses between the API's process and its replicas, beside the engine's own events."""

from dataclasses import dataclass
from typing import Literal

from moesaic.errors import MoesaicError
from moesaic.serve.request import Event, QueueFullError, RequestError, ShuttingDownError


@dataclass(frozen=True)
class About:
    """What all replicas have in common."""

    context: int
    expert_names: list[str]
    vocab: int


@dataclass(frozen=True)
class Accepted:
    """The first word of a replica that has queued the request."""


@dataclass(frozen=True)
class Refused:
    """The only word of a replica that has not. Errors themselves lose their fields when they are pickled."""

    kind: Literal["request", "full", "unavailable", "other"]
    message: str
    parameter: str | None = None
    retry_s: float = 1.0

    @classmethod
    def of(cls, error: MoesaicError) -> "Refused":
        """What `Engine.submit` raised."""
        if isinstance(error, RequestError):
            return cls("request", str(error), error.parameter)
        if isinstance(error, QueueFullError):
            return cls("full", str(error), retry_s=error.retry_after_s)
        return cls("unavailable" if isinstance(error, ShuttingDownError) else "other", str(error))

    def error(self) -> MoesaicError:
        """What the API raises."""
        if self.kind == "request":
            return RequestError(self.message, self.parameter)
        if self.kind == "full":
            return QueueFullError(self.message, self.retry_s)
        return (ShuttingDownError if self.kind == "unavailable" else MoesaicError)(self.message)


Word = Accepted | Refused | Event
