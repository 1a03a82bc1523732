"""Duo-LLM (2410.10846): what an oracle over big and small layers gains, and how much of it is chance."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.claims.tiny_lm import ByteData
    from moesaic.data.domain import Domain
    from moesaic.models.duo import DuoForCausalLM

LAYERS, BIG_WIDTH, SMALL_WIDTH, STEPS, ROUTER_STEPS, SEQUENCES = 4, 128, 8, 400, 150, 256
HALF = LAYERS // 2


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Losses of oracle, controls, fixed routes and a learned router on held-out bytes; see `Run`."""
    import torch

    from moesaic.analyze.oracle_routes import oracle_report, route_table, router_routes
    from moesaic.claims import tiny_lm

    steps = tiny_lm.steps_of(STEPS, scale)
    source = tiny_lm.ByteData.of(data, seed, batch=16, length=48, windows=SEQUENCES // len(data) + 1)
    ids = torch.cat(source.held_out)[: max(4, round(SEQUENCES * scale))]
    model = stage_one(seed, source, steps, f"duo, seed {seed}")
    second_source = tiny_lm.ByteData.of(data, seed + 1000, batch=16, length=48, windows=1)
    second = stage_one(seed + 1000, second_source, steps, f"duo second model, seed {seed}")
    table, other = route_table(model, ids), route_table(second, ids)
    learn(model, source, tiny_lm.steps_of(ROUTER_STEPS, scale), f"duo router, seed {seed}")
    report = oracle_report(table, other=other, router=router_routes(model, ids), seed=seed)
    result = {"loss_small": report.oracle[0], "loss_big": report.oracle[LAYERS], "oracle_any": report.oracle_any}
    for budget in range(1, LAYERS):
        result[f"oracle_{budget}"] = report.oracle[budget]
        result[f"control_{budget}"] = report.control[budget]
        result[f"fixed_{budget}"] = report.fixed[budget]
    moved, moved_fixed = report.transfer[HALF]
    return {
        **result,
        "transfer_half": moved,
        "transfer_fixed_half": moved_fixed,
        "router": report.router["loss"],
        "router_budget": report.router["budget"],
        "router_agreement": report.router["agreement"],
        "hopeless": report.hopeless or 0.0,
        "one_big_gain": report.oracle[1] - report.oracle[LAYERS],
        "half_against_ends": report.oracle[HALF] - min(report.oracle[1], report.oracle[LAYERS - 1]),
        "router_over_oracle": report.router["loss"] - report.oracle[HALF],
        "beyond_chance": report.oracle[HALF] - report.control[HALF],
        "transfer_gain": moved - moved_fixed,
    }


def stage_one(seed: int, source: "ByteData", steps: int, label: str) -> "DuoForCausalLM":
    """A byte model whose every token and layer drew big or small at every step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moesaic.claims import tiny_lm
    from moesaic.models.duo import attach_duo

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=BIG_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=None,
    )
    model = attach_duo(LlamaForCausalLM(config), small=SMALL_WIDTH)

    def loss_of(step: int) -> "Tensor":
        model.step, ids = step, source.ids(step)
        loss: Tensor = model(ids, labels=ids, use_cache=False).loss
        return loss

    model.train()
    tiny_lm.fit(model, loss_of, steps, label)
    return model.eval()


def learn(model: "DuoForCausalLM", source: "ByteData", steps: int, label: str) -> None:
    """Stage 3: only a router over big and small is trained, half of the layers its budget."""
    from moesaic.claims import tiny_lm

    router = model.train().learn_routes(budget=0.5)

    def loss_of(step: int) -> "Tensor":
        router.schedule(step, steps)
        ids = source.ids(step)
        loss: Tensor = model(ids, labels=ids, use_cache=False).loss
        return loss + model.losses(["budget"])["budget"]

    tiny_lm.fit(router, loss_of, steps, label, lr=1e-2)
    model.eval()


CLAIM = Claim(
    name="duo",
    paper="Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
    arxiv="2410.10846",
    headline="An oracle that gives each token one big layer and small ones elsewhere beats big layers everywhere, is "
    "best with about half of the layers big, and is far from what a learned router reaches.",
    compares=f"a byte LM of {LAYERS} layers, width 48, every layer with an FFN of {BIG_WIDTH} and of {SMALL_WIDTH}; "
    f"{STEPS} steps of 16 x 48 bytes with random choices; all {2**LAYERS} routes on {SEQUENCES} held-out sequences. "
    "Controls: deviations of each route shuffled among tokens of similar loss; routes chosen on this model but scored "
    "on one of another seed.",
    budgets="one model for all routes; the oracle reads the true next byte, so it is a bound and no method.",
    measures={
        "loss_small": "loss, small everywhere",
        "loss_big": "loss, big everywhere",
        "oracle_any": "loss, oracle over all routes",
        **{f"oracle_{b}": f"loss, oracle with {b} big" for b in range(1, LAYERS)},
        **{f"control_{b}": f"the same without information about the token, {b} big" for b in range(1, LAYERS)},
        **{f"fixed_{b}": f"loss, best single route with {b} big" for b in range(1, LAYERS)},
        "transfer_half": f"loss of the other model under this one's oracle routes, {HALF} big",
        "transfer_fixed_half": f"the other model's best single route, {HALF} big",
        "router": "loss, learned router",
        "router_budget": "big layers a token, learned router",
        "router_agreement": "share of layers in which router and oracle agree",
        "hopeless": "share of the hardest tenth of tokens that the oracle improves by less than a tenth",
        "one_big_gain": f"oracle with 1 big minus all {LAYERS} big",
        "half_against_ends": f"oracle with {HALF} big minus the better one of 1 and {LAYERS - 1}",
        "router_over_oracle": f"learned router minus oracle with {HALF} big",
        "beyond_chance": f"oracle minus control, {HALF} big: below 0 is information about tokens",
        "transfer_gain": "other model under this one's oracle routes minus its best single route: below 0 carries over",
    },
    checks=(
        Check("one_big_gain", below=0.0),
        Check("half_against_ends", below=0.0),
        Check("router_over_oracle", above=0.0),
    ),
    files=("models/duo.py", "analyze/oracle_routes.py", "routing/big_small.py", "routing/random_experts.py"),
    minutes=1.5,
    run=run,
)
