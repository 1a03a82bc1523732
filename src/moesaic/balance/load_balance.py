"""Load balance of a plan, padding excluded."""

import torch
from torch import Tensor


def expert_load(index_N: Tensor, experts: int, valid_N: Tensor | None = None) -> Tensor:
    """Share of the valid tokens each expert receives, (E,) float32, sums to 1."""
    chosen = index_N if valid_N is None else index_N[valid_N]
    counts = torch.bincount(chosen.flatten().long(), minlength=experts).float()
    return counts / counts.sum().clamp_min(1)


def load_balancing_loss(logits_NE: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e with f the top-1 load and P the mean probability (Switch Transformer, eq. 4); 1 when even."""
    probs = logits_NE.float().softmax(-1)
    if valid_N is not None:
        probs = probs[valid_N]
    experts = probs.shape[-1]
    return experts * (expert_load(probs.argmax(-1), experts) * probs.mean(0)).sum()
