"""How good a placement could be at all: crossing weights that no placement of `affinity` is below.

The linear programme of ExFlow's integer programme says 0 (every expert a P-th on every device), hence two relaxations
that do not. Shapes: L layers, E experts, P devices; counts_JEE has J = L - 1 layers.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moesaic.schedule.affinity import check, optimizer


def lower_bound(counts_JEE: ArrayLike, devices: int, rounds: int = 60) -> float:
    """A crossing weight no placement is below: the better of two relaxations.

    The linear programme of `solve_integer` says 0 (x = 1 / P everywhere), hence these.
    """
    counts = check(counts_JEE, devices)
    return max(matching_bound(counts, devices), spectral_bound(counts, devices, rounds), 0.0)


def matching_bound(counts_JEE: ArrayLike, devices: int) -> float:
    """Each pair of layers apart, by the heaviest b-matching of degree E / P.

    An expert shares its device with E / P experts of the next layer, so no more than that matching can stay. Its linear
    programme has integral corners; HiGHS solves it in milliseconds.
    """
    import scipy.sparse as sparse

    counts = check(counts_JEE, devices)
    E = counts.shape[1]
    eye, ones = sparse.eye_array(E), np.ones((1, E))
    degree = sparse.vstack([sparse.kron(eye, ones), sparse.kron(ones, eye)]).tocsr()
    bound = 0.0
    for count in counts:
        scale = count.max() or 1.0
        kept = optimizer().linprog(
            -count.ravel() / scale, A_eq=degree, b_eq=np.full(2 * E, E // devices), bounds=(0, 1), method="highs"
        )
        bound += float(count.sum()) + kept.fun * scale
    return bound


def spectral_bound(counts_JEE: ArrayLike, devices: int, rounds: int = 60) -> float:
    """Eigenvalues of the graph of all (layer, expert), with the even split of each layer projected out.

    Write the placement's indicator X (L E, P) as 1 / P + Y: each row and each layer's columns of Y sum to 0, and Y'Y is
    (L E / P) times a projection of rank P - 1. Hence kept = total / P + tr(Y'AY) / 2 is at most total / P plus
    (L E / 2 P) times the P - 1 largest eigenvalues of the projected A. Adding any diagonal d with sum 0 to A changes no
    placement's value, so `rounds` subgradient steps on d lower it (Donath and Hoffman, 1973); each round is a bound.
    """
    counts = check(counts_JEE, devices)
    J, E = counts.shape[:2]
    n, total = (J + 1) * E, float(counts.sum())
    if devices == 1 or not total:
        return 0.0
    A = np.zeros((n, n))
    for j, count in enumerate(counts):
        A[j * E : (j + 1) * E, (j + 1) * E : (j + 2) * E] = count
    A += A.T
    basis = np.kron(np.eye(J + 1), _off_ones(E))  # (n, n - L): vectors that sum to 0 in each layer
    d = -A.sum(1) + A.sum() / n
    kept, target = math.inf, total / devices
    for step in range(max(rounds, 1)):
        value, vector = np.linalg.eigh(basis.T @ (A + np.diag(d)) @ basis)
        top = basis @ vector[:, -(devices - 1) :]
        now = target + n / (2 * devices) * float(value[-(devices - 1) :].sum())
        kept = min(kept, now)
        slope = n / (2 * devices) * ((top**2).sum(1) - (devices - 1) / n)
        if (size := float(slope @ slope)) < 1e-18 * total:
            break
        d = d - slope * (0.1 * (total if step == 0 else kept) / (1 + step / 10) / size)
    return total - kept


def _off_ones(size: int) -> np.ndarray[Any, Any]:
    """An orthonormal basis of the vectors of sum 0, (size, size - 1)."""
    return np.linalg.qr(np.concatenate([np.ones((size, 1)), np.eye(size)[:, : size - 1]], 1))[0][:, 1:]
