"""Without domain labels: group sequences by their activation signature and treat each group as a domain."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.data.tokens import DomainTokens
from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.models.ffn_sites import capture_activations, find_ffn_sites
from moesaic.progress import track


@torch.no_grad()
def signatures(
    model: PreTrainedModel, windows: Tensor, *, width: int = 64, batch_size: int = 8, seed: int = 0
) -> Tensor:
    """(n, layers * width) float32: each sequence's mean |a| per channel, log-scaled and randomly projected per layer.

    The projection (Johnson-Lindenstrauss) keeps distances while memory stays `layers * width` numbers a sequence.
    """
    sites = find_ffn_sites(model)
    generator = torch.Generator().manual_seed(seed)
    projections = [torch.randn(site.width, width, generator=generator) / width**0.5 for site in sites]
    rows = []
    for ids in track(windows.split(batch_size), "signatures", unit="batches"):
        parts: list[Tensor] = [torch.empty(0)] * len(sites)

        def record(activation: Tensor, layer: int, parts: list[Tensor] = parts, rows_in_batch: int = len(ids)) -> None:
            size_BSW = activation.abs().float().view(rows_in_batch, -1, activation.shape[-1])  # OPT flattens B and S
            mean = size_BSW.mean(1).cpu()
            mean = (mean / mean.mean(1, keepdim=True).clamp_min(1e-12)).add(1e-3).log()
            parts[layer] = mean @ projections[layer]

        with capture_activations(model, sites, record):
            model(input_ids=ids.to(model.device), use_cache=False)
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def cluster_domains(
    model: PreTrainedModel,
    domains: Sequence[DomainTokens],
    experts: int,
    *,
    length: int = 256,
    windows_per_domain: int = 256,
    seed: int = 0,
) -> list[DomainTokens]:
    """Regroup the windows of `domains` (labels ignored) into `experts` clusters by k-means on their signatures.

    Raises MoesaicError if there are fewer sequences than clusters, or a cluster stays without a validation window.
    """
    try:
        from scipy.cluster.vq import kmeans2, vq
    except ImportError:
        raise MissingExtraError("scipy", "train") from None
    train = torch.cat([d.windows(length, windows_per_domain, "train") for d in domains])
    held_out = torch.cat([d.windows(length, max(1, windows_per_domain // 4)) for d in domains])
    if experts < 2 or experts * 2 > len(train):
        raise MoesaicError(
            f"{experts} experts cannot be filled from {len(train)} sequences of {length} tokens; use between 2 and "
            f"{len(train) // 2}, or give more text"
        )
    points = signatures(model, train, seed=seed).double().numpy()
    others = signatures(model, held_out, seed=seed).double().numpy()
    centre, spread = points.mean(0), points.std(0) + 1e-9
    centroids, labels = kmeans2((points - centre) / spread, experts, minit="++", rng=np.random.default_rng(seed))
    held_labels, _ = vq((others - centre) / spread, centroids)
    bytes_per_token = float(np.mean([d.bytes_per_token for d in domains]))
    result = []
    for cluster in range(experts):
        inside, outside = train[torch.from_numpy(labels == cluster)], held_out[torch.from_numpy(held_labels == cluster)]
        if len(inside) < 2 or len(outside) < 1:
            raise MoesaicError(
                f"cluster {cluster} got {len(inside)} training and {len(outside)} validation sequences; "
                f"use fewer experts than {experts}, or give more text"
            )
        flat = [rows.flatten().numpy().astype(np.int32) for rows in (inside, outside)]
        result.append(DomainTokens(f"cluster-{cluster}", flat[0], flat[1], bytes_per_token))
    return result
