"""One pre-gate that predicts another router's plans: all layers' experts from token ids alone, before layer 0.

Read-ME's pre-gate (2410.19123, section 3) gives one answer for every layer; here its head has one answer per layer or
per group of layers, so that it can imitate a trained layer-wise router (`analyze.pregate_distillation`).
Shapes: B batch, S new tokens, N = B * S, L routed layers, G groups of layers, E experts, K slots.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.routing.contract import Caps, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.policies import TopK, Weighting
from moesaic.routing.pregate import KeyValueCache, PreGate, PreGateConfig

EMBEDDING_STD = 0.2


class PredictedScorer(nn.Module):
    """Logits of all layers in one pass of the trunk; they wait for their layer in the depth state, (N, G, E).

    first_slot:  first layer of a transformers Cache where the trunk keeps its keys, which must be beyond the
                 backbone's; None = it keeps none, and cannot decode.
    """

    def __init__(self, pregate: PreGate, layers: int, groups: int, first_slot: int | None) -> None:
        super().__init__()
        self.pregate, self.layers, self.groups, self.first_slot = pregate, layers, groups, first_slot
        self.experts = pregate.config.experts // groups

    def group(self, layer: int) -> int:
        """The group of a layer: contiguous, as even as possible."""
        if not 0 <= layer < self.layers:
            raise MoesaicError(f"this pre-gate predicts {self.layers} layers, but layer {layer} asks for a plan")
        return layer * self.groups // self.layers

    def all_layers(self, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """Logits of whole sequences, (B, S, L, E) float32."""
        logits_BSGE = self.pregate(ids_BS, mask_BS).unflatten(-1, (self.groups, self.experts))
        return logits_BSGE[:, :, [self.group(layer) for layer in range(self.layers)]]

    def forward(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]:
        group = self.group(inp.layer)
        depth_NGE = self._read(inp, state.time) if state.depth is None else state.depth
        return depth_NGE[:, group], replace(state, depth=depth_NGE)

    def _read(self, inp: RouteInput, time: Any) -> Tensor:
        """(N, G, E) from the ids of the call, and from the keys kept in `time` when it continues a text."""
        lengths = torch.bincount(inp.seq)
        if bool((lengths != lengths[0]).any()):
            raise MoesaicError("a pre-gate reads whole sequences of one length; pad them, and mark padding in `valid`")
        ids_BS, pos_BS, valid_BS = (t.view(len(lengths), -1) for t in (inp.ids, inp.pos, inp.valid))
        cache = time if self.first_slot is not None and _has_room(time, self.first_slot, self.pregate) else None
        slot = self.first_slot or 0
        past = 0 if cache is None else int(cache.get_seq_length(slot))
        if inp.phase == "decode" and not past:
            raise MoesaicError(
                "decoding with a pre-gate needs the keys of the text so far: build the router with first_slot = the "
                "backbone's number of layers and pass past_key_values=DynamicCache(), or use use_cache=False"
            )
        mask_BT = valid_BS
        if past:  # how much left padding lies in the cache follows from the first new token's position
            padding_B1 = past - pos_BS[:, :1]
            old_BT = torch.arange(past, device=ids_BS.device) >= padding_B1
            mask_BT = torch.cat((old_BT, valid_BS), 1)
        logits = self.pregate(ids_BS, mask_BT, pos_BS, cache, slot)
        return logits.view(len(inp.ids), self.groups, self.experts)


def _has_room(time: Any, slot: int, pregate: PreGate) -> bool:
    """Whether the cache has, or grows, the layers the trunk wants; one built from a backbone's config has not."""
    grows = getattr(time, "layer_class_to_replicate", None) is not None
    return time is not None and (grows or len(time.layers) >= slot + pregate.config.layers)


class PredictedPlanRouter(Router):
    """Top-k of predicted logits, per layer; a drop-in for the router it imitates.

    groups:      heads of the trunk, each for a contiguous group of layers; None = one per layer.
    weighting:   as in `TopK`; the sum of a token's weights is multiplied by `mass[layer]`, a buffer (L,) of ones, for
                 teachers whose weights do not sum to one.
    trunk:       sizes of the trunk, see `PreGateConfig` (width, mlp_width, heads, layers).
    """

    caps = Caps(reads=frozenset({"ids"}), precompute="exact")
    mass: Tensor
    scorer: PredictedScorer

    def __init__(
        self,
        vocab_size: int,
        experts: int,
        layers: int,
        *,
        k: int = 2,
        weighting: Weighting = "renorm",
        groups: int | None = None,
        first_slot: int | None = None,
        trunk: dict[str, int] | None = None,
    ) -> None:
        groups = layers if groups is None else groups
        if not 1 <= groups <= layers:
            raise MoesaicError(f"{groups} groups of {layers} layers: expected from 1 to the number of layers")
        config = PreGateConfig(vocab_size=vocab_size, experts=experts * groups, **(trunk or {}))
        policy, pregate = TopK(k, weighting), PreGate(config)
        # A token's row is updated only where the token occurs: rows as large as nn.Embedding's would hardly turn.
        nn.init.normal_(pregate.embedding.weight, std=EMBEDDING_STD)
        super().__init__(PredictedScorer(pregate, layers, groups, first_slot), policy)
        self.register_buffer("mass", torch.ones(layers))
        self.caps = replace(type(self).caps, trainable=policy.weighs)

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        plan, state = super().plan(inp, state)
        plan.weight = plan.weight * self.mass[inp.layer]
        return plan, state

    def plan_all(self, inp: RouteInput, layers: int, cache: KeyValueCache | None = None) -> list[RoutePlan]:
        """The plans of all layers, one pass of the trunk; `cache` keeps its keys when the text goes on."""
        state, plans = RouterState(time=cache), []
        for layer in range(layers):
            plan, state = self.plan(replace(inp, hidden=None, layer=layer), state)
            plans.append(plan)
        return plans
