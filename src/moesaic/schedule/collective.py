"""All-to-all in its variants: messages, bytes and seconds for one device, the others doing the same.

p devices, m to a node, n = p / m nodes, L tensor ranks; V bytes a device holds for all p devices, itself included.

    flat             p - 1 messages of V / p
    hierarchical     copy, m - 1 messages of V / m inside, copy, n - 1 of V / n between (2201.05596, section 5.3)
    2DH              the same, flat where there is one node or one device a node (2206.03382, section 3.2)
    coordinated      flat among the p / L devices of one tensor rank, V / L each, then AllGather over L (2201.05596)

A device's messages follow one another; messages inside and between nodes share its time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moesaic.errors import MoesaicError
from moesaic.schedule.cost import move_time
from moesaic.schedule.topology import Link, Topology

Kind = Literal["flat", "hierarchical", "2dh", "coordinated"]


@dataclass(frozen=True)
class Traffic:
    """What one device sends in a collective: messages, bytes inside and between nodes, copied bytes, seconds."""

    intra_messages: int
    inter_messages: int
    intra_bytes: float
    inter_bytes: float
    copied: float
    seconds: float

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.intra_messages + other.intra_messages,
            self.inter_messages + other.inter_messages,
            self.intra_bytes + other.intra_bytes,
            self.inter_bytes + other.inter_bytes,
            self.copied + other.copied,
            self.seconds + other.seconds,
        )

    @property
    def messages(self) -> int:
        return self.intra_messages + self.inter_messages


def _sent(machine: Topology, intra: int, inter: int, each: float) -> Traffic:
    """`intra` messages inside the node and `inter` between nodes, of `each` bytes."""
    seconds = _over(machine.intra, intra, intra * each) + _over(machine.inter, inter, inter * each)
    return Traffic(intra, inter, intra * each, inter * each, 0.0, seconds)


def _over(link: Link | None, messages: int, size: float) -> float:
    if not messages:
        return 0.0
    assert link is not None  # Topology requires the link wherever there is a second device or node
    return move_time(link, size, messages)


def _copied(machine: Topology, size: float, times: int) -> Traffic:
    """`times` local transposes of `size` bytes, each read once and written once."""
    seconds = times * 2 * size / machine.units[0].bandwidth
    return Traffic(0, 0, 0.0, 0.0, times * size, seconds)


def flat(machine: Topology, size: float) -> Traffic:
    """Every device sends size / p bytes to every other."""
    return _sent(machine, machine.per_node - 1, machine.devices - machine.per_node, size / machine.devices)


def hierarchical(machine: Topology, size: float) -> Traffic:
    """First inside the node, then between devices of equal local rank: twice the volume, m + n messages."""
    m, n = machine.per_node, machine.nodes
    return _sent(machine, m - 1, 0, size / m) + _sent(machine, 0, n - 1, size / n) + _copied(machine, size, 2)


def two_dh(machine: Topology, size: float) -> Traffic:
    """Tutel's two-dimensional hierarchical all-to-all; flat when there is one dimension."""
    return flat(machine, size) if machine.nodes == 1 or machine.per_node == 1 else hierarchical(machine, size)


