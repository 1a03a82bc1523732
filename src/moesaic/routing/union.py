"""Union of Experts: slices of one dense block as experts (2503.02495).

The released language-model code lets each expert choose its tokens over the whole sequence, and adds outputs without
weights: its router gets no gradient and a later token changes an earlier one's output. It is kept here for encoders.
`UnionRouter` is the trained, causal form: each token chooses, and weights carry the gradient.
"""

from dataclasses import replace

import torch
from torch import Tensor

from moesaic.routing.contract import Caps, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.policies import ExpertChoice, TopK, check_k
from moesaic.routing.scorers import Linear


class UnionRouter(Router):
    """Top-k slices, weights renormalised and times k: with equal scores, what k of the dense block's slices give."""

    caps = Caps(reads=frozenset({"hidden"}))

    def __init__(self, width: int, experts: int, layers: int, *, k: int = 2) -> None:
        policy = TopK(k, "renorm")
        super().__init__(Linear(width, experts, layers), policy)
        self.caps = replace(self.caps, trainable=policy.weighs)
        self.k = k

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        """As Router.plan, with weights that sum to k."""
        plan, state = super().plan(inp, state)
        plan.weight = plan.weight * self.k
        return plan, state


class DataSelectionRouter(Router):
    """Each expert takes the best half of every sequence (patch-wise data selection); encoders only."""

    caps = Caps(
        reads=frozenset({"hidden"}), choice="expert", causal=False, causal_alternative="UnionRouter", trainable=False
    )

    def __init__(self, width: int, experts: int, layers: int, *, share: float = 0.5) -> None:
        policy = ExpertChoice(share * experts, scope="sequence", score="softmax", weighting="one")
        super().__init__(Linear(width, experts, layers, bias=True), policy)


class ExpertSelectionRouter(Router):
    """k experts per sequence, from the mean of its tokens, run on all of it (expert selection); encoders only.

    The released code scores the flattened sequence, which fixes its length; the mean takes any.
    """

    caps = Caps(
        reads=frozenset({"hidden"}), choice="sample", causal=False, causal_alternative="UnionRouter", trainable=False
    )

    def __init__(self, width: int, experts: int, layers: int, *, k: int = 2) -> None:
        check_k(k, experts)
        super().__init__(_SequenceMean(Linear(width, experts, layers, bias=True)), TopK(k, "one"))


class _SequenceMean(torch.nn.Module):
    """The mean logits of each sequence's valid tokens, given to all of its tokens."""

    def __init__(self, scorer: Linear) -> None:
        super().__init__()
        self.scorer, self.experts = scorer, scorer.experts

    def forward(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]:
        logits, state = self.scorer(inp, state)
        names, member = inp.seq.unique(return_inverse=True)
        valid = inp.valid.float()[:, None]
        total = torch.zeros(len(names), self.experts, device=logits.device).index_add(0, member, logits * valid)
        count = torch.zeros(len(names), 1, device=logits.device).index_add(0, member, valid)
        return (total / count.clamp_min(1))[member], state
