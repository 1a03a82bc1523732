"""Machines as data: tiers that hold bytes, units that compute, links that move bytes; presets with their source.

Units everywhere: bytes, bytes/s, flop/s, seconds. A preset's numbers are data sheets' peaks or assumptions, as its
`source` says: calibrate (`cost.fit_roofline`, `cost.read_op_times`) before a prediction in seconds is believed.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from moesaic.errors import MoesaicError

GB, TB, GIB, TIB = 1e9, 1e12, float(2**30), float(2**40)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=_Named)


def _positive(owner: str, field: str, value: float, *, zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        least = "at least 0" if zero else "above 0"
        raise MoesaicError(f"{owner}: {field} is {value}; it must be a finite number {least}")


@dataclass(frozen=True)
class Tier:
    """A memory: `capacity` bytes, read at `bandwidth` bytes/s after `latency` seconds."""

    name: str
    capacity: float
    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        _positive(f"tier {self.name!r}", "capacity", self.capacity)
        _positive(f"tier {self.name!r}", "bandwidth", self.bandwidth)
        _positive(f"tier {self.name!r}", "latency", self.latency, zero=True)


@dataclass(frozen=True)
class Link:
    """One direction of a channel: `bandwidth` bytes/s, `latency` seconds a message.

    Without `duplex` both directions share the bandwidth. Transfers on one link queue: there is one stream.
    """

    src: str
    dst: str
    bandwidth: float
    latency: float = 0.0
    duplex: bool = True

    def __post_init__(self) -> None:
        _positive(f"link {self.src}->{self.dst}", "bandwidth", self.bandwidth)
        _positive(f"link {self.src}->{self.dst}", "latency", self.latency, zero=True)


@dataclass(frozen=True)
class Unit:
    """A processor: peak `flops` flop/s, reads `tier` at `bandwidth` bytes/s (its own: a PIM unit sees more)."""

    name: str
    flops: float
    bandwidth: float
    tier: str

    def __post_init__(self) -> None:
        _positive(f"unit {self.name!r}", "flops", self.flops)
        _positive(f"unit {self.name!r}", "bandwidth", self.bandwidth)

    @property
    def ridge(self) -> float:
        """Flop per byte above which the unit is compute-bound."""
        return self.flops / self.bandwidth


@dataclass(frozen=True)
class Topology:
    """`devices` equal devices, `per_node` to a node; tiers, units and links are those of one device.

    intra, inter: the link from a device to one in its node, and to one in another node; None where there is none.
    Raises MoesaicError for links between unknown tiers, a unit in an unknown tier, two of one name, and partial nodes.
    """

    name: str
    tiers: Sequence[Tier]
    units: Sequence[Unit]
    links: Sequence[Link] = ()
    devices: int = 1
    per_node: int = 1
    intra: Link | None = None
    inter: Link | None = None
    source: str = ""

    def __post_init__(self) -> None:
        if not self.tiers or not self.units:
            raise MoesaicError(f"topology {self.name!r} needs at least one tier and one unit")
        if self.devices < 1 or self.per_node < 1 or self.devices % self.per_node:
            raise MoesaicError(
                f"topology {self.name!r}: {self.devices} devices do not fill nodes of {self.per_node}; "
                "per_node must divide devices, both at least 1"
            )
        for what, named in (("tiers", self.tiers), ("units", self.units)):
            if len({each.name for each in named}) != len(named):
                raise MoesaicError(f"topology {self.name!r}: two {what} have the same name")
        for unit in self.units:
            self.tier(unit.tier)
        for link in self.links:
            self.tier(link.src), self.tier(link.dst)
        if self.per_node > 1 and self.intra is None:
            raise MoesaicError(f"topology {self.name!r}: {self.per_node} devices a node need an `intra` link")
        if self.nodes > 1 and self.inter is None:
            raise MoesaicError(f"topology {self.name!r}: {self.nodes} nodes need an `inter` link")

    @property
    def nodes(self) -> int:
        return self.devices // self.per_node

    def node_of(self, device: int) -> int:
        """The node of a device, numbered node by node; MoesaicError outside range(devices)."""
        if not 0 <= device < self.devices:
            raise MoesaicError(f"topology {self.name!r} has devices 0 to {self.devices - 1}, not {device}")
        return device // self.per_node

    def tier(self, name: str) -> Tier:
        """The tier of that name; MoesaicError if there is none."""
        return _find(self.tiers, name, f"topology {self.name!r}: tier")

    def unit(self, name: str) -> Unit:
        """The unit of that name; MoesaicError if there is none."""
        return _find(self.units, name, f"topology {self.name!r}: unit")

    def link(self, src: str, dst: str) -> Link:
        """The link between two tiers of a device; MoesaicError if there is none."""
        for link in self.links:
            if (link.src, link.dst) == (src, dst):
                return link
        known = ", ".join(f"{link.src}->{link.dst}" for link in self.links) or "none"
        raise MoesaicError(f"topology {self.name!r} has no link {src}->{dst}; it has {known}")

    def spread(self, devices: int, per_node: int) -> "Topology":
        """The same devices in other numbers: `devices` of them, `per_node` to a node."""
        return replace(self, devices=devices, per_node=per_node)


def _find(named: Sequence[N], name: str, what: str) -> N:
    for each in named:
        if each.name == name:
            return each
    raise MoesaicError(f"{what} {_unknown(name, [each.name for each in named])}")


def _unknown(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"{name!r} is unknown{hint}; there are {', '.join(known)}"


NVLINK3, NVLINK4 = 300 * GB, 450 * GB  # one direction, NVIDIA A100 and H100 data sheets (600 and 900 both ways)
NVLINK_LATENCY = 0.8e-6  # 2409.01141, released simulator
IB_LATENCY = 5e-6  # assumption: a small RDMA message through NCCL


def _card(name: str, unit: Unit, capacity: float, host: float, source: str) -> Topology:
    """A GPU with HBM, host memory behind a PCIe link of `host` bytes/s, and a 512 GiB host."""
    tiers = (Tier("hbm", capacity, unit.bandwidth), Tier("host", 512 * GIB, 200 * GB))
    links = (Link("host", "hbm", host, 10e-6), Link("hbm", "host", host, 10e-6))
    return Topology(name, tiers, (unit,), links, source=source)


def _pool(name: str, fast: Tier, slow: Tier, flops: float, copy: float, source: str) -> Topology:
    """A whole node as one device (weights tensor-parallel over its sockets), as in a composition of experts."""
    unit = Unit("node", flops, fast.bandwidth, fast.name)
    return Topology(name, (fast, slow), (unit,), (Link(slow.name, fast.name, copy),), source=source)


def _single() -> list[Topology]:
    """One device before a slower memory."""
    ram, disk = Tier("ram", 16 * GIB, 20 * GB), Tier("disk", 256 * GIB, 2 * GB, 100e-6)
    return [
        Topology(
            "cpu-box",
            (ram, disk),
            (Unit("cpu", 100e9, 20 * GB, "ram"),),
            (Link("disk", "ram", 2 * GB, 100e-6),),
            source="assumptions: a few cores, two DDR4 channels, an NVMe drive",
        ),
        _card(
            "a100-pcie",
            Unit("gpu", 312e12, 1.935 * TB, "hbm"),
            80 * GB,
            32 * GB,
            "NVIDIA A100 80GB PCIe data sheet; PCIe 4 x16 nominal (25 GB/s is usual in measurements)",
        ),
        _card(
            "h100-pcie",
            Unit("gpu", 756e12, 2.0 * TB, "hbm"),
            80 * GB,
            64 * GB,
            "NVIDIA H100 PCIe data sheet, dense bf16; PCIe 5 x16 nominal",
        ),
        _card(
            "h200",
            Unit("gpu", 989.4e12, 4.8 * TB, "hbm"),
            141 * GB,
            64 * GB,
            "NVIDIA H200 SXM data sheet, dense bf16; PCIe 5 x16 nominal",
        ),
    ]


def _pools() -> list[Topology]:
    """Nodes that serve a composition of experts."""
    source = "2405.07518: 8 sockets, 638 bf16 TFLOPS each, DDR to HBM 1 TB/s together; 1.8 TB/s a socket is second-hand"
    pools = [
        _pool("sn40l-node", Tier("hbm", 512 * GIB, 14.4 * TB), Tier("ddr", 12 * TIB, TB), 8 * 638e12, TB, source),
    ]
    for name, flops, bandwidth, host in (("dgx-a100", 312e12, 2.039, 32), ("dgx-h100", 989.4e12, 3.352, 64)):
        fast, slow = Tier("hbm", 640 * GB, 8 * bandwidth * TB), Tier("host", 2 * TB, 200 * GB)
        source = f"2405.07518: 640 GB of HBM, 2 TB of host memory, {host} GB/s between them, no overlap"
        pools.append(_pool(name, fast, slow, 8 * flops, host * GB, source))
    return pools


def _clusters() -> list[Topology]:
    """Several devices that exchange tokens."""
    host = Tier("host", 512 * GIB, 200 * GB)
    return [
        Topology(
            "2x8-a100-ib",
            (Tier("hbm", 80 * GB, 2.039 * TB), host),
            (Unit("gpu", 312e12, 2.039 * TB, "hbm"),),
            (Link("host", "hbm", 32 * GB, 10e-6),),
            devices=16,
            per_node=8,
            intra=Link("device", "device", NVLINK3, NVLINK_LATENCY),
            inter=Link("node", "node", 25 * GB, IB_LATENCY),
            source="NVIDIA A100 SXM data sheet; one HDR200 InfiniBand port a GPU; latencies are assumptions",
        ),
        Topology(
            "h100+logic-pim",
            (Tier("hbm", 80 * GB, 3.352 * TB), host),
            (Unit("xpu", 989.4e12, 3.352 * TB, "hbm"), Unit("pim", 8 * 4 * 3.352e12, 4 * 3.352 * TB, "hbm")),
            (Link("host", "hbm", 64 * GB, 10e-6),),
            devices=8,
            per_node=8,
            intra=Link("device", "device", NVLINK4, NVLINK_LATENCY),
            inter=Link("node", "node", 50 * GB, IB_LATENCY),
            source="2409.01141: Logic-PIM reads four times the HBM bandwidth at 8 flop/byte; nobody can buy it",
        ),
    ]


PRESETS = {topology.name: topology for topology in (*_single(), *_pools(), *_clusters())}


def preset(name: str) -> Topology:
    """A machine by name; MoesaicError, with the nearest name, if there is none."""
    if name not in PRESETS:
        raise MoesaicError(f"device preset {_unknown(name, PRESETS)}")
    return PRESETS[name]
