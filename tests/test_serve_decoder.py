"""The forward around fused layers: what gets it, that it computes the same, and that what differs is left alone."""

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

from families import COMMON, FAMILIES
from moesaic.experts.packed import pack_linears
from moesaic.serve import attention
from moesaic.serve.attention import RaggedAttention, Segment
from moesaic.serve.decoder import Decoder, FusedDecoder, decoder_of
from moesaic.serve.kv import KVPool, KVShape
from moesaic.serve.layers import fuse_layers
from moesaic.serve.norms import fuse_norms
from test_serve_layers import FUSED, model

WIDTH, TOKENS = 8, 7


def fused(family: str) -> torch.nn.Module:
    own = model(family)
    fuse_norms(own)
    fuse_layers(own)
    return own


@torch.inference_mode()
def logits(decoder: Decoder) -> torch.Tensor:
    """Of three rows, two requests beside one another."""
    config = decoder.model.config
    pool = KVPool([KVShape(config.num_key_value_heads, WIDTH, decoder.model.dtype)] * 2, slots=2, context=16)
    step = RaggedAttention(pool, [Segment(0, 0, TOKENS, 0), Segment(1, TOKENS, 1, 0)])
    with attention.current.use(step):
        return decoder(torch.arange(3, 4 + TOKENS), step.pos_N, torch.tensor([0, TOKENS - 1, TOKENS]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(family):
    own = fused(family)
    assert isinstance(decoder_of(own, filled=False), FusedDecoder) == (family in FUSED)


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("family", sorted(FUSED))
def test_the_same_numbers(family, filled):
    own = fused(family)
    wanted = logits(Decoder(own))
    if filled:
        pack_linears(own)
    decoder = decoder_of(own, filled)
    assert decoder.filled == filled
    torch.testing.assert_close(logits(decoder), wanted, rtol=1e-4, atol=1e-5)


SCALED = {
    "logits": {"logits_scaling": 2.0},
    "embedding": {"embedding_multiplier": 3.0},
}


@pytest.mark.parametrize("name", SCALED)
def test_what_differs_is_left_alone(name):
    """Granite with scales of its own: its layers are as others, what is around them is not."""
    attention.register()
    torch.manual_seed(0)
    own = AutoModelForCausalLM.from_config(t.GraniteConfig(**COMMON, **SCALED[name])).eval()
    own.set_attn_implementation(attention.NAME)
    fuse_norms(own)
    assert fuse_layers(own) == 2
    decoder = decoder_of(own, filled=True)
    assert type(decoder) is Decoder and not decoder.filled
