"""Duplex (2409.01141): experts split over a processor and units in its memory, by their tokens."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from moesaic.data.domain import Domain
    from moesaic.schedule.trace import Trace

EXPERTS, TOP_K, D, FFN = 8, 2, 4096, 14336  # Mixtral 8x7B
TOKENS = (8, 16, 32, 64, 96, 128, 256, 512, 1024, 2048, 4096)
FEW = 128  # tokens below which memory should be faster
ROUTINGS = 200
BATCH, REQUESTS, PROMPT, OUTPUT, LAYERS = 64, 128, 256, 256, 4
POLICIES = ("xpu", "pim", "coprocess")


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Experts' time by tokens, relative to the processor alone; throughput of continuous batches; see `Run`."""
    return {**layers(seed, scale), **served(seed, scale)}


def layers(seed: int, scale: float) -> dict[str, float]:
    """Mean time of one layer's experts on one device over random routings, processor = 1."""
    import numpy as np

    from moesaic.schedule.cost import ExpertShape, expert_table
    from moesaic.schedule.split import coprocess
    from moesaic.schedule.topology import preset

    machine, shape = preset("h100+logic-pim"), ExpertShape(D, FFN)
    xpu, pim = (expert_table(machine.unit(name), shape, max(TOKENS)) for name in ("xpu", "pim"))
    rng = np.random.default_rng(seed)
    result, worst = {}, 0.0
    for tokens in TOKENS:
        total = np.zeros(3)
        for _ in range(max(2, round(ROUTINGS * scale))):
            chosen = rng.random((tokens, EXPERTS)).argpartition(TOP_K)[:, :TOP_K]
            tokens_E = np.bincount(chosen.ravel(), minlength=EXPERTS)
            times = (
                float(xpu[tokens_E].sum()),
                float(pim[tokens_E].sum()),
                coprocess(tokens_E.tolist(), xpu.tolist(), pim.tolist()).seconds,
            )
            worst = max(worst, times[2] / min(times[:2]))
            total += times
        result[f"pim_{tokens}"], result[f"split_{tokens}"] = (float(total[each] / total[0]) for each in (1, 2))
    few = max(result[f"pim_{tokens}"] for tokens in TOKENS if tokens < FEW)
    return {**result, "pim_few": few, "split_worst": worst}


def served(seed: int, scale: float) -> dict[str, float]:
    """Tokens per second and time between tokens of BATCH running requests on four devices."""
    from moesaic.simulate.sweep import simulate
    from moesaic.simulate.system import read_system

    trace, rates, between = requests(seed, scale), {}, {}
    machine = {"parallel.devices": 4, "parallel.per_node": 4, "parallel.tensor": 4, "limits.max_requests": BATCH}
    for policy in POLICIES:
        report = simulate(trace, read_system("duplex", {**machine, "parallel.split": policy}), seed, bounds=False)
        rates[policy], between[policy] = report["throughput"]["tokens_per_s"], report["latency_s"]["tpot"]["p50"]
    return {
        "rate_pim": rates["pim"] / rates["xpu"],
        "rate_coprocess": rates["coprocess"] / rates["xpu"],
        "rate_over_pim": rates["coprocess"] / rates["pim"],
        "between_pim": between["pim"] / between["xpu"],
        "between_coprocess": between["coprocess"] / between["xpu"],
    }


def requests(seed: int, scale: float) -> "Trace":
    """Twice as many requests as run at once, all there from the start, of different lengths; all experts as likely."""
    from moesaic.schedule.synthetic import Synthetic, synthesize
    from moesaic.simulate.models import SHAPES, at_size

    count = max(8, round(REQUESTS * scale))
    made = Synthetic(
        requests=count,
        arrival="burst",
        burst=count,
        prompt=PROMPT,
        output=max(8, OUTPUT * scale),
        layers=LAYERS,
        route_layers=LAYERS,
        experts=EXPERTS,
        k=TOP_K,
        stay=0,
        known_at="gate",
        seed=seed,
    )
    return at_size(synthesize(made), replace(SHAPES["mixtral-8x7b"], layers=LAYERS))


CLAIM = Claim(
    name="duplex",
    paper="Duplex: A Device for Large Language Models with Mixture of Experts, Grouped Query Attention, and "
    "Continuous Batching",
    arxiv="2409.01141",
    headline="Units in the memory, of four times the bandwidth and 8 flop a byte, run experts of few tokens faster "
    "than an H100, both together faster than either; up to 2.67 times the throughput of the GPU.",
    compares=f"rooflines of an H100 and such units (nobody can buy them) for the {EXPERTS} experts of a Mixtral layer "
    f"on one device, {ROUTINGS} uniform random top-{TOP_K} routings for each number of tokens: all experts on the "
    f"processor, all in memory, or the best split. Then continuous batches of {BATCH} requests simulated on 4 devices "
    f"that slice every expert: {REQUESTS} requests with about {PROMPT} prompt and {OUTPUT} output tokens, {LAYERS} "
    "layers of Mixtral's sizes; a policy that uses one unit uses it for attention too. Rooflines leave out what "
    "starting an operation and joining the sums cost.",
    budgets="same devices, weights, requests and routes; only the units used differ.",
    measures={
        **{f"pim_{tokens}": f"experts' time, {tokens} tokens, memory over processor" for tokens in TOKENS},
        **{f"split_{tokens}": f"experts' time, {tokens} tokens, split over processor" for tokens in TOKENS},
        "pim_few": f"the largest of memory over processor below {FEW} tokens",
        "split_worst": "largest split over the better single unit, any routing",
        "rate_pim": "throughput, memory over processor",
        "rate_coprocess": "throughput, split over processor",
        "rate_over_pim": "throughput, split over memory",
        "between_pim": "median time between tokens, memory over processor",
        "between_coprocess": "median time between tokens, split over processor",
    },
    checks=(
        Check("split_worst", below=1 + 1e-9),
        Check("pim_few", below=1.0),
        Check("split_4096", above=0.95),
        Check("rate_coprocess", above=1.0),
        Check("rate_over_pim", above=1.0),
    ),
    files=(
        "schedule/cost.py",
        "schedule/split.py",
        "schedule/synthetic.py",
        "schedule/topology.py",
        "simulate/models.py",
        "simulate/simulator.py",
        "simulate/stage_cost.py",
        "simulate/systems/duplex.yaml",
    ),
    minutes=0.5,
    run=run,
    text=False,
)
