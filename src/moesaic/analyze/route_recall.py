"""How often predicted routes are right, for rows and for batches, beside what needs no training.

The metric of ExpertFlow's route predictor (2410.17954): the share of the experts a batch needs that were predicted.
A union over many rows saturates, so every recall comes with the number of experts it took.
Shapes: n rows, L' route layers, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.analyze.route_predictor import RoutePredictor, answers
from moesaic.analyze.route_sequences import Requests, TokenRows, popularity, sequences, token_ids, used_experts
from moesaic.errors import MoesaicError
from moesaic.schedule.trace import Trace


def measure(
    model: RoutePredictor,
    trace: Trace,
    train: Requests,
    held_out: Requests,
    batches: Sequence[int] = (8, 32),
    draws: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """Recall on held-out requests, beside baselines that know the training rows or the past; JSON-able.

    token:  per predictor, for prompt and decode rows: share of a row's experts among the first k and 2k predicted.
    batch:  per batch size, for random decode rows of that many different sequences: R = what any row needs in a layer,
            R^ = what is predicted for any row; recall |R & R^| / |R| (Bacc of 2410.17954), precision |R & R^| / |R^|
            and |R^| ("predicted"), means over draws and layers. R^ joins the rows' first k, except "learned, p >= 0.5"
            and "popularity, as many": as many of the most popular as "learned" predicts.
    Baselines: the token before (the paper's TLP), the layer before (SLP), popularity, and counts by token id; where
    they are silent, popularity speaks. TLP and SLP know true routes of this request, SLP even of this step.
    Raises MoesaicError for a batch larger than the number of held-out sequences that decode.
    """
    known, unseen = sequences(trace, train), sequences(trace, held_out)
    rows = np.concatenate([each.rows for each in unseen])
    is_prompt = torch.from_numpy(np.concatenate([np.arange(len(each.rows)) < each.prompt for each in unseen]))
    picks = {batch: _picks(unseen, batch, draws, seed) for batch in batches}
    used, k = used_experts(trace, rows), trace.card.top_k
    popular = popularity(trace, known)
    token: dict[str, Any] = {}
    needs = {size: _any(used, picks[size]) for size in batches}
    batch: dict[str, Any] = {str(size): {"needed": float(needs[size].sum(-1).double().mean())} for size in batches}
    for name, predict in _predictors(model, trace, known, unseen, popular).items():
        scores = predict()
        order = scores.topk(min(2 * k, trace.card.experts), dim=-1).indices
        parts = {"prompt": is_prompt, "decode": ~is_prompt}
        token[name] = {part: _recalls(used[mask], order[mask], k) for part, mask in parts.items() if mask.any()}
        chosen = torch.zeros_like(used).scatter_(-1, order[..., :k], True)
        for size in batches:
            row, guess = batch[str(size)], _any(chosen, picks[size])
            row[name] = _agreement(needs[size], guess)
            if name == "learned":
                as_many = popular.argsort(-1, descending=True).argsort(-1) < guess.sum(-1, keepdim=True)
                row["learned, p >= 0.5"] = _agreement(needs[size], _any(scores >= 0, picks[size]))  # they are logits
                row["popularity, as many"] = _agreement(needs[size], as_many)
    counts = {"prompt": int(is_prompt.sum()), "decode": int((~is_prompt).sum())}
    return {"k": k, "sequences": len(unseen), "rows": counts, "token": token, "batch": batch}


def _picks(chosen: Sequence[TokenRows], batch: int, draws: int, seed: int) -> Tensor:
    """(draws, batch) places in the concatenated rows: decode rows of different sequences."""
    first = np.cumsum([0, *(len(each.rows) for each in chosen)])
    spans = [(first[i] + each.prompt, first[i + 1]) for i, each in enumerate(chosen) if len(each.rows) > each.prompt]
    if not 1 <= batch <= len(spans):
        raise MoesaicError(
            f"a batch of {batch} decode rows of different sequences, but {len(spans)} held-out sequences decode: "
            "choose a batch of 1 to that many, or hold out more requests"
        )
    start, stop = np.array(spans).T
    rng = np.random.default_rng(seed)
    which = rng.permuted(np.tile(np.arange(len(spans)), (draws, 1)), axis=1)[:, :batch]
    return torch.from_numpy(rng.integers(start[which], stop[which]))


def _any(chosen: Tensor, picks: Tensor) -> Tensor:
    """The union over each batch's rows, (draws, L', E)."""
    return torch.stack([chosen[rows].any(0) for rows in picks])


def _agreement(needed: Tensor, guess: Tensor) -> dict[str, float]:
    both, size = (needed & guess).sum(-1).double(), guess.sum(-1).double()
    means = {"recall": both / needed.sum(-1), "precision": both.sum() / size.sum().clamp_min(1), "predicted": size}
    return {name: float(value.mean()) for name, value in means.items()}


def _recalls(used: Tensor, order: Tensor, k: int) -> dict[str, float]:
    hit, total = used.gather(-1, order), used.sum(-1)
    return {
        "recall@k": float((hit[..., :k].sum(-1) / total).double().mean()),
        "recall@2k": float((hit.sum(-1) / total).double().mean()),
    }


def _predictors(
    model: RoutePredictor, trace: Trace, known: Sequence[TokenRows], unseen: Sequence[TokenRows], popular: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Name -> scores (n, L', E) of the concatenated unseen rows, larger = sooner. They are large: one at a time."""
    rows, fill = np.concatenate([each.rows for each in unseen]), popular / 2

    def learned() -> Tensor:
        found = dict(answers(model, trace, unseen))
        return torch.cat([found[i] for i in range(len(unseen))])

    def previous_token() -> Tensor:
        own = used_experts(trace, rows).float().roll(1, 0)
        own[torch.tensor(np.cumsum([0, *(len(each.rows) for each in unseen[:-1])]))] = 0
        return own + fill

    def previous_layer() -> Tensor:
        own = used_experts(trace, rows).float().roll(1, 1)
        own[:, 0] = 0
        return own + fill

    def token_id() -> Tensor:
        past = np.unique(np.concatenate([each.rows for each in known]))
        tokens = token_ids(trace)
        ids, place = torch.unique(tokens, return_inverse=True)
        table = torch.zeros(len(ids), *popular.shape).index_add_(0, place[past], used_experts(trace, past).float())
        return table[place[rows]] + fill

    found = {"learned": learned, "previous token": previous_token, "previous layer": previous_layer}
    if trace.route_layers == 1:
        del found["previous layer"]
    return {**found, "token id": token_id, "popularity": lambda: popular.expand(len(rows), -1, -1)}
