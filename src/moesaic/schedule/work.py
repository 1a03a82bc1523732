"""The data all schedules share: what is asked for, in which portions it runs, and which stored entries a portion needs.

A work item is one request-step, a decode token or a prefill chunk: attention keeps a sequence together, so tokens of
one step are never dealt out by expert. Units: tokens, bytes, seconds. Shapes: L layers, E experts, C blocks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import chain
from typing import Literal, NamedTuple, get_args

from moesaic.errors import MoesaicError

ANY = -1
"""The layer of an entry or a call whose choice holds in all layers."""

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = get_args(Phase)


class Known(IntEnum):
    """From when the routes of a work item can be known; the later, the less can be planned."""

    PROMPT = 0  # the expert is chosen for the whole request, with the tokens it will generate (2405.07518)
    REQUEST = 1  # a pre-gate reads the tokens as soon as they are queued: prompts (2410.19123)
    STEP = 2  # ... but a decode token exists only when the step before it has been sampled
    GATE = 3  # a layer-wise router: not before the layer runs


class Key(NamedTuple):
    """One stored entry. layer: 0.., or ANY. unit: an expert, a channel block, or a whole model (layer ANY)."""

    layer: int
    unit: int


class Call(NamedTuple):
    """One expert in one layer, for `tokens` tokens; `keys` are the entries it cannot run without."""

    layer: int
    expert: int
    tokens: int
    keys: tuple[Key, ...]


class Route(tuple[Call, ...]):
    """The calls of a portion, with what follows from them, found out once however many portions share it."""

    @cached_property
    def layers(self) -> dict[int, tuple[Call, ...]]:
        """The calls of each layer."""
        return by_layer(self)

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """The entries they need, each once."""
        return keys_of(self)

    @cached_property
    def tokens(self) -> tuple[int, int]:
        """The fewest and the most tokens of a call."""
        counts = [call.tokens for call in self]
        return min(counts, default=1), max(counts, default=1)

    @cached_property
    def repeats(self) -> bool:
        """Whether an expert is called twice in a layer."""
        return len({call[:2] for call in self}) < len(self)


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asked for.

    Raises MoesaicError if the arrival is negative or not finite, or the lengths are not those of a request.
    """

    id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival_s) and self.arrival_s >= 0):
            raise MoesaicError(f"request {self.id} arrives at {self.arrival_s} s: expected a finite time of 0 or later")
        if self.prompt_tokens < 1 or self.output_tokens < 0:
            raise MoesaicError(
                f"request {self.id} has {self.prompt_tokens} prompt and {self.output_tokens} output tokens: "
                "expected at least 1 and at least 0"
            )


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One step of one request.

    step:  0.. within the request, prefill chunks first; a step can run when all before it have.
    calls: in any order; a token with K experts in a layer is in K calls. A live engine has none before the gate speaks.

    Raises MoesaicError if a field is out of range, or one expert is called twice in a layer.
    """

    request: int
    step: int
    phase: Phase
    tokens: int
    calls: tuple[Call, ...]
    known_at: Known

    def __post_init__(self) -> None:
        if not isinstance(self.calls, Route):
            object.__setattr__(self, "calls", Route(self.calls))
        if self.step < 0 or self.tokens < 1:
            raise self._wrong(f"has {self.tokens} tokens: steps count from 0 and have at least 1 token")
        if self.phase not in PHASES:
            raise self._wrong(f"has the phase {self.phase!r}: expected one of {', '.join(PHASES)}")
        if not self.calls and self.known_at != Known.GATE:
            raise self._wrong("calls no expert: expected the calls of every routed layer")
        if self.route.repeats:
            raise self._wrong("calls one expert twice in a layer: add up the tokens")
        least, most = self.route.tokens
        if least < 1 or most > self.tokens:
            call = next(call for call in self.calls if not 1 <= call.tokens <= self.tokens)
            raise self._wrong(
                f"sends {call.tokens} tokens to expert {call.expert} of layer {call.layer}: expected 1 to "
                f"{self.tokens}, the tokens of the step"
            )

    def _wrong(self, what: str) -> MoesaicError:
        return MoesaicError(f"step {self.step} of request {self.request} {what}")

    @property
    def route(self) -> Route:
        """The calls, with what follows from them."""
        assert isinstance(self.calls, Route)
        return self.calls

    @property
    def id(self) -> tuple[int, int]:
        """(request, step)."""
        return self.request, self.step

    @property
    def keys(self) -> tuple[Key, ...]:
        """Every entry the step needs, each once, in the order of the calls."""
        return self.route.keys

    def at(self, layer: int) -> tuple[Call, ...]:
        """The calls in one layer."""
        return self.route.layers.get(layer, ())


def by_layer(calls: Iterable[Call]) -> dict[int, tuple[Call, ...]]:
    """The calls of each layer."""
    layers: dict[int, list[Call]] = {}
    for call in calls:
        layers.setdefault(call.layer, []).append(call)
    return {layer: tuple(calls) for layer, calls in layers.items()}


def keys_of(calls: Iterable[Call]) -> tuple[Key, ...]:
    """The entries the calls need, each once: experts that share a block need it once."""
    calls = tuple(calls)
    if len(calls) == 1:
        return calls[0].keys
    return tuple(dict.fromkeys(chain.from_iterable([call.keys for call in calls])))


def moments(items: Iterable[WorkItem]) -> list[tuple[Call, ...]]:
    """A step of the engine as its layers run, one after the other: per layer the calls of all items, merged by expert.

    A layer's calls need their entries at the same time, so this is the unit of caching.
    """
    routes: dict[int, tuple[Route, int]] = {}  # those that several items share are merged at once
    for item in items:
        route, times = routes.get(id(item.calls), (item.route, 0))
        routes[id(route)] = route, times + 1
    merged: dict[tuple[int, int], Call] = {}
    for route, times in routes.values():
        for call in route:
            before = merged.get(call[:2])
            tokens = times * call.tokens + (0 if before is None else before.tokens)
            merged[call[:2]] = call if tokens == call.tokens else call._replace(tokens=tokens)
    return list(by_layer(merged[at] for at in sorted(merged)).values())


class Layout:
    """Which entries an expert is stored in, and their bytes: the granularity of caching.

    entries: (layer, expert) -> keys; experts may share keys, hence bytes.
    bytes:   key -> bytes.

    Raises MoesaicError if an expert has no entry, or an entry has no size or one below 1.
    """

    def __init__(self, entries: Mapping[tuple[int, int], Sequence[Key]], sizes: Mapping[Key, int]) -> None:
        self.entries = {at: tuple(keys) for at, keys in entries.items()}
        self.bytes = dict(sizes)
        self.layers = tuple(sorted({layer for layer, _ in self.entries}))
        for (layer, expert), keys in self.entries.items():
            if not keys:
                raise MoesaicError(f"expert {expert} of layer {layer} is stored nowhere: expected at least one entry")
            for key in keys:
                if self.bytes.get(key, 0) < 1:
                    raise MoesaicError(f"{key} has {self.bytes.get(key)} bytes: expected the size of a stored entry")

    @classmethod
    def experts(cls, bytes_E: Sequence[int]) -> "Layout":
        """One entry per expert, all its layers together: for routes that hold in every layer (2410.19123, Table 4)."""
        sizes = {Key(ANY, expert): size for expert, size in enumerate(bytes_E)}
        return cls({(ANY, key.unit): (key,) for key in sizes}, sizes)

    @classmethod
    def layer_experts(cls, bytes_LE: Sequence[Sequence[int]]) -> "Layout":
        """One entry per expert and layer (2410.17954)."""
        sizes = {Key(layer, e): size for layer, bytes_E in enumerate(bytes_LE) for e, size in enumerate(bytes_E)}
        return cls({key: (key,) for key in sizes}, sizes)

    @classmethod
    def blocks(cls, blocks_LE: Sequence[Sequence[Sequence[int]]], bytes_LC: Sequence[Sequence[int]]) -> "Layout":
        """One entry per layer and channel block; `blocks_LE[l][e]` lists the blocks expert e consists of."""
        sizes = {Key(layer, c): size for layer, bytes_C in enumerate(bytes_LC) for c, size in enumerate(bytes_C)}
        experts = ((layer, e, ids) for layer, blocks_E in enumerate(blocks_LE) for e, ids in enumerate(blocks_E))
        return cls({(layer, e): [Key(layer, c) for c in ids] for layer, e, ids in experts}, sizes)

    @property
    def total_bytes(self) -> int:
        """All entries once."""
        return sum(self.bytes.values())

    def calls(self, routes_L: Sequence[Mapping[int, int]]) -> Route:
        """Routes, per layer {expert: tokens}, as calls. One row serves all layers: routes that hold in every layer.

        Raises MoesaicError for another number of rows, or an expert the layout does not have.
        """
        if len(routes_L) not in (1, len(self.layers)):
            raise MoesaicError(f"got routes of {len(routes_L)} layers: expected {len(self.layers)}, or 1 row for all")
        rows = routes_L if len(routes_L) > 1 else [routes_L[0]] * len(self.layers)
        pairs = [(layer, e, tokens) for layer, row in zip(self.layers, rows, strict=True) for e, tokens in row.items()]
        for layer, expert, _ in pairs:
            if (layer, expert) not in self.entries:
                count = sum(other == layer for other, _ in self.entries)
                raise MoesaicError(f"layer {layer} has no expert {expert}: the layout stores {count}, counted from 0")
        return Route(Call(layer, e, tokens, self.entries[layer, e]) for layer, e, tokens in pairs)


def minimum_bytes(steps: Iterable[Sequence[WorkItem]], sizes: Mapping[Key, int]) -> int:
    """The smallest capacity that these steps can run with: the largest need of any layer of any step."""
    needs = (sum(sizes[key] for key in keys_of(calls)) for items in steps for calls in moments(items))
    return max(needs, default=0)
