"""The experts of one layer as they are served: each token group through its expert's rows, wherever they lie.

An expert is a fixed list of pieces, maximal runs of its rows, summed in one order: so a token's result depends neither
on what else is resident nor on its batch mates.
Shapes: M tokens of one expert, D model width, W stored channels.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moesaic.experts.channel_blocks import ChannelBlocks
from moesaic.experts.packed import PackedWeight, steady


class LayerExperts(Protocol):
    """What runs the experts of a layer."""

    def run(self, expert: int, x_MD: Tensor) -> Tensor:
        """(M, D) -> (M, D): the expert's output for its tokens."""
        ...


class BlockExperts:
    """Channel blocks: y = sum over the expert's runs of (act(gate x) * up x) @ down, rows of `ExpertMemory`."""

    def __init__(self, blocks: ChannelBlocks) -> None:
        self.blocks = blocks
        layout = blocks.layout
        self._runs = [layout.runs(expert) for expert in range(layout.experts)]

    def run(self, expert: int, x_MD: Tensor) -> Tensor:
        """(M, D) -> (M, D)."""
        y_MD: Tensor | None = None
        for start, stop in self._runs[expert]:
            gate, up, gate_bias, up_bias = self.blocks.rows(start, stop)
            hidden = steady(x_MD, up, up_bias)
            if gate is None:
                hidden = self.blocks.activation(hidden)
            else:
                hidden = self.blocks.activation(steady(x_MD, gate, gate_bias)).mul_(hidden)
            part = steady(hidden, self.blocks.down[start:stop].T)
            y_MD = part if y_MD is None else y_MD.add_(part)
        assert y_MD is not None
        return y_MD if self.blocks.down_bias is None else y_MD.add_(self.blocks.down_bias)


class StockExperts:
    """A stock mixture's experts: matrices of their own, y = down (act(gate x) * up x), each (out, in)."""

    def __init__(
        self, matrices: Sequence[tuple[Tensor, Tensor, Tensor]], activation: Callable[[Tensor], Tensor]
    ) -> None:
        self.matrices, self.activation = matrices, activation

    def run(self, expert: int, x_MD: Tensor) -> Tensor:
        """(M, D) -> (M, D), not yet weighted."""
        gate, up, down = self.matrices[expert]
        return steady(self.activation(steady(x_MD, gate)).mul_(steady(x_MD, up)), down)


class PackedExpert:
    """One expert's gate and up in one packed matrix, and its down: what a hot expert is run from."""

    def __init__(self, gate: Tensor | None, up: Tensor, down: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        self.gate_up = PackedWeight(up if gate is None else torch.cat([gate, up]))
        self.down = PackedWeight(down)
        self.gated, self.activation = gate is not None, activation

    def __call__(self, x_MD: Tensor) -> Tensor:
        hidden = self.gate_up(x_MD)
        if not self.gated:
            return self.down(self.activation(hidden))
        gate, up = hidden.chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))
