"""Copies of experts' weights in the form a backend computes fastest from: derived, bounded, never saved.

They follow the weights: whatever changes a parameter of their owner makes them void. Neither deepcopy nor a checkpoint
carries them.
"""

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.experts.packed import PackedWeight

LEAST_LIMIT = 64 * 2**20  # bytes of copies a layer may always take, however small its own weights are


class Stacked:
    """An FFN in one piece: gate above up (2W, D) or up alone, their bias, and down (D, W); packed or plain."""

    @torch.no_grad()
    def __init__(self, gate_up: Tensor, bias: Tensor | None, down: Tensor, packed: bool) -> None:
        self.tensors = None if packed else (gate_up, bias, down)
        self._first: Callable[[Tensor], Tensor]
        self._last: Callable[[Tensor], Tensor]
        if packed:
            self._first, self._last = partial(PackedWeight(gate_up), bias=bias), PackedWeight(down)
        else:
            self._first, self._last = partial(F.linear, weight=gate_up, bias=bias), partial(F.linear, weight=down)

    def hidden(self, x_ND: Tensor, activation: Callable[[Tensor], Tensor], gated: bool) -> Tensor:
        """act(gate x) * up x, or act(up x); (N, W)."""
        hidden = self._first(x_ND)
        if not gated:
            return activation(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return activation(gate) * up

    def project(self, hidden_NW: Tensor) -> Tensor:
        """(N, W) -> (N, D)."""
        return self._last(hidden_NW)


Wanted = Iterable[tuple[Hashable, int]]
"""(key, bytes) of each copy."""


class Copies:
    """The copies of one module's parameters.

    limit:  bytes they may take together; None = any number; "own" = as many as the parameters, or LEAST_LIMIT if more.
    """

    def __init__(self, limit: int | Literal["own"] | None = "own") -> None:
        self.limit = limit
        self.bytes = 0
        self._held: dict[Hashable, Stacked] = {}
        self._version: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Let all go."""
        self._held, self.bytes = {}, 0

    def hold(self, owner: nn.Module, keys: Iterable[Hashable]) -> bool:
        """Whether all of these are there."""
        self._follow(owner)
        return all(key in self._held for key in keys)

    def fits(self, owner: nn.Module, wanted: Wanted) -> bool:
        """Whether those that are not there yet find room beside the others."""
        self._follow(owner)
        missing = sum(size for key, size in wanted if key not in self._held)
        if not missing:
            return True
        limit = self.limit_for(owner)
        return limit is None or self.bytes + missing <= limit

    def limit_for(self, owner: nn.Module) -> int | None:
        """The limit in bytes; None = any number."""
        return max(own_bytes(owner), LEAST_LIMIT) if self.limit == "own" else self.limit

    def get(self, owner: nn.Module, key: Hashable, size: int, build: Callable[[], Stacked]) -> Stacked:
        """The copy of `owner`'s parameters under `key`, built when it is missing. Who asks has asked `fits`."""
        self._follow(owner)
        if key not in self._held:
            self._held[key] = build()
            self.bytes += size
        return self._held[key]

    def _follow(self, owner: nn.Module) -> None:
        """Void all if a parameter is another, or has other values, than when they were made."""
        # Inference tensors carry no version; they cannot be trained in place under grad mode either.
        version = tuple(
            None if p is None else (p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version)
            for p in owner._parameters.values()
        )
        if version != self._version:
            self.clear()
            self._version = version

    def __reduce__(self) -> tuple[Any, ...]:
        return Copies, (self.limit,)


def own_bytes(owner: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in owner.parameters())
