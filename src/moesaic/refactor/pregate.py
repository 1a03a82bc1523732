"""Stage 3: distil the pre-gate from the dense model's own activations (Read-ME, section 3.2 and the released loss).

For every token and layer, the label asks: which expert owns the channels that this token excites in the dense model?
One prediction per token answers for all layers, so the labels of all layers are averaged into one target.
Shapes: L layers, N tokens, E experts, W channels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.balance.load_balance import expert_load, load_balancing_loss
from moesaic.models.ffn_sites import capture_activations, find_ffn_sites
from moesaic.refactor.profile import padded_inputs
from moesaic.routing.pregate import PreGate

RouterLoss = Literal["overlap", "kl", "domain"]

GRADES = (1.0, 0.8, 0.6, 0.4, 0.2)  # a channel's membership is graded by how far up the token's ranking it stands
SHARPNESS = 10.0
HARD_SHARE, SMOOTHING = 0.75, 0.5


def graded_membership(size_NW: Tensor, count: int) -> Tensor:
    """(N, W) float32: 5/(3n) for a token's top n/5 channels, falling in five steps to 1/(3n) at the n-th, else 0."""
    ranks = [max(1, round(grade * count)) for grade in GRADES]
    thresholds = size_NW.topk(max(ranks), dim=-1).values[:, [rank - 1 for rank in ranks]]
    return (size_NW[:, :, None] >= thresholds[:, None, :]).sum(-1) / (3.0 * count)


class OverlapTeacher:
    """Runs the frozen dense model and scores, per layer and token, the overlap with each expert's own channels."""

    def __init__(self, dense: PreTrainedModel, masks: Sequence[Tensor], kind: RouterLoss = "overlap") -> None:
        self.model = dense.base_model if dense.base_model is not None else dense
        self.sites = find_ffn_sites(dense)
        self.dense, self.kind = dense, kind
        # Channels that all experts own say nothing about which expert to choose.
        self.unique = [(mask & ~mask.all(0)).float().to(dense.device) for mask in masks]
        self.full = [mask.float().to(dense.device) for mask in masks]

    @torch.no_grad()
    def overlaps(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """(L, N, E) float32; "overlap": mean-centred graded overlap times 10, "kl": number of common top channels."""
        result: list[Tensor] = [torch.empty(0)] * len(self.sites)

        def record(activation: Tensor, layer: int) -> None:
            size = activation.detach().flatten(0, -2).abs().float()
            if self.kind == "kl":
                keep = int(self.full[layer][0].sum())
                own = torch.zeros_like(size).scatter_(1, size.topk(keep, dim=1).indices, 1.0)
                result[layer] = own @ self.full[layer].T
                return
            unique = self.unique[layer]
            distance = graded_membership(size, max(1, int(unique[0].sum()))) @ unique.T
            result[layer] = SHARPNESS * (distance - distance.mean())

        with capture_activations(self.dense, self.sites, record):
            self.model(**padded_inputs(self.model, ids_BS, mask_BS))
        return torch.stack(result)


def overlap_target(overlap_LNE: Tensor) -> Tensor:
    """(N, E): the released loss as one target. 0.75 x smoothed hard label + 0.25 x soft label, averaged over layers.

    Cross-entropy is linear in its target, so this equals the mean of the per-layer losses.
    """
    experts = overlap_LNE.shape[-1]
    hard = F.one_hot(overlap_LNE.argmax(-1), experts) * (1 - SMOOTHING) + SMOOTHING / experts
    return (HARD_SHARE * hard + (1 - HARD_SHARE) * overlap_LNE.softmax(-1)).mean(0)


def router_loss(logits_NE: Tensor, overlap_LNE: Tensor, kind: RouterLoss) -> Tensor:
    """(N,) loss of each token: "overlap" (released code) or "kl", KL(router || softmax(common channels)) (paper)."""
    log_p = logits_NE.float().log_softmax(-1)
    if kind == "kl":
        return (log_p.exp() * (log_p - overlap_LNE.log_softmax(-1).mean(0))).sum(-1)
    return -(overlap_target(overlap_LNE) * log_p).sum(-1)


def router_step(
    pregate: PreGate, teacher: OverlapTeacher, kind: RouterLoss = "overlap"
) -> Callable[[Mapping[str, Tensor]], dict[str, Any]]:
    """The loss function of a router stage: `router` and `load_balance`, means over valid tokens, and metrics."""

    def step(batch: Mapping[str, Tensor]) -> dict[str, Any]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        valid = torch.ones_like(ids, dtype=torch.bool).flatten() if mask is None else mask.flatten().bool()
        logits = pregate(ids, mask).flatten(0, 1)
        if kind == "domain":
            token_loss = F.cross_entropy(logits, batch["domain"][:, None].expand(ids.shape).flatten(), reduction="none")
        else:
            token_loss = router_loss(logits, teacher.overlaps(ids, mask), kind)
        choice = logits.argmax(-1)
        own = (choice.view(ids.shape) == batch["domain"][:, None]).flatten()
        load = expert_load(choice, logits.shape[-1], valid)
        return {
            "router": token_loss[valid].mean(),
            "load_balance": load_balancing_loss(logits, valid),
            "domain_accuracy": float(own[valid].float().mean()),
            "entropy": float(-(load * load.clamp_min(1e-9).log()).sum()),
            "load": load.tolist(),
        }

    return step
