"""Load balance of plans: one loss for all methods, padding excluded, per layer and then averaged, never pooled.

loss = scale * sum_e eta_e f_e P_e,  f_e = the expert's share of the used slots (no gradient), P_e = its mean score.
With scale = E (the default) a uniform router gives 1 whatever k is. What differs between papers is the set of tokens
that f is counted over, the weights eta, and the scale:

    Switch (2101.03961, eq. 4), MoM             scope "micro"
    DeepSeekMoE (2401.06066, eq. 12-14)         scope "sequence"
    Demons in the Detail (2501.11873, eq. 4-6)  scope "global": f over gradient accumulation and over processes
    MoE++ (2410.07348, eq. 7)                   eta = tau for free experts; the paper's scale is k instead of E

Shapes: N tokens, E experts, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.routing.contract import EMPTY, RoutePlan

Scope = Literal["micro", "sequence", "global"]


def expert_counts(index: Tensor, experts: int, valid_N: Tensor | None = None) -> Tensor:
    """Used slots of valid tokens per expert, (E,) float32; `index` is (N,) or (N, K), EMPTY slots do not count."""
    chosen = (index if valid_N is None else index[valid_N]).flatten().long()
    return torch.bincount(chosen[chosen != EMPTY], minlength=experts).float()


def expert_load(index: Tensor, experts: int, valid_N: Tensor | None = None) -> Tensor:
    """Share of the used slots each expert receives, (E,) float32, sums to 1 (0 where no slot is used)."""
    counts = expert_counts(index, experts, valid_N)
    return counts / counts.sum().clamp_min(1)


def scores_of(plan: RoutePlan) -> Tensor:
    """The plan's differentiable scores, (N, E).

    Raises MoesaicError if it has none: random and fixed routers have nothing to balance.
    """
    if plan.scores is None:
        raise MoesaicError("this plan carries no scores (a random or fixed router): there is no balance loss for it")
    return plan.scores


@dataclass
class LoadBalance:
    """The loss over the plans of all layers.

    scope:       over which tokens f is counted; see the module.
    eta:         weight of each expert, (E,); None = 1.
    scale:       None = E.
    micro_floor: with scope "global", this share of the micro-batch loss is added (2501.11873: 0.01 saves step time).

    "global" keeps counts from `reset()` to `reset()`, so call it after every optimizer step; the counts are summed over
    processes, P stays local. Call the loss on collected plans, outside what gradient checkpointing recomputes.
    """

    scope: Scope = "micro"
    eta: Sequence[float] | None = None
    scale: float | None = None
    micro_floor: float = 0.0
    counts_LE: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise MoesaicError(f"balance scope {self.scope!r}: expected one of {', '.join(get_args(Scope))}")

    def reset(self) -> None:
        """Forget the counts of the optimizer step that is done."""
        self.counts_LE = None

    def __call__(self, plans: Sequence[RoutePlan], valid_N: Tensor, seq_N: Tensor | None = None) -> Tensor:
        """Mean over layers, a scalar. `seq_N` numbers the sequence of each token (scope "sequence")."""
        if not plans:
            raise MoesaicError("a balance loss needs the plans of at least one layer")
        if self.scope == "sequence":
            if seq_N is None:
                raise MoesaicError('balance scope "sequence" needs the sequence number of each token')
            groups = [valid_N & (seq_N == number) for number in seq_N[valid_N].unique()] or [valid_N]
            return torch.stack([self._micro(plans, group) for group in groups]).mean()
        if self.scope == "micro":
            return self._micro(plans, valid_N)
        loss = self._of(self._pooled(plans, valid_N), plans, valid_N)
        return loss + self.micro_floor * self._micro(plans, valid_N) if self.micro_floor else loss

    def _micro(self, plans: Sequence[RoutePlan], valid_N: Tensor) -> Tensor:
        return self._of(_counts(plans, valid_N), plans, valid_N)

    @torch.no_grad()
    def _pooled(self, plans: Sequence[RoutePlan], valid_N: Tensor) -> Tensor:
        counts_LE = _counts(plans, valid_N)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts_LE)
        self.counts_LE = counts_LE if self.counts_LE is None else self.counts_LE + counts_LE
        return self.counts_LE

    def _of(self, counts_LE: Tensor, plans: Sequence[RoutePlan], valid_N: Tensor) -> Tensor:
        share_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp_min(1)
        mean_LE = torch.stack([scores_of(plan)[valid_N].float().sum(0) for plan in plans]) / valid_N.sum().clamp_min(1)
        if self.eta is not None and len(self.eta) != mean_LE.shape[-1]:
            raise MoesaicError(
                f"eta has {len(self.eta)} weights, but the plans choose among {mean_LE.shape[-1]} experts"
            )
        eta = 1.0 if self.eta is None else torch.tensor(list(self.eta), device=mean_LE.device)
        scale = mean_LE.shape[-1] if self.scale is None else self.scale
        return scale * (eta * share_LE * mean_LE).sum(-1).mean()


def _counts(plans: Sequence[RoutePlan], valid_N: Tensor) -> Tensor:
    return torch.stack([expert_counts(plan.index, scores_of(plan).shape[-1], valid_N) for plan in plans])


def load_balancing_loss(logits_NE: Tensor, valid_N: Tensor | None = None) -> Tensor:
    """`LoadBalance()` for a top-1 router's logits; 1 when even."""
    logits_NE = logits_NE.float()
    valid_N = torch.ones(len(logits_NE), dtype=torch.bool, device=logits_NE.device) if valid_N is None else valid_N
    index = logits_NE.argmax(-1, keepdim=True).int()
    return LoadBalance()([RoutePlan(index, torch.ones_like(index, dtype=torch.float32), logits_NE)], valid_N)


def device_balance_loss(plans: Sequence[RoutePlan], groups: Sequence[Sequence[int]], valid_N: Tensor) -> Tensor:
    """Balance of groups of experts, one group a device (DeepSeekMoE, 2401.06066, eq. 15-17); 1 when even.

    sum over groups of (mean of E f_e in the group) * (sum of P_e in the group), mean over layers.
    """
    counts_LE = _counts(plans, valid_N)
    share_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp_min(1) * counts_LE.shape[-1]
    mean_LE = torch.stack([scores_of(plan)[valid_N].float().sum(0) for plan in plans]) / valid_N.sum().clamp_min(1)
    terms = [share_LE[:, list(group)].mean(-1) * mean_LE[:, list(group)].sum(-1) for group in groups]
    return torch.stack(terms).sum(0).mean()
