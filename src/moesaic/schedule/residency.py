"""What is resident while an engine runs: predictor, eviction policy and cache, told of events in one fixed order.

The simulator and a live engine drive the same object, so on the same work they see the same hits and misses:

    queued(items, stage)        work was queued, or a token was sampled
    begin(items)                a stage starts; its moments are the layers it runs
    ahead(i)                    fetch for the layers from moment i on, as far as the look-ahead goes
    routed(i, calls, items)     the router of moment i has chosen, where routes are known only at the gate
    waves(i)                    the calls of moment i in portions that fit; of each: demand(wave), release(wave)
    finish()                    the stage is done
    forget(request)             a request ended

Transfers are taken from `start` and reported with `arrived`, like those of one cache.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from moesaic.errors import MoesaicError
from moesaic.schedule.cache import Cache, Demand, Tally, Transfer
from moesaic.schedule.eviction import Eviction
from moesaic.schedule.predict import Predictor
from moesaic.schedule.work import Call, Key, Layout, WorkItem, keys_of, moments


class Residency:
    """Entries of `layout` under `capacity` bytes.

    policy:     makes the eviction policy of one cache.
    lookahead:  how many layers ahead entries are fetched; 0 fetches on demand alone.
    per_layer:  a cache of capacity / layers for every layer, as 2410.17954's code has; False = one pool.
    persist:    a decode token that does not exist yet is expected to need what its predecessor did: routes are sticky
                within a request (2410.19123). A guess, replaced by the truth when it is known. The same of any step
                whose routes are known only at the gate.
    horizon:    how many stages ahead queued work counts; None = all of it. A predicted set of everything that waits
                would protect everything.
    preload:    entries that fill the cache before anything runs, the first that fit.
    left:       told of every entry that leaves.
    """

    def __init__(
        self,
        layout: Layout,
        capacity: int,
        policy: Callable[[], Eviction],
        predictor: Predictor,
        *,
        lookahead: int = 1,
        per_layer: bool = False,
        persist: bool = False,
        horizon: int | None = None,
        preload: Sequence[Key] = (),
        left: Callable[[Key], None] = lambda key: None,
    ) -> None:
        if lookahead < 0:
            raise MoesaicError(f"a look-ahead of {lookahead} layers: expected at least 0")
        self.layout, self.predictor = layout, predictor
        self.lookahead, self.persist, self.horizon = lookahead, persist, horizon
        share = capacity // len(layout.layers) if per_layer else capacity
        pools = [Cache(share, layout.bytes, policy(), left) for _ in (layout.layers if per_layer else "1")]
        self.caches = {layer: pools[i if per_layer else 0] for i, layer in enumerate(layout.layers)}
        self.pools = pools
        self._listens = pools[0].policy.listens
        self.stage = 0
        self.now = 0  # waves begun
        self._running = 0  # the pool of the layer that runs
        self._entered: int | None = None  # the layer that runs
        self.items: Sequence[WorkItem] = ()
        self.moments: list[tuple[Call, ...]] = []
        self._sequence: Sequence[int] = ()  # the layer of each moment
        self._again = 1
        self._chosen: dict[int, list[Key]] = {}  # request -> what its gates have chosen in this stage
        self._expected: dict[int, dict[Key, float]] = {}  # layer -> prediction for this stage
        self._steps: dict[int, int] = {}  # request -> its step that is expected
        self._waiting: dict[tuple[int, int], tuple[int, Sequence[Key]]] = {}  # queued step -> stage it may run in, keys
        self._due: dict[int, list[tuple[int, int]]] = {}  # stage -> steps to look at when it begins
        self.preloaded = tuple(preload)
        for cache in self.pools:
            cache.preload(key for key in preload if self.caches[key.layer] is cache)

    def __contains__(self, key: Key) -> bool:
        """Whether the entry is there or on its way."""
        return key in self.caches[key.layer]

    def ready(self, key: Key) -> bool:
        """Whether the entry's bytes are there."""
        return self.caches[key.layer].ready(key)

    @property
    def taken(self) -> int:
        """Bytes of all entries present or on their way."""
        return sum(cache.taken for cache in self.pools)

    @property
    def tally(self) -> Tally:
        """What all caches were asked for."""
        total = Tally()
        for cache in self.pools:
            for name, count in asdict(cache.tally).items():
                setattr(total, name, getattr(total, name) + count)
        return total

    def queued(self, items: Iterable[WorkItem], stages: int = 1) -> None:
        """`items` wait, and are expected to run about `stages` stages from now."""
        if not self._listens:
            return
        for owner, _, keys in self.predictor.known(items):
            self._steps[owner[0]] = owner[1]
            self._wait(owner, self.stage + stages, keys)

    def begin(
        self, items: Sequence[WorkItem], again: int = 1, forecast: Callable[[int], int | None] = lambda request: 1
    ) -> list[tuple[Call, ...]]:
        """A stage of `items` starts; returns its moments.

        again: stages from now in which their next tokens may run. forecast: the same of a request that was passed over,
        None if nobody can say.
        """
        self.stage += 1
        self.items = items
        self.moments = moments(items)
        self._sequence = [calls[0].layer for calls in self.moments]
        if items and not self.moments:  # the gates have not spoken
            self._sequence, self.moments = self.layout.layers, [()] * len(self.layout.layers)
        self._entered = None
        self._again = again
        self._expected.clear()
        self._chosen.clear()
        if self.predictor.whole_step:
            for layer in self._sequence:
                self._predict(layer)
        for item in items if self._listens else ():
            self._waiting.pop(item.id, None)
            self._done(item.id)
            if self.persist and item.calls:
                self._expect((item.request, item.step + 1), self.stage + again, item.keys)
                self._steps[item.request] = item.step + 1
        for owner in self._due.pop(self.stage, ()):
            at, keys = self._waiting.get(owner, (0, ()))
            if at > self.stage:  # it has come into sight
                self._wait(owner, at, keys)
            elif at == self.stage:  # it was passed over
                stages = forecast(owner[0])
                if stages is None:
                    del self._waiting[owner]
                    self._done(owner)
                else:
                    self._wait(owner, self.stage + stages, keys)
        return self.moments

    @property
    def complete(self) -> bool:
        """Whether every entry is there, in a single pool."""
        return len(self.pools) == 1 and self.pools[0].complete

    def pass_by(self, items: Sequence[WorkItem]) -> None:
        """A whole stage while `complete`: all its uses are hits, and no policy or predictor need hear of it."""
        self.stage += 1
        self.passed(moments(items))

    def passed(self, routes: Iterable[Sequence[Call]]) -> None:
        """The calls of some layers while `complete`."""
        for calls in routes:
            self.pools[0].tally.count(calls, self.layout.bytes.keys(), self.layout.bytes)

    def routed(self, i: int, calls: Sequence[Call], items: Sequence[WorkItem]) -> None:
        """The router of moment i has chosen `calls`; `items` are the stage's, with their own calls in this layer alone.

        For stages that began with items without calls. The predictor learns of it with the first demand.
        """
        self.moments[i] = tuple(calls)
        self.items = items
        if self.persist and self._listens:
            for item in items:
                self._chosen.setdefault(item.request, []).extend(item.keys)

    def ahead(self, i: int) -> None:
        """Fetch what moments i to i + lookahead - 1 are expected to need, most probable first."""
        for layer in self._sequence[i : i + self.lookahead]:
            if layer not in self._expected:
                self._predict(layer)
            if missing := [key for key in self._expected[layer] if key not in self.caches[layer]]:
                self.caches[layer].prefetch(missing, self.now)

    def waves(self, i: int) -> list[tuple[Call, ...]]:
        """The calls of moment i in portions that fit the cache, one after the other: mostly a single one.

        Where a layer needs more than the cache holds, calls that miss least go first, and an expert's entries stay
        together. An expert that does not fit by itself is left to `demand`, which says how much it needs.
        """
        calls = self.moments[i]
        cache = self.caches[calls[0].layer]
        if cache.minimum(keys_of(calls)) <= cache.capacity:
            return [calls]
        missing = {call: sum(cache.sizes[key] for key in call.keys if key not in cache) for call in calls}
        waves: list[list[Call]] = []
        for call in sorted(calls, key=lambda call: (missing[call], call.expert)):
            if waves and cache.minimum(keys_of([*waves[-1], call])) <= cache.capacity:
                waves[-1].append(call)
            else:
                waves.append([call])
        return [tuple(wave) for wave in waves]

    def demand(self, calls: Sequence[Call]) -> Demand:
        """A wave of a layer starts; with the first, the predictor learns the layer's true routes."""
        layer = calls[0].layer
        cache = self.caches[layer]
        self._running = self.pools.index(cache) if len(self.pools) > 1 else 0
        found = cache.demand(calls, self.now)
        if layer != self._entered:
            self._entered = layer
            cache.policy.done(("stage", layer))  # now that its entries are held, this moves none of them
            self.predictor.observe(layer, self.items)
        return found

    def release(self, calls: Sequence[Call]) -> None:
        """A wave has run."""
        self.caches[calls[0].layer].release(calls, self.now)
        self.now += 1

    def finish(self) -> None:
        """The stage has run: its requests have their next tokens."""
        self.predictor.finish(self.items)
        for item in self.items if self._chosen else ():
            self._steps[item.request] = item.step + 1
            self._wait((item.request, item.step + 1), self.stage + self._again, self._chosen[item.request])

    def forget(self, request: int) -> None:
        """The request has ended or was cancelled."""
        if request in self._steps:
            owner = request, self._steps.pop(request)
            self._waiting.pop(owner, None)
            self._done(owner)
        forget = getattr(self.predictor, "forget", None)
        if forget is not None:
            forget(request)

    @property
    def asking(self) -> bool:
        """Whether transfers may be waiting to begin."""
        return any(cache.asking for cache in self.pools)

    def start(self) -> Transfer | None:
        """The next transfer to begin, demanded ones first; with a cache a layer, from the layer that runs on."""
        for cache in self.pools[self._running :] + self.pools[: self._running]:
            if (transfer := cache.start()) is not None:
                return transfer
        return None

    def arrived(self, transfer: Transfer) -> bool:
        """The bytes of a transfer are there; False if the entry has left meanwhile."""
        return self.caches[transfer.key.layer].arrived(transfer)

    def _predict(self, layer: int) -> None:
        self._expected[layer] = keys = self.predictor.predict(layer, self.items)
        if keys and self._listens:
            self.caches[layer].policy.expect(("stage", layer), self.stage, keys)

    def _wait(self, owner: tuple[int, int], at: int, keys: Sequence[Key]) -> None:
        """The step waits, to run at stage `at`; expected at once, or when that stage is within the horizon."""
        self._waiting[owner] = at, keys
        seen = self.horizon is None or at <= self.stage + self.horizon
        self._due.setdefault(at if seen else at - self.horizon, []).append(owner)  # type: ignore[operator]
        if seen:
            self._expect(owner, at, keys)

    def _expect(self, owner: tuple[int, int], at: int, keys: Sequence[Key]) -> None:
        if len(self.pools) == 1:
            self.pools[0].policy.expect(owner, at, keys)
            return
        by_layer: dict[int, list[Key]] = {}
        for key in keys:
            by_layer.setdefault(key.layer, []).append(key)
        for layer, own in by_layer.items():
            self.caches[layer].policy.expect(owner, at, own)

    def _done(self, owner: tuple[int, int]) -> None:
        for cache in self.pools:
            cache.policy.done(owner)
