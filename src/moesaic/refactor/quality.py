"""The quality receipt: what refactoring cost, per domain, against the dense source and against honest controls.

Variants, all on the same held-out windows:
  dense     the source model
  moe       the healed model under its own router
  oracle    the healed model, every token sent to its own domain's expert
  random    the healed model, every token sent to a random expert
  unhealed  routed, before any expert training (the router alone)
  pruned    the control: one global mask of the same width, healed on the same tokens and steps
Shapes: n windows of S tokens, E experts, G domains. Losses are nats per token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.balance.information import mutual_information
from moesaic.data.tokens import DomainTokens
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.progress import Progress
from moesaic.refactor.pregate import OverlapTeacher, overlap_target

LossRows = dict[str, Tensor]  # variant -> (G, n) mean loss of each window


def window_losses(logits_nSV: Tensor, ids_nS: Tensor) -> Tensor:
    """(n,) mean next-token loss of each window."""
    loss = F.cross_entropy(logits_nSV[:, :-1].flatten(0, 1).float(), ids_nS[:, 1:].flatten(), reduction="none")
    return loss.view(len(ids_nS), -1).mean(1)


def compare(logits: Tensor, reference: Tensor) -> tuple[float, float]:
    """Share of positions with the same most likely token, and mean KL(reference || model) in nats."""
    same = (logits.argmax(-1) == reference.argmax(-1)).float().mean()
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return float(same), float(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())


def paired_interval(differences: Sequence[np.ndarray], seed: int = 0, draws: int = 2_000) -> list[list[float]]:
    """[mean, low, high] of each group and, last, of the average over groups: 95 % bootstrap over windows.

    differences:    per group the difference of each of its windows, (n,); groups may have different n.
    """
    rng = np.random.default_rng(seed)
    means = np.stack([row[rng.integers(len(row), size=(draws, len(row)))].mean(1) for row in differences], axis=1)
    samples = np.concatenate([means, means.mean(1, keepdims=True)], axis=1)
    centre = [float(row.mean()) for row in differences]
    centre.append(float(np.mean(centre)))
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    return [[float(c), float(lo), float(hi)] for c, lo, hi in zip(centre, low, high, strict=True)]


@torch.inference_mode()
def measure_quality(
    dense: PreTrainedModel,
    moe: MoesaicForCausalLM,
    domains: Sequence[DomainTokens],
    *,
    pruned: MoesaicForCausalLM | None = None,
    unhealed: MoesaicForCausalLM | None = None,
    windows: int = 24,
    length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """The "quality" part of a receipt; every variant sees the same windows of the validation split."""
    experts = moe.config.experts
    generator = torch.Generator().manual_seed(seed)
    held_out = [domain.windows(length, windows) for domain in domains]
    rows: dict[str, list[list[Tensor]]] = {}
    similar: dict[str, list[tuple[float, float, int]]] = {"moe": [], "pruned": []}  # agreement, KL, windows

    def variants(ids: Tensor, label: int) -> Mapping[str, Callable[[], Tensor]]:
        random = torch.randint(experts, ids.shape, generator=generator)
        own = min(label, experts - 1)
        table: dict[str, Callable[[], Tensor]] = {"dense": lambda: dense(input_ids=ids, use_cache=False).logits}
        table["moe"] = lambda: moe(input_ids=ids, use_cache=False).logits
        table["random"] = lambda: moe(input_ids=ids, use_cache=False, expert_index=random).logits
        for expert in range(experts):
            name = "oracle" if expert == own else f"expert {expert}"
            table[name] = lambda e=expert: moe(input_ids=ids, use_cache=False, expert_index=e).logits  # type: ignore[misc]
        if unhealed is not None:
            table["unhealed"] = lambda: unhealed(input_ids=ids, use_cache=False).logits
        if pruned is not None:
            table["pruned"] = lambda: pruned(input_ids=ids, use_cache=False, expert_index=0).logits
        return table

    total = sum(math.ceil(len(ids) / batch_size) for ids in held_out)
    with Progress("quality", total=total, unit="batches") as progress:
        for label, windows_nS in enumerate(held_out):
            for name in variants(windows_nS[:1], label):
                rows.setdefault(name, [[] for _ in domains])
            for ids in windows_nS.split(batch_size):
                ids = ids.to(moe.device)
                runs = dict(variants(ids, label))
                reference = runs["dense"]()
                for name, run in runs.items():
                    logits = reference if name == "dense" else run()
                    rows[name][label].append(window_losses(logits, ids))
                    if name in similar:
                        similar[name].append((*compare(logits, reference), len(ids)))
                progress.advance()
    return _summary(rows, similar, domains, experts, length)


def _summary(
    rows: Mapping[str, list[list[Tensor]]],
    similar: Mapping[str, list[tuple[float, float, int]]],
    domains: Sequence[DomainTokens],
    experts: int,
    length: int,
) -> dict[str, Any]:
    each = {name: [torch.cat(parts).double() if parts else None for parts in per] for name, per in rows.items()}
    named = [name for name in ("dense", "moe", "oracle", "random", "unhealed", "pruned") if name in each]
    nats = {name: [float(loss.mean()) for loss in each[name] if loss is not None] for name in named}
    matrix = [
        [float(_loss_of(each, expert, label, experts).mean()) for label in range(len(domains))]
        for expert in range(experts)
    ]
    result: dict[str, Any] = {
        "domains": [domain.name for domain in domains],
        "windows_per_domain": min(len(losses) for losses in each["dense"] if losses is not None),
        "sequence_length": length,
        "nats": nats,
        "bits_per_byte": {
            name: [v / math.log(2) / d.bytes_per_token for v, d in zip(values, domains, strict=True)]
            for name, values in nats.items()
        },
        "average": {name: float(np.mean(values)) for name, values in nats.items()},
        "matrix": matrix,
        "agreement": {name: _weighted([(row[0], row[2]) for row in rows]) for name, rows in similar.items() if rows},
        "kl": {name: _weighted([(row[1], row[2]) for row in rows]) for name, rows in similar.items() if rows},
    }
    if "pruned" in each:
        pairs = zip(each["moe"], each["pruned"], strict=True)
        differences = [(moe - pruned).cpu().numpy() for moe, pruned in pairs if moe is not None and pruned is not None]
        *per_domain, average = paired_interval(differences)
        result["moe_minus_pruned"] = {
            **dict(zip(("mean", "low", "high"), average, strict=True)),
            "per_domain": per_domain,
            "better_domains": sum(row[0] < 0 for row in per_domain),
            "method": "paired bootstrap over windows, 95 %",
        }
        gap = result["average"]["pruned"] - result["average"]["dense"]
        result["gap_share"] = (result["average"]["moe"] - result["average"]["dense"]) / gap if gap > 0 else None
    return result


def _weighted(pairs: Sequence[tuple[float, int]]) -> float:
    """Mean of (value, weight) pairs."""
    values, weights = zip(*pairs, strict=True)
    return float(np.average(values, weights=weights))


def _loss_of(each: Mapping[str, list[Tensor | None]], expert: int, label: int, experts: int) -> Tensor:
    """Losses of `expert` on domain `label`; the own expert's run is filed under "oracle"."""
    name = "oracle" if expert == min(label, experts - 1) else f"expert {expert}"
    losses = each[name][label]
    assert losses is not None
    return losses


