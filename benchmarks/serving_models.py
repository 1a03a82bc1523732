"""The models of `serving_throughput.py`: a random Qwen3MoE, ours of the same experts, and the least a step reads."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moesaic.data import installed_domains
from moesaic.models.attach import attach
from moesaic.routing.pregate import PreGate, PreGateConfig

BYTES = 2  # bfloat16
TEXT_BYTES = 1_000_000  # per domain, for the tokenizer


@dataclass(frozen=True)
class Size:
    """What both models have in common. width: channels of one expert. One expert per token."""

    layers: int = 8
    hidden: int = 1024
    experts: int = 8
    width: int = 1024
    heads: int = 16
    kv_heads: int = 4
    vocabulary: int = 32_000
    positions: int = 2048

    def __str__(self) -> str:
        return f"L{self.layers}-H{self.hidden}-E{self.experts}-W{self.width}-V{self.vocabulary}"

    def common(self) -> dict[str, Any]:
        return dict(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=self.positions,
            tie_word_embeddings=False,
        )

    def moe_config(self) -> Qwen3MoeConfig:
        experts = dict(num_experts=self.experts, num_experts_per_tok=1, moe_intermediate_size=self.width)
        return Qwen3MoeConfig(**self.common(), **experts, intermediate_size=self.width, norm_topk_prob=True)

    def dense_config(self) -> Qwen3Config:
        return Qwen3Config(**self.common(), intermediate_size=self.experts * self.width)

    def pregate_config(self) -> PreGateConfig:
        return PreGateConfig.for_model(self.vocabulary, self.hidden, self.experts)


@dataclass(frozen=True)
class Cell:
    """`batch` requests with prompts of `context` tokens each."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.context}"

    def prompts(self, vocabulary: int, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(1, vocabulary, (self.batch, self.context), generator=generator).tolist()


def _weights(module: nn.Module, without: Sequence[str]) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if not any(word in name for word in without))


def step_bytes(size: Size, cell: Cell, steps: int, experts: float, pregate: bool) -> float:
    """The least bytes a decode step reads: dense weights, the experts of its tokens, keys and values, each once.

    experts:  distinct ones per layer. pregate: one router of float32 before all layers, not one of bfloat16 in each.
    """
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(size.moe_config())
        gate = PreGate(size.pregate_config())
    context = cell.context + steps / 2
    expert_weights = size.layers * 3 * size.hidden * size.width
    dense = _weights(model, ("embed_tokens", ".experts.", ".gate.")) + cell.batch * size.hidden
    keys = cell.batch * context * size.layers * 2 * size.kv_heads * (size.hidden // size.heads)
    total = BYTES * (dense + experts * expert_weights + keys)
    if not pregate:
        return total + BYTES * size.layers * size.experts * size.hidden
    width = gate.config.width
    return total + 4 * (_weights(gate, ("embedding",)) + cell.batch * width * (1 + 2 * gate.config.layers * context))


def make(path: Path, write: Callable[[Path], None]) -> Path:
    """`path` as `write` makes it, once: aside and then moved, so that a broken run leaves nothing half made."""
    if not path.exists():
        part = path.with_name(f".{os.getpid()}.{path.name}")
        part.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.rename(path)
    return path


def random_model(kind: type, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).to(torch.bfloat16).eval()


def write_peer(size: Size, folder: Path) -> None:
    random_model(Qwen3MoeForCausalLM, size.moe_config()).save_pretrained(folder)


def write_ours(size: Size, folder: Path) -> None:
    """Every expert has `width` channels of its own."""
    dense = random_model(Qwen3ForCausalLM, size.dense_config())
    mask = torch.eye(size.experts, dtype=torch.bool).repeat_interleave(size.width, 1)
    names = [f"expert{e}" for e in range(size.experts)]
    pregate = size.pregate_config()
    attach(dense, [mask] * size.layers, names, untied=True, pregate=pregate).save_pretrained(folder)
    train_tokenizer(size.vocabulary).save_pretrained(folder)


def train_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of installed text; words without meaning fill what the text does not."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    domains = installed_domains(min(TEXT_BYTES, 100 * vocabulary))
    tokenizer.train_from_iterator((text for domain in domains for text in domain.train), trainer)
    tokenizer.add_tokens([f" word{i}" for i in range(vocabulary - tokenizer.get_vocab_size())])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def write_gguf(gguf: Any, model: Qwen3MoeForCausalLM, path: Path) -> None:
    """Weights in bfloat16, norms and routers in float32 as llama.cpp's own converter keeps them; no vocabulary."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    write_config(writer, config)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    for name, tensor in _split_experts(model):
        target = names.get_name(name, try_suffixes=(".weight",))
        if tensor.ndim == 1 or name.endswith(".gate.weight"):
            writer.add_tensor(target, tensor.float().numpy())
        else:
            raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    write_out(writer)


def write_config(writer: Any, config: Any) -> None:
    """What every decoder has; no vocabulary."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def write_out(writer: Any) -> None:
    """Everything that was added, to the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _split_experts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up_proj", f"{part}.weight"), half
        else:
            yield name + ".weight" * name.endswith("down_proj"), tensor
