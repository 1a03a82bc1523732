"""Which experts own which stored channels: pure index arithmetic, no weights.

A channel's signature is the set of experts that own it. Channels of equal signature form one block; a channel that no
expert owns is dropped. Blocks are ordered so that each expert's channels fall into few contiguous runs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import MoesaicError


@dataclass(frozen=True)
class Block:
    """Stored channels `start` to `stop` (exclusive), all owned by exactly `owners`."""

    start: int
    stop: int
    owners: tuple[int, ...]

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.stop - self.start


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of one FFN, contiguous from 0."""

    experts: int
    source_width: int
    blocks: tuple[Block, ...]

    @cached_property
    def width(self) -> int:
        """Stored channels W."""
        return self.blocks[-1].stop if self.blocks else 0

    @cached_property
    def shared(self) -> int:
        """Channels that every expert owns (the permanent expert of Read-ME)."""
        return sum(block.width for block in self.blocks if len(block.owners) == self.experts)

    @cached_property
    def is_whole(self) -> bool:
        """Every stored channel belongs to every expert, so no route changes anything."""
        return self.shared == self.width

    def blocks_of(self, expert: int) -> list[Block]:
        """The blocks of one expert, in stored order."""
        return [block for block in self.blocks if expert in block.owners]

    @cached_property
    def _runs(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        result = []
        for expert in range(self.experts):
            runs: list[tuple[int, int]] = []
            for block in self.blocks_of(expert):
                if runs and runs[-1][1] == block.start:
                    runs[-1] = (runs[-1][0], block.stop)
                else:
                    runs.append((block.start, block.stop))
            result.append(tuple(runs))
        return tuple(result)

    def runs(self, expert: int) -> tuple[tuple[int, int], ...]:
        """The expert's channels as maximal contiguous (start, stop) runs."""
        return self._runs[expert]

    def expert_width(self, expert: int) -> int:
        """Channels of one expert."""
        return self._widths[expert]

    @cached_property
    def widest(self) -> int:
        """Channels of the largest expert."""
        return max(self._widths)

    @cached_property
    def _widths(self) -> tuple[int, ...]:
        return tuple(sum(block.width for block in self.blocks_of(expert)) for expert in range(self.experts))

    def union_width(self, experts: Iterable[int]) -> int:
        """Channels owned by at least one of `experts`."""
        wanted = set(experts)
        return sum(block.width for block in self.blocks if wanted.intersection(block.owners))

    @cached_property
    def shape(self) -> str:
        """Sizes, roughly: stored and mean expert width to about a fifth, runs of an expert to a factor of two."""
        widths, runs = ([f(e) for e in range(self.experts)] for f in (self.expert_width, lambda e: len(self.runs(e))))
        stored, mean = (2 ** (round(4 * math.log2(max(1, width))) / 4) for width in (self.width, fmean(widths)))
        return f"W{stored:.0f} w{mean:.0f} E{self.experts} r{2 ** round(math.log2(max(1, fmean(runs))))}"

    def mask(self) -> Tensor:
        """(E, W) bool: which expert owns which stored channel."""
        mask = torch.zeros(self.experts, self.width, dtype=torch.bool, device="cpu")
        for block in self.blocks:
            mask[list(block.owners), block.start : block.stop] = True
        return mask

    def to_list(self) -> list[Any]:
        """Compact JSON: [experts, source_width, [[width, [owners]], ...]]."""
        return [self.experts, self.source_width, [[block.width, list(block.owners)] for block in self.blocks]]

    @classmethod
    def from_list(cls, raw: Sequence[Any]) -> "BlockLayout":
        """Inverse of `to_list`."""
        experts, source_width, rows = raw
        return cls(experts, source_width, _blocks((width, tuple(owners)) for width, owners in rows))


def _blocks(sizes: Iterable[tuple[int, tuple[int, ...]]]) -> tuple[Block, ...]:
    blocks, start = [], 0
    for width, owners in sizes:
        blocks.append(Block(start, start + width, owners))
        start += width
    return tuple(blocks)


def layout_from_masks(mask_EW: Tensor, untied: bool = False) -> tuple[BlockLayout, Tensor]:
    """The layout of an FFN whose experts own the channels of `mask_EW` (E, W_source) bool, and the channel order.

    Returns (layout, order): stored channel i is source channel `order[i]`. `untied` stores a copy for every owner, as
    one singleton block per expert; then `order` repeats channels.

    Raises MoesaicError if an expert owns nothing.
    """
    mask_EW = mask_EW.bool().cpu()
    experts, source_width = mask_EW.shape
    if empty := [expert for expert in range(experts) if not bool(mask_EW[expert].any())]:
        raise MoesaicError(f"expert {empty[0]} owns no channel; raise keep")
    if untied:
        owned = [mask_EW[expert].nonzero()[:, 0] for expert in range(experts)]
        blocks = _blocks((len(channels), (expert,)) for expert, channels in enumerate(owned))
        return BlockLayout(experts, source_width, blocks), torch.cat(owned)
    # A signature as an integer: bit e is set when expert e owns the channel.
    codes = (mask_EW.long() << torch.arange(experts)[:, None]).sum(0)
    present = [code for code in codes.unique().tolist() if code]
    ordered = few_runs_order(present)
    groups = [(codes == code).nonzero()[:, 0] for code in ordered]
    owners = [tuple(e for e in range(experts) if code >> e & 1) for code in ordered]
    blocks = _blocks((len(group), owner) for group, owner in zip(groups, owners, strict=True))
    return BlockLayout(experts, source_width, blocks), torch.cat(groups)


def few_runs_order(codes: Sequence[int], passes: int = 4) -> list[int]:
    """Order signatures so that the experts' channels fall into few runs in total.

    An expert starts a run wherever its bit turns on between neighbours, so the number of runs is half the length of a
    tour through the signatures under Hamming distance that starts and ends at the empty set: a travelling-salesman
    problem, solved by nearest neighbour and 2-opt.
    """
    rest, tour = sorted(codes), [0]
    while rest:
        nearest = min(rest, key=lambda code: ((code ^ tour[-1]).bit_count(), code))
        rest.remove(nearest)
        tour.append(nearest)
    tour.append(0)
    for _ in range(passes):
        improved = False
        for i in range(1, len(tour) - 2):
            before = (tour[i - 1] ^ tour[i]).bit_count()
            for j in range(i + 1, len(tour) - 1):
                gain = before + (tour[j] ^ tour[j + 1]).bit_count()
                gain -= (tour[i - 1] ^ tour[j]).bit_count() + (tour[i] ^ tour[j + 1]).bit_count()
                if gain > 0:
                    tour[i : j + 1] = tour[i : j + 1][::-1]
                    before = (tour[i - 1] ^ tour[i]).bit_count()
                    improved = True
        if not improved:
            break
    return tour[1:-1]
