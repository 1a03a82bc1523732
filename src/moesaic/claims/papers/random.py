"""THOR (2110.04260): experts drawn at random, made interchangeable by a consistency loss."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.claims.tiny_lm import TinyLM
    from moesaic.data.domain import Domain

EXPERTS, ALPHAS, STEPS, DROPOUT = 4, (0, 1, 5), 250, 0.1


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Divergence between expert paths and losses, per weight of the consistency loss; see `Run`."""
    from moesaic.claims import tiny_lm

    sizes = tiny_lm.Sizes(dropout=DROPOUT)
    source = tiny_lm.ByteData.of(data, seed, batch=16, length=sizes.length)
    steps, result = tiny_lm.steps_of(STEPS, scale), {}
    for alpha in ALPHAS:
        model = tiny_lm.build(sizes, "random", experts=EXPERTS, hidden=96, seed=seed, eval_draw="token")
        train_twice(model, source.ids, steps, alpha, f"random alpha {alpha}, seed {seed}")
        result[f"loss_{alpha}"], _ = tiny_lm.evaluate(model, source.held_out, scale)
        result[f"kl_{alpha}"], result[f"spread_{alpha}"] = paths(model, source.held_out)
    for alpha in (0, 5):  # one expert: the same loss is R-Drop
        model = tiny_lm.build(sizes, None, experts=1, hidden=96, seed=seed)
        train_twice(model, source.ids, steps, alpha, f"random one expert alpha {alpha}, seed {seed}")
        result[f"loss_one_{alpha}"], _ = tiny_lm.evaluate(model, source.held_out, scale)
    result["kl_1_over_0"] = result["kl_1"] / result["kl_0"]
    result["kl_5_over_1"] = result["kl_5"] / result["kl_1"]
    return result


def train_twice(model: "TinyLM", ids_of: Callable[[int], "Tensor"], steps: int, alpha: float, label: str) -> None:
    """CE1 + CE2 + alpha * consistency over two forwards with fresh draws and fresh dropout."""
    from moesaic.balance.router_losses import consistency_loss
    from moesaic.claims import tiny_lm

    def loss_of(step: int) -> "Tensor":
        ids = ids_of(step)
        first, second = model(ids, step=2 * step), model(ids, step=2 * step + 1)
        loss = tiny_lm.next_loss(first, ids) + tiny_lm.next_loss(second, ids)
        if not alpha:
            return loss
        valid = first.inputs[0].valid
        return loss + alpha * consistency_loss(first.logits.flatten(0, 1), second.logits.flatten(0, 1), valid)

    model.train()
    tiny_lm.fit(model, loss_of, steps, label)
    model.eval()


def paths(model: "TinyLM", held_out: Sequence["Tensor"]) -> tuple[float, float]:
    """Over the E paths "expert e in every layer": mean symmetric KL of neighbours, nats, and the range of losses."""
    import torch

    from moesaic.balance.router_losses import consistency_loss
    from moesaic.claims.tiny_lm import next_loss
    from moesaic.routing.policies import fixed

    ids = torch.cat([windows[:8] for windows in held_out])
    with torch.no_grad():
        outputs = [model(ids, [fixed(torch.full((ids.numel(),), e))] * model.sizes.layers) for e in range(EXPERTS)]
        losses = [float(next_loss(out, ids)) for out in outputs]
        logits = [out.logits.flatten(0, 1) for out in outputs]
        valid = outputs[0].inputs[0].valid
        kl = [2 * float(consistency_loss(logits[e], logits[e - 1], valid)) for e in range(EXPERTS)]
    return sum(kl) / EXPERTS, max(losses) - min(losses)


CLAIM = Claim(
    name="random",
    paper="THOR: Taming Sparsely Activated Transformer with Stochastic Experts",
    arxiv="2110.04260",
    headline="Experts drawn at random in every forward pass need no router; a loss that makes two draws agree couples "
    "them, and the result translates better than mixtures with a learned gate.",
    compares=f"a byte LM of 3 layers, width 48, {EXPERTS} experts of width 96, one drawn per layer and batch, {STEPS} "
    f"steps of 16 x 48 bytes, two passes each, dropout {DROPOUT}: consistency weight {', '.join(map(str, ALPHAS))}. "
    "Second baseline: one expert with the same loss (R-Drop). Only the divergence between paths decides; losses are "
    "reported, the paper's translation scores are out of reach here.",
    budgets="same active FLOPs, tokens, passes per step, batches and seeds; the one-expert baseline has a quarter of "
    "the FFN parameters.",
    measures={
        **{f"kl_{a}": f"symmetric KL between fixed paths, weight {a}" for a in ALPHAS},
        "kl_1_over_0": "ratio of these KLs, weight 1 over 0",
        "kl_5_over_1": "ratio of these KLs, weight 5 over 1",
        **{f"loss_{a}": f"loss with an expert drawn per token, weight {a}" for a in ALPHAS},
        **{f"spread_{a}": f"range of losses over fixed paths, weight {a}" for a in ALPHAS},
        "loss_one_0": "loss, one expert, weight 0",
        "loss_one_5": "loss, one expert, weight 5 (R-Drop)",
    },
    checks=(Check("kl_1_over_0", below=1.0), Check("kl_5_over_1", below=1.0)),
    files=("routing/random_experts.py", "routing/policies.py", "balance/router_losses.py"),
    minutes=0.9,
    run=run,
)
