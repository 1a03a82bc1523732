"""The routing contract: what a router may read, what it returns, what it remembers, and when its answer is known.

A router is a *scorer* (logits from what it reads) and a *policy* (slots and weights from logits).
Shapes: N tokens in the call (flattened B*S), E experts, K slots per token, D model width, L routed layers.
Layer equation of every method: y = sum_j weight[:, j] * Expert[index[:, j]](x) + sum_shared Expert_s(x).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from moesaic.errors import MoesaicError

EMPTY = -1  # an unused slot of a plan

Phase = Literal["train", "eval", "decode"]


@dataclass(frozen=True)
class Caps:
    """What a router reads and promises; a server reads `precompute`, a trainer reads `trainable`."""

    reads: frozenset[str]  # of {"hidden", "ids", "previous_plan", "modality", "nothing"}
    choice: Literal["token", "expert", "sample"] = "token"  # who chooses: each token, each expert, one for all tokens
    causal: bool = True  # the plan of a token does not depend on later tokens or batch mates
    causal_alternative: str = ""  # what to use in decode instead, when not causal
    trainable: bool = True  # the task loss reaches the scorer's parameters through `weight`
    stochastic_eval: bool = False
    precompute: Literal["exact", "hint", "no"] = "no"  # "exact": all layers' plans are known before layer 0
    any_k: bool = False  # the number of experts may be changed after training


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

    @classmethod
    def of(cls, ids_BS: Tensor, hidden: Tensor | None = None, **fields: object) -> "RouteInput":
        """The input for whole sequences, (B, S) ids and (B, S, D) hidden states."""
        batch, length = ids_BS.shape
        device = ids_BS.device
        seq = torch.arange(batch, device=device).repeat_interleave(length)
        pos = torch.arange(length, device=device).repeat(batch)
        valid = torch.ones(batch * length, dtype=torch.bool, device=device)
        flat = None if hidden is None else hidden.flatten(0, -2)
        return replace(cls(ids_BS.flatten(), seq, pos, valid, flat), **fields)  # type: ignore[arg-type]

    def need_hidden(self) -> Tensor:
        """The hidden states, (N, D).

        Raises MoesaicError if there are none: this router cannot plan before the backbone runs.
        """
        if self.hidden is None:
            raise MoesaicError("this router reads hidden states, but was asked to plan from token ids alone")
        return self.hidden


@dataclass
class RoutePlan:
    """Which experts each token uses, and with what weight. Weights need not sum to one."""

    index: Tensor  # (N, K) int32, EMPTY where a slot is unused
    weight: Tensor  # (N, K) float32, 0 where a slot is unused
    logits: Tensor | None = None  # (N, E) float32
    probs: Tensor | None = None  # (N, E) float32, where they are not the softmax of the logits
    run: Tensor | None = None  # (N,) bool, False = the token skips the whole block
    scope: str = "token"
    aux: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scores(self) -> Tensor | None:
        """(N, E) float32, differentiable: what losses and prefetch orders read."""
        return self.logits.softmax(-1) if self.probs is None and self.logits is not None else self.probs

    @property
    def expert(self) -> Tensor:
        """The first slot, (N,) int64: the whole plan of a top-1 router."""
        return self.index[:, 0].long()

    @property
    def used(self) -> Tensor:
        """(N, K) bool: the slots that hold an expert."""
        return self.index != EMPTY

    def select(self, rows: Tensor) -> "RoutePlan":
        """The plan of some tokens, or of all in another order; `rows` indexes or masks the N tokens."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        tokens = self.index.shape[:1]
        aux = {name: value[rows] if value.shape[:1] == tokens else value for name, value in self.aux.items()}
        return RoutePlan(
            self.index[rows], self.weight[rows], pick(self.logits), pick(self.probs), pick(self.run), self.scope, aux
        )

    def check(self, experts: int) -> "RoutePlan":
        """Return self if the invariants of the contract hold, else raise ValueError naming the broken one."""
        if self.index.shape != self.weight.shape:
            raise ValueError(f"plan: index {tuple(self.index.shape)} and weight {tuple(self.weight.shape)} differ")
        if bool(((self.index < EMPTY) | (self.index >= experts)).any()):
            raise ValueError(f"plan: an index lies outside -1..{experts - 1}")
        if not bool(torch.isfinite(self.weight).all()) or bool((self.weight < 0).any()):
            raise ValueError("plan: weights must be finite and not negative")
        if bool((self.weight.masked_select(~self.used) != 0).any()):
            raise ValueError("plan: an empty slot has a weight")
        ordered = self.index.sort(-1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)).any()):
            raise ValueError("plan: a token uses one expert in two slots")
        return self


