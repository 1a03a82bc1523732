"""Tiny random models of many decoder families, built from transformers' own config classes."""

import torch
import transformers as t
from transformers import AutoModelForCausalLM, PreTrainedModel

COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _common(**changes):
    return {**COMMON, **changes}


def _without(*names, **changes):
    return {name: value for name, value in _common(**changes).items() if name not in names}


FAMILIES = {
    "llama": lambda: t.LlamaConfig(**COMMON),
    "llama-mlp-bias": lambda: t.LlamaConfig(**_common(mlp_bias=True)),
    "mistral": lambda: t.MistralConfig(**_common(sliding_window=8)),
    "qwen2": lambda: t.Qwen2Config(**COMMON),
    "qwen3": lambda: t.Qwen3Config(**_common(head_dim=8)),
    "gemma2": lambda: t.Gemma2Config(**_common(head_dim=8, sliding_window=8)),
    "gemma3": lambda: t.Gemma3TextConfig(**_common(head_dim=8, sliding_window=8)),
    "phi": lambda: t.PhiConfig(**COMMON),
    "phi3": lambda: t.Phi3Config(**COMMON),
    "olmo2": lambda: t.Olmo2Config(**COMMON),
    "granite": lambda: t.GraniteConfig(**COMMON),
    "stablelm": lambda: t.StableLmConfig(**COMMON),
    "gpt-neox": lambda: t.GPTNeoXConfig(**_without("num_key_value_heads")),
    "gpt2": lambda: t.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=128, n_inner=48, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: t.OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
    "falcon": lambda: t.FalconConfig(
        **_without("intermediate_size", "num_key_value_heads", new_decoder_architecture=False)
    ),
    "starcoder2": lambda: t.Starcoder2Config(**COMMON),
    "cohere": lambda: t.CohereConfig(**COMMON),
    "glm": lambda: t.GlmConfig(**_common(head_dim=8)),
    "smollm3": lambda: t.SmolLM3Config(**COMMON),
}


def tiny(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the family, its weights large enough that every part of it matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()
