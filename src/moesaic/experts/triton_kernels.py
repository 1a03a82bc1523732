"""The Triton kernels of channel blocks, as plain functions until `kernels()` compiles them: triton is an extra.

Sums are float32 and run in one fixed order; nothing is added atomically, so results repeat bit for bit.
Shapes: N tokens, D model width, W stored channels, C channels of a tile. Every weight row is one channel, D numbers in
a row, so gathering an expert's channels costs no more than reading a contiguous run of them.
"""

# Kernels are read by triton's compiler, which knows arrays and `tl` only: no types, no checks, no early exits.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from moesaic.errors import MissingExtraError

if TYPE_CHECKING:
    import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared")


class Tiling(NamedTuple):
    """What a kernel is compiled for."""

    width: int  # D
    tokens: int  # rows of a tile, a power of two of at least 16, as the other tile sizes
    channels: int  # C
    step: int  # numbers of D that one product of gate and up takes
    columns: int  # of D that one program of the down projection computes
    activation: str  # one of ACTIVATIONS
    widen: bool  # the interpreter multiplies no bfloat16


def compiler(names: dict[str, Any], helpers: Sequence[Any], kernels: Sequence[Any]) -> dict[str, Any]:
    """Kernels by name, to be launched as `found[name][grid](...)`; they compile on their first launch.

    names: globals of the module they are in, where they and their helpers look names up.

    Raises MissingExtraError if triton is not installed.
    """
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise MissingExtraError("triton", "gpu") from error
    names["tl"] = triton.language
    for helper in helpers:
        names[helper.__name__] = triton.jit(helper)
    return {kernel.__name__: triton.jit(kernel) for kernel in kernels}


@cache
def kernels() -> dict[str, Any]:
    """The kernels of this module. Raises MissingExtraError if triton is not installed."""
    helpers = _product, _activated, _hidden
    launched = decode_hidden, decode_down, decode_sum, token_part, prefill_hidden, prefill_down
    return compiler(globals(), helpers, launched)


def _product(a, b, total, TILING: tl.constexpr):
    """The sum `total` and one product more."""
    if TILING.widen:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


def _activated(z, KIND: tl.constexpr):
    if KIND == "silu":
        z = z * tl.sigmoid(z)
    elif KIND == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # 1 + tanh(v) = 2 sigmoid(2 v)
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif KIND == "quick_gelu":
        z = z * tl.sigmoid(1.702 * z)
    elif KIND == "relu":
        z = tl.maximum(z, 0.0)
    else:
        tl.static_assert(KIND == "relu_squared")
        z = tl.maximum(z, 0.0) * tl.maximum(z, 0.0)
    return z


def _hidden(x, ffn, token_N, real_N, channel_C, real_C, TILING: tl.constexpr):
    """(N, C) float32: act(gate x) * up x of these tokens and channels, or act(up x) without a gate."""
    WIDTH: tl.constexpr = TILING.width
    STEP: tl.constexpr = TILING.step
    CHANNELS: tl.constexpr = TILING.channels
    TOKENS: tl.constexpr = TILING.tokens
    KIND: tl.constexpr = TILING.activation
    gate, up, gate_bias, up_bias = ffn
    gate_NC = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    up_NC = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    x_N = token_N.to(tl.int64)[:, None] * WIDTH
    row_C = channel_C.to(tl.int64)[None, :] * WIDTH
    for first in range(0, WIDTH, STEP):
        column = first + tl.arange(0, STEP)
        inside = column < WIDTH
        here_ND = real_N[:, None] & inside[None, :]
        here_DC = inside[:, None] & real_C[None, :]
        x_ND = tl.load(x + x_N + column[None, :], mask=here_ND, other=0.0)
        up_DC = tl.load(up + row_C + column[:, None], mask=here_DC, other=0.0)
        up_NC = _product(x_ND, up_DC, up_NC, TILING)
        if gate is not None:
            gate_DC = tl.load(gate + row_C + column[:, None], mask=here_DC, other=0.0)
            gate_NC = _product(x_ND, gate_DC, gate_NC, TILING)
    if up_bias is not None:
        up_NC += tl.load(up_bias + channel_C, mask=real_C, other=0.0).to(tl.float32)[None, :]
    if gate_bias is not None:
        gate_NC += tl.load(gate_bias + channel_C, mask=real_C, other=0.0).to(tl.float32)[None, :]
    return _activated(up_NC, KIND) if gate is None else _activated(gate_NC, KIND) * up_NC


