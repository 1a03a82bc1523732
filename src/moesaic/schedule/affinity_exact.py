"""The proven optimum of `affinity` in two independent ways.

    solve_integer   ExFlow's integer programme (2401.08383, eq. 8-12) on summed counts, by HiGHS: any case, slowly
    solve_chain     layers form a chain, so dynamic programming over a layer's E! / (E/P)!^P placements is exact too

Shapes: L layers, E experts, P devices, S placements of a layer; counts_JEE has J = L - 1 layers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moesaic.errors import MoesaicError
from moesaic.schedule.affinity import Counts, Devices, check, cost, optimizer

CHAIN_LIMIT = 120_000  # placements of a layer that `solve_chain` holds: 50 MB of indicators
CHAIN_WORK = 3e8  # pairs of placements that it compares a layer: seconds


@dataclass(frozen=True)
class Solved:
    """A placement (L, E), its crossing weight, a bound below every placement's, and whether that proves it optimal."""

    device_LE: Devices
    cost: float
    bound: float

    @property
    def proven(self) -> bool:
        return self.cost <= self.bound + 1e-6 * max(1.0, abs(self.bound))


def placements(experts: int, devices: int) -> int:
    """Ways to give a layer's experts to numbered devices, E / P each."""
    share = experts // devices
    return math.factorial(experts) // math.factorial(share) ** devices


def solvable(experts: int, devices: int) -> bool:
    """Whether `solve_chain` takes the case on, in seconds a layer."""
    count = placements(experts, devices)
    return count <= CHAIN_LIMIT and count**2 / math.factorial(devices) <= CHAIN_WORK


