"""What a body says, as token ids: texts, token lists, conversations."""

from collections.abc import Sequence
from typing import Any

from moesaic.serve.api.schemas import Chat, Completion, Message
from moesaic.serve.request import RequestError


def requests(body: Completion | Chat) -> int:
    """How many a call makes: prompts times n."""
    given = body.prompt if isinstance(body, Completion) else ""
    single = isinstance(given, str) or (given and isinstance(given[0], int))
    return (1 if single else len(given)) * (body.n or 1)


def of_completion(body: Completion, tokenizer: Any) -> list[list[int]]:
    """One list of ids per prompt. Raises RequestError for empty and unreadable ones."""
    given = body.prompt
    if isinstance(given, str):
        return [encode(given, tokenizer)]
    if given and isinstance(given[0], int):
        return [list(given)]
    return [encode(one, tokenizer) if isinstance(one, str) else list(one) for one in given]  # type: ignore[arg-type]


def of_chat(body: Chat, tokenizer: Any) -> list[int]:
    """The conversation through the tokenizer's chat template; without one, a line "role: text" a turn."""
    if not getattr(tokenizer, "chat_template", None):
        return encode(plain(body.messages), tokenizer, "messages")
    turns = [{"role": message.role, "content": message.text} for message in body.messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may refuse roles and orders by any error
        raise RequestError(f"the model's chat template refuses this conversation: {error}", "messages") from None
    return encode(text, tokenizer, "messages", add_special_tokens=False)


def plain(messages: Sequence[Message]) -> str:
    """A conversation for models that were never taught a template."""
    return "".join(f"{message.role}: {message.text}\n" for message in messages) + "assistant:"


def encode(text: str, tokenizer: Any, field: str = "prompt", **options: Any) -> list[int]:
    """Token ids; raises RequestError, naming the field, for what is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("the text holds half of a surrogate pair: it is not valid Unicode", field) from None
    return list(tokenizer(text, **options).input_ids)


def pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text of each token by itself."""
    return [str(tokenizer.decode([token])) for token in ids]
