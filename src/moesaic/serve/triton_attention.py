"""Attention of single tokens on a GPU: each sees the keys of its own slot, all requests in one call.

The keys of a slot are split into parts that programs read side by side; a second kernel puts the parts together (the
split of flash-decoding). Where parts begin depends on the slot's size alone, never on the batch, so a token's result
does not either. Slots and positions lie on the device: nothing waits for it, and a captured graph replays with others.
Shapes: B tokens, H query heads, G key-value heads, D head width, T rows of a slot, P parts of a slot.
"""

# Kernels are read by triton's compiler, which knows arrays and `tl` only: no types, no checks, no early exits.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moesaic.experts import triton_blocks
from moesaic.experts.triton_kernels import compiler

if TYPE_CHECKING:
    import triton.language as tl

PART = 256  # keys that one program reads, more where a slot would take over MOST_PARTS programs
MOST_PARTS = 64
TILE = 16 * 1024  # bytes of keys that one product takes; two of keys and of values are under way: 64 KiB


Pair = tuple[Tensor, Tensor]


class Sizes(NamedTuple):
    """What the kernels are compiled for."""

    heads: int  # H
    groups: int  # G
    folded: int  # H / G, as a power of two of at least 16
    width: int  # D
    padded: int  # D as a power of two
    rows: int  # T
    part: int
    parts: int  # P
    block: int
    window: int  # keys a token sees, itself among them; 0 = all
    widen: bool  # the interpreter multiplies no bfloat16


