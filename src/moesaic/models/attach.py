"""Turn a dense model and a list of channel masks into a refactored model, in memory."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.configuration import MoesaicConfig
from moesaic.errors import MoesaicError
from moesaic.experts.channel_blocks import layout_from_masks
from moesaic.models.ffn_sites import find_ffn_sites, get_ffn_weights
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.routing.pregate import PreGateConfig


@torch.no_grad()
def attach(
    dense: PreTrainedModel,
    masks: Sequence[Tensor],
    expert_names: Sequence[str],
    *,
    untied: bool = False,
    pregate: PreGateConfig | None = None,
) -> MoesaicForCausalLM:
    """Refactor a copy of `dense`; the given model is left untouched.

    masks:          one (E, W) bool tensor per decoder layer: which channels each expert owns.
    expert_names:   E distinct names.
    untied:         give every expert its own copy of each of its channels.
    pregate:        sizes of the (randomly initialised) pre-gate; the default follows the model's width. One expert
                    needs no router and gets none.

    Raises MoesaicError if the masks do not fit the model or its FFNs are of an unknown structure.
    """
    sites = find_ffn_sites(dense)
    if len(masks) != len(sites):
        raise MoesaicError(
            f"{len(masks)} masks for {len(sites)} decoder layers: give one (experts, channels) mask each"
        )
    layouts, orders, weights = [], [], []
    for site, mask in zip(sites, masks, strict=True):
        if tuple(mask.shape) != (len(expert_names), site.width):
            raise MoesaicError(
                f"the mask of {site.path} has shape {tuple(mask.shape)}, expected ({len(expert_names)} experts, "
                f"{site.width} channels)"
            )
        layout, order = layout_from_masks(mask, untied=untied)
        layouts.append(layout)
        orders.append(order)
        weights.append(get_ffn_weights(dense, site))
    if pregate is None and len(expert_names) > 1:
        text = dense.config.get_text_config(decoder=True)
        pregate = PreGateConfig.for_model(text.vocab_size, text.hidden_size, len(expert_names))
    config = MoesaicConfig(
        base_config=copy.deepcopy(dense.config),
        sites=[site.to_dict() for site in sites],
        layouts=[layout.to_list() for layout in layouts],
        pregate=pregate.to_dict() if pregate else None,
        expert_names=list(expert_names),
        dtype=dense.dtype,
    )
    model = MoesaicForCausalLM(config, backbone=copy.deepcopy(dense))
    for blocks, weight, order in zip(model.ffns(), weights, orders, strict=True):
        blocks.to(device=dense.device, dtype=dense.dtype)
        blocks.load_dense(weight, order)
    if model.pregate is not None:
        model.pregate.to(dense.device, torch.float32)
    return model.eval()
