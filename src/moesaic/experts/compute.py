"""How channel blocks are computed. Every path gives each token the same result up to floating-point rounding.

masked    one pass over all stored channels, activations multiplied by the token's mask. Reads each weight once
          whatever mixture of experts the batch holds: never more work than the dense FFN.
grouped   tokens sorted by expert; each expert computes its own runs only. Less arithmetic, more kernel calls.
packed    as grouped, on a contiguous copy of the expert. For small experts, where kernel calls cost more than bytes.

On a GPU with triton, inference takes the kernels of `triton_blocks.py` instead.

Shapes: N tokens, W stored channels, D model width, E experts.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.experts import triton_blocks

if TYPE_CHECKING:
    from moesaic.experts.channel_blocks import ChannelBlocks

# Measured on two CPU cores, six experts of half the channels: below this many tokens an expert, one masked pass over
# the union is faster than sorting. Small experts need more tokens before their products outweigh the kernel calls.
GROUP_TOKENS, SMALL_GROUP_TOKENS = 48, 128
# An expert up to this size is computed from a contiguous copy: one fused product instead of several small ones, about a
# tenth faster. Larger ones are not worth the memory.
COPY_LIMIT = 8 * 2**20  # bytes


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


def choose(blocks: "ChannelBlocks", groups: TokenGroups) -> Path:
    """The path for these tokens: correctness never depends on it, only time does."""
    if torch.is_grad_enabled():
        return grouped_autograd if blocks.untied else masked
    if triton_blocks.suits(blocks):
        few = len(groups.expert_N) <= triton_blocks.DECODE_TOKENS
        return triton_blocks.masked_decode if few else triton_blocks.grouped_prefill
    used, small = groups.used, blocks.expert_bytes <= COPY_LIMIT
    worth_sorting = len(groups.expert_N) >= (SMALL_GROUP_TOKENS if small else GROUP_TOKENS) * len(used)
    if len(used) > 1 and not worth_sorting and not blocks.untied:
        return masked
    return packed if small else grouped


def whole(blocks: "ChannelBlocks", x_ND: Tensor) -> Tensor:
    """All stored channels, no mask."""
    return blocks.project(blocks.activate(x_ND, blocks.gate, blocks.up, blocks.gate_bias, blocks.up_bias))


def masked(blocks: "ChannelBlocks", x_ND: Tensor, groups: TokenGroups) -> Tensor:
    """One pass over all stored channels under each token's mask."""
    hidden = blocks.activate(x_ND, blocks.gate, blocks.up, blocks.gate_bias, blocks.up_bias)
    return blocks.project(hidden * blocks.mask(hidden.dtype, hidden.device)[groups.expert_N])


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
        out = torch.zeros_like(x)
        for start, stop in blocks.layout.runs(expert):
            out.addmm_(blocks.activate(x, *blocks.rows(start, stop)), blocks.down[start:stop])
        return out

    return blocks.finish(_by_expert(x_ND, groups, run))


def packed(blocks: "ChannelBlocks", x_ND: Tensor, groups: TokenGroups) -> Tensor:
    """Each expert from its contiguous copy, gate and up in one product."""

    def run(expert: int, x: Tensor) -> Tensor:
        gate_up, bias, down = blocks.copy_of(expert)
        hidden = F.linear(x, gate_up, bias)
        if blocks.gate is None:
            return F.linear(blocks.activation(hidden), down)
        gate, up = hidden.chunk(2, dim=-1)
        return F.linear(blocks.activation(gate) * up, down)

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