@dataclass(frozen=True)
class RouterState:
    """What a router remembers from layer to layer and from step to step; statistics are buffers of the router.

    depth:  (N, ...) from the layer before, follows the tokens, None before the first layer of every forward.
    time:   a transformers Cache across the decode steps of a request.
    """

    depth: Tensor | None = None
    time: object | None = None

    def select(self, rows: Tensor) -> "RouterState":
        """The state of some tokens, or of all in another order."""
        return replace(self, depth=None if self.depth is None else self.depth[rows])


class Scorer(Protocol):
    """Logits from what a router reads. `experts` is E; parameters are per layer, chosen by `inp.layer`."""

    experts: int

    def __call__(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]: ...


class Policy(Protocol):
    """Slots and weights from logits (N, E) float32."""

    def __call__(self, logits_NE: Tensor, inp: RouteInput, /) -> RoutePlan: ...


class Router(nn.Module):
    """A scorer and a policy; the base of every router. Subclasses set `caps` and build the two parts.

    Raises MoesaicError: a non-causal router asked to decode; logits that are not finite; more slots than experts.
    """

    caps: Caps

    def __init__(self, scorer: Scorer, policy: Policy) -> None:
        super().__init__()
        self.scorer = scorer
        self.policy = policy

    @property
    def experts(self) -> int:
        """Number of experts it chooses from."""
        return self.scorer.experts

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        """The plan of layer `inp.layer`, and the state to hand to the next layer."""
        self.check_phase(inp)
        logits, state = self.score(inp, state)
        return self.policy(logits, inp), state

    def score(self, inp: RouteInput, state: RouterState | None = None) -> tuple[Tensor, RouterState]:
        """The scorer's logits, (N, E), finite and fp32 whatever the backbone's dtype, and the state they leave."""
        with torch.autocast(inp.ids.device.type, enabled=False):
            logits, state = self.scorer(inp, state or RouterState())
        return finite(logits.float(), inp.layer), state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """As Module's, but a cast of the model moves a router without rounding it: its arithmetic is fp32."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    def plan_all(self, inp: RouteInput, layers: int) -> list[RoutePlan]:
        """The plans of all layers before layer 0, from ids alone; only where `caps.precompute` is "exact"."""
        if self.caps.precompute != "exact":
            raise MoesaicError(
                f"{type(self).__name__} does not know its plans before the layers run; distil a pre-gate"
            )
        return [self.plan(replace(inp, hidden=None, layer=layer))[0] for layer in range(layers)]

    def check_phase(self, inp: RouteInput) -> None:
        """Refuse to decode where a token's plan would depend on tokens that do not exist yet."""
        if inp.phase == "decode" and not self.caps.causal:
            raise MoesaicError(
                f"{type(self).__name__} chooses by comparing tokens of the sequence or batch, which decoding does not "
                f"have; use {self.caps.causal_alternative}"
            )

    def schedule(self, step: int, steps: int) -> None:
        """Called before optimizer step `step` of `steps`; routers that change over training override it."""

    def losses(self, plans: Sequence[RoutePlan], inp: RouteInput) -> dict[str, Tensor]:
        """Losses that only this router has, unweighted; balance losses live in `moesaic.balance`."""
        return {}


def finite(logits_NE: Tensor, layer: int) -> Tensor:
    """The logits, or a MoesaicError: NaN would be sorted somewhere, and the token sent there without a word."""
    if not bool(torch.isfinite(logits_NE).all()):
        raise MoesaicError(
            f"router logits of layer {layer} are not finite (NaN or infinity); the hidden states or the router's "
            "weights have diverged: lower the learning rate or check the checkpoint"
        )
    return logits_NE
