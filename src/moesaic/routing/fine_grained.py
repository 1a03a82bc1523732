"""DeepSeekMoE: many thin experts, and shared ones that every token uses (2401.06066).

The shared experts are not routed: they are part of the pool, take no probability, and are known before layer 0.
"""

from moesaic.errors import MoesaicError
from moesaic.routing.contract import Caps, Router
from moesaic.routing.policies import TopK
from moesaic.routing.scorers import Linear


class FineGrainedRouter(Router):
    """Top-k of the routed experts with raw probabilities (eq. 10-11, norm_topk_prob=false)."""

    caps = Caps(reads=frozenset({"hidden"}))

    def __init__(self, width: int, experts: int, layers: int, *, k: int = 6) -> None:
        super().__init__(Linear(width, experts, layers), TopK(k, "probs"))


def segment(experts: int, k: int, granularity: int, shared: int) -> tuple[int, int]:
    """(routed experts, routed k) after cutting each of `experts` into `granularity` and isolating `shared` of them.

    Parameters and FLOPs per token stay those of `experts` top-`k`: shared + routed k = granularity * k.
    """
    routed, routed_k = granularity * experts - shared, granularity * k - shared
    if granularity < 1 or shared < 0 or routed_k < 1:
        raise MoesaicError(
            f"granularity {granularity} with {shared} shared experts leaves {routed_k} of {routed} experts to route "
            f"(from {experts} experts, top-{k}); at least 1 is needed"
        )
    return routed, routed_k
