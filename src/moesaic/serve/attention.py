"""Attention of a step whose tokens belong to many requests: one row of tokens, each request attending to its own slot.

Registered with transformers as an attention implementation, so any decoder that asks its attention interface runs
under it unchanged. A request's result does not depend on who else is in the step. Prompts attend in calls of their own.
Single tokens see their keys filled up to a multiple of `FILL`, so that those in neighbouring slots that are filled up
alike can share a call; the query heads of a group are folded into the query length (measured: ten times faster on CPUs
than letting the kernel repeat the keys).
Shapes: N tokens of the step, H query heads, G key-value heads, D head width, L keys of a request, B tokens of a call.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface

from moesaic.errors import MoesaicError
from moesaic.experts import triton_blocks
from moesaic.models.routes import Current
from moesaic.serve import triton_attention
from moesaic.serve.kv import KVPool

NAME = "moesaic_ragged"


class Segment(NamedTuple):
    """A request's tokens in the step: rows start to start + tokens - 1, after `past` tokens that are in `slot`."""

    slot: int
    start: int
    tokens: int
    past: int


class Scores(NamedTuple):
    """How queries meet keys. window: how many keys a token sees, itself among them; cap: a bound on scores."""

    scale: float
    window: int | None = None
    cap: float | None = None


FILL = 64  # keys; a multiple of the width of any vector register, so that what is masked moves no sum


class _Run:
    """Single tokens of requests in neighbouring slots, all with keys that fill up to `length`."""

    def __init__(self, segments: Sequence[Segment], length: int, device: torch.device) -> None:
        self.first, self.count, self.length = segments[0].slot, len(segments), length
        self.segments = segments
        starts = [segment.start for segment in segments]
        in_order = starts == list(range(starts[0], starts[0] + len(starts)))
        self.rows: Any = slice(starts[0], starts[0] + len(starts))
        if not in_order:
            self.rows = torch.tensor(starts, device=device)
        keys_B1 = torch.tensor([[segment.past + 1] for segment in segments])
        hidden_BL = torch.arange(length) >= keys_B1
        mask = torch.zeros(len(segments), 1, 1, length).masked_fill_(hidden_BL[:, None, None], -torch.inf)
        self._mask = mask.to(device)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(B, 1, 1, L): nothing added to the scores of a request's keys, minus infinity to what lies after them."""
        if self._mask.dtype != dtype:
            self._mask = self._mask.to(dtype)
        return self._mask


