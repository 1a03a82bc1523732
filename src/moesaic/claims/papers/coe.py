"""SN40L (2405.07518): a composition of experts, whole models behind a router, and what switching between them costs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from moesaic.data.domain import Domain
    from moesaic.schedule.cost import ExpertShape
    from moesaic.schedule.topology import Topology
    from moesaic.schedule.trace import Trace
    from moesaic.simulate.system import System

# Llama-2-7B: 6.738e9 parameters in 16 bits as one FFN of its depth and width, so that an entry is the whole model.
LAYERS, D, PARAMS = 32, 4096, 6.738e9
FFN = round(PARAMS / (3 * LAYERS * D))
MACHINES = {"sn40l": ("sn40l-node", 0.85), "a100": ("dgx-a100", 0.5), "h100": ("dgx-h100", 0.5)}  # share of bandwidth
GPUS = ("a100", "h100")
POOLS = (10, 20, 30, 40, 45, 50, 60, 80, 100, 150)
REQUESTS, PROMPT, SHORT, LONG, BATCH = 200, 128, 20, 200, 8
CONTEXT = 4096  # tokens of keys and values that stay in the fast memory
LARGEST = 850  # experts of the paper's largest pool


class Served(NamedTuple):
    """Seconds a prompt: all of it, of which switching; and all of it if the next expert is fetched meanwhile."""

    total: float
    switch: float
    overlapped: float


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Switch times, pools that fit, the jump, and speed-ups with and without overlapped switching; see `Run`."""
    result = switching()
    jumps = {}
    for name in GPUS:
        at_pool = {experts: served(seed, name, experts, SHORT, BATCH, scale) for experts in POOLS}
        shares = {experts: each.switch / each.total for experts, each in at_pool.items()}
        jumps[name] = min((experts for experts in POOLS if shares[experts] > 0), default=math.inf)
        result |= {f"switch_{name}_{experts}": share for experts, share in shares.items()}
    result["switch_sn40l_150"] = (own := served(seed, "sn40l", POOLS[-1], SHORT, BATCH, scale)).switch / own.total
    result["jump"] = max(jumps.values())
    result["switch_fits"] = max(result[f"switch_{name}_{experts}"] for name in GPUS for experts in POOLS[:4])
    for out, batch in ((SHORT, BATCH), (SHORT, 1), (LONG, BATCH), (LONG, 1)):
        times = {name: served(seed, name, POOLS[-1], out, batch, scale) for name in MACHINES}
        for name in GPUS:
            result[f"speed_{name}_{out}_{batch}"] = times[name].total / times["sn40l"].total
            result[f"ahead_{name}_{out}_{batch}"] = times[name].overlapped / times["sn40l"].overlapped
    for name in GPUS:
        result[f"batch_gain_{name}"] = result[f"speed_{name}_{SHORT}_{BATCH}"] - result[f"speed_{name}_{SHORT}_1"]
    return result


