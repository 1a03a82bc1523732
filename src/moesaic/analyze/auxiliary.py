"""Fit the causal students of routers that compare tokens: MoMa's auxiliary routers (2407.21770, sec. 2.4).

Experts that choose their tokens, and depth layers that choose theirs, look at the whole batch or sequence, which
decoding does not have. The model is trained to the end, then frozen; a small MLP per layer learns by binary
cross-entropy to repeat the choices from the token alone. Only losses under the fitted router are autoregressive.
Shapes: N tokens of a batch, E experts, L routed layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.models.depth import DepthForCausalLM, use_router
from moesaic.models.routed import RoutedForCausalLM
from moesaic.progress import track
from moesaic.routing.contract import RouteInput, RoutePlan, Router
from moesaic.routing.depth import AuxiliaryDepthRouter, DepthRouter
from moesaic.routing.modality import AuxiliaryRouter, ModalityRouter

Record = list[tuple[RouteInput, RoutePlan]]  # of one forward: what the router saw and chose, per layer


@dataclass(frozen=True)
class AuxiliaryReport:
    """How well the student repeats the teacher, on the teacher's own hidden states.

    precision, recall:    of its choices, per layer, over all experts.
    without:              share of tokens that no expert (or no block) takes: (teacher, student), mean over layers.
    selected:             choices per token: (teacher, student); calibration makes them equal on what it was fitted on.
    loss:                 next-token loss, nats: (teacher, not autoregressive; student), each under its own routes.
    """

    precision: list[float]
    recall: list[float]
    without: tuple[float, float]
    selected: tuple[float, float]
    loss: tuple[float, float]


def fit_auxiliary(
    model: RoutedForCausalLM,
    batches: Sequence[Tensor],
    steps: int = 1000,
    *,
    held_out: Sequence[Tensor] | None = None,
    lr: float = 1e-3,
    seed: int = 0,
) -> AuxiliaryReport:
    """Fit and calibrate an auxiliary router on the model's selections, and make it the model's router.

    batches:   token ids (B, S) each; their selections are recorded once. held_out: what the report measures instead.
    Everything else of the model stays as it is. Raises MoesaicError if the router is none that needs a student, and for
    no batches.
    """
    if not batches:
        raise MoesaicError("no batches: an auxiliary router learns from the selections the model makes on text")
    main = model.router
    records = [record(model, ids) for ids in batches]
    student = _student(main, records[0])
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(student.scorer.parameters(), lr=lr, weight_decay=0.0)
    for step in track(range(steps), "auxiliary router"):
        for group in optimizer.param_groups:
            group["lr"] = lr * max(0.01, 1 - step / steps)  # linear to a hundredth, as the paper's 1e-4 -> 1e-6
        losses = [student.losses([plan], inp)["selection"] for inp, plan in records[step % len(records)]]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
    _calibrate(student, records)
    shown = batches if held_out is None else held_out
    recorded = records if held_out is None else [record(model, ids) for ids in held_out]
    before = _loss(model, shown)
    if isinstance(model, DepthForCausalLM):
        model.set_router(student)
    else:
        use_router(model, student)
    return _report(student, recorded, (before, _loss(model, shown)))


@torch.no_grad()
def record(model: RoutedForCausalLM, ids: Tensor) -> Record:
    """What the model's router saw and chose in a forward of (B, S) ids, per layer, in eval mode."""
    seen: Record = []
    plan = model.router.plan

    def noting(inp: RouteInput, state: Any = None) -> Any:
        made, after = plan(inp, state)
        seen.append((inp, made))
        return made, after

    with _eval(model):
        try:
            model.router.plan = noting  # type: ignore[method-assign]
            model(ids, use_cache=False)
        finally:
            del model.router.plan
    return seen


@contextmanager
def _eval(model: RoutedForCausalLM) -> Iterator[None]:
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


def _student(main: Router, seen: Record) -> Any:
    """The untrained auxiliary router that fits `main`."""
    hidden = seen[0][0].need_hidden()
    if isinstance(main, ModalityRouter):
        student: Router = AuxiliaryRouter(main, hidden.shape[-1], len(seen))
    elif isinstance(main, DepthRouter):
        student = AuxiliaryDepthRouter(main, hidden.shape[-1], len(seen))
    else:
        raise MoesaicError(
            f"{type(main).__name__} needs no auxiliary router: it is causal, or there is none for it; expected a "
            "ModalityRouter or a DepthRouter"
        )
    return student.to(hidden.device)


@torch.no_grad()
def _calibrate(student: Any, records: Sequence[Record]) -> None:
    """Per layer and expert the threshold that selects as often as the teacher did."""
    for layer in range(len(records[0])):
        probs, used = [], []
        for seen in records:
            inp, plan = seen[layer]
            logits = student.plan(inp)[0].logits
            probs.append(logits[inp.valid].sigmoid())
            used.append(plan.used[inp.valid])
        student.calibrate(layer, torch.cat(probs), torch.cat(used))


@torch.no_grad()
def _loss(model: RoutedForCausalLM, batches: Sequence[Tensor]) -> float:
    with _eval(model):
        return sum(float(model(ids, labels=ids, use_cache=False).loss) for ids in batches) / len(batches)


@torch.no_grad()
def _report(student: Any, records: Sequence[Record], loss: tuple[float, float]) -> AuxiliaryReport:
    precision, recall, without, selected = [], [], [], []
    for layer in range(len(records[0])):
        pairs = []
        for seen in records:
            inp, plan = seen[layer]
            pairs.append((plan.used[inp.valid], student.plan(replace(inp, phase="eval"))[0].used[inp.valid]))
        main, own = (torch.cat(part) for part in zip(*pairs, strict=True))
        both = float((main & own).sum())
        precision.append(both / max(1, int(own.sum())))
        recall.append(both / max(1, int(main.sum())))
        without.append([float((~used.any(1)).float().mean()) for used in (main, own)])
        selected.append([float(used.sum(1).float().mean()) for used in (main, own)])
    none, some = torch.tensor(without).mean(0).tolist(), torch.tensor(selected).mean(0).tolist()
    return AuxiliaryReport(precision, recall, (none[0], none[1]), (some[0], some[1]), loss)
