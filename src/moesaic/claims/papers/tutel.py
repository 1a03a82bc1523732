"""Tutel (2206.03382): the degree of a layer chosen by its capacity, and where the two-dimensional all-to-all pays."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from moesaic.data.domain import Domain
    from moesaic.simulate.cluster_cost import AdaptiveCost

DEVICES, EXPERTS, D, FFN, TOKENS = 64, 16, 2048, 32768, 4096  # of the count of moved numbers
FACTORS = (1, 2, 4, 8, 16)
EXPECTED = (4, 2, 1, 1, 1)
WORLD, PER_NODE, HELD = 16, 8, 4  # of the served layer: devices, to a node, experts
CAPACITIES, MEDIAN, SPREAD = 400, 512, 1.5  # slots of an expert over time: log-normal
SCALES = (2, 4, 8, 16, 32, 64, 128)  # nodes of 8 devices
SMALL = 2**20  # bytes a device holds for all others


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Degrees by capacity factor, seconds of adaptive and fixed degrees, the crossover of all-to-alls; see `Run`."""
    return {**degrees(), **adapted(seed, scale), **all_to_alls()}


def degrees() -> dict[str, float]:
    """The degree that moves least, by capacity factor: a count, the same for every seed."""
    from moesaic.schedule.adaptive import Layer, best_degree

    layer = Layer(DEVICES, EXPERTS, TOKENS, D, FFN)
    best = [best_degree(layer, factor) for factor in FACTORS]
    result = {f"degree_{factor}": float(r) for factor, r in zip(FACTORS, best, strict=True)}
    return {**result, "degrees_off": float(sum(r != wanted for r, wanted in zip(best, EXPECTED, strict=True)))}


def adapted(seed: int, scale: float) -> dict[str, float]:
    """Seconds of a layer whose capacity changes from step to step: by table, and with each fixed choice."""
    import numpy as np

    from moesaic.schedule.adaptive import Choice, valid_degrees

    cost = layer_cost()
    rng = np.random.default_rng(seed)
    count = max(8, round(CAPACITIES * scale))
    capacities = np.maximum(1, MEDIAN * np.exp(SPREAD * rng.standard_normal(count))).astype(int).tolist()
    measure = cost.table.measure
    fixed = {
        choice: sum(measure(capacity, choice) for capacity in capacities)
        for choice in (
            Choice(r, d, kind)
            for r in valid_degrees(cost.owners)
            for d in cost.table.chunks
            for kind in cost.table.kinds
        )
    }
    chosen = [cost.table.lookup(capacity) for capacity in capacities]
    adaptive = sum(measure(capacity, choice) for capacity, choice in zip(capacities, chosen, strict=True))
    plain = {r: fixed[Choice(r, 1, "flat")] for r in valid_degrees(cost.owners)}
    return {
        "over_best": adaptive / min(fixed.values()),
        "over_worst_degree": adaptive / max(plain.values()),
        "over_default": adaptive / plain[1],
        "degrees_used": float(len({choice.r for choice in chosen})),
    }


def layer_cost() -> "AdaptiveCost":
    """One mixture layer on two nodes of eight A100, its experts shared by four devices each."""
    from moesaic.schedule.card import Card
    from moesaic.schedule.placement import parallel
    from moesaic.schedule.topology import preset
    from moesaic.schedule.work import Layout
    from moesaic.simulate.cluster_cost import AdaptiveCost
    from moesaic.simulate.stage_cost import CostSpec, Overhead

    card = Card("layer", 1, HELD, 1, "gate", D, FFN // 4, 16, 16, 128, 32000, matrices=2)
    placed = parallel(1, HELD, HELD, WORLD // HELD)
    spec = CostSpec(placement=placed, adaptive_r=True, overlap="best", overhead=Overhead(chunk=10e-6))
    machine = preset("2x8-a100-ib").spread(WORLD, PER_NODE)
    return AdaptiveCost(card, Layout.layer_experts(card.expert_bytes()).bytes, machine, spec)


def all_to_alls() -> dict[str, float]:
    """Seconds of the two-dimensional all-to-all over the flat one, by the number of nodes."""
    from moesaic.schedule.collective import all_to_all
    from moesaic.schedule.topology import preset

    ratios = {}
    for nodes in SCALES:
        machine = preset("2x8-a100-ib").spread(nodes * PER_NODE, PER_NODE)
        ratios[nodes] = all_to_all("2dh", machine, SMALL).seconds / all_to_all("flat", machine, SMALL).seconds
    crossing = next((nodes * PER_NODE for nodes in SCALES if ratios[nodes] < 1), 2 * SCALES[-1] * PER_NODE)
    named = {f"two_dh_{nodes * PER_NODE}": ratio for nodes, ratio in ratios.items()}
    return {**named, "two_dh_from": float(crossing)}


CLAIM = Claim(
    name="tutel",
    paper="Tutel: Adaptive Mixture-of-Experts at Scale",
    arxiv="2206.03382",
    headline="The best parallelism of a mixture layer changes with its capacity; choosing it at every step, with the "
    "overlap and the all-to-all, gains 7 to 28 % over fixed parallelism, and the two-dimensional all-to-all wins "
    "at scale.",
    compares=f"numbers a device moves by degree r for {EXPERTS} experts of {D} x {FFN} on {DEVICES} devices, {TOKENS} "
    f"tokens each (the paper's Table 4); then a modelled layer of {HELD} experts on {WORLD} devices whose capacity is "
    f"log-normal around {MEDIAN} slots: choices from the table, measured at the first capacity of each bucket of 128, "
    "against every fixed choice of degree, overlap and all-to-all; and all-to-alls of "
    f"{SMALL >> 20} MiB a device on nodes of {PER_NODE}. Rooflines, not a cluster.",
    budgets="same layer, tokens and machine; a further chunk of an overlap costs 10 microseconds.",
    measures={
        **{
            f"degree_{factor}": f"best r at capacity factor {factor} (expected {r})"
            for factor, r in zip(FACTORS, EXPECTED, strict=True)
        },
        "degrees_off": "of these, not as expected",
        "over_best": "seconds by table over the best single choice for all steps",
        "over_worst_degree": "seconds by table over the worst fixed degree, no overlap, flat",
        "over_default": "seconds by table over r = 1, no overlap, flat",
        "degrees_used": "different degrees that the table chose",
        **{f"two_dh_{nodes * PER_NODE}": f"2DH over flat, {nodes * PER_NODE} devices" for nodes in SCALES},
        "two_dh_from": "devices from which 2DH is faster",
    },
    checks=(
        Check("degrees_off", below=0.5),
        Check("over_best", below=1.0),
        Check("over_default", below=0.93),
        Check(f"two_dh_{SCALES[-1] * PER_NODE}", below=1.0),
    ),
    files=("schedule/adaptive.py", "schedule/collective.py", "schedule/cost.py", "simulate/cluster_cost.py"),
    minutes=0.1,
    run=run,
    text=False,
)
