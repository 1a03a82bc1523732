"""The advisor's rules: what is measured -> which methods are worth a run. Nothing here ranks; the simulator does.

The classes are those of the survey 2412.14219, the thresholds ours. A rule that fires gives every method it proposes
the numbers it fired on. Units: bytes, bytes/s, tokens; shares in 0..1.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from moesaic.files import human_bytes
from moesaic.schedule.topology import Topology
from moesaic.schedule.trace import Trace
from moesaic.schedule.work import Known
from moesaic.simulate.advise_facts import Ask, Budget, Crossing, Numbers, budget_of, rate
from moesaic.simulate.system import build

STICKY = 0.5  # share of decode tokens that keep the experts of the token before them
SKEWED = 0.35  # the less used half of the experts has at most this share of the load
IDLE, MANY = 0.1, 16  # ... and merging is worth a look below this share, above so many experts
PREDICTABLE = 0.8  # bits of the next layer's expert given this layer's, over bits without
AFFINE = 0.8  # transitions that change device, after affinity over before
UNEVEN = 1.25  # tokens of a layer's busiest expert over the mean

Changes = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A record of methods.yaml, whose head says what the fields mean."""

    paper: str
    level: str
    kind: str
    acts_on: list
    needs: str
    changes_output: str
    saves: str
    what: str
    changes: dict = field(default_factory=dict)
    part: bool = False


@cache
def methods() -> dict[str, Method]:
    """The registry by id. Raises MoesaicError for a record with unknown or ill-typed fields."""
    text = (resources.files("moesaic.simulate") / "methods.yaml").read_text(encoding="utf-8")
    return {name: build(Method, record, f"{name}.") for name, record in yaml.safe_load(text).items()}


@dataclass(frozen=True)
class Facts:
    """What rules read; `plain` is None where no plain run is possible: experts that several devices cannot hold."""

    trace: Trace
    machine: Topology
    ask: Ask
    budget: Budget
    routes: Numbers
    crossing: Crossing | str
    plain: Numbers | None = None

    @property
    def alone(self) -> bool:
        return self.machine.devices == 1

    @property
    def offloads(self) -> bool:
        """Experts wait in slow memory: the simulator has one cache and one link, so on one device only."""
        return self.alone and not self.budget.fits

    @property
    def known(self) -> Known:
        return self.trace.card.known


@dataclass(frozen=True)
class Proposal:
    """A method, the rule that proposes it, the numbers it fired on, and how to run it.

    changes: keys of a system file. weight_bytes: of an expert's parameter, None = as stored.
    why_not: the reason if the simulator cannot run it.
    """

    method: str
    rule: str
    numbers: Numbers
    reason: str
    changes: Changes = field(default_factory=dict)
    weight_bytes: float | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class Rule:
    """`test` yields what it proposes, or nothing."""

    level: str
    paper: str
    says: str
    test: Callable[[Facts], Iterator[Proposal]]


RULES: dict[str, Rule] = {}


def rule(name: str, level: str, paper: str, says: str) -> Callable[[Any], Any]:
    """Enter a function into RULES."""

    def enter(test: Callable[[Facts], Iterator[Proposal]]) -> Callable[[Facts], Iterator[Proposal]]:
        RULES[name] = Rule(level, paper, says, test)
        return test

    return enter


def propose(facts: Facts) -> list[Proposal]:
    """What the rules propose; of a method that several propose, the first."""
    found: dict[str, Proposal] = {}
    for each in RULES.values():
        for proposal in each.test(facts):
            found.setdefault(proposal.method, proposal)
    return list(found.values())


# -- what methods stand on ---------------------------------------------------------------------------------------------
def resident(facts: Facts) -> Changes:
    """All experts in fast memory, stored once."""
    blocks = facts.trace.card.blocks is not None
    return {**methods()["all-resident"].changes, "cache.granularity": "block" if blocks else "layer-expert"}


def spread_out(facts: Facts) -> Changes:
    """The plain way of several devices: experts dealt in order, or sliced where there are fewer than devices."""
    few = facts.trace.card.experts < facts.machine.devices
    placed = {"parallel.placement": "parallel" if few else "contiguous"}
    return {**resident(facts), **methods()["expert-parallel"].changes, **placed}


def base(facts: Facts) -> tuple[str, Changes]:
    """The cache policy that other methods are put on top of: the one that knows most."""
    if facts.known == Known.PROMPT:
        whole = facts.budget.experts // facts.trace.card.experts
        together = facts.trace.route_layers == 1 and facts.trace.card.blocks is None and whole <= facts.budget.room
        entries = {"cache.granularity": "expert"} if together else {}
        return "belady-known", {**methods()["belady-known"].changes, "predictor.kind": "prompt-router", **entries}
    if facts.known < Known.GATE:
        return "belady-known", {**methods()["belady-known"].changes, "predictor.kind": "exact-pre-gate"}
    if facts.trace.predicted is not None:
        return "predicted-set", dict(methods()["predicted-set"].changes)
    return "lru", dict(methods()["lru"].changes)


