"""Distil any layer-wise router into a pre-gate: how much of its plans is known from token ids, before layer 0.

Read-ME's router training (2410.19123, section 3.2) with another teacher: the labels are the frozen model's own plans.
Record them on calibration text, train `PredictedPlanRouter` on them, and report what a server would gain (recall of the
needed experts among k and 2k predicted ones) and lose (regret, nats a token).
Shapes: B batch, S sequence, N = B * S, L routed layers, E experts, K slots.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.analyze.router_metrics import next_token_sum
from moesaic.errors import MoesaicError
from moesaic.models.stock import override_plans, record_plans, replay_plans
from moesaic.routing.contract import EMPTY, RouteInput, RoutePlan
from moesaic.routing.predicted_plan import PredictedPlanRouter
from moesaic.training.loop import Batch, train
from moesaic.training.schedule import Stage

TOKEN_TABLE_LIMIT = 50_000_000  # counts (V, L, E) of the token-id baseline; larger vocabularies go without it


# -- recording --------------------------------------------------------------------------------------------------------
@dataclass
class RecordedPlans:
    """Token batches with the plans a frozen model made for them; a BatchSource that starts over, reshuffled.

    Each batch: `input_ids` and maybe `attention_mask` (B, S), `index` (B, S, L, K) int32 with EMPTY slots, `weight`
    (B, S, L, K) float32, and `log_probs` (B, S, L, E) float16 where the router has scores.
    """

    batches: list[Batch]
    experts: int
    fingerprint: str
    seed: int = 0

    def batch(self, step: int) -> Batch:
        """The batch of an optimizer step."""
        epoch, place = divmod(step, len(self.batches))
        return self.batches[np.random.default_rng((self.seed, epoch)).permutation(len(self.batches))[place]]

    @property
    def tokens(self) -> int:
        """Recorded tokens, padding not counted."""
        return sum(int(valid_tokens(batch).sum()) for batch in self.batches)

    @property
    def layers(self) -> int:
        """Routed layers, L."""
        return int(self.batches[0]["index"].shape[2])

    @property
    def slots(self) -> int:
        """Experts a token uses in a layer, rounded mean: k."""
        used = sum(int((batch["index"] != EMPTY).flatten(0, 1)[valid_tokens(batch)].sum()) for batch in self.batches)
        return max(1, round(used / (self.tokens * self.layers)))

    @property
    def mass(self) -> Tensor:
        """(L,) mean sum of a token's weights."""
        total = sum(batch["weight"].flatten(0, 1)[valid_tokens(batch)].sum((0, 2)) for batch in self.batches)
        return torch.as_tensor(total) / self.tokens

    @property
    def renormalised(self) -> bool:
        """Whether every token's weights have the same sum: the router divides by the chosen experts' scores."""
        sums = torch.cat([batch["weight"].flatten(0, 1)[valid_tokens(batch)].sum(-1) for batch in self.batches])
        return bool(((sums - self.mass).abs() <= 1e-3 * self.mass).all())


def valid_tokens(batch: Batch) -> Tensor:
    """(N,) bool: not padding."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return mask.flatten().bool()


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """The part of a batch that the model reads, on its device."""
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {k: batch[k].to(device) for k in ("input_ids", "attention_mask") if k in batch}
    return {**inputs, "use_cache": False}


def text_config(model: Any) -> Any:
    """The decoder's config of a stock or a wrapped model."""
    return getattr(model.config, "base_config", model.config).get_text_config(decoder=True)


@torch.no_grad()
def record(model: nn.Module, batches: Iterable[Batch], source: str = "", seed: int = 0) -> RecordedPlans:
    """Run the frozen model over token batches and keep its plans in memory: 2E + 8K bytes a token and layer.

    source:  fingerprint of where the batches come from.
    Raises MoesaicError if there is no batch, or the layers have different numbers of experts.
    """
    kept: list[Batch] = []
    was_training, digest = model.training, hashlib.sha256(source.encode())
    model.eval()
    with record_plans(model) as log:
        for batch in batches:
            inputs = model_inputs(model, batch)
            model(**inputs)
            row = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
            kept.append(row | _stacked(log.forwards.pop(), batch["input_ids"].shape))
            digest.update(kept[-1]["input_ids"].numpy().tobytes() + kept[-1]["index"].numpy().tobytes())
    model.train(was_training)
    if not kept:
        raise MoesaicError("no calibration batch was given; pass at least one")
    experts = kept[0]["log_probs"].shape[-1] if "log_probs" in kept[0] else 1 + max(int(b["index"].max()) for b in kept)
    return RecordedPlans(kept, int(experts), digest.hexdigest()[:16], seed)


