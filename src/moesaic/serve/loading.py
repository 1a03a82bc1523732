"""A checkpoint as the engine holds it: the dense part loaded and packed, the experts left on the disk.

The model stays transformers' own code. Its FFNs are replaced by `ServedFFN`, which asks the step that runs, and its
attention goes through `serve.attention`. What of the checkpoint is experts is never materialised.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.configuration import MoesaicConfig
from moesaic.errors import MoesaicError
from moesaic.experts.channel_blocks import ChannelBlocks
from moesaic.experts.lowbit import QuantizedLinear, quantize_linears
from moesaic.experts.packed import pack_linears
from moesaic.models.loading import load_tokenizer
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.models.routes import Current, RoutedFFN
from moesaic.serve import attention
from moesaic.serve.kv import KVShape
from moesaic.serve.layers import fuse_layers
from moesaic.serve.model_files import CONFIG, ModelFiles, TensorPlace, read_json
from moesaic.serve.norms import fuse_norms
from moesaic.serve.stock import ServedStock, load_stock

RunFFN = Callable[[int, Tensor], Tensor]


class ServedFFN(nn.Module):
    """Stands where the FFN of layer `layer` stood: (1, N, D) -> (1, N, D) by the step that runs."""

    def __init__(self, layer: int, step: Current[RunFFN]) -> None:
        super().__init__()
        self.layer, self.step = layer, step

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zero outside of steps: shapes can be found without any expert."""
        run = self.step.value
        if run is None:
            return torch.zeros_like(hidden)
        return run(self.layer, hidden.reshape(-1, hidden.shape[-1])).view(hidden.shape)


class ServedMoesaic(MoesaicForCausalLM):
    """A refactored model without its experts' weights; `blocks` describe them, one per layer, on no device."""

    _keys_to_ignore_on_load_unexpected = [r"\.blocks\."]

    def __init__(self, config: MoesaicConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config, backbone)
        self.step: Current[RunFFN] = Current()
        self.blocks: list[ChannelBlocks] = []
        self.names: list[str] = []  # of each layer's blocks in the checkpoint
        self.expert_names = tuple(config.expert_names)
        for name, module in list(self.backbone.named_modules()):
            if isinstance(module, RoutedFFN):
                parent, _, child = name.rpartition(".")
                setattr(self.backbone.get_submodule(parent), child, ServedFFN(len(self.names), self.step))
                self.blocks.append(module.blocks.eval())  # out of reach for the model's own eval()
                self.names.append(f"backbone.{name}.blocks")


@dataclass
class Loaded:
    """A model ready to run steps. kv: shapes of keys and values, the backbone's layers first, then the pre-gate's."""

    model: ServedMoesaic | ServedStock
    tokenizer: Any
    files: ModelFiles
    dtype: torch.dtype
    kv: list[KVShape]
    packed_bytes: int


def load(
    folder: Path,
    dtype: torch.dtype,
    pack: bool = True,
    device: torch.device | None = None,
    bits: int | None = None,
) -> Loaded:
    """Load everything but the experts of a refactored model, or of a mixture as transformers ships it, to `device`.

    Weights are packed for CPUs where no device is named.

    bits: of a weight in the backbone's linear layers, None = as stored. The pre-gate stays as it is, so routes do.

    Raises MoesaicError if it is neither, tensors are missing, or its attention cannot be served.
    """
    files = ModelFiles(folder)
    attention.register()
    model: Any
    if read_json(folder / CONFIG).get("model_type") == "moesaic":
        model, missing = _load_moesaic(folder, dtype)
    else:
        model, missing = load_stock(folder, dtype)
    if missing:
        raise MoesaicError(
            f"the checkpoint {folder} lacks {len(missing)} tensor(s), such as {min(missing)}; copy it again"
        )
    model.backbone.eval().requires_grad_(False)
    model.backbone.set_attn_implementation(attention.NAME)
    if pack:
        fuse_norms(model.backbone)
        fuse_layers(model.backbone)
    packed = 0
    if bits is not None:
        quantize_linears(model.backbone, bits, keep=model.gates if isinstance(model, ServedStock) else ())
        head: Any = model.backbone.get_output_embeddings()
        if isinstance(head, QuantizedLinear):
            head.outputs = True
    elif pack and device is None:
        packed = pack_linears(model.backbone)
    if model.pregate is not None and pack and device is None:
        packed += pack_linears(model.pregate.layers)
    kv = kv_shapes(model)
    if device is not None:
        model.backbone.to(device)
        if model.pregate is not None:
            model.pregate.to(device)
    return Loaded(model, load_tokenizer(folder), files, dtype, kv, packed)


