"""Any HF decoder: FFNs found by structure, and with every channel kept the refactored model is the dense one."""

import pytest
import torch
import transformers
from torch import nn

from families import FAMILIES, tiny
from moesaic.errors import MoesaicError
from moesaic.models.attach import attach
from moesaic.models.ffn_sites import FFNSite, capture_activations, find_ffn_sites, get_ffn_weights

NAMES = ["a", "b", "c"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_everything_changes_nothing(family):
    dense = tiny(family)
    before = {name: p.clone() for name, p in dense.named_parameters()}
    sites = find_ffn_sites(dense)
    moe = attach(dense, [torch.ones(3, site.width, dtype=torch.bool) for site in sites], NAMES)
    ids = torch.randint(3, 96, (2, 12))
    expected = dense(ids).logits
    torch.testing.assert_close(moe(ids).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert all(torch.equal(p, before[name]) for name, p in dense.named_parameters()), "the source was modified"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_expert_equals_zeroing_the_other_channels(family):
    """The reference edits the dense weights: a channel that is off has a zero row in `down`."""
    dense = tiny(family)
    sites = find_ffn_sites(dense)
    masks = [torch.rand(3, site.width) < 0.5 for site in sites]
    moe = attach(dense, masks, NAMES)
    ids = torch.randint(3, 96, (2, 12))
    for site, mask in zip(sites, masks, strict=True):
        get_ffn_weights(dense, site).down.mul_(mask[1])
    expected = dense(ids).logits
    torch.testing.assert_close(
        moe(ids, expert_index=1).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
@torch.no_grad()
def test_captured_activations_are_the_inputs_of_down(family):
    dense, seen = tiny(family), {}
    sites = find_ffn_sites(dense)
    with capture_activations(dense, sites, lambda a, layer: seen.update({layer: a.flatten(0, -2)})):
        dense(torch.randint(3, 96, (2, 5)))
    assert {layer: tuple(a.shape) for layer, a in seen.items()} == {0: (10, 48), 1: (10, 48)}
    before = dict(seen)
    dense(torch.randint(3, 96, (2, 5)))
    assert all(seen[layer] is before[layer] for layer in seen), "a hook outlived its block"


def test_site_round_trip():
    for family in ("llama", "phi3", "opt"):
        for site in find_ffn_sites(tiny(family)):
            assert FFNSite.from_dict(site.to_dict()) == site


def test_gate_and_up_are_told_apart_by_numbers_not_names():
    dense = tiny("llama")
    for layer in dense.model.layers:
        mlp = layer.mlp
        mlp.w1, mlp.w3 = mlp.gate_proj, mlp.up_proj
        del mlp.gate_proj, mlp.up_proj
        mlp.forward = lambda x, m=mlp: m.down_proj(m.act_fn(m.w3(x)) * m.w1(x))  # w3 is the gate here
    assert {site.gate for site in find_ffn_sites(dense)} == {"w3"}


MIXTURES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_next",
    "olmoe",
    "granitemoe",
    "hunyuan_v1_moe",
    "llama4_text",
    "gpt_oss",
    "jetmoe",
)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures_are_refused_by_name(model_type):
    """Above all those with a shared expert, which alone has the form of a dense FFN."""
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        shared_expert_intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, num_local_experts=2, num_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(MoesaicError, match=r"layers\.0 is a mixture of experts already"):
        find_ffn_sites(transformers.AutoModelForCausalLM.from_config(config))


def test_an_adapter_is_not_taken_for_the_ffn():
    dense = tiny("gpt2")
    for block in dense.transformer.h:
        adapter = type(block.mlp)(4, dense.config)  # the same form, a few channels wide, and found first
        block._modules = {"adapter": adapter} | block._modules
    assert {site.path.rpartition(".")[2] for site in find_ffn_sites(dense)} == {"mlp"}


def test_unknown_ffn_is_refused_with_what_was_found():
    dense = tiny("llama")

    class Odd(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
                mlp.gate_proj,
                mlp.up_proj,
                mlp.down_proj,
                mlp.act_fn,
            )

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) ** 2)

    dense.model.layers[1].mlp = Odd(dense.model.layers[1].mlp)
    with pytest.raises(MoesaicError, match=r"model\.layers\.1 has no FFN of a known form.*differs by"):
        find_ffn_sites(dense)


def test_model_without_decoder_layers_is_refused():
    dense = tiny("llama")
    dense.config.num_hidden_layers = 7
    with pytest.raises(MoesaicError, match="no list of 7 decoder layers"):
        find_ffn_sites(dense)


def test_masks_that_do_not_fit_are_refused():
    dense = tiny("llama")
    with pytest.raises(MoesaicError, match="1 masks for 2 decoder layers"):
        attach(dense, [torch.ones(3, 48)], NAMES)
    with pytest.raises(MoesaicError, match="shape"):
        attach(dense, [torch.ones(3, 40), torch.ones(3, 40)], NAMES)
