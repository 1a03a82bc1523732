"""The routing contract: what a router may read, what it returns, and when its answer is known.

Shapes: N tokens in the call (flattened B*S), E experts, K slots per token, D model width.
Layer equation of every method: y = sum_j weight[:, j] * Expert[index[:, j]](x) + sum_shared Expert_s(x).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

EMPTY = -1  # an unused slot of a plan

Phase = Literal["train", "eval", "decode"]


@dataclass(frozen=True)
class Caps:
    """What a router reads and promises; a server reads `precompute`, a trainer reads `trainable`."""

    reads: frozenset[str]  # of {"hidden", "ids", "previous_plan", "modality", "nothing"}
    causal: bool = True  # the plan of a token does not depend on later tokens or batch mates
    trainable: bool = True  # the task loss reaches the router's parameters through `weight`
    stochastic_eval: bool = False
    precompute: Literal["exact", "hint", "no"] = "no"  # "exact": all layers' plans are known before layer 0


@dataclass
class RouteInput:
    """Everything a router may look at. `hidden=None` means: work from ids alone."""

    ids: Tensor  # (N,) token ids
    seq: Tensor  # (N,) sequence number
    pos: Tensor  # (N,) position inside the sequence
    valid: Tensor  # (N,) bool, False at padding
    hidden: Tensor | None = None  # (N, D)
    modality: Tensor | None = None  # (N,)
    conditions: Tensor | None = None  # (N, C) sample-, step- or network-level conditions
    layer: int = 0
    step: int = 0
    phase: Phase = "eval"
    generator: torch.Generator | None = None


@dataclass
class RoutePlan:
    """Which experts each token uses, and with what weight. Weights need not sum to one."""

    index: Tensor  # (N, K) int32, EMPTY where a slot is unused
    weight: Tensor  # (N, K) float32, 0 where a slot is unused
    logits: Tensor | None = None  # (N, E) float32
    run: Tensor | None = None  # (N,) bool, False = the token skips the whole block
    scope: str = "token"
    aux: dict[str, Tensor] = field(default_factory=dict)

    @property
    def probs(self) -> Tensor | None:
        """Softmax of the logits, (N, E) float32."""
        return None if self.logits is None else self.logits.softmax(-1)

    @property
    def expert(self) -> Tensor:
        """The first slot, (N,) int64: the whole plan of a top-1 router."""
        return self.index[:, 0].long()

    def check(self, experts: int) -> "RoutePlan":
        """Return self if the invariants of the contract hold, else raise ValueError naming the broken one."""
        used = self.index != EMPTY
        if self.index.shape != self.weight.shape:
            raise ValueError(f"plan: index {tuple(self.index.shape)} and weight {tuple(self.weight.shape)} differ")
        if bool(((self.index < EMPTY) | (self.index >= experts)).any()):
            raise ValueError(f"plan: an index lies outside -1..{experts - 1}")
        if not bool(torch.isfinite(self.weight).all()) or bool((self.weight < 0).any()):
            raise ValueError("plan: weights must be finite and not negative")
        if bool((self.weight.masked_select(~used) != 0).any()):
            raise ValueError("plan: an empty slot has a weight")
        ordered = self.index.sort(-1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)).any()):
            raise ValueError("plan: a token uses one expert in two slots")
        return self
