"""The fast solver of `affinity`: exact moves, many starts, and the starts recombined.

Three moves, each exact in what it frees: one layer, its neighbours fixed, is an assignment problem; two or three
devices over all layers are a small chain (`affinity_exact.chain`); and layers of different solutions are put together,
the devices renamed at every seam (Viterbi over layers, an assignment of devices at each seam).
Shapes: L layers, E experts, P devices; counts_JEE has J = L - 1 layers.
"""

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from moesaic.schedule.affinity import Counts, Devices, check, contiguous, cost, optimizer
from moesaic.schedule.affinity_exact import chain, placements

WHOLE_LIMIT = 1000  # placements a layer of two or three devices that are regrouped whole
FREE = 5  # experts a device and layer that are regrouped where the whole would be too many
QUICK = 2e6  # pairs of placements a layer up to which the exact chain is sooner than the search
PATIENCE = 20  # moves without a gain before such a search ends
PARTIAL_POOL = 5  # starts that such a search goes on from
NEAR = 1.02  # kicked solutions within this factor of the best are polished


class _Descent:
    """Coordinate descent over layers, on one problem."""

    def __init__(self, counts: Counts, devices: int) -> None:
        self.counts, self.devices = counts, devices
        self.layers, self.experts = len(counts) + 1, counts.shape[1]
        self.seats = np.repeat(np.arange(devices), self.experts // devices)
        self.eye = np.eye(devices)
        self.solve = optimizer().linear_sum_assignment
        self.share = self.experts // devices
        fits = [m for m in (2, 3) if m <= devices and placements(m * self.share, m) <= WHOLE_LIMIT]
        self.whole = bool(fits)
        self.free = self.share if fits else FREE
        self.groups = list(combinations(range(devices), max(fits, default=min(2, devices))))

    def layer(self, device_LE: Devices, j: int, left: bool = True, right: bool = True) -> Devices:
        """The best places of layer j given its neighbours, (E,): exact, as each device is E / P equal seats."""
        gain_EP = np.zeros((self.experts, self.devices))
        if left and j:
            gain_EP += self.counts[j - 1].T @ self.eye[device_LE[j - 1]]
        if right and j + 1 < self.layers:
            gain_EP += self.counts[j] @ self.eye[device_LE[j + 1]]
        _, seat = self.solve(gain_EP[:, self.seats], maximize=True)
        return self.seats[seat]

    def start(self, rng: np.random.Generator) -> Devices:
        """One layer at random, the others each by the neighbour that is placed already."""
        device_LE = np.zeros((self.layers, self.experts), dtype=np.int64)
        first = int(rng.integers(self.layers))
        device_LE[first] = rng.permutation(self.seats)
        for j in range(first + 1, self.layers):
            device_LE[j] = self.layer(device_LE, j, right=False)
        for j in range(first - 1, -1, -1):
            device_LE[j] = self.layer(device_LE, j, left=False)
        return device_LE

    def sweep(self, device_LE: Devices) -> tuple[float, Devices]:
        """Layers in turn, forth and back, until none gains; the input is not changed."""
        device_LE, best = device_LE.copy(), cost(self.counts, device_LE)
        order = [*range(self.layers), *range(self.layers - 2, 0, -1)]
        while True:
            for j in order:
                device_LE[j] = self.layer(device_LE, j)
            now = cost(self.counts, device_LE)
            if now >= best - 1e-9 * max(best, 1.0):
                return now, device_LE
            best = now

    def regroup(self, device_LE: Devices, group: tuple[int, ...], rng: np.random.Generator) -> Devices:
        """The best division of the group's experts among its devices in all layers at once, all others fixed.

        Where a device holds too many experts, `free` of each device and layer, at random, are divided.
        """
        free_LX = np.stack([self._free(row, group, rng) for row in device_LE])
        pairs = zip(self.counts, free_LX, free_LX[1:], strict=False)
        inner = np.stack([count[np.ix_(a, b)] for count, a, b in pairs])
        gain_LXP = None if self.whole else self._outside(device_LE, free_LX, group)
        device_LE = device_LE.copy()
        np.put_along_axis(device_LE, free_LX, np.array(group)[chain(inner, len(group), gain_LXP)], 1)
        return device_LE

    def _free(self, row: Devices, group: tuple[int, ...], rng: np.random.Generator) -> Devices:
        if self.whole:
            return np.flatnonzero(np.isin(row, group))
        return np.concatenate([rng.choice(np.flatnonzero(row == device), self.free, replace=False) for device in group])

    def _outside(self, device_LE: Devices, free_LX: Devices, group: tuple[int, ...]) -> Counts:
        """Weight that stays between a free expert, put on each device of the group, and its fixed neighbours."""
        fixed_LEP = self.eye[device_LE][..., list(group)]
        np.put_along_axis(fixed_LEP, free_LX[..., None], 0.0, 1)
        gain_LEP = np.zeros_like(fixed_LEP)
        gain_LEP[1:] += self.counts.transpose(0, 2, 1) @ fixed_LEP[:-1]
        gain_LEP[:-1] += self.counts @ fixed_LEP[1:]
        return np.take_along_axis(gain_LEP, free_LX[..., None], 1)

    def polish(self, value: float, device_LE: Devices, rng: np.random.Generator) -> tuple[float, Devices]:
        """Regroup every group in a random order, and sweep, until a round gains nothing.

        Where only a part is divided a move may gain at the next try: then PATIENCE moves in a row without a gain.
        """
        idle, patience = 0, 1 if self.whole else max(1, PATIENCE // len(self.groups))
        while value and idle < patience:
            before = value
            for at in rng.permutation(len(self.groups)):
                device_LE = self.regroup(device_LE, self.groups[at], rng)
            value, device_LE = self.sweep(device_LE)
            idle = 0 if value < before - 1e-9 * max(before, 1.0) else idle + 1
        return value, device_LE

    def kick(self, device_LE: Devices, rng: np.random.Generator) -> Devices:
        """Shuffle the experts of two devices among themselves in a window of layers."""
        device_LE = device_LE.copy()
        low, high = sorted(int(each) for each in rng.integers(self.layers, size=2))
        pair = rng.permutation(self.devices)[:2]
        for j in range(low, high + 1):
            among = np.isin(device_LE[j], pair)
            device_LE[j, among] = rng.permutation(device_LE[j, among])
        return device_LE

    def join(self, pool: list[Devices]) -> Devices:
        """The best chain of layers out of different placements, devices renamed at each seam: Viterbi, then LSA.

        Renaming the devices of a whole rest of the chain costs nothing inside it, so each seam may choose freely.
        """
        size, layers = len(pool), self.layers
        one_SLEP = np.stack([self.eye[device_LE] for device_LE in pool])
        kept, back = np.zeros(size), np.zeros((layers, size), dtype=np.int64)
        rename: dict[tuple[int, int, int], Devices] = {}
        for j, count in enumerate(self.counts, 1):
            shared = np.einsum("sap,ab,tbq->stqp", one_SLEP[:, j - 1], count, one_SLEP[:, j], optimize=True)
            gain = np.zeros((size, size))
            for s in range(size):
                for t in range(size):
                    rows, columns = self.solve(shared[s, t], maximize=True)
                    gain[s, t] = shared[s, t][rows, columns].sum()
                    rename[j, s, t] = columns
            total = kept[:, None] + gain
            back[j], kept = total.argmax(0), total.max(0)
        path = [int(kept.argmax())]
        for j in range(layers - 1, 0, -1):
            path.append(int(back[j, path[-1]]))
        path.reverse()
        names, joined = np.arange(self.devices), [pool[path[0]][0]]
        for j in range(1, layers):
            names = names[rename[j, path[j - 1], path[j]]]
            joined.append(names[pool[path[j]][j]])
        return np.stack(joined)


def assign(
    counts_JEE: ArrayLike, devices: int, *, restarts: int = 20, kicks: int = 40, seed: int = 0, exact: bool = True
) -> Devices:
    """Places of least crossing found, (L, E): never worse than contiguous on the same counts, eq. 9 held exactly.

    restarts: random starts, polished where that is cheap, then joined. kicks: disturbances of the best, kept if they
    gain. exact: solve the chain where a layer has few placements (8 experts on 4 devices), which takes less time.
    The same seed gives the same places. Raises MoesaicError for bad counts and if P does not divide E; needs SciPy.
    """
    counts = check(counts_JEE, devices)
    descent, rng = _Descent(counts, devices), np.random.default_rng(seed)
    usual = contiguous(descent.layers, descent.experts, devices)
    if devices == 1:
        return usual
    if exact and placements(descent.experts, devices) ** 2 / math.factorial(devices) <= QUICK:
        return chain(counts, devices)
    found = sorted([descent.sweep(usual), *(descent.sweep(descent.start(rng)) for _ in range(restarts))], key=_value)
    pool = [descent.polish(*each, rng) for each in (found if descent.whole else found[:PARTIAL_POOL])]
    best = min(*pool, descent.sweep(descent.join([places for _, places in pool])), key=_value)
    for _ in range(kicks if descent.whole else kicks // (4 * len(descent.groups))):  # each costs a second there
        kicked = descent.sweep(descent.kick(best[1], rng))
        if kicked[0] <= NEAR * best[0] or not descent.whole:
            best = min(best, descent.polish(*kicked, rng), key=_value)
        if not best[0]:
            break
    return best[1]


def _value(found: tuple[float, Devices]) -> float:
    return found[0]


Solver = Callable[[Counts, int], Devices]


def staged(counts_JEE: ArrayLike, nodes: int, per_node: int, solver: Solver = assign) -> Devices:
    """First to nodes, then inside each node to devices (2401.08383), (L, E): the slow link is served first.

    The second stage sees the transitions whose two experts are both in the node. Devices are numbered node by node.
    """
    counts = check(counts_JEE, nodes * per_node)
    node_LE = solver(counts, nodes)
    device_LE = node_LE * per_node
    for node in range(nodes):
        held = np.stack([np.flatnonzero(row == node) for row in node_LE])  # (L, E / nodes): stage one is balanced
        inner = np.stack([count[np.ix_(a, b)] for count, a, b in zip(counts, held, held[1:], strict=False)])
        np.put_along_axis(device_LE, held, node * per_node + solver(inner, per_node), 1)
    return device_LE
