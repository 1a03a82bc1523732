"""A trace as work items: what each request's next portion calls, under a layout."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesaic.schedule.trace import EMPTY, Trace
from moesaic.schedule.work import Call, Key, Known, Layout, WorkItem, keys_of


class Workload:
    """The requests of a trace, cut into portions on demand.

    Calls of single tokens are built once for each distinct row of routes: decode steps repeat a few of them.
    """

    def __init__(self, trace: Trace, layout: Layout) -> None:
        self.trace, self.layout = trace, layout
        known = Known[trace.card.known_at.upper()]
        self.prompt_known, self.token_known = known, Known.STEP if known == Known.REQUEST else known
        self.prompt_tokens: list[int] = trace.prompt_tokens.tolist()
        self.output_tokens: list[int] = trace.output_tokens.tolist()
        self.arrival_s: list[float] = trace.arrival_s.tolist()
        self.guess = False  # whether batchers see the learned predictor's answers instead of the routes
        self._single: dict[bytes, tuple[Call, ...]] = {}
        self._answers: dict[bytes, tuple[Key, ...]] = {}
        self._first: dict[int, int] = {}  # request -> first token of its latest item
        self._visible: dict[int, tuple[tuple[Key, ...], int]] = {}  # id of a single token's calls -> what is visible

    def __len__(self) -> int:
        return len(self.arrival_s)

    def prefill(self, request: int, step: int, start: int, tokens: int) -> WorkItem:
        """Prompt tokens start to start + tokens - 1."""
        self._first[request] = start
        rows_NLK = self.trace.prompt_routes(request, start, start + tokens)
        return WorkItem(request, step, "prefill", tokens, self._calls(rows_NLK), self.prompt_known)

    def decode(self, request: int, step: int, token: int) -> WorkItem:
        """The run of output token `token`, counted from 0."""
        self._first[request] = token
        row_LK = self.trace.decode_routes(request, token)
        calls = self._single.get(key := row_LK.tobytes())
        if calls is None:
            calls = self._single[key] = self._calls(row_LK[None])
            self._visible[id(calls)] = keys_of(calls), majority(calls)
        return WorkItem(request, step, "decode", 1, calls, self.token_known)

    def visible(self, item: WorkItem) -> tuple[tuple[Key, ...], int | None]:
        """What a batcher may know of a queued item: its entries and its majority expert.

        Before a gate that is nothing, or what a learned predictor answered.
        """
        if self.guess:
            keys = self.answers(item)
            return keys, keys[0].unit
        if item.known_at == Known.GATE:
            return (), None
        found = self._visible.get(id(item.calls))
        return found or (keys_of(item.calls), majority(item.calls))

    def answers(self, item: WorkItem) -> tuple[Key, ...]:
        """What the trace's learned predictor says of an item: entries of most of its tokens first."""
        trace = self.trace
        assert trace.predicted is not None, "the trace has no answers of a predictor"
        kind = "prompt" if item.phase == "prefill" else "decode"
        row, rows = (int(getattr(trace, f"{kind}_{name}")[item.request]) for name in ("row", "rows"))
        first = self._first[item.request]
        predicted = trace.predicted[row + np.arange(first, first + item.tokens) % rows]
        found = self._answers.get(key := predicted.tobytes())
        if found is None:
            found = self._answers[key] = keys_of(sorted(self._calls(predicted), key=lambda call: -call.tokens))
        return found

    def route(self, request: int) -> tuple[Key, ...]:
        """The entries of the request's first prompt token: what a router of whole prompts chose."""
        return keys_of(self._calls(self.trace.prompt_routes(request, 0, 1)))

    def _calls(self, rows_NLK: NDArray[np.int16]) -> tuple[Call, ...]:
        E = self.trace.card.experts
        layers = rows_NLK.shape[1]
        offset = np.where(rows_NLK == EMPTY, layers * E, rows_NLK + np.arange(layers)[:, None] * E)
        counts_LE = np.bincount(offset.ravel(), minlength=layers * E + 1)[:-1].reshape(layers, E)
        return self.layout.calls([{int(e): int(row[e]) for e in np.flatnonzero(row)} for row in counts_LE])


def majority(calls: Sequence[Call]) -> int:
    """The expert with most tokens over all layers, the lower number at a tie."""
    tokens: dict[int, int] = {}
    for call in calls:
        tokens[call.expert] = tokens.get(call.expert, 0) + call.tokens
    return min(tokens, key=lambda expert: (-tokens[expert], expert))
