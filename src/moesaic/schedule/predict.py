"""What will be needed: from known routes of queued work to statistics of the past, and how often they are right.

    ExactPreGate   queued prompts and one decode step, never a later one (2410.19123)
    PreviousStep, PreviousLayer   the baselines TLP and SLP of 2410.17954
    Markov         counts of transitions between units of successive layers (C_j of 2401.08383)
    Learned   a trained route predictor (2410.17954)
    Popularity, PromptRouter (2405.07518), Oracle (the trace), Null

The engine calls, per step: predict(layer, items) for a layer ahead, observe(layer, items) when the layer's true routes
are there, finish(items) when the step is done. Only Oracle reads routes before they can be known.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from moesaic.errors import MoesaicError
from moesaic.schedule.work import ANY, Key, Known, WorkItem, keys_of


class Expected(NamedTuple):
    """A use to come, in the form an eviction policy takes: policy.expect(*expected)."""

    owner: tuple[int, int]  # (request, step)
    at: float  # place in the queue it was predicted from
    keys: tuple[Key, ...]


class Predictor:
    """Base: predicts nothing and keeps the score.

    width: how many keys of a layer count as the predicted set, the most probable first; None = all that have a chance.
    whole_step: a step's layers can all be predicted before the first has run.
    """

    whole_step = True

    def __init__(self, width: int | None = None) -> None:
        if width is not None and width < 1:
            raise MoesaicError(f"a predicted set of {width} keys: expected at least 1")
        self.width = width
        self._guess: dict[int, frozenset[Key]] = {}
        self._recalls: list[int | float] = [0.0, 0]  # sum and number of layers
        self._precisions: list[int | float] = [0.0, 0]

    def predict(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        """The keys `layer` will need when `items` run, {key: probability}, most probable first, at most `width`."""
        chances = sorted(self._chances(layer, items).items(), key=lambda pair: (-pair[1], pair[0]))[: self.width]
        self._guess[layer] = frozenset(key for key, _ in chances)
        return dict(chances)

    def known(self, queue: Iterable[WorkItem], first: int = 0) -> list[Expected]:
        """The uses by queued items that are already known, numbered from `first` in the order of the queue.

        Nothing by default. Pass what is new in the queue, not all of it at every step: policies remember.
        """
        return []

    def observe(self, layer: int, items: Sequence[WorkItem]) -> None:
        """`layer` has run `items`: score the last prediction for it, and learn."""
        needed = {key for item in items for call in item.at(layer) for key in call.keys}
        guess = self._guess.pop(layer, None)
        if guess is not None and needed:
            self._recalls[0] += len(guess & needed) / len(needed)
            self._recalls[1] += 1
            if guess:
                self._precisions[0] += len(guess & needed) / len(guess)
                self._precisions[1] += 1
        self._learn(layer, items)

    def finish(self, items: Sequence[WorkItem]) -> None:
        """The step is done: its requests have sampled their next tokens."""

    def recall(self) -> float:
        """Share of the keys a layer needed that were predicted, mean over predicted layers; NaN before the first.

        The batch accuracy of 2410.17954: a batch needs the union of its items' keys.
        """
        return self._recalls[0] / self._recalls[1] if self._recalls[1] else math.nan

    def precision(self) -> float:
        """Share of the predicted keys that were needed, mean over layers with any prediction; NaN before the first."""
        return self._precisions[0] / self._precisions[1] if self._precisions[1] else math.nan

    def _chances(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        return {}

    def _learn(self, layer: int, items: Sequence[WorkItem]) -> None:
        pass


class Null(Predictor):
    """Predicts nothing: everything is fetched on demand."""


class ExactPreGate(Predictor):
    """Routes that a pre-gate knows: all of a queued prompt, and of the decode token that has just been sampled.

    A decode token exists when the step before it is done, which `finish` tells: later ones stay unseen even if the
    queue, of a simulator say, holds them. Routes known only at the gate of their layer stay unseen always.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width)
        self._next: dict[int, int] = {}  # request -> its next step

    def visible(self, item: WorkItem) -> bool:
        """Whether the item's routes can be known now."""
        if item.known_at == Known.STEP:
            return item.step <= self._next.get(item.request, 0)
        return item.known_at < Known.STEP

    def known(self, queue: Iterable[WorkItem], first: int = 0) -> list[Expected]:
        return [Expected(item.id, place, item.keys) for place, item in enumerate(queue, first) if self.visible(item)]

    def finish(self, items: Sequence[WorkItem]) -> None:
        for item in items:
            self._next[item.request] = max(item.step + 1, self._next.get(item.request, 0))

    def forget(self, request: int) -> None:
        """The request has ended or was cancelled."""
        self._next.pop(request, None)

    def _chances(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        seen = [item for item in items if self.visible(item)]
        return {key: 1.0 for item in seen for call in item.at(layer) for key in call.keys}


class Oracle(Predictor):
    """The trace itself: routes of any item, also of tokens that do not exist yet. A bound, not a policy."""

    def known(self, queue: Iterable[WorkItem], first: int = 0) -> list[Expected]:
        return [Expected(item.id, place, item.keys) for place, item in enumerate(queue, first)]

    def _chances(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        return {key: 1.0 for item in items for key in keys_of(item.at(layer))}


class PreviousStep(Predictor):
    """What the layer needed in the step before."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width)
        self._last: dict[int, dict[Key, float]] = {}

    def _chances(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        return self._last.get(layer, {})

    def _learn(self, layer: int, items: Sequence[WorkItem]) -> None:
        self._last[layer] = {key: 1.0 for item in items for key in keys_of(item.at(layer))}


class PreviousLayer(Predictor):
    """The unit ids that the layer before needed in this step; nothing for the first layer, nor for layer ANY."""

    whole_step = False

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width)
        self._layer, self._units = ANY, frozenset[int]()

    def _chances(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        if self._layer < 0 or self._layer != layer - 1:
            return {}
        return {Key(layer, unit): 1.0 for unit in self._units}

    def _learn(self, layer: int, items: Sequence[WorkItem]) -> None:
        self._layer = layer
        self._units = frozenset(key.unit for item in items for key in keys_of(item.at(layer)))


class Popularity(Predictor):
    """Share of past steps in which the layer needed the key."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._steps: Counter[int] = Counter()
        self._uses: dict[int, Counter[Key]] = {}

    def _chances(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        return {key: count / self._steps[layer] for key, count in self._uses.get(layer, {}).items()}

    def _learn(self, layer: int, items: Sequence[WorkItem]) -> None:
        self._steps[layer] += 1
        self._uses.setdefault(layer, Counter()).update({key for item in items for key in keys_of(item.at(layer))})


class Markov(Predictor):
    """P(b | a) = C[a, b] / C[a], counted per item: a needed in the layer before, b in this one.

    In the first layer (and in layer ANY) a is what the request needed there in its step before. An item that needed
    several a expects b with the mean of P(b | a) over them; a batch needs b unless no item does.
    """

    whole_step = False

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._pairs: dict[tuple[Key, int], Counter[Key]] = {}  # (a, layer of b) -> b -> count
        self._visits: Counter[tuple[Key, int]] = Counter()  # (a, layer of b) -> count
        self._seen: dict[int, dict[int, tuple[Key, ...]]] = {}  # request -> layer -> keys of its last visit
        self._before: dict[int, int] = {}  # layer -> the layer that runs before it; itself for the first
        self._layer = ANY - 1

    def _chances(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        unneeded: dict[Key, float] = {}
        for item in items:
            sources = self._seen.get(item.request, {}).get(self._before.get(layer, layer), ())
            chance: dict[Key, float] = {}
            for a in sources:
                for b, count in self._pairs.get((a, layer), {}).items():
                    chance[b] = chance.get(b, 0.0) + count / self._visits[a, layer] / len(sources)
            for b, p in chance.items():
                unneeded[b] = unneeded.get(b, 1.0) * max(1.0 - p, 0.0)
        return {b: 1.0 - p for b, p in unneeded.items()}

    def _learn(self, layer: int, items: Sequence[WorkItem]) -> None:
        self._before.setdefault(layer, layer if self._layer < ANY or layer <= self._layer else self._layer)
        self._layer = layer
        for item in items:
            seen = self._seen.setdefault(item.request, {})
            keys = keys_of(item.at(layer))
            for a in seen.get(self._before[layer], ()):
                self._visits[a, layer] += 1
                self._pairs.setdefault((a, layer), Counter()).update(keys)
            seen[layer] = keys

    def forget(self, request: int) -> None:
        """The request has ended or was cancelled."""
        self._seen.pop(request, None)


class Learned(Predictor):
    """What a trained model said of an item before it ran: `answers(item)` are its keys, most probable first.

    Each is taken for needed. Queued prompts and decode tokens that exist are answered, like those of a pre-gate, but an
    answer can be wrong (route predictor of 2410.17954).
    """

    def __init__(self, answers: Callable[[WorkItem], Sequence[Key]], width: int | None = None) -> None:
        super().__init__(width)
        self._answers = answers

    def known(self, queue: Iterable[WorkItem], first: int = 0) -> list[Expected]:
        return [Expected(item.id, place, tuple(self._answers(item))) for place, item in enumerate(queue, first)]

    def _chances(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        wanted = Counter(key for item in items for key in self._answers(item) if key.layer == layer)
        return {key: count / len(items) for key, count in wanted.items()}


class PromptRouter(Predictor):
    """One choice per request, for all its steps: `route(request)` are the keys it will need (2405.07518)."""

    def __init__(self, route: Callable[[int], Sequence[Key]] | Mapping[int, Sequence[Key]]) -> None:
        super().__init__()
        self._route = route if callable(route) else lambda request: route.get(request, ())

    def known(self, queue: Iterable[WorkItem], first: int = 0) -> list[Expected]:
        return [Expected(item.id, place, tuple(self._route(item.request))) for place, item in enumerate(queue, first)]

    def _chances(self, layer: int, items: Sequence[WorkItem]) -> dict[Key, float]:
        return {key: 1.0 for item in items for key in self._route(item.request) if key.layer == layer}
