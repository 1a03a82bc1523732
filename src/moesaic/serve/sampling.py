"""From logits to tokens, each request by its own rules and its own random numbers, whoever else is in the batch.

Order, as OpenAI and transformers have it: logit bias, penalties, constraint, temperature, top-k, top-p, min-p.
Shapes: B requests, V vocabulary.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.serve.request import Generation, RequestError

DAMAGED = "the model's logits are not finite: the checkpoint or its input is damaged"


class Constraint(Protocol):
    """What a text may go on with. finished: only its end may follow."""

    finished: bool

    def mask(self, logits_V: Tensor) -> None:
        """Set what is not allowed to -inf."""
        ...

    def advance(self, token: int) -> None:
        """The token was chosen."""
        ...


class Choice(NamedTuple):
    """A sampled token; error: why there is none. Log-probabilities where the request asked for them."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: str | None = None


class Sampler:
    """What one request's next token depends on besides its logits.

    Raises RequestError for a bias on tokens that do not exist.
    """

    def __init__(
        self,
        generation: Generation,
        prompt_ids: Sequence[int],
        seed: int,
        vocab: int,
        eos: frozenset[int],
        constraint: Constraint | None = None,
    ) -> None:
        self.generation, self.constraint = generation, constraint
        if wrong := [token for token in generation.logit_bias if not 0 <= token < vocab]:
            raise RequestError(f"logit_bias names token {wrong[0]}, outside the vocabulary of {vocab}", "logit_bias")
        self._bias = dict(generation.logit_bias)
        self.barred = sorted(eos) if generation.ignore_eos else []
        self._counts: Counter[int] = Counter()  # of sampled tokens
        self._seen = set(prompt_ids) if generation.repetition_penalty != 1 else set()
        self._random = torch.Generator().manual_seed(seed % 2**63)
        g = generation
        self._changes = bool(
            self._bias or constraint or g.presence_penalty or g.frequency_penalty or g.repetition_penalty != 1
        )
        self.plain = not self._changes and g.temperature == 0 and g.logprobs is None

    @property
    def finished(self) -> bool:
        """Whether a constraint is fulfilled, so that the text is complete."""
        return self.constraint is not None and self.constraint.finished

    def choose(self, logits_V: Tensor) -> Choice:
        """The next token; log-probabilities are of the distribution before temperature and truncation."""
        logits_V = logits_V.to("cpu", torch.float32)
        if self._changes:
            logits_V = self._changed(logits_V.clone())
        token = int(logits_V.argmax()) if self.generation.temperature == 0 else self._draw(logits_V)
        if not math.isfinite(float(logits_V[token])):
            return Choice(-1, error="logit_bias and the constraint leave no token that may follow")
        self.took(token)
        if self.generation.logprobs is None:
            return Choice(token)
        logprobs_V = logits_V.log_softmax(-1)
        top = logprobs_V.topk(self.generation.logprobs)
        return Choice(
            token, float(logprobs_V[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        )

    def took(self, token: int) -> None:
        """The token was chosen."""
        if self._changes:
            self._counts[token] += 1
            self._seen.add(token)
            if self.constraint is not None:
                self.constraint.advance(token)

    def _changed(self, logits_V: Tensor) -> Tensor:
        g = self.generation
        if self._bias:
            logits_V[list(self._bias)] += torch.tensor(list(self._bias.values()))
        if g.repetition_penalty != 1 and self._seen:  # CTRL, as transformers' RepetitionPenaltyLogitsProcessor
            seen = list(self._seen)
            scores = logits_V[seen]
            logits_V[seen] = torch.where(scores < 0, scores * g.repetition_penalty, scores / g.repetition_penalty)
        if self._counts and (g.presence_penalty or g.frequency_penalty):
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            logits_V[list(self._counts)] -= g.presence_penalty + g.frequency_penalty * counts
        if self.constraint is not None:
            self.constraint.mask(logits_V)
        return logits_V

    def _draw(self, logits_V: Tensor) -> int:
        g = self.generation
        sorted_V, order_V = (logits_V / g.temperature).sort(descending=True, stable=True)
        keep = min(g.top_k, len(sorted_V)) if g.top_k else len(sorted_V)
        probs_V = sorted_V[:keep].softmax(-1)
        if g.top_p < 1:  # what comes before the token that reaches top_p, and that token
            before_V = probs_V.cumsum(-1) - probs_V
            probs_V = probs_V[: max(int((before_V < g.top_p).sum()), 1)]
        if g.min_p > 0:
            probs_V = probs_V[: max(int((probs_V >= g.min_p * probs_V[0]).sum()), 1)]
        cumulated_V = probs_V.double().cumsum(-1)
        point = torch.rand((), generator=self._random, dtype=torch.float64) * cumulated_V[-1]
        place = min(int(torch.searchsorted(cumulated_V, point, right=True)), len(probs_V) - 1)
        return int(order_V[place])


@torch.inference_mode()
def sample(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[Choice]:
    """The next token of every request; greedy ones without further wishes share one pass."""
    if not samplers:
        return []
    values_B, best_B = logits_BV.max(-1)  # NaN counts as the largest
    damaged = (~values_B.isfinite()).tolist()
    best = best_B.tolist()
    for row, sampler in enumerate(samplers):
        if sampler.barred and (best[row] in sampler.barred or not sampler.plain):
            logits_BV[row, sampler.barred] = -math.inf
            best[row] = int(logits_BV[row].argmax())
    choices = []
    for row, sampler in enumerate(samplers):
        if damaged[row]:
            choices.append(Choice(-1, error=DAMAGED))
        else:
            choices.append(Choice(best[row]) if sampler.plain else sampler.choose(logits_BV[row]))
    return choices
