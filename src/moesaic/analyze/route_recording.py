"""Records which experts a mixture really chose: prompts are generated from, and every token's routes are kept.

Works on refactored models (the pre-gate's one choice for all layers), on routed models and on transformers' own
mixtures (one choice per layer). Sequences run in left-padded batches, each with draws of its own, so that a prompt is
given the same whatever the batch, up to rounding: where that carries the probabilities over a draw, the text goes on
differently from there. Generation goes on past the end-of-sequence token, which is never sampled: a trace needs as many
tokens as its log has.
Shapes: B sequences in a batch, S padded prompt tokens, V vocabulary, L' route layers, K slots.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from moesaic.data.domain import Domain
from moesaic.data.tokens import Tokenizer
from moesaic.errors import MoesaicError
from moesaic.experts.bank import FFNBank
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.models.routed import RoutedForCausalLM
from moesaic.models.stock import GateAdapter, StockGate, find_stock_gates, record_plans
from moesaic.progress import Progress
from moesaic.routing.contract import RoutePlan
from moesaic.schedule.trace import EMPTY, Card, Trace

Array = NDArray[Any]
Plans = Callable[[Any], list[RoutePlan]]


@dataclass(frozen=True)
class Prompt:
    """A text to continue and the name a log calls it by."""

    id: str
    text: str


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts from JSON lines: `id`, and `text` or `turns`, a list of texts that are joined by an empty line.

    Raises MoesaicError with the line for anything else, and for an id that comes twice.
    """
    path = Path(path)
    if not path.is_file():
        raise MoesaicError(f"no prompts at {path}; expected JSON lines with id and text or turns")
    found: dict[str, Prompt] = {}
    for line, raw in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except json.JSONDecodeError as error:
            raise MoesaicError(f"{path}, line {line}: not JSON: {error}") from error
        row = row if isinstance(row, dict) else {}
        turns = row.get("turns", [row.get("text")])
        if "id" not in row or not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise MoesaicError(f'{path}, line {line}: expected {{"id": ..., "text": "..."}} or "turns": ["...", ...]')
        name = str(row["id"])
        if name in found:
            raise MoesaicError(f"{path}, line {line}: the id {name!r} comes twice")
        found[name] = Prompt(name, "\n\n".join(turns))
    if not found:
        raise MoesaicError(f"{path} has no prompts")
    return list(found.values())


