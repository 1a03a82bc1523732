"""RMoE (2408.06793): a router that is recurrent over layers gives gates that know more about each other."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.data.domain import Domain

EXPERTS, STATE, STEPS, BINS = 8, 16, 400, 16
VARIANTS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "linear": ("top-k", True, {"k": 2}),
    "gru": ("recurrent", True, {"k": 2, "state_width": STATE}),
    "no_passing": ("recurrent", False, {"k": 2, "state_width": STATE}),
}


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Mutual information of adjacent layers' gates and held-out loss of each router; see `Run`."""
    from moesaic.balance.load_balance import LoadBalance
    from moesaic.claims import tiny_lm

    sizes = tiny_lm.Sizes(layers=5)
    source = tiny_lm.ByteData.of(data, seed, batch=12, length=sizes.length)
    balance, result = LoadBalance(), {}
    for name, (router, carry, options) in VARIANTS.items():
        model = tiny_lm.build(sizes, router, experts=EXPERTS, hidden=48, seed=seed, carry=carry, **options)
        tiny_lm.train_lm(
            model,
            source.ids,
            tiny_lm.steps_of(STEPS, scale),
            f"recurrent {name}, seed {seed}",
            lambda out: 0.01 * tiny_lm.balance_of(out, balance),
        )
        result[f"loss_{name}"], outputs = tiny_lm.evaluate(model, source.held_out, scale)
        result[f"mi_{name}"] = adjacent_information([[plan.scores for plan in out.plans] for out in outputs])
    result["mi_over_linear"] = result["mi_gru"] - result["mi_linear"]
    result["mi_over_no_passing"] = result["mi_gru"] - result["mi_no_passing"]
    return result


def adjacent_information(parts: Sequence[Sequence["Tensor | None"]]) -> float:
    """Mean mutual information, nats, of the gate probabilities of adjacent layers.

    parts:  per batch, the (N, E) probabilities of each layer. Values are binned by rank into equally full bins: gates
            stay near uniform for long, and bins of equal width would hold everything in one.
    """
    import torch

    from moesaic.balance.information import mutual_information

    layers = [torch.cat([part[layer].flatten() for part in parts]) for layer in range(len(parts[0]))]  # type: ignore[union-attr]
    bins = [values.argsort().argsort() * BINS // len(values) for values in layers]
    joint = [torch.bincount(a * BINS + b, minlength=BINS**2) for a, b in itertools.pairwise(bins)]
    return sum(mutual_information(table.view(BINS, BINS), corrected=False) for table in joint) / len(joint)


CLAIM = Claim(
    name="recurrent",
    paper="RMoE: Layerwise Recurrent Router for Mixture-of-Experts",
    arxiv="2408.06793",
    headline="A recurrent cell over layers, shared by all routers, lets each layer's router know what the earlier ones "
    "chose; gates of neighbouring layers share far more information than with linear routers, at slightly lower "
    "perplexity.",
    compares=f"a byte LM of 5 layers, width 48, {EXPERTS} experts, top-2, {STEPS} steps of 12 x 48 bytes: linear "
    f"router; GRU over layers (state {STATE}); the same cell started anew in every layer. Mutual information of "
    f"adjacent layers' gate probabilities in {BINS} equally full bins; losses are reported only, the paper itself "
    "sees no gain at its smallest size.",
    budgets="same experts, active FLOPs of the FFNs, tokens, batches and seeds; the recurrent routers have about 4,200 "
    "parameters more.",
    measures={
        "mi_linear": "mutual information, linear router",
        "mi_no_passing": "mutual information, cell without passing",
        "mi_gru": "mutual information, GRU over layers",
        "mi_over_linear": "mutual information, GRU minus linear",
        "mi_over_no_passing": "mutual information, GRU minus no passing",
        "loss_linear": "loss, linear router",
        "loss_no_passing": "loss, cell without passing",
        "loss_gru": "loss, GRU over layers",
    },
    checks=(Check("mi_over_linear", above=0.0), Check("mi_over_no_passing", above=0.0)),
    files=("routing/recurrent.py", "routing/scorers.py", "routing/policies.py"),
    minutes=0.7,
    run=run,
)
