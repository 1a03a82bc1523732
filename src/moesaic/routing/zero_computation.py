"""MoE++: a router over real and free experts, with the previous layer's logits as a prior (2410.07348).

The pool has `experts` entries in the order FFN..., constant..., copy, zero (see `experts.pool`); the free ones let a
token spend 0, 1 or 2 FFNs. Its balance loss weighs free experts by tau: `balance.LoadBalance(eta=...)`.
"""

from dataclasses import replace

from moesaic.routing.contract import Caps, Router
from moesaic.routing.policies import TopK
from moesaic.routing.scorers import Linear, Residual


class ZeroComputationRouter(Router):
    """Top-2 over all experts, weights are raw probabilities (the paper; the released layer renormalises)."""

    caps = Caps(reads=frozenset({"hidden", "previous_plan"}), precompute="hint")

    def __init__(self, width: int, experts: int, layers: int, *, k: int = 2, gating_residual: bool = True) -> None:
        scorer = Linear(width, experts, layers)
        super().__init__(Residual(scorer, layers) if gating_residual else scorer, TopK(k, "probs"))
        if not gating_residual:
            self.caps = replace(self.caps, reads=frozenset({"hidden"}), precompute="no")


def heterogeneous_eta(ffn: int, free: int, tau: float = 0.75) -> list[float]:
    """Weights of the balance loss: 1 for FFN experts, tau for free ones (eq. 7); a small tau means more skipping."""
    return [1.0] * ffn + [tau] * free
