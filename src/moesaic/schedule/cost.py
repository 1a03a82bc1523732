"""Seconds: rooflines, links, layers with overlap and stalls; and the same from measured operator times.

op     t = max(flops / F, bytes / B)                            roofline (2409.01141, section VI)
layer  t = attention + max over units of their experts + collective + stall
Shapes: N measurements or token counts, E experts, U units.
"""

import csv
import math
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.errors import MoesaicError
from moesaic.schedule.topology import Link, Unit

Array = NDArray[np.float64]


def op_time(unit: Unit, flops: float, size: float) -> float:
    """Seconds of an operation that computes `flops` and reads and writes `size` bytes."""
    return max(flops / unit.flops, size / unit.bandwidth)


@dataclass(frozen=True)
class ExpertShape:
    """An FFN expert: `matrices` of (d, ffn) (3 when gated), `weight` bytes a parameter, `activation` bytes a number.

    Weights in 16 bits make flop per byte about the number of tokens: the reason why decode is bound by memory.
    """

    d: int
    ffn: int
    matrices: int = 3
    weight: float = 2.0
    activation: float = 2.0

    def __post_init__(self) -> None:
        if min(self.d, self.ffn, self.matrices) < 1 or min(self.weight, self.activation) <= 0:
            raise MoesaicError(f"{self}: every field must be above 0")

    @property
    def params(self) -> int:
        return self.matrices * self.d * self.ffn

    @property
    def bytes(self) -> float:
        """Of the weights: what a fetch moves and a run reads once."""
        return self.params * self.weight

    def flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.params

    def traffic(self, tokens: int) -> float:
        """Bytes of a run: the weights once, (m k + m n) numbers of each matrix; 0 for no token (2409.01141)."""
        return self.bytes + self.activation * tokens * self.matrices * (self.d + self.ffn) if tokens else 0.0


def expert_time(unit: Unit, shape: ExpertShape, tokens: int) -> float:
    """Seconds of one expert over `tokens` tokens; an expert without tokens is not run and costs 0."""
    if tokens < 0:
        raise MoesaicError(f"an expert cannot run {tokens} tokens")
    return op_time(unit, shape.flops(tokens), shape.traffic(tokens))


def expert_table(unit: Unit, shape: ExpertShape, most: int) -> Array:
    """`expert_time` of 0 to `most` tokens, (most + 1,)."""
    return np.array([expert_time(unit, shape, tokens) for tokens in range(most + 1)])


def move_time(link: Link, size: float, messages: int = 1) -> float:
    """Seconds to move `size` bytes in `messages` messages one after another; 0 for nothing."""
    return messages * link.latency + size / link.bandwidth if size else 0.0


def overlapped(comm: float, compute: float, chunks: int = 1, overhead: float = 0.0) -> float:
    """Seconds of communication and computation pipelined in `chunks` (Tutel, 2206.03382, section 3.2).

    The longer one, one chunk of the shorter that nothing hides, and `overhead` seconds for every further chunk.
    """
    if chunks < 1:
        raise MoesaicError(f"a pipeline has at least 1 chunk, not {chunks}")
    return max(comm, compute) + min(comm, compute) / chunks + (chunks - 1) * overhead


def best_chunks(
    comm: float, compute: float, overhead: float = 0.0, degrees: Sequence[int] = (1, 2, 4, 8)
) -> tuple[int, float]:
    """The overlap degree of least time, and that time; the smaller degree at a tie."""
    return min(((d, overlapped(comm, compute, d, overhead)) for d in degrees), key=lambda each: (each[1], each[0]))


def layer_time(
    attention: float, units: Sequence[float], collective: float = 0.0, stall: float = 0.0, chunks: int = 1
) -> float:
    """Seconds of a layer whose `units` run their experts at the same time; chunks > 1 pipelines the collective."""
    return attention + overlapped(collective, max(units, default=0.0), chunks) + stall


def stall_time(start: float, ready: Iterable[float]) -> float:
    """Seconds the layer waits at `start` for the experts it needs, each there from its `ready` on."""
    return max(0.0, max(ready, default=start) - start)


def never_stalls(misses: int, size: float, link: Link, layer: float, lookahead: int) -> bool:
    """Whether prefetching hides everything when every layer misses `misses` experts of `size` bytes.

    Their fetches are issued `lookahead` layers of `layer` seconds ahead and share one link. Two conditions: the link
    keeps up, misses (latency + size / bandwidth) <= layer; and the lead is long enough for the layer's own fetches.
    """
    fetch = misses * move_time(link, size)
    return misses == 0 or (fetch <= layer and fetch <= lookahead * layer)


@dataclass(frozen=True)
class Fit:
    """A unit's effective flop/s and bytes/s, and the root mean square of the relative error of the times."""

    flops: float
    bandwidth: float
    error: float

    def unit(self, name: str, tier: str) -> Unit:
        """The unit these numbers describe."""
        return Unit(name, self.flops, self.bandwidth, tier)


