"""A system and a trace put together: every part built from its name, and what it must know measured on the trace."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import cast

from moesaic.errors import MoesaicError
from moesaic.schedule.eviction import Eviction
from moesaic.schedule.family import BATCHERS, EVICTIONS, PREDICTORS, make
from moesaic.schedule.predict import Predictor
from moesaic.schedule.residency import Residency
from moesaic.schedule.topology import Topology, preset
from moesaic.schedule.trace import Granularity, Trace
from moesaic.schedule.work import Key, Layout
from moesaic.simulate.channel import Channel
from moesaic.simulate.prices import Prices
from moesaic.simulate.simulator import Simulator
from moesaic.simulate.spread import spread
from moesaic.simulate.stage_cost import StageCost, stage_cost
from moesaic.simulate.system import System, size
from moesaic.simulate.workload import Workload

POPULARITY_SHARE = 0.1  # of the requests, the first ones: what "popular" and "likely" are measured on


def assemble(
    trace: Trace, system: System, seed: int = 0, *, machine: Topology | None = None, cost: StageCost | None = None
) -> Simulator:
    """A simulator of `system`, ready to run `trace`; on another machine than its preset, or at other costs, if given.

    Raises MoesaicError for a capacity that is no size, and for parts that need what the trace does not have.
    """
    machine = machine or machine_of(system)
    layout = trace.layout(cast(Granularity, system.cache.granularity))
    work = Workload(trace, layout)
    work.guess = system.predictor.kind == "learned"
    capacity = size(system.cache.capacity, layout.total_bytes)
    residency = Residency(
        layout,
        capacity,
        _policy(system, layout, work, capacity, seed),
        _predictor(system, trace, work),
        lookahead=system.predictor.lookahead,
        per_layer=system.cache.per_layer,
        persist=system.cache.persist,
        horizon=system.cache.horizon,
        preload=_preload(system, layout, work, capacity),
    )
    cost = cost or stage_cost(trace.card, layout.bytes, machine, spread(trace, machine, system.parallel))
    link = machine.links[0]
    channel = Channel(residency, link)
    layers = trace.card.layers
    prices = Prices(residency, cost, link, layers)
    batcher = make(BATCHERS, "batcher", system.batcher.kind, prices=prices, **_batcher(system))
    return Simulator(work, residency, channel, batcher, cost, system.limits)


def machine_of(system: System) -> Topology:
    """The device preset in the numbers the system asks for."""
    machine, parallel = preset(system.device), system.parallel
    if parallel.devices is None and parallel.per_node is None:
        return machine
    devices = parallel.devices or machine.devices
    return machine.spread(devices, parallel.per_node or min(devices, machine.per_node))


def _batcher(system: System) -> dict[str, object]:
    options = asdict(system.batcher)
    del options["kind"]
    return options


def _policy(system: System, layout: Layout, work: Workload, capacity: int, seed: int) -> Callable[[], Eviction]:
    options: dict[str, object] = {"seed": seed, "layers": len(layout.layers), "sections": system.cache.sections}
    if system.cache.policy == "pinned":
        options["pinned"] = popular(work, int(capacity * system.cache.pinned))
    return partial(make, EVICTIONS, "cache policy", system.cache.policy, **options)


def _preload(system: System, layout: Layout, work: Workload, capacity: int) -> list[Key]:
    """The first layers' entries, as in 2410.19123; before them what is pinned."""
    if not system.cache.preload:
        return []
    pinned = popular(work, int(capacity * system.cache.pinned)) if system.cache.policy == "pinned" else []
    return list(dict.fromkeys([*pinned, *sorted(layout.bytes)]))


def _predictor(system: System, trace: Trace, work: Workload) -> Predictor:
    width = system.predictor.width or max(1, 8 * trace.card.top_k)
    if system.predictor.kind == "learned" and trace.predicted is None:
        raise MoesaicError(
            "the learned predictor needs a trace with its answers: make one with moesaic trace predict, or, where the "
            "routes are known before the model runs, take --set predictor.kind=exact-pre-gate"
        )
    options = {"width": system.predictor.width, "answers": work.answers, "route": work.route}
    if system.predictor.kind in ("markov", "popularity"):
        options["width"] = width
    return make(PREDICTORS, "predictor", system.predictor.kind, **options)


def popular(work: Workload, budget: int) -> list[Key]:
    """The entries used by most decode tokens of the first tenth of the requests, as many as `budget` bytes hold."""
    uses: Counter[Key] = Counter()
    for request in range(max(1, int(len(work) * POPULARITY_SHARE))):
        for token in range(max(work.output_tokens[request] - 1, 0)):
            uses.update(work.decode(request, token + 1, token).keys)
    chosen: list[Key] = []
    for key, _ in sorted(uses.items(), key=lambda pair: (-pair[1], pair[0])):
        budget -= work.layout.bytes[key]
        if budget < 0:
            break
        chosen.append(key)
    return chosen