def _stacked(plans: Sequence[RoutePlan], shape: torch.Size) -> Batch:
    width = max(plan.index.shape[1] for plan in plans)
    index = [F.pad(plan.index, (0, width - plan.index.shape[1]), value=EMPTY) for plan in plans]
    weight = [F.pad(plan.weight, (0, width - plan.weight.shape[1])) for plan in plans]
    rows = {"index": torch.stack(index, 1), "weight": torch.stack(weight, 1)}
    scores = [plan.scores for plan in plans if plan.scores is not None]
    if len({score.shape[-1] for score in scores}) > 1:
        raise MoesaicError("layers with different numbers of experts cannot share one pre-gate")
    if len(scores) == len(plans):
        rows["log_probs"] = torch.stack(scores, 1).clamp_min(1e-7).log().half()
    return {name: value.cpu().unflatten(0, tuple(shape)) for name, value in rows.items()}


# -- training ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How the pre-gate is trained. `selection`: binary cross-entropy of the used experts (cross-entropy for top-1).

    kl:     of KL(router || pre-gate) over all experts; 0 where the router has no scores.
    groups: heads, each for a contiguous group of layers; None = one per layer.
    trunk:  sizes of the pre-gate, see `PreGateConfig`.
    """

    steps: int = 400
    lr: float = 5e-3
    selection: float = 1.0
    kl: float = 5.0
    groups: int | None = None
    trunk: dict[str, int] = field(default_factory=lambda: {"width": 128, "mlp_width": 256, "heads": 4, "layers": 2})
    weight_decay: float = 0.01
    checkpoint_every: int = 100
    seed: int = 0


def distil(
    model: Any, recorded: RecordedPlans, workdir: Path, config: DistillationConfig | None = None, restart: bool = False
) -> PredictedPlanRouter:
    """Train a pre-gate on recorded plans; resumable, a finished one is loaded from `workdir`. Returns it in eval mode.

    `model` is only asked for its vocabulary and number of layers. Its backbone's Cache may hold the pre-gate's keys.
    """
    config = config or DistillationConfig()
    text = text_config(model)
    torch.manual_seed(config.seed)
    router = PredictedPlanRouter(
        text.vocab_size,
        recorded.experts,
        recorded.layers,
        k=recorded.slots,
        groups=config.groups,
        first_slot=text.num_hidden_layers,
        trunk=config.trunk,
    )
    router.mass.copy_(recorded.mass)
    scored = config.kl > 0 and all("log_probs" in batch for batch in recorded.batches)
    stage = Stage(
        name="pre-gate",
        steps=config.steps,
        lr=config.lr,
        coefficients={"selection": config.selection, **({"kl": config.kl} if scored else {})},
        weight_decay=config.weight_decay,
        schedule_args={"warmup": min(20, config.steps // 10)},
        checkpoint_every=config.checkpoint_every,
        seed=config.seed,
    )
    train(stage, router, distillation_step(router, scored), recorded, workdir, restart=restart)
    return router.cpu().eval().requires_grad_(False)


def distillation_step(router: PredictedPlanRouter, kl: bool) -> Callable[[Batch], dict[str, Tensor]]:
    """The loss function: `selection` and maybe `kl`; nats per token and layer, means over valid tokens."""

    def step(batch: Batch) -> dict[str, Tensor]:
        valid = valid_tokens(batch)
        logits_NLE = router.scorer.all_layers(batch["input_ids"], batch.get("attention_mask")).flatten(0, 1)[valid]
        losses = {"selection": selection_loss(logits_NLE, batch["index"].flatten(0, 1)[valid])}
        if kl:
            losses["kl"] = score_divergence(logits_NLE, batch["log_probs"].flatten(0, 1)[valid]).mean()
        return losses

    return step


def score_divergence(logits_NLE: Tensor, log_probs_NLE: Tensor) -> Tensor:
    """KL(router || pre-gate) of each token and layer, (N, L), nats."""
    teacher = log_probs_NLE.float().log_softmax(-1)
    return F.kl_div(logits_NLE.log_softmax(-1), teacher, reduction="none", log_target=True).sum(-1)


def selection_loss(logits_NLE: Tensor, index_NLK: Tensor) -> Tensor:
    """Cross-entropy for one slot, else binary cross-entropy of the used set summed over experts; nats, mean of N, L."""
    if index_NLK.shape[-1] == 1 and bool((index_NLK != EMPTY).all()):
        return F.cross_entropy(logits_NLE.flatten(0, 1), index_NLK.flatten().long())
    used_NLE = used_experts(index_NLK, logits_NLE.shape[-1]).float()
    return F.binary_cross_entropy_with_logits(logits_NLE, used_NLE, reduction="none").sum(-1).mean()


def used_experts(index: Tensor, experts: int) -> Tensor:
    """(..., K) slots -> (..., E) bool."""
    slots = index.long().masked_fill(index == EMPTY, experts)
    mask = torch.zeros(*index.shape[:-1], experts + 1, dtype=torch.bool, device=index.device)
    return mask.scatter_(-1, slots, True)[..., :experts]


# -- measuring --------------------------------------------------------------------------------------------------------
Predictor = Callable[[Batch], Tensor]  # batch -> scores (B, S, L, E), larger = sooner


def agreement(predict: Predictor, held_out: RecordedPlans) -> dict[str, list[float]]:
    """Per layer over valid tokens: top-1 agreement, recall of the used experts among k and 2k predicted ones."""
    k, experts = held_out.slots, held_out.experts
    sums = {name: torch.zeros(held_out.layers) for name in ("top1", "recall@k", "recall@2k", "used", "tokens")}
    for batch in held_out.batches:
        valid = valid_tokens(batch)
        scores_NLE, index_NLK = (t.flatten(0, 1)[valid] for t in (predict(batch), batch["index"]))
        best_NL = index_NLK.gather(-1, batch["weight"].flatten(0, 1)[valid].argmax(-1, keepdim=True))[..., 0]
        used_NLE = used_experts(index_NLK, experts)
        order = scores_NLE.topk(min(2 * k, experts), dim=-1).indices
        hit = used_NLE.gather(-1, order)
        sums["top1"] += (order[..., 0] == best_NL).sum(0)
        sums["recall@k"] += hit[..., :k].sum((0, 2))
        sums["recall@2k"] += hit.sum((0, 2))
        sums["used"] += used_NLE.sum((0, 2))
        sums["tokens"] += valid.sum()
    shares = {name: sums[name] / sums["used"].clamp_min(1) for name in ("recall@k", "recall@2k")}
    return {name: value.tolist() for name, value in {"top1": sums["top1"] / sums["tokens"], **shares}.items()}


def divergence(router: PredictedPlanRouter, held_out: RecordedPlans) -> list[float] | None:
    """Per layer, mean KL(router's scores || pre-gate's) over valid tokens, nats; None where there are no scores."""
    if any("log_probs" not in batch for batch in held_out.batches):
        return None
    total = torch.zeros(held_out.layers)
    for batch in held_out.batches:
        valid = valid_tokens(batch)
        logits_NLE, log_probs_NLE = (t.flatten(0, 1)[valid] for t in (predicted(router)(batch), batch["log_probs"]))
        total += score_divergence(logits_NLE, log_probs_NLE).sum(0)
    return (total / held_out.tokens).tolist()


def predicted(router: PredictedPlanRouter) -> Predictor:
    """The pre-gate as a predictor."""

    @torch.no_grad()
    def predict(batch: Batch) -> Tensor:
        return router.scorer.all_layers(batch["input_ids"], batch.get("attention_mask"))

    return predict


def popularity(recorded: RecordedPlans) -> Tensor:
    """How often each expert was used, (L, E): the baseline that ignores the token."""
    counts = torch.zeros(recorded.layers, recorded.experts)
    for batch in recorded.batches:
        counts += used_experts(batch["index"].flatten(0, 1)[valid_tokens(batch)], recorded.experts).sum(0)
    return counts


def token_table(recorded: RecordedPlans, vocab_size: int) -> Tensor:
    """How often each expert was used for each token id, (V, L, E), plus the popularity as a tie-break below one use."""
    table = torch.zeros(vocab_size, recorded.layers, recorded.experts)
    for batch in recorded.batches:
        valid = valid_tokens(batch)
        used = used_experts(batch["index"].flatten(0, 1)[valid], recorded.experts).float()
        table.index_add_(0, batch["input_ids"].flatten()[valid], used)
    popular = popularity(recorded)
    return table + popular / (popular.sum(-1, keepdim=True) + 1)


def baselines(calibration: RecordedPlans, vocab_size: int) -> dict[str, Predictor]:
    """Predictors without a pre-gate: popularity, the previous token's own plan, and a table by token id."""
    popular = popularity(calibration)

    def always(batch: Batch) -> Tensor:
        return popular.expand(*batch["input_ids"].shape, *popular.shape)

    def previous(batch: Batch) -> Tensor:
        scores = always(batch) / popular.max()
        used = used_experts(batch["index"], calibration.experts).float()
        own = used + batch["log_probs"].float().exp() if "log_probs" in batch else used
        return torch.cat((scores[:, :1], (own + 1e-3 * scores)[:, :-1]), 1)

    found: dict[str, Predictor] = {"popularity": always, "previous token": previous}
    if vocab_size * popular.numel() <= TOKEN_TABLE_LIMIT:
        table = token_table(calibration, vocab_size)
        found["token id"] = lambda batch: table[batch["input_ids"]]
    return found


