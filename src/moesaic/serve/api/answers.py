"""Events as OpenAI's JSON: whole answers and chunks of streams, for both kinds of completion."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moesaic.serve.api.calls import Result
from moesaic.serve.request import Finished, Token


@dataclass
class Writer:
    """Writes one call's answer. chat: which of the two forms; experts: name the experts of tokens."""

    model: str
    chat: bool
    experts: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:24])
    created: int = field(default_factory=lambda: int(time.time()))
    _at: dict[int, int] = field(default_factory=dict)  # by choice: characters of the tokens reported so far

    def head(self, chunk: bool) -> dict[str, Any]:
        """What every object begins with."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    # -- whole answers --------------------------------------------------------------------------------------------
    def whole(self, results: Sequence[Result], pieces: Sequence[Sequence[str]], echo: Sequence[str]) -> dict[str, Any]:
        """All choices. pieces: the tokens of each prompt; echo: what each text begins with."""
        each = len(results) // len(pieces)
        choices = []
        for index, result in enumerate(results):
            prompt = index // each
            choice = self._choice(index, echo[prompt] + result.text, result.tokens, _reason(result.end))
            if self.experts:
                choice["moesaic"] = {
                    "prompt_tokens": list(pieces[prompt]),
                    "prompt_experts": result.routed,
                    "experts": [token.expert for token in result.tokens],
                }
            choices.append(choice)
        return {**self.head(chunk=False), "choices": choices, "usage": usage([r.end for r in results], each)}

    def _choice(self, index: int, text: str, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "logprobs": self.logprobs(index, tokens), "finish_reason": reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return choice

    # -- chunks ---------------------------------------------------------------------------------------------------
    def chunk(
        self, index: int, text: str | None, token: Token | None = None, end: Finished | None = None, role: bool = False
    ) -> dict[str, Any]:
        """A piece of one choice; `end` closes it."""
        choice: dict[str, Any] = {"index": index, "logprobs": self.logprobs(index, [token] if token else [])}
        choice["finish_reason"] = _reason(end) if end else None
        if self.chat:
            choice["delta"] = {"role": "assistant"} if role else {}
            if text is not None:
                choice["delta"]["content"] = text
        else:
            choice["text"] = text or ""
        out = {**self.head(chunk=True), "choices": [choice]}
        if self.experts and token is not None:
            out["moesaic"] = {"experts": [token.expert]}
        return out

    def prompt(self, index: int, pieces: Sequence[str], experts: Sequence[int] | None, echo: str) -> dict[str, Any]:
        """The first piece of a choice: who speaks, and with `experts` who reads the prompt."""
        out = self.chunk(index, echo if not self.chat else "", role=True)
        if self.experts:
            out["moesaic"] = {"prompt_tokens": list(pieces), "prompt_experts": list(experts or ())}
        return out

    # -- log-probabilities ----------------------------------------------------------------------------------------
    def logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Of tokens that have them; None where none were asked for."""
        known = [token for token in tokens if token.logprob is not None]
        if not known:
            return None
        if self.chat:
            return {"content": [_entry(token) for token in known], "refusal": None}
        offsets = []
        for token in known:
            offsets.append(self._at.get(index, 0))
            self._at[index] = offsets[-1] + len(token.piece)
        return {
            "tokens": [token.piece for token in known],
            "token_logprobs": [token.logprob for token in known],
            "top_logprobs": [{text: logprob for _, text, logprob in token.top} for token in known],
            "text_offset": offsets,
        }


def _entry(token: Token) -> dict[str, Any]:
    def one(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

    return {**one(token.piece, token.logprob), "top_logprobs": [one(text, logprob) for _, text, logprob in token.top]}


def _reason(end: Finished | None) -> str | None:
    return None if end is None else end.reason


def usage(ends: Sequence[Finished | None], each: int) -> dict[str, Any]:
    """Counts of tokens; a prompt counts once however many answers it has."""
    ended = [end for end in ends if end is not None]
    prompt = sum(end.prompt_tokens for end in ended[::each])
    output = sum(end.output_tokens for end in ended)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in ended[::each])},
    }
