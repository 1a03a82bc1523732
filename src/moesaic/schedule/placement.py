"""Where experts live: whole, sliced over tensor ranks, copied over data ranks, the hot ones copied again.

A placement lists for each (layer, expert) its shards; a shard says which device holds which part of which copy.
Tokens of an expert are shared evenly by its copies, the work on a token evenly by the parts of one copy.
Shapes: L layers, E experts, P devices.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesaic.errors import MoesaicError

Key = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True)
class Shard:
    """Part `part` of copy `copy` of an expert, on `device`."""

    device: int
    part: int = 0
    copy: int = 0


@dataclass(frozen=True)
class Placement:
    """Shards of every (layer, expert), each cut into `parts` equal parts.

    Raises MoesaicError if a key is missing, a device is outside range(devices), a copy lacks a part or has one twice,
    or a device holds the same part of an expert twice.
    """

    layers: int
    experts: int
    devices: int
    shards: Mapping[Key, tuple[Shard, ...]]
    parts: int = 1

    def __post_init__(self) -> None:
        if min(self.layers, self.experts, self.devices, self.parts) < 1:
            raise MoesaicError("a placement needs at least one layer, expert, device and part")
        keys = set(product(range(self.layers), range(self.experts)))
        if set(self.shards) != keys:
            wrong = sorted(keys ^ set(self.shards))[:3]
            raise MoesaicError(f"a placement holds each (layer, expert) once; missing or unknown: {wrong}")
        for key, shards in self.shards.items():
            self._whole(key, shards)

    def _whole(self, key: Key, shards: Sequence[Shard]) -> None:
        where = f"expert {key[1]} of layer {key[0]}"
        if bad := [shard.device for shard in shards if not 0 <= shard.device < self.devices]:
            raise MoesaicError(f"{where} is on device {bad[0]}, but there are 0 to {self.devices - 1}")
        copies = len({shard.copy for shard in shards})
        wanted = Counter((part, copy) for part in range(self.parts) for copy in range(copies))
        if not copies or Counter((shard.part, shard.copy) for shard in shards) != wanted:
            raise MoesaicError(f"{where} needs copies numbered from 0, each of parts 0 to {self.parts - 1} once")
        if len({(shard.device, shard.part) for shard in shards}) != len(shards):
            raise MoesaicError(f"{where}: a device holds the same part twice; a copy there helps nobody")

    def copies(self, key: Key) -> int:
        return len(self.shards[key]) // self.parts

    def device_LE(self) -> NDArray[np.int64]:
        """The device of each expert, (L, E), for `affinity`; MoesaicError if one is cut or copied."""
        if any(len(shards) != 1 for shards in self.shards.values()):
            raise MoesaicError("experts that are cut or copied have no single device: crossing is not defined for them")
        grid = product(range(self.layers), range(self.experts))
        return np.array([self.shards[key][0].device for key in grid]).reshape(self.layers, self.experts)

    def held_LP(self) -> NDArray[np.float64]:
        """Experts each device holds in each layer, a part counting 1 / parts, (L, P): times bytes, its memory."""
        held = np.zeros((self.layers, self.devices))
        for (layer, _), shards in self.shards.items():
            for shard in shards:
                held[layer, shard.device] += 1 / self.parts
        return held

    def load_LP(self, tokens_LE: ArrayLike) -> NDArray[np.float64]:
        """Tokens' worth of work on each device, (L, P), for the tokens each expert receives, (L, E)."""
        tokens = np.asarray(tokens_LE, dtype=float)
        if tokens.shape != (self.layers, self.experts):
            raise MoesaicError(f"load needs tokens of shape {(self.layers, self.experts)}, not {tokens.shape}")
        load = np.zeros((self.layers, self.devices))
        for key, shards in self.shards.items():
            for shard in shards:
                load[key[0], shard.device] += tokens[key] / len(shards)
        return load