def switching() -> dict[str, float]:
    """What follows from capacities and links alone."""
    from moesaic.schedule.cost import move_time
    from moesaic.schedule.topology import preset

    size = model().bytes
    machines = {name: preset(device) for name, (device, _) in MACHINES.items()}
    seconds = {name: move_time(machine.links[0], size) for name, machine in machines.items()}
    held = {name: int(room(machine) // size) for name, machine in machines.items()}
    stored = {name: int(machine.tiers[1].capacity // size) for name, machine in machines.items()}
    return {
        **{f"switch_ms_{name}": 1e3 * each for name, each in seconds.items()},
        **{f"switch_ratio_{name}": seconds[name] / seconds["sn40l"] for name in GPUS},
        **{f"fast_{name}": held[name] for name in MACHINES},
        **{f"slow_{name}": stored[name] for name in MACHINES},
        "nodes": math.ceil(LARGEST / held["h100"]),
    }


def model() -> "ExpertShape":
    """One expert: a whole model, its layers one after the other."""
    from moesaic.schedule.cost import ExpertShape

    return ExpertShape(D, LAYERS * FFN)


def room(machine: "Topology") -> float:
    """Bytes of the fast memory that are left beside the router, itself such a model, and the keys and values."""
    return machine.tiers[0].capacity - model().bytes - CONTEXT * LAYERS * 2 * D * 2


def system(name: str, batch: int) -> "System":
    """The paper's runtime on that machine; the fast memory is full from the start, as in a pool that is in use."""
    from moesaic.schedule.topology import preset
    from moesaic.simulate.system import read_system

    device, efficiency = MACHINES[name]
    changes = {
        "device": device,
        "cache.capacity": room(preset(device)),
        "cache.preload": True,
        "batcher.batch": batch,
        "parallel.efficiency": efficiency,
    }
    return read_system("sn40l-coe", changes)


def served(seed: int, name: str, experts: int, out: int, batch: int, scale: float) -> Served:
    """All prompts, there from the start, in router's batches of `batch`; each batch pays one pass of the router."""
    from moesaic.schedule.cost import expert_time
    from moesaic.simulate.assemble import assemble

    trace = prompts(seed, experts, out, scale)
    simulator = assemble(trace, system(name, batch), seed)
    router = expert_time(simulator.cost.units[0], model(), batch * PROMPT) / batch
    switch: list[float] = []
    work: list[float] = []
    for stage in simulator.run(name).stages:
        if stage.prefill_tokens:  # a prompt is one stage, and its request runs alone until it has ended
            switch.append(stage.stall_s)
            work.append(0.0)
        work[-1] += stage.seconds - stage.stall_s
    ahead = switch[0] + work[-1] + sum(max(pair) for pair in zip(work, switch[1:], strict=False))
    total = sum(switch) + sum(work)
    return Served(router + total / len(work), sum(switch) / len(work), router + ahead / len(work))


def prompts(seed: int, experts: int, out: int, scale: float) -> "Trace":
    """Prompts whose expert is any of the pool, equally likely. Heads are part of the entry, see FFN."""
    from dataclasses import replace

    from moesaic.schedule.synthetic import Synthetic, synthesize

    count = max(2 * BATCH, round(REQUESTS * scale))
    made = Synthetic(
        requests=count,
        arrival="burst",
        burst=count,
        prompt=PROMPT,
        prompt_sigma=0,
        output=out,
        output_sigma=0,
        layers=LAYERS,
        experts=experts,
        stay=1,
        known_at="prompt",
        d=D,
        ffn=FFN,
        seed=seed,
    )
    trace = synthesize(made)
    return replace(trace, card=replace(trace.card, heads=1, kv_heads=1, head_dim=1, vocab=1))


NAMES = {"sn40l": "SN40L node", "a100": "DGX A100", "h100": "DGX H100"}
PAPER = {"a100": {(20, 8): 6.6, (20, 1): 4.8, (200, 8): 4.2, (200, 1): 3.9}}
PAPER["h100"] = {(20, 8): 3.7, (20, 1): 2.8, (200, 8): 2.7, (200, 1): 2.6}
CASES = [(name, out, batch, paper) for name in GPUS for (out, batch), paper in PAPER[name].items()]
CLAIM = Claim(
    name="coe",
    paper="SambaNova SN40L: Scaling the AI Memory Wall with Dataflow and Composition of Experts",
    arxiv="2405.07518",
    headline="Large memory beside the accelerator switches between whole models 31 times faster than a DGX A100 and 15 "
    "times faster than a DGX H100; with 150 experts of 7B and batches of 8 prompts that makes 20 tokens 6.6 and 3.7 "
    "times faster overall, with single prompts 4.8 and 2.8 times.",
    compares=f"pools of {POOLS[0]} to {POOLS[-1]} models of 7B in 16 bits, uniform prompts of {PROMPT} tokens, LRU in "
    f"the fast memory, {REQUESTS} prompts served one after the other on modelled nodes; the router is such a model, "
    "always there, that reads a batch of prompts in one pass. Bandwidths are the paper's (SN40L's HBM second-hand), of "
    f"which {MACHINES['sn40l'][1]:.0%} are reached on SN40L and {MACHINES['a100'][1]:.0%} on GPUs; attention over the "
    "context, under 1 % of the bytes here, is left out. Switch times and ratios follow from the links alone. Fetching "
    "the next prompt's expert while this one runs is a further baseline that the paper leaves out.",
    budgets="same prompts, experts and policy; each node uses its own fast memory. The paper's own numbers of the DGX "
    "are estimates of this kind too.",
    measures={
        **{f"switch_ms_{name}": f"ms to switch to a model, {NAMES[name]}" for name in MACHINES},
        **{f"switch_ratio_{name}": f"the same, {NAMES[name]} over SN40L node" for name in GPUS},
        **{f"fast_{name}": f"models that the fast memory holds, {NAMES[name]}" for name in MACHINES},
        **{f"slow_{name}": f"models that the slow memory holds, {NAMES[name]}" for name in MACHINES},
        "nodes": f"DGX nodes that hold {LARGEST} models in fast memory (paper: 19)",
        **{
            f"switch_{name}_{experts}": f"switching's share of the time, {experts} experts, {NAMES[name]}"
            for name in GPUS
            for experts in POOLS
        },
        "switch_sn40l_150": f"switching's share of the time, {POOLS[-1]} experts, SN40L node",
        "switch_fits": f"the largest share up to {POOLS[3]} experts, both DGX",
        "jump": "the smallest pool with any switching, the later of both DGX",
        **{
            f"speed_{name}_{out}_{batch}": f"gain over {NAMES[name]}, {out} tokens, batch {batch} (paper: {paper})"
            for name, out, batch, paper in CASES
        },
        **{
            f"ahead_{name}_{out}_{batch}": f"the same, {NAMES[name]}, {out} tokens, batch {batch}, all fetching ahead"
            for name, out, batch, _ in CASES
        },
        **{
            f"batch_gain_{name}": f"speed-up at batch {BATCH} minus at 1, {SHORT} tokens, {NAMES[name]}"
            for name in GPUS
        },
    },
    checks=(
        Check("switch_ratio_a100", above=30.0),
        Check("switch_ratio_h100", above=15.0),
        Check("switch_fits", below=1e-9),
        Check("jump", below=51.0),
        Check("speed_a100_20_8", above=1.0),
        Check("speed_h100_20_8", above=1.0),
        Check("batch_gain_a100", above=0.0),
        Check("batch_gain_h100", above=0.0),
    ),
    files=(
        "schedule/batch.py",
        "schedule/cache.py",
        "schedule/cost.py",
        "schedule/eviction.py",
        "schedule/residency.py",
        "schedule/synthetic.py",
        "schedule/topology.py",
        "simulate/simulator.py",
        "simulate/stage_cost.py",
        "simulate/systems/sn40l-coe.yaml",
    ),
    minutes=0.5,
    run=run,
    text=False,
)
