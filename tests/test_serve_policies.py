"""The live engine and the simulator drive the same objects: on the same work they see the same hits, event by event."""

from typing import Any

import numpy as np
import pytest

from moesaic.analyze.route_recording import card_of
from moesaic.schedule.cache import Demand
from moesaic.schedule.residency import Residency
from moesaic.schedule.trace import Trace
from moesaic.serve.engine import Engine
from moesaic.serve.options import EngineOptions
from moesaic.simulate.assemble import assemble
from moesaic.simulate.system import read_system
from serving import Heard, greedy, prompts, reference, served_folder

REQUESTS, TOKENS = 14, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_folder(tmp_path_factory.mktemp("served") / "tiny")


def listened(residency: Residency) -> list[Demand]:
    """Every demand the residency answers from now on."""
    seen: list[Demand] = []
    demand = residency.demand

    def noted(calls: Any) -> Demand:
        seen.append(found := demand(calls))
        return found

    residency.demand = noted  # type: ignore[method-assign]
    return seen


def live(folder, options: EngineOptions) -> tuple[list[Demand], list[np.ndarray], int]:
    """All requests are there before the first step: their demands, and the experts of their tokens."""
    own = Engine(folder, options)
    own.runner.machine.store.start()
    try:
        seen = listened(own.runner.residency)
        requests = [
            own.intake.request(prompt, greedy(TOKENS, ignore_eos=True), Heard(), 0.0) for prompt in prompts(REQUESTS)
        ]
        for number, request in enumerate(requests):
            request.id, request.arrival_s = number, 0.0
            own.runner.arrive(request)
        while own.runner.busy:
            for request, _, reason, _ in own.runner.step():
                if reason is not None:
                    own.runner.end(request, keep=True)
        capacity = own.runner.residency.pools[0].capacity
        return seen, [request.experts for request in requests], capacity
    finally:
        own.close()


def simulated(folder, options: EngineOptions, experts: list[np.ndarray], capacity: int) -> list[Demand]:
    lengths = [len(prompt) for prompt in prompts(REQUESTS)]
    starts = np.cumsum([0, *map(len, experts)])[:-1]
    trace = Trace(
        arrival_s=np.zeros(REQUESTS),
        prompt_tokens=lengths,
        output_tokens=[TOKENS] * REQUESTS,
        routes=np.concatenate(experts)[:, None, None],
        prompt_row=starts,
        prompt_rows=lengths,
        decode_row=starts + lengths,
        decode_rows=[TOKENS - 1] * REQUESTS,
        card=card_of(reference(folder)),
    )
    changes = {
        "cache.policy": options.policy,
        "cache.granularity": "block",
        "cache.capacity": capacity,
        "cache.persist": True,
        "predictor.kind": options.predictor,
        "predictor.lookahead": options.lookahead,
        "batcher.kind": options.batcher,
        "limits.max_tokens": options.max_tokens,
        "limits.max_requests": options.max_requests,
    }
    simulator = assemble(trace, read_system("read-me", changes))
    seen = listened(simulator.residency)
    simulator.run()
    return seen


@pytest.mark.parametrize("batcher", ["fcfs", "decode-first", "prefill-first", "chunked-prefill", "longest-queue"])
@pytest.mark.parametrize("policy", ["lru", "belady", "lfu"])
def test_same_hits_event_by_event(folder, batcher, policy):
    """Without prefetch nothing depends on how long a step or a transfer takes."""
    options = EngineOptions(
        memory="2GiB",
        experts=0.5,
        dtype="float32",
        max_tokens=48,
        max_requests=6,
        batcher=batcher,
        policy=policy,
        lookahead=0,
        prefix_reuse=False,
    )
    here, experts, capacity = live(folder, options)
    there = simulated(folder, options, experts, capacity)
    assert len(here) > 50
    assert any(found.misses for found in here)
    assert here == there
