"""Time the backends of a layer's shape, cell by cell, for the table of `tuning.py`.

Runs on layers as they are, several in turn where one would stay in the processor's cache. Sides rotate within rounds,
medians over rounds count, and what is far behind after its first run is not run again.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from moesaic.experts.backends import BACKENDS
from moesaic.experts.bank import FFNBank
from moesaic.experts.bank_backends import BANK_BACKENDS
from moesaic.experts.channel_blocks import ChannelBlocks, TokenGroups
from moesaic.experts.copies import own_bytes
from moesaic.experts.tuning import MOST_TOKENS, Cell

TOKENS = (1, 4, 8, 16, 32, 128, MOST_TOKENS)
CELL_SECONDS = 0.05  # of one cell, about; a cell of long calls takes four calls of each side
ROTATE_BYTES = 96 * 2**20  # of weights that take turns: several times a last-level cache
COPIES_BYTES = 2**30  # that may be made to measure, all layers together; they are let go afterwards
FAR_BEHIND = 2.0
DISTURBED = 1.5  # median over fastest: on an idle machine they are within a fifth of each other
TRIES = 3

Layer = ChannelBlocks | FFNBank
Side = Callable[[], object]


def cells(experts: int, whole: bool = False) -> list[Cell]:
    """What is measured: numbers of tokens, each at one expert, at half of them, and at all."""
    levels = {1} if whole else {1, max(1, experts // 2), experts}
    return [(tokens, used) for tokens in TOKENS for used in sorted(levels) if used <= tokens]


def rotation(layers: Sequence[Layer]) -> list[Layer]:
    """As many of the layers as it takes to fill the processor's cache a few times."""
    chosen, size = [], 0
    for layer in layers:
        chosen.append(layer)
        size += own_bytes(layer)
        if size >= ROTATE_BYTES:
            break
    return chosen


@contextmanager
def unlimited(layers: Sequence[Layer]) -> Iterator[None]:
    """Copies of any size inside the block; none are left after it."""
    limits = [layer.copies.limit for layer in layers]
    try:
        for layer in layers:
            layer.copies.limit = None
        yield
    finally:
        for layer, limit in zip(layers, limits, strict=True):
            layer.copies.limit = limit
            layer.copies.clear()


@torch.no_grad()
def measure(layers: Sequence[Layer], cell: Cell) -> tuple[dict[str, float], bool]:
    """Microseconds of a layer by backend, the simplest first; False if other programs disturbed every try.

    Layers are all blocks or all banks, of one shape.
    """
    tokens, used = cell
    generator = torch.Generator().manual_seed(tokens)
    expert_N = torch.randint(used, (tokens,), generator=generator)
    expert_N[:used] = torch.arange(used)  # each has a token
    first = layers[0]
    weight = first.up if isinstance(first, ChannelBlocks) else first.down
    width = first.up.shape[1] if isinstance(first, ChannelBlocks) else first.width
    x_ND = torch.randn(tokens, width, generator=generator).to(weight.dtype)
    blocks = [layer for layer in layers if isinstance(layer, ChannelBlocks)]
    banks = [layer for layer in layers if isinstance(layer, FFNBank)]
    sides = _block_sides(blocks, x_ND, expert_N, used) if blocks else _bank_sides(banks, x_ND, expert_N)
    for _ in range(TRIES):
        found, disturbed = times(sides, CELL_SECONDS)
        if not disturbed:
            break
    return {name: 1e6 * seconds / len(layers) for name, seconds in found.items()}, not disturbed


def _block_sides(layers: Sequence[ChannelBlocks], x_ND: Tensor, expert_N: Tensor, used: int) -> dict[str, Side]:
    groups, experts = TokenGroups(expert_N), range(used)
    sides: dict[str, Side] = {}
    for name, backend in BACKENDS.items():
        extra = sum(backend.extra_bytes(blocks, experts) for blocks in layers)
        if extra <= COPIES_BYTES and all(backend.suits(blocks) for blocks in layers):
            sides[name] = partial(_run, [partial(backend.path, blocks, x_ND, groups) for blocks in layers])
    return sides


def _bank_sides(layers: Sequence[FFNBank], x_ND: Tensor, expert_N: Tensor) -> dict[str, Side]:
    counts = torch.bincount(expert_N, minlength=layers[0].experts).tolist()
    sides: dict[str, Side] = {}
    for name, backend in BANK_BACKENDS.items():
        extra = sum(sum(bank.expert_bytes) for bank in layers) if backend.copies else 0
        if extra <= COPIES_BYTES and all(backend.suits(bank) for bank in layers):
            sides[name] = partial(_run, [partial(backend.path, bank, x_ND, counts) for bank in layers])
    return sides


def _run(calls: Sequence[Side]) -> None:
    for call in calls:
        call()


def times(sides: dict[str, Side], seconds: float) -> tuple[dict[str, float], bool]:
    """Median seconds of each side, after a run that makes its copies; whether something disturbed them."""
    for side in sides.values():
        side()
    trial = {name: min(_seconds(side), _seconds(side)) for name, side in sides.items()}
    fastest = min(trial.values())
    near = [name for name in sides if trial[name] <= FAR_BEHIND * fastest]
    rounds: dict[str, list[float]] = {name: [] for name in near}
    count = max(3, min(25, int(seconds / sum(trial[name] for name in near))))
    for number in range(count):
        for name in near[number % len(near) :] + near[: number % len(near)]:
            rounds[name].append(_seconds(sides[name]))
    disturbed = any(statistics.median(rounds[name]) > DISTURBED * min(rounds[name]) for name in near)
    found = {name: statistics.median(rounds[name]) if rounds.get(name) else trial[name] for name in sides}
    return found, disturbed


def _seconds(side: Side) -> float:
    start = time.perf_counter()
    side()
    return time.perf_counter() - start
