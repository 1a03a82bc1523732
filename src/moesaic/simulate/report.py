"""What a run says: hits by every definition, bytes, stalls, latencies, and how far the cache was from the best.

Everything in a report is a function of trace, system and seed: equal input gives equal bytes. Seconds, bytes, shares
in 0..1. Percentiles are linear interpolations.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

import numpy as np

from moesaic.schedule.cache import Cache, Definition
from moesaic.schedule.eviction import LRU, Eviction, Oracle, Random, most_hits
from moesaic.schedule.work import Call, Key
from moesaic.simulate.simulator import Run, Simulator
from moesaic.simulate.system import System

PERCENTILES = (50, 95, 99)
Moments = Sequence[tuple[Key, ...]]


def report(simulator: Simulator, run: Run, system: System, seed: int, *, bounds: bool = True) -> dict[str, Any]:
    """The report of a run; `bounds` replays its moments under LRU, random and the oracle."""
    tally, served = simulator.residency.tally, run.requests
    tokens = sum(row.prefill_tokens + row.decode_tokens for row in run.stages)
    seconds = sum(row.seconds for row in run.stages)
    begin = min((each.arrival_s for each in served), default=0.0)
    span = max(run.end_s - begin, 1e-12)
    generated = sum(each.output_tokens for each in served)
    result = {
        "system": asdict(system),
        "seed": seed,
        "requests": len(served),
        "stages": len(run.stages),
        "events": {"choices": sum(row.choices for row in run.stages), "calls": sum(row.calls for row in run.stages)},
        "tokens": {"prompt": sum(each.prompt_tokens for each in served), "generated": generated, "run": tokens},
        "capacity_bytes": sum(cache.capacity for cache in simulator.residency.pools),
        "all_bytes": simulator.work.layout.total_bytes,
        "hit_ratio": {by: tally.hit_ratio(by) for by in get_args(Definition)},
        "recall": _number(simulator.residency.predictor.recall()),
        "precision": _number(simulator.residency.predictor.precision()),
        "moved_bytes": tally.moved_bytes,
        "wasted_bytes": tally.wasted_bytes,
        "bytes_per_token": tally.moved_bytes / max(tokens, 1),
        "stall_share": _share(run, "stall_s", seconds),
        "attention_share": _share(run, "attention_s", seconds),
        "experts_share": _share(run, "experts_s", seconds),
        "collective_share": _share(run, "collective_s", seconds),
        "experts_per_step": _mean([row.experts for row in run.stages]),
        "entries_per_step": _mean([row.entries for row in run.stages]),
        "tokens_per_step": tokens / max(len(run.stages), 1),
        "sent_bytes_per_token": {
            "intra": sum(row.intra_bytes for row in run.stages) / max(tokens, 1),
            "inter": sum(row.inter_bytes for row in run.stages) / max(tokens, 1),
        },
        "latency_s": latencies(run),
        "longest_wait_s": {
            "admission": max((each.start_s - each.arrival_s for each in served), default=0.0),
            "decode": max((each.longest_wait_s for each in served), default=0.0),
        },
        "throughput": {"tokens_per_s": generated / span, "requests_per_s": len(served) / span},
        "busy_share": {"engine": seconds / span, "link": run.link_busy_s / span},
        "unit_share": {name: busy / max(seconds, 1e-12) for name, busy in run.unit_busy_s.items()},
        "longest_queue": max((row.queued for row in run.stages), default=0),
        "peak_context_tokens": run.most_context,
        **_parallel(simulator),
    }
    if bounds:
        result["kept_ratio"] = kept_ratios(simulator, run, seed)
    return result


def dumps(result: Mapping[str, Any]) -> str:
    """The report as text, the same for the same run."""
    return json.dumps(result, indent=2, sort_keys=True, allow_nan=False) + "\n"


def latencies(run: Run) -> dict[str, dict[str, float]]:
    """Seconds: TTFT, TPOT (of requests with two tokens or more), end to end, and end to end per generated token.

    The last is the normalised latency of 2410.19123.
    """
    served = [each for each in run.requests if each.end_s >= 0]
    spoken = [each for each in served if each.output_tokens > 1]
    return {
        "ttft": _spread([each.first_s - each.arrival_s for each in served]),
        "tpot": _spread([(each.end_s - each.first_s) / (each.output_tokens - 1) for each in spoken]),
        "end_to_end": _spread([each.end_s - each.arrival_s for each in served]),
        "normalised": _spread([(each.end_s - each.arrival_s) / max(each.output_tokens, 1) for each in served]),
    }


def kept_ratios(simulator: Simulator, run: Run, seed: int) -> dict[str, float]:
    """1 - loads / uses: of this run, and of other policies on the same moments without prefetch.

    A load is a transfer that began, whoever asked for it, so prefetching gains nothing here: a policy is compared with
    the oracle by what it kept. The first use of an entry is a load for all, unless it was preloaded for all. `most`
    bounds every policy from a cold cache, whatever the sizes. `regret` is oracle minus own.
    """
    sizes, pools = simulator.work.layout.bytes, simulator.residency.pools
    by_pool = _by_pool(run.moments, simulator)
    uses = sum(map(len, run.moments)) or 1
    result = {"own": 1 - simulator.residency.tally.loads / uses}
    policies = {
        "lru": lambda moments: LRU(),
        "random": lambda moments: Random(seed),
        "oracle": lambda moments: Oracle(moments),
    }
    for name, policy in policies.items():
        hits = sum(
            replay(moments, sizes, pool.capacity, policy(moments), simulator.residency.preloaded)
            for moments, pool in zip(by_pool, pools, strict=True)
        )
        result[name] = hits / uses
    most = (most_hits(moments, sizes, pool.capacity) for moments, pool in zip(by_pool, pools, strict=True))
    result["most"] = sum(most) / uses
    result["regret"] = result["oracle"] - result["own"]
    return result


def replay(
    moments: Moments, sizes: Mapping[Key, int], capacity: int, policy: Eviction, preloaded: Sequence[Key] = ()
) -> int:
    """Hits of a policy on a sequence of moments, without prefetch."""
    cache = Cache(capacity, sizes, policy)
    used = {keys[0].layer for keys in moments}
    cache.preload(key for key in preloaded if key.layer in used)
    for now, keys in enumerate(moments):
        cache.use((Call(0, 0, 1, keys),), now)
    return cache.tally.use_hits


def _by_pool(moments: Sequence[tuple[Key, ...]], simulator: Simulator) -> list[list[tuple[Key, ...]]]:
    pools = simulator.residency.pools
    if len(pools) == 1:
        return [list(moments)]
    split: dict[int, list[tuple[Key, ...]]] = {id(pool): [] for pool in pools}
    for keys in moments:
        split[id(simulator.residency.caches[keys[0].layer])].append(keys)
    return list(split.values())


def _parallel(simulator: Simulator) -> dict[str, Any]:
    """Of several devices: crossing shares where they were measured, slots dropped and padded."""
    spec, slots = simulator.cost.spec, getattr(simulator.cost, "slots", None)
    return {
        "crossing_share": {"all": spec.leave, "inter": spec.inter_leave},
        "drop_share": slots.drop_share if slots else 0.0,
        "padding_share": slots.padding_share if slots else 0.0,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    array = np.asarray(values or [0.0])
    spread = {f"p{p}": float(np.percentile(array, p)) for p in PERCENTILES}
    return {"mean": float(array.mean()), **spread, "max": float(array.max())}


def _share(run: Run, column: str, seconds: float) -> float:
    return sum(getattr(row, column) for row in run.stages) / seconds if seconds else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _number(value: float) -> float | None:
    return None if value != value else value
