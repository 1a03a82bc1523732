"""Read-ME's server (2410.19123, Table 4): Belady over known routes against LRU, and batches of fewer experts.

Capacity k: so many of the 7 experts, each with all its layers, are held at once. A stage that needs more runs in
portions, what is held first. Hit ratios count an expert in a stage; nothing is fetched ahead.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from moesaic.data.domain import Domain
    from moesaic.schedule.trace import Trace

EXPERTS, LAYERS, STAY, SKEW = 7, 32, 0.71, 0.5
REQUESTS, PROMPT, OUTPUT = 300, 8.0, 32.0
CAPACITIES, BATCHED_AT = (2, 3, 4, 5), 5
RUNNING, BUDGET, WIDE = 64, 16, 2048  # requests; tokens a stage, where the budget binds and where it does not
MAX_WAIT_S = 10.0  # adaptive batcher only
BATCHERS = ("decode-first", "chunked-prefill", "prefill-first", "longest-queue", "adaptive")
POLICIES: dict[str, dict[str, Any]] = {
    "random": {"cache.policy": "random"},
    "lru": {"cache.policy": "lru"},
    "known": {"cache.policy": "belady"},
    "persist": {"cache.policy": "belady", "cache.persist": True},
}


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Hit ratios by policy and capacity, and unique experts a stage by batcher; see `Run`."""
    trace = queue(seed, scale)
    result: dict[str, float] = {}
    exceeds = []
    for prefix, batcher in (("", "longest-queue"), ("in_order_", "prefill-first")):
        rows = [hit_ratios(trace, batcher, k, seed) for k in CAPACITIES]
        for k, row in zip(CAPACITIES, rows, strict=True):
            if not prefix:
                result |= {f"{name}_{k}": ratio for name, ratio in row.items() if name != "exceeds"}
            result[f"{prefix}lead_{k}"] = row["known"] - row["lru"]
            exceeds.append(row["exceeds"])
        result[f"{prefix}lru_random_gap"] = max(abs(row["lru"] - row["random"]) for row in rows)
    result["over_oracle"] = max(exceeds)
    for name in BATCHERS:
        narrow, wide = (serve(trace, name, BATCHED_AT, "known", seed, tokens) for tokens in (BUDGET, WIDE))
        result[f"unique_{name}"], result[f"tokens_{name}"] = narrow["experts_per_step"], narrow["tokens_per_step"]
        result[f"wide_unique_{name}"] = wide["experts_per_step"]
    for name in ("decode-first", "prefill-first"):
        result[f"unique_ratio_{name}"] = result["unique_longest-queue"] / result[f"unique_{name}"]
    return result


def queue(seed: int, scale: float) -> "Trace":
    """Requests that are all there from the start: one enters when another ends, so that no policy's speed matters."""
    import numpy as np

    from moesaic.schedule.synthetic import Synthetic, synthesize

    options = Synthetic(
        requests=max(8, round(REQUESTS * scale)),
        prompt=PROMPT,
        output=OUTPUT,
        layers=LAYERS,
        route_layers=1,
        experts=EXPERTS,
        stay=STAY,
        skew=SKEW,
        known_at="request",
        d=4096,
        ffn=5504,
        seed=seed,
    )
    trace = synthesize(options)
    return replace(trace, arrival_s=np.zeros(trace.requests))


def hit_ratios(trace: "Trace", batcher: str, k: int, seed: int) -> dict[str, float]:
    """By policy at capacity k; the oracle has `known`'s portions. exceeds: most of a policy minus its own oracle."""
    reports = {name: serve(trace, batcher, k, name, seed, BUDGET) for name in POLICIES}
    ratios = {name: each["hit_ratio"]["use"] for name, each in reports.items()}
    bounds = {name: each["kept_ratio"]["oracle"] for name, each in reports.items()}
    return {**ratios, "oracle": bounds["known"], "exceeds": max(ratios[name] - bounds[name] for name in POLICIES)}


