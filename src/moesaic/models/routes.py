"""How one plan reaches every FFN: computed once outside the layers, held here while the backbone runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.experts.channel_blocks import ChannelBlocks, TokenGroups


class Routes:
    """The tokens of the call in progress, grouped by expert; None = all channels on."""

    def __init__(self) -> None:
        self.groups: TokenGroups | None = None

    @contextmanager
    def use(self, groups: TokenGroups | None) -> Iterator[None]:
        """Make `groups` current inside the block; what was current before is restored."""
        before, self.groups = self.groups, groups
        try:
            yield
        finally:
            self.groups = before

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a gradient-checkpointing function so that a layer is recomputed under the routes of its own forward.

        Backward runs after the forward has restored the previous routes, and maybe after another forward.
        """

        def checkpointed(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            groups = self.groups

            def replay(*inputs: Any) -> Any:
                with self.use(groups):
                    return layer(*inputs)

            return function(replay, *args, **kwargs)

        return checkpointed


class RoutedFFN(nn.Module):
    """Stands where the dense FFN stood; runs its channel blocks under the current routes."""

    def __init__(self, blocks: ChannelBlocks, routes: Routes) -> None:
        super().__init__()
        self.blocks = blocks
        self.routes = routes

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, S, D) or (N, D) -> same shape."""
        return self.blocks(hidden, self.routes.groups)


@torch.no_grad()
def expand(expert_index: Tensor | int, batch: int, length: int, device: torch.device) -> Tensor:
    """An expert id, one per sequence (B,), or one per token (B, S) -> (N,) int64."""
    index = torch.as_tensor(expert_index, device=device)
    if index.ndim == 1:
        index = index[:, None]
    return index.expand(batch, length).reshape(-1).long()