def domain_prompts(domains: Sequence[Domain], each: int) -> list[Prompt]:
    """The beginnings of the first `each` held-out documents of every domain, named domain-0, domain-1, ..."""
    return [
        Prompt(f"{domain.name}-{number}", text)
        for domain in domains
        for number, text in enumerate(domain.validation[:each])
    ]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 = the most probable one."""

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise MoesaicError(f"temperature {self.temperature}: expected a finite number of at least 0")


@dataclass
class _Sequence:
    """One prompt on its way. draws: (output_tokens,) in [0, 1); rows: routes, one array a forward; ids: as run."""

    ids: list[int]
    output_tokens: int
    draws: Array
    rows: list[Array] = field(default_factory=list)
    weights: list[Array] = field(default_factory=list)


def record(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    output_tokens: int | Sequence[int],
    *,
    sampling: Sampling = Sampling(),
    batch: int = 32,
    prompt_tokens: int | None = None,
    arrival_s: Sequence[float] | None = None,
    weight_bytes: float | None = None,
    name: str | None = None,
) -> Trace:
    """One request per prompt, with a row for every token that ran; its ids go to meta["prompt_ids"].

    output_tokens:  wanted, for all or for each prompt; all but the last are run.
    prompt_tokens:  the longest prompt. Prompts also end where the model's positions would not reach to the last
                    output token; meta["cut"] counts those that lost something.
    arrival_s:      sorted, one per prompt; None = all at 0.
    weight_bytes:   per parameter as the model is served; None = as it is loaded.

    Raises MoesaicError for a model without routes, an empty prompt, or outputs that leave no room for a prompt.
    """
    if batch < 1 or not prompts:
        raise MoesaicError(f"{len(prompts)} prompts in batches of {batch}: expected at least 1 of each")
    card = card_of(model, weight_bytes=weight_bytes, name=name)
    wanted = [output_tokens] * len(prompts) if isinstance(output_tokens, int) else list(output_tokens)
    if len(wanted) != len(prompts) or min(wanted) < 0:
        raise MoesaicError(f"{len(wanted)} output lengths from {min(wanted)} for {len(prompts)} prompts: one each")
    sequences, cut = _sequences(model, tokenizer, prompts, wanted, prompt_tokens, sampling)
    lengths = [len(sequence.ids) for sequence in sequences]
    # Longest first: what the allocator keeps from a batch serves the shorter ones after it.
    order = sorted(range(len(prompts)), key=lambda number: (-lengths[number], wanted[number], number))
    with _evaluating(model), _plans(model) as plans, Progress("record", sum(wanted), "tokens") as progress:
        for start in range(0, len(order), batch):
            group = [sequences[number] for number in order[start : start + batch]]
            _Batch(model, plans, sampling.temperature).run(group, progress)
    routes = _joined([rows for sequence in sequences for rows in sequence.rows], EMPTY)
    rows = np.array([sum(map(len, sequence.rows)) for sequence in sequences])
    first = np.cumsum(rows) - rows
    return Trace(
        arrival_s=np.zeros(len(prompts)) if arrival_s is None else np.asarray(arrival_s, dtype=float),
        prompt_tokens=np.array(lengths),
        output_tokens=np.array(wanted),
        routes=routes,
        prompt_row=first,
        prompt_rows=np.array(lengths),
        decode_row=first + lengths,
        decode_rows=rows - lengths,
        card=replace(card, top_k=routes.shape[2]),
        token_ids=np.concatenate([sequence.ids for sequence in sequences]),
        weights=None if isinstance(model, MoesaicForCausalLM) else _weights(sequences),
        meta={
            "source": "recording",
            "prompt_ids": [prompt.id for prompt in prompts],
            "cut": cut,
            "batch": batch,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
        },
    )


def _sequences(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    wanted: Sequence[int],
    longest: int | None,
    sampling: Sampling,
) -> tuple[list[_Sequence], int]:
    """The prompts as tokens, as trained: with the beginning-of-sequence token; and how many had to be cut."""
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = tokenizer([prompt.text for prompt in prompts], add_special_tokens=False)["input_ids"]
    positions = getattr(_text_config(model), "max_position_embeddings", None) or math.inf
    sequences, cut = [], 0
    for number, (prompt, row, outputs) in enumerate(zip(prompts, rows, wanted, strict=True)):
        room = min(positions - max(outputs - 1, 0), math.inf if longest is None else longest)
        if room < 1:
            raise MoesaicError(
                f"{outputs} output tokens leave no room for a prompt: the model has {positions} positions"
                + ("" if longest is None else f", and prompts may have {longest} tokens")
            )
        if not row:
            raise MoesaicError(f"prompt {prompt.id!r} is empty")
        ids = [*head, *row]
        cut += len(ids) > room
        draws = np.random.default_rng((sampling.seed, number)).random(outputs)
        sequences.append(_Sequence(ids[: int(min(room, len(ids)))], outputs, draws))
    return sequences, cut


class _Batch:
    """Generates from sequences together, and gives each the routes of its own tokens."""

    def __init__(self, model: PreTrainedModel, plans: Plans, temperature: float) -> None:
        self.model, self.plans, self.temperature = model, plans, temperature
        self.takes = _options(model)
        self.eos = _end_tokens(model)

    def run(self, sequences: list[_Sequence], progress: Progress) -> None:
        """Fill `rows`, `weights` and `ids`. Padding is never recorded, nor what runs on past its own length."""
        device = self.model.device
        longest = max(len(sequence.ids) for sequence in sequences)
        ids_BS = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BS)
        for row, sequence in enumerate(sequences):
            ids_BS[row, longest - len(sequence.ids) :] = torch.tensor(sequence.ids)
            mask_BT[row, longest - len(sequence.ids) :] = 1
        mask_BT, cache = mask_BT.to(device), _cache(self.model)
        logits_BV = self._forward(ids_BS.to(device), mask_BT, cache, sequences, [len(s.ids) for s in sequences])
        running = sequences
        for t in range(max(sequence.output_tokens for sequence in sequences)):
            ids_B = self._choose(logits_BV, [s.draws[t] if t < s.output_tokens else 0.0 for s in running])
            progress.advance(sum(t < sequence.output_tokens for sequence in running))
            left = [row for row, sequence in enumerate(running) if sequence.output_tokens > t + 1]
            if not left:
                return
            if 4 * len(left) <= 3 * len(running):  # the cache is copied: only where much is saved
                rows = torch.tensor(left, device=device)
                ids_B, mask_BT, running = ids_B[rows], mask_BT[rows], [running[row] for row in left]
                cache.batch_select_indices(rows)
            counts = [int(sequence.output_tokens > t + 1) for sequence in running]
            for sequence, token, count in zip(running, ids_B.tolist(), counts, strict=True):
                sequence.ids += [token] * count
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(running), 1)], dim=1)
            logits_BV = self._forward(ids_B[:, None], mask_BT, cache, running, counts)

    def _forward(
        self, ids_BS: Tensor, mask_BT: Tensor, cache: DynamicCache, sequences: list[_Sequence], counts: list[int]
    ) -> Tensor:
        """The logits of the next token, (B, V); `counts` of the last tokens of each sequence are recorded."""
        batch, length = ids_BS.shape
        given: dict[str, Any] = {"position_ids": (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, -length:]}
        given |= {"logits_to_keep": 1}
        out = self.model(
            input_ids=ids_BS,
            attention_mask=mask_BT,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in given.items() if name in self.takes},
        )
        plans = self.plans(out)
        index, weight = (
            _joined([part(plan).view(batch, length, 1, -1).cpu().numpy() for plan in plans], empty, axis=2)
            for part, empty in ((_index, EMPTY), (_weight, 0))
        )
        for sequence, count, index_SLK, weight_SLK in zip(sequences, counts, index, weight, strict=True):
            if count:
                sequence.rows.append(index_SLK[length - count :])
                sequence.weights.append(weight_SLK[length - count :])
        return out.logits[:, -1].float()

    def _choose(self, logits_BV: Tensor, draws: list[float]) -> Tensor:
        """(B,) tokens: where the cumulative probability passes each sequence's own draw."""
        logits_BV[:, self.eos] = -math.inf
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        cumulative = (logits_BV.double() / self.temperature).softmax(-1).cumsum(-1)
        aim = torch.tensor(draws, dtype=torch.double, device=logits_BV.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, aim, right=True)[:, 0].clamp_max(logits_BV.shape[1] - 1)


