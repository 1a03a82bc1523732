"""ExpertFlow (2410.17954): a predicted set in the cache beats LRU, and regrouped batches need fewer experts.

Accuracy a: of each token and layer the true expert is predicted with probability a, otherwise any expert of the layer.
Shapes: N tokens, L layers.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from moesaic.data.domain import Domain
    from moesaic.schedule.trace import Trace

LAYERS, EXPERTS, TOPICS, CONCENTRATION = 12, 32, 8, 0.08
ACCURACY, OUTPUT, STAGES, APART_S = 0.9, 32, 300, 1e3
POINTS = tuple(product((8, 16), (4, 8, 16)))  # slots a layer, tokens a batch
TIGHT = (8, 16)
POLICIES = ("lru", "plec")
SLOTS = {"pool": False, "layers": True}  # name -> a cache for every layer
HALF, PAIRS = 16, 150  # tokens of a batch that is regrouped, pairs of batches


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Hit ratios of LRU and the predicted set at equal slots, and active experts before and after regrouping."""
    stages = max(2, round(STAGES * scale))
    result: dict[str, float] = {}
    for slots, batch in POINTS:
        trace = decode_trace(seed, batch, stages)
        for policy, (mode, per_layer) in product(POLICIES, SLOTS.items()):
            found = serve(trace, policy, slots, batch, per_layer)
            result[f"{policy}_{mode}_{slots}_{batch}"] = found["expected"]
            if (slots, batch) == TIGHT:
                result[f"{policy}_{mode}_moved"] = found["moved"]
            if (slots, batch) == TIGHT and policy == "plec":
                result[f"plec_{mode}_there"] = found["there"]
                result[f"plec_{mode}_kept"] = serve(trace, policy, slots, batch, per_layer, ahead=0)["there"]
    for mode in SLOTS:
        leads = {point: lead(result, mode, *point) for point in POINTS}
        result[f"lead_{mode}"], result[f"lead_{mode}_tight"] = min(leads.values()), leads[TIGHT]
    for name, accuracy in (("", ACCURACY), ("_exact", 1.0)):
        before, after = active_experts(seed, accuracy, max(2, round(PAIRS * scale)))
        result["active_before"], result[f"active_after{name}"] = before, after
        result[f"regrouped{name}"] = after / before - 1
    return result


def lead(result: dict[str, float], mode: str, slots: int, batch: int) -> float:
    """Hit ratio of the predicted set minus LRU's, the better one of LRU's two ways to hold its slots."""
    lru = max(result[f"lru_{each}_{slots}_{batch}"] for each in SLOTS)
    return result[f"plec_{mode}_{slots}_{batch}"] - lru


