"""MoMa (2407.21770): experts in groups by modality, each expert choosing its tokens; causal students for decoding."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from moesaic.claims.tiny_lm import TinyLM
    from moesaic.data.domain import Domain

SYMBOLS, NEXT, BLOCK, LENGTH, BATCH, HIDDEN = 24, 4, 12, 48, 16, 24
STEPS, STUDENT_STEPS = 400, 200
GROUPS = {"dense": [1], "mixed": [4], "grouped": [2, 2]}


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Held-out loss of dense, mixed and grouped experts, and of causal students of the last; see `Run`."""
    import torch

    from moesaic.claims import tiny_lm

    sizes = tiny_lm.Sizes(vocabulary=2 * SYMBOLS, width=32, layers=2, length=LENGTH)
    draw = sequences(seed)
    held_out = draw(max(BATCH, round(512 * scale)), torch.Generator().manual_seed(10_000 + seed)).split(128)
    result: dict[str, float] = {}
    for name, groups in GROUPS.items():
        router = None if name == "dense" else "modality"
        options: dict[str, Any] = {} if router is None else {"groups": groups}
        model = tiny_lm.build(sizes, router, experts=sum(groups), hidden=HIDDEN, seed=seed, **options)
        generator = torch.Generator().manual_seed(1_000 + seed)
        modality = two_modalities if len(groups) == 2 else torch.zeros_like
        tiny_lm.train_lm(
            model,
            lambda step, g=generator: draw(BATCH, g),  # type: ignore[misc]
            tiny_lm.steps_of(STEPS, scale),
            f"modality {name}, seed {seed}",
            modality=lambda ids, of=modality: of(ids).flatten(),
        )
        result[f"loss_{name}"], _ = tiny_lm.evaluate(
            model, held_out, modality=lambda ids, of=modality: of(ids).flatten()
        )
    result["grouped_minus_mixed"] = result["loss_grouped"] - result["loss_mixed"]
    result["mixed_minus_dense"] = result["loss_mixed"] - result["loss_dense"]
    generator = torch.Generator().manual_seed(2_000 + seed)
    steps = tiny_lm.steps_of(STUDENT_STEPS, scale)
    return result | students(model, lambda step: draw(4 * BATCH, generator), steps, list(held_out), seed)


def two_modalities(ids: "Tensor") -> "Tensor":
    """0 for the lower half of the vocabulary, 1 for the upper."""
    return (ids >= SYMBOLS).long()


def sequences(seed: int) -> "Callable[[int, Generator], Tensor]":
    """(count, generator) -> (count, LENGTH) ids: blocks of the two modalities in turn, each its own Markov chain.

    A modality's chain goes on where its last block ended.
    """
    import torch

    source = torch.Generator().manual_seed(seed)
    order = torch.rand(2, SYMBOLS, SYMBOLS, generator=source).argsort(-1)

    def draw(count: int, generator: torch.Generator) -> "Tensor":
        last = torch.randint(SYMBOLS, (2, count), generator=generator)
        columns = []
        for position in range(LENGTH):
            kind = position // BLOCK % 2
            which = torch.randint(NEXT, (count,), generator=generator)
            last[kind] = order[kind, last[kind], which]
            columns.append(last[kind] + kind * SYMBOLS)
        return torch.stack(columns, 1)

    return draw


def students(
    model: "TinyLM", ids_of: "Callable[[int], Tensor]", steps: int, held_out: "list[Tensor]", seed: int
) -> dict[str, float]:
    """Train auxiliary routers on the frozen model's choices, calibrate them, and let them decide."""
    import torch

    from moesaic.claims.tiny_lm import evaluate, fit
    from moesaic.routing.modality import AuxiliaryRouter, ModalityRouter

    main, layers = model.router, model.sizes.layers
    assert isinstance(main, ModalityRouter)
    student = AuxiliaryRouter(main, model.sizes.width, layers)
    fields: dict[str, Any] = {"modality": lambda ids: two_modalities(ids).flatten()}

    def loss_of(step: int) -> "Tensor":
        ids = ids_of(step)
        with torch.no_grad():
            out = model(ids, modality=fields["modality"](ids))
        pairs = zip(out.plans, out.inputs, strict=True)
        return torch.stack([student.losses([plan], inp)["selection"] for plan, inp in pairs]).mean()

    fit([p for p in student.parameters() if p.requires_grad], loss_of, steps, f"modality students, seed {seed}")
    with torch.no_grad():
        ids = ids_of(steps)
        out = model(ids, modality=fields["modality"](ids))
        for layer, (plan, inp) in enumerate(zip(out.plans, out.inputs, strict=True)):
            student.calibrate(layer, student.plan(inp)[0].logits.sigmoid(), plan.used)  # type: ignore[union-attr]
        before, outputs = evaluate(model, held_out, **fields)
        pairs = [
            (plan.used, student.plan(inp)[0].used) for o in outputs for plan, inp in zip(o.plans, o.inputs, strict=True)
        ]
        model.router = student
        after, _ = evaluate(model, held_out, **fields)
    wanted, got = torch.cat([a.flatten() for a, _ in pairs]), torch.cat([b.flatten() for _, b in pairs])
    hits = float((wanted & got).sum())
    return {
        "loss_causal": after,
        "causal_gap": after - before,
        "precision": hits / max(1.0, float(got.sum())),
        "recall": hits / max(1.0, float(wanted.sum())),
    }


CLAIM = Claim(
    name="modality",
    paper="MoMa: Efficient Early-Fusion Pre-training with Mixture of Modality-Aware Experts",
    arxiv="2407.21770",
    headline="Experts split into a text and an image group, each choosing its tokens inside its modality, reach the "
    "same loss with fewer FLOPs than modality-blind experts, and both with fewer than a dense model.",
    compares=f"an LM of 2 layers, width 32, on sequences of {LENGTH}, in blocks of {BLOCK} from two Markov chains on "
    f"disjoint symbols with {NEXT} equally likely successors, {STEPS} steps of {BATCH}: one FFN of width {HIDDEN}; "
    "four of them, each choosing among all tokens; two for each modality. These losses see which tokens are chosen in "
    f"the whole batch; the causal gap is what auxiliary routers ({STUDENT_STEPS} steps), deciding token by token, "
    "cost. Successors of unequal likelihood were tried first (one seed): the dense model came near the best possible "
    "loss, and mixed experts did not beat it.",
    budgets="same active FLOPs (one FFN per token on average), tokens, batches and seeds; mixed and grouped have the "
    "same parameters, dense a quarter of the FFN's.",
    measures={
        "loss_dense": "loss, dense",
        "loss_mixed": "loss, four mixed experts",
        "loss_grouped": "loss, two and two grouped experts",
        "grouped_minus_mixed": "loss, grouped minus mixed",
        "mixed_minus_dense": "loss, mixed minus dense",
        "loss_causal": "loss, grouped, auxiliary routers decide",
        "causal_gap": "loss, auxiliary routers minus expert choice",
        "precision": "precision of the auxiliary choices",
        "recall": "recall of the auxiliary choices",
    },
    checks=(Check("grouped_minus_mixed", below=0.0), Check("mixed_minus_dense", below=0.0)),
    files=("routing/modality.py", "routing/policies.py"),
    minutes=0.3,
    run=run,
    text=False,
)
