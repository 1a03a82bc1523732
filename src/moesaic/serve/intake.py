"""Requests as they come in: what can never be served is refused here, on the client's thread."""

import random
from collections.abc import Sequence
from typing import Any

from moesaic.serve.constraint import Grammars
from moesaic.serve.gate import Gate
from moesaic.serve.kv import KVPool
from moesaic.serve.memory import MemorySplit
from moesaic.serve.request import Deliver, Generation, RequestError
from moesaic.serve.sampling import Sampler
from moesaic.serve.sequence import Sequence as Request
from moesaic.serve.text import Detokenizer


class Intake:
    """Checks requests against the model and gives them what they need of their own: sampler, text, expert mask."""

    def __init__(
        self,
        tokenizer: Any,
        vocab: int,
        eos: frozenset[int],
        expert_names: list[str],
        gate: Gate,
        pool: KVPool,
        memory: MemorySplit,
        most_experts: int | None = None,
    ) -> None:
        self.tokenizer, self.vocab, self.eos, self.expert_names = tokenizer, vocab, eos, expert_names
        self.gate, self.pool, self.memory = gate, pool, memory
        self.context = pool.context
        self.most_experts = most_experts  # that a request may let routers choose per token, None = it may not
        self.grammars = Grammars(tokenizer)
        self._seeds = random.Random()

    def request(self, prompt: Sequence[int], generation: Generation, deliver: Deliver, now: float) -> Request:
        """A request ready to be queued; raises RequestError, naming the option, if it can never be served."""
        self._check(prompt, generation)
        request = Request(-1, list(prompt), generation, deliver, now)
        seed = self._seeds.getrandbits(63) if generation.seed is None else generation.seed
        constraint = None if generation.grammar is None else self.grammars.compile(generation.grammar)
        request.sampler = Sampler(generation, prompt, seed, self.vocab, self.eos, constraint)
        request.text = Detokenizer(self.tokenizer, generation.stop)
        request.bias = self.gate.bias(generation.experts)
        return request

    def _check(self, prompt: Sequence[int], generation: Generation) -> None:
        if not prompt:
            raise RequestError("the prompt is empty: expected at least one token", "prompt")
        if wrong := [token for token in prompt if not 0 <= token < self.vocab]:
            raise RequestError(f"token {wrong[0]} is outside the vocabulary of {self.vocab}", "prompt")
        self._check_experts(generation)
        wanted = len(prompt) + generation.max_tokens
        if wanted > self.context:
            raise RequestError(
                f"{len(prompt)} prompt and {generation.max_tokens} output tokens are {wanted}, but the context is "
                f"{self.context}: shorten the prompt or lower max_tokens",
                "max_tokens" if len(prompt) < self.context else "prompt",
            )
        needed = self.pool.bytes_for(wanted - 1)
        if needed > self.memory.most_kv:
            raise RequestError(
                f"the keys of {wanted} tokens take {needed} bytes, but {self.memory.most_kv} are left for them: "
                "shorten the prompt, lower max_tokens, or give the server more memory",
                "max_tokens",
            )

    def _check_experts(self, generation: Generation) -> None:
        if generation.experts and not self.expert_names:
            raise RequestError(
                "this model's routers choose anew in every layer, so no request can allow, deny or pin experts: leave "
                "experts out",
                "experts",
            )
        if (wanted := generation.experts_per_token) is None:
            return
        if self.most_experts is None:
            raise RequestError(
                "this model's number of experts per token is fixed: leave experts_per_token out", "experts_per_token"
            )
        if wanted > self.most_experts:
            raise RequestError(
                f"experts_per_token is {wanted}: expected 1 to {self.most_experts}, as many as the model chooses",
                "experts_per_token",
            )