def decode_hidden(x, ffn, rows, mask, expert, hidden, live, N, W, TILING: tl.constexpr):
    """Hidden activations (N, W) of all tokens, one program a tile of channels, of which only those in use are read.

    rows: (W,) where each channel lies in gate, up and down; None = in order. mask: (E, W) uint8.
    live: (W,) uint8, whether a token's expert owns the channel; activations of a tile without any are not written.
    """
    CHANNELS: tl.constexpr = TILING.channels
    TOKENS: tl.constexpr = TILING.tokens
    tile = tl.program_id(0)
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    token = tl.arange(0, TOKENS)
    real_N = token < N
    real_C = channel < W
    expert_N = tl.load(expert + token, mask=real_N, other=0)
    here = real_N[:, None] & real_C[None, :]
    owned = tl.load(mask + expert_N[:, None] * W + channel[None, :], mask=here, other=0).to(tl.int32)
    wanted_C = tl.max(owned, axis=0)
    tl.store(live + channel, wanted_C.to(tl.uint8), mask=real_C)
    if tl.max(wanted_C, axis=0) > 0:
        row = channel if rows is None else tl.load(rows + channel, mask=real_C, other=0)
        h_NC = _hidden(x, ffn, token, real_N, row, wanted_C > 0, TILING)
        h_NC = tl.where(owned > 0, h_NC, 0.0)
        tl.store(hidden + token[:, None] * W + channel[None, :], h_NC.to(hidden.dtype.element_ty), mask=here)


def decode_down(hidden, down, rows, live, partial, N, W, TILING: tl.constexpr):
    """Partial sums (splits, N, D) float32: one program takes some columns of D and every `splits`-th tile of channels.

    So each has its share of those in use, which lie side by side.
    """
    WIDTH: tl.constexpr = TILING.width
    COLUMNS: tl.constexpr = TILING.columns
    CHANNELS: tl.constexpr = TILING.channels
    TOKENS: tl.constexpr = TILING.tokens
    split = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    token = tl.arange(0, TOKENS)
    real_N = token < N
    sum_ND = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for tile in range(split, tl.cdiv(W, CHANNELS), tl.num_programs(1)):
        # Masked, not skipped: a branch would keep the loads of the next tiles from being under way.
        channel = tile * CHANNELS + tl.arange(0, CHANNELS)
        real_C = channel < W
        live_C = tl.load(live + channel, mask=real_C, other=0) > 0
        row = channel if rows is None else tl.load(rows + channel, mask=live_C, other=0)
        h_at = hidden + token[:, None] * W + channel[None, :]
        h_NC = tl.load(h_at, mask=real_N[:, None] & real_C[None, :], other=0.0)
        h_NC = tl.where(live_C[None, :], h_NC, 0.0)  # not in the mask of the load, which would be a number at a time
        d_at = down + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        down_CD = tl.load(d_at, mask=live_C[:, None] & inside[None, :], other=0.0)
        sum_ND = _product(h_NC, down_CD, sum_ND, TILING)
    at = partial + (split * N + token)[:, None] * WIDTH + column[None, :]
    tl.store(at, sum_ND, mask=real_N[:, None] & inside[None, :])


