"""DeepSpeed-MoE (2201.05596), inference: hops and bytes of the all-to-alls, and where each is the fastest."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from moesaic.data.domain import Domain

DEVICES, PER_NODE, TENSOR, WIDTH = 128, 8, 8, 4096  # width of a token in numbers of 16 bits
TOKENS = (1, 4, 16, 64, 256, 1024)  # of a device
KINDS = ("flat", "hierarchical", "coordinated")
SERVED_DEVICES = 16


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Counts, seconds by batch, and serving with a flat and a hierarchical exchange; see `Run`."""
    return {**counts(), **seconds(), **served(seed, scale)}


def counts() -> dict[str, float]:
    """Latency steps and bytes a device sends: counts, the same for every seed."""
    from moesaic.schedule.collective import all_to_all, hops
    from moesaic.schedule.topology import preset

    machine = preset("2x8-a100-ib").spread(DEVICES, PER_NODE)
    flat, hierarchical = (all_to_all(kind, machine, 2.0**20) for kind in ("flat", "hierarchical"))
    volume = (hierarchical.intra_bytes + hierarchical.inter_bytes) / (flat.intra_bytes + flat.inter_bytes)
    steps = {f"hops_{kind}": float(hops(kind, DEVICES, PER_NODE, TENSOR)) for kind in KINDS}  # type: ignore[arg-type]
    off = sum(steps[f"hops_{kind}"] != wanted for kind, wanted in zip(KINDS, (128, 24, 16), strict=True))
    return {**steps, "hops_off": float(off), "volume": volume}


def seconds() -> dict[str, float]:
    """Seconds of an exchange over the flat one's, by tokens of a device; tokens are replicated over tensor ranks."""
    from moesaic.schedule.collective import all_to_all
    from moesaic.schedule.topology import preset

    machine = preset("2x8-a100-ib").spread(DEVICES, PER_NODE)
    result = {}
    for tokens in TOKENS:
        size = tokens * WIDTH * 2.0
        flat = all_to_all("flat", machine, size).seconds
        for kind in KINDS[1:]:
            result[f"{kind}_{tokens}"] = all_to_all(kind, machine, size, TENSOR).seconds / flat  # type: ignore[arg-type]
    return result


def served(seed: int, scale: float) -> dict[str, float]:
    """Time between tokens of a served mixture with the hierarchical exchange, over that with the flat one."""
    from moesaic.schedule.synthetic import Synthetic, synthesize
    from moesaic.simulate.sweep import simulate
    from moesaic.simulate.system import read_system

    requests = max(4, round(60 * scale))
    sizes: dict[str, Any] = {
        "layers": 4,
        "route_layers": 4,
        "experts": SERVED_DEVICES,
        "k": 1,
        "d": WIDTH,
        "ffn": 4 * WIDTH,
    }
    made = Synthetic(requests=requests, rate=200.0, prompt=64, output=16, known_at="gate", seed=seed)
    trace, between = synthesize(replace(made, **sizes)), {}
    for kind in KINDS[:2]:
        result = simulate(trace, read_system("deepspeed", {"parallel.collective": kind}), seed, bounds=False)
        between[kind] = result["latency_s"]["tpot"]["mean"]
    return {"served": between["hierarchical"] / between["flat"]}


CLAIM = Claim(
    name="deepspeed-moe",
    paper="DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale",
    arxiv="2201.05596",
    headline="For the small messages of inference a hierarchical all-to-all needs G + p / G steps instead of p for "
    "twice the volume, and one that is coordinated with L tensor ranks p / L: 128, 24 and 16 steps on 128 GPUs.",
    compares=f"counts and modelled seconds of all-to-alls on {DEVICES} devices, {PER_NODE} to a node, {TENSOR} tensor "
    f"ranks, tokens of {WIDTH} numbers; and serving a made mixture of {SERVED_DEVICES} experts on 2 x 8 devices. "
    "Data-sheet bandwidths and assumed latencies, not a cluster.",
    budgets="same tokens, placement and machine.",
    measures={
        **{f"hops_{kind}": f"latency steps, {kind}" for kind in KINDS},
        "hops_off": "of these, not 128, 24 and 16",
        "volume": "bytes sent, hierarchical over flat (paper: 2)",
        **{
            f"{kind}_{tokens}": f"seconds, {kind} over flat, {tokens} tokens a device"
            for tokens in TOKENS
            for kind in KINDS[1:]
        },
        "served": "time between tokens, hierarchical over flat, 16 devices",
    },
    checks=(
        Check("hops_off", below=0.5),
        Check("hierarchical_1", below=1.0),
        Check("coordinated_1", below=1.0),
        Check("served", below=1.0),
    ),
    files=("schedule/collective.py", "schedule/placement.py", "schedule/topology.py", "simulate/cluster_cost.py"),
    minutes=0.1,
    run=run,
    text=False,
)
