"""Selection policies: logits in, plan out. A router is a scorer plus one of these."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.routing.contract import RoutePlan


@dataclass(frozen=True)
class TopK:
    """The k largest logits. `weighting`: "one" (hard choice), "probs" (raw), or "renorm" (over the chosen)."""

    k: int = 1
    weighting: str = "one"

    def __call__(self, logits_NE: Tensor) -> RoutePlan:
        logits_NE = logits_NE.float()
        top, index = logits_NE.topk(self.k, dim=-1)
        if self.weighting == "one":
            weight = torch.ones_like(top)
        elif self.weighting == "renorm":
            weight = top.softmax(-1)
        else:
            weight = logits_NE.softmax(-1).gather(-1, index)
        return RoutePlan(index.int(), weight, logits=logits_NE)


@dataclass(frozen=True)
class Random:
    """One uniformly drawn expert per token: the control every trained router must beat."""

    experts: int

    def __call__(self, tokens: int, generator: torch.Generator) -> RoutePlan:
        index = torch.randint(self.experts, (tokens, 1), generator=generator)
        return RoutePlan(index.int(), torch.ones(tokens, 1))


def fixed(expert_N: Tensor) -> RoutePlan:
    """The plan that sends token n to expert `expert_N[n]` with weight one: oracle routes, replay, user override."""
    return RoutePlan(expert_N.reshape(-1, 1).int(), torch.ones(expert_N.numel(), 1, device=expert_N.device))
