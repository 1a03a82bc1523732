"""ExFlow (2401.08383): experts placed by inter-layer affinity, and one all-to-all a layer instead of two."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from moesaic.data.domain import Domain
    from moesaic.schedule.trace import Trace

SOLVABLE = {"l4": (4, 8, 4), "l6": (6, 8, 4), "l12": (12, 8, 4)}  # layers, experts, devices: optima can be proven
TOKENS, PROFILE = 12_000, 5_000
SHARP, FLAT = 0.1, 1.0  # of the Dirichlet that transitions are drawn from
LAYERS, EXPERTS, WIDTH, REQUESTS = 24, 32, 1024, 64
BATCHES = (4, 256, 4096)  # tokens a device
SYSTEMS: dict[str, tuple[str, dict[str, str]]] = {
    "exflow": ("exflow", {}),
    "flat": ("deepspeed", {"parallel.placement": "contiguous", "parallel.collective": "flat"}),
    "coherent": ("exflow", {"parallel.placement": "contiguous"}),
    "deepspeed": ("deepspeed", {}),
}
BASELINES = {"flat": "flat", "coherent": "contiguous with one all-to-all", "deepspeed": "hierarchical"}


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Crossing shares against proven optima, tokens sent, simulated throughput and latency; see `Run`."""
    result: dict[str, float] = {}
    for name, sizes in SOLVABLE.items():
        result |= {f"{key}_{name}": value for key, value in placed(seed, sizes, SHARP, scale).items()}
    result["affinity_plain"] = placed(seed, SOLVABLE["l6"], FLAT, scale)["affinity"]
    result["worst_gap"] = max(result.pop(f"gap_{name}") for name in SOLVABLE)
    return {**result, **served(seed, scale)}


def placed(seed: int, sizes: tuple[int, int, int], sharpness: float, scale: float) -> dict[str, float]:
    """Crossing shares on held-out tokens; gap: what the fast solver loses to the optimum on the profiled ones."""
    from moesaic.schedule.affinity import contiguous, cost, crossing, transitions
    from moesaic.schedule.affinity_assign import assign
    from moesaic.schedule.affinity_exact import solve_chain
    from moesaic.schedule.synthetic import Synthetic, synthesize

    layers, experts, devices = sizes
    tokens, profile = (max(200, round(count * scale)) for count in (TOKENS, PROFILE))
    chain = Synthetic(
        requests=tokens + profile,
        prompt=1,
        prompt_sigma=0,
        output=0,
        layers=layers,
        route_layers=layers,
        experts=experts,
        stay=0,
        sharpness=sharpness,
        seed=seed,
    )
    routes_NLK = synthesize(chain).routes
    profiled, held_out = transitions(routes_NLK[:profile], experts), transitions(routes_NLK[profile:], experts)
    found, optimum = assign(profiled, devices, seed=seed, exact=False), solve_chain(profiled, devices)
    return {
        "contiguous": crossing(held_out, contiguous(layers, experts, devices)),
        "affinity": crossing(held_out, found),
        "optimum": crossing(held_out, optimum.device_LE),
        "hindsight": crossing(held_out, solve_chain(held_out, devices).device_LE),
        "gap": cost(profiled, found) / optimum.cost - 1 if optimum.cost else 0.0,
    }


def served(seed: int, scale: float) -> dict[str, float]:
    """Systems of the same devices on the same requests, all there from the start; and their exchanges by formula."""
    from dataclasses import replace

    from moesaic.simulate.sweep import simulate
    from moesaic.simulate.system import read_system

    trace = requests(seed, scale)
    trace = replace(trace, arrival_s=0 * trace.arrival_s)
    reports = {name: simulate(trace, read_system(*source), seed, bounds=False) for name, source in SYSTEMS.items()}
    rates = {name: report["throughput"]["tokens_per_s"] for name, report in reports.items()}
    latency = {name: report["latency_s"]["end_to_end"]["mean"] for name, report in reports.items()}
    share = {name: reports[name]["crossing_share"] for name in ("exflow", "coherent")}
    return {
        "crossing_contiguous": share["coherent"]["all"],
        "crossing_exflow": share["exflow"]["all"],
        "between_contiguous": share["coherent"]["inter"],
        "between_exflow": share["exflow"]["inter"],
        **exchanged(trace.card.layers, share["coherent"], share["exflow"]),
        **{f"throughput_over_{name}": rates["exflow"] / rates[name] for name in BASELINES},
        **{f"latency_ms_{name}": 1e3 * seconds for name, seconds in latency.items()},
        **{f"latency_over_{name}": latency["exflow"] / latency[name] for name in BASELINES},
    }


