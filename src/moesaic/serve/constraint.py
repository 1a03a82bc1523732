"""Structured output: texts that follow a JSON schema, a regular expression or a grammar, by the library llguidance."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.serve.request import RequestError

LIMIT = 64 * 1024  # bytes of a specification


class Grammars:
    """Compiles what requests ask for against one tokenizer; the library is loaded when the first one does."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._library: Any = None
        self._own: Any = None  # the library's view of the tokenizer

    def compile(self, spec: Mapping[str, Any]) -> "GrammarConstraint":
        """What may be said, as an automaton over tokens.

        spec: "type" is "json", "json_schema" with "schema", "regex" with "pattern", "choice" with "choices", or
        "grammar" with "lark".

        Raises RequestError for what cannot be compiled, MoesaicError if the library is missing.
        """
        if len(json.dumps(spec)) > LIMIT:
            raise RequestError(f"the grammar is longer than {LIMIT} bytes", "grammar")
        library = self._load()
        matcher = library.LLMatcher
        try:
            kind = spec["type"]
            if kind == "json":
                grammar = matcher.grammar_from_json_schema({"type": "object"})
            elif kind == "json_schema":
                grammar = matcher.grammar_from_json_schema(spec["schema"])
            elif kind == "regex":
                grammar = matcher.grammar_from_regex(spec["pattern"])
            elif kind == "choice":
                grammar = matcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in spec["choices"]))
            else:
                grammar = matcher.grammar_from_lark(spec["lark"])
            if problem := matcher.validate_grammar(grammar, self._own):
                raise ValueError(problem)
        except (KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RequestError(f"the grammar cannot be used: {reason}", "grammar") from None
        return GrammarConstraint(library, self._own, grammar)

    def _load(self) -> Any:
        if self._library is None:
            try:
                import llguidance
                import llguidance.hf
                import llguidance.torch
            except ImportError:
                raise MoesaicError("structured output needs llguidance: pip install 'moesaic[serve]'") from None
            self._own = llguidance.hf.from_tokenizer(self.tokenizer)
            self._library = llguidance
        return self._library


class GrammarConstraint:
    """One request's place in its grammar."""

    def __init__(self, library: Any, tokenizer: Any, grammar: str) -> None:
        self._torch = library.torch
        self._matcher = library.LLMatcher(tokenizer, grammar)
        self._bits = self._torch.allocate_token_bitmask(1, tokenizer.vocab_size)
        self.finished = False

    def mask(self, logits_V: Tensor) -> None:
        """Set what may not follow to -inf."""
        self._torch.fill_next_token_bitmask(self._matcher, self._bits, 0)
        vocab = self._bits.shape[1] * 32
        allowed = ((self._bits[0][:, None] >> torch.arange(32)) & 1).bool().flatten()
        logits_V[: min(vocab, len(logits_V))].masked_fill_(~allowed[: len(logits_V)], -torch.inf)
        logits_V[vocab:] = -torch.inf

    def advance(self, token: int) -> None:
        """The token was chosen."""
        self._matcher.consume_token(token)
        self.finished = bool(self._matcher.is_stopped())