def solve_integer(counts_JEE: ArrayLike, devices: int, time_limit: float = 20.0) -> Solved:
    """HiGHS on x_{l,e,p} in {0, 1} and crossings R_{j,a,b} >= x_{j,a,p} - x_{j+1,b,p} (eq. 9-11).

    R may be continuous, and eq. 12 follows from eq. 11 as both x sum to one over p. Expert 0 of layer 0 is put on
    device 0, which breaks the symmetry of names. time_limit: seconds; at its end the bound is what HiGHS had proven.
    Raises MoesaicError if HiGHS found no placement in that time.
    """
    counts = check(counts_JEE, devices)
    L, E, P = len(counts) + 1, counts.shape[1], devices
    scale = counts.max() or 1.0  # HiGHS' tolerances are absolute
    used_R3 = np.argwhere(counts > 0)
    weight_R = counts[tuple(used_R3.T)] / scale
    x, r = L * E * P, len(used_R3)
    lower = np.zeros(x + r)
    lower[0] = 1.0  # x[0, 0, 0]: expert 0 of layer 0 on device 0
    found = optimizer().milp(
        np.concatenate([np.zeros(x), weight_R]),
        integrality=np.concatenate([np.ones(x), np.zeros(r)]),
        bounds=(lower, np.ones(x + r)),
        constraints=_constraints(used_R3, L, E, P),
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise MoesaicError(f"HiGHS found no placement in {time_limit} s: raise time_limit, or use affinity.assign")
    device_LE = found.x[:x].reshape(L, E, P).argmax(-1)
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else 0.0
    return Solved(device_LE, cost(counts, device_LE), max(float(bound), 0.0) * scale)


def _constraints(used_R3: np.ndarray[Any, Any], L: int, E: int, P: int) -> list[Any]:
    """Each expert on one device, each device E / P experts a layer, R at least x - x."""
    import scipy.sparse as sparse

    LinearConstraint = optimizer().LinearConstraint
    x, r = L * E * P, len(used_R3)
    eye = sparse.eye_array
    one = sparse.hstack([sparse.kron(eye(L * E), np.ones((1, P))), sparse.csr_array((L * E, r))])
    share = sparse.kron(eye(L), sparse.kron(np.ones((1, E)), eye(P)))
    even = sparse.hstack([share, sparse.csr_array((L * P, r))])
    j, a, b = used_R3.T
    row = np.arange(r * P)
    here = ((j * E + a)[:, None] * P + np.arange(P)).ravel()
    there = (((j + 1) * E + b)[:, None] * P + np.arange(P)).ravel()
    value = np.repeat([1.0, -1.0, -1.0], r * P)
    column = np.concatenate([here, there, x + row // P])
    moved = sparse.csr_array((value, (np.tile(row, 3), column)), shape=(r * P, x + r))
    return [
        LinearConstraint(one.tocsr(), 1, 1),
        LinearConstraint(even.tocsr(), E // P, E // P),
        LinearConstraint(moved, -np.inf, 0),
    ]


def solve_chain(counts_JEE: ArrayLike, devices: int) -> Solved:
    """The proven optimum by dynamic programming over layers, for any number of them.

    The best cost up to a layer does not change when devices are renamed, so only placements that use new devices in
    order (S / P! of them) keep a value; each looks back at all S. O(L S^2 E P / P!) work.
    Raises MoesaicError where it is not `solvable`: then use `solve_integer` or `affinity_bounds.lower_bound`.
    """
    counts = check(counts_JEE, devices)
    if not solvable(counts.shape[1], devices):
        raise MoesaicError(
            f"{counts.shape[1]} experts on {devices} devices have {placements(counts.shape[1], devices)} placements a "
            "layer, too many: use solve_integer with a time limit, or affinity_bounds.lower_bound"
        )
    device_LE = chain(counts, devices)
    total = cost(counts, device_LE)
    return Solved(device_LE, total, total)


def chain(counts: Counts, devices: int, gain_LEP: Counts | None = None) -> Devices:
    """`solve_chain` without checks, (L, E). gain_LEP: weight that stays outside the counts if e is on p.

    With gains the names of devices matter, so every placement keeps its own value: O(L S^2 E P).
    """
    E, P = counts.shape[1], devices
    all_SE, class_S, first = _tables(E, P)
    if gain_LEP is not None:
        class_S = first = np.arange(len(all_SE))
    one_SX = np.eye(P)[all_SE].reshape(len(all_SE), E * P)
    own_TX = one_SX[first]
    gain_LT = np.zeros((len(counts) + 1, 1)) if gain_LEP is None else gain_LEP.reshape(-1, E * P) @ own_TX.T
    kept_T, back = np.zeros(len(first)) + gain_LT[0], []
    for count, gain_T in zip(counts, gain_LT[1:], strict=True):
        # kept_T[t]: the most weight that can stay up to a layer placed as all_SE[first[t]]
        to_TX = (count @ own_TX.reshape(-1, E, P)).reshape(len(first), E * P)
        best_T, from_T = np.full(len(first), -np.inf), np.zeros(len(first), dtype=np.int64)
        for low in range(0, len(all_SE), 4096):
            block = one_SX[low : low + 4096] @ to_TX.T + kept_T[class_S[low : low + 4096], None]
            at, top = block.argmax(0), block.max(0)
            better = top > best_T
            best_T[better], from_T[better] = top[better], at[better] + low
        kept_T = best_T + gain_T
        back.append(from_T)
    return _trace(back, int(kept_T.argmax()), all_SE, class_S, first)


def _trace(back: list[Devices], last: int, all_SE: Devices, class_S: Devices, first: Devices) -> Devices:
    """The chain backwards: the layer before was found in some naming of its class; the names are carried along."""
    names = np.arange(int(all_SE.max()) + 1)
    rows, at = [all_SE[first[last]]], last
    for from_T in reversed(back):
        before = int(from_T[at])  # a placement in the names of class `at`'s representative
        rows.append(names[all_SE[before]])
        at = int(class_S[before])
        canonical = all_SE[first[at]]
        renamed = np.empty_like(names)
        renamed[canonical] = rows[-1]  # name in the representative -> name in the chain
        names = renamed
    return np.stack(rows[::-1])


def _places(left: tuple[int, ...], experts: int) -> Iterator[tuple[int, ...]]:
    """Every placement of the experts on devices with `left` seats."""
    if not experts:
        yield ()
        return
    for device, seats in enumerate(left):
        if seats:
            for rest in _places((*left[:device], seats - 1, *left[device + 1 :]), experts - 1):
                yield (device, *rest)


@lru_cache(maxsize=16)
def _tables(experts: int, devices: int) -> tuple[Devices, Devices, Devices]:
    """Every placement of a layer, (S, E), and its classes under renaming."""
    all_SE = np.array(list(_places((experts // devices,) * devices, experts)), dtype=np.int64)
    return (all_SE, *_classes(all_SE, devices))


def _classes(all_SE: Devices, devices: int) -> tuple[Devices, Devices]:
    """For each placement the number of its class under renaming, (S,), and a representative of each class, (T,)."""
    key_S = np.zeros(len(all_SE), dtype=np.int64)
    seen_SP = np.full((len(all_SE), devices), -1)
    new_S, rows = np.zeros(len(all_SE), dtype=np.int64), np.arange(len(all_SE))
    for expert in all_SE.T:
        fresh = seen_SP[rows, expert] < 0
        seen_SP[rows[fresh], expert[fresh]] = new_S[fresh]
        new_S += fresh
        key_S = key_S * devices + seen_SP[rows, expert]
    _, first, class_S = np.unique(key_S, return_index=True, return_inverse=True)
    return class_S, first