def _index(plan: RoutePlan) -> Tensor:
    if plan.run is not None and not bool(plan.run.all()):
        raise MoesaicError("this model's tokens skip whole blocks; a trace needs an expert in every layer")
    return plan.index.to(torch.int16)


def _weight(plan: RoutePlan) -> Tensor:
    return plan.weight.to(torch.float16)


def _joined(parts: Sequence[Array], empty: float, axis: int = 0) -> Array:
    """Parts along `axis`; those of fewer slots (the last axis) are filled up."""
    slots = max(part.shape[-1] for part in parts)
    return np.concatenate(
        [np.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, slots - p.shape[-1])], constant_values=empty) for p in parts], axis
    )


def _weights(sequences: Sequence[_Sequence]) -> Array:
    return _joined([rows for sequence in sequences for rows in sequence.weights], 0)


# -- models ------------------------------------------------------------------------------------------------------------
@contextmanager
def _plans(model: PreTrainedModel) -> Iterator[Plans]:
    """A function from a forward's output to its plans, one per route layer."""
    if isinstance(model, MoesaicForCausalLM):
        yield lambda out: [_one_plan(out.expert_index)]
        return
    with record_plans(model) as log:
        yield lambda out: log.forwards.pop()


def _one_plan(expert_BS: Tensor) -> RoutePlan:
    return RoutePlan(expert_BS.flatten()[:, None], torch.ones(expert_BS.numel(), 1))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(training)


