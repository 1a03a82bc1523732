"""MoMa: experts in groups by modality, each expert choosing its tokens; auxiliary routers for decoding (2407.21770).

A token reaches the experts of its own modality only. In training each expert takes its best tokens of the batch, which
no decoder can do: an auxiliary router, trained afterwards to imitate the choice from the token alone, decides then,
while the main router still gives the weight.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.routing.contract import Caps, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.policies import ExpertChoice, Threshold, chosen
from moesaic.routing.scorers import MLP, Linear

FORBIDDEN = -30.0  # logit of another modality's expert: sigmoid and softmax are zero to fp32 precision, not NaN


class ModalityRouter(Router):
    """`groups` gives the number of experts of each modality, in pool order; weights are sigmoids (eq. 1)."""

    caps = Caps(
        reads=frozenset({"hidden", "modality"}), choice="expert", causal=False, causal_alternative="AuxiliaryRouter"
    )

    def __init__(self, width: int, experts: int, layers: int, *, groups: Sequence[int]) -> None:
        if sum(groups) != experts or min(groups) < 1:
            raise MoesaicError(f"modality groups {list(groups)} must be positive and sum to the {experts} experts")
        super().__init__(Linear(width, experts, layers), ExpertChoice(1.0))
        self.groups = list(groups)

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        """Expert choice inside each modality's tokens and experts."""
        self.check_phase(inp)
        logits, state = self.score(inp, state)
        modality, first = modality_of(inp, len(self.groups)), 0
        mask = torch.zeros_like(logits, dtype=torch.bool)
        for group, size in enumerate(self.groups):
            own = replace(inp, valid=inp.valid & (modality == group))
            part = self.policy(logits[:, first : first + size], own)
            mask[:, first : first + size] = part.used
            first += size
        logits = own_logits(logits, modality, self.groups)
        return chosen(mask, logits.sigmoid(), logits), state


class AuxiliaryRouter(Router):
    """The causal student of a ModalityRouter: sigmoid(SiLU(x A) B) > threshold decides, `main` weighs (eq. 3).

    Trained with `losses` on plans of the main router, which is frozen. Thresholds are per expert: `calibrate` sets them
    so that each expert runs as often as in training; 0.5 on rare targets would run them too seldom.
    """

    caps = Caps(reads=frozenset({"hidden", "modality"}), trainable=False)
    threshold: Tensor

    def __init__(self, main: ModalityRouter, width: int, layers: int) -> None:
        super().__init__(MLP(width, width // 2, main.experts, layers), Threshold())
        self.main = main.requires_grad_(False)
        self.register_buffer("threshold", torch.full((layers, main.experts), 0.5))

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        """Chosen by the auxiliary score, weighted by the main one."""
        logits, state = self.score(inp, state)
        modality = modality_of(inp, len(self.main.groups))
        logits = own_logits(logits, modality, self.main.groups)
        weight = own_logits(self.main.score(inp)[0], modality, self.main.groups).sigmoid()
        return chosen(logits.sigmoid() > self.threshold[inp.layer], weight, logits), state

    def losses(self, plans: Sequence[RoutePlan], inp: RouteInput) -> dict[str, Tensor]:
        """Binary cross-entropy against the main router's choices of one layer, `plans[0]`, over own experts."""
        logits, _ = self.score(inp)
        logits = own_logits(logits, modality_of(inp, len(self.main.groups)), self.main.groups)
        loss = F.binary_cross_entropy_with_logits(logits, plans[0].used.float(), reduction="none")
        return {"selection": loss[(logits > FORBIDDEN) & inp.valid[:, None]].mean()}

    @torch.no_grad()
    def calibrate(self, layer: int, probs_NE: Tensor, used_NE: Tensor) -> None:
        """Set the layer's thresholds so that each expert is used as often as in `used_NE`."""
        for expert in range(used_NE.shape[1]):
            share = 1 - float(used_NE[:, expert].float().mean())
            self.threshold[layer, expert] = probs_NE[:, expert].quantile(share)


def modality_of(inp: RouteInput, groups: int) -> Tensor:
    """The modality of each token, (N,) int64.

    Raises MoesaicError if it is missing, or names a group that does not exist.
    """
    if inp.modality is None:
        raise MoesaicError(
            "this router needs the modality of each token; give attach() a function from ids to modality"
        )
    if bool(((inp.modality < 0) | (inp.modality >= groups)).any()):
        raise MoesaicError(f"a token's modality lies outside 0..{groups - 1}, the groups of this router")
    return inp.modality.long()


def own_logits(logits_NE: Tensor, modality_N: Tensor, groups: Sequence[int]) -> Tensor:
    """The logits with those of other modalities' experts pushed to zero probability."""
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(list(groups))).to(logits_NE.device)
    return logits_NE.masked_fill(owner != modality_N[:, None], FORBIDDEN)
