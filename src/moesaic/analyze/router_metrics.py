"""What a trained router does with held-out text: how even, how decided, how specialised, how costly it is.

Everything is counted from the plans of valid tokens; padding is excluded. Entropies and mutual informations are in
nats, estimated by plugging counts in and adding Miller and Madow's correction, (cells that occur - 1) / 2n to every
entropy: without it, independent routes of 8 experts seem to share 49 / 2n nats. Tokens of one text are correlated, so
n overstates the evidence, and a corrected estimate of nothing scatters around 0 on both sides.
Shapes: N tokens, L layers, E experts of the pool (free ones too), G domains.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.balance.information import entropy, mutual_information, normalised_information
from moesaic.balance.load_balance import expert_counts
from moesaic.balance.router_losses import router_entropy
from moesaic.data.tokens import DomainTokens
from moesaic.errors import MoesaicError
from moesaic.models.routed import RoutedForCausalLM
from moesaic.progress import track
from moesaic.routing.contract import RoutePlan
from moesaic.training.losses import next_token_targets


def next_token_sum(logits_BSV: Tensor, ids_BS: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, int]:
    """Summed cross-entropy of the next tokens, nats, and how many pairs of two valid tokens it sums."""
    target = next_token_targets(ids_BS, mask_BS)
    loss = F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="sum")
    return loss, int((target != -100).sum())


def first_choice(plan: RoutePlan) -> Tensor:
    """(N,) int64: the expert with the largest weight, the first of equals; EMPTY where a token uses none."""
    best = plan.weight.masked_fill(~plan.used, -1).argmax(-1, keepdim=True)
    return plan.index.gather(-1, best).long().squeeze(-1)


@dataclass
class RouteCounts:
    """Sums over valid tokens. `a + b` is what counting both would have given.

    slots_LE:       used slots.
    pairs_LEE:      (L - 1, E + 1, E + 1): first choices of a token in a layer and in the next one; 0 is "none".
    entropy_L:      summed entropy of the scores, nats; None where the router has no scores.
    """

    tokens: int
    slots_LE: Tensor
    pairs_LEE: Tensor
    entropy_L: Tensor | None

    def __add__(self, other: "RouteCounts") -> "RouteCounts":
        entropies = (self.entropy_L, other.entropy_L)
        return RouteCounts(
            self.tokens + other.tokens,
            self.slots_LE + other.slots_LE,
            self.pairs_LEE + other.pairs_LEE,
            None if entropies[0] is None or entropies[1] is None else entropies[0] + entropies[1],
        )


def count_routes(plans: Sequence[RoutePlan], valid_N: Tensor, experts: int) -> RouteCounts:
    """Count the plans of one forward, one per layer, over its valid tokens."""
    symbols = [first_choice(plan)[valid_N] + 1 for plan in plans]
    cells = (experts + 1) ** 2
    pairs = [torch.bincount(a * (experts + 1) + b, minlength=cells) for a, b in pairwise(symbols)]
    tokens = int(valid_N.sum())
    scored = tokens > 0 and all(plan.scores is not None for plan in plans)
    return RouteCounts(
        tokens,
        torch.stack([expert_counts(plan.index, experts, valid_N) for plan in plans]).double().cpu(),
        torch.stack(pairs).view(-1, experts + 1, experts + 1).cpu() if pairs else torch.zeros(0),
        torch.stack([router_entropy([plan], valid_N) * tokens for plan in plans]).double().cpu() if scored else None,
    )


def route_report(domains: dict[str, RouteCounts]) -> dict[str, Any]:
    """Loads, entropies and informations of all domains together and of each; lists run over layers."""
    counts = list(domains.values())
    total = sum(counts[1:], counts[0])
    slots_GLE = torch.stack([count.slots_LE for count in counts])
    layers, experts = total.slots_LE.shape
    load_LE = total.slots_LE / total.slots_LE.sum(-1, keepdim=True).clamp_min(1)
    shared = [mutual_information(pairs) for pairs in total.pairs_LEE]
    return {
        "tokens": total.tokens,
        "experts": experts,
        "load": load_LE.tolist(),
        "load_by_domain": {
            name: (count.slots_LE / count.slots_LE.sum(-1, keepdim=True).clamp_min(1)).tolist()
            for name, count in domains.items()
        },
        "load_entropy": [entropy(row) for row in total.slots_LE],
        "largest_load": load_LE.max(-1).values.tolist(),
        "router_entropy": None if total.entropy_L is None else (total.entropy_L / total.tokens).tolist(),
        "domain_nmi": [normalised_information(slots_GLE[:, layer]) for layer in range(layers)],
        "adjacent_layers_information": shared,
        "experts_per_token": (total.slots_LE.sum(-1) / total.tokens).tolist(),
        "experts_per_token_by_domain": {
            name: float(count.slots_LE.sum() / count.tokens / layers) for name, count in domains.items()
        },
    }


def cost_report(model: RoutedForCausalLM, slots_LE: Tensor, tokens: int) -> dict[str, float]:
    """Parameters, and what a token uses of them on average. FLOPs are multiply-adds times two of the experts alone.

    Active parameters are everything but the banks, and of these what the plans used; free experts cost nothing.
    """
    used, stored, flops, shared = 0.0, 0.0, 0.0, 0.0
    for pool, slots_E in zip(model.pools(), slots_LE / tokens, strict=True):
        size = next(pool.bank.parameters()).element_size()
        parameters = torch.tensor(pool.bank.expert_bytes, dtype=torch.float64) / size
        stored += float(parameters.sum())
        used += float(slots_E[: pool.bank.experts] @ parameters)
        flops += float(slots_E @ torch.tensor(pool.flops_per_token, dtype=torch.float64))
        shared += 0 if pool.shared is None else sum(pool.shared.flops_per_token)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": total,
        "router_parameters": sum(parameter.numel() for parameter in model.router.parameters()),
        "active_parameters": total - stored + used,
        "expert_flops_per_token": flops + shared,
        "shared_flops_per_token": shared,
    }


@torch.inference_mode()
def measure_router(
    model: RoutedForCausalLM,
    domains: Sequence[DomainTokens],
    *,
    windows: int = 24,
    length: int = 256,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Loss, routes, cost and speed on the validation windows of each domain, in eval mode.

    "loss" is nats per token. Speed counts the tokens of full forwards, without a cache and after one to warm up.
    Raises MoesaicError without a domain, or for one shorter than a window.
    """
    if not domains:
        raise MoesaicError("a router is measured on text: give at least one domain")
    training, model_device = model.training, model.device
    model.eval()
    held_out = {domain.name: domain.windows(length, windows).to(model_device) for domain in domains}
    experts, losses, counts, seconds = model.pools()[0].experts, {}, {}, 0.0
    _timed(model, next(iter(held_out.values()))[:batch_size])
    for name, ids_nS in track(held_out.items(), "measure the router", unit="domains"):
        total, predicted, parts = 0.0, 0, []
        for ids in ids_nS.split(batch_size):
            logits, took = _timed(model, ids)
            loss, number = next_token_sum(logits, ids)
            total, predicted, seconds = total + float(loss), predicted + number, seconds + took
            assert model.last is not None
            parts.append(count_routes(model.plans(), model.last.inp.valid, experts))
        losses[name], counts[name] = total / predicted, sum(parts[1:], parts[0])
    model.train(training)
    report = route_report(counts)
    slots_LE = torch.stack([count.slots_LE for count in counts.values()]).sum(0)
    bits = {d.name: losses[d.name] / d.bytes_per_token / math.log(2) for d in domains}
    return {
        "loss": sum(losses.values()) / len(losses),
        "loss_by_domain": losses,
        "bits_per_byte": bits,
        "windows": {name: len(ids) for name, ids in held_out.items()},
        "length": length,
        **report,
        **cost_report(model, slots_LE, report["tokens"]),
        "tokens_per_second": report["tokens"] / seconds,
    }


def _timed(model: RoutedForCausalLM, ids_BS: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    logits: Tensor = model(input_ids=ids_BS, use_cache=False).logits
    if logits.device.type != "cpu":
        torch.accelerator.synchronize(logits.device)
    return logits, time.perf_counter() - start
