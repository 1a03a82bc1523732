"""One FFN whose channels are shared out among experts, each kept channel stored once.

y = down^T (act(gate x) * up x * mask[expert]) + down_bias, the plain form without gate: down^T (act(up x) * mask).
Shapes: N tokens, D model width, W stored channels, E experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.experts import backends, compute
from moesaic.experts.compute import TokenGroups
from moesaic.experts.copies import Copies, Stacked
from moesaic.experts.layout import Block, BlockLayout, layout_from_masks

__all__ = ["Block", "BlockLayout", "ChannelBlocks", "FFNWeights", "TokenGroups", "layout_from_masks"]


@dataclass(frozen=True)
class FFNWeights:
    """A dense FFN, oriented like nn.Linear weights: gate, up (W, D), down (D, W), biases (W,), (W,), (D,)."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


class ChannelBlocks(nn.Module):
    """The weights of one refactored FFN in block order.

    gate, up, down:  (W, D) each, one row a channel, so that a block is a contiguous run of rows in all three. `down` is
                     therefore the transpose of the dense down projection. `gate` is None for plain FFNs.
    """

    gate: nn.Parameter | None
    gate_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        layout: BlockLayout,
        hidden: int,
        activation: Callable[[Tensor], Tensor],
        *,
        gated: bool = True,
        up_bias: bool = False,
        down_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.activation = activation
        self.dropout = dropout
        self.untied: bool = sum(block.width for block in layout.blocks) > layout.source_width

        def rows(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape)) if wanted else None

        self.up = nn.Parameter(torch.empty(layout.width, hidden))
        self.down = nn.Parameter(torch.empty(layout.width, hidden))
        self.register_parameter("gate", rows(gated, layout.width, hidden))
        self.register_parameter("gate_bias", rows(gated and up_bias, layout.width))
        self.register_parameter("up_bias", rows(up_bias, layout.width))
        self.register_parameter("down_bias", rows(down_bias, hidden))
        self._masks: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._owned: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.copies = Copies()

    @torch.no_grad()
    def load_dense(self, weights: FFNWeights, order: Tensor) -> None:
        """Fill from a dense FFN; stored channel i is its channel `order[i]`."""
        order = order.to(weights.up.device)
        self.up.copy_(weights.up[order])
        self.down.copy_(weights.down.T[order])
        for name in ("gate", "gate_bias", "up_bias"):
            if (target := getattr(self, name)) is not None:
                target.copy_(getattr(weights, name)[order])
        if self.down_bias is not None and weights.down_bias is not None:
            self.down_bias.copy_(weights.down_bias)

    @property
    def channel_bytes(self) -> int:
        """Stored bytes of one channel."""
        rows = self.up.shape[1] * (2 if self.gate is None else 3)
        return (rows + sum(b is not None for b in (self.gate_bias, self.up_bias))) * self.up.element_size()

    @property
    def expert_bytes(self) -> int:
        """Stored bytes of the largest expert."""
        return self.layout.widest * self.channel_bytes

    def bytes(self, experts: Iterable[int] | None = None) -> int:
        """Bytes of the union of these experts' blocks (all when None); the down bias counts always."""
        width = self.layout.width if experts is None else self.layout.union_width(experts)
        bias = 0 if self.down_bias is None else self.down_bias.numel() * self.down_bias.element_size()
        return width * self.channel_bytes + bias

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(E, W) ones and zeros."""
        key = (dtype, device)
        if key not in self._masks:
            self._masks[key] = self.layout.mask().to(device=device, dtype=dtype)
        return self._masks[key]

    def owned(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The experts' stored channels one after another, and (E + 1,) where each expert's begin; int32."""
        if device not in self._owned:
            layout = self.layout
            runs = [
                torch.arange(start, stop) for expert in range(layout.experts) for start, stop in layout.runs(expert)
            ]
            begins = torch.tensor([0, *map(layout.expert_width, range(layout.experts))]).cumsum(0)
            self._owned[device] = torch.cat(runs).to(device, torch.int32), begins.to(device, torch.int32)
        return self._owned[device]

    def rows(self, start: int, stop: int) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """gate, up and their biases for stored channels `start` to `stop`, views."""
        gate = None if self.gate is None else self.gate[start:stop]
        gate_bias = None if self.gate_bias is None else self.gate_bias[start:stop]
        up_bias = None if self.up_bias is None else self.up_bias[start:stop]
        return gate, self.up[start:stop], gate_bias, up_bias

    def activate(
        self, x: Tensor, gate: Tensor | None, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None
    ) -> Tensor:
        """act(gate x) * up x, or act(up x) where there is no gate."""
        if gate is None:
            return self.activation(F.linear(x, up, up_bias))
        return self.activation(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)

    def project(self, hidden_NW: Tensor) -> Tensor:
        """(N, W) -> (N, D) through all stored channels."""
        return self.finish(hidden_NW @ self.down)

    def finish(self, y_ND: Tensor) -> Tensor:
        """Add the down bias and apply the FFN's own dropout."""
        if self.down_bias is not None:
            y_ND = y_ND + self.down_bias
        return F.dropout(y_ND, self.dropout, self.training) if self.dropout else y_ND

    def copy_of(self, expert: int | None, packed: bool = False) -> Stacked:
        """An expert, or all stored channels (None), in one piece; kept until a weight changes."""
        return self.copies.get(self, (expert, packed), self.copy_bytes(expert), partial(self._copy, expert, packed))

    @torch.no_grad()
    def _copy(self, expert: int | None, packed: bool) -> Stacked:
        runs = [(0, self.layout.width)] if expert is None else self.layout.runs(expert)

        def gather(parameter: Tensor) -> Tensor:
            return torch.cat([parameter[start:stop] for start, stop in runs])

        stacked = [gather(p) for p in (self.gate, self.up) if p is not None]
        biases = [gather(p) for p in (self.gate_bias, self.up_bias) if p is not None]
        bias = torch.cat(biases) if biases else None
        return Stacked(torch.cat(stacked), bias, gather(self.down).T.contiguous(), packed)

    def copy_bytes(self, expert: int | None) -> int:
        """What a copy of an expert, or of all stored channels (None), takes."""
        return self.channel_bytes * (self.layout.width if expert is None else self.layout.expert_width(expert))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ChannelBlocks":
        # Another dtype or device: new storage may lie where old storage lay, which no version tells.
        self.copies.clear()
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, object]:
        # Masks are derived: neither deepcopy nor a checkpoint should carry them. Copies see to themselves.
        return {**super().__getstate__(), "_masks": {}, "_owned": {}}

    def forward(self, x: Tensor, groups: TokenGroups | Tensor | None = None) -> Tensor:
        """(..., D) -> (..., D). `groups`: the expert of each of the N tokens; None = every stored channel is on."""
        x_ND = x.reshape(-1, x.shape[-1])
        if groups is None:
            return compute.whole(self, x_ND).view(x.shape)
        if isinstance(groups, Tensor):
            groups = TokenGroups(groups)
        return backends.choose(self, groups)(self, x_ND, groups).view(x.shape)
