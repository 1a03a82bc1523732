"""Predictors: what they may know, what they learn, how their score is counted, and what knowing is worth to a cache."""

import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from moesaic.errors import MoesaicError
from moesaic.schedule.cache import Cache
from moesaic.schedule.eviction import LRU, Belady, Eviction, Oracle, PredictedSet
from moesaic.schedule.predict import (
    ExactPreGate,
    Expected,
    Markov,
    Null,
    Popularity,
    Predictor,
    PreviousLayer,
    PreviousStep,
    PromptRouter,
)
from moesaic.schedule.predict import Oracle as TraceOracle
from moesaic.schedule.work import ANY, Key, Known, Layout, WorkItem, keys_of, moments

World = dict[int, list[WorkItem]]  # request -> its steps

LAYERS, EXPERTS = 3, 5
LAYOUT = Layout.layer_experts([[1] * EXPERTS] * LAYERS)


def world(seed: int, known: Known = Known.GATE, future: int | None = None, fork: int = 10**9) -> World:
    """Four requests: one prefill chunk, then eight decode tokens; from step `fork` on drawn from the seed `future`."""
    out: World = {}
    for request in range(4):
        rng, steps = random.Random(f"{seed} {request}"), []
        for step in range(9):
            if step == fork:
                rng = random.Random(f"{future} {request} fork")
            tokens = 3 if step == 0 else 1
            routes = [Counter(rng.randrange(EXPERTS) for _ in range(tokens)) for _ in range(LAYERS)]
            at = Known.REQUEST if step == 0 and known == Known.STEP else known
            steps.append(WorkItem(request, step, "decode" if step else "prefill", tokens, LAYOUT.calls(routes), at))
        out[request] = steps
    return out


def live(predictor: Predictor, items: list[WorkItem], layers: range = range(LAYERS)) -> list[dict[Key, float]]:
    """One step of an engine: predict each layer, see it, finish."""
    out = []
    for layer in layers:
        out.append(predictor.predict(layer, items))
        predictor.observe(layer, items)
    predictor.finish(items)
    return out


def step(of: World, number: int) -> list[WorkItem]:
    return [steps[number] for steps in of.values()]


def every() -> list[Predictor]:
    table = {request: [Key(0, request), Key(1, 1)] for request in range(4)}
    return [Null(), PreviousStep(), PreviousLayer(), Markov(3), Popularity(3), PromptRouter(table), ExactPreGate()]


# ---- what may be known


@pytest.mark.parametrize("which", range(7))
@pytest.mark.parametrize("fork", range(1, 9))
def test_predictions_do_not_depend_on_routes_that_are_not_known_yet(which: int, fork: int) -> None:
    """Two worlds with one past: whatever is said before their futures are seen must be the same."""
    said = []
    for future in (1, 2):
        here = world(0, Known.GATE, future, fork)
        predictor = every()[which]
        for number in range(fork):
            live(predictor, step(here, number))
        items = step(here, fork)
        said.append(
            (
                [predictor.predict(layer, items) for layer in range(LAYERS)],
                predictor.known([item for steps in here.values() for item in steps]),
            )
        )
    assert step(world(0, Known.GATE, 1, fork), fork) != step(world(0, Known.GATE, 2, fork), fork)
    assert said[0] == said[1]


@pytest.mark.parametrize("fork", range(2, 9))
def test_the_pre_gate_knows_queued_prompts_and_one_decode_step_and_no_more(fork: int) -> None:
    said = []
    for future in (1, 2):
        here = world(0, Known.STEP, future, fork)
        predictor = ExactPreGate()
        for number in range(fork - 1):
            live(predictor, step(here, number))
        queue = [item for steps in here.values() for item in steps[fork - 1 :]]  # a simulator's: the future is in it
        ahead = predictor.known(queue)
        assert [expected.owner for expected in ahead] == [(request, fork - 1) for request in here]
        assert all(expected.keys == here[expected.owner[0]][fork - 1].keys for expected in ahead)
        said.append((ahead, predictor.predict(0, step(here, fork))))
    assert said[0] == said[1]
    assert said[0][1] == {}  # two steps ahead


