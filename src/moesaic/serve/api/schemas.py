"""Request bodies of the API: OpenAI's names, ours beside them, and nothing that would be ignored in silence."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from moesaic.serve.request import ExpertControl, Generation, RequestError

Number = StrictInt | StrictFloat
LONGEST = 10_000_000  # characters of a text: longer ones are refused before they are looked at
NAMES = 1024


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Experts(Strict):
    """Which experts a request's tokens may use, by name or number."""

    allow: list[StrictStr | StrictInt] = Field(default_factory=list, max_length=NAMES)
    deny: list[StrictStr | StrictInt] = Field(default_factory=list, max_length=NAMES)
    pin: StrictStr | StrictInt | None = None


class StreamOptions(Strict):
    """include_usage: a last chunk with the counts of tokens."""

    include_usage: StrictBool = False


class JsonSchema(Strict):
    """OpenAI's wrapping of a schema."""

    name: StrictStr = "answer"
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    """text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Options(Strict):
    """What both kinds of completion take. `user`, `metadata` and `store` are taken and change nothing."""

    model: StrictStr | None = None
    max_tokens: StrictInt | None = Field(default=None, ge=1)
    temperature: Number | None = Field(default=None, ge=0, le=2)
    top_p: Number | None = Field(default=None, ge=0, le=1)
    top_k: StrictInt | None = Field(default=None, ge=0)
    min_p: Number | None = Field(default=None, ge=0, le=1)
    presence_penalty: Number | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: Number | None = Field(default=None, gt=0, le=1000)
    seed: StrictInt | None = None
    n: StrictInt | None = Field(default=None, ge=1, le=16)
    stop: StrictStr | list[StrictStr] | None = Field(default=None, max_length=LONGEST)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[StrictStr, Number] | None = Field(default=None, max_length=NAMES)
    response_format: ResponseFormat | None = None
    guided_regex: StrictStr | None = None
    guided_choice: list[StrictStr] | None = Field(default=None, min_length=1, max_length=NAMES)
    ignore_eos: StrictBool | None = None
    experts: Experts | None = None
    experts_per_token: StrictInt | None = Field(default=None, ge=1, le=1024)
    return_experts: StrictBool | None = None
    user: StrictStr | None = None
    metadata: dict[StrictStr, StrictStr] | None = None
    store: StrictBool | None = None

    def generation(self, room: int, names: Sequence[str], experts: int) -> Generation:
        """The engine's options; at most `room` tokens if the request names no number.

        Raises RequestError, naming the option, for values that the engine refuses.
        """
        given = {
            name: getattr(self, name)
            for name in (
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
                "seed",
                "ignore_eos",
                "experts_per_token",
            )
            if getattr(self, name) is not None
        }
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stop) > 16:
            raise RequestError(f"{len(stop)} stop strings: expected at most 16", "stop")
        return Generation(
            max_tokens=self.most_tokens(room),
            stop=tuple(stop),
            logprobs=self.alternatives(),
            logit_bias=self._bias(),
            grammar=self._grammar(),
            experts=_control(self.experts, names, experts),
            **given,
        )

    def most_tokens(self, room: int) -> int:
        """How many tokens may be generated."""
        if self.max_tokens is None and room < 1:
            raise RequestError("the prompt fills the context: shorten it", "prompt")
        return self.max_tokens or room

    def alternatives(self) -> int | None:
        """How many alternatives are reported beside each token; None = no log-probabilities."""
        raise NotImplementedError

    def _bias(self) -> dict[int, float]:
        bias = {}
        for name, value in (self.logit_bias or {}).items():
            if not (name.isascii() and name.isdecimal()) or len(name) > 9:
                raise RequestError(f"logit_bias names {name[:40]!r}: expected token ids", "logit_bias")
            if not -100 <= value <= 100:
                raise RequestError(f"logit_bias of token {name} is {value}: expected -100 to 100", "logit_bias")
            bias[int(name)] = float(value)
        return bias

    def field_of(self, option: str | None) -> str | None:
        """The field that an option of the engine was given by."""
        return next(iter(self._grammars()), None) if option == "grammar" else option

    def _grammar(self) -> dict[str, Any] | None:
        wanted = self._grammars()
        if len(wanted) > 1:
            raise RequestError("give one of response_format, guided_regex and guided_choice", list(wanted)[1])
        return next(iter(wanted.values()), None)

    def _grammars(self) -> dict[str, dict[str, Any]]:
        """By field: what the text must follow."""
        wanted: dict[str, dict[str, Any]] = {}
        if self.response_format is not None and self.response_format.type == "json_object":
            wanted["response_format"] = {"type": "json"}
        if self.response_format is not None and self.response_format.type == "json_schema":
            schema = self.response_format.json_schema
            if schema is None or schema.schema_ is None:
                raise RequestError("response_format json_schema needs json_schema.schema", "response_format")
            wanted["response_format"] = {"type": "json_schema", "schema": schema.schema_}
        if self.guided_regex is not None:
            wanted["guided_regex"] = {"type": "regex", "pattern": self.guided_regex}
        if self.guided_choice is not None:
            wanted["guided_choice"] = {"type": "choice", "choices": self.guided_choice}
        return wanted


class Completion(Options):
    """POST /v1/completions. prompt: a text, a list of texts, token ids, or a list of lists of them."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    logprobs: StrictInt | None = Field(default=None, ge=0, le=20)
    echo: StrictBool | None = None

    def alternatives(self) -> int | None:
        """See Options."""
        if self.echo and self.logprobs is not None:
            raise RequestError("echo has no log-probabilities for the prompt: leave one of the two out", "logprobs")
        return self.logprobs


class TextPart(Strict):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: StrictStr


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: StrictStr | None = None

    @property
    def text(self) -> str:
        """All its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Options):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: StrictInt | None = Field(default=None, ge=1)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(default=None, ge=0, le=20)

    def alternatives(self) -> int | None:
        """See Options."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def most_tokens(self, room: int) -> int:
        """See Options."""
        return self.max_completion_tokens or super().most_tokens(room)

    def field_of(self, option: str | None) -> str | None:
        """See Options."""
        if option == "prompt":
            return "messages"
        if option == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return super().field_of(option)


def _control(wanted: Experts | None, names: Sequence[str], experts: int) -> ExpertControl:
    if wanted is None:
        return ExpertControl()
    if not experts:
        raise RequestError("this model routes layer by layer: its experts cannot be chosen by request", "experts")

    def number(name: str | int) -> int:
        if isinstance(name, int):
            return name
        if name not in names:
            from moesaic.schedule.family import near

            raise RequestError(str(near(name[:100], names, "expert")), "experts")
        return list(names).index(name)

    allow, deny = (tuple(number(name) for name in some) for some in (wanted.allow, wanted.deny))
    return ExpertControl(allow, deny, None if wanted.pin is None else number(wanted.pin))