def _part(facts: Facts, method: str) -> Changes:
    return {**base(facts)[1], **methods()[method].changes}


def _small(facts: Facts) -> Numbers:
    budget = facts.budget
    return {"need_bytes": budget.need, "memory_bytes": budget.memory, "room_bytes": budget.room}


# -- rules -------------------------------------------------------------------------------------------------------------
@rule("fits", "system", "2412.14219", "everything fits into fast memory")
def _fits(facts: Facts) -> Iterator[Proposal]:
    if facts.alone and facts.budget.fits:
        reason = f"{_size(facts.budget.need)} needed, {_size(facts.budget.memory)} there: nothing to offload"
        yield Proposal("all-resident", "fits", _small(facts), reason, resident(facts))


@rule("does-not-fit", "system", "2412.14219", "experts do not fit into fast memory")
def _does_not_fit(facts: Facts) -> Iterator[Proposal]:
    if facts.offloads:
        budget = facts.budget
        share = f"room for {budget.room / budget.experts:.0%} of the experts"
        reason = f"{_size(budget.need)} needed, {_size(budget.memory)} there: {share}"
        yield Proposal("lru", "does-not-fit", _small(facts), reason, methods()["lru"].changes)


@rule("routes-known", "system", "2410.19123", "experts do not fit, and routes are known before a layer runs")
def _routes_known(facts: Facts) -> Iterator[Proposal]:
    if facts.offloads and facts.known < Known.GATE:
        numbers = {**_small(facts), "known_at": facts.trace.card.known_at}
        reason = f"routes are known at the {facts.trace.card.known_at}: what waits says what it will need"
        yield Proposal("belady-known", "routes-known", numbers, reason, base(facts)[1])


@rule("routes-predicted", "system", "2410.17954", "experts do not fit, and the trace holds a route predictor's answers")
def _routes_predicted(facts: Facts) -> Iterator[Proposal]:
    answers = facts.trace.predicted
    if facts.offloads and answers is not None:
        numbers = {**_small(facts), "answers": int(answers.shape[2])}
        reason = f"a learned predictor names {answers.shape[2]} experts a layer before it runs"
        yield Proposal("predicted-set", "routes-predicted", numbers, reason, methods()["predicted-set"].changes)


@rule("next-layer-predictable", "system", "2401.08383", "experts do not fit, and a layer's expert tells the next one's")
def _predictable(facts: Facts) -> Iterator[Proposal]:
    ratio = facts.routes["transition_ratio"]
    if facts.offloads and facts.known == Known.GATE and ratio is not None and ratio < PREDICTABLE:
        numbers = {name: facts.routes[name] for name in ("transition_bits", "alone_bits", "transition_ratio")}
        reason = (
            f"{numbers['transition_bits']:.2f} bits for the next layer's expert, given this layer's, "
            f"{numbers['alone_bits']:.2f} without"
        )
        usual = facts.plain["experts_per_step"] if facts.plain else facts.trace.card.top_k
        changes = {**methods()["markov-prefetch"].changes, "predictor.width": max(1, round(usual))}
        yield Proposal("markov-prefetch", "next-layer-predictable", numbers, reason, changes)


@rule("skewed-load", "system", "2412.14219", "experts do not fit, and half of them do little")
def _skewed(facts: Facts) -> Iterator[Proposal]:
    share = facts.routes["least_half"]
    if facts.offloads and share <= SKEWED:
        reason = f"the less used half of a layer's experts has {share:.0%} of its load"
        yield Proposal("pinned", "skewed-load", {"least_half": share}, reason, methods()["pinned"].changes)


@rule("sticky-routes", "system", "2410.19123", "experts do not fit, and tokens keep the experts of the token before")
def _sticky(facts: Facts) -> Iterator[Proposal]:
    stay = facts.routes["stay"]
    if facts.offloads and stay is not None and stay >= STICKY and facts.known != Known.PROMPT:
        reason = f"{stay:.0%} of decode tokens keep the experts of the token before"
        yield Proposal("persist", "sticky-routes", {"stay": stay}, reason, _part(facts, "persist"))


