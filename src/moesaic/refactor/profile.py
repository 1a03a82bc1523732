"""Stage 1: which FFN channels each domain uses. Streaming, so memory does not grow with the corpus.

The statistic is taken at the input of every down projection, a = act(gate x) * up x (Read-ME, eq. 3).
Shapes: G domains, W channels of a layer, N tokens.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.data.tokens import DomainTokens
from moesaic.errors import MoesaicError
from moesaic.files import load_tensors, save_tensors
from moesaic.models.ffn_sites import capture_activations, find_ffn_sites, get_ffn_weights
from moesaic.progress import track
from moesaic.routing.pregate import positions

Importance = Literal["magnitude", "contribution"]
THIN_TOKENS_PER_CHANNEL = 8  # fewer profiled tokens than this times the FFN width: the top-k is mostly noise


@dataclass
class Profile:
    """Activation statistics, one entry per decoder layer in each list.

    magnitude:  (G, W) float32, mean |a| over the domain's tokens.
    peak:       (G, W) float32, max |a|; zero means the channel never fired.
    down_norm:  (W,) float32, norm of the channel's column in the down projection.
    tokens:     (G,) int64, tokens seen per domain, padding excluded.
    """

    names: list[str]
    magnitude: list[Tensor]
    peak: list[Tensor]
    down_norm: list[Tensor]
    tokens: Tensor

    def importance(self, kind: Importance = "contribution") -> list[Tensor]:
        """(G, W) scores per layer: mean |a| (the paper's), or mean |a| times the down-column norm.

        The second is the size of what a channel writes into the residual stream, so a loud channel with a tiny column
        no longer displaces a quiet one with a large column.
        """
        if kind == "magnitude":
            return self.magnitude
        return [magnitude * norm for magnitude, norm in zip(self.magnitude, self.down_norm, strict=True)]

    def coverage(self) -> dict[str, object]:
        """Tokens per domain, channels that never fired, and a warning for every domain that is too thin."""
        width = max(len(norm) for norm in self.down_norm)
        tokens = dict(zip(self.names, self.tokens.tolist(), strict=True))
        warnings = [
            f"domain {name!r}: {count} tokens for {width} channels; {THIN_TOKENS_PER_CHANNEL * width} or more advised"
            for name, count in tokens.items()
            if count < THIN_TOKENS_PER_CHANNEL * width
        ]
        never = [int((peak.amax(0) == 0).sum()) for peak in self.peak]
        return {"tokens": tokens, "never_active_channels": never, "warnings": warnings}

    def save(self, path: Path) -> None:
        """One safetensors file."""
        tensors = {"tokens": self.tokens}
        for layer in range(len(self.magnitude)):
            for name in ("magnitude", "peak", "down_norm"):
                tensors[f"{name}.{layer}"] = getattr(self, name)[layer]
        save_tensors(path, tensors, {"names": "\n".join(self.names)})

    @classmethod
    def load(cls, path: Path, names: Sequence[str]) -> "Profile":
        """Inverse of `save`."""
        tensors = load_tensors(path)
        layers = sum(name.startswith("magnitude.") for name in tensors)
        lists = {n: [tensors[f"{n}.{layer}"] for layer in range(layers)] for n in ("magnitude", "peak", "down_norm")}
        return cls(list(names), tokens=tensors["tokens"], **lists)


class _Accumulator:
    """Running sum and maximum of |a| of one domain, per layer; `valid` picks the tokens that count."""

    def __init__(self, widths: Sequence[int], device: torch.device) -> None:
        self.total = [torch.zeros(width, dtype=torch.float64, device=device) for width in widths]
        self.peak = [torch.zeros(width, device=device) for width in widths]
        self.tokens = 0
        self.valid: Tensor | None = None  # (N,) bool

    def add(self, activation: Tensor, layer: int) -> None:
        size = activation.detach().flatten(0, -2).abs().float()
        if self.valid is not None:
            size = size[self.valid]
        if len(size) == 0:
            return  # nothing but padding
        self.total[layer] += size.sum(0, dtype=torch.float64)
        self.peak[layer] = torch.maximum(self.peak[layer], size.amax(0))


def padded_inputs(model: nn.Module, ids_BS: Tensor, mask_BS: Tensor | None) -> dict[str, Any]:
    """Arguments of a forward in which every sequence counts its positions from its first real token.

    Without them a left-padded batch has shifted positions in models that embed them (GPT-2).
    """
    inputs: dict[str, Any] = {"input_ids": ids_BS, "attention_mask": mask_BS, "use_cache": False}
    if mask_BS is not None and "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = positions(ids_BS, mask_BS, 0)
    return inputs


@torch.no_grad()
def profile(
    model: PreTrainedModel,
    domains: Sequence[DomainTokens],
    *,
    tokens_per_domain: int = 65_536,
    length: int = 256,
    batch_size: int = 8,
    pad_token_id: int | None = None,
) -> Profile:
    """Run `model` over the training split of every domain and collect the statistics of `Profile`.

    Tokens equal to `pad_token_id` are masked from attention and excluded from every statistic.

    Raises MoesaicError if the model computes NaN or infinity, or a domain is shorter than one window.
    """
    if len({domain.name for domain in domains}) != len(domains):
        raise MoesaicError("two domains have the same name")
    sites = find_ffn_sites(model)
    device = model.device
    windows = {d.name: d.windows(length, max(1, tokens_per_domain // length), "train") for d in domains}
    batches = [(name, ids) for name, rows in windows.items() for ids in rows.split(batch_size)]
    sums = {name: _Accumulator([site.width for site in sites], device) for name in windows}
    was_training = model.training
    model.eval()
    for name, ids in track(batches, "profile", unit="batches"):
        current = sums[name]
        mask = torch.ones_like(ids) if pad_token_id is None else (ids != pad_token_id).long()
        current.valid = None if bool(mask.all()) else mask.flatten().bool().to(device)
        current.tokens += int(mask.sum())
        with capture_activations(model, sites, current.add):
            model(**padded_inputs(model, ids.to(device), mask.to(device)))
        if bad := [layer for layer, total in enumerate(current.total) if not bool(total.isfinite().all())]:
            raise MoesaicError(
                f"the FFN of layer {bad[0]} computes NaN or infinity on domain {name!r}; check the model's weights, "
                "and load it in float32"
            )
    model.train(was_training)
    down_norm = [get_ffn_weights(model, site).down.float().norm(dim=0).cpu() for site in sites]
    layers = range(len(sites))
    return Profile(
        names=list(windows),
        magnitude=[torch.stack([(s.total[i] / max(1, s.tokens)).float().cpu() for s in sums.values()]) for i in layers],
        peak=[torch.stack([s.peak[i].cpu() for s in sums.values()]) for i in layers],
        down_norm=down_norm,
        tokens=torch.tensor([s.tokens for s in sums.values()]),
    )
