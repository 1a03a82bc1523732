"""MoE++ (2410.07348): experts that cost nothing let easy tokens spend fewer FFNs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from moesaic.claims.tiny_lm import Output
    from moesaic.data.domain import Domain

FFN, FREE, STEPS = 8, 4, 250
VARIANTS = {"tau75": (0.75, False), "tau25": (0.25, False), "residual": (0.75, True)}


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """FFNs per token and held-out loss with free experts, against a plain mixture; see `Run`."""
    from moesaic.balance.load_balance import LoadBalance
    from moesaic.claims import tiny_lm
    from moesaic.experts.free import free_experts
    from moesaic.experts.pool import Pool
    from moesaic.routing.zero_computation import heterogeneous_eta

    sizes = tiny_lm.Sizes()
    source = tiny_lm.ByteData.of(data, seed, batch=12, length=sizes.length)
    steps, result = tiny_lm.steps_of(STEPS, scale), {}

    def measure(name: str, model: tiny_lm.TinyLM, balance: LoadBalance) -> None:
        label = f"zero-computation {name}, seed {seed}"
        tiny_lm.train_lm(model, source.ids, steps, label, lambda out: 0.01 * tiny_lm.balance_of(out, balance))
        result[f"loss_{name}"], outputs = tiny_lm.evaluate(model, source.held_out, scale)
        result[f"ffns_{name}"] = ffns_per_token(outputs)

    common: dict[str, Any] = {"hidden": 48, "seed": seed, "experts": FFN}
    measure("plain", tiny_lm.build(sizes, "fine-grained", **common, k=2), LoadBalance())
    for name, (tau, residual) in VARIANTS.items():
        model = tiny_lm.build(
            sizes,
            "zero-computation",
            **common,
            pool=lambda bank: Pool(bank, free=free_experts(sizes.width, FFN, constant=FREE - 2)),
            gating_residual=residual,
        )
        measure(name, model, LoadBalance(eta=heterogeneous_eta(FFN, FREE, tau)))
        result[f"over_plain_{name}"] = result[f"loss_{name}"] - result["loss_plain"]
    result["fewer_at_tau25"] = result["ffns_tau75"] - result["ffns_tau25"]
    del result["ffns_plain"]  # two, always
    return result


def ffns_per_token(outputs: Sequence["Output"]) -> float:
    """Mean number of real FFNs over layers and tokens."""
    used = [float(((plan.index >= 0) & (plan.index < FFN)).sum(-1).float().mean()) for o in outputs for plan in o.plans]
    return sum(used) / len(used)


CLAIM = Claim(
    name="zero-computation",
    paper="MoE++: Accelerating Mixture-of-Experts with Zero-Computation Experts",
    arxiv="2410.07348",
    headline="Adding experts that return zero, a copy or a learned constant lets tokens spend zero, one or two real "
    "FFNs: faster experts at equal or better quality, and a weight tau that trades one for the other.",
    compares=f"a byte LM of 3 layers, width 48, top-2, {STEPS} steps of 12 x 48 bytes: {FFN} FFNs of width 48; these "
    f"with {FREE} free experts (zero, copy, two constants) and tau 0.75 or 0.25 in the balance loss (0.01, in the "
    "Switch form with factor E); tau 0.75 with gating residuals, reported only: the paper's own gain from them is 0.2 "
    "points.",
    budgets="same FFN parameters, tokens, batches and seeds; free experts and their router rows add under 2 % "
    "parameters, and active FLOPs are fewer, which is the point (plain: 2 FFNs per token).",
    measures={
        "ffns_tau75": "FFNs per token, tau 0.75",
        "ffns_tau25": "FFNs per token, tau 0.25",
        "ffns_residual": "FFNs per token, tau 0.75 with gating residuals",
        "fewer_at_tau25": "FFNs per token, tau 0.75 minus tau 0.25",
        "over_plain_tau75": "loss minus plain's, tau 0.75",
        "over_plain_tau25": "loss minus plain's, tau 0.25",
        "over_plain_residual": "loss minus plain's, tau 0.75 with gating residuals",
        "loss_plain": "loss, plain top-2",
        "loss_tau75": "loss, tau 0.75",
        "loss_tau25": "loss, tau 0.25",
        "loss_residual": "loss, tau 0.75 with gating residuals",
    },
    checks=(
        Check("ffns_tau75", below=2.0),
        Check("fewer_at_tau25", above=0.0),
        Check("over_plain_tau75", below=0.03),
    ),
    files=("routing/zero_computation.py", "experts/free.py", "experts/pool.py", "balance/load_balance.py"),
    minutes=0.5,
    run=run,
)