# -- regret -----------------------------------------------------------------------------------------------------------
def gate_scores(live: RoutePlan) -> Tensor:
    """The gate's scores (N, E): softmax or sigmoid of its logits, whichever its own weights follow.

    Raises MoesaicError if the plan has no logits: a random or fixed router has no true gate to ask.
    """
    if live.logits is None:
        raise MoesaicError("this router's plans carry no logits, so its gate cannot choose among predicted experts")
    index = live.index.long().clamp_min(0)

    def misfit(scores: Tensor) -> float:
        chosen = scores.gather(-1, index) * live.used
        ratio = chosen / chosen.sum(-1, keepdim=True) - live.weight / live.weight.sum(-1, keepdim=True).clamp_min(1e-9)
        return float(ratio.abs().sum())

    return min((live.logits.softmax(-1), live.logits.sigmoid()), key=misfit)


def restrict(live: RoutePlan, allowed_NE: Tensor, renormalised: bool) -> RoutePlan:
    """The gate's choice among `allowed` experts only: its best ones, as many as it used, weighted as it weights.

    renormalised:  weights are divided by the chosen scores (and keep their sum); else they are the scores themselves
                   times whatever factor the gate has.
    """
    scores = gate_scores(live)
    slots = min(live.index.shape[1], int(allowed_NE.sum(-1).min()))
    top, index = scores.masked_fill(~allowed_NE, -1.0).topk(slots, dim=-1)
    keep = torch.arange(slots, device=top.device) < live.used.sum(-1, keepdim=True)
    top, total = top * keep, live.weight.sum(-1, keepdim=True)
    own = (scores.gather(-1, live.index.long().clamp_min(0)) * live.used).sum(-1, keepdim=True)
    base = top.sum(-1, keepdim=True) if renormalised else own
    weight = top * total / base.clamp_min(1e-20)
    return RoutePlan(index.int().masked_fill(~keep, EMPTY), weight, live.logits, live.probs)


