"""Fused decoder layers: which families get them, that they compute the same, and that what differs is left alone."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from families import FAMILIES
from moesaic.serve import attention
from moesaic.serve.attention import RaggedAttention, Segment
from moesaic.serve.kv import KVPool, KVShape
from moesaic.serve.layers import FusedLayer, fuse_layers
from moesaic.serve.norms import fuse_norms

FUSED = dict.fromkeys(("granite", "llama", "llama-mlp-bias", "mistral", "qwen2", "qwen3", "starcoder2", "smollm3"), 2)
WIDTH, TOKENS = 8, 6


def model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    attention.register()
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=dtype).eval()
    own.set_attn_implementation(attention.NAME)
    return own


@torch.inference_mode()
def logits(own: nn.Module) -> torch.Tensor:
    pool = KVPool([KVShape(own.config.num_key_value_heads, WIDTH, own.dtype)] * 2, slots=1, context=16)
    ids = torch.arange(3, 3 + TOKENS)[None]
    step = RaggedAttention(pool, [Segment(0, 0, TOKENS, 0)])
    with attention.current.use(step):
        return own(input_ids=ids, position_ids=step.pos_N[None], use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(family, dtype):
    own = model(family, dtype)
    fuse_norms(own)
    assert fuse_layers(own) == FUSED.get(family, 0)


@pytest.mark.parametrize("family", sorted(FUSED))
def test_the_same_numbers(family):
    own = model(family)
    wanted = logits(own)
    fuse_norms(own)
    fuse_layers(own)
    assert any(isinstance(module, FusedLayer) for module in own.modules())
    torch.testing.assert_close(logits(own), wanted, rtol=1e-4, atol=1e-5)


class Halved(nn.Module):
    """A projection of another kind."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight) / 2


def test_a_layer_that_computes_something_else_is_left_alone():
    own = model("llama")
    one, two = own.model.layers
    one.self_attn.scaling *= 2  # seen in how it asks to attend, and kept
    two.register_forward_hook(lambda layer, args, out: out * 1.01)
    assert fuse_layers(own) == 1
    assert isinstance(own.model.layers[0], FusedLayer)
    assert own.model.layers[1] is two


def test_other_projections_are_left_alone():
    own = model("llama")
    own.model.layers[0].self_attn.q_proj = Halved(own.model.layers[0].self_attn.q_proj)
    assert fuse_layers(own) == 1
