"""THOR: experts drawn at random, made interchangeable by a consistency loss (2110.04260).

The loss, over two forwards of one batch with different draws, is `balance.consistency`. Draws are hashes of the seed
and the token's place, so every layer's plan is known before layer 0 and prefetch can be exact.
"""

from dataclasses import replace

from moesaic.routing.contract import Caps, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.policies import Draw, Random
from moesaic.routing.scorers import Nothing


class RandomRouter(Router):
    """One draw per layer and batch in training (the released code), per sequence or token afterwards."""

    caps = Caps(reads=frozenset({"nothing"}), trainable=False, stochastic_eval=True, precompute="exact")

    def __init__(
        self,
        width: int,
        experts: int,
        layers: int,
        *,
        train_draw: Draw = "layer",
        eval_draw: Draw = "sequence",
        seed: int = 0,
    ) -> None:
        super().__init__(Nothing(experts), Random(experts, eval_draw, seed))
        self.train_policy = Random(experts, train_draw, seed)

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        """As Router.plan; while training the draw changes with `inp.step`, afterwards it does not."""
        logits, state = self.scorer(inp, state or RouterState())
        if inp.phase == "train":
            return self.train_policy(logits, inp), state
        return self.policy(logits, replace(inp, step=0)), state