@rule("shared-channels", "system", "2410.19123", "experts do not fit, and they share channels")
def _shared(facts: Facts) -> Iterator[Proposal]:
    if facts.offloads and facts.trace.card.blocks is not None:
        whole = sum(map(sum, facts.trace.card.expert_bytes()))
        numbers = {"whole_bytes": whole, "stored_bytes": facts.budget.experts}
        reason = f"{_size(whole)} as whole experts, {_size(facts.budget.experts)} as blocks that are stored once"
        yield Proposal("blocks", "shared-channels", numbers, reason, _part(facts, "blocks"))


@rule("batch-exceeds-room", "system", "2410.19123", "a batch needs more experts than fit, and its routes are known")
def _batch_exceeds(facts: Facts) -> Iterator[Proposal]:
    if not facts.offloads or facts.plain is None or facts.known >= Known.GATE:
        return
    card = facts.trace.card
    expert = sum(map(sum, card.expert_bytes())) / (card.layers * card.experts)
    used, room = facts.plain["experts_per_step"], facts.budget.room
    need = used * card.layers * expert
    if need > room:
        numbers = {"experts_per_step": used, "step_bytes": need, "room_bytes": room}
        reason = f"a step uses {_size(need)} of experts, {need / room:.1f} times the room of {_size(room)}"
        for method in ("adaptive-batcher", "regroup"):
            yield Proposal(method, "batch-exceeds-room", numbers, reason, _part(facts, method))


@rule(
    "one-expert-a-prompt", "system", "2405.07518", "experts do not fit, and a prompt keeps one from first to last token"
)
def _compositions(facts: Facts) -> Iterator[Proposal]:
    if facts.offloads and facts.known == Known.PROMPT:
        numbers = {**_small(facts), "experts": facts.trace.card.experts, "stay": facts.routes["stay"]}
        reason = f"each prompt is served by one of {facts.trace.card.experts} experts throughout"
        yield Proposal("prompt-grouping", "one-expert-a-prompt", numbers, reason, _part(facts, "prompt-grouping"))


@rule("link-binds", "model", "2310.16795", "the link would have to be faster than it is for nothing to wait")
def _link_binds(facts: Facts) -> Iterator[Proposal]:
    if facts.plain is None or facts.plain["link_needed"] <= facts.plain["link_there"]:
        return
    numbers = {name: facts.plain[name] for name in ("bytes_per_token", "stall_share", "link_needed", "link_there")}
    reason = f"{rate(numbers['link_needed'])} needed so that nothing waits, {rate(numbers['link_there'])} there"
    yield from _quantised(facts, "link-binds", numbers, reason)
    if facts.known < Known.GATE:
        yield Proposal("regroup", "link-binds", numbers, reason, _part(facts, "regroup"))


@rule("devices-too-small", "model", "2310.16795", "the experts of a device do not fit into it")
def _too_small(facts: Facts) -> Iterator[Proposal]:
    if not facts.alone and not facts.budget.fits:
        reason = f"{_size(facts.budget.need)} a device needed, {_size(facts.budget.memory)} there"
        yield from _quantised(facts, "devices-too-small", _small(facts), reason)


def _quantised(facts: Facts, name: str, numbers: Numbers, reason: str) -> Iterator[Proposal]:
    for method, size in (("quantise-8-bit", 1.0), ("quantise-4-bit", 0.5)):
        if size >= facts.trace.card.weight_bytes:
            continue
        fits = budget_of(facts.trace, facts.machine, facts.ask.limits, size).fits
        why_not = None if fits or facts.alone else f"even so {NO_POOL}"
        plain = resident if facts.alone else spread_out
        changes = plain(facts) if fits else base(facts)[1]
        after = f"{reason}; {'then all fit' if fits else 'each then moves fewer bytes'}; quality is not measured here"
        yield Proposal(method, name, {**numbers, "weight_bytes": size}, after, changes, size, why_not)


@rule("idle-experts", "model", "2310.01334", "many experts, half of them hardly used")
def _idle(facts: Facts) -> Iterator[Proposal]:
    share, experts = facts.routes["least_half"], facts.trace.card.experts
    if experts > MANY and share < IDLE:
        reason = f"the less used half of {experts} experts has {share:.1%} of the load"
        why_not = "needs calibration data and retraining: routes after it are not in the trace"
        numbers = {"experts": experts, "least_half": share}
        yield Proposal("merge-experts", "idle-experts", numbers, reason, why_not=why_not)


NO_POOL = "the experts do not fit, and a cache and a link for each of several devices cannot be simulated"


@rule("several-devices", "system", "2201.05596", "more than one device")
def _several(facts: Facts) -> Iterator[Proposal]:
    if not facts.alone:
        numbers = {"devices": facts.machine.devices, "nodes": facts.machine.nodes, **_small(facts)}
        reason = f"{facts.machine.devices} devices, {facts.machine.per_node} to a node"
        yield Proposal("expert-parallel", "several-devices", numbers, reason, spread_out(facts), why_not=_pooled(facts))