@torch.inference_mode()
def measure_router(
    moe: MoesaicForCausalLM,
    teacher: OverlapTeacher,
    domains: Sequence[DomainTokens],
    *,
    windows: int = 24,
    length: int = 256,
    batch_size: int = 8,
) -> dict[str, Any]:
    """The "router" part of a receipt: accuracies, stickiness, load, and how much the layers' labels agree."""
    experts, layers = moe.config.experts, len(moe.config.sites)
    pairs = torch.zeros(layers - 1, experts, experts)
    confusion = torch.zeros(len(domains), experts)
    right = stays = tokens = transitions = 0
    for label, domain in enumerate(domains):
        for ids in domain.windows(length, windows).split(batch_size):
            ids = ids.to(moe.device)
            overlap = teacher.overlaps(ids)
            best = overlap.argmax(-1)  # (L, N)
            for layer in range(layers - 1):
                joint = best[layer] * experts + best[layer + 1]
                pairs[layer] += torch.bincount(joint, minlength=experts**2).view(experts, experts).cpu()
            choice = moe.plan(ids).expert
            right += int((choice == overlap_target(overlap).argmax(-1)).sum())
            tokens += choice.numel()
            grid = choice.view(ids.shape)
            stays += int((grid[:, 1:] == grid[:, :-1]).sum())
            transitions += grid[:, 1:].numel()
            confusion[label] += torch.bincount(choice, minlength=experts).cpu()
    load = confusion.sum(0) / confusion.sum()
    shares = confusion / confusion.sum(1, keepdim=True)
    own = [float(shares[i, i]) for i in range(min(shares.shape))]
    return {
        "label_accuracy": right / tokens,
        "domain_accuracy": float(np.mean(own)),
        "stay_probability": stays / transitions,
        "load": load.tolist(),
        "entropy": float(-(load * load.clamp_min(1e-12).log()).sum()),
        "max_entropy": math.log(experts),
        "layer_mutual_information": [mutual_information(pair, corrected=False) for pair in pairs],
        "confusion": shares.T.tolist(),
    }


def measure_bytes(dense: PreTrainedModel, moe: MoesaicForCausalLM, dtype: torch.dtype) -> dict[str, Any]:
    """The "bytes" part of a receipt: what a checkpoint in `dtype` stores, and what one token uses.

    The router stays in float32. Shared tensors count once. "untied" is the size if every expert had its own copy of
    its channels.
    """
    size = dtype.itemsize
    router = sum(p.numel() for p in moe.pregate.parameters()) if moe.pregate is not None else 0
    ffns, total = moe.ffns(), _count(moe)
    # Weights of channels only: a down bias belongs to the layer, and untied experts share it too.
    channel = [blocks.channel_bytes // blocks.up.element_size() for blocks in ffns]
    stored = sum(n * blocks.layout.width for n, blocks in zip(channel, ffns, strict=True))
    one_expert = [
        sum(n * blocks.layout.expert_width(expert) for n, blocks in zip(channel, ffns, strict=True))
        for expert in range(moe.config.experts)
    ]
    dense_bytes, moe_bytes = _count(dense) * size, (total - router) * size + router * 4
    return {
        "dense": dense_bytes,
        "moe": moe_bytes,
        "untied": moe_bytes + (sum(one_expert) - stored) * size,
        "router": 4 * router,
        "ratio": moe_bytes / dense_bytes,
        "dense_parameters": _count(dense),
        "moe_parameters": total,
        "active_parameters": total - stored + round(float(np.mean(one_expert))),
    }


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
