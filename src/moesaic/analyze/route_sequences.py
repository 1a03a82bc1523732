"""The recorded sequences behind a trace's requests, and divisions of the requests that share no row.

What a model of routes learns from: shared rows come once, and what is held out was never seen.
Shapes: R requests, N rows, n rows of one sequence, L' route layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.schedule.trace import EMPTY, Trace

Array = NDArray[Any]
Requests = Sequence[int] | Array


@dataclass(frozen=True, eq=False)
class TokenRows:
    """The rows of one recorded sequence in the order they ran; the first `prompt` of them are the prompt's."""

    rows: Array
    prompt: int


def sequences(trace: Trace, requests: Requests | None = None) -> list[TokenRows]:
    """What `requests` (all by default) hold of recorded sequences, each row's longest one; shared ones come once."""
    columns = (trace.prompt_row, trace.prompt_rows, trace.decode_row, trace.decode_rows)
    chosen = np.stack(columns, 1) if requests is None else np.stack(columns, 1)[np.asarray(requests, dtype=np.int64)]
    chosen[chosen[:, 3] == 0, 2] = 0
    different = np.unique(chosen, axis=0)
    found, seen = [], np.zeros(len(trace.routes), dtype=bool)
    for p, p_rows, d, d_rows in different[np.argsort(-(different[:, 1] + different[:, 3]), kind="stable")].tolist():
        rows = np.concatenate((np.arange(p, p + p_rows), np.arange(d, d + d_rows)))
        if not seen[rows].all():
            seen[rows] = True
            found.append(TokenRows(rows, p_rows))
    return found


def groups(trace: Trace) -> Array:
    """(R,) a number per request; two requests have the same one exactly if shared rows join them, also by others."""
    spans = sorted(
        (start, start + rows, request)
        for kind in ("prompt", "decode")
        for request, (start, rows) in enumerate(
            zip(getattr(trace, f"{kind}_row").tolist(), getattr(trace, f"{kind}_rows").tolist(), strict=True)
        )
        if rows
    )
    parent = list(range(trace.requests))

    def root(request: int) -> int:
        while parent[request] != request:
            parent[request] = request = parent[parent[request]]
        return request

    end, holder = -1, -1
    for start, stop, request in spans:
        if start < end:
            parent[root(request)] = root(holder)
        if stop > end:
            end, holder = stop, request
    return np.unique([root(request) for request in range(trace.requests)], return_inverse=True)[1]


def split(trace: Trace, share: float = 0.2, seed: int = 0) -> tuple[Array, Array]:
    """Requests to train on and about `share` of them held out; the two share no row.

    Raises MoesaicError where rows join all requests.
    """
    if not 0 < share < 1:
        raise MoesaicError(f"a held-out share of {share}, expected one between 0 and 1")
    group = groups(trace)
    sizes = np.bincount(group)
    if len(sizes) < 2:
        raise MoesaicError("all requests share rows, so none can be held out: record a trace with more prompts")
    order = np.random.default_rng(seed).permutation(len(sizes))
    count = int(np.searchsorted(sizes[order].cumsum(), share * trace.requests, side="right"))
    held_out = np.isin(group, order[: min(max(count, 1), len(sizes) - 1)])
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def folds(trace: Trace, count: int, seed: int = 0) -> list[Array]:
    """The requests in `count` parts that share no row."""
    group = groups(trace)
    if not 2 <= count <= group.max() + 1:
        raise MoesaicError(f"{count} folds, expected 2 to {group.max() + 1}: that many groups of requests share no row")
    part = np.random.default_rng(seed).permutation(group.max() + 1) % count
    return [np.flatnonzero(part[group] == each) for each in range(count)]


def token_ids(trace: Trace) -> Tensor:
    """Token id of each row, (N,)."""
    if trace.token_ids is None:
        raise MoesaicError(
            "the trace has no token_ids, from which routes are predicted: record it with `moesaic trace record`, which "
            "keeps them (a synthetic trace has no tokens)"
        )
    if (bad := (trace.token_ids < 0) | (trace.token_ids >= trace.card.vocab)).any():
        row = int(bad.argmax())
        raise MoesaicError(
            f"token_ids: row {row} holds token {trace.token_ids[row]}, expected 0 to {trace.card.vocab - 1}, the "
            "vocabulary of the card"
        )
    return torch.from_numpy(trace.token_ids.astype(np.int64))


def used_experts(trace: Trace, rows: Array) -> Tensor:
    """(n, L', E) bool."""
    routes = torch.from_numpy(trace.routes[rows].astype(np.int64))
    mask = torch.zeros(*routes.shape[:2], trace.card.experts + 1, dtype=torch.bool)
    return mask.scatter_(-1, routes.masked_fill(routes == EMPTY, trace.card.experts), True)[..., :-1]


def popularity(trace: Trace, known: Sequence[TokenRows]) -> Tensor:
    """Share of the recorded rows that use each expert, (L', E)."""
    return used_experts(trace, np.unique(np.concatenate([each.rows for each in known]))).float().mean(0)