def test_the_pre_gate_is_exact_about_what_it_knows() -> None:
    here = world(3, Known.STEP)
    predictor = ExactPreGate()
    late = [item for item in step(here, 0) if item.request]  # request 0 starts a step later
    live(predictor, late)
    queue = [here[0][0], here[0][1], here[1][1], here[1][2]]
    assert predictor.known(queue, first=10) == [
        Expected((0, 0), 10, here[0][0].keys),
        Expected((1, 1), 12, here[1][1].keys),
    ]
    for number in range(1, 9):
        live(predictor, [here[request][number] for request in (1, 2, 3)])
    assert predictor.recall() == predictor.precision() == 1.0
    predictor.forget(1)
    assert predictor.known([here[1][1]]) == []
    assert len(TraceOracle().known(queue)) == 4  # the trace knows all of it


# ---- what is learnt


def test_previous_step_and_layer_repeat_what_was_there() -> None:
    here = world(1)
    steps, layers = PreviousStep(), PreviousLayer()
    for number in range(9):
        items = step(here, number)
        for layer, (a, b) in enumerate(zip(live(steps, items), live(layers, items), strict=True)):
            past = keys_of(call for item in step(here, number - 1) for call in item.at(layer)) if number else ()
            above = {call.expert for item in items for call in item.at(layer - 1)} if layer else ()
            assert set(a) == set(past)
            assert set(b) == {Key(layer, expert) for expert in above}
    assert PreviousLayer().predict(ANY, step(here, 0)) == {}


def test_popularity_is_the_share_of_steps_and_keeps_the_most_probable() -> None:
    here = world(2)
    predictor = Popularity(2)
    for number in range(8):
        live(predictor, step(here, number))
    counts = Counter(
        key for number in range(8) for key in {key for item in step(here, number) for key in keys_of(item.at(1))}
    )
    best = sorted(counts, key=lambda key: (-counts[key], key))[:2]
    assert predictor.predict(1, step(here, 8)) == {key: counts[key] / 8 for key in best}


def test_markov_counts_transitions_per_item() -> None:
    """Against a table filled with loops; K = 1 decode tokens after a prefill that needs several experts."""
    here = world(4)
    predictor = Markov(EXPERTS)
    for number in range(8):
        live(predictor, step(here, number))
    for layer in range(LAYERS):
        pairs, visits = Counter[tuple[int, int]](), Counter[int]()
        for steps in here.values():
            for number in range(8):
                past = steps[number - 1].at(0) if number else ()
                before = steps[number].at(layer - 1) if layer else past
                for a in before:
                    visits[a.expert] += 1
                    for b in steps[number].at(layer):
                        pairs[a.expert, b.expert] += 1
        said = predictor.predict(layer, step(here, 8))
        for b in range(EXPERTS):
            absent = 1.0
            for steps in here.values():
                before = steps[8].at(layer - 1) if layer else steps[7].at(0)
                absent *= 1 - sum(pairs[a.expert, b] / visits[a.expert] for a in before) / len(before)
            assert said.get(Key(layer, b), 0.0) == pytest.approx(1 - absent)
        predictor.observe(layer, step(here, 8))


def test_markov_finds_a_permutation_between_layers_and_a_cycle_between_steps() -> None:
    predictor = Markov(1)
    for number in range(60):
        expert = number % EXPERTS
        routes = [{expert: 1}, {(2 * expert + 1) % EXPERTS: 1}, {(4 - expert) % EXPERTS: 1}]
        live(predictor, [WorkItem(0, number, "decode", 1, LAYOUT.calls(routes), Known.GATE)])
        if number == 3 * EXPERTS:
            predictor._recalls = [0.0, 0]  # it has seen every transition
    assert predictor.recall() == 1.0
    predictor.forget(0)
    assert predictor.predict(0, [WorkItem(0, 0, "decode", 1, LAYOUT.calls([{0: 1}]), Known.GATE)]) == {}


