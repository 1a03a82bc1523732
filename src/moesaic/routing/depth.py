"""Mixture of depths: whole decoder layers that only some tokens take (2404.02258; in MoMa 2407.21770, sec. 2.3).

The plan has one slot, "this block", and `run` says who takes it. In training the best tokens of every sequence run,
which no decoder can do: a later token may push an earlier one out. An auxiliary router, fitted afterwards to imitate
the choice from the token alone, decides in decode, while the main router still gives the weight (eq. 4).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.routing.contract import EMPTY, Caps, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.policies import ExpertChoice
from moesaic.routing.scorers import MLP, Linear


class DepthRouter(Router):
    """The `capacity` share of each sequence's valid tokens with the highest sigmoid(w x + b) runs; weight = sigmoid.

    scope:  "sequence": every sequence of one length keeps equally many tokens, so gathering them stays rectangular.
            MoMa selects over the whole "batch", where a sequence's share depends on its batch mates.
    bias:   start of b: weights start near sigmoid(bias). 0 for training from scratch; a pretrained block needs about 4,
            or its output is halved at once.
    """

    caps = Caps(reads=frozenset({"hidden"}), choice="expert", causal=False, causal_alternative="AuxiliaryDepthRouter")

    def __init__(
        self,
        width: int,
        layers: int,
        *,
        capacity: float = 0.25,
        scope: Literal["sequence", "batch"] = "sequence",
        bias: float = 0.0,
    ) -> None:
        if not 0 < capacity <= 1:
            raise MoesaicError(f"capacity = {capacity}: the share of tokens that run must be above 0 and at most 1")
        super().__init__(Linear(width, 1, layers, bias=True), ExpertChoice(capacity, scope))
        for head in self.scorer.heads:  # type: ignore[attr-defined]
            torch.nn.init.constant_(head.bias, bias)

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        """As Router.plan, with `run` (N,)."""
        plan, state = super().plan(inp, state)
        return replace(plan, run=plan.used[:, 0]), state


class AuxiliaryDepthRouter(Router):
    """The causal student of a DepthRouter: sigmoid(SiLU(x A) B) > threshold decides, `main` weighs.

    Trained with `losses` on plans of the main router, which is frozen; `calibrate` sets each layer's threshold so that
    it runs as many tokens as in training (0.5 on targets rarer than that would run too few).
    """

    caps = Caps(reads=frozenset({"hidden"}), trainable=False)
    threshold: Tensor

    def __init__(self, main: DepthRouter, width: int, layers: int) -> None:
        super().__init__(MLP(width, max(1, width // 2), 1, layers), main.policy)
        self.main = main.requires_grad_(False)
        self.register_buffer("threshold", torch.full((layers, 1), 0.5))

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        """Chosen by the auxiliary score of each token alone, weighted by the main one."""
        logits, weight = self.score(inp)[0], self.main.score(inp)[0].sigmoid()
        run = (logits.sigmoid() > self.threshold[inp.layer]) & inp.valid[:, None]
        index = torch.zeros_like(run, dtype=torch.int32).masked_fill(~run, EMPTY)
        return RoutePlan(index, weight * run, logits, logits.sigmoid(), run[:, 0]), state or RouterState()

    def losses(self, plans: Sequence[RoutePlan], inp: RouteInput) -> dict[str, Tensor]:
        """Binary cross-entropy against the main router's choices of layer `inp.layer`, `plans[0]`."""
        logits, _ = self.score(inp)
        loss = F.binary_cross_entropy_with_logits(logits, plans[0].used.float(), reduction="none")
        return {"selection": loss[inp.valid].mean()}

    @torch.no_grad()
    def calibrate(self, layer: int, probs_NE: Tensor, used_NE: Tensor) -> None:
        """Set the layer's threshold so that as many tokens run as in `used_NE`; both (N, 1)."""
        self.threshold[layer, 0] = probs_NE[:, 0].quantile(1 - float(used_NE.float().mean()))
