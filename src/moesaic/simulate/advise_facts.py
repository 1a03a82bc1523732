"""What the advisor measures before it proposes anything: bytes of the model, habits of the routes, one plain run.

    need of a device   backbone + keys and values + its experts     against its fast memory
    transitions        bits of the next layer's expert, given this layer's, on tokens they were not counted on
    link               bytes moved / seconds that nothing waited    against the link's bytes/s
Shapes: N rows of routes, L' route layers, E experts. Units: bytes, bytes/s, seconds, tokens, bits; shares in 0..1.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.files import human_bytes
from moesaic.schedule import affinity
from moesaic.schedule.card import Card
from moesaic.schedule.placement import Placement
from moesaic.schedule.topology import PRESETS, Topology, preset
from moesaic.schedule.trace import EMPTY, Trace
from moesaic.simulate.models import at_size, find_shape
from moesaic.simulate.simulator import Limits, Run
from moesaic.simulate.spread import crossing, place
from moesaic.simulate.stage_cost import NUMBER
from moesaic.simulate.system import Parallel, size

Array = NDArray[Any]
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """The machine and the wish; None = as the device preset has it.

    memory: fast memory of one device, for backbone, keys and values, and experts: bytes or 8GiB.
    link:   from slow to fast memory, bytes/s or 25GB/s.
    slo:    seconds that 95 % of the requests should not exceed, end to end.
    events: about so many expert calls of the trace's first requests are run for each option.
    """

    device: str | None = None
    memory: float | str | None = None
    link: float | str | None = None
    devices: int | None = None
    limits: Limits = field(default_factory=Limits)
    slo: float | None = None
    events: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.slo is not None and not 0 < self.slo < float("inf"):
            raise MoesaicError(f"slo {self.slo}: expected seconds above 0")
        if self.events < 1:
            raise MoesaicError(f"events {self.events}: expected at least one expert call a run")

    @property
    def preset(self) -> str:
        """The device, by default an A100, alone or eight in a node."""
        return self.device or ("a100-pcie" if (self.devices or 1) == 1 else "2x8-a100-ib")


def machine_of(ask: Ask) -> Topology:
    """The preset with the memory, link and number of devices that were asked for.

    Raises MoesaicError for an unknown preset, a link of no bandwidth, and devices that do not fill nodes.
    """
    machine = preset(ask.preset)
    if ask.memory is not None:
        fast, capacity = machine.units[0].tier, size(ask.memory)
        tiers = [replace(tier, capacity=capacity) if tier.name == fast else tier for tier in machine.tiers]
        machine = replace(machine, tiers=tiers)
    if ask.link is not None:
        if re.fullmatch(r"[0.]+\D*", str(ask.link).strip()):
            raise MoesaicError(f"link {ask.link}: over a zero-bandwidth link no expert arrives; expected 25GB/s, say")
        first = replace(machine.links[0], bandwidth=size(ask.link))
        machine = replace(machine, links=(first, *machine.links[1:]))
    if ask.devices is None:
        return machine
    if ask.devices > 1 and machine.intra is None:
        several = [name for name, each in PRESETS.items() if each.intra is not None]
        raise MoesaicError(f"device {machine.name} has no link to others of its kind: take {' or '.join(several)}")
    return machine.spread(ask.devices, min(ask.devices, machine.per_node))


def model_of(trace: Trace, model: str) -> Trace:
    """The trace at the size of a model: a shape's name, a config.json or its folder; `trace` = the traced model.

    Raises MoesaicError for an unknown model, with the nearest name, and for one that cannot have made these routes.
    """
    if model == "trace":
        return trace
    own = _refactored(Path(model))
    card = trace.card
    if own is not None:
        if own != (card.layers, card.experts):
            raise MoesaicError(
                f"{model} has {own[0]} layers and {own[1]} experts, but the trace is of {card.model} with "
                f"{card.layers} and {card.experts}: record a trace of this model"
            )
        return trace
    shape = find_shape(model)
    if shape.experts and shape.top_k and shape.top_k != card.top_k:
        raise MoesaicError(
            f"{shape.name} runs {shape.top_k} experts a token, but the trace chooses {card.top_k}: take a trace of it"
        )
    return at_size(trace, shape)


def _refactored(path: Path) -> tuple[int, int] | None:
    """(layers, experts) of a checkpoint of ours, whose other sizes are on the trace's card; None for other models."""
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # `find_shape` says what is wrong with it
    if not isinstance(config, dict) or config.get("model_type") != "moesaic":
        return None
    return len(config.get("layouts") or ()), len(config.get("expert_names") or ())