def whole(device_LE: ArrayLike, devices: int) -> Placement:
    """Whole experts, one copy, on the given devices, (L, E)."""
    places = np.asarray(device_LE)
    if places.ndim != 2:
        raise MoesaicError(f"device_LE must have the shape (layers, experts), not {places.shape}")
    shards = {(layer, e): (Shard(int(device)),) for (layer, e), device in np.ndenumerate(places)}
    return Placement(places.shape[0], places.shape[1], devices, shards)


def contiguous(layers: int, experts: int, devices: int) -> Placement:
    """Neighbouring experts together; shares differ by at most one expert where P does not divide E."""
    return whole(np.tile(np.arange(experts) * devices // experts, (layers, 1)), devices)


def round_robin(layers: int, experts: int, devices: int) -> Placement:
    """Experts dealt in turn: expert e on device e mod P (Duplex deals them over memory sections, 2409.01141)."""
    return whole(np.tile(np.arange(experts) % devices, (layers, 1)), devices)


def degrees(devices: int, experts: int) -> tuple[int, int, int]:
    """(expert, tensor, data) parallel degrees of a layer on all devices (DeepSpeed-MoE, 2201.05596, section 5.2).

    Up to E ways expert-parallel; then what is left slices the experts where there are more devices than experts.
    Training copies instead of slicing: swap the last two. MoesaicError where E and P do not divide one another.
    """
    if devices < 1 or experts < 1 or max(devices, experts) % min(devices, experts):
        raise MoesaicError(f"{experts} experts on {devices} devices: one must divide the other")
    expert = min(devices, experts)
    return expert, devices // expert, 1


def parallel(layers: int, experts: int, expert: int, tensor: int = 1, data: int = 1) -> Placement:
    """Expert x tensor x data parallel on expert * tensor * data devices; tensor ranks are neighbours (one node).

    Device (d * expert + e) * tensor + t holds part t of copy d of the e-th contiguous share. Raises MoesaicError unless
    `expert` divides the experts.
    """
    if min(expert, tensor, data) < 1 or experts % expert:
        raise MoesaicError(f"degrees {expert} x {tensor} x {data}: the first must divide {experts}, all be at least 1")
    share = experts // expert
    shards = {
        (layer, e): tuple(
            Shard((copy * expert + e // share) * tensor + part, part, copy)
            for copy in range(data)
            for part in range(tensor)
        )
        for layer, e in product(range(layers), range(experts))
    }
    return Placement(layers, experts, expert * tensor * data, shards, tensor)


def replicate_hot(placement: Placement, tokens_LE: ArrayLike, extra: int) -> Placement:
    """`extra` more whole copies in each layer, one at a time: the expert with most tokens a copy, to the idlest device.

    A copy is made only where a device without that expert exists; ties go to the lower number. O(log E) to choose the
    expert, O(P) the device. Raises MoesaicError for sliced experts and a negative `extra`.
    """
    if placement.parts != 1 or extra < 0:
        raise MoesaicError("hot replication copies whole experts (parts = 1), at least 0 of them")
    tokens = np.asarray(tokens_LE, dtype=float)
    load_LP = placement.load_LP(tokens)
    shards = dict(placement.shards)
    for layer in range(placement.layers):
        hot = [(-tokens[layer, e] / placement.copies((layer, e)), e) for e in range(placement.experts)]
        heapq.heapify(hot)
        left = extra
        while left and hot:
            _, e = heapq.heappop(hot)
            held = shards[layer, e]
            free = sorted(set(range(placement.devices)) - {shard.device for shard in held})
            if not free or not tokens[layer, e]:
                continue
            device = min(free, key=lambda each: load_LP[layer, each])
            before, after = tokens[layer, e] / len(held), tokens[layer, e] / (len(held) + 1)
            for shard in held:
                load_LP[layer, shard.device] += after - before
            load_LP[layer, device] += after
            shards[layer, e] = (*held, Shard(device, copy=len(held)))
            heapq.heappush(hot, (-after, e))
            left -= 1
    return Placement(placement.layers, placement.experts, placement.devices, shards)