def attend(query_BHD: Tensor, keys: Tensor, values: Tensor, slot_B: Tensor, pos_B: Tensor, scores: Any) -> Tensor:
    """(B, H, D): each token against keys and values (S, G, T, D) of its slot, up to its own position.

    scores: scale, window and cap, see `serve.attention.Scores`.
    """
    tokens, heads, width = query_BHD.shape
    _, groups, rows, _ = keys.shape
    padded = max(16, 1 << (width - 1).bit_length())
    block = block_of(padded, keys.element_size())
    part = max(PART, -(-rows // MOST_PARTS // block) * block)
    sizes = Sizes(
        heads=heads,
        groups=groups,
        folded=max(16, 1 << (heads // groups - 1).bit_length()),
        width=width,
        padded=padded,
        rows=rows,
        part=part,
        parts=-(-rows // part),
        block=block,
        window=scores.window or 0,
        widen=triton_blocks.interpreted(),
    )
    launch = _kernels()
    sums = torch.empty(tokens, heads, sizes.parts, width, dtype=torch.float32, device=query_BHD.device)
    tops, totals = torch.empty(2, tokens, heads, sizes.parts, dtype=torch.float32, device=query_BHD.device)
    out_BHD = torch.empty_like(query_BHD)
    cap = 0.0 if scores.cap is None else float(scores.cap)
    with torch.cuda.device_of(query_BHD):
        launch["attend_part"][(tokens * groups, sizes.parts)](
            query_BHD, keys, values, slot_B, pos_B, (sums, tops, totals), scores.scale, cap, SIZES=sizes
        )
        launch["attend_whole"][(tokens * heads,)]((sums, tops, totals), pos_B, out_BHD, SIZES=sizes)
    return out_BHD


def block_of(padded: int, item: int) -> int:
    """Keys of one product, of that many numbers of so many bytes."""
    return max(16, min(64, TILE // (padded * item)))


def place(qkv_BAD: Tensor, heads: int, angles: Pair, matrices: Pair, where: Pair) -> Tensor:
    """Rotate queries and keys, and put keys and values where they belong; the queries (B, H, D).

    qkv_BAD:  queries, keys and values of each token, A = H + 2 G. angles: cos and sin, (1, B, D) each.
    matrices: keys and values, (S, G, T, D) each. where: slots and positions, (B,) each.
    """
    tokens, _, width = qkv_BAD.shape
    _, groups, rows, _ = matrices[0].shape
    query_BHD = torch.empty(tokens, heads, width, dtype=qkv_BAD.dtype, device=qkv_BAD.device)
    cosine, sine = (angle.contiguous() for angle in angles)
    with torch.cuda.device_of(query_BHD):
        _kernels()["place_token"][(tokens, heads + 2 * groups)](
            qkv_BAD.contiguous(),
            (cosine, sine),
            where,
            query_BHD,
            matrices,
            rows,
            HEADS=heads,
            GROUPS=groups,
            HALF=width // 2,
            PADDED=max(16, 1 << (width // 2 - 1).bit_length()),
        )
    return query_BHD


@cache
def _kernels() -> dict[str, Any]:
    return compiler(globals(), helpers=(), kernels=(place_token, attend_part, attend_whole))


def place_token(
    qkv, angles, where, query, matrices, rows, HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """One head of a token: (one, two) cos + (-two, one) sin, as it came for values, to where it belongs."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    cosine, sine = angles
    slot_B, pos_B = where
    keys, values = matrices
    column = tl.arange(0, PADDED)
    inside = column < HALF
    at = qkv + (token * (HEADS + 2 * GROUPS) + head) * 2 * HALF + column
    one = tl.load(at, mask=inside, other=0.0)
    two = tl.load(at + HALF, mask=inside, other=0.0)
    if head < HEADS + GROUPS:
        angle = token * 2 * HALF + column
        cos_one = tl.load(cosine + angle, mask=inside, other=0.0).to(tl.float32)
        cos_two = tl.load(cosine + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        sin_one = tl.load(sine + angle, mask=inside, other=0.0).to(tl.float32)
        sin_two = tl.load(sine + angle + HALF, mask=inside, other=0.0).to(tl.float32)
        wide_one = one.to(tl.float32)
        wide_two = two.to(tl.float32)
        one = (wide_one * cos_one - wide_two * sin_one).to(one.dtype)
        two = (wide_two * cos_two + wide_one * sin_two).to(two.dtype)
    if head < HEADS:
        to = query + (token * HEADS + head) * 2 * HALF + column
        tl.store(to, one, mask=inside)
        tl.store(to + HALF, two, mask=inside)
    else:
        group = (head - HEADS) % GROUPS
        row = (tl.load(slot_B + token).to(tl.int64) * GROUPS + group) * rows + tl.load(pos_B + token)
        if head < HEADS + GROUPS:
            tl.store(keys + row * 2 * HALF + column, one, mask=inside)
            tl.store(keys + row * 2 * HALF + HALF + column, two, mask=inside)
        else:
            tl.store(values + row * 2 * HALF + column, one, mask=inside)
            tl.store(values + row * 2 * HALF + HALF + column, two, mask=inside)


def attend_part(query, keys, values, slot_B, pos_B, found, scale, cap, SIZES: tl.constexpr):
    """Of one token and the heads that share keys: weighted values (D) of one part, its top score and sum of weights."""
    ROWS: tl.constexpr = SIZES.rows
    WIDTH: tl.constexpr = SIZES.width
    PART_KEYS: tl.constexpr = SIZES.part
    PARTS: tl.constexpr = SIZES.parts
    KEYS: tl.constexpr = SIZES.block
    WINDOW: tl.constexpr = SIZES.window
    GROUPS: tl.constexpr = SIZES.groups
    HEADS: tl.constexpr = SIZES.heads
    SHARED: tl.constexpr = SIZES.heads // SIZES.groups
    FOLDED: tl.constexpr = SIZES.folded
    PADDED: tl.constexpr = SIZES.padded
    WIDEN: tl.constexpr = SIZES.widen
    sums, tops, totals = found
    token = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    part = tl.program_id(1)
    end = tl.load(pos_B + token).to(tl.int32) + 1
    begin = tl.maximum(end - WINDOW, 0) if WINDOW > 0 else 0
    first = part * PART_KEYS
    last = tl.minimum(first + PART_KEYS, end)
    head = tl.arange(0, FOLDED)
    real_H = head < SHARED
    place = (token * HEADS + group * SHARED + head) * PARTS + part
    if (last <= first) | (last <= begin):
        tl.store(tops + place, tl.full((FOLDED,), float("-inf"), tl.float32), mask=real_H)
        tl.store(totals + place, tl.zeros((FOLDED,), dtype=tl.float32), mask=real_H)
    else:
        column = tl.arange(0, PADDED)
        inside = column < WIDTH
        head_at = (token * HEADS + group * SHARED + head) * WIDTH
        query_HD = tl.load(
            query + head_at[:, None] + column[None, :], mask=real_H[:, None] & inside[None, :], other=0.0
        )
        if WIDEN:
            query_HD = query_HD.to(tl.float32)
        rows = (tl.load(slot_B + token).to(tl.int64) * GROUPS + group) * ROWS
        top_H = tl.full((FOLDED,), float("-inf"), tl.float32)
        total_H = tl.zeros((FOLDED,), dtype=tl.float32)
        sum_HD = tl.zeros((FOLDED, PADDED), dtype=tl.float32)
        for start in range(first, last, KEYS):
            key = start + tl.arange(0, KEYS)
            seen = (key < last) & (key >= begin)
            at = (rows + key)[:, None] * WIDTH + column[None, :]
            here = seen[:, None] & inside[None, :]
            key_KD = tl.load(keys + at, mask=here, other=0.0)
            value_KD = tl.load(values + at, mask=here, other=0.0)
            if WIDEN:
                key_KD = key_KD.to(tl.float32)
                value_KD = value_KD.to(tl.float32)
            score_HK = tl.dot(query_HD, tl.trans(key_KD), input_precision="ieee") * scale
            if cap > 0:  # cap tanh(score / cap), by 1 + tanh(v) = 2 sigmoid(2 v)
                score_HK = cap * (2.0 * tl.sigmoid(2.0 * score_HK / cap) - 1.0)
            score_HK = tl.where(seen[None, :], score_HK, float("-inf"))
            new_H = tl.maximum(top_H, tl.max(score_HK, axis=1))
            safe_H = tl.where(new_H == float("-inf"), 0.0, new_H)
            weight_HK = tl.exp(score_HK - safe_H[:, None])
            keep_H = tl.exp(top_H - safe_H)
            total_H = total_H * keep_H + tl.sum(weight_HK, axis=1)
            sum_HD = sum_HD * keep_H[:, None]
            sum_HD = tl.dot(weight_HK.to(value_KD.dtype), value_KD, sum_HD, input_precision="ieee")
            top_H = new_H
        tl.store(tops + place, top_H, mask=real_H)
        tl.store(totals + place, total_H, mask=real_H)
        tl.store(sums + place[:, None] * WIDTH + column[None, :], sum_HD, mask=real_H[:, None] & inside[None, :])


def attend_whole(found, pos_B, out, SIZES: tl.constexpr):
    """One head of a token: the parts that hold keys it sees, put together."""
    WIDTH: tl.constexpr = SIZES.width
    PARTS: tl.constexpr = SIZES.parts
    PART_KEYS: tl.constexpr = SIZES.part
    PADDED: tl.constexpr = SIZES.padded
    HEADS: tl.constexpr = SIZES.heads
    sums, tops, totals = found
    place = tl.program_id(0)
    end = tl.load(pos_B + place // HEADS).to(tl.int32) + 1
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    sum_D = tl.zeros((PADDED,), dtype=tl.float32)
    for part in range(0, tl.cdiv(end, PART_KEYS)):
        at = place * PARTS + part
        part_total = tl.load(totals + at)
        if part_total > 0:
            part_top = tl.load(tops + at)
            new = tl.maximum(top, part_top)
            keep = tl.exp(top - new)
            add = tl.exp(part_top - new)
            part_D = tl.load(sums + at * WIDTH + column, mask=inside, other=0.0)
            sum_D = sum_D * keep + part_D * add
            total = total * keep + part_total * add
            top = new
    tl.store(out + place * WIDTH + column, (sum_D / total).to(out.dtype.element_ty), mask=inside)