def _runs(segments: Sequence[Segment], stride: int, device: torch.device) -> list[_Run]:
    """The fewest calls for these single tokens; neighbours run together where their keys fill up alike."""
    runs: list[_Run] = []
    begun: list[Segment] = []
    length = 0
    for segment in sorted(segments):
        own = min(-(-(segment.past + 1) // FILL) * FILL, stride)
        if begun and (own != length or segment.slot != begun[-1].slot + 1):
            runs.append(_Run(begun, length, device))
            begun = []
        length = own
        begun.append(segment)
    return runs + ([_Run(begun, length, device)] if begun else [])


class TokenAttention:
    """The attention of a step of single tokens on a device, which alone knows their slots and positions, (B,) each."""

    def __init__(self, pool: KVPool, slot_B: Tensor, pos_B: Tensor) -> None:
        self.pool, self.slot_B, self.pos_B = pool, slot_B, pos_B
        self._places: dict[int, Tensor] = {}

    def attend(self, layer: int, query_BHD: Tensor, key_BGD: Tensor, value_BGD: Tensor, scores: Scores) -> Tensor:
        """Store the tokens' keys and values in `layer`, then attend; (B, H, D)."""
        heads = key_BGD.shape[1]
        if heads not in self._places:
            self._places[heads] = self.pool.places(heads, self.slot_B, self.pos_B)
        self.pool.write(layer, self._places[heads], key_BGD, value_BGD)
        query_BHD = query_BHD.contiguous()
        return triton_attention.attend(query_BHD, *self.pool.matrices(layer), self.slot_B, self.pos_B, scores)

    def turn_and_attend(
        self, layer: int, qkv_BAD: Tensor, heads: int, angles: tuple[Tensor, Tensor], scores: Scores
    ) -> Tensor:
        """As `attend`, of queries, keys and values side by side that have not been rotated."""
        matrices, where = self.pool.matrices(layer), (self.slot_B, self.pos_B)
        query_BHD = triton_attention.place(qkv_BAD, heads, angles, matrices, where)
        return triton_attention.attend(query_BHD, *matrices, *where, scores)


class RaggedAttention:
    """The attention of one step: where its tokens go, and whom each may see."""

    def __init__(self, pool: KVPool, segments: Sequence[Segment]) -> None:
        self.pool = pool
        self._prompts = [segment for segment in segments if segment.tokens > 1]
        singles = [segment for segment in segments if segment.tokens == 1]
        self._tokens: tuple[Tensor, Tensor, Tensor] | None = None  # of singles: rows, slots, positions
        if singles and triton_blocks.runs_on(pool.device):
            of_singles = [[segment.start, segment.slot, segment.past] for segment in singles]
            rows, slots, past = torch.tensor(of_singles).T.contiguous().to(pool.device)
            self._tokens, singles = (rows, slots, past), []
        self._runs = _runs(singles, pool.stride, pool.device)
        positions = [position for s in segments for position in range(s.past, s.past + s.tokens)]
        slots = [s.slot for s in segments for _ in range(s.tokens)]
        self.pos_N, self._slot_N = torch.tensor(positions, device=pool.device), torch.tensor(slots, device=pool.device)
        self._places: dict[int, Tensor] = {}

    def attend(self, layer: int, query_NHD: Tensor, key_NGD: Tensor, value_NGD: Tensor, scores: Scores) -> Tensor:
        """Store the step's keys and values in `layer`, then attend; (N, H, D).

        Rows after the step's tokens, which fill it up, stay out of it: zeros.
        """
        tokens, heads = len(self.pos_N), key_NGD.shape[1]
        out_NHD = torch.empty_like(query_NHD)
        if len(query_NHD) > tokens:
            out_NHD[tokens:] = 0
        if heads not in self._places:
            self._places[heads] = self.pool.places(heads, self._slot_N, self.pos_N)
        self.pool.write(layer, self._places[heads], key_NGD[:tokens], value_NGD[:tokens])
        for segment in self._prompts:
            keys, values = self.pool.read(layer, segment.slot, segment.past + segment.tokens)
            rows = slice(segment.start, segment.start + segment.tokens)
            out_NHD[rows] = _many(query_NHD[rows], keys, values, segment.past, scores)
        if self._tokens is not None:
            rows_B, slot_B, pos_B = self._tokens
            matrices = self.pool.matrices(layer)
            out_NHD[rows_B] = triton_attention.attend(query_NHD[rows_B], *matrices, slot_B, pos_B, scores)
        for run in self._runs:
            if scores.cap is not None or (scores.window is not None and scores.window < run.length):
                for slot, start, _, past in run.segments:
                    keys, values = self.pool.read(layer, slot, past + 1)
                    out_NHD[start] = _one(query_NHD[start], keys, values, scores)
            else:
                keys, values = self.pool.read_slots(layer, run.first, run.count, run.length)
                out_NHD[run.rows] = _together(query_NHD[run.rows], keys, values, run.mask(query_NHD.dtype), scores)
        return out_NHD


def _together(query_BHD: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """One query each against (B, G, L, D) keys and values; (B, H, D).

    The heads of a group are filled up to 2, 4, 8, ...: with other numbers the sums of float32 depend on which thread
    makes them, and so on how many requests share the call.
    """
    tokens, heads, width = query_BHD.shape
    folded = query_BHD.reshape(tokens, keys.shape[1], -1, width)
    own = folded.shape[2]
    if more := max(2, 1 << (own - 1).bit_length()) - own:
        folded = F.pad(folded, (0, 0, 0, more))
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scores.scale)
    return out[:, :, :own].reshape(tokens, heads, width)


def _one(query_HD: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
    """A query against (G, L, D) keys and values, as far as it sees; (H, D)."""
    if scores.window is not None:
        keys, values = keys[:, -scores.window :], values[:, -scores.window :]
    heads, width = query_HD.shape
    folded = query_HD.reshape(1, keys.shape[0], -1, width)
    if scores.cap is not None:
        return _capped(folded, keys[None], values[None], None, scores).reshape(heads, width)
    return F.scaled_dot_product_attention(folded, keys[None], values[None], scale=scores.scale).reshape(heads, width)


def _many(query_SHD: Tensor, keys: Tensor, values: Tensor, past: int, scores: Scores) -> Tensor:
    tokens, length = len(query_SHD), keys.shape[1]
    mask: Any = None
    if scores.cap is not None or (scores.window is not None and length > scores.window):
        key = torch.arange(length, device=keys.device)
        query = key[past:, None]
        mask = (key <= query) & (key > query - (scores.window or length))
    elif past:
        mask = causal_lower_right(tokens, length)
    if scores.cap is not None:
        groups = len(query_SHD[0]) // len(keys)
        keys, values = (x.repeat_interleave(groups, 0) for x in (keys, values))
        return _capped(query_SHD.transpose(0, 1), keys, values, mask, scores).transpose(0, 1)
    out = F.scaled_dot_product_attention(
        query_SHD.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scores.scale,
        enable_gqa=query_SHD.shape[1] != keys.shape[0],
    )
    return out[0].transpose(0, 1)


def _capped(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """Scores squeezed into -cap..cap before the softmax (Gemma 2); no fused kernel does that on CPUs."""
    assert scores.cap is not None
    weights = scores.cap * torch.tanh(query @ keys.transpose(-1, -2) * scores.scale / scores.cap)
    if mask is not None:
        weights = weights.masked_fill(~mask, -torch.inf)
    return weights.softmax(-1, dtype=torch.float32).to(query.dtype) @ values


current: Current[RaggedAttention | TokenAttention] = Current()
"""The step that runs; transformers' interface has no argument for it."""

KNOWN = frozenset(
    {
        "sliding_window",
        "position_ids",
        "use_cache",
        "is_causal",
        "cache_position",
        "past_key_values",
        "output_router_logits",
    }
)


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: (1, H, N, D) and (1, G, N, D) -> (1, N, H, D).

    Raises MoesaicError for what this attention does not know (sinks, biases): the answer would be wrong.
    """
    step = current.value
    if step is None:
        raise MoesaicError(f"{NAME} attention runs inside the serving engine only")
    if unknown := [name for name, given in kwargs.items() if given is not None and name not in KNOWN]:
        raise MoesaicError(f"{type(module).__name__} asks for {', '.join(unknown)}, which serving does not support yet")
    layer: Any = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query_NHD, key_NGD, value_NGD = (x[0].transpose(0, 1) for x in (query, key, value))
    scores = Scores(scale, sliding_window, softcap)
    return step.attend(layer, query_NHD.contiguous(), key_NGD, value_NGD, scores)[None], None


def register() -> None:
    """Make the implementation known to transformers; no mask is ever built, each request attends to its own keys."""
    no_mask: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, no_mask)
