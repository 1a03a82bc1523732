"""What is cached where weights are kept in few bits: whole experts of a layer, and what each takes; without torch.

Channels are filled up so that an expert's matrices need nothing more when they run. Every entry takes whole pages.
Shapes: W channels of an expert, D model width, R matrices of rows (gate and up, or up alone).
"""

import mmap
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from moesaic.errors import MoesaicError
from moesaic.experts.lowbit_sizes import LEAST_OUTPUTS, bits_of, filled_inputs, tensor_bytes
from moesaic.schedule.work import Key, Layout
from moesaic.serve.model_files import BITS, ModelFiles, Part, Parts, TensorPlace, expert_entries

PAGE = mmap.PAGESIZE
PREGATE = "pregate."  # always float32
HEADS = ("lm_head.weight", "embed_out.weight")
POSITIONS = ("wpe.", "embed_positions.", "position_embeddings.")
ROUTER = re.compile(r".*\.(gate|router)(\.\w+)?\.weight")
CONV1D = ("gpt2", "openai-gpt")
GATE = re.compile(r".*\b(gate|gate_bias|gate_proj|gate_up_proj|w1)(\.weight)?")
LINE = 64  # bytes; where in an entry a tensor may begin
DOWN = re.compile(r".*\b(down|down_proj|w2)(\.weight)?")


class Shape(NamedTuple):
    """An expert: `rows` matrices (W, D) before its activation and one after it; biases: how many for channels."""

    rows: int
    width: int
    hidden: int
    biases: int

    def bytes(self, bits: int, item: int) -> int:
        """What it takes in memory, whole pages."""
        width = filled_inputs(self.width, bits)
        sizes = [
            *tensor_bytes(self.rows * width, self.hidden, bits, item),
            *tensor_bytes(self.hidden, width, bits, item),
        ]
        sizes += [self.rows * width * item] if self.biases else []
        return -(-sum(-(-size // LINE) * LINE for size in sizes) // PAGE) * PAGE

    @property
    def numbers(self) -> int:
        """Numbers as stored."""
        return (self.rows + 1) * self.width * self.hidden + self.biases


def served_entries(config: Mapping[str, Any], files: ModelFiles, weights: str, item: int) -> tuple[Layout, Parts]:
    """As `expert_entries`, for experts that are kept in `weights`. Raises MoesaicError for what is none of these."""
    layout, parts = expert_entries(config, files, item)
    bits = bits_of(weights)
    if bits is None:
        return layout, parts
    whole = whole_experts(layout, parts)
    sizes: dict[int, list[int]] = {}
    for key, ranges in sorted(whole.items()):
        sizes.setdefault(key.layer, []).append(shape_of(files, ranges).bytes(bits, item))
    return Layout.layer_experts([sizes[layer] for layer in sorted(sizes)]), whole


def quantized(name: str, place: TensorPlace, config: Mapping[str, Any]) -> bool:
    """Whether a tensor outside of experts is a linear layer's matrix that is kept in few bits.

    config: the decoder's own. Routers, what has few outputs and layers that are no nn.Linear stay.
    """
    if len(place.shape) != 2 or name.startswith(PREGATE) or place.shape[0] < LEAST_OUTPUTS:
        return False
    if name.endswith(HEADS):
        return True
    return not (looked_up(name, place, config) or ROUTER.fullmatch(name) or config.get("model_type") in CONV1D)


def looked_up(name: str, place: TensorPlace, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is an embedding: a few of its rows are read."""
    vocabulary = len(place.shape) == 2 and place.shape[0] == config.get("vocab_size") and not name.endswith(HEADS)
    return vocabulary or any(part in name for part in POSITIONS)


def whole_experts(layout: Layout, parts: Parts) -> Parts:
    """The parts of every expert of a layer, in the order of its tensors."""
    return {
        Key(layer, expert): tuple(part for key in keys for part in parts[key])
        for (layer, expert), keys in layout.entries.items()
    }


def shape_of(files: ModelFiles, parts: Sequence[Part]) -> Shape:
    """The shape of an expert that consists of these parts. Raises MoesaicError where they do not add up to one."""
    rows = down = biases = hidden = 0
    for part in parts:
        place = files.tensors[part.tensor]
        count = (part.stop - part.start) * 8 // BITS[place.dtype]
        if len(place.shape) < 2:
            biases += count
        elif DOWN.fullmatch(part.tensor):
            down += count
        else:
            rows, hidden = rows + count, place.shape[-1]
    if not down or not rows or down % hidden or rows % down:
        raise MoesaicError(
            f"an expert in {files.folder} consists of {len(parts)} parts that are not gate, up and down: expected "
            "matrices of equal size; copy the checkpoint again"
        )
    return Shape(rows // down, down // hidden, hidden, biases)