def coordinated(machine: Topology, size: float, tensor: int) -> Traffic:
    """All-to-all among equal tensor ranks of a node, then the `tensor` ranks gather what each received.

    Raises MoesaicError unless `tensor` divides the devices of a node.
    """
    _tensor(machine.per_node, tensor)
    part = machine.spread(machine.devices // tensor, machine.per_node // tensor)
    gathered = allgather(machine.spread(tensor, tensor), size) if tensor > 1 else _sent(machine, 0, 0, 0.0)
    return flat(part, size / tensor) + gathered


def allgather(machine: Topology, size: float) -> Traffic:
    """Ring: after p - 1 steps every device holds all `size` bytes, of which it had size / p.

    A step waits for its slowest device: across nodes each of the p - 1 messages is timed on the link between nodes.
    """
    p = machine.devices
    return _sent(machine, p - 1, 0, size / p) if machine.nodes == 1 else _sent(machine, 0, p - 1, size / p)


def allreduce(machine: Topology, size: float) -> Traffic:
    """Ring: 2 (p - 1) steps of size / p bytes (2409.01141, released simulator)."""
    once = allgather(machine, size)
    return once + once


def all_to_all(kind: Kind, machine: Topology, size: float, tensor: int = 1) -> Traffic:
    """The variant of that name; `tensor` matters to "coordinated" only. MoesaicError for an unknown name."""
    kinds: dict[str, Callable[[], Traffic]] = {
        "flat": lambda: flat(machine, size),
        "hierarchical": lambda: hierarchical(machine, size),
        "2dh": lambda: two_dh(machine, size),
        "coordinated": lambda: coordinated(machine, size, tensor),
    }
    if kind not in kinds:
        raise MoesaicError(f"all-to-all {kind!r} is unknown; there are {', '.join(kinds)}")
    return kinds[kind]()


def hops(kind: Kind, devices: int, per_node: int, tensor: int = 1) -> int:
    """Latency steps as DeepSpeed-MoE counts them (2201.05596, section 5.3): each device counts itself, copies do not.

    p flat, m + p / m hierarchical, p / L coordinated (whose AllGather over L is apart): 128 : 24 : 16 at m = L = 8.
    """
    if devices < 1 or per_node < 1 or devices % per_node:
        raise MoesaicError(f"{devices} devices do not fill nodes of {per_node}")
    if kind == "flat" or (kind == "2dh" and per_node in (1, devices)):
        return devices
    if kind == "coordinated":
        _tensor(per_node, tensor)
        return devices // tensor
    if kind in ("hierarchical", "2dh"):
        return per_node + devices // per_node
    raise MoesaicError(f"all-to-all {kind!r} is unknown; there are flat, hierarchical, 2dh, coordinated")


def cheapest(machine: Topology, size: float, tensor: int = 1) -> tuple[Kind, Traffic]:
    """The variant of least time (at a tie the simplest) when the tokens are replicated over `tensor` ranks."""
    kinds: tuple[Kind, ...] = ("flat", "2dh", "hierarchical") + (("coordinated",) if tensor > 1 else ())
    timed = [(kind, all_to_all(kind, machine, size, tensor)) for kind in kinds]
    return min(timed, key=lambda each: each[1].seconds)


@dataclass(frozen=True)
class Step:
    """A decoding step of `layers` MoE layers: `tokens` tokens a device of `width` bytes each.

    leave: share of a layer's tokens that change device (`affinity.crossing`; (p - 1) / p when experts are anywhere).
    inter_leave: share that change node, part of `leave`.
    """

    layers: int
    tokens: int
    width: float
    leave: float
    inter_leave: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.inter_leave <= self.leave <= 1:
            raise MoesaicError(f"shares that leave must satisfy 0 <= inter {self.inter_leave} <= all {self.leave} <= 1")


def step_moves(step: Step, devices: int, *, coherent: bool) -> float:
    """Tokens sent in a step by all devices (ExFlow, 2401.08383): G tokens a device, N devices, p the share that leaves.

    2 G N L p for dispatch and return, G N (L p + N - 1) when context-coherent: each new token goes to N - 1 others.
    """
    sent = step.tokens * devices * step.layers * step.leave
    return sent + step.tokens * devices * (devices - 1) if coherent else 2 * sent


def step_traffic(step: Step, machine: Topology, *, coherent: bool) -> Traffic:
    """A device's all-to-alls of a step: two a layer, or one a layer and an AllGather of the new tokens at the end.

    Context-coherent (2401.08383): a token stays where its expert was, and every device holds every context.
    What the paper leaves open, how the new keys and values reach all devices, is not charged.
    """
    p, m = machine.devices, machine.per_node
    size = step.tokens * step.width
    inside = size * (step.leave - step.inter_leave) / max(m - 1, 1)
    outside = size * step.inter_leave / max(p - m, 1)
    once = _sent(machine, m - 1, 0, inside) + _sent(machine, 0, p - m, outside)
    if not coherent:
        return _times(once, 2 * step.layers)
    return _times(once, step.layers) + allgather(machine, size * p)


def _times(one: Traffic, count: int) -> Traffic:
    return Traffic(
        one.intra_messages * count,
        one.inter_messages * count,
        one.intra_bytes * count,
        one.inter_bytes * count,
        one.copied * count,
        one.seconds * count,
    )


def _tensor(per_node: int, tensor: int) -> None:
    if tensor < 1 or per_node % tensor:
        raise MoesaicError(f"{tensor} tensor ranks do not divide the {per_node} devices of a node")