# -- bytes -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Budget:
    """Bytes of one device.

    kv:      keys and values of the longest requests that may run at once: no run needs more.
    experts: of the whole model, stored once; held: what the device with most of them holds.
    step:    the largest expert of a layer: nothing runs with less room.
    """

    memory: int
    backbone: int
    kv: int
    experts: int
    held: int
    step: int

    @property
    def room(self) -> int:
        """What is left for experts."""
        return self.memory - self.backbone - self.kv

    @property
    def fits(self) -> bool:
        return self.held <= self.room

    @property
    def need(self) -> int:
        """With all experts of the device resident."""
        return self.backbone + self.kv + self.held

    def numbers(self) -> Numbers:
        """For the report."""
        names = ("memory", "backbone", "kv", "experts", "held", "step", "room", "need")
        return {**{f"{name}_bytes": getattr(self, name) for name in names}, "fits": self.fits}


def budget_of(trace: Trace, machine: Topology, limits: Limits, weight_bytes: float | None = None) -> Budget:
    """What the model needs on a device; `weight_bytes`: of the experts' parameters, None = as they are."""
    card = trace.card
    experts = replace(card, weight_bytes=weight_bytes or card.weight_bytes)
    devices = machine.devices
    kv_token = 2 * NUMBER * card.layers * card.kv_heads * card.head_dim
    longest = np.sort(trace.prompt_tokens + trace.decode_tokens)[-limits.max_requests :]
    return Budget(
        memory=int(machine.tier(machine.units[0].tier).capacity),
        backbone=backbone_bytes(card),
        kv=int(-(-kv_token * int(longest.sum()) // devices)),
        experts=stored_bytes(experts),
        held=held_bytes(experts, devices),
        step=max(map(max, experts.expert_bytes())),
    )


def backbone_bytes(card: Card) -> int:
    """Attention, routers, the FFN that all tokens share, embedding and head (as two tables: untied)."""
    attention = 2 * card.d * card.head_dim * (card.heads + card.kv_heads)
    layer = attention + card.d * card.experts + card.shared_params
    return int((card.layers * layer + 2 * card.d * card.vocab) * card.weight_bytes)


def stored_bytes(card: Card) -> int:
    """All experts, a channel that several of them share stored once."""
    if card.blocks is None:
        return sum(map(sum, card.expert_bytes()))
    return sum(card.bytes_of(width) for row in card.blocks for width, _ in row)


def held_bytes(card: Card, devices: int) -> int:
    """Of the device with most, experts dealt in order, or each sliced evenly where there are fewer than devices.

    A channel that experts of several devices share is stored on each of them.
    """
    groups, slices = min(devices, card.experts), max(1, devices // card.experts)
    owner = np.arange(card.experts) * groups // card.experts
    most = 0
    for group in range(groups):
        mine = set(np.flatnonzero(owner == group).tolist())
        if card.blocks is None:
            held = card.layers * len(mine) * card.bytes_of(card.ffn)
        else:
            held = sum(
                card.bytes_of(width) for row in card.blocks for width, owners in row if mine.intersection(owners)
            )
        most = max(most, held)
    return -(-most // slices)


def check(budget: Budget, machine: Topology, limits: Limits) -> None:
    """Raise MoesaicError unless one expert fits beside the rest, and all of them into the slow memory."""
    step = min(budget.step, budget.held)
    if budget.room < step:
        least = budget.backbone + budget.kv + step
        raise MoesaicError(
            f"memory {human_bytes(budget.memory)} is below the minimum of {human_bytes(least)} ({least} bytes): "
            f"backbone {human_bytes(budget.backbone)}, keys and values of {limits.max_requests} requests "
            f"{human_bytes(budget.kv)}, one expert {human_bytes(step)}; give more, or run fewer requests at once"
        )
    slow = machine.tier(machine.links[0].src)
    if machine.devices == 1 and not budget.fits and budget.experts > slow.capacity:
        raise MoesaicError(
            f"the experts have {human_bytes(budget.experts)}, more than the {slow.name} of {machine.name} holds "
            f"({human_bytes(slow.capacity)}): take a device with a larger one"
        )


def rate(bytes_per_s: float) -> str:
    """For people, in the units that links are sold in."""
    giga = bytes_per_s / 1e9
    return f"{giga:,.0f} GB/s" if giga >= 100 else f"{giga:.3g} GB/s"


# -- routes ------------------------------------------------------------------------------------------------------------
def routes_of(trace: Trace) -> Numbers:
    """Load, skew, locality in time and between layers.

    least_half: share of the choices in the second half of the rows that fall on the half of a layer's experts that was
    less used in the first: held out, because few choices make any load look skewed. Mean over layers.
    imbalance: tokens of the busiest expert of a layer over the mean, in all rows; mean over layers.
    """
    half, few = len(trace.routes) // 2, trace.card.experts // 2
    before_LE, after_LE = _load(trace, slice(0, half or None)), _load(trace, slice(half, None))
    least = np.argsort(before_LE, axis=1, kind="stable")[:, :few]
    return {
        "known_at": trace.card.known_at,
        "experts": trace.card.experts,
        "top_k": trace.card.top_k,
        "least_half": float(np.take_along_axis(after_LE, least, 1).sum(1).mean()),
        "imbalance": float(_load(trace).max(1).mean() * trace.card.experts),
        "stay": trace.stay(),
        "unique_experts": {str(batch): trace.unique_experts(batch) for batch in (1, 8, 32)},
        **_bits(trace),
    }


def _load(trace: Trace, rows: slice = slice(None)) -> Array:
    """Share of each layer's choices in some rows on each expert, (L', E)."""
    weight = trace.row_tokens()[rows, None]
    counts = []
    for routes_NK in trace.routes[rows].swapaxes(0, 1):
        used = routes_NK != EMPTY
        counts.append(np.bincount(routes_NK[used], np.broadcast_to(weight, used.shape)[used], trace.card.experts))
    load_LE = np.stack(counts)
    return np.asarray(load_LE / np.maximum(load_LE.sum(1, keepdims=True), 1))


def _bits(trace: Trace) -> Numbers:
    """Cross-entropy of the next layer's expert on the second half of the rows, counted on the first.

    One more count of each expert, and after each expert one more count spread like all, so that no chance is 0.

    Held out, because few rows make any transition look certain. None where one choice holds in all layers.
    """
    half = len(trace.routes) // 2
    if trace.route_layers == 1 or not half:
        return {"transition_bits": None, "alone_bits": None, "transition_ratio": None}
    E = trace.card.experts
    seen, new = (affinity.transitions(rows, E) for rows in (trace.routes[:half], trace.routes[half:]))
    alone = (seen.sum(1, keepdims=True) + 1) / (seen.sum((1, 2), keepdims=True) + E)
    given = (seen + alone) / (seen.sum(2, keepdims=True) + 1)
    total = new.sum()
    bits = [float(-(new * np.log2(p)).sum() / total) for p in (given, np.broadcast_to(alone, given.shape))]
    return {
        "transition_bits": bits[0],
        "alone_bits": bits[1],
        "transition_ratio": bits[0] / bits[1] if bits[1] else None,
    }


@dataclass(frozen=True)
class Crossing:
    """Share of transitions that change device, contiguous and by affinity, both on requests it was not fitted to."""

    before: float
    after: float
    inter: float
    placement: Placement

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else 1.0


def crossing_of(trace: Trace, machine: Topology) -> Crossing | str:
    """What affinity gains, or why it cannot be measured."""
    if machine.devices == 1:
        return "one device"
    if trace.route_layers == 1:
        return "one choice holds in all layers: tokens stay where they are as experts are dealt"
    if trace.card.experts % machine.devices:
        return f"{trace.card.experts} experts do not divide over {machine.devices} devices"
    try:
        placed = place(trace, machine, Parallel(placement="affinity"))
        before, after = (crossing(trace, machine, each) for each in (place(trace, machine, Parallel()), placed))
    except MissingExtraError as error:
        return str(error)
    return Crossing(before.intra + before.inter, after.intra + after.inter, after.inter, placed)


# -- a run -------------------------------------------------------------------------------------------------------------
def run_numbers(trace: Trace, machine: Topology, report: Numbers, run: Run) -> Numbers:
    """What a run says of the machine: link, compute and exchange, and how full the experts are in decode.

    link_needed: bytes moved over seconds in which nothing waited; above the link's bandwidth the engine must wait.
    decode_tokens_per_expert: in stages without prompts; None without such a stage. ridge_tokens: from where on an
    expert is bound by flops. message_bytes: to one peer in one exchange, mean of stages.
    """
    working = sum(row.seconds - row.stall_s for row in run.stages)
    decode = [row for row in run.stages if not row.prefill_tokens]
    experts = sum(row.experts for row in decode)
    tokens = sum(row.decode_tokens for row in decode)
    rows = report["tokens"]["run"] * trace.card.top_k / max(report["stages"], 1)
    return {
        "bytes_per_token": report["bytes_per_token"],
        "stall_share": report["stall_share"],
        "collective_share": report["collective_share"],
        "link_needed": report["moved_bytes"] / working if working else 0.0,
        "link_there": machine.links[0].bandwidth,
        "busy_share": working / max(run.end_s - float(trace.arrival_s[0]), 1e-12),
        "experts_per_step": report["experts_per_step"],
        "tokens_per_step": report["tokens_per_step"],
        "decode_tokens_per_expert": tokens * trace.card.top_k / experts if experts else None,
        "ridge_tokens": machine.units[0].ridge * trace.card.weight_bytes / 2,
        "message_bytes": rows * trace.card.d * NUMBER / machine.devices**2,
    }


def head(trace: Trace, events: int, limits: Limits) -> Trace:
    """The first requests whose expert calls, counted from above, stay within `events`; at least two, if there are."""
    card = trace.card
    stages = -(-trace.prompt_tokens // limits.max_tokens)
    wide = np.minimum(trace.prompt_tokens * card.top_k, stages * card.experts)
    calls = np.cumsum((wide + trace.decode_tokens * card.top_k) * card.layers)
    return trace.head(min(max(2, int(np.searchsorted(calls, events, side="right"))), trace.requests))
