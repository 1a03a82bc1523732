"""Where a system's experts live on its devices, and what that means for a trace: placement and crossing shares."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MoesaicError
from moesaic.schedule import affinity
from moesaic.schedule.affinity_assign import staged
from moesaic.schedule.placement import Placement, contiguous, degrees, parallel, replicate_hot, round_robin, whole
from moesaic.schedule.topology import Topology
from moesaic.schedule.trace import EMPTY, Trace
from moesaic.simulate.stage_cost import CostSpec
from moesaic.simulate.system import Parallel

PROFILE_SHARE = 0.5  # of the requests, the first ones: what affinity is fitted to; it is scored on the others


def spread(trace: Trace, machine: Topology, options: Parallel) -> CostSpec:
    """How stages cost on the machine under these options.

    Raises MoesaicError where experts and devices do not divide as the placement needs.
    """
    spec = CostSpec(
        split=options.split,
        tensor=options.tensor,
        overlap=options.overlap or "best",
        adaptive_r=options.adaptive_r,
        capacity=options.capacity,
        efficiency=options.efficiency,
    )
    if machine.devices == 1 or options.split:
        return spec
    placed = place(trace, machine, options)
    shares: tuple[float | None, float | None] = (None, None)
    if options.collective == "coherent":
        moved = crossing(trace, machine, placed)
        shares = (moved.intra + moved.inter, moved.inter)
    return replace(spec, placement=placed, collective=options.collective, leave=shares[0], inter_leave=shares[1])


def place(trace: Trace, machine: Topology, options: Parallel) -> Placement:
    """Experts on devices, with copies of the hot ones."""
    layers, experts, devices = trace.card.layers, trace.card.experts, machine.devices
    if options.placement == "affinity":
        counts = affinity.transitions(_every_layer(trace, _profiled(trace)), experts)
        placed = whole(staged(counts, machine.nodes, machine.per_node), devices)
    elif options.placement == "parallel":
        expert, tensor, data = degrees(devices, experts)
        placed = parallel(layers, experts, expert, tensor, data)
    else:
        placed = (contiguous if options.placement == "contiguous" else round_robin)(layers, experts, devices)
    if options.replicas:
        placed = replicate_hot(placed, tokens_LE(trace), options.replicas)
    return placed


def crossing(trace: Trace, machine: Topology, placed: Placement) -> affinity.Flow:
    """Where the transitions of the requests go that placements are not fitted to."""
    counts = affinity.transitions(_every_layer(trace, ~_profiled(trace)), trace.card.experts)
    return affinity.flow(counts, placed.device_LE(), machine.devices, machine.per_node)


def tokens_LE(trace: Trace) -> NDArray[np.float64]:
    """Tokens of each expert in each layer among the profiled requests, (L, E)."""
    routes = _every_layer(trace, _profiled(trace))
    return np.stack([np.bincount(row[row != EMPTY], minlength=trace.card.experts) for row in routes.swapaxes(0, 1)])


def _profiled(trace: Trace) -> NDArray[np.bool_]:
    """The rows of the first half of the requests; requests of one recording share theirs."""
    used = np.zeros(len(trace.routes), dtype=bool)
    for request in range(max(1, int(trace.requests * PROFILE_SHARE))):
        for kind in ("prompt", "decode"):
            start, rows = (int(getattr(trace, f"{kind}_{name}")[request]) for name in ("row", "rows"))
            used[start : start + rows] = True
    if used.all():
        raise MoesaicError(
            "all requests of the trace share rows, so a placement cannot be scored on others than it was fitted to: "
            "record more prompts"
        )
    return used


def _every_layer(trace: Trace, rows: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Routes of the rows, (N, L, K); a choice that holds in all layers is repeated."""
    routes = trace.routes[rows]
    return np.broadcast_to(routes, (len(routes), trace.card.layers, routes.shape[2]))