def test_a_prompt_router_predicts_every_step_of_its_request() -> None:
    layout = Layout.experts([10] * 3)
    items = [WorkItem(7, n, "decode", 1, layout.calls([{2: 1}]), Known.PROMPT) for n in range(4)]
    for route, recall in (({7: [Key(ANY, 2)]}, 1.0), (lambda request: [Key(ANY, request % 3)], 0.0), ({}, 0.0)):
        predictor = PromptRouter(route)
        for item in items:
            live(predictor, [item], range(ANY, 0))
        assert predictor.recall() == recall
    assert PromptRouter({7: [Key(ANY, 2)]}).known(items)[3] == Expected((7, 3), 3, (Key(ANY, 2),))


def test_recall_is_the_mean_over_layers_of_what_the_batch_needed() -> None:
    here = world(5)
    for predictor in (PreviousStep(), Popularity(2), Markov(2), TraceOracle(), Null()):
        assert math.isnan(predictor.recall())
        recalls, precisions = [], []
        for number in range(9):
            items = step(here, number)
            for layer, said in enumerate(live(predictor, items)):
                needed = {call.keys[0] for item in items for call in item.at(layer)}
                recalls.append(sum(key in said for key in needed) / len(needed))
                if said:
                    precisions.append(sum(key in needed for key in said) / len(said))
        assert predictor.recall() == pytest.approx(sum(recalls) / len(recalls))
        if precisions:
            assert predictor.precision() == pytest.approx(sum(precisions) / len(precisions))
        else:
            assert predictor.recall() == 0.0 and math.isnan(predictor.precision())
    with pytest.raises(MoesaicError, match="predicted set of 0 keys"):
        Popularity(0)


# ---- what it is worth


def sticky_service(
    seed: int, requests: int, experts: int = 7, stay: float = 0.71, budget: int = 16
) -> list[list[WorkItem]]:
    """Requests in overload, first come first served, one token each per step, whatever the cache does."""
    rng = random.Random(seed)
    layout = Layout.experts([1] * experts)
    waiting: list[list[WorkItem]] = []
    for request in range(requests):
        expert, steps = rng.randrange(experts), []
        for number in range(rng.randint(2, 12)):
            expert = expert if rng.random() < stay else rng.randrange(experts)
            known = Known.STEP if number else Known.REQUEST
            steps.append(WorkItem(request, number, "decode", 1, layout.calls([{expert: 1}]), known))
        waiting.append(steps)
    batches = []
    while waiting:
        running, waiting = waiting[:budget], waiting[budget:]
        batches.append([steps.pop(0) for steps in running])
        waiting += [steps for steps in running if steps]
    return batches


def replay(batches: list[list[WorkItem]], policy: Eviction, capacity: int, predictor: Predictor) -> float:
    """Hit ratio; the policy is told what the predictor knows of the work still to come, as it becomes known."""
    cache = Cache(capacity, {Key(ANY, expert): 1 for expert in range(7)}, policy)
    left = [(when, item) for when, batch in enumerate(batches) for item in batch]
    told = set[tuple[int, int]]()
    for now, batch in enumerate(batches):
        for owner, place, keys in predictor.known(item for _, item in left):
            if owner not in told:
                policy.expect(owner, left[int(place)][0], keys)
                told.add(owner)
        left = [pair for pair in left if pair[0] > now]
        for item in batch:
            policy.done(item.id)
        for calls in moments(batch):
            cache.use(calls, now)
        predictor.finish(batch)
    return cache.tally.hit_ratio()


