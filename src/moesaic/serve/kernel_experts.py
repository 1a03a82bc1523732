"""The experts of one layer on a GPU: the Triton kernels read channels where they lie in the slab; nothing is gathered.

Shapes: M tokens, D model width.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from moesaic.experts import triton_blocks
from moesaic.experts.channel_blocks import ChannelBlocks, TokenGroups
from moesaic.experts.triton_blocks import Stored


def usable(blocks: ChannelBlocks, device: torch.device) -> bool:
    """Whether the kernels can compute these blocks there."""
    return triton_blocks.runs_on(device) and triton_blocks.refusal(blocks) is None


class KernelExperts:
    """As `BlockExperts`. at: where each stored channel lies on the device."""

    def __init__(self, blocks: ChannelBlocks, at: Stored) -> None:
        self.blocks, self.at = blocks, at

    def together(self, counts: Mapping[int, int]) -> bool:
        """One launch serves all experts."""
        return True

    def run_together(self, x_MD: Tensor, groups: TokenGroups) -> Tensor:
        """(M, D) -> (M, D). Every channel of the groups' experts is there."""
        return triton_blocks.kernel_for(len(x_MD))(self.blocks, x_MD, groups, self.at)

    def packed(self, expert: int) -> bool:
        """Nothing is: no rows are filled up on a device."""
        return False

    def run(self, expert: int, x_MD: Tensor, prompts: int | None = None) -> Tensor:
        """(M, D) -> (M, D) by one expert."""
        return self.run_together(x_MD, _of_one(expert, len(x_MD), x_MD.device))


@lru_cache(maxsize=1024)  # every layer asks for the same
def _of_one(expert: int, tokens: int, device: torch.device) -> TokenGroups:
    return TokenGroups(torch.full((tokens,), expert)).to(device)