def serve(trace: "Trace", batcher: str, k: int, policy: str, seed: int, tokens: int) -> dict[str, Any]:
    """The report of one run."""
    from moesaic.simulate.sweep import simulate
    from moesaic.simulate.system import read_system

    changes = {
        **POLICIES[policy],
        "cache.granularity": "expert",
        "cache.capacity": k * trace.layout("expert").total_bytes // EXPERTS,
        "predictor.lookahead": 0,
        "batcher.kind": batcher,
        "batcher.max_wait_s": MAX_WAIT_S,
        "limits.max_tokens": tokens,
        "limits.max_requests": RUNNING,
    }
    return simulate(trace, read_system("read-me", changes), seed)


WORDS = {
    "random": "random",
    "lru": "LRU",
    "known": "known uses, then LRU",
    "persist": "the same, expecting routes to stay",
    "oracle": "whole future",
}

CLAIM = Claim(
    name="lookahead-cache",
    paper="Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System Co-Design",
    arxiv="2410.19123",
    headline="If routes are known before the model runs, a cache that evicts what the queue needs last hits more often "
    "than LRU (with 2 to 5 of 7 experts: 44.2, 61.8, 77.2, 88.0 % against 33.9, 52.4, 67.0, 83.5), which batching "
    "makes no better than random; batches from the longest expert queue need fewer experts (3.51 against 5.08 "
    "decode-first and 5.21 prefill-first).",
    compares=f"made routes: {EXPERTS} experts, one choice for all layers, kept from token to token with probability "
    f"{STAY:g}, otherwise drawn with popularity 1 / rank^{SKEW:g}; {REQUESTS} requests of about {PROMPT:g} prompt and "
    f"{OUTPUT:g} output tokens, all queued from the start, {RUNNING} running, {BUDGET} tokens a stage, which binds; "
    f"{WIDE} does not. Hits are those of batches from the longest queue unless it says in order (prefill-first, whose "
    "decode tokens run in the order of the queue). Known are queued prompts and, of each running request, one decode "
    "token that waits; uses are expected in the queue's order, which the longest queue does not keep. The oracle sees "
    "the same portions of stages as known uses. A decode-first stage with a small budget waits for prompts that do not "
    "fit beside the decode tokens, so that it runs fewer tokens; chunked prefill fills it.",
    budgets="same requests, capacity, token budget and running requests; unique experts are counted with "
    f"{BATCHED_AT} experts held and known uses. The tokens of a stage differ by batcher and are reported.",
    measures={
        **{f"{name}_{k}": f"hits with {k} of {EXPERTS}, {WORDS[name]}" for k in CAPACITIES for name in WORDS},
        **{f"lead_{k}": f"known uses minus LRU, {k} of {EXPERTS}" for k in CAPACITIES},
        **{f"in_order_lead_{k}": f"known uses minus LRU, {k} of {EXPERTS}, in order" for k in CAPACITIES},
        "lru_random_gap": "largest distance of LRU and random over capacities",
        "in_order_lru_random_gap": "the same, in order",
        "over_oracle": "largest excess of a policy over the oracle on its own portions",
        **{f"unique_{name}": f"unique experts a stage, {name}" for name in BATCHERS},
        **{f"tokens_{name}": f"tokens a stage, {name}" for name in BATCHERS},
        **{f"wide_unique_{name}": f"unique experts a stage, {WIDE} tokens, {name}" for name in BATCHERS},
        "unique_ratio_decode-first": "unique experts, longest-queue over decode-first",
        "unique_ratio_prefill-first": "unique experts, longest-queue over prefill-first",
    },
    checks=(
        *(Check(f"lead_{k}", above=0.0) for k in CAPACITIES),
        Check("over_oracle", below=1e-9),
        Check("lru_random_gap", below=0.03),
        Check("unique_ratio_decode-first", below=0.8),
        Check("unique_ratio_prefill-first", below=0.8),
    ),
    files=(
        "schedule/synthetic.py",
        "schedule/eviction.py",
        "schedule/cache.py",
        "schedule/predict.py",
        "schedule/residency.py",
        "schedule/batch.py",
        "schedule/batch_by_expert.py",
        "simulate/assemble.py",
        "simulate/report.py",
        "simulate/simulator.py",
    ),
    minutes=0.3,
    run=run,
    text=False,
)
