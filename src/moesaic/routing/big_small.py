"""Duo-LLM: each token's layer runs a big or a small FFN, or none (2410.10846).

Stage 1 trains both interchangeably (random choice), stage 2 asks an oracle (`analyze.oracle_routes`), stage 3 trains
this router: a soft mixture while training, the better one afterwards, under one budget over all layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.routing.contract import Caps, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.policies import TopK
from moesaic.routing.scorers import Linear

BIG, SMALL = 0, 1  # places in the pool; a third, if there is one, is "skip"


class BigSmallRouter(Router):
    """softmax(logits / tau); tau falls from 1 to `tau_end` over training, which hardens the choice.

    The paper prints a formula in which tau cancels and raises it; dividing and lowering does what the text wants.
    """

    caps = Caps(reads=frozenset({"hidden"}))

    def __init__(self, width: int, experts: int, layers: int, *, budget: float = 0.5, tau_end: float = 0.1) -> None:
        super().__init__(Linear(width, experts, layers, bias=True), TopK(1, "one"))
        self.budget, self.tau_end, self.tau = budget, tau_end, 1.0

    def schedule(self, step: int, steps: int) -> None:
        """Geometric from 1 to `tau_end`."""
        self.tau = self.tau_end ** (step / max(1, steps - 1))

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        """While training every module runs, weighted; afterwards the better one, with weight one."""
        if inp.phase != "train":
            return super().plan(inp, state)
        logits, state = self.score(inp, state)
        weight = (logits / self.tau).softmax(-1)
        index = torch.arange(self.experts, device=logits.device, dtype=torch.int32).expand(weight.shape)
        return RoutePlan(index, weight, logits=logits, probs=weight), state

    def losses(self, plans: Sequence[RoutePlan], inp: RouteInput) -> dict[str, Tensor]:
        """(mean over layers and tokens of P(big) - budget)^2, per sequence, averaged."""
        big = torch.stack([plan.scores[:, BIG] for plan in plans if plan.scores is not None]).mean(0)
        names, member = inp.seq.unique(return_inverse=True)
        weight = inp.valid.float()
        zero = torch.zeros(len(names), device=big.device)
        mean = zero.index_add(0, member, big * weight) / zero.index_add(0, member, weight).clamp_min(1)
        return {"budget": ((mean - self.budget) ** 2).mean()}