@torch.no_grad()
def loss(model: Any, batches: Sequence[Batch], under: Callable[[Batch], Any] | None = None) -> float:
    """Mean cross-entropy of the next token, nats, padding excluded; `under(batch)` is a context for each forward."""
    total, count = 0.0, 0
    for batch in batches:
        with nullcontext() if under is None else under(batch):
            logits = model(**model_inputs(model, batch)).logits.cpu()
        value, pairs = next_token_sum(logits, batch["input_ids"], batch.get("attention_mask"))
        total, count = total + float(value), count + pairs
    return total / max(1, count)


def gate_among(model: Any, predict: Predictor, width: int, renormalised: bool) -> Callable[[Batch], Any]:
    """A context for `loss`: the true gate, but only the `width` first predicted experts of each token are there."""

    def under(batch: Batch) -> Any:
        order_NLM = predict(batch).topk(width, dim=-1).indices.flatten(0, 1)

        def change(layer: int, live: RoutePlan) -> RoutePlan:
            assert live.logits is not None
            allowed = torch.zeros_like(live.logits, dtype=torch.bool)
            return restrict(live, allowed.scatter_(-1, order_NLM[:, layer].to(allowed.device), True), renormalised)

        return override_plans(model, change)

    return under


def pregate_only(model: Any, router: PredictedPlanRouter) -> Callable[[Batch], Any]:
    """A context for `loss`: no gate at all, the pre-gate's experts with the pre-gate's weights."""

    def under(batch: Batch) -> Any:
        inp = RouteInput.of(batch["input_ids"], valid=valid_tokens(batch))
        if "attention_mask" in batch:
            inp.pos = (batch["attention_mask"].long().cumsum(-1) - 1).clamp_min(0).flatten()
        plans = router.plan_all(inp, router.scorer.layers)
        device = next(model.parameters()).device
        return replay_plans(model, [RoutePlan(p.index.to(device), p.weight.to(device)) for p in plans])

    return under