def exchanged(layers: int, usual: dict[str, float], placed: dict[str, float]) -> dict[str, float]:
    """A step's exchanges, ExFlow over others: tokens sent, and seconds by tokens a device."""
    from moesaic.schedule.collective import Step, hierarchical, step_moves, step_traffic
    from moesaic.schedule.topology import preset

    machine, width = preset("2x8-a100-ib"), 2.0 * WIDTH

    def step(tokens: int, share: dict[str, float]) -> Step:
        return Step(layers, tokens, width, share["all"], share["inter"])

    flat = step_moves(step(1, usual), machine.devices, coherent=False)
    result = {
        "moves_ratio": step_moves(step(1, placed), machine.devices, coherent=True) / flat,
        "moves_ratio_coherent": step_moves(step(1, usual), machine.devices, coherent=True) / flat,
    }
    for tokens in BATCHES:
        own = step_traffic(step(tokens, placed), machine, coherent=True).seconds
        others = {
            "flat": step_traffic(step(tokens, usual), machine, coherent=False).seconds,
            "coherent": step_traffic(step(tokens, usual), machine, coherent=True).seconds,
            "deepspeed": 2 * layers * hierarchical(machine, tokens * width).seconds,
        }
        result |= {f"routing_{tokens}_over_{name}": own / seconds for name, seconds in others.items()}
    return result


def requests(seed: int, scale: float) -> "Trace":
    """Top-1 routes of a mixture with GPT-350M's sizes, every layer routed."""
    from moesaic.schedule.synthetic import Synthetic, synthesize

    layers = max(4, round(LAYERS * scale))
    return synthesize(
        Synthetic(
            requests=max(8, round(REQUESTS * scale)),
            prompt=64,
            output=16,
            layers=layers,
            route_layers=layers,
            experts=EXPERTS,
            stay=0,
            sharpness=SHARP,
            known_at="gate",
            d=WIDTH,
            ffn=4 * WIDTH,
            matrices=2,
            seed=seed,
        )
    )


ALL = {"exflow": "ExFlow", **BASELINES}
SIZE_WORDS = {name: "{} layers, {} experts on {} devices".format(*sizes) for name, sizes in SOLVABLE.items()}
SHARES = {
    "contiguous": "contiguous",
    "affinity": "affinity by the fast solver",
    "optimum": "proven optimum of the profiled tokens",
    "hindsight": "proven optimum of the held-out tokens themselves",
}
CLAIM = Claim(
    name="exflow",
    paper="Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model Inference",
    arxiv="2401.08383",
    headline="Experts that follow each other, put on one device, and tokens that stay where their expert was save up "
    "to 67 % of the routing latency between devices, and give up to 2.2 times the throughput.",
    compares=f"Markov chains over experts with rows from a Dirichlet of {SHARP} ({FLAT:g} for one number), {PROFILE:,} "
    f"tokens to place by and {TOKENS:,} others to score; then {REQUESTS} requests of a top-1 mixture of {LAYERS} "
    f"layers, {EXPERTS} experts, width {WIDTH}, all there from the start, simulated on 2 nodes of 8 A100: contiguous "
    "experts with two flat all-to-alls a layer (what the released DeepSpeed runs), the same with one, and "
    "DeepSpeed-MoE's hierarchical two. ExFlow's one is flat, and every message pays its latency. Making new keys and "
    "values known to all devices is not charged; how sharp real routes are is an assumption here.",
    budgets="same devices, experts a device, requests and arrivals; placements are fitted to other tokens than scored.",
    measures={
        **{f"{key}_{name}": f"{words}, {SIZE_WORDS[name]}" for name in SOLVABLE for key, words in SHARES.items()},
        "affinity_plain": f"affinity by the fast solver, {SIZE_WORDS['l6']}, Dirichlet {FLAT:g}",
        "worst_gap": "fast solver's crossing over the proven optimum's on the profiled tokens, minus 1, worst size",
        "crossing_contiguous": "tokens that change device a layer, contiguous, 16 devices",
        "crossing_exflow": "tokens that change device a layer, ExFlow, 16 devices",
        "between_contiguous": "tokens that change node a layer, contiguous",
        "between_exflow": "tokens that change node a layer, ExFlow",
        "moves_ratio": "tokens sent a step, ExFlow over contiguous with two all-to-alls",
        "moves_ratio_coherent": "the same of one all-to-all alone, contiguous",
        **{
            f"routing_{tokens}_over_{name}": f"seconds of exchanges, {tokens} tokens a device, ExFlow over {words}"
            for tokens in BATCHES
            for name, words in BASELINES.items()
        },
        **{f"throughput_over_{name}": f"throughput, ExFlow over {words}" for name, words in BASELINES.items()},
        **{f"latency_ms_{name}": f"mean end-to-end ms, {words}" for name, words in ALL.items()},
        **{f"latency_over_{name}": f"end-to-end latency, ExFlow over {words}" for name, words in BASELINES.items()},
    },
    checks=(
        Check("affinity_l6", below=0.45),
        Check("worst_gap", below=0.01),
        Check("moves_ratio", below=1.0),
        Check("latency_over_flat", below=1.0),
        Check("latency_over_deepspeed", below=1.0),
    ),
    files=(
        "schedule/affinity.py",
        "schedule/affinity_assign.py",
        "schedule/affinity_exact.py",
        "schedule/collective.py",
        "schedule/synthetic.py",
        "schedule/topology.py",
        "simulate/cluster_cost.py",
        "simulate/simulator.py",
        "simulate/spread.py",
        "simulate/stage_cost.py",
        "simulate/systems/deepspeed.yaml",
        "simulate/systems/exflow.yaml",
    ),
    minutes=0.5,
    run=run,
    text=False,
)
