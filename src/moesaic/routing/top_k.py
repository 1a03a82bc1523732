"""The plain learned router: a linear map and its k best experts (Shazeer et al., 1701.06538; Switch, 2101.03961)."""

from dataclasses import replace

from moesaic.routing.contract import Caps, Router
from moesaic.routing.policies import TopK, Weighting
from moesaic.routing.scorers import Linear


class TopKRouter(Router):
    """weighting="renorm" is Mixtral's (weights of the chosen sum to one), "probs" is Switch's and OLMoE's.

    With k = 1 only "probs" trains the router: one renormalised weight is always 1 (`caps.trainable` says so).
    """

    caps = Caps(reads=frozenset({"hidden"}))

    def __init__(self, width: int, experts: int, layers: int, *, k: int = 2, weighting: Weighting = "renorm") -> None:
        policy = TopK(k, weighting)
        super().__init__(Linear(width, experts, layers), policy)
        self.caps = replace(self.caps, trainable=policy.weighs)