def decode_sum(partial, y, splits, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of partial (splits, size) over its splits, at most SPLITS, all of which are read at once."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    real = at < size
    here = (split < splits)[:, None] & real[None, :]
    parts = tl.load(partial + split[:, None] * size + at[None, :], mask=here, other=0.0)
    tl.store(y + at, tl.sum(parts, axis=0).to(y.dtype.element_ty), mask=real)


def token_part(x, ffn, down, rows, owned, expert, partial, TILING: tl.constexpr):
    """Partial sums (programs, D) float32 of a single token: one program takes every so many-th tile of its channels.

    Whole rows are read, those of `down` before they are needed: as many bytes as can be are under way.
    """
    WIDTH: tl.constexpr = TILING.width
    COLUMNS: tl.constexpr = TILING.columns  # D as a power of two
    CHANNELS: tl.constexpr = TILING.channels
    KIND: tl.constexpr = TILING.activation
    gate, up, gate_bias, up_bias = ffn
    channels, begin_E = owned
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    own = tl.load(expert)
    begin = tl.load(begin_E + own)
    width = tl.load(begin_E + own + 1) - begin
    x_D = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    sum_D = tl.zeros((COLUMNS,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(width, CHANNELS), tl.num_programs(0)):
        place = tile * CHANNELS + tl.arange(0, CHANNELS)
        real_C = place < width
        row_C = tl.load(channels + begin + place, mask=real_C, other=0)
        if rows is not None:
            row_C = tl.load(rows + row_C)
        at = row_C.to(tl.int64)[:, None] * WIDTH + column[None, :]
        here = real_C[:, None] & inside[None, :]
        up_CD = tl.load(up + at, mask=here, other=0.0)
        if gate is not None:
            gate_CD = tl.load(gate + at, mask=here, other=0.0)
        down_CD = tl.load(down + at, mask=here, other=0.0)
        h_C = tl.sum(up_CD.to(tl.float32) * x_D[None, :], axis=1)
        if up_bias is not None:
            h_C += tl.load(up_bias + row_C, mask=real_C, other=0.0).to(tl.float32)
        if gate is None:
            h_C = _activated(h_C, KIND)
        else:
            gate_C = tl.sum(gate_CD.to(tl.float32) * x_D[None, :], axis=1)
            if gate_bias is not None:
                gate_C += tl.load(gate_bias + row_C, mask=real_C, other=0.0).to(tl.float32)
            h_C = _activated(gate_C, KIND) * h_C
        h_C = tl.where(real_C, h_C, 0.0).to(x.dtype.element_ty).to(tl.float32)
        sum_D += tl.sum(h_C[:, None] * down_CD.to(tl.float32), axis=0)
    tl.store(partial + tl.program_id(0) * WIDTH + column, sum_D, mask=inside)


def prefill_hidden(x, ffn, rows, order, tiles, owned, hidden, stride, TILING: tl.constexpr):
    """Hidden activations (N, stride), rows sorted by expert, columns the expert's own channels in stored order.

    The last tile of an expert's channels is filled up with zeros, for which `stride` has room.

    order: (N,) token of each row. tiles: three (T,): expert, first and last row (exclusive) of tokens of one expert.
    owned: the experts' channels one after another, and where each expert's begin, with one more for the end.
    rows: (W,) where each channel lies in the matrices; None = in order.
    """
    CHANNELS: tl.constexpr = TILING.channels
    TOKENS: tl.constexpr = TILING.tokens
    expert_T, start_T, stop_T = tiles
    channels, begin_E = owned
    tile = tl.program_id(0)
    expert = tl.load(expert_T + tile)
    begin = tl.load(begin_E + expert)
    width = tl.load(begin_E + expert + 1) - begin
    first = tl.program_id(1) * CHANNELS
    if first < width:
        row = tl.load(start_T + tile) + tl.arange(0, TOKENS)
        real_N = row < tl.load(stop_T + tile)
        token = tl.load(order + row, mask=real_N, other=0)
        place = first + tl.arange(0, CHANNELS)
        real_C = place < width
        channel = tl.load(channels + begin + place, mask=real_C, other=0)
        if rows is not None:
            channel = tl.load(rows + channel)
        h_NC = _hidden(x, ffn, token, real_N, channel, real_C, TILING).to(hidden.dtype.element_ty)
        at = hidden + row.to(tl.int64)[:, None] * stride + place[None, :]
        tl.store(at, h_NC, mask=real_N[:, None])


def prefill_down(hidden, down, rows, order, tiles, owned, y, stride, TILING: tl.constexpr):
    """y (N, D) in token order, from `hidden` as prefill_hidden leaves it."""
    WIDTH: tl.constexpr = TILING.width
    COLUMNS: tl.constexpr = TILING.columns
    CHANNELS: tl.constexpr = TILING.channels
    TOKENS: tl.constexpr = TILING.tokens
    expert_T, start_T, stop_T = tiles
    channels, begin_E = owned
    tile = tl.program_id(0)
    expert = tl.load(expert_T + tile)
    begin = tl.load(begin_E + expert)
    width = tl.load(begin_E + expert + 1) - begin
    row = tl.load(start_T + tile) + tl.arange(0, TOKENS)
    real_N = row < tl.load(stop_T + tile)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    h_N = row.to(tl.int64)[:, None] * stride
    sum_ND = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for first in range(0, width, CHANNELS):
        place = first + tl.arange(0, CHANNELS)
        real_C = place < width
        channel = tl.load(channels + begin + place, mask=real_C, other=0)
        if rows is not None:
            channel = tl.load(rows + channel)
        h_NC = tl.load(hidden + h_N + place[None, :], mask=real_N[:, None], other=0.0)
        d_at = down + channel.to(tl.int64)[:, None] * WIDTH + column[None, :]
        down_CD = tl.load(d_at, mask=real_C[:, None] & inside[None, :], other=0.0)
        sum_ND = _product(h_NC, down_CD, sum_ND, TILING)
    token = tl.load(order + row, mask=real_N, other=0).to(tl.int64)
    at = y + token[:, None] * WIDTH + column[None, :]
    tl.store(at, sum_ND.to(y.dtype.element_ty), mask=real_N[:, None] & inside[None, :])
