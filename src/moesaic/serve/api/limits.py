"""Who may ask, how much, and how often: an ASGI layer in front of the API."""

import hmac
import re
import time
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.serve.api import errors

PAGE = re.compile(r"/[\w-]+\.(js|css|svg|html)")
OPEN = ("/health", "/ready", "/", "/favicon.ico")  # without a key: probes and the page itself, which holds no data


@dataclass
class Bucket:
    """A token bucket: `rate` requests a second on average, `burst` at once."""

    rate: float
    burst: float
    level: float = field(init=False)
    at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.level = self.burst

    def take(self) -> float:
        """0 if a request may pass, else the seconds until one may."""
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level >= 1:
            self.level -= 1
            return 0.0
        return (1 - self.level) / self.rate


class Gatekeeper:
    """Checks key, rate and size before the app sees a request.

    keys: none = everybody may ask. per_minute: requests a key may make in a minute on average; 0 = no limit.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], per_minute: int, most_bytes: int) -> None:
        self.app, self.keys, self.most_bytes = app, keys, most_bytes
        self.per_minute = per_minute
        self._buckets: dict[str, Bucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        who = self._who(scope["path"], headers)
        if who is None:
            await errors.answer(
                401, "no valid API key: send it as `Authorization: Bearer KEY`", code="invalid_api_key"
            )(scope, receive, send)
            return
        if scope["method"] == "POST" and (wait := self._wait(who)):
            await errors.answer(
                429, f"more than {self.per_minute} requests a minute", code="rate_limited", retry_s=wait
            )(scope, receive, send)
            return
        await self._sized(scope, receive, send, headers)

    def _who(self, path: str, headers: dict[bytes, bytes]) -> str | None:
        if not self.keys:
            return ""
        given = headers.get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        found = None
        for number, own in enumerate(self.keys):  # all of them, so that time tells nothing
            if hmac.compare_digest(own.encode(), key.strip()) and kind.lower() == b"bearer":
                found = str(number)
        if found is None and (path in OPEN or PAGE.fullmatch(path)):
            return ""
        return found

    def _wait(self, who: str) -> float:
        if not self.per_minute:
            return 0.0
        rate = self.per_minute / 60
        return self._buckets.setdefault(who, Bucket(rate, max(self.per_minute / 6, 1))).take()

    async def _sized(self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes]) -> None:
        """Refuse a body by its announced length, or when it turns out longer."""
        taken = 0
        message = f"the body has more than {self.most_bytes} bytes"

        async def counted() -> Message:
            nonlocal taken
            part = await receive()
            taken += len(part.get("body", b""))
            if taken > self.most_bytes:
                raise HTTPException(413, message, {"Connection": "close"})
            return part

        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most_bytes:
            await errors.answer(413, message, code="too_large")(scope, receive, send)
            return
        await self.app(scope, counted, send)
