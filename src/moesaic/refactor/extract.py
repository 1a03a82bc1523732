"""Stage 2: each domain's expert is its most important channels, layer by layer (Read-ME, section 3.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.refactor.profile import Importance, Profile

Keep = float | Sequence[float]


def keep_per_layer(keep: Keep, layers: int) -> list[float]:
    """One share per layer from a number or a list. Raises MoesaicError outside (0, 1] or for a wrong length."""
    shares = [float(keep)] * layers if isinstance(keep, int | float) else [float(share) for share in keep]
    if len(shares) != layers:
        raise MoesaicError(
            f"keep has {len(shares)} entries, but the model has {layers} layers: give one number or {layers}"
        )
    for share in shares:
        if not 0 < share <= 1:
            raise MoesaicError(f"keep = {share} is outside (0, 1]: it is the share of FFN channels each expert keeps")
    return shares


def top_channels(score_GW: Tensor, keep: float) -> Tensor:
    """(G, W) bool: the round(keep * W) highest scores of every row, at least one, by true top-k."""
    count = max(1, round(keep * score_GW.shape[1]))
    mask = torch.zeros_like(score_GW, dtype=torch.bool)
    return mask.scatter_(1, score_GW.topk(count, dim=1).indices, True)


def extract(profile: Profile, keep: Keep = 0.5, importance: Importance = "contribution") -> list[Tensor]:
    """Masks of every expert, one (E, W) bool tensor per layer; expert e is domain e in every layer."""
    scores = profile.importance(importance)
    return [top_channels(s, k) for s, k in zip(scores, keep_per_layer(keep, len(scores)), strict=True)]


def extract_pruned(profile: Profile, keep: Keep = 0.5, importance: Importance = "contribution") -> list[Tensor]:
    """The control: one global mask of the same width, (1, W) per layer, from the average over domains.

    Scores are normalised per domain first, so that no domain decides because its activations are larger.
    """
    scores = [s / s.sum(1, keepdim=True).clamp_min(1e-12) for s in profile.importance(importance)]
    shares = keep_per_layer(keep, len(scores))
    return [top_channels(s.mean(0, keepdim=True), k) for s, k in zip(scores, shares, strict=True)]


def ownership(masks: Sequence[Tensor]) -> dict[str, list[int]]:
    """Per layer: how many channels all experts share, how many none owns, and how many exactly one owns."""
    owners = [mask.sum(0) for mask in masks]
    return {
        "shared": [int((n == len(mask)).sum()) for n, mask in zip(owners, masks, strict=True)],
        "dropped": [int((n == 0).sum()) for n in owners],
        "exclusive": [int((n == 1).sum()) for n in owners],
    }
