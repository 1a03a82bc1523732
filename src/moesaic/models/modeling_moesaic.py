"""A refactored causal LM: any HF decoder whose FFN channels are chosen, per token, by a pre-gate over token ids."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from moesaic.configuration import MoesaicConfig
from moesaic.errors import MoesaicError
from moesaic.experts.channel_blocks import BlockLayout, ChannelBlocks, TokenGroups
from moesaic.models.ffn_sites import FFNSite, build_blocks, replace_ffn
from moesaic.models.routes import RoutedFFN, expand
from moesaic.models.wrapper import WrappedCausalLM
from moesaic.routing.contract import RoutePlan
from moesaic.routing.policies import fixed
from moesaic.routing.pregate import PreGate, PreGateConfig


@dataclass
class MoesaicOutput(CausalLMOutputWithPast):
    """The backbone's output plus the routes it ran under.

    expert_index:   (B, S) int64, the expert of each token.
    router_logits:  (B, S, E) float32, None when the routes were given by the caller.
    """

    expert_index: Tensor | None = None
    router_logits: Tensor | None = None


class MoesaicForCausalLM(WrappedCausalLM):
    """`backbone` with its FFNs replaced by channel blocks, `pregate` in front of it.

    The plan is a function of token ids alone and is computed once, before layer 0. It carries no gate weight, so the
    language-model loss gives the pre-gate no gradient: it is trained by distillation (`refactor.pregate`).
    """

    config_class = MoesaicConfig
    _keep_in_fp32_modules_strict = {"pregate"}  # routes must not depend on the dtype the backbone is loaded in

    def __init__(self, config: MoesaicConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        dense = backbone if backbone is not None else AutoModelForCausalLM.from_config(config.base_config)
        self.backbone = dense  # before the router, which is always fp32: a model's dtype is that of its first parameter
        for raw_site, raw_layout in zip(config.sites, config.layouts, strict=True):
            site, layout = FFNSite.from_dict(raw_site), BlockLayout.from_list(raw_layout)
            replace_ffn(dense, site, RoutedFFN(build_blocks(dense, site, layout), self.current))
        self.pregate = PreGate(PreGateConfig(**config.pregate)) if config.pregate else None
        self.ready()

    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config.base_config, "initializer_range", 0.02)
        if isinstance(module, ChannelBlocks):
            for name, parameter in module.named_parameters(recurse=False):
                nn.init.zeros_(parameter) if "bias" in name else nn.init.normal_(parameter, std=std)
        else:
            super()._init_weights(module)

    # -- the routed model ---------------------------------------------------------------------------------------
    def ffns(self) -> list[ChannelBlocks]:
        """The channel blocks of every decoder layer, in order."""
        return [module for module in self.backbone.modules() if isinstance(module, ChannelBlocks)]

    @torch.no_grad()
    def plan(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> RoutePlan:
        """The plan of all layers for `input_ids` (B, S); N = B * S tokens. Runs no layer of the backbone.

        Raises MoesaicError if the model has no pre-gate yet.
        """
        if self.pregate is None:
            raise MoesaicError("this model has no pre-gate yet: run the `pregate` stage, or pass expert_index=")
        return self.pregate.plan(input_ids, attention_mask, position_ids, past_key_values, self.config.router_slot)

    def _checked_cache(self, cache: Cache | None, use_cache: bool) -> Cache | None:
        if cache is None:
            return DynamicCache(config=self.config.get_text_config(decoder=True)) if use_cache else None
        grows = getattr(cache, "layer_class_to_replicate", None) is not None
        needed = self.config.router_slot + (self.pregate.config.layers if self.pregate else 0)
        if not grows and len(cache.layers) < needed:
            raise MoesaicError(
                f"the cache has {len(cache.layers)} layers, but {needed} are needed: the pre-gate keeps its own keys "
                "after the backbone's. Build it with config=model.config.get_text_config(decoder=True), or let "
                "generate() build it."
            )
        return cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        expert_index: Tensor | int | None = None,
        padding_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoesaicOutput | tuple[Any, ...]:
        """As the backbone's forward, plus the following.

        expert_index:   overrides the pre-gate: one id for all, one per sequence (B,), or one per token (B, S).
        padding_mask:   the 2-D mask, where `attention_mask` is already expanded (static caches in generate()).

        Raises MoesaicError when only `inputs_embeds` is given: the pre-gate reads token ids.
        """
        input_ids, padding_mask, position_ids = self.tokens(
            input_ids, inputs_embeds, attention_mask, padding_mask, position_ids
        )
        batch, length = input_ids.shape
        if use_cache is None:
            use_cache = bool(getattr(self.config.base_config, "use_cache", True)) and not self.training
        cache = self._checked_cache(past_key_values, use_cache)
        if expert_index is not None:
            plan = fixed(expand(expert_index, batch, length, input_ids.device))
        else:
            plan = self.plan(input_ids, padding_mask, position_ids, cache)
        if position_ids is not None and self._backbone_takes_positions:
            kwargs["position_ids"] = position_ids
        with self.current.use(TokenGroups(plan.expert)):
            out = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                labels=labels,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
        logits = None if plan.logits is None else plan.logits.view(batch, length, -1)
        result = MoesaicOutput(**out, expert_index=plan.expert.view(batch, length), router_logits=logits)
        return result if return_dict is not False else result.to_tuple()


AutoModelForCausalLM.register(MoesaicConfig, MoesaicForCausalLM, exist_ok=True)
