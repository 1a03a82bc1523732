"""Other losses over plans and outputs, unweighted: the trainer owns the coefficients.

Shapes: N tokens, E experts, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.balance.load_balance import scores_of
from moesaic.errors import MoesaicError
from moesaic.routing.contract import RoutePlan


def router_entropy(plans: Sequence[RoutePlan], valid_N: Tensor) -> Tensor:
    """Mean -sum_e P log P over layers and valid tokens, nats; minimised, tokens use fewer experts (2403.07652)."""
    probs = torch.stack([scores_of(plan)[valid_N] for plan in plans]).float()
    return -torch.special.xlogy(probs, probs).sum(-1).mean()


def z_loss(plans: Sequence[RoutePlan], valid_N: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the logits: keeps them small (ST-MoE, 2202.08906, eq. 5)."""
    logits = [plan.logits for plan in plans if plan.logits is not None]
    if not logits:
        raise MoesaicError("these plans carry no logits (a random or fixed router): there is no z-loss for them")
    return torch.stack([logit[valid_N].float().logsumexp(-1) for logit in logits]).square().mean()


def consistency_loss(first_NV: Tensor, second_NV: Tensor, valid_N: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2, mean over valid tokens, nats (THOR, 2110.04260).

    The paper's code sums over tokens; the mean keeps the coefficient independent of the batch.
    """
    p, q = first_NV[valid_N].float().log_softmax(-1), second_NV[valid_N].float().log_softmax(-1)
    return 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1).mean()
