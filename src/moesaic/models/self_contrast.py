"""SCMoE: decode from the contrast of two routings of one model, one of them deliberately weak (2405.14507).

The strong and the weak pass run as one forward of twice the batch: rows 0..B-1 are routed strongly, rows B..2B-1
weakly, in every layer and at every position, so each half fills its own part of one KV cache. Works for
`RoutedForCausalLM` and for transformers' mixtures whose gate is softmax and top-k; shared experts run in both halves.
Shapes: B sequences, S tokens, N = B*S tokens of one half, E experts, K slots, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from moesaic.errors import MoesaicError
from moesaic.models.routed import RoutedForCausalLM
from moesaic.routing.contract import EMPTY, Policy, RouteInput, RoutePlan
from moesaic.routing.policies import ExpertChoice, RankK, TopK, TopP, Weighting
from moesaic.routing.pregate import positions

PER_ROW = ("input_ids", "attention_mask", "padding_mask", "position_ids", "token_type_ids")  # what a forward gets


def contrast(strong_V: Tensor, weak_V: Tensor, beta: float, alpha: float) -> Tensor:
    """(1 + beta) strong - beta weak where strong >= log(alpha) + its maximum, else -inf (eq. 5-6); float32 logits.

    Any leading shape. beta = 0 is the strong model restricted to tokens at least alpha times as likely as the best.
    """
    strong_V, weak_V = strong_V.float(), weak_V.float()
    floor = strong_V.amax(-1, keepdim=True) + math.log(alpha)
    return ((1 + beta) * strong_V - beta * weak_V).masked_fill(strong_V < floor, -torch.inf)


@dataclass(frozen=True)
class SelfContrast:
    """`model.generate(ids, custom_generate=SelfContrast())`: greedy or, with do_sample, sampled from the contrast.

    strong, weak:  "rank:2", "top:3", ..., weighted as the model's own router weighs (so rank:k of a router with raw
                   probabilities keeps its small weight), or a policy, taken as it is; strong=None is the model's own.
    beta:   strength of the contrast, at least 0. Tune it on held-out data (`tune_beta`): a wrong one loses to greedy.
    alpha:  in (0, 1]: tokens less likely than alpha times the best one are never chosen.

    Everything else is `generate`'s: end of sequence, stopping, processors (they see contrasted logits), left padding.
    Only a streamer gets nothing: transformers 5.23 hands none to a decoding loop that is not its own.
    Raises MoesaicError for values out of range, and when used: for dense models, routers that are not causal or rank
    nothing, ranks above the number of experts, beam search, and a cache that already holds tokens.
    """

    weak: Policy | str = "rank:2"
    strong: Policy | str | None = None
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not self.beta >= 0:
            raise MoesaicError(f"beta = {self.beta}: the strength of the contrast must be at least 0")
        if not 0 < self.alpha <= 1:
            raise MoesaicError(f"alpha = {self.alpha}: the share of the best token's probability must be in (0, 1]")
        for policy in (self.strong, self.weak):
            if isinstance(policy, ExpertChoice):
                raise MoesaicError("expert choice looks at later tokens, which decoding does not have; use rank:2")
            if isinstance(policy, str):
                parse_policy(policy, "renorm")

    def __call__(self, model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Any:
        """transformers' decoding loop under the contrast; called by `generate` with (B, S) ids."""
        config, cache = kwargs["generation_config"], kwargs.get("past_key_values")
        if config.num_beams > 1:
            raise MoesaicError(f"num_beams = {config.num_beams}: self-contrast decodes greedily or samples; use 1")
        if cache is not None and cache.get_seq_length():
            raise MoesaicError("the cache already holds tokens of a single pass; self-contrast needs an empty one")
        with ExitStack() as stack:
            stack.enter_context(two_passes(model, self.strong, self.weak))
            stack.callback(model.register_forward_hook(self._contrast_output).remove)
            return GenerationMixin._sample(model, input_ids, **kwargs)

    def _contrast_output(self, model: nn.Module, args: Any, out: Any) -> Any:
        strong, weak = out.logits.chunk(2)
        out.logits = contrast(strong, weak, self.beta, self.alpha)
        return out

    def logits(self, model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Contrasted logits of given sequences, (B, S, V) float32."""
        return contrast(*joint_logits(model, ids_BS, mask_BS, self.strong, self.weak), self.beta, self.alpha)


@torch.no_grad()
def joint_logits(
    model: PreTrainedModel,
    ids_BS: Tensor,
    mask_BS: Tensor | None = None,
    strong: Policy | str | None = None,
    weak: Policy | str = "rank:2",
) -> tuple[Tensor, Tensor]:
    """Logits of the strong and of the weak pass over given sequences, (B, S, V) each, in one forward."""
    with two_passes(model, strong, weak):
        out = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False, return_dict=True)
    first, second = out.logits.chunk(2)
    return first, second


@dataclass(frozen=True)
class BetaChoice:
    """What `tune_beta` found: the best beta, and the held-out accuracy of each."""

    beta: float
    accuracy: dict[float, float]


def tune_beta(
    model: PreTrainedModel,
    dev_set: Iterable[tuple[Tensor, Tensor]],
    betas: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    *,
    weak: Policy | str = "rank:2",
    strong: Policy | str | None = None,
    alpha: float = 0.1,
) -> BetaChoice:
    """The beta with the most correct next tokens on held-out data; of equals, the smallest.

    dev_set:  batches of ids and labels, (B, S) each, labels as in transformers (-100 where a token does not count);
              never the data that is reported on: the best beta of a test set is no result.

    Raises MoesaicError if there are no betas or no labelled tokens.
    """
    decoders = {beta: SelfContrast(weak, strong, beta, alpha) for beta in sorted(betas)}
    right, total = dict.fromkeys(decoders, 0), 0
    for ids_BS, labels_BS in dev_set:
        first, second = joint_logits(model, ids_BS, None, strong, weak)
        target = labels_BS[:, 1:].to(first.device)
        counts = target != -100
        total += int(counts.sum())
        for beta in decoders:
            best = contrast(first[:, :-1], second[:, :-1], beta, alpha).argmax(-1)
            right[beta] += int(((best == target) & counts).sum())
    if not decoders or not total:
        raise MoesaicError(
            f"{len(decoders)} betas and {total} labelled tokens: at least one of each is needed to choose"
        )
    accuracy = {beta: count / total for beta, count in right.items()}
    return BetaChoice(max(accuracy, key=lambda beta: accuracy[beta]), accuracy)


def parse_policy(text: str, weighting: Weighting) -> RankK | TopK:
    """Text "rank:K" or "top:K", weighted like a router of that weighting; raises MoesaicError for anything else."""
    kind, _, number = text.partition(":")
    if kind not in ("rank", "top") or not number.isdecimal() or int(number) < 1:
        raise MoesaicError(f"{text!r} is no routing: expected rank:K or top:K with K from 1, such as rank:2")
    if kind == "top":
        return TopK(int(number), weighting)
    return RankK(int(number), "probs" if weighting == "probs" else "one")


@dataclass
class PerRow:
    """The strong policy for the first half of the tokens, the weak one for the rest."""

    strong: Policy
    weak: Policy

    def __call__(self, logits_NE: Tensor, inp: RouteInput) -> RoutePlan:
        half = len(logits_NE) // 2
        first, second = rows_of(inp, slice(0, half)), rows_of(inp, slice(half, None))
        second.seq = second.seq - second.seq.amin()  # so that a draw is that of a pass of its own
        return join(self.strong(logits_NE[:half], first), self.weak(logits_NE[half:], second), logits_NE)


def rows_of(inp: RouteInput, rows: slice) -> RouteInput:
    """What routers may read of some of the tokens."""
    part = replace(inp)
    for name in ("ids", "seq", "pos", "valid", "hidden", "modality", "conditions"):
        tensor = getattr(inp, name)
        setattr(part, name, None if tensor is None else tensor[rows])
    return part


def join(first: RoutePlan, second: RoutePlan, logits_NE: Tensor) -> RoutePlan:
    """Both halves' plans as one; the one with fewer slots gets empty ones."""
    slots = max(first.index.shape[1], second.index.shape[1])

    def pad(tensor: Tensor, value: float) -> Tensor:
        return nn.functional.pad(tensor, (0, slots - tensor.shape[1]), value=value)

    index = torch.cat([pad(first.index, EMPTY), pad(second.index, EMPTY)])
    return RoutePlan(index, torch.cat([pad(first.weight, 0.0), pad(second.weight, 0.0)]), logits=logits_NE.float())


@contextmanager
def two_passes(model: PreTrainedModel, strong: Policy | str | None, weak: Policy | str) -> Iterator[None]:
    """Inside, a forward of B rows runs 2B: the given ones routed strongly, then the same routed weakly.

    Raises MoesaicError if the model has no router that ranks experts for each token on its own.
    """
    with ExitStack() as stack:
        twice = Twice()
        stack.callback(model.register_forward_pre_hook(twice, with_kwargs=True).remove)
        if isinstance(model, RoutedForCausalLM):
            policy = model.router.policy
            stack.callback(setattr, model.router, "policy", policy)
            model.router.policy = routed_policy(model, strong, weak)
        else:
            for layer, gate in enumerate(find_gates(model)):
                check_ranks((strong, weak), int(gate.num_experts))  # type: ignore[arg-type]
                stack.callback(gate.register_forward_hook(TwoPlans(layer, twice, strong, weak)).remove)
        yield


def routed_policy(model: RoutedForCausalLM, strong: Policy | str | None, weak: Policy | str) -> PerRow:
    """Both policies for a model of ours, or a MoesaicError saying why its router cannot be contrasted."""
    router = model.router
    name, own = type(router).__name__, router.policy
    if not router.caps.causal:
        raise MoesaicError(
            f"{name} chooses by comparing tokens, which decoding cannot; use {router.caps.causal_alternative}"
        )
    if not isinstance(own, TopK | TopP):
        raise MoesaicError(
            f"{name} does not rank experts for each token (policy {type(own).__name__}); use a top-k router"
        )
    check_ranks((strong, weak), router.experts)
    return PerRow(*policies(own, strong, weak, own.weighting if isinstance(own, TopK) else "probs"))


def policies(
    own: Policy, strong: Policy | str | None, weak: Policy | str, weighting: Weighting
) -> tuple[Policy, Policy]:
    """Both as policies: None is the model's own, text is weighted as the model weighs."""
    as_policy = partial(parse_policy, weighting=weighting)
    first = own if strong is None else as_policy(strong) if isinstance(strong, str) else strong
    return first, as_policy(weak) if isinstance(weak, str) else weak


def check_ranks(specs: Sequence[Policy | str | None], experts: int) -> None:
    """Refuse ranks that no expert has."""
    for spec in specs:
        k = getattr(parse_policy(spec, "renorm") if isinstance(spec, str) else spec, "k", None)
        if k is not None and not 1 <= k <= experts:
            raise MoesaicError(f"rank {k} of {experts} experts: self-contrast needs a rank from 1 to {experts}")


class Twice:
    """Forward pre-hook: every row twice. Remembers what the two halves' routers may read."""

    inp: RouteInput

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        ids, cache, mask = kwargs.get("input_ids"), kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if args or ids is None or kwargs.get("inputs_embeds") is not None:
            raise MoesaicError("self-contrast needs token ids: pass input_ids, by name, and no inputs_embeds")
        past = 0 if cache is None else int(cache.get_seq_length())
        twice = {name: double(value, len(ids)) for name, value in kwargs.items() if name in PER_ROW}
        self.inp = RouteInput.of(twice["input_ids"])
        flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.inp.pos = positions(ids, flat, past).expand(ids.shape).repeat(2, 1).flatten()
        return args, {**kwargs, **twice}


def double(value: Any, rows: int) -> Any:
    """Twice the rows of a tensor, or of each of a dict's; what is shared by all rows stays."""
    if isinstance(value, dict):
        return {name: double(part, rows) for name, part in value.items()}
    return torch.cat([value, value]) if isinstance(value, Tensor) and len(value) == rows else value


@dataclass
class TwoPlans:
    """Forward hook of a transformers gate, whose output is (logits, weights, experts): replaces both halves' choice."""

    layer: int
    twice: Twice
    strong: Policy | str | None
    weak: Policy | str
    weighting: Weighting | None = None

    def __call__(self, gate: nn.Module, args: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if self.weighting is None:
            self.weighting = weighting_of(gate, out)
        logits_NE, weight_NK, index_NK = out

        def own(logits: Tensor, inp: RouteInput) -> RoutePlan:
            return RoutePlan(index_NK[: len(logits)].int(), weight_NK[: len(logits)].float())

        policy = PerRow(*policies(own, self.strong, self.weak, self.weighting))
        plan = policy(logits_NE, replace(self.twice.inp, layer=self.layer))
        # An index of -1 would corrupt the output without a word. Weight 0 on a used expert loads no further one.
        used = plan.index.amax(1, keepdim=True).clamp_min(0)
        index = torch.where(plan.used, plan.index, used)
        return logits_NE, plan.weight.to(weight_NK.dtype), index.to(index_NK.dtype)


def find_gates(model: nn.Module) -> list[nn.Module]:
    """The routers of a transformers mixture, in order; raises MoesaicError if there are none."""
    gates = []
    for block in model.modules():
        gate = getattr(block, "gate", None) or getattr(block, "router", None)
        if hasattr(block, "experts") and isinstance(gate, nn.Module) and hasattr(gate, "num_experts"):
            gates.append(gate)
    if not gates:
        raise MoesaicError(
            f"{type(model).__name__} has no router over a pool of experts known here (is it dense, or has it one "
            "route for all layers?); self-contrast needs a mixture: Mixtral, Qwen-MoE, OLMoE or one of attach_router"
        )
    return gates


def weighting_of(gate: nn.Module, out: Sequence[Tensor]) -> Weighting:
    """How a gate weighs its choice, found out from what it did: the k best logits, "renorm" or "probs".

    Raises MoesaicError if it is neither: then the logits are not the ranking, and rank k would be a guess.
    """
    if isinstance(out, tuple) and len(out) == 3:
        logits_NE, weight_NK, index_NK = out
        k, tolerance = index_NK.shape[1], 1e-4 if weight_NK.dtype == torch.float32 else 2e-2
        chosen, best = logits_NE.gather(1, index_NK), logits_NE.topk(k).values
        weight = weight_NK.float().sort(-1, descending=True).values
        weightings: tuple[Weighting, ...] = ("renorm", "probs")
        for weighting in weightings:
            expected = TopK(k, weighting)(logits_NE).weight
            ranked = torch.equal(chosen.sort(-1, descending=True).values, best)
            if ranked and torch.allclose(weight, expected, atol=tolerance, rtol=tolerance):
                return weighting
    raise MoesaicError(
        f"{type(gate).__name__} is not softmax and top-k (grouped, corrected by a bias, sigmoid or scaled): its logits "
        "do not rank the experts, so self-contrast cannot tell which one is the k-th"
    )
