"""How what one forward knows reaches its layers, also when they are recomputed for the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from moesaic.experts.channel_blocks import ChannelBlocks, TokenGroups

T = TypeVar("T")


class Current(Generic[T]):
    """What belongs to the call in progress; None outside of calls."""

    def __init__(self) -> None:
        self.value: T | None = None

    @contextmanager
    def use(self, value: T | None) -> Iterator[None]:
        """Make `value` current inside the block; what was current before is restored."""
        before, self.value = self.value, value
        try:
            yield
        finally:
            self.value = before

    def checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a gradient-checkpointing function so that a layer is recomputed under what its own forward had.

        Backward runs after the forward has restored what was before, and maybe after another forward.
        """

        def checkpointed(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            value = self.value

            def replay(*inputs: Any) -> Any:
                with self.use(value):
                    return layer(*inputs)

            return function(replay, *args, **kwargs)

        return checkpointed


class RoutedFFN(nn.Module):
    """Stands where the dense FFN stood; runs its channel blocks under the current routes."""

    def __init__(self, blocks: ChannelBlocks, routes: Current[TokenGroups]) -> None:
        super().__init__()
        self.blocks = blocks
        self.routes = routes

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, S, D) or (N, D) -> same shape."""
        return self.blocks(hidden, self.routes.value)


@torch.no_grad()
def expand(expert_index: Tensor | int, batch: int, length: int, device: torch.device) -> Tensor:
    """An expert id, one per sequence (B,), or one per token (B, S) -> (N,) int64."""
    index = torch.as_tensor(expert_index, device=device)
    if index.ndim == 1:
        index = index[:, None]
    return index.expand(batch, length).reshape(-1).long()
