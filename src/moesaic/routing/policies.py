"""Selection policies: logits in, plan out. A router is a scorer plus one of these.

Shapes: N tokens, E experts, K slots. Weights are float32 and, where they come from scores, carry the gradient.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.routing.contract import EMPTY, RouteInput, RoutePlan

Weighting = Literal["one", "probs", "renorm"]
Scope = Literal["batch", "sequence"]
Score = Literal["sigmoid", "softmax"]
Draw = Literal["layer", "sequence", "token"]


def check_k(k: int, experts: int) -> None:
    """Refuse k outside 1..E."""
    if not 1 <= k <= experts:
        raise MoesaicError(f"k = {k} of {experts} experts: k must be from 1 to the number of experts")


def check_option(name: str, value: str, options: Any) -> None:
    """Refuse a value that the Literal `options` does not list: it would silently mean another one."""
    if value not in get_args(options):
        raise MoesaicError(f"{name} = {value!r}: expected one of {', '.join(get_args(options))}")


@dataclass
class TopK:
    """The k largest logits. `weighting`: "one" (hard choice), "probs" (raw), or "renorm" (over the chosen)."""

    k: int = 1
    weighting: Weighting = "one"

    def __post_init__(self) -> None:
        check_option("weighting", self.weighting, Weighting)

    @property
    def weighs(self) -> bool:
        """Whether weights depend on the logits, which is how the task loss trains them; 1 of 1 is always 1."""
        return self.weighting == "probs" or (self.weighting == "renorm" and self.k > 1)

    def __call__(self, logits_NE: Tensor, inp: RouteInput | None = None) -> RoutePlan:
        logits_NE = logits_NE.float()
        check_k(self.k, logits_NE.shape[-1])
        top, index = logits_NE.topk(self.k, dim=-1)
        if self.weighting == "one":
            weight = torch.ones_like(top)
        elif self.weighting == "renorm":
            weight = top.softmax(-1)
        else:
            weight = logits_NE.softmax(-1).gather(-1, index)
        return RoutePlan(index.int(), weight, logits=logits_NE)


@dataclass
class RankK:
    """Only the expert of rank k, 1 = the best (SCMoE, 2405.14507, eq. 4)."""

    k: int = 2
    weighting: Weighting = "one"

    def __call__(self, logits_NE: Tensor, inp: RouteInput | None = None) -> RoutePlan:
        best = TopK(self.k, "probs" if self.weighting == "probs" else "one")(logits_NE)
        return RoutePlan(best.index[:, -1:], best.weight[:, -1:], logits=best.logits)


@dataclass
class TopP:
    """As many experts as reach probability p, at least one, at most `max_k` (Dynamic MoE, 2403.07652).

    Expert j of the descending order is kept while the sum before it is below p. Weights are raw probabilities.
    """

    p: float = 0.4
    max_k: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise MoesaicError(f"p = {self.p}: the probability to reach must be above 0 and at most 1")

    def __call__(self, logits_NE: Tensor, inp: RouteInput | None = None) -> RoutePlan:
        logits_NE = logits_NE.float()
        experts = logits_NE.shape[-1]
        width = experts if self.max_k is None else min(self.max_k, experts)
        check_k(width, experts)
        ordered, index = logits_NE.softmax(-1).sort(-1, descending=True)
        keep = (ordered.cumsum(-1) - ordered < self.p)[:, :width]
        keep[:, :1] = True  # rounding of the first sum must not leave a token without an expert
        return RoutePlan(index[:, :width].int().masked_fill(~keep, EMPTY), ordered[:, :width] * keep, logits=logits_NE)


@dataclass
class Threshold:
    """Every expert whose sigmoid exceeds a threshold, perhaps none (MoMa's auxiliary routers, 2407.21770, eq. 3)."""

    threshold: float = 0.5

    def __call__(self, logits_NE: Tensor, inp: RouteInput | None = None) -> RoutePlan:
        probs = logits_NE.float().sigmoid()
        return chosen(probs > self.threshold, probs, logits_NE.float())


@dataclass
class ExpertChoice:
    """Each expert takes its best tokens, round(tokens * capacity / E) of them; NOT causal.

    scope:  "batch" (MoMa, 2407.21770, eq. 1) or "sequence" (UoE, 2503.02495): among which tokens an expert chooses.
    score:  "sigmoid" or "softmax"; the score is the weight, unless `weighting` is "one".
    """

    capacity: float = 1.0
    scope: Scope = "batch"
    score: Score = "sigmoid"
    weighting: Literal["probs", "one"] = "probs"

    def __post_init__(self) -> None:
        check_option("scope", self.scope, Scope)
        check_option("score", self.score, Score)
        check_option("weighting", self.weighting, Literal["probs", "one"])

    def __call__(self, logits_NE: Tensor, inp: RouteInput | None = None) -> RoutePlan:
        logits_NE = logits_NE.float()
        probs = logits_NE.sigmoid() if self.score == "sigmoid" else logits_NE.softmax(-1)
        tokens, experts = probs.shape
        valid = torch.ones(tokens, dtype=torch.bool, device=probs.device) if inp is None else inp.valid
        groups = [valid] if self.scope == "batch" or inp is None else [(inp.seq == s) & valid for s in inp.seq.unique()]
        mask = torch.zeros_like(probs, dtype=torch.bool)
        for group in groups:
            rows = group.nonzero().flatten()
            take = min(len(rows), round(len(rows) * self.capacity / experts))
            best = probs[rows].topk(take, dim=0).indices  # (take, E)
            mask[rows[best], torch.arange(experts, device=probs.device)] = True
        plan = chosen(mask, probs, logits_NE)
        if self.weighting == "one":
            plan.weight = mask.float()
        return plan


@dataclass
class Random:
    """One uniformly drawn expert with weight one; the draw is a hash, so it can be made before layer 0.

    draw:   "layer" (one for the whole call: THOR's training), "sequence", or "token".
    The hash takes the seed, `inp.step`, the layer, and as `draw` says `inp.seq` and `inp.pos`: equal inputs give equal
    experts whatever else is in the batch, and a request's routes are known from its number.
    """

    experts: int
    draw: Draw = "token"
    seed: int = 0

    def __post_init__(self) -> None:
        check_option("draw", self.draw, Draw)

    def __call__(self, logits_NE: Tensor, inp: RouteInput) -> RoutePlan:
        seed = self.seed if inp.generator is None else inp.generator.initial_seed()
        key = torch.zeros_like(inp.pos)
        for part in (seed, inp.step, inp.layer):
            key = mix(key + part)
        if self.draw != "layer":
            key = mix(key + inp.seq)
        if self.draw == "token":
            key = mix(key + inp.pos)
        index = (key >> 1).bitwise_and(2**62 - 1).remainder(self.experts)
        return RoutePlan(index[:, None].int(), torch.ones(len(index), 1, device=index.device))


@dataclass
class Fixed:
    """A recorded plan, replayed: slots and weights (N, K) of one layer, or a list of one per layer."""

    plans: list[RoutePlan]

    def __call__(self, logits_NE: Tensor, inp: RouteInput) -> RoutePlan:
        if inp.layer >= len(self.plans):
            raise MoesaicError(f"the recorded plans cover {len(self.plans)} layers, but layer {inp.layer} asks for one")
        plan = self.plans[inp.layer]
        if len(plan.index) != len(inp.ids):
            raise MoesaicError(
                f"the recorded plan of layer {inp.layer} is for {len(plan.index)} tokens, but {len(inp.ids)} are "
                "routed; replay it on the sequence it was recorded from"
            )
        return plan


def fixed(expert_N: Tensor) -> RoutePlan:
    """The plan that sends token n to expert `expert_N[n]` with weight one: oracle routes, replay, user override."""
    return RoutePlan(expert_N.reshape(-1, 1).int(), torch.ones(expert_N.numel(), 1, device=expert_N.device))


def chosen(mask_NE: Tensor, probs_NE: Tensor, logits_NE: Tensor | None = None) -> RoutePlan:
    """The plan that uses exactly the experts under `mask_NE`, weight = probability; slots are the E experts."""
    index = torch.arange(mask_NE.shape[-1], device=mask_NE.device, dtype=torch.int32).expand(mask_NE.shape)
    return RoutePlan(index.masked_fill(~mask_NE, EMPTY), probs_NE * mask_NE, logits=logits_NE, probs=probs_NE)


def mix(key: Tensor) -> Tensor:
    """One round of the splitmix64 hash on int64 (overflow wraps)."""
    key = key + -7046029254386353131
    key = (key ^ _shift(key, 30)) * -4658895280553007687
    key = (key ^ _shift(key, 27)) * -7723592293110705685
    return key ^ _shift(key, 31)


def _shift(key: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)
