"""Experts that follow each other on one device: placement by transition counts (ExFlow, 2401.08383, eq. 8-12).

Minimise sum over neighbouring layers j and experts a, b of C_j[a, b] [device_j(a) != device_{j+1}(b)], every device
holding E / P experts of every layer. R_{k,j} of eq. 11-12 depends on a token's pair of experts only, so the trace of N
tokens is first summed into the counts C: the same programme in size L E^2.

`affinity_assign` is the fast solver, `affinity_exact` proves optima, `affinity_bounds` bounds what no solver can reach.
Shapes: N tokens, K slots, L layers, E experts, P devices; counts_JEE has J = L - 1 layers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.errors import MissingExtraError, MoesaicError

Counts = NDArray[np.float64]
Devices = NDArray[np.int64]

EMPTY = -1  # an unused slot of a route


def optimizer() -> Any:
    """scipy.optimize; MissingExtraError without SciPy."""
    try:
        import scipy.optimize
    except ImportError:
        raise MissingExtraError("scipy", "train") from None
    return scipy.optimize


def transitions(routes: ArrayLike, experts: int, weight: ArrayLike | None = None) -> Counts:
    """Counts C_j[a, b] of tokens that use a in layer j and b in layer j + 1, (L - 1, E, E).

    routes: (N, L) or (N, L, K) expert ids, -1 an empty slot. weight: of the routes' shape; a pair counts as the product
    of its two weights (1 without weights), so top-2 routes are not cut to the first expert.
    Raises MoesaicError for other shapes, and ids outside range(experts).
    """
    index = np.asarray(routes)
    index = index[..., None] if index.ndim == 2 else index
    if index.ndim != 3 or not np.issubdtype(index.dtype, np.integer):
        raise MoesaicError(f"routes must be integers of shape (N, L) or (N, L, K), not {index.dtype} {index.shape}")
    if index.size and not (index.min() >= EMPTY and index.max() < experts):
        raise MoesaicError(f"routes name experts {index.min()} to {index.max()}, but there are 0 to {experts - 1}")
    gate = np.ones(index.shape) if weight is None else np.asarray(weight, dtype=float).reshape(index.shape)
    gate = np.where(index == EMPTY, 0.0, gate)
    counts = np.zeros((max(index.shape[1] - 1, 0), experts, experts))
    for j, count in enumerate(counts):
        for a in range(index.shape[2]):
            for b in range(index.shape[2]):
                used = (index[:, j, a] != EMPTY) & (index[:, j + 1, b] != EMPTY)
                pair = index[used, j, a].astype(np.int64) * experts + index[used, j + 1, b]
                mass = gate[used, j, a] * gate[used, j + 1, b]
                count += np.bincount(pair, mass, experts**2).reshape(experts, experts)
    return counts


def crossing(counts_JEE: Counts, device_LE: Devices) -> float:
    """Share of the transitions that change device, 0 to 1 (0 without transitions)."""
    total = float(counts_JEE.sum())
    return cost(counts_JEE, device_LE) / total if total else 0.0


def cost(counts_JEE: Counts, device_LE: Devices) -> float:
    """Weight of the transitions that change device: the objective, eq. 8."""
    return float(counts_JEE[device_LE[:-1, :, None] != device_LE[1:, None, :]].sum())


def check(counts_JEE: ArrayLike, devices: int) -> Counts:
    """The counts as floats; MoesaicError for a wrong shape, negative counts, or experts that `devices` cannot share."""
    counts = np.asarray(counts_JEE, dtype=float)
    if counts.ndim != 3 or counts.shape[1] != counts.shape[2] or not len(counts):
        raise MoesaicError(f"counts must have the shape (L - 1, E, E) with at least two layers, not {counts.shape}")
    if not np.isfinite(counts).all() or counts.min() < 0:
        raise MoesaicError("counts must be finite and at least 0")
    if devices < 1 or counts.shape[1] % devices:
        raise MoesaicError(f"{counts.shape[1]} experts a layer do not divide over {devices} devices")
    return counts


def balanced(device_LE: Devices, devices: int) -> bool:
    """Whether every device holds E / P experts of every layer (eq. 9)."""
    held_LP = np.stack([np.bincount(row, minlength=devices) for row in device_LE])
    return held_LP.shape[1] == devices and bool((held_LP == device_LE.shape[1] // devices).all())


def contiguous(layers: int, experts: int, devices: int) -> Devices:
    """The usual placement: expert e on device e // (E / P) in every layer, (L, E)."""
    return np.tile(np.arange(experts) // (experts // devices), (layers, 1))


@dataclass(frozen=True)
class Flow:
    """Where transitions go: shares that stay, move inside a node, move between nodes; and the busiest device pair.

    busiest: share of all transitions on the ordered pair of devices with most. All-to-all time follows it.
    """

    stay: float
    intra: float
    inter: float
    busiest: float


def flow(counts_JEE: Counts, device_LE: Devices, devices: int, per_node: int) -> Flow:
    """Traffic of a placement on counts it may not have been fitted to (score on other tokens than those profiled)."""
    load_PP = np.zeros((devices, devices))
    for count, here, there in zip(counts_JEE, device_LE[:-1], device_LE[1:], strict=True):
        np.add.at(load_PP, (here[:, None], there[None, :]), count)
    load_PP /= load_PP.sum() or 1.0
    node = np.arange(devices) // per_node
    same = node[:, None] == node[None, :]
    stay = float(np.trace(load_PP))
    moving = load_PP - np.diag(np.diag(load_PP))
    return Flow(stay, float(moving[same].sum()), float(moving[~same].sum()), float(moving.max()))