def narrow(batches: list[list[WorkItem]], experts: int) -> list[list[WorkItem]]:
    """The batches cut so that none needs more than `experts`, as a batcher that groups by expert would."""
    out = []
    for batch in batches:
        rest = batch
        while rest:
            wanted = [expert for expert, _ in Counter(item.calls[0].expert for item in rest).most_common(experts)]
            out.append([item for item in rest if item.calls[0].expert in wanted])
            rest = [item for item in rest if item.calls[0].expert not in wanted]
    return out


@pytest.mark.parametrize("requests", [12, 100])
@pytest.mark.parametrize(("capacity", "widest"), [(2, 1), (4, 3), (5, 3)])
def test_knowing_the_queue_lies_between_lru_and_the_oracle(capacity: int, widest: int, requests: int) -> None:
    """All of 12 requests run in every step, so one step ahead is all there is to know; 100 queue for 16 places."""
    ratios = Counter[str]()
    for seed in range(5):
        batches = narrow(sticky_service(seed, requests), widest)
        future = [keys_of(calls) for batch in batches for calls in moments(batch)]
        ratio = {
            "lru": replay(batches, LRU(), capacity, Null()),
            "known": replay(batches, Belady(), capacity, ExactPreGate()),
            "all": replay(batches, Belady(), capacity, TraceOracle()),
            "oracle": replay(batches, Oracle(future), capacity, Null()),
        }
        assert ratio["all"] == ratio["oracle"] >= max(ratio.values())
        ratios.update(ratio)
    assert ratios["lru"] + 0.1 < ratios["known"] <= ratios["oracle"]
    if requests == 100:
        assert ratios["known"] > ratios["oracle"] - 5 * 0.01  # within a point where the queue outlasts the batch
    elif capacity > 2:
        assert ratios["known"] < ratios["oracle"]


@pytest.mark.parametrize(("batch", "slots"), [(4, 8), (8, 8), (16, 8), (16, 16)])
def test_predicted_sets_beat_lru_on_topical_routes(batch: int, slots: int) -> None:
    """The synthetic table of 2410.17954's reproduction, where transfers take no time: an upper bound."""
    rng = np.random.default_rng(0)
    layers, experts, topics = 12, 32, 8
    sizes = {Key(layer, expert): 1 for layer in range(layers) for expert in range(experts)}
    law = rng.dirichlet(np.full(experts, 0.08), size=(topics, layers))
    layout = Layout.layer_experts([[1] * experts] * layers)
    lru, policy = Cache(slots * layers, sizes, LRU()), PredictedSet()
    plec = Cache(slots * layers, sizes, policy)
    now = 0
    for _ in range(40):
        topic = rng.integers(topics, size=batch)
        true = np.array([[rng.choice(experts, p=law[t, layer]) for t in topic] for layer in range(layers)])
        guess = np.where(rng.random(true.shape) < 0.9, true, rng.integers(experts, size=true.shape))
        predicted = [[Key(layer, int(e)) for e in np.unique(guess[layer])] for layer in range(layers)]
        for layer in range(layers):
            policy.expect(layer, layer, predicted[layer])
        for layer in range(layers):
            plec.prefetch([key for keys in predicted[layer:] for key in keys], now)
            plec.settle()
            calls = [call for call in layout.calls([Counter(map(int, row)) for row in true]) if call.layer == layer]
            lru.use(calls, now)
            policy.done(layer)  # its slots are free for the layers to come
            plec.use(calls, now)
            now += 1
    assert plec.tally.hit_ratio() > lru.tally.hit_ratio() + 0.1
    assert 0.5 < plec.tally.hit_ratio() <= 1.0


def test_a_predictor_is_deterministic() -> None:
    makers: list[Callable[[], Predictor]] = [lambda: Markov(3), lambda: Popularity(3), PreviousStep]
    for make in makers:
        said = []
        for _ in range(2):
            predictor = make()
            said.append([list(live(predictor, step(world(6), number))[1].items()) for number in range(9)])
        assert said[0] == said[1]
