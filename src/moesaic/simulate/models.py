"""Other models' sizes under a trace's routes: what a trace of a small model would cost at the size of a large one.

Routes are facts of the model that was traced and stay as they are; only bytes and FLOPs change. Sizes are those of the
published configurations.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.schedule.family import near
from moesaic.schedule.trace import Trace


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; ffn is the width of one expert of a mixture, of the FFN of a dense model."""

    name: str
    layers: int
    d: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int = 0
    top_k: int = 0


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000),
        Shape("llama-3.2-1b", 16, 2048, 8192, 32, 8, 64, 128256),
        Shape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32000),
        Shape("mixtral-8x7b", 32, 4096, 14336, 32, 8, 128, 32000, experts=8, top_k=2),
        Shape("olmoe-1b-7b", 16, 2048, 1024, 16, 16, 128, 50304, experts=64, top_k=8),
        Shape("deepseek-moe-16b", 28, 2048, 1408, 16, 16, 128, 102400, experts=64, top_k=6),
    )
}

# What configurations call the number of experts, and the width of one where it is not intermediate_size.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
WIDTHS = ("moe_intermediate_size", "intermediate_size")


def find_shape(name: str) -> Shape:
    """A shape by name, or read from a config.json or the folder that holds one.

    Raises MoesaicError with the nearest name, or the key that a configuration lacks.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise near(name, SHAPES, "model shape")
    try:
        return _from_config(name, json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MoesaicError(f"{path} is no JSON: {error}") from None
    except KeyError as error:
        raise MoesaicError(f"{path} has no {error.args[0]}; expected the configuration of a decoder") from None


def _from_config(name: str, config: Mapping[str, Any]) -> Shape:
    heads, d = config["num_attention_heads"], config["hidden_size"]
    return Shape(
        name,
        config["num_hidden_layers"],
        d,
        next((config[key] for key in WIDTHS if config.get(key)), None) or config["intermediate_size"],
        heads,
        config.get("num_key_value_heads") or heads,
        config.get("head_dim") or d // heads,
        config["vocab_size"],
        next((config[key] for key in EXPERTS if config.get(key)), 0),
        config.get("num_experts_per_tok") or 0,
    )


def at_size(trace: Trace, shape: Shape) -> Trace:
    """The trace as if `shape` had made its routes; channel blocks keep their shares of the FFN.

    Raises MoesaicError where routes differ between layers and the numbers of layers differ, or a mixture has other
    experts than the trace.
    """
    card = trace.card
    if trace.route_layers > 1 and shape.layers != card.layers:
        raise MoesaicError(
            f"the trace routes each of the {card.layers} layers of {card.model} anew, but {shape.name} has "
            f"{shape.layers} layers: take a shape of as many layers, or a trace whose routes hold in all layers"
        )
    if shape.experts not in (0, card.experts):
        raise MoesaicError(f"{shape.name} has {shape.experts} experts, but the trace chooses among {card.experts}")
    blocks = None
    if card.blocks is not None:
        rows = [card.blocks[layer * card.layers // shape.layers] for layer in range(shape.layers)]
        blocks = tuple(tuple((max(1, round(w * shape.ffn / card.ffn)), owners) for w, owners in row) for row in rows)
    shared = round(card.shared_params * shape.d * shape.ffn / (card.d * card.ffn))
    whole = card.blocks is None and not shape.experts  # experts cut from a dense FFN: half of it each, as 2410.19123
    sized = replace(
        card,
        model=f"{card.model} at the size of {shape.name}",
        layers=shape.layers,
        d=shape.d,
        ffn=shape.ffn // 2 if whole else shape.ffn,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab=shape.vocab,
        blocks=blocks,
        shared_params=shared,
    )
    return replace(trace, card=sized)
