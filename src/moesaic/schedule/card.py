"""The facts of a routed model that a trace carries: what an expert weighs, and when its routes are known.

Shapes: L layers, E experts. Units: channels, parameters, bytes.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.schedule.work import Known

Blocks = tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]
KNOWN = tuple(known.name.lower() for known in Known)


@dataclass(frozen=True)
class Card:
    """Facts of the routed model.

    known_at:       "prompt", "request", "step" or "gate", see `schedule.work.Known`. "request": prompts are known once
                    queued, a decode token once the step before it has been sampled (a pre-gate).
    ffn:            channels of one expert; of the dense FFN where there are blocks.
    weight_bytes:   bytes of one parameter.
    shared_params:  parameters per layer of the FFN that every token uses and that stay resident beside the experts.
    blocks:         per layer its channel blocks, (channels, experts that own them); None = experts are stored whole.

    Raises MoesaicError if a field cannot be that of a model.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    known_at: str
    d: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    matrices: int = 3
    weight_bytes: float = 2.0
    shared_params: int = 0
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "top_k", "d", "ffn", "heads", "kv_heads", "head_dim", "vocab", "matrices"):
            _whole(name, getattr(self, name), 1)
        _whole("shared_params", self.shared_params, 0)
        if not (math.isfinite(self.weight_bytes) and self.weight_bytes > 0):
            raise MoesaicError(f"card: weight_bytes is {self.weight_bytes}, expected a finite number above 0")
        if self.known_at not in KNOWN:
            raise MoesaicError(f"card: known_at is {self.known_at!r}, expected {choices(self.known_at, KNOWN)}")
        if self.top_k > self.experts:
            raise MoesaicError(f"card: top_k is {self.top_k}, but there are {self.experts} experts")
        if self.blocks is not None:
            self._check_blocks(self.blocks)

    def _check_blocks(self, blocks: Blocks) -> None:
        if len(blocks) != self.layers:
            raise MoesaicError(f"card: blocks of {len(blocks)} layers, expected {self.layers}")
        for layer, row in enumerate(blocks):
            for number, (width, owners) in enumerate(row):
                if width < 1 or not owners or min(owners) < 0 or max(owners) >= self.experts:
                    raise MoesaicError(
                        f"card: block {number} of layer {layer} has {width} channels and the owners {list(owners)}; "
                        f"expected at least 1 channel and experts from 0 to {self.experts - 1}"
                    )
            if bare := set(range(self.experts)).difference(*(owners for _, owners in row)):
                raise MoesaicError(f"card: expert {min(bare)} of layer {layer} owns no block, expected at least one")

    @property
    def known(self) -> Known:
        """When the routes of a prompt are known."""
        return Known[self.known_at.upper()]

    def bytes_of(self, channels: int) -> int:
        """Bytes of that many channels of one layer's FFN."""
        return int(self.matrices * self.d * channels * self.weight_bytes)

    def expert_bytes(self) -> list[list[int]]:
        """(L, E). A channel that several experts share counts for each of them: each would hold a copy."""
        if self.blocks is None:
            return [[self.bytes_of(self.ffn)] * self.experts] * self.layers
        return [
            [sum(self.bytes_of(width) for width, owners in row if e in owners) for e in range(self.experts)]
            for row in self.blocks
        ]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Card":
        """Inverse of `dataclasses.asdict`, also after JSON. Raises MoesaicError for unknown or missing fields."""
        names = [each.name for each in fields(cls)]
        for name in raw:
            if name not in names:
                raise MoesaicError(f"card: unknown field {name!r}, expected {choices(name, names)}")
        try:
            if raw.get("blocks") is not None:
                rows = (tuple((width, tuple(owners)) for width, owners in row) for row in raw["blocks"])
                raw = {**raw, "blocks": tuple(rows)}
            return cls(**raw)
        except MoesaicError:
            raise
        except (TypeError, ValueError) as error:
            raise MoesaicError(f"card: {error}; expected the fields {', '.join(names)}") from error


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MoesaicError(f"card: {name} is {value!r}, expected a whole number of at least {least}")


def choices(given: str, names: Sequence[str]) -> str:
    """The names, and which one was probably meant."""
    near = difflib.get_close_matches(str(given), names, 1)
    return f"one of {', '.join(names)}" + (f"; did you mean {near[0]!r}?" if near else "")
