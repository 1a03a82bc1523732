"""The models of `whole_model.py` and `start.py`: a random Llama, its refactoring, and a GGUF file of the same weights.

Each is made once, aside, and then moved to its place. Speed does not depend on the values of weights, only routes do:
so the pre-gate, which runs at full cost, is made to send token t to expert t mod E, and every side knows the routes.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from serving_models import make, write_config, write_out
from speed import EXPERTS, SHAPES, VOCABULARY, random_masks
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moesaic.models.attach import attach
from moesaic.routing.pregate import PreGate

ONE_B = dict(  # Llama-3.2-1B's
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128_256,
)
TINY = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
)
SLICE_8B = dict(  # Llama-3-8B's layers, a quarter of them
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=8,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32_000,
)
MODELS: dict[str, dict[str, Any]] = {**SHAPES, "1b": ONE_B, "8b-slice": SLICE_8B, "tiny": TINY}
POSITIONS = 4096
HERE = "cuda" if torch.cuda.is_available() else "cpu"  # where models are made: a GPU draws faster
LOUD = 100.0  # of the pre-gate's embedding: far above what its layer adds
LLAMA_TYPES = ("bf16", "q8_0", "q4_0")


def llama_config(model: str) -> LlamaConfig:
    shape = {"vocab_size": VOCABULARY, **MODELS[model]}
    return LlamaConfig(max_position_embeddings=POSITIONS, tie_word_embeddings=True, **shape)


def dense_folder(work: Path, model: str, dtype: str, seed: int = 0) -> Path:
    """The dense model with a tokenizer, written on first use."""
    return make(work / f"{model}-{dtype}" / "dense", lambda path: _write_dense(path, model, dtype, seed))


def moe_folder(work: Path, model: str, dtype: str, seed: int = 0) -> Path:
    """Its refactoring: EXPERTS experts, whose channels `speed.random_masks` draws."""
    dense = dense_folder(work, model, dtype, seed)
    return make(dense.with_name("moe"), lambda path: _write_moe(path, dense, seed))


def whole_folder(work: Path, model: str, dtype: str, seed: int = 0) -> Path:
    """The dense model as the engine takes it: one expert that has every channel."""
    dense = dense_folder(work, model, dtype, seed)
    return make(dense.with_name("whole"), lambda path: _write_moe(path, dense, seed, experts=1))


def llama_file(gguf: Any, work: Path, model: str, dtype: str, kind: str) -> Path:
    """A GGUF file of the dense model, its matrices as `kind`, one of LLAMA_TYPES."""
    dense = dense_folder(work, model, dtype)
    return make(dense.with_name(f"dense-{kind}.gguf"), lambda path: _write_gguf(gguf, dense, path, kind))


def _write_dense(folder: Path, model: str, dtype: str, seed: int) -> None:
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # no float32 copy of a large model
    try:
        with torch.device(HERE):
            dense = LlamaForCausalLM(llama_config(model))
    finally:
        torch.set_default_dtype(before)
    dense.save_pretrained(folder)
    byte_tokenizer(dense.config.vocab_size).save_pretrained(folder)


def _write_moe(folder: Path, dense: Path, seed: int, experts: int = EXPERTS) -> None:
    model = LlamaForCausalLM.from_pretrained(dense, dtype="auto").to(HERE).eval()
    config = model.config
    masks = random_masks(config.num_hidden_layers, config.intermediate_size, seed)
    if experts == 1:
        masks = [torch.ones_like(mask[:1]) for mask in masks]
    moe = attach(model, masks, [f"domain{e}" for e in range(experts)])
    del model
    if moe.pregate is not None:
        route_by_token(moe.pregate)
    moe.save_pretrained(folder)
    byte_tokenizer(config.vocab_size).save_pretrained(folder)


@torch.no_grad()
def route_by_token(pregate: PreGate) -> None:
    """Token t goes to expert t mod E, whatever came before it."""
    experts, width = pregate.head.weight.shape
    tokens = torch.arange(pregate.embedding.num_embeddings, device=pregate.embedding.weight.device)
    pregate.embedding.weight.zero_()
    pregate.embedding.weight[tokens, tokens % experts] = LOUD
    pregate.head.weight.copy_(torch.eye(experts, width))


def byte_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of as many tokens as a real one has, so that loading it takes as long: every pair of bytes, ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words, merges = ["<end>", *alphabet], []
    for first in (word for word in words[1:] + [a + b for a in alphabet for b in alphabet]):
        room = max(0, vocabulary - len(words))
        merges += [(first, second) for second in alphabet[:room]]
        words += [first + second for second in alphabet[:room]]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def _write_gguf(gguf: Any, dense: Path, path: Path, kind: str) -> None:
    """Norms in float32, matrices and the embedding, which is the head too, as `kind`."""
    config = LlamaConfig.from_pretrained(dense)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}"))
    write_config(writer, config)
    writer.add_rope_dimension_count(config.head_dim)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for file in sorted(dense.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = _as_llama(name, tensors.get_tensor(name), config)
                data, raw = _encoded(gguf, tensor, kind)
                writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=raw)
    write_out(writer)


def _as_llama(name: str, tensor: Tensor, config: LlamaConfig) -> Tensor:
    """llama.cpp rotates neighbours, transformers the two halves of a head: rows of queries and keys in that order."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    rows = tensor.view(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
    return rows.transpose(1, 2).reshape(tensor.shape)


def _encoded(gguf: Any, tensor: Tensor, kind: str) -> tuple[Any, Any]:
    """Bytes and their type for the writer; None where the array says it itself."""
    if tensor.ndim == 1:
        return tensor.float().numpy(), None
    if kind == "bf16":
        raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        return raw, gguf.GGMLQuantizationType.BF16
    wanted = getattr(gguf.GGMLQuantizationType, kind.upper())
    return gguf.quants.quantize(tensor.float().numpy(), wanted), wanted
