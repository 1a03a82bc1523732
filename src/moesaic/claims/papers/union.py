"""Union of Experts (2503.02495): slices of a dense FFN as experts; what trains their router, and what sees ahead."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.claims.tiny_lm import TinyLM
    from moesaic.data.domain import Domain

EXPERTS, HIDDEN, STEPS = 4, 48, 350
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "weighted": ("union", {"k": 2}),
    "unweighted": ("top-k", {"k": 2, "weighting": "one"}),
    "released": ("union-data-selection", {"share": 0.5}),
}


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Held-out losses, leaks from later bytes, and the error of cutting a trained dense FFN; see `Run`."""
    from moesaic.claims import tiny_lm

    sizes = tiny_lm.Sizes()
    source = tiny_lm.ByteData.of(data, seed, batch=16, length=sizes.length)
    steps = tiny_lm.steps_of(STEPS, scale)
    dense = tiny_lm.build(sizes, None, experts=1, hidden=EXPERTS * HIDDEN, seed=seed)
    tiny_lm.train_lm(dense, source.ids, steps, f"union dense, seed {seed}")
    result = {"loss_dense": tiny_lm.evaluate(dense, source.held_out, scale)[0]}
    ids = source.held_out[0][:4]
    result["slice_error"] = slice_error(dense, ids)
    for name, (router, options) in VARIANTS.items():
        model = tiny_lm.build(sizes, router, experts=EXPERTS, hidden=HIDDEN, seed=seed, **options)
        tiny_lm.train_lm(model, source.ids, steps, f"union {name}, seed {seed}")
        result[f"loss_{name}"] = tiny_lm.evaluate(model, source.held_out, scale)[0]
        result[f"leak_{name}"] = leak(model, ids)
    result["weighted_minus_unweighted"] = result["loss_weighted"] - result["loss_unweighted"]
    return result


def slice_error(dense: "TinyLM", ids: "Tensor") -> float:
    """Largest change of any logit when each FFN is cut into slices that are all on."""
    import torch
    import torch.nn.functional as F

    from moesaic.experts.channel_blocks import FFNWeights
    from moesaic.experts.upcycle import slice_dense

    with torch.no_grad():
        before = dense(ids).logits
        whole = list(dense.pools)
        for layer, pool in enumerate(whole):
            gate, up = pool.bank.gate_up[0].chunk(2)  # type: ignore[index, union-attr]
            dense.pools[layer] = slice_dense(FFNWeights(up, pool.bank.down[0], gate), EXPERTS, F.silu)  # type: ignore[index, union-attr]
        after = dense(ids).logits
        for layer, pool in enumerate(whole):
            dense.pools[layer] = pool
    return float((after - before).abs().max())


def leak(model: "TinyLM", ids: "Tensor") -> float:
    """Largest change of any earlier logit, over all other last bytes that are tried."""
    import torch

    with torch.no_grad():
        before, worst = model(ids).logits[:, :-1], 0.0
        for shift in (1, 50, 100, 150, 200, 250):
            changed = ids.clone()
            changed[:, -1] = (changed[:, -1] + shift) % model.sizes.vocabulary
            worst = max(worst, float((model(changed).logits[:, :-1] - before).abs().max()))
    return worst


CLAIM = Claim(
    name="union",
    paper="Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer",
    arxiv="2503.02495",
    headline="A dense block, cut into slices that together equal it, can be routed like a mixture of experts, with "
    "lower perplexity at fewer FLOPs than other mixtures.",
    compares=f"a byte LM of 3 layers, width 48, FFN width {EXPERTS * HIDDEN} as {EXPERTS} slices, half of them active, "
    f"{STEPS} steps of 16 x 48 bytes: each token chooses two slices, with weights; the same without weights, so that "
    "the router gets no gradient; each slice chooses half of the sequence, without weights (the released code's "
    "style). Not compared with other mixtures: what is tried is whether cutting is exact, whether weights pay, and "
    "whether a later byte changes earlier outputs.",
    budgets="same parameters but for the routers', same active FLOPs of all sliced variants (half of the dense one's), "
    "tokens, batches and seeds.",
    measures={
        "slice_error": "largest logit change by cutting the trained dense model",
        "weighted_minus_unweighted": "loss, weighted minus unweighted token choice",
        "loss_dense": "loss, dense",
        "loss_weighted": "loss, weighted token choice",
        "loss_unweighted": "loss, unweighted token choice",
        "loss_released": "loss, released style (not autoregressive)",
        "leak_weighted": "earlier logits' change by the last byte, weighted token choice",
        "leak_unweighted": "earlier logits' change by the last byte, unweighted token choice",
        "leak_released": "earlier logits' change by the last byte, released style",
    },
    checks=(
        Check("slice_error", below=1e-4),
        Check("weighted_minus_unweighted", below=0.0),
        Check("leak_weighted", below=1e-4),
        Check("leak_released", above=0.01),
    ),
    files=("routing/union.py", "routing/policies.py", "experts/upcycle.py", "experts/bank.py"),
    minutes=0.6,
    run=run,
)
