"""A learned route predictor: a small model that reads token ids and says which experts each token will need.

ExpertFlow's RPP (2410.17954): embedding of width 32, a mixer over the sequence, one linear head of E logits per route
layer, trained by binary cross-entropy of the used set. A row is answered from tokens that exist when it runs:

    "gru"   causal everywhere
    "t5"    the encoder of the paper; a prompt's tokens see the whole prompt, a decode token only what came before it

Fit it on some requests, measure it on others that share no row with them, and write its answers into a trace, where
`schedule.predict.Learned` reads them. Shapes: B batch, S sequence, n rows, L' route layers, E experts, K slots.
"""

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.analyze.route_sequences import (
    Requests,
    TokenRows,
    folds,
    groups,
    popularity,
    sequences,
    token_ids,
    used_experts,
)
from moesaic.errors import MoesaicError
from moesaic.files import atomic_directory, atomic_write_json, load_tensors, save_tensors
from moesaic.progress import track
from moesaic.schedule.trace import EMPTY, Trace

FORMAT = "moesaic-route-predictor/1"
CONFIG, WEIGHTS = "route_predictor.json", "route_predictor.safetensors"
TOKENS = 8192  # of one forward when nothing is learned: bounds its logits to TOKENS * L' * E numbers
HEADS = 4  # of T5


