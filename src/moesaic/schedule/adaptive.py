"""Tutel's adaptive degree r of a layer (2206.03382, section 3.1 and Table 4): by formula, or by measured table.

W devices, E experts, R = ceil(W / E) devices an expert, each of which stores 1 / R of it.
    r = 0       every device gathers all experts, no all-to-all             O(P)
    1 <= r < R  tokens are sent r times, 1 / r of an expert is gathered     O(C r + P / (E r))
    r = R       tokens are sent R times, each device computes its slice     O(C R)
All r share one layout of weights and inputs, so r may change at every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moesaic.errors import MoesaicError


@dataclass(frozen=True)
class Layer:
    """`tokens` a device, `experts` of (d, ffn) with `matrices` matrices, on `devices` devices."""

    devices: int
    experts: int
    tokens: int
    d: int
    ffn: int
    matrices: int = 2

    def __post_init__(self) -> None:
        if min(self.devices, self.experts, self.tokens, self.d, self.ffn, self.matrices) < 1:
            raise MoesaicError(f"{self}: every field must be at least 1")

    @property
    def owners(self) -> int:
        """R, the devices that share an expert."""
        return -(-self.devices // self.experts)


def valid_degrees(owners: int) -> list[int]:
    """0 and the divisors of R."""
    return [0, *(r for r in range(1, owners + 1) if owners % r == 0)]


def moved(layer: Layer, factor: float, r: int) -> float:
    """Numbers a device moves at capacity factor `factor`: dispatch and return of its slots r times, gathered weights.

    MoesaicError for an r that is neither 0 nor a divisor of R.
    """
    if r not in valid_degrees(layer.owners):
        raise MoesaicError(f"r = {r} is not among {valid_degrees(layer.owners)}: 0 and the divisors of R")
    expert = layer.matrices * layer.d * layer.ffn
    if r == 0:
        return float(layer.experts * expert)
    gathered = expert / r if r < layer.owners else 0.0
    return 2 * factor * layer.tokens * layer.d * r + gathered


def best_degree(layer: Layer, factor: float) -> int:
    """The r that moves least; at a tie the smaller positive one, which computes in fewer pieces."""
    return min(valid_degrees(layer.owners), key=lambda r: (moved(layer, factor, r), r or layer.owners + 1))


class Choice(NamedTuple):
    """r, overlap degree d, all-to-all variant."""

    r: int
    chunks: int
    kind: str


@dataclass
class AdaptiveTable:
    """Measured choices by capacity // bucket (2206.03382, section 3.3: the key is floor(capacity / 128)).

    measure: (capacity, choice) -> seconds, run once for every choice when a bucket is seen first. Every divisor of R is
    tried: the paper's ternary search needs a cost convex in r, and the list is short.
    """

    owners: int
    measure: Callable[[int, Choice], float]
    chunks: Sequence[int] = (1, 2, 4, 8)
    kinds: Sequence[str] = ("flat", "2dh")
    bucket: int = 128
    known: dict[int, Choice] = field(default_factory=dict)

    def lookup(self, capacity: int) -> Choice:
        """The best choice for a capacity (slots of an expert); measures at the first one of its bucket."""
        if capacity < 0:
            raise MoesaicError(f"a capacity is at least 0, not {capacity}")
        key = capacity // self.bucket
        if key not in self.known:
            tried = [Choice(r, d, kind) for r in valid_degrees(self.owners) for d in self.chunks for kind in self.kinds]
            self.known[key] = min(tried, key=lambda choice: self.measure(capacity, choice))
        return self.known[key]