def _load_moesaic(folder: Path, dtype: torch.dtype) -> tuple[ServedMoesaic, set[str]]:
    model, info = PreTrainedModel.from_pretrained.__func__(ServedMoesaic, folder, dtype=dtype, output_loading_info=True)
    if model.pregate is None and len(model.config.expert_names) > 1:
        raise MoesaicError(f"{folder} has no pre-gate yet: finish its refactoring first")
    return model.eval().requires_grad_(False), set(info["missing_keys"])


@torch.inference_mode()
def kv_shapes(model: ServedMoesaic | ServedStock) -> list[KVShape]:
    """Keys of every layer, seen in a forward of two tokens. Raises MoesaicError for attention that goes another way."""
    probe = _Probe()
    with attention.current.use(probe):  # type: ignore[arg-type]
        ids = torch.zeros(1, 2, dtype=torch.long)
        model.backbone(input_ids=ids, position_ids=torch.arange(2)[None], use_cache=False)
    layers = model.backbone.config.get_text_config(decoder=True).num_hidden_layers
    if sorted(probe.shapes) != list(range(layers)):
        raise MoesaicError(
            f"{type(model.backbone).__name__} computes attention in {len(probe.shapes)} of {layers} layers through "
            "transformers' attention interface; serving needs it in all of them"
        )
    shapes = [probe.shapes[layer] for layer in range(layers)]
    if model.pregate is not None:
        gate = model.pregate.config
        shapes += [KVShape(gate.heads, gate.width // gate.heads, torch.float32)] * gate.layers
    return shapes


class _Probe:
    """Stands for a step's attention and notes the shapes of keys."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
        if key.shape != value.shape:
            raise MoesaicError(
                f"keys {tuple(key.shape)} and values {tuple(value.shape)} of layer {layer} differ in shape"
            )
        self.shapes[layer] = KVShape(key.shape[1], key.shape[2], key.dtype)
        return query


def fill_blocks(
    blocks: ChannelBlocks, name: str, tensor: Callable[[str], Tensor], places: dict[str, TensorPlace]
) -> None:
    """Point a layer's blocks at the store's memory; the down bias, which every expert has, is loaded."""
    for part in ("gate", "up", "down", "gate_bias", "up_bias"):
        if getattr(blocks, part) is not None:
            setattr(blocks, part, nn.Parameter(tensor(f"{name}.{part}"), requires_grad=False))
    if blocks.down_bias is not None:
        with safe_open(places[f"{name}.down_bias"].file, framework="pt") as file:
            bias = file.get_tensor(f"{name}.down_bias")
        blocks.down_bias = nn.Parameter(bias.to(blocks.up.dtype), requires_grad=False)


def served_device(name: str, budget: int) -> torch.device:
    """The accelerator, which shall give this process no more than `budget` bytes where it can be told so.

    Raises MoesaicError if torch cannot compute there.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MoesaicError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        whole = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(budget / whole, 1.0), device)
    return device


def served_dtype(stored: torch.dtype, wanted: str) -> torch.dtype:
    """The dtype to compute in: as stored, but float16 as bfloat16, for which CPUs have fast paths."""
    if wanted != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]
    return torch.bfloat16 if stored == torch.float16 else stored
