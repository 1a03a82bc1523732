"""Demons in the Detail (2501.11873): counting the load over the global batch lets experts specialise by domain."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from moesaic.balance.load_balance import LoadBalance
    from moesaic.claims.tiny_lm import Output
    from moesaic.data.domain import Domain

DOMAINS, SYMBOLS, LENGTH, BATCH = 4, 24, 32, 16
EXPERTS, STEPS, WEIGHT = 8, 500, 0.1
SCOPES: tuple[Literal["micro", "global"], ...] = ("micro", "global")


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """How much experts tell about domains, load and held-out loss, per scope of the balance loss; see `Run`."""
    import torch

    from moesaic.balance.load_balance import LoadBalance
    from moesaic.claims import tiny_lm

    sizes = tiny_lm.Sizes(vocabulary=SYMBOLS, width=32, layers=2, length=LENGTH)
    draw = chains(seed)
    held_out, labels = draw(max(BATCH, round(512 * scale)), torch.Generator().manual_seed(10_000 + seed))
    result: dict[str, float] = {}
    for scope in SCOPES:
        model = tiny_lm.build(sizes, "top-k", experts=EXPERTS, hidden=16, seed=seed, k=2)
        balance, generator = LoadBalance(scope), torch.Generator().manual_seed(1_000 + seed)
        tiny_lm.train_lm(
            model,
            lambda step, g=generator: draw(BATCH, g)[0],  # type: ignore[misc]
            tiny_lm.steps_of(STEPS, scale),
            f"global-balance {scope}, seed {seed}",
            lambda out, b=balance: WEIGHT * accumulated(out, b),  # type: ignore[misc]
        )
        result[f"loss_{scope}"], (out,) = tiny_lm.evaluate(model, [held_out])
        result[f"mi_{scope}"], result[f"max_load_{scope}"] = specialisation(out, labels)
    result["mi_log2_ratio"] = log2_ratio(result["mi_global"], result["mi_micro"])
    return result


def log2_ratio(one: float, other: float) -> float:
    """In powers of two: a plain ratio's interval would be lopsided."""
    return math.log2(max(one, 1e-6) / max(other, 1e-6))


def chains(seed: int) -> "Callable[[int, Generator], tuple[Tensor, Tensor]]":
    """One sparse Markov chain a domain, all on the same symbols.

    Returns (count, generator) -> sequences (count, LENGTH), each of one domain, and their domains (count,).
    """
    import torch

    source = torch.Generator().manual_seed(seed)
    order = torch.rand(DOMAINS, SYMBOLS, SYMBOLS, generator=source).argsort(-1)
    shares = torch.tensor([0.6, 0.3, 0.1])

    def draw(count: int, generator: torch.Generator) -> "tuple[Tensor, Tensor]":
        domain = torch.arange(count) % DOMAINS
        sequence = [torch.randint(SYMBOLS, (count,), generator=generator)]
        for _ in range(LENGTH - 1):
            which = torch.multinomial(shares, count, replacement=True, generator=generator)
            sequence.append(order[domain, sequence[-1], which])
        return torch.stack(sequence, 1), domain

    return draw


def accumulated(out: "Output", balance: "LoadBalance") -> "Tensor":
    """The loss as gradient accumulation computes it: sequence by sequence, counts kept until the step's end."""
    import torch

    inp = out.inputs[0]
    losses = []
    for number in range(BATCH):
        rows = inp.seq == number
        losses.append(balance([plan.select(rows) for plan in out.plans], inp.valid[rows]))
    balance.reset()
    return torch.stack(losses).mean()


def specialisation(out: "Output", labels: "Tensor") -> tuple[float, float]:
    """Mean over layers of I(domain; expert), nats; and the largest load of all layers, 1 = even."""
    import torch

    from moesaic.balance.information import mutual_information
    from moesaic.balance.load_balance import expert_load

    domain = labels[out.inputs[0].seq, None]
    joint = [
        torch.bincount((domain * EXPERTS + plan.index).flatten(), minlength=DOMAINS * EXPERTS) for plan in out.plans
    ]
    information = [mutual_information(table.view(DOMAINS, EXPERTS), corrected=False) for table in joint]
    load = max(float(expert_load(plan.index, EXPERTS).max()) for plan in out.plans) * EXPERTS
    return sum(information) / len(information), load


CLAIM = Claim(
    name="global-balance",
    paper="Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized MoE Models",
    arxiv="2501.11873",
    headline="If the balance loss counts expert loads over the global batch instead of each micro-batch, experts may "
    "specialise by domain while the load stays even overall, and perplexity improves.",
    compares=f"an LM of 2 layers, width 32, {EXPERTS} experts of width 16, top-2, on {DOMAINS} sparse Markov chains on "
    f"the same {SYMBOLS} symbols, one chain per sequence of {LENGTH}; {STEPS} steps of {BATCH} micro-batches of one "
    f"sequence, balance weight {WEIGHT}: loads counted per micro-batch, or accumulated over the step. Losses are "
    "reported only.",
    budgets="same model, parameters, active FLOPs, tokens, batches, weight and seeds; only the counting differs.",
    measures={
        "mi_micro": "information of expert about domain, micro-batch",
        "mi_global": "information of expert about domain, global batch",
        "mi_log2_ratio": "ratio of these, global over micro, in powers of two",
        "max_load_micro": "largest global load, 1 = even, micro-batch",
        "max_load_global": "largest global load, 1 = even, global batch",
        "loss_micro": "loss, micro-batch",
        "loss_global": "loss, global batch",
    },
    checks=(Check("mi_log2_ratio", above=1.0), Check("max_load_global", below=1.5)),
    files=("balance/load_balance.py", "routing/top_k.py"),
    minutes=0.3,
    run=run,
    text=False,
)
