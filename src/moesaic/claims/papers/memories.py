"""MoM (2502.13685): several memories, of which a router picks, recall more than one of the same width."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from moesaic.data.domain import Domain

KEYS, VALUES, PAIRS = 64, 16, 24
WIDTH, KEY_WIDTH, VALUE_WIDTH = 48, 8, 24
STEPS, BATCH, HELD_OUT = 500, 32, 512
BALANCE = 0.01

# name -> memories, slots, shared memory, key width
VARIANTS = {
    "single": (1, 1, False, KEY_WIDTH),
    "expanded": (1, 1, False, 3 * KEY_WIDTH),
    "top1": (4, 1, False, KEY_WIDTH),
    "top2": (4, 2, False, KEY_WIDTH),
    "top2_shared": (4, 2, True, KEY_WIDTH),
}


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Recall of each variant, trained alike, and how often a query meets its key's memories; see `Run`."""
    import torch

    from moesaic.claims import tiny_lm

    steps = tiny_lm.steps_of(STEPS, scale)
    held_out = episodes(max(8, round(HELD_OUT * scale)), torch.Generator().manual_seed(10_000))
    result: dict[str, float] = {}
    for name, (memories, k, shared, key_width) in VARIANTS.items():
        torch.manual_seed(seed)
        model = recaller(memories, k, shared, key_width)
        generator = torch.Generator().manual_seed(seed)

        def loss_of(step: int, model: "nn.Module" = model, generator: "torch.Generator" = generator) -> "Tensor":
            loss: Tensor = model.loss(*episodes(BATCH, generator))  # type: ignore[operator]
            return loss

        tiny_lm.fit(model, loss_of, steps, f"memories {name}, seed {seed}", lr=4e-3)
        result[f"recall_{name}"], overlap = model.recall(*held_out)  # type: ignore[operator]
        if memories > 1:
            result[f"overlap_{name}"] = overlap
    result["gain_top2_shared"] = result["recall_top2_shared"] - result["recall_single"]
    return result


def episodes(count: int, generator: "torch.Generator") -> tuple["Tensor", "Tensor", "Tensor"]:
    """Keys (B, 2P), what comes with them (B, 2P): a value, then the question, and the answers (B, P).

    P distinct keys with a random value each are written, then all are asked for in another order.
    """
    import torch

    keys = torch.rand(count, KEYS, generator=generator).argsort(-1)[:, :PAIRS]
    values = torch.randint(VALUES, (count, PAIRS), generator=generator)
    order = torch.rand(count, PAIRS, generator=generator).argsort(-1)
    question = torch.full_like(values, VALUES)
    asked = torch.cat([keys, keys.gather(1, order)], 1)
    return asked, torch.cat([values, question], 1), values.gather(1, order)


def recaller(memories: int, k: int, shared: bool, key_width: int) -> "nn.Module":
    """One layer of memories between an embedding and a classifier of values."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    from moesaic.balance.load_balance import LoadBalance
    from moesaic.experts.memories import MixtureOfMemories
    from moesaic.routing.contract import RouteInput, RoutePlan
    from moesaic.routing.top_k import TopKRouter

    class Recaller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values = nn.Embedding(KEYS, WIDTH), nn.Embedding(VALUES + 1, WIDTH)
            self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
            weighting = "renorm" if k > 1 else "probs"  # one renormalised weight is 1 and trains no router
            self.router = TopKRouter(WIDTH, memories, 1, k=k, weighting=weighting)  # type: ignore[arg-type]
            self.mixer = MixtureOfMemories(WIDTH, memories, k, shared, 1, key_width=key_width, value_width=VALUE_WIDTH)
            self.head = nn.Linear(WIDTH, VALUES)
            self.balance = LoadBalance()

        def forward(self, keys: Tensor, with_: Tensor) -> tuple[Tensor, RoutePlan, RouteInput]:
            x = self.norm(self.keys(keys) + self.values(with_))
            inp = RouteInput.of(keys, x)
            plan, _ = self.router.plan(inp)
            return self.head(x + self.mixer(x, plan)[0])[:, PAIRS:], plan, inp

        def loss(self, keys: Tensor, with_: Tensor, answers: Tensor) -> Tensor:
            logits, plan, inp = self(keys, with_)
            return F.cross_entropy(logits.flatten(0, 1), answers.flatten()) + BALANCE * self.balance([plan], inp.valid)

        @torch.no_grad()
        def recall(self, keys: Tensor, with_: Tensor, answers: Tensor) -> tuple[float, float]:
            """Share of right answers; share of a question's memories that its key was written to."""
            logits, plan, _ = self(keys, with_)
            index = plan.index.view(*keys.shape, k)
            written, asked = index[:, :PAIRS], index[:, PAIRS:]
            where = (keys[:, PAIRS:, None] == keys[:, None, :PAIRS]).int().argmax(-1)
            written = written.gather(1, where[..., None].expand(*where.shape, k))
            met = (asked[..., :, None] == written[..., None, :]).any(-1)
            return float((logits.argmax(-1) == answers).float().mean()), float(met.float().mean())

    return Recaller()


CLAIM = Claim(
    name="memories",
    paper="MoM: Linear Sequence Modeling with Mixture-of-Memories",
    arxiv="2502.13685",
    headline="A linear layer with several routed memories and a shared one recalls more than one with a single memory.",
    compares="Associative recall of 24 key-value pairs: 4 memories, top-2, and a shared one against one memory with "
    "keys of the same width. Also reported: top-1, top-2 without the shared one, and one memory with keys three times "
    "as wide (the state of two memories and the shared one). Nothing is concluded from the wide one: it may not have "
    "begun to learn by the end of the budget, and then recalls little.",
    budgets=f"{STEPS} steps of {BATCH} episodes for every variant; the same episodes; one layer of width {WIDTH}.",
    measures={
        **{f"recall_{name}": f"right answers, {name.replace('_', ' + ')}" for name in VARIANTS},
        **{
            f"overlap_{name}": f"share of a question's memories that its key was written to, {name.replace('_', ' + ')}"
            for name, variant in VARIANTS.items()
            if variant[0] > 1
        },
        "gain_top2_shared": "right answers, top2 + shared minus single",
    },
    checks=(Check("gain_top2_shared", above=0.0),),
    files=("experts/memories.py", "routing/policies.py", "balance/load_balance.py"),
    minutes=1.5,
    run=run,
    text=False,
)
