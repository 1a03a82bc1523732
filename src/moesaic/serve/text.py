"""Tokens to text as they come: never half a character, never the beginning of a stop string."""

from collections.abc import Sequence
from typing import Any

HOLE = "\ufffd"  # what decoding puts where bytes are no character, or not yet
WINDOW = 16  # tokens that are decoded at most, and as many more as wait for a character
PATIENCE = 12  # tokens that may wait for a character to be completed; bytes that are none are sent as they are


class Detokenizer:
    """The text of one request. stopped: the stop string that was completed; text before it has been sent.

    Only a window of tokens is decoded, once for each new one.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.stopped: str | None = None
        self._ids: list[int] = []
        self._prefix = 0  # tokens before this are no longer decoded
        self._read = 0  # tokens before this are in the text
        self._before = ""  # the text of those between
        self._held = ""  # decoded, but perhaps the beginning of a stop string

    def push(self, token: int) -> str:
        """The token was sampled; returns what may be sent now."""
        self._ids.append(token)
        return self._send(self._decode(final=False))

    def flush(self) -> str:
        """What is left at the end."""
        text = self._send(self._decode(final=True))
        if self.stopped is None:
            text, self._held = text + self._held, ""
        return text

    def piece(self, token: int) -> str:
        """The token's own text, for reports of log-probabilities."""
        return str(self.tokenizer.decode([token]))

    def _decode(self, final: bool) -> str:
        """Text of the tokens that came since the last certain place; empty while a character is incomplete."""
        before, now = self._before, self._text(self._prefix, len(self._ids))
        incomplete = now.endswith(HOLE) and len(self._ids) - self._read < PATIENCE
        if (incomplete and not final) or len(now) <= len(before):
            return ""
        last, self._read, self._before = self._read, len(self._ids), now
        if self._read - self._prefix >= WINDOW:
            self._prefix, self._before = last, self._text(last, self._read)
        return now[len(before) :]

    def _text(self, start: int, stop: int) -> str:
        return str(self.tokenizer.decode(self._ids[start:stop], skip_special_tokens=True))

    def _send(self, text: str) -> str:
        if self.stopped is not None:
            return ""
        text, self._held = self._held + text, ""
        found = [(text.find(stop), stop) for stop in self.stop if stop in text]
        if found:
            place, self.stopped = min(found)
            return text[:place]
        hold = max((_overlap(text, stop) for stop in self.stop), default=0)
        if hold:
            text, self._held = text[:-hold], text[-hold:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
