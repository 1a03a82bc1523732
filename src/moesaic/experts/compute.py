"""How channel blocks are computed. Every path gives each token the same result up to floating-point rounding.

masked            one pass over all stored channels, activations multiplied by the token's mask. Reads each weight once
                  whatever mixture of experts the batch holds: never more work than the dense FFN.
grouped           tokens sorted by expert; each expert computes its own runs only. Less arithmetic, more kernel calls.
packed            as grouped, on a contiguous copy of the expert: one product where runs need several.
masked_prepacked  as masked, on a copy of all stored channels in oneDNN's own order, gate and up in one product.
prepacked         as packed, on copies in oneDNN's order.

`backends.py` chooses between them. Blocks that every expert owns are no case of their own: they are channels of each
expert, so that an expert stays one product.

Shapes: N tokens, W stored channels, D model width, E experts.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.experts.buckets import bucket

if TYPE_CHECKING:
    from moesaic.experts.channel_blocks import ChannelBlocks


class TokenGroups:
    """The expert of each token, (N,) int64, and what the paths need of it, computed once for all layers."""

    def __init__(self, expert_N: Tensor) -> None:
        self.expert_N = expert_N
        self._tiles: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def counts(self) -> list[int]:
        """Tokens per expert, up to the highest expert that occurs."""
        return torch.bincount(self.expert_N).tolist()

    @cached_property
    def used(self) -> list[int]:
        """Experts that have tokens, ascending."""
        if len(self.expert_N) == 1:
            return [int(self.expert_N)]
        return [expert for expert, count in enumerate(self.counts) if count]

    @cached_property
    def order(self) -> Tensor:
        """(N,) token numbers sorted by expert."""
        return self.expert_N.argsort(stable=True)

    def to(self, device: torch.device) -> "TokenGroups":
        """The same on a device. What the host has to know is worked out here, so that nothing waits for the device."""
        if device == self.expert_N.device:
            return self
        there = TokenGroups(self.expert_N.to(device))
        there.__dict__ |= {"counts": self.counts, "used": self.used, "order": self.order.to(device)}
        return there

    def tiles(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sorted tokens in tiles of up to `rows`, one expert each: expert, first and last row (exclusive), int32."""
        if rows not in self._tiles:
            found, start = [], 0
            for expert, count in enumerate(self.counts):
                stop = start + count
                found += [(expert, first, min(first + rows, stop)) for first in range(start, stop, rows)]
                start = stop
            expert_T, start_T, stop_T = torch.tensor(found, dtype=torch.int32).T.contiguous().to(self.expert_N.device)
            self._tiles[rows] = expert_T, start_T, stop_T
        return self._tiles[rows]


Path = Callable[["ChannelBlocks", Tensor, TokenGroups], Tensor]


def whole(blocks: "ChannelBlocks", x_ND: Tensor) -> Tensor:
    """All stored channels, no mask."""
    return blocks.project(blocks.activate(x_ND, blocks.gate, blocks.up, blocks.gate_bias, blocks.up_bias))


def masked(blocks: "ChannelBlocks", x_ND: Tensor, groups: TokenGroups) -> Tensor:
    """One pass over all stored channels under each token's mask."""
    if blocks.layout.is_whole:
        return whole(blocks, x_ND)
    hidden = blocks.activate(x_ND, blocks.gate, blocks.up, blocks.gate_bias, blocks.up_bias)
    return blocks.project(hidden * blocks.mask(hidden.dtype, hidden.device)[groups.expert_N])


def masked_prepacked(blocks: "ChannelBlocks", x_ND: Tensor, groups: TokenGroups) -> Tensor:
    """As masked, from a packed copy of all stored channels."""
    copy = blocks.copy_of(None, packed=True)
    hidden = copy.hidden(x_ND, blocks.activation, blocks.gate is not None)
    if not blocks.layout.is_whole:
        hidden = hidden * blocks.mask(hidden.dtype, hidden.device)[groups.expert_N]
    return blocks.finish(copy.project(hidden))


def _by_expert(x_ND: Tensor, groups: TokenGroups, run: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Apply `run(expert, tokens)` to each expert's tokens and put the results back in token order."""
    if len(groups.used) == 1:
        return run(groups.used[0], x_ND)
    parts = x_ND[groups.order].split([groups.counts[expert] for expert in groups.used])
    result = torch.cat([run(expert, part) for expert, part in zip(groups.used, parts, strict=True)])
    return torch.empty_like(result).index_copy_(0, groups.order, result)


def grouped(blocks: "ChannelBlocks", x_ND: Tensor, groups: TokenGroups) -> Tensor:
    """Each expert's runs, straight from the stored blocks."""

    def run(expert: int, x: Tensor) -> Tensor:
        rows = len(x)
        if x.dtype != torch.float32 and x.device.type == "cpu":  # a kernel is compiled for every number of rows
            x = F.pad(x, (0, 0, 0, bucket(rows) - rows))
        out = torch.zeros_like(x)
        for start, stop in blocks.layout.runs(expert):
            out.addmm_(blocks.activate(x, *blocks.rows(start, stop)), blocks.down[start:stop])
        return out[:rows]

    return blocks.finish(_by_expert(x_ND, groups, run))


def packed(blocks: "ChannelBlocks", x_ND: Tensor, groups: TokenGroups) -> Tensor:
    """Each expert from its contiguous copy, gate and up in one product."""
    return _from_copies(blocks, x_ND, groups, packed=False)


def prepacked(blocks: "ChannelBlocks", x_ND: Tensor, groups: TokenGroups) -> Tensor:
    """Each expert from its copy in oneDNN's order, gate and up in one product."""
    return _from_copies(blocks, x_ND, groups, packed=True)


def _from_copies(blocks: "ChannelBlocks", x_ND: Tensor, groups: TokenGroups, packed: bool) -> Tensor:
    def run(expert: int, x: Tensor) -> Tensor:
        copy = blocks.copy_of(expert, packed)
        return copy.project(copy.hidden(x, blocks.activation, blocks.gate is not None))

    return blocks.finish(_by_expert(x_ND, groups, run))


def grouped_autograd(blocks: "ChannelBlocks", x_ND: Tensor, groups: TokenGroups) -> Tensor:
    """As grouped, for training untied experts: parameters are split once, so each gradient is written once."""
    widths = [block.width for block in blocks.layout.blocks]

    def pieces(parameter: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * len(widths) if parameter is None else parameter.split(widths)

    gate, gate_bias, up_bias = map(pieces, (blocks.gate, blocks.gate_bias, blocks.up_bias))
    up, down = blocks.up.split(widths), blocks.down.split(widths)
    owned = [[i for i, b in enumerate(blocks.layout.blocks) if e in b.owners] for e in range(blocks.layout.experts)]

    def run(expert: int, x: Tensor) -> Tensor:
        parts = [blocks.activate(x, gate[i], up[i], gate_bias[i], up_bias[i]) @ down[i] for i in owned[expert]]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    return blocks.finish(_by_expert(x_ND, groups, run))
