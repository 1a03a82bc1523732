"""Banks of FFN experts, and how a plan is carried out: sort token-slots by expert, run each expert once, combine.

Shapes: N tokens, K slots, D model width, H expert width, E experts, P used token-slots (pairs).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.experts import bank_backends
from moesaic.experts.copies import Copies, Stacked
from moesaic.routing.contract import RoutePlan

Activation = Callable[[Tensor], Tensor]


def dispatch(x_ND: Tensor, plan: RoutePlan, run: Callable[[int, Tensor], Tensor], experts: int) -> Tensor:
    """sum_j weight[:, j] * run(index[:, j], x), (N, D); other slots add nothing.

    `run(expert, rows)` gets all tokens of one expert at once, in token order.
    """
    return dispatch_sorted(x_ND, plan, lambda rows, counts: bank_backends.by_expert(rows, counts, run), experts)


def dispatch_sorted(x_ND: Tensor, plan: RoutePlan, run: Callable[[Tensor, list[int]], Tensor], experts: int) -> Tensor:
    """As dispatch, with all experts in one call: `run(rows, counts)` gets (P, D) sorted by expert, P > 0."""
    tokens, slots = plan.index.shape
    wanted = (plan.index >= 0) & (plan.index < experts)
    index = plan.index.masked_fill(~wanted, experts).flatten()  # unwanted slots sort to the end
    order = index.argsort(stable=True)
    counts = torch.bincount(index, minlength=experts + 1)[:experts].tolist()
    order = order[: sum(counts)]
    if not len(order):
        return torch.zeros_like(x_ND)
    out_PD = run(x_ND[order // slots], counts)
    weight_P = plan.weight.flatten()[order].to(out_PD.dtype)
    # Back in (token, slot) order each token's outputs lie together: one small product sums them, in a fixed order.
    out = out_PD.new_zeros(tokens * slots, out_PD.shape[-1]).index_copy(0, order, out_PD * weight_P[:, None])
    return out.view(tokens, slots, -1).sum(1)


class FFNBank(nn.Module):
    """E FFNs of one shape, stacked: down_e (act(gate_e x) * up_e x), or down_e act(up_e x) without a gate.

    gate_up:    (E, 2H, D) gate above up; (E, H, D) without a gate.
    down:       (E, D, H)
    gate_up_bias, down_bias:  (E, 2H or H) and (E, D), or None.
    """

    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None
    kind = "ffn"

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: Activation = F.silu,
        *,
        gated: bool = True,
        up_bias: bool = False,
        down_bias: bool = False,
    ) -> None:
        super().__init__()
        if min(experts, width, hidden) < 1:
            raise MoesaicError(f"a bank of {experts} experts, {width} -> {hidden} -> {width}: all must be at least 1")
        self.experts, self.width, self.hidden = experts, width, hidden
        self.activation, self.gated = activation, gated
        rows = hidden * (2 if gated else 1)
        self.gate_up = nn.Parameter(torch.empty(experts, rows, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.register_parameter("gate_up_bias", nn.Parameter(torch.zeros(experts, rows)) if up_bias else None)
        self.register_parameter("down_bias", nn.Parameter(torch.zeros(experts, width)) if down_bias else None)
        self.copies = Copies()
        self.reset()

    def reset(self, std: float = 0.02) -> None:
        """Normal weights, zero biases."""
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=std)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def run(self, expert: int, x_ND: Tensor) -> Tensor:
        """One expert on its tokens."""
        bias, down_bias = self.gate_up_bias, self.down_bias
        hidden = F.linear(x_ND, self.gate_up[expert], None if bias is None else bias[expert])
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = self.activation(gate) * up
        else:
            hidden = self.activation(hidden)
        return F.linear(hidden, self.down[expert], None if down_bias is None else down_bias[expert])

    def forward(self, x_ND: Tensor, plan: RoutePlan) -> Tensor:
        def run(rows_PD: Tensor, counts: list[int]) -> Tensor:
            return bank_backends.choose(self, counts)(self, rows_PD, counts)

        return dispatch_sorted(x_ND, plan, run, self.experts)

    def copy_of(self, expert: int) -> Stacked:
        """An expert in oneDNN's order; kept until a weight changes."""
        return self.copies.get(self, expert, self.expert_bytes[expert], partial(self._copy, expert))

    def _copy(self, expert: int) -> Stacked:
        bias = None if self.gate_up_bias is None else self.gate_up_bias[expert].detach()
        return Stacked(self.gate_up[expert].detach(), bias, self.down[expert].detach(), packed=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FFNBank":
        self.copies.clear()  # new storage may lie where old storage lay, which no version tells
        super()._apply(fn, recurse)
        return self

    @property
    def expert_bytes(self) -> list[int]:
        """Stored bytes of each expert."""
        return [sum(p[0].numel() * p.element_size() for p in self.parameters())] * self.experts

    @property
    def flops_per_token(self) -> list[int]:
        """Multiply-adds of each expert for one token, times two."""
        return [2 * (self.gate_up[0].numel() + self.down[0].numel())] * self.experts


class ModuleBank(nn.Module):
    """Experts of different shapes, each any module (N, D) -> (N, D): big and small, compressed, adapters."""

    kind = "module"

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)
        self.experts = len(modules)

    def run(self, expert: int, x_ND: Tensor) -> Tensor:
        """One expert on its tokens."""
        result: Tensor = self.members[expert](x_ND)
        return result

    def forward(self, x_ND: Tensor, plan: RoutePlan) -> Tensor:
        return dispatch(x_ND, plan, self.run, self.experts)

    @property
    def expert_bytes(self) -> list[int]:
        """Stored bytes of each expert."""
        return [sum(p.numel() * p.element_size() for p in member.parameters()) for member in self.members]

    @property
    def flops_per_token(self) -> list[int]:
        """Multiply-adds of each expert for one token, times two."""
        return [2 * sum(p.numel() for p in member.parameters() if p.ndim > 1) for member in self.members]


class FFN(nn.Module):
    """One FFN as a module: a bank of one."""

    def __init__(self, width: int, hidden: int, activation: Activation = F.silu, **options: Any) -> None:
        super().__init__()
        self.bank = FFNBank(1, width, hidden, activation, **options)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.bank.run(0, x_ND)
