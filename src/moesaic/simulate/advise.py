"""Which methods help a model on a machine: rules propose, the simulator runs each proposal on the trace, runs rank.

Only this trace and this machine decide: no published speed-up enters. What cannot be run is listed, never ranked.
Everything in the answer is a function of trace, model and wish: equal input gives equal bytes. Seconds, bytes, shares.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, cast

from moesaic.errors import MoesaicError
from moesaic.progress import track
from moesaic.schedule.card import Card
from moesaic.schedule.topology import Topology
from moesaic.schedule.trace import Granularity, Trace
from moesaic.simulate import advise_facts as facts_of
from moesaic.simulate.advise_facts import Ask, Crossing, Numbers
from moesaic.simulate.advise_rules import RULES, Changes, Facts, Proposal, base, combine, methods, propose, spread_out
from moesaic.simulate.advise_rules import resident as all_resident
from moesaic.simulate.assemble import assemble
from moesaic.simulate.report import report
from moesaic.simulate.simulator import Run
from moesaic.simulate.spread import spread
from moesaic.simulate.stage_cost import NUMBER, CostSpec, LayerCost, StageCost, StageLoad, stage_cost
from moesaic.simulate.system import Parallel, System, build

HELPS = 0.99  # a part is combined with others if its p95 is below this times that of what it stands on
BUSY = 0.95  # share of the time from which on an engine counts as saturated
EXCHANGE = 0.5  # share of the engine's time from which on the exchange between devices binds

Ran = tuple[Numbers, Run]


def advise(trace: Trace, ask: Ask, model: str = "trace") -> dict[str, Any]:
    """The answer as JSON: what was measured, the ranked options, those that were not run, and what binds.

    Raises MoesaicError for an unknown model or device, one that does not go with the trace, and a machine that cannot
    run a single step.
    """
    machine = facts_of.machine_of(ask)
    whole = facts_of.model_of(trace, model)
    budget = facts_of.budget_of(whole, machine, ask.limits)
    facts_of.check(budget, machine, ask.limits)
    part = facts_of.head(whole, ask.events, ask.limits)
    routes, crossing = facts_of.routes_of(part), facts_of.crossing_of(part, machine)
    facts = Facts(part, machine, ask, budget, routes, crossing)
    facts = replace(facts, plain=_plain(facts))
    ranked, listed = _run_all(facts)
    ranked.sort(key=lambda row: _rank(row, ask))
    best = ranked[0]["result"] if ranked else None
    return {
        "model": whole.card.model,
        "machine": _machine(machine, ask),
        "trace": {"requests": part.requests, "of": trace.requests, "seed": ask.seed},
        "limits": asdict(ask.limits),
        "slo_s": ask.slo,
        "bytes": budget.numbers(),
        "routes": routes,
        "placement": {"not_measured": crossing} if isinstance(crossing, str) else _crossing(crossing),
        "plain_run": facts.plain,
        "ranked": ranked,
        "listed": listed,
        "bound": {"plain": facts.plain and bound(facts.plain, budget.fits), "best": best and bound(best, best["fits"])},
    }


def bound(numbers: Mapping[str, Any], fits: bool) -> str:
    """What binds a run: link, exchange, compute, memory where not all experts fit, or nothing (the arrivals)."""
    if numbers["link_needed"] > numbers["link_there"]:
        return "link"
    if numbers["collective_share"] > EXCHANGE:
        return "exchange"
    if numbers["busy_share"] > BUSY:
        return "compute"
    return "nothing" if fits else "memory"


# -- runs --------------------------------------------------------------------------------------------------------------
def _plain(facts: Facts) -> Numbers | None:
    """The numbers of the machine as it is, without any method: None where that cannot be simulated."""
    if facts.alone:
        changes = all_resident(facts) if facts.budget.fits else methods()["lru"].changes
    elif facts.budget.fits:
        changes = spread_out(facts)
    else:
        return None
    return facts_of.run_numbers(facts.trace, facts.machine, *run_option(facts, "plain", changes))


def _run_all(facts: Facts) -> tuple[list[Numbers], list[Numbers]]:
    """Rows of the options that ran, and of those that did not, with the reason."""
    ranked, listed = [], []
    for proposal in track(propose(facts), "advise", unit="runs"):
        row, why_not = _row(proposal), proposal.why_not
        if why_not is None:
            try:
                row["result"] = _result(facts, proposal)
            except MoesaicError as error:
                why_not = str(error)
        if why_not is None:
            ranked.append(row)
        else:
            listed.append({**row, "why_not": why_not})
    if (together := _combined(facts, ranked)) is not None:
        ranked.append(together)
    return ranked, listed


def _combined(facts: Facts, ranked: list[Numbers]) -> Numbers | None:
    """The parts that helped, on one another; None where there are fewer than two."""
    under, changes = base(facts)
    p95 = {row["id"]: row["result"]["e2e_p95_s"] for row in ranked}
    if under not in p95:
        return None
    good = [name for name in p95 if methods()[name].part and p95[name] < HELPS * p95[under]]
    good.sort(key=lambda name: (p95[name], name))
    names, merged = combine(changes, {name: {**changes, **methods()[name].changes} for name in good})
    if len(names) < 2:
        return None
    numbers = {f"{name}_p95_s": p95[name] for name in (under, *names)}
    reason = f"each was faster than {under} alone: {', '.join(names)}"
    proposal = Proposal("combined", "helped-alone", numbers, reason, merged)
    parts = [methods()[name] for name in (under, *names)]
    row = {
        "id": " + ".join([under, *names]),
        "rule": "helped-alone",
        "rule_says": "parts that were each faster than what they stand on",
        "level": "system",
        "paper": ", ".join(sorted({part.paper for part in parts})),
        "numbers": numbers,
        "reason": reason,
        "what": "; ".join(part.what for part in parts),
        "needs": ", ".join(sorted({part.needs for part in parts})),
        "changes_output": "no",
        "changes": merged,
    }
    try:
        return {**row, "result": _result(facts, proposal)}
    except MoesaicError:
        return None  # what runs alone may not run together, and each of them is ranked already


def _row(proposal: Proposal) -> Numbers:
    method, rule = methods()[proposal.method], RULES[proposal.rule]
    return {
        "id": proposal.method,
        "rule": proposal.rule,
        "rule_says": rule.says,
        "level": method.level,
        "paper": method.paper,
        "numbers": proposal.numbers,
        "reason": proposal.reason,
        "what": method.what,
        "needs": method.needs,
        "changes_output": method.changes_output,
        "changes": proposal.changes,
    }


def _result(facts: Facts, proposal: Proposal) -> Numbers:
    """What the simulator says of an option."""
    done, run = run_option(facts, proposal.method, proposal.changes, proposal.weight_bytes)
    latency = done["latency_s"]
    card, machine = facts.trace.card, facts.machine
    kv_token = int(2 * NUMBER * card.layers * card.kv_heads * card.head_dim)
    return {
        "fits": facts_of.budget_of(facts.trace, machine, facts.ask.limits, proposal.weight_bytes).fits,
        **facts_of.run_numbers(facts.trace, machine, done, run),
        "hit_ratio": done["hit_ratio"]["use"],
        "cache_bytes": done["capacity_bytes"],
        "kv_peak_bytes": kv_token * done["peak_context_tokens"],
        "ttft_p95_s": latency["ttft"]["p95"],
        "tpot_mean_s": latency["tpot"]["mean"],
        "e2e_p50_s": latency["end_to_end"]["p50"],
        "e2e_p95_s": latency["end_to_end"]["p95"],
        "tokens_per_s": done["throughput"]["tokens_per_s"],
        "longest_wait_s": max(done["longest_wait_s"].values()),
    }


def run_option(facts: Facts, name: str, changes: Changes, weight_bytes: float | None = None) -> Ran:
    """Run the trace on the machine under these changes; experts in `weight_bytes` a parameter, None = as stored.

    Raises MoesaicError for an option that the machine or the model does not allow.
    """
    trace, machine, ask = facts.trace, facts.machine, facts.ask
    if weight_bytes is not None:
        trace = replace(trace, card=replace(trace.card, weight_bytes=weight_bytes))
    values: Changes = {"name": name, "device": ask.preset, "limits": asdict(ask.limits)}
    for key, value in {"cache.capacity": facts.budget.room, **changes}.items():
        table, option = key.split(".")
        values.setdefault(table, {})[option] = value
    system = build(System, values)
    crossing = facts.crossing if system.parallel.placement == "affinity" else None
    cost = _cost(trace, system, machine, _spec(trace, machine, system.parallel, crossing), facts)
    simulator = assemble(trace, system, ask.seed, machine=machine, cost=cost)
    run = simulator.run(name)
    return report(simulator, run, system, ask.seed, bounds=False), run


def _spec(trace: Trace, machine: Topology, options: Parallel, crossing: Crossing | str | None) -> CostSpec:
    """How stages cost; an affinity placement that was measured already is not searched for again."""
    if not isinstance(crossing, Crossing):
        return spread(trace, machine, options)
    spec = spread(trace, machine, replace(options, placement="contiguous", collective=None))
    return replace(
        spec,
        placement=crossing.placement,
        collective=options.collective,
        leave=crossing.after,
        inter_leave=crossing.inter,
    )


def _cost(trace: Trace, system: System, machine: Topology, spec: CostSpec, facts: Facts) -> StageCost:
    """Costs of the trace on the machine; of experts in fewer bytes than the backbone where the option says so."""
    sizes = trace.layout(cast(Granularity, system.cache.granularity)).bytes
    cost = stage_cost(trace.card, sizes, machine, spec)
    if trace.card.weight_bytes == facts.trace.card.weight_bytes:
        return cost
    return TwoPrecisions(stage_cost(facts.trace.card, sizes, machine, spec), cost)


class TwoPrecisions(StageCost):
    """Experts whose weights have fewer bytes than the backbone's; unpacking them is taken to be free."""

    def __init__(self, backbone: StageCost, routed: StageCost) -> None:
        self.backbone, self.routed = backbone, routed
        self.card: Card = backbone.card
        self.spec, self.machine, self.units = routed.spec, routed.machine, routed.units
        self.slots = getattr(routed, "slots", None)

    def attention(self, load: StageLoad) -> float:
        return self.backbone.attention(load)

    def ends(self, load: StageLoad) -> float:
        return self.backbone.ends(load)

    def experts(self, calls: Any, load: StageLoad) -> LayerCost:
        return self.routed.experts(calls, load)


# -- the answer --------------------------------------------------------------------------------------------------------
def _rank(row: Numbers, ask: Ask) -> tuple[float | bool | str, ...]:
    """By p95 end to end; with a wish for it, first what meets it, by bytes moved a token."""
    result = row["result"]
    p95, moved = result["e2e_p95_s"], result["bytes_per_token"]
    if ask.slo is None:
        return p95, moved, row["id"]
    late = p95 > ask.slo
    return late, p95 if late else moved, p95, row["id"]


def _machine(machine: Topology, ask: Ask) -> Numbers:
    link = machine.links[0]
    return {
        "device": ask.preset,
        "devices": machine.devices,
        "nodes": machine.nodes,
        "memory_bytes": int(machine.tier(machine.units[0].tier).capacity),
        "link": f"{link.src}->{link.dst}",
        "link_bytes_per_s": link.bandwidth,
        "units": [unit.name for unit in machine.units],
        "source": machine.source,
    }


def _crossing(crossing: Crossing) -> Numbers:
    return {"before": crossing.before, "after": crossing.after, "inter": crossing.inter, "ratio": crossing.ratio}