def decode_trace(seed: int, batch: int, stages: int) -> "Trace":
    """`batch` requests run together, then the next ones, for about `stages` stages; with predictions."""
    import numpy as np

    output = min(OUTPUT, stages)
    trace = routed(seed, batch * (stages // output), output)
    return predicted(replace(trace, arrival_s=np.arange(trace.requests) // batch * APART_S), ACCURACY, seed)


def routed(seed: int, requests: int, output: int) -> "Trace":
    """Tokens drawn from their request's topic, anew for every token and layer."""
    from moesaic.schedule.synthetic import Synthetic, synthesize

    options = Synthetic(
        requests=requests,
        prompt=1,
        prompt_sigma=0,
        output=output,
        output_sigma=0,
        layers=LAYERS,
        route_layers=LAYERS,
        experts=EXPERTS,
        stay=0.0,
        topics=TOPICS,
        concentration=CONCENTRATION,
        known_at="gate",
        d=768,
        ffn=3072,
        matrices=2,
        seed=seed,
    )
    return synthesize(options)


def predicted(trace: "Trace", accuracy: float, seed: int) -> "Trace":
    """The trace with a predictor's answers, (N, L, 1): each right with probability `accuracy`, otherwise drawn."""
    import numpy as np

    rng = np.random.default_rng([seed, 1])
    right, drawn = rng.random(trace.routes.shape) < accuracy, rng.integers(0, EXPERTS, trace.routes.shape)
    return replace(trace, predicted=np.where(right, trace.routes, drawn))


def serve(trace: "Trace", policy: str, slots: int, batch: int, per_layer: bool, ahead: int = 1) -> dict[str, float]:
    """One run: hits, and megabytes moved a token. LRU loads on demand alone, whatever `ahead`.

    expected: share of the entries that were there, or under way, when their layer asked: the paper's code waits for
              what it has begun to fetch before it counts.
    there:    share that were there.
    """
    from moesaic.simulate.assemble import assemble
    from moesaic.simulate.system import read_system

    plec = policy == "plec"
    changes = {
        "cache.policy": "predicted-set" if plec else "lru",
        "cache.capacity": slots / EXPERTS,
        "cache.per_layer": per_layer,
        "predictor.kind": "learned" if plec else "none",
        "predictor.lookahead": ahead if plec else 0,
        "batcher.kind": "decode-first",
        "limits.max_tokens": batch,
        "limits.max_requests": batch,
    }
    simulator = assemble(trace, read_system("expertflow", changes))
    done = simulator.run()
    tally = simulator.residency.tally
    tokens = sum(row.prefill_tokens + row.decode_tokens for row in done.stages)
    return {
        "expected": (tally.use_hits + tally.late) / tally.uses,
        "there": tally.use_hits / tally.uses,
        "moved": tally.moved_bytes / tokens / 1e6,
    }


def active_experts(seed: int, accuracy: float, pairs: int) -> tuple[float, float]:
    """Experts of all layers that two batches need, counted in each batch: as they came, and regrouped by predictions.

    Regrouping reads predicted experts, the count is of true ones.
    """
    from moesaic.schedule.batch import Ready, Room
    from moesaic.schedule.batch_by_expert import Regroup
    from moesaic.schedule.work import Key

    trace = predicted(routed(seed, 2 * HALF * pairs, 0), accuracy, seed)
    assert trace.predicted is not None
    told, true = (
        [frozenset(Key(layer, int(e)) for layer, e in enumerate(row_L)) for row_L in rows_NL[..., 0]]
        for rows_NL in (trace.predicted, trace.routes)
    )
    before = after = 0
    for start in range(0, 2 * HALF * pairs, 2 * HALF):
        batcher, room = Regroup(), Room(HALF, 2 * HALF)
        for token in range(start, start + 2 * HALF):
            batcher.add(Ready(token, "decode", 1, 0.0, 0.0, keys=tuple(told[token])))
        halves = [[portion.request for portion in batcher.form(0.0, room)] for _ in "12"]
        assert sorted(halves[0] + halves[1]) == list(range(start, start + 2 * HALF))
        came = [range(start, start + HALF), range(start + HALF, start + 2 * HALF)]
        before += sum(len(frozenset().union(*(true[token] for token in half))) for half in came)
        after += sum(len(frozenset().union(*(true[token] for token in half))) for half in halves)
    return before / pairs, after / pairs


NAMES = {"pool": "one pool", "layers": "slots of each layer"}
METHODS = {"lru": "LRU", "plec": "predicted set"}
PLACES = {point: f"{point[0]} slots a layer, batch {point[1]}" for point in POINTS}

CLAIM = Claim(
    name="expertflow",
    paper="ExpertFlow: Efficient Mixture-of-Experts Inference via Predictive Expert Caching and Token Scheduling",
    arxiv="2410.17954",
    headline="Experts that a predictor names before the model runs are fetched ahead and stay, which hits far more "
    "often than LRU (Switch-32: 91.9 against 76.6 % with 16 slots and batch 4, 85.9 against 58.4 at batch 16, 71.9 "
    "against 36.2 with 8 slots); tokens of two batches dealt anew by predicted experts need fewer of them.",
    compares=f"made routes: {LAYERS} layers of {EXPERTS} experts, top-1, each request with one of {TOPICS} topics "
    f"(Dirichlet {CONCENTRATION:g}, of its own in each layer), no locality between tokens beyond the topic; batches of "
    f"requests one after the other, one prompt token and {OUTPUT} output tokens each, about {STAGES} stages. The "
    f"predictor is not trained but made: right with probability {ACCURACY:g} for each token and layer, otherwise any "
    "expert. The predicted set with one layer of look-ahead against LRU without; a lead is over the better one of "
    "LRU's two ways to hold its slots, one pool as in the paper or equal slots in each layer as in its code. A hit is "
    "an entry in a layer of a step, there or on its way when the layer asks, as the paper's code counts; with so short "
    "a look-ahead on this link few have arrived. Regrouping: pairs of batches of "
    f"{HALF} tokens of different requests, dealt by predicted experts, counted in true ones.",
    budgets="same slots, routes, batches and device model (A100, PCIe, experts of Switch-base); the predicted set also "
    "gets the predictions, and prefetching may move more bytes than LRU: they are reported. Regrouped batches are as "
    "large as before.",
    measures={
        **{
            f"{policy}_{mode}_{slots}_{batch}": f"hits, {METHODS[policy]}, {NAMES[mode]}, {PLACES[slots, batch]}"
            for slots, batch in POINTS
            for policy, mode in product(POLICIES, SLOTS)
        },
        **{f"lead_{mode}": f"least lead of the predicted set over LRU, {NAMES[mode]}" for mode in SLOTS},
        **{f"lead_{mode}_tight": f"its lead at {PLACES[TIGHT]}, {NAMES[mode]}" for mode in SLOTS},
        **{
            f"{policy}_{mode}_moved": f"MB moved a token there, {METHODS[policy]}, {NAMES[mode]}"
            for policy, mode in product(POLICIES, SLOTS)
        },
        **{f"plec_{mode}_there": f"hits there that had arrived, predicted set, {NAMES[mode]}" for mode in SLOTS},
        **{f"plec_{mode}_kept": f"hits there without look-ahead, predicted set, {NAMES[mode]}" for mode in SLOTS},
        "active_before": f"active experts of two batches of {HALF}, as they came",
        "active_after": f"the same, regrouped, accuracy {ACCURACY:g}",
        "active_after_exact": "the same, regrouped, true routes",
        "regrouped": f"change by regrouping, share, accuracy {ACCURACY:g}",
        "regrouped_exact": "change by regrouping, share, true routes",
    },
    checks=(
        Check("lead_pool", above=0.0),
        Check("lead_layers", above=0.0),
        Check("lead_pool_tight", above=0.1),
        Check("regrouped", below=0.0),
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
        "simulate/channel.py",
        "simulate/simulator.py",
    ),
    minutes=0.5,
    run=run,
    text=False,
)
