"""Made sequences of cache accesses, and what tests of policies and of the cache do with them."""

import random
from collections.abc import Callable, Iterator

from moesaic.schedule.cache import Cache
from moesaic.schedule.eviction import (
    FIFO,
    LFU,
    LRU,
    Belady,
    Eviction,
    Pinned,
    PredictedSet,
    Random,
    SectionRoundRobin,
)
from moesaic.schedule.work import ANY, Call, Key, keys_of

Moment = tuple[Call, ...]


def moment(*units: int, layer: int = ANY) -> Moment:
    """A layer that needs these units, one token each."""
    return tuple(Call(layer, unit, 1, (Key(layer, unit),)) for unit in units)


def trace(seed: int, units: int = 10, length: int = 40, widest: int = 4) -> list[Moment]:
    """Skewed, sticky, cyclic or uniform moments, by seed; some over layers."""
    rng = random.Random(seed)
    style = seed % 4
    layers = [ANY] if seed % 3 else [0, 1]
    weight = [1 / (1 + unit) if style == 0 else 1.0 for unit in range(units)]
    out: list[Moment] = []
    current = rng.sample(range(units), rng.randint(1, widest))
    for step in range(length // len(layers)):
        if style == 1:
            current = [unit if rng.random() < 0.7 else rng.randrange(units) for unit in current]
        elif style == 2:
            current = [(step * len(current) + offset) % units for offset in range(len(current))]
        else:
            current = rng.choices(range(units), weight, k=rng.randint(1, widest))
        out += [moment(*dict.fromkeys(current), layer=layer) for layer in layers]
    return out


def sizes_of(moments: list[Moment], size: Callable[[Key], int] = lambda key: 1) -> dict[Key, int]:
    return {key: size(key) for calls in moments for key in keys_of(calls)}


def run(policy: Eviction, moments: list[Moment], capacity: int, sizes: dict[Key, int]) -> Cache:
    cache = Cache(capacity, sizes, policy)
    for now, calls in enumerate(moments):
        policy.done(now)
        cache.use(calls, now)
    return cache


def future(moments: list[Moment]) -> list[tuple[Key, ...]]:
    return [keys_of(calls) for calls in moments]


def everyone(moments: list[Moment], seed: int, room: int) -> Iterator[Eviction]:
    """Every policy without prefetch, with partial or wrong knowledge where it takes any; `room` entries are pinned."""
    rng = random.Random(seed)
    keys = sorted({key for calls in moments for key in keys_of(calls)})
    yield from (
        LRU(),
        FIFO(),
        LFU(),
        Random(seed),
        SectionRoundRobin(3),
        Pinned(rng.sample(keys, min(room, len(keys)))),
    )
    for policy in (Belady(), PredictedSet()):
        for now, calls in enumerate(moments):
            if rng.random() < 0.5:
                policy.expect(now, now if rng.random() < 0.8 else rng.randrange(len(moments)), keys_of(calls))
        yield policy


def need(moments: list[Moment], sizes: dict[Key, int]) -> int:
    return max(sum(sizes[key] for key in keys_of(calls)) for calls in moments)


def fewest(moments: list[Moment], capacity: int, sizes: dict[Key, int], cost: Callable[[Key], int]) -> int:
    """The least total cost of misses, over all ways to evict, by exhaustion."""
    states: dict[frozenset[Key], int] = {frozenset(): 0}
    for calls in moments:
        need = frozenset(keys_of(calls))
        after: dict[frozenset[Key], int] = {}
        for held, paid in states.items():
            paid += sum(cost(key) for key in need - held)
            rest = sorted(held - need)
            for mask in range(1 << len(rest)):
                keep = need | {key for bit, key in enumerate(rest) if mask >> bit & 1}
                if sum(sizes[key] for key in keep) <= capacity:
                    after[keep] = min(paid, after.get(keep, paid))
        states = after
    return min(states.values())