# -- the report -------------------------------------------------------------------------------------------------------
def report(
    model: Any, router: PredictedPlanRouter, calibration: RecordedPlans, held_out: RecordedPlans
) -> dict[str, Any]:
    """Everything about a distilled pre-gate, JSON-able: agreement per layer and mean, baselines, KL, and regret.

    Regret = loss with predicted plans - loss of the original, nats a token, on the held-out batches.
    """
    k, experts, layers = held_out.slots, held_out.experts, held_out.layers
    wide = min(2 * k, experts)
    others = baselines(calibration, text_config(model).vocab_size)
    rows = {"pre-gate": agreement(predicted(router), held_out)}
    rows |= {name: agreement(predict, held_out) for name, predict in others.items()}
    rows["random"] = {
        name: [count / experts] * layers for name, count in (("top1", 1), ("recall@k", k), ("recall@2k", wide))
    }
    kl = divergence(router, held_out)
    original = loss(model, held_out.batches)
    ways = {"pre-gate's experts and weights": pregate_only(model, router)}
    if kl is not None:
        fixed = calibration.renormalised
        ways["true gate among k predicted"] = gate_among(model, predicted(router), k, fixed)
        ways["true gate among 2k predicted"] = gate_among(model, predicted(router), wide, fixed)
        for name, predict in others.items():
            ways[f"true gate among 2k by {name}"] = gate_among(model, predict, wide, fixed)
    return {
        "layers": layers,
        "experts": experts,
        "k": k,
        "tokens": {"calibration": calibration.tokens, "held out": held_out.tokens},
        "parameters": sum(p.numel() for p in router.parameters()),
        "agreement": {name: {key: _mean(values) for key, values in row.items()} for name, row in rows.items()},
        "kl": None if kl is None else _mean(kl),
        "loss": original,
        "regret": {name: loss(model, held_out.batches, under) - original for name, under in ways.items()},
    }


def _mean(values: list[float]) -> dict[str, Any]:
    return {"mean": math.fsum(values) / len(values), "layers": values}


def markdown(result: dict[str, Any]) -> str:
    """The report as Markdown tables."""
    k, wide = result["k"], min(2 * result["k"], result["experts"])
    lines = [
        f"{result['layers']} layers, {result['experts']} experts, top-{k}; "
        f"{result['tokens']['calibration']:,} calibration and {result['tokens']['held out']:,} held-out tokens.",
        "",
        f"| predictor | top-1 | recall@{k} | recall@{wide} | recall@{wide} by layer |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["agreement"].items():
        means = " | ".join(f"{row[key]['mean']:.3f}" for key in ("top1", "recall@k", "recall@2k"))
        lines.append(f"| {name} | {means} | {' '.join(f'{value:.2f}' for value in row['recall@2k']['layers'])} |")
    lines += ["", "| plans | loss, nats a token | regret |", "|---|---|---|"]
    lines.append(f"| the router's own | {result['loss']:.4f} | 0 |")
    for name, value in result["regret"].items():
        lines.append(f"| {name} | {result['loss'] + value:.4f} | {value:+.4f} |")
    return "\n".join(lines)
