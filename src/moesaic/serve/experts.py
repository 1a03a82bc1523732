"""The experts of one layer as they are served: each token group through its expert's rows, wherever they lie.

An expert is one product over its rows in stored order, whether they are gathered for the step or lie packed since the
expert proved hot. So a token's result depends neither on what else is resident nor on its batch mates; and products
have few shapes, each of which costs the CPU's library a kernel.
Shapes: M tokens of one expert, D model width, W_e channels of an expert.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesaic.experts.channel_blocks import ChannelBlocks, TokenGroups
from moesaic.experts.packed import PackedWeight, steady
from moesaic.schedule.work import Key

Rows = Callable[[str, int], list[Tensor]]  # of gate, up, down or a bias, those of an expert, in one order for all
WHOLE = -1  # in place of an expert: all of a layer's channels
BALANCE = 16  # tokens
HOT = 2  # uses: a copy takes seven products of few tokens, and saves a third of each and the gathering


@dataclass
class Packs:
    """Copies of hot experts in one piece, within `limit` bytes; those unused for longest go first.

    Packed, but in float32: its packed products round otherwise, and tokens must not depend on what is hot.
    """

    limit: int = 0
    taken: int = 0
    _copies: OrderedDict[tuple[int, int], tuple[PackedWeight, ...]] = field(default_factory=OrderedDict)
    _uses: dict[tuple[int, int], int] = field(default_factory=dict)

    def __contains__(self, at: tuple[int, int]) -> bool:
        return at in self._copies

    def get(self, at: tuple[int, int]) -> tuple[PackedWeight, ...] | None:
        """The matrices of (layer, expert) as they were offered, if they lie packed."""
        copy = self._copies.get(at)
        if copy is not None:
            self._copies.move_to_end(at)
        return copy

    def offer(self, at: tuple[int, int], *matrices: Tensor) -> None:
        """The expert is used once more; packed if it is hot and fits beside the others without putting one out."""
        if self.due(at, sum(matrix.numel() * matrix.element_size() for matrix in matrices)):
            self.keep(at, *matrices)

    def due(self, at: tuple[int, int], size: int) -> bool:
        """It is used once more: whether a copy of `size` bytes is to be made. A layer's WHOLE puts out experts."""
        self._uses[at] = self._uses.get(at, 0) + 1
        if self._uses[at] < HOT or size > self.limit:
            return False
        others = [place for place in self._copies if place[1] != WHOLE] if at[1] == WHOLE else []
        while others and self.taken + size > self.limit:
            self.drop([others.pop(0)])
        return self.taken + size <= self.limit

    def keep(self, at: tuple[int, int], *matrices: Tensor) -> None:
        """Copy it."""
        pack = matrices[0].dtype != torch.float32
        self._copies[at] = tuple(PackedWeight(matrix, pack) for matrix in matrices)
        self.taken += sum(matrix.bytes for matrix in self._copies[at])

    def drop(self, places: Iterable[tuple[int, int]]) -> None:
        """Entries of these experts have left the memory."""
        for at in places:
            if (copy := self._copies.pop(at, None)) is not None:
                self.taken -= sum(matrix.bytes for matrix in copy)
                self._uses[at] = 0

    def trim(self, limit: int) -> None:
        """Another limit, from now on."""
        self.limit = limit
        while self.taken > limit:
            self.drop([next(iter(self._copies))])