def _text_config(model: PreTrainedModel) -> Any:
    base = getattr(model.config, "base_config", None) or model.config
    return base.get_text_config(decoder=True)


def _cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _options(model: PreTrainedModel) -> set[str]:
    """What a forward may be told; wrapped models hand the rest to their backbone."""
    inner = getattr(model, "backbone", model)
    return {name for each in (model, inner) for name in inspect.signature(each.forward).parameters}


def _end_tokens(model: PreTrainedModel) -> list[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    end = getattr(model.config, "eos_token_id", None) if end is None else end
    return [] if end is None else [int(each) for each in (end if isinstance(end, list) else [end])]


def card_of(model: PreTrainedModel, weight_bytes: float | None = None, name: str | None = None) -> Card:
    """The facts of a mixture that a trace needs; top_k is 1 where only its routes can tell.

    `layers` are the routed ones: the dense layers some mixtures begin with are not among them.
    Raises MoesaicError for a dense model, and for pools whose experts are not FFNs of one shape.
    """
    config = _text_config(model)
    heads = int(config.num_attention_heads)
    return Card(
        model=name or str(getattr(config, "name_or_path", "") or type(model).__name__),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocab=int(config.vocab_size),
        weight_bytes=float(model.dtype.itemsize if weight_bytes is None else weight_bytes),
        top_k=1,
        **_experts(model),
    )


def _experts(model: PreTrainedModel) -> dict[str, Any]:
    """layers, experts, known_at, d, ffn, matrices, and shared_params or blocks."""
    if isinstance(model, MoesaicForCausalLM):
        ffns = model.ffns()
        layouts = [ffn.layout for ffn in ffns]
        return {
            "layers": len(ffns),
            "experts": layouts[0].experts,
            "known_at": "request",
            "d": ffns[0].up.shape[1],
            "ffn": max(layout.source_width for layout in layouts),
            "matrices": 2 if ffns[0].gate is None else 3,
            "blocks": tuple(tuple((block.width, block.owners) for block in layout.blocks) for layout in layouts),
        }
    if isinstance(model, RoutedForCausalLM):
        pools = model.pools()
        bank, shared = (pools[0].bank, pools[0].shared) if pools else (None, None)
        if not isinstance(bank, FFNBank):
            raise MoesaicError(f"the experts of {type(model).__name__} are not FFNs of one shape, so they have no card")
        return {
            "layers": len(pools),
            "experts": pools[0].experts,
            "known_at": _known(model.router.caps.precompute),
            "d": bank.width,
            "ffn": bank.hidden,
            "matrices": 3 if bank.gated else 2,
            "shared_params": 0 if shared is None else sum(p.numel() for p in shared.parameters()),
        }
    try:
        gates = find_stock_gates(model)
    except MoesaicError as error:
        raise MoesaicError(
            f"{type(model).__name__} is dense and has no routes to record: refactor it first (`moesaic demo`, or "
            "`moesaic refactor MODEL`) and record the result"
        ) from error
    return _stock_experts(model, gates)


def _stock_experts(model: PreTrainedModel, gates: list[StockGate]) -> dict[str, Any]:
    gate = gates[0]
    named = dict(gate.block.named_parameters())
    stacked = {name: p for name, p in named.items() if name.startswith("experts.") and p.ndim == 3}
    matrices = 3 if any("gate" in name.removeprefix("experts.") for name in stacked) else 2
    own = f"{gate.name}."
    adapter = gate.module
    return {
        "layers": len(gates),
        "experts": gate.experts,
        "known_at": _known(adapter.routing.router.caps.precompute) if isinstance(adapter, GateAdapter) else "gate",
        "d": gate.width,
        "ffn": sum(p.numel() for p in stacked.values()) // gate.experts // (matrices * gate.width),
        "matrices": matrices,
        "shared_params": sum(p.numel() for name, p in named.items() if not name.startswith(("experts.", own))),
    }


def _known(precompute: str) -> str:
    """A router whose plans are exact before layer 0 is known like a pre-gate."""
    return "request" if precompute == "exact" else "gate"