# -- the model ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class RoutePredictorConfig:
    """Sizes. hidden: of the GRU's state, or of T5's feed-forward; None = 128, or the paper's 2048."""

    vocab: int
    layers: int
    experts: int
    mixer: str = "gru"
    width: int = 32
    hidden: int | None = None
    depth: int | None = None  # None = 1 GRU layer, 2 encoder layers

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            near = difflib.get_close_matches(str(self.mixer), MIXERS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise MoesaicError(f"mixer is {self.mixer!r}, expected one of {', '.join(MIXERS)}{hint}")
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "mixer" and value is not None and value < 1:
                raise MoesaicError(f"{each.name} of a route predictor is {value}, expected at least 1")
        if self.mixer == "t5" and self.width % HEADS:
            raise MoesaicError(f"width {self.width} of a t5 predictor, expected a multiple of its {HEADS} heads")


class CausalGRU(nn.Module):
    """(B, S) ids -> (B, S, width + hidden): the token itself beside a summary of all up to it."""

    def __init__(self, config: RoutePredictorConfig) -> None:
        super().__init__()
        hidden = config.hidden or 128
        self.size = config.width + hidden
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.gru = nn.GRU(config.width, hidden, config.depth or 1, batch_first=True)

    def forward(self, ids: Tensor, prompt: Tensor) -> Tensor:
        token = self.embedding(ids)
        return torch.cat((token, self.gru(token)[0]), -1)


class PrefixT5(nn.Module):
    """(B, S) ids -> (B, S, width): a T5 encoder that looks both ways inside the first `prompt` (B,) tokens only."""

    def __init__(self, config: RoutePredictorConfig) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        self.size = config.width
        shape = {"d_model": config.width, "d_kv": config.width // HEADS, "num_heads": HEADS, "dropout_rate": 0.0}
        layers, hidden = config.depth or 2, config.hidden or 2048
        t5 = T5Config(vocab_size=config.vocab, num_layers=layers, d_ff=hidden, attn_implementation="eager", **shape)
        self.encoder = T5EncoderModel(t5)

    def forward(self, ids: Tensor, prompt: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)
        inside = place < prompt[:, None]
        seen = (place <= place[:, None]) | (inside[:, :, None] & inside[:, None])  # (B, query, key)
        mask = torch.zeros(seen.shape, device=ids.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=mask[:, None]).last_hidden_state
        return hidden


MIXERS: dict[str, Callable[[RoutePredictorConfig], Any]] = {"gru": CausalGRU, "t5": PrefixT5}


class RoutePredictor(nn.Module):
    """Token ids (B, S) and each row's number of leading prompt tokens (B,) -> logits (B, S, L', E)."""

    def __init__(self, config: RoutePredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.mixer = MIXERS[config.mixer](config)
        self.heads = nn.Linear(self.mixer.size, config.layers * config.experts)

    def forward(self, ids: Tensor, prompt: Tensor) -> Tensor:
        logits: Tensor = self.heads(self.mixer(ids, prompt))
        return logits.unflatten(-1, (self.config.layers, self.config.experts))

    @property
    def parameter_count(self) -> int:
        """Numbers that are stored, all of them learned."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save(self, folder: str | Path) -> None:
        """Write the sizes and the weights into `folder`, whole or not at all. Raises DiskFullError."""
        with atomic_directory(folder) as temporary:
            atomic_write_json(temporary / CONFIG, {"format": FORMAT, **asdict(self.config)})
            save_tensors(temporary / WEIGHTS, _stored(self))

    @classmethod
    def load(cls, folder: str | Path) -> "RoutePredictor":
        """Read a saved predictor, in eval mode. Raises MoesaicError if it is missing, damaged, or another thing."""
        path = Path(folder) / CONFIG
        if not path.is_file():
            raise MoesaicError(f"no route predictor in {folder}: expected the {CONFIG} that `save` writes")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            kind = raw.pop("format")
            if kind != FORMAT:
                raise MoesaicError(f"{path} has the format {kind!r}, expected {FORMAT!r}")
            model = cls(RoutePredictorConfig(**raw))
        except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise MoesaicError(f"{path} does not describe a route predictor: {error!r}; save it anew") from error
        tensors, wanted = load_tensors(Path(folder) / WEIGHTS), _stored(model)
        wrong = {name for name in tensors.keys() & wanted.keys() if tensors[name].shape != wanted[name].shape}
        wrong |= tensors.keys() ^ wanted.keys()
        if wrong:
            raise MoesaicError(f"{folder}: {min(wrong)!r} does not fit the sizes in {CONFIG}; train and save it anew")
        model.load_state_dict(tensors, strict=False)
        return model.eval()


def _stored(model: RoutePredictor) -> dict[str, Tensor]:
    """T5 holds its embedding under two names: each parameter under its first."""
    return dict(model.named_parameters())


# -- training ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How it is trained: AdamW, cosine to zero; windows of `window` tokens, `batch` of them a step.

    sizes: of the model, see `RoutePredictorConfig`; vocabulary, layers and experts are the trace's.
    """

    steps: int = 600
    lr: float = 1e-2
    batch: int = 16
    window: int = 128
    weight_decay: float = 1.0  # decoupled, of matrices: the data are few
    warmup: int = 20
    sizes: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "window", "lr"):
            if not getattr(self, name) > 0:
                raise MoesaicError(f"{name} of a fit is {getattr(self, name)}, expected a number above 0")


def fit(
    trace: Trace, train: Requests, held_out: Requests, config: FitConfig | None = None
) -> tuple[RoutePredictor, list[dict[str, float]]]:
    """Train on some requests. Returns the model in eval mode, and ten rows {step, loss, held_out}.

    Both losses are binary cross-entropy, nats, mean over tokens, layers and experts (Eq. 1 of 2410.17954 with its
    missing sign). The heads start at the log-odds of each expert's popularity.
    Raises MoesaicError for a trace without tokens, and for held-out requests that share rows with trained ones.
    """
    config = config or FitConfig()
    tokens = token_ids(trace)
    group = groups(trace)
    shared = np.isin(group[np.asarray(held_out, np.int64)], group[np.asarray(train, np.int64)])
    if shared.any():
        request = held_out[int(shared.argmax())]
        raise MoesaicError(f"held-out request {request} shares rows with trained ones; take both from `split`")
    known, unseen = sequences(trace, train), sequences(trace, held_out)
    if not known or not unseen:
        raise MoesaicError("no requests to train on or to hold out; expected at least one of each")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        sizes: dict[str, Any] = {"vocab": trace.card.vocab, "layers": trace.route_layers, "experts": trace.card.experts}
        model = RoutePredictor(RoutePredictorConfig(**sizes, **config.sizes))
        frequency = popularity(trace, known).clamp(1e-4, 1 - 1e-4)
        with torch.no_grad():
            model.heads.bias.copy_(frequency.logit().flatten())
            model.heads.weight.mul_(0.1)
        history = _train(model, trace, tokens, (known, unseen), config)
    return model.eval().requires_grad_(False), history


def _train(
    model: RoutePredictor,
    trace: Trace,
    tokens: Tensor,
    parts: tuple[list[TokenRows], list[TokenRows]],
    config: FitConfig,
) -> list[dict[str, float]]:
    known, unseen = parts
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]  # biases, the heads' popularity among them, never decay
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
    )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / config.warmup) * 0.5 * (1 + float(np.cos(np.pi * step / config.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = np.random.default_rng(config.seed)
    weight = np.array([len(each.rows) for each in known], dtype=np.float64)
    marks = set(np.linspace(0, config.steps, 11).round().astype(int)[1:].tolist())
    history, losses = [], []
    for step in track(range(1, config.steps + 1), "route predictor"):
        picked = rng.choice(len(known), config.batch, p=weight / weight.sum())
        batch = [_window(known[i], config.window, rng) for i in picked]
        loss = route_loss(model, trace, tokens, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step in marks:
            history.append({"step": step, "loss": float(np.mean(losses)), "held_out": _held_out(model, trace, unseen)})
            losses = []
    return history


def _window(sequence: TokenRows, length: int, rng: np.random.Generator) -> TokenRows:
    start = int(rng.integers(0, max(1, len(sequence.rows) - length + 1)))
    return TokenRows(sequence.rows[start : start + length], int(np.clip(sequence.prompt - start, 0, length)))


def route_loss(model: RoutePredictor, trace: Trace, tokens: Tensor, batch: Sequence[TokenRows]) -> Tensor:
    """Binary cross-entropy of the used sets, nats, mean over the batch's tokens, layers and experts."""
    used = used_experts(trace, np.concatenate([each.rows for each in batch])).float()
    return F.binary_cross_entropy_with_logits(torch.cat(_logits(model, tokens, batch)), used)


def _logits(model: RoutePredictor, tokens: Tensor, batch: Sequence[TokenRows]) -> list[Tensor]:
    """(n, L', E) of each sequence. Padding comes last, where no real token sees it."""
    ids = [tokens[torch.from_numpy(each.rows)] for each in batch]
    prompt = torch.tensor([each.prompt for each in batch])
    logits = model(nn.utils.rnn.pad_sequence(ids, batch_first=True), prompt)
    return [row[: len(each)] for row, each in zip(logits, ids, strict=True)]


@torch.no_grad()
def answers(model: RoutePredictor, trace: Trace, chosen: Sequence[TokenRows]) -> Iterator[tuple[int, Tensor]]:
    """For every sequence its place in `chosen` and its logits (n, L', E), in batches of similar length."""
    if (model.config.layers, model.config.experts) != (trace.route_layers, trace.card.experts):
        raise MoesaicError(
            f"the predictor answers for {model.config.layers} layers of {model.config.experts} experts, the trace has "
            f"{trace.route_layers} of {trace.card.experts}"
        )
    tokens = token_ids(trace)
    if trace.card.vocab > model.config.vocab:
        raise MoesaicError(
            f"the predictor knows {model.config.vocab} tokens, the trace's model {trace.card.vocab}; train one on it"
        )
    order = sorted(range(len(chosen)), key=lambda i: -len(chosen[i].rows))
    while order:
        count = max(1, TOKENS // len(chosen[order[0]].rows))
        part, order = order[:count], order[count:]
        yield from zip(part, _logits(model, tokens, [chosen[i] for i in part]), strict=True)


def _held_out(model: RoutePredictor, trace: Trace, chosen: Sequence[TokenRows]) -> float:
    total, count = 0.0, 0
    for i, logits in answers(model, trace, chosen):
        used = used_experts(trace, chosen[i].rows).float()
        total += float(F.binary_cross_entropy_with_logits(logits, used, reduction="sum"))
        count += used.numel()
    return total / count


# -- answers in a trace ------------------------------------------------------------------------------------------------
def annotate(model: RoutePredictor, trace: Trace, width: int, requests: Requests | None = None) -> Trace:
    """The trace with `predicted` (N, L', width) filled for the rows of `requests` (all by default), likeliest first.

    Rows of other requests keep the answers they have, or stay EMPTY. A row of several sequences is answered in the
    longest. Answers for requests that the model was trained on are better than it deserves: see `cross_annotate`.
    """
    if not 1 <= width <= trace.card.experts:
        raise MoesaicError(f"{width} predicted experts per layer, expected 1 to {trace.card.experts}")
    predicted = np.full((*trace.routes.shape[:2], width), EMPTY, dtype=np.int16)
    if trace.predicted is not None and requests is not None:
        if trace.predicted.shape[-1] != width:
            raise MoesaicError(f"the trace has answers of width {trace.predicted.shape[-1]}, expected width {width}")
        predicted[:] = trace.predicted
    chosen = sequences(trace, requests)
    found = answers(model, trace, chosen)
    best = {i: logits.topk(width, dim=-1).indices.to(torch.int16).numpy() for i, logits in found}
    for i in reversed(range(len(chosen))):  # the longest come first, and win
        predicted[chosen[i].rows] = best[i]
    return replace(trace, predicted=predicted)


def cross_annotate(trace: Trace, width: int, count: int = 2, config: FitConfig | None = None) -> Trace:
    """`annotate` every request by a model fitted on the other `count` - 1 folds: none has seen what it answers."""
    parts = folds(trace, count, (config or FitConfig()).seed)
    blank = replace(trace, predicted=None)
    for part in parts:
        model, _ = fit(trace, np.setdiff1d(np.arange(trace.requests), part), part, config)
        blank = annotate(model, blank, width, part)
    return blank