class BlockExperts:
    """Channel blocks of layer `layer`: y = (act(gate x) * up x) @ down over the expert's rows.

    rows: where these are, of a matrix by its name; None = in the blocks' own.
    """

    def __init__(self, blocks: ChannelBlocks, layer: int, packs: Packs, rows: Rows | None = None) -> None:
        self.blocks, self.layer, self.packs = blocks, layer, packs
        self.own = rows is None
        self._rows = self._own if rows is None else rows

    def together(self, counts: Mapping[int, int]) -> bool:
        """Whether one pass over all stored channels takes less than one expert after another; counts: tokens of each.

        A product takes as long as reading its weights, or from about BALANCE tokens on as its arithmetic.
        """
        if len(counts) == 1:
            return False
        layout = self.blocks.layout
        alone = sum(layout.expert_width(expert) * max(1.0, count / BALANCE) for expert, count in counts.items())
        return layout.width * max(1.0, sum(counts.values()) / BALANCE) < alone

    def run_together(self, x_MD: Tensor, groups: TokenGroups) -> Tensor:
        """(M, D) -> (M, D): all stored channels, each token's mask on them. Every entry of the layer is there."""
        blocks, at = self.blocks, (self.layer, WHOLE)
        if (packed := self.packs.get(at)) is not None:
            biases: list[Tensor] = [bias for bias in (blocks.gate_bias, blocks.up_bias) if bias is not None]
            hidden_MW = self.activate(packed[0](x_MD, torch.cat(biases) if biases else None))
        else:
            parts: list[Tensor] = [part for part in (blocks.gate, blocks.up, blocks.down) if part is not None]
            if self.packs.due(at, sum(part.numel() * part.element_size() for part in parts)):
                self.packs.keep(at, torch.cat(parts[:-1]), blocks.down.T)
            hidden_MW = blocks.activate(x_MD, blocks.gate, blocks.up, blocks.gate_bias, blocks.up_bias)
        hidden_MW *= blocks.mask(hidden_MW.dtype, hidden_MW.device)[groups.expert_N]
        y_MD = hidden_MW @ blocks.down if packed is None else packed[1](hidden_MW)
        return y_MD if blocks.down_bias is None else y_MD.add_(blocks.down_bias)

    def packed(self, expert: int) -> bool:
        """Whether it fills up rows by itself, so that rows more than there are tokens cost nothing."""
        return (self.layer, expert) in self.packs

    def run(self, expert: int, x_MD: Tensor, prompts: int | None = None) -> Tensor:
        """(M, D) -> (M, D). Rows from number `prompts` on are of prompts, which is all the same here."""
        blocks = self.blocks
        bias = self._bias(expert)
        if (packed := self.packs.get((self.layer, expert))) is not None:
            gate_up, down = packed
            y_MD = down(self.activate(gate_up(x_MD, bias)))
        else:
            stacked, down_DW = self._matrices(expert)
            self.packs.offer((self.layer, expert), stacked, down_DW)
            y_MD = steady(self.activate(steady(x_MD, stacked, bias)), down_DW)
        return y_MD if blocks.down_bias is None else y_MD.add_(blocks.down_bias)

    def activate(self, hidden_MW: Tensor) -> Tensor:
        """act(gate) * up of both side by side, or act(up)."""
        if self.blocks.gate is None:
            return self.blocks.activation(hidden_MW)
        gate_MW, up_MW = hidden_MW.chunk(2, dim=-1)
        return self.blocks.activation(gate_MW) * up_MW

    def _matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate over up (2 W_e, D), and down (D, W_e), a view where the expert is a single run."""
        stacked = [self._rows(name, expert) for name in ("gate", "up") if getattr(self.blocks, name) is not None]
        gate_up = torch.cat([row for rows in stacked for row in rows]) if len(stacked) > 1 else _join(stacked[0])
        return gate_up, _join(self._rows("down", expert)).T

    def _bias(self, expert: int) -> Tensor | None:
        names = [name for name in ("gate_bias", "up_bias") if getattr(self.blocks, name) is not None]
        return torch.cat([row for name in names for row in self._rows(name, expert)]) if names else None

    def _own(self, name: str, expert: int) -> list[Tensor]:
        matrix = getattr(self.blocks, name)
        return [matrix[start:stop] for start, stop in self.blocks.layout.runs(expert)]


def _join(rows: list[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def experts_of(entries: dict[tuple[int, int], tuple[Key, ...]]) -> Callable[[Key], list[tuple[int, int]]]:
    """From an entry to the experts (layer, expert) that it is part of."""
    found: dict[Key, list[tuple[int, int]]] = {}
    for at, keys in entries.items():
        for key in keys:
            found.setdefault(key, []).append(at)
    return lambda key: found.get(key, [])