@rule("affine-layers", "system", "2401.08383", "several devices, and experts of successive layers go together")
def _affine(facts: Facts) -> Iterator[Proposal]:
    crossing = facts.crossing
    if isinstance(crossing, str) or crossing.ratio >= AFFINE:
        return
    numbers = {"before": crossing.before, "after": crossing.after, "ratio": crossing.ratio}
    reason = f"{crossing.after:.1%} of transitions change device by affinity, {crossing.before:.1%} in the usual order"
    why_not = _pooled(facts)
    everywhere = facts.budget.need + facts.budget.kv * (facts.machine.devices - 1)
    if why_not is None and everywhere > facts.budget.memory:
        why_not = f"all contexts on every device need {_size(everywhere)}, {_size(facts.budget.memory)} are there"
    changes = {**resident(facts), **methods()["affinity-placement"].changes}
    yield Proposal("affinity-placement", "affine-layers", numbers, reason, changes, why_not=why_not)


@rule("uneven-load", "system", "2206.03382", "several devices, and some experts get far more tokens than others")
def _uneven(facts: Facts) -> Iterator[Proposal]:
    imbalance = facts.routes["imbalance"]
    if facts.alone or imbalance < UNEVEN:
        return
    E, P = facts.trace.card.experts, facts.machine.devices
    why_not = _pooled(facts)
    if max(E, P) % min(E, P):
        why_not = f"{E} experts and {P} devices: one must divide the other"
    elif facts.trace.card.blocks is not None:
        why_not = "equal slots need whole experts, these share channels"
    reason = f"the busiest expert of a layer has {imbalance:.2f} times the mean load: capacity changes with every step"
    changes = {**resident(facts), **methods()["adaptive-degree"].changes}
    numbers = {"imbalance": imbalance, "devices": P}
    yield Proposal("adaptive-degree", "uneven-load", numbers, reason, changes, why_not=why_not)


@rule("small-messages", "system", "2201.05596", "several nodes, and messages take longer to start than to send")
def _messages(facts: Facts) -> Iterator[Proposal]:
    link = facts.machine.inter
    if facts.machine.nodes == 1 or link is None or facts.plain is None:
        return
    size, bound = facts.plain["message_bytes"], link.latency * link.bandwidth
    if size < bound:
        reason = f"{_size(size)} a message, {_size(bound)} pass while one starts"
        changes = {**spread_out(facts), **methods()["hierarchical-exchange"].changes}
        numbers = {"message_bytes": size, "latency_bytes": bound, "nodes": facts.machine.nodes}
        yield Proposal("hierarchical-exchange", "small-messages", numbers, reason, changes)


@rule("decode-below-ridge", "hardware", "2409.01141", "a second unit, and decode experts are bound by memory")
def _below_ridge(facts: Facts) -> Iterator[Proposal]:
    if len(facts.machine.units) < 2 or facts.plain is None or facts.plain["decode_tokens_per_expert"] is None:
        return
    tokens, ridge = facts.plain["decode_tokens_per_expert"], facts.plain["ridge_tokens"]
    if tokens >= ridge:
        return
    first, second = facts.machine.units[:2]
    numbers = {"decode_tokens_per_expert": tokens, "ridge_tokens": ridge}
    few = f"{tokens:.1f} tokens an expert in decode, {first.name} is bound by reading below {ridge:.0f}"
    reason = f"{few}; {second.name} reads at the same time"
    ranks = {} if facts.alone else {"parallel.tensor": facts.machine.devices}
    why_not = None if facts.machine.nodes == 1 else "tensor ranks that share a layer stay within one node"
    under = resident(facts) if facts.budget.fits else base(facts)[1]
    changes = {**under, **methods()["duplex-split"].changes, **ranks}
    yield Proposal("duplex-split", "decode-below-ridge", numbers, reason, changes, why_not=why_not)


def _pooled(facts: Facts) -> str | None:
    return None if facts.budget.fits else NO_POOL


def _size(count: float) -> str:
    return human_bytes(count)


def combine(under: Changes, parts: Mapping[str, Changes]) -> tuple[list[str], Changes]:
    """Parts on top of one another, the first given first; one that sets a key otherwise than before is left out."""
    merged, names = dict(under), []
    for name, changes in parts.items():
        own = {key: value for key, value in changes.items() if under.get(key) != value}
        if all(merged.get(key) in (None, under.get(key), value) for key, value in own.items()):
            merged.update(own)
            names.append(name)
    return names, merged
