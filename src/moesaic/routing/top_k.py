"""The plain learned router: a linear map and its k best experts (Shazeer et al., 1701.06538; Switch, 2101.03961)."""

from moesaic.routing.contract import Caps, Router
from moesaic.routing.policies import TopK, Weighting
from moesaic.routing.scorers import Linear


class TopKRouter(Router):
    """weighting="renorm" is Mixtral's (weights of the chosen sum to one), "probs" is Switch's and OLMoE's."""

    caps = Caps(reads=frozenset({"hidden"}))

    def __init__(self, width: int, experts: int, layers: int, *, k: int = 2, weighting: Weighting = "renorm") -> None:
        super().__init__(Linear(width, experts, layers), TopK(k, weighting))
