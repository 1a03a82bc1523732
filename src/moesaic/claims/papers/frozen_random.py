"""SMoE-Dropout (2303.01610): a frozen random router and a growing k give a model that improves with k."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from moesaic.claims.tiny_lm import ByteData, TinyLM
    from moesaic.data.domain import Domain

EXPERTS, K_MIN, STEPS = 8, 4, 400
KS = (4, 6, 8)


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Held-out loss at several k of the grown frozen router, a learned top-4 router, and the dense FFN; see `Run`."""
    from moesaic.balance.load_balance import LoadBalance
    from moesaic.claims import tiny_lm

    sizes = tiny_lm.Sizes()
    source = tiny_lm.ByteData.of(data, seed, batch=16, length=sizes.length)
    steps, balance = tiny_lm.steps_of(STEPS, scale), LoadBalance()
    common: dict[str, Any] = {"experts": EXPERTS, "hidden": 24, "seed": seed}
    grown = tiny_lm.build(sizes, "frozen-random", **common, k_min=K_MIN)
    tiny_lm.train_lm(grown, source.ids, steps, f"frozen-random grown, seed {seed}")
    learned = tiny_lm.build(sizes, "top-k", **common, k=K_MIN)
    tiny_lm.train_lm(
        learned,
        source.ids,
        steps,
        f"frozen-random learned, seed {seed}",
        lambda out: 0.01 * tiny_lm.balance_of(out, balance),
    )
    dense = tiny_lm.build(sizes, None, **common)
    tiny_lm.train_lm(dense, source.ids, steps, f"frozen-random dense, seed {seed}")

    result = {"loss_dense": tiny_lm.evaluate(dense, source.held_out, scale)[0]}
    for name, model in (("grown", grown), ("learned", learned)):
        losses = losses_at(model, source, scale)
        result |= {f"loss_{name}_{k}": loss for k, loss in zip(KS, losses, strict=True)}
        result[f"slope_{name}"] = losses[-1] - losses[0]
        result[f"worst_step_{name}"] = max(b - a for a, b in itertools.pairwise(losses))
    result["slope_difference"] = result["slope_grown"] - result["slope_learned"]
    return result


def losses_at(model: "TinyLM", source: "ByteData", scale: float) -> list[float]:
    """The held-out loss with each of `KS` experts."""
    from moesaic.claims.tiny_lm import evaluate
    from moesaic.routing.policies import TopK

    losses = []
    for k in KS:
        assert model.router is not None
        model.router.policy = TopK(k, "renorm")
        losses.append(evaluate(model, source.held_out, scale)[0])
    return losses


CLAIM = Claim(
    name="frozen-random",
    paper="SMoE-Dropout: Sparse MoE as the New Dropout",
    arxiv="2303.01610",
    headline="With a random router that is never trained and a number of active experts that grows during training, "
    "one model runs with any number of experts and gets better with each; with a learned router it does not.",
    compares=f"a byte LM of 3 layers, width 48, {EXPERTS} experts of width 24, {STEPS} steps of 16 x 48 bytes: frozen "
    f"router, k from {K_MIN} to {EXPERTS} and the last fifth of the steps at {EXPERTS}; learned top-{K_MIN} router "
    f"(balance loss 0.01); dense FFN. Losses with k = {', '.join(map(str, KS))} experts afterwards.",
    budgets="same parameters, tokens, batches and seeds; the grown model computes more in training (k rises from "
    f"{K_MIN} to {EXPERTS}), the dense one most.",
    measures={
        **{f"loss_grown_{k}": f"loss with k = {k}, frozen and grown" for k in KS},
        **{f"loss_learned_{k}": f"loss with k = {k}, learned top-{K_MIN}" for k in KS},
        "loss_dense": "loss, dense FFN",
        "slope_grown": f"loss at k = {EXPERTS} minus at {K_MIN}, frozen and grown",
        "slope_learned": f"loss at k = {EXPERTS} minus at {K_MIN}, learned",
        "slope_difference": "the first of these slopes minus the second",
        "worst_step_grown": "largest rise from one k to the next, frozen and grown",
        "worst_step_learned": "largest rise from one k to the next, learned",
    },
    checks=(
        Check("worst_step_grown", below=0.0),
        Check("slope_grown", below=0.0),
        Check("slope_learned", above=0.0),
        Check("slope_difference", below=0.0),
    ),
    files=("routing/frozen_random.py", "routing/scorers.py", "routing/policies.py"),
    minutes=0.7,
    run=run,
)