def fit_roofline(flops_N: ArrayLike, bytes_N: ArrayLike, seconds_N: ArrayLike) -> Fit:
    """F and B of t = max(flops / F, bytes / B) by least squares of the relative error.

    Compute-bound measurements are those of highest flop per byte, so every split of that order is tried; within a part
    the fit is linear in 1 / F (or 1 / B). A part without measurements gives the highest rate that was seen: a bound.
    Raises MoesaicError unless all are positive and of one length.
    """
    flops, size, seconds = (np.asarray(each, dtype=float).ravel() for each in (flops_N, bytes_N, seconds_N))
    if not len(flops) == len(size) == len(seconds) > 0:
        raise MoesaicError(
            f"a fit needs as many flops, bytes and seconds, not {len(flops)}, {len(size)}, {len(seconds)}"
        )
    if min(flops.min(), size.min(), seconds.min()) <= 0 or not np.isfinite(flops + size + seconds).all():
        raise MoesaicError("a fit needs positive finite flops, bytes and seconds in every measurement")
    order = np.argsort(flops / size, kind="stable")
    compute_N, memory_N = (flops / seconds)[order], (size / seconds)[order]
    fits = []
    for split in range(len(order) + 1):
        F = _rate(compute_N[split:]) if split < len(order) else compute_N.max()
        B = _rate(memory_N[:split]) if split else memory_N.max()
        error = np.sqrt(np.mean((np.maximum(compute_N / F, memory_N / B) - 1) ** 2))
        fits.append(Fit(float(F), float(B), float(error)))
    return min(fits, key=lambda fit: fit.error)


def _rate(rates_N: Array) -> float:
    """R that minimises sum (rate / R - 1)^2: the work at R over the time it took."""
    return float((rates_N**2).sum() / rates_N.sum())


@dataclass(frozen=True)
class OpTimes:
    """Measured seconds of operators by token count: `seconds[op]` belongs to `tokens`, which rises.

    Between measurements the time is interpolated, and never falls when tokens are added: noise that makes it fall is
    levelled (the mean of the running maximum from the left and the running minimum from the right). Below the least
    count the first time holds (launch-bound), above the greatest the mean slope of the upper half goes on.
    """

    tokens: Sequence[int]
    seconds: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        tokens = list(self.tokens)
        if not tokens or min(tokens) < 1 or any(b <= a for a, b in pairwise(tokens)):
            raise MoesaicError("operator times need rising token counts of at least 1")
        levelled = {}
        for op, times in self.seconds.items():
            t_N = np.asarray(times, dtype=float)
            if t_N.shape != (len(tokens),) or not np.isfinite(t_N).all() or t_N.min() < 0:
                raise MoesaicError(f"operator {op!r} needs {len(tokens)} times of at least 0, one for each token count")
            levelled[op] = tuple((_upper(t_N) + _lower(t_N)) / 2)
        object.__setattr__(self, "seconds", levelled)
        object.__setattr__(self, "tokens", tuple(tokens))

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(self.seconds)

    def time(self, op: str, tokens: int) -> float:
        """Seconds of an operator over `tokens` tokens; 0 for none. MoesaicError for an unknown operator."""
        if op not in self.seconds:
            raise MoesaicError(f"operator {op!r} was not measured; there are {', '.join(self.seconds)}")
        if tokens <= 0:
            return 0.0
        x, y = self.tokens, self.seconds[op]
        right = bisect_right(x, tokens)
        if right == 0:
            return float(y[0])
        if right == len(x):
            middle = len(x) // 2 if len(x) > 2 else 0
            slope = (y[-1] - y[middle]) / (x[-1] - x[middle]) if len(x) > 1 else 0.0
            return float(y[-1] + slope * (tokens - x[-1]))
        share = (tokens - x[right - 1]) / (x[right] - x[right - 1])
        return float(y[right - 1] + share * (y[right] - y[right - 1]))

    def total(self, ops: Iterable[str], tokens: int) -> float:
        """Seconds of operators one after another."""
        return sum(self.time(op, tokens) for op in ops)

    def table(self, ops: Sequence[str], most: int) -> Array:
        """`total` of 0 to `most` tokens, (most + 1,): what `split.coprocess` reads."""
        return np.array([self.total(ops, tokens) for tokens in range(most + 1)])


def _upper(t_N: Array) -> Array:
    return np.maximum.accumulate(t_N)


def _lower(t_N: Array) -> Array:
    return np.minimum.accumulate(t_N[::-1])[::-1]


def read_op_times(path: str | Path, gpu: str, tensor_parallel: int = 1) -> OpTimes:
    """Operator times of one GPU from a CSV of columns gpu, num_tokens, tensor_parallel, then one an operator, in ms.

    This is the layout of Vidur's profiles (2405.05465). Repeated measurements become their median. Raises MoesaicError
    for a missing column, a cell that is no number (with its line), or a GPU or degree the file does not have.
    """
    cells: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    seen: set[tuple[str, int]] = set()
    for line, row in _rows(Path(path)):
        where = f"{path}, line {line}"
        key = row["gpu"], int(_number(row["tensor_parallel"], "tensor_parallel", where))
        seen.add(key)
        if key == (gpu, tensor_parallel):
            tokens = int(_number(row["num_tokens"], "num_tokens", where))
            for op in row.keys() - KEYS:
                cells[tokens][op].append(_number(row[op], op, where) / 1e3)
    if not cells:
        there = ", ".join(f"{name} x{degree}" for name, degree in sorted(seen)) or "nothing"
        raise MoesaicError(f"{path} has no times of {gpu} at tensor_parallel {tensor_parallel}; it has {there}")
    tokens_N = sorted(cells)
    ops = sorted(cells[tokens_N[0]])
    return OpTimes(tokens_N, {op: [statistics.median(cells[tokens][op]) for tokens in tokens_N] for op in ops})


KEYS = {"gpu", "num_tokens", "tensor_parallel"}


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    if not path.is_file():
        raise MoesaicError(f"no file of operator times at {path}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = set(reader.fieldnames or ())
        if not names > KEYS:
            missing = ", ".join(sorted(KEYS - names)) or "an operator"
            raise MoesaicError(
                f"{path} lacks the column of {missing}; expected {', '.join(sorted(KEYS))} and operators"
            )
        for row in reader:
            yield reader.line_num, row


def _number(text: str | None, column: str, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise MoesaicError(f"{where}: {column} is {text!r}; expected a number of at least 0")
    return value
