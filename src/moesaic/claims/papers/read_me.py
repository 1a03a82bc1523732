"""Read-ME (2410.19123): one small causal router over token ids, known before layer 0, finds the right expert."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.data.domain import Domain
    from moesaic.data.tokens import DomainTokens

KEEP, PROFILE_TOKENS, STEPS, BATCH, LENGTH, WINDOWS = 0.5, 4096, 60, 8, 128, 8


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Loss of the pocket model's experts under a trained, a domain-label, and a random router; see `Run`."""
    import torch

    from moesaic.claims.tiny_lm import fit, steps_of
    from moesaic.data.tokens import TokenBatches, tokenize_domains
    from moesaic.models.attach import attach
    from moesaic.models.loading import load_model, load_tokenizer
    from moesaic.pocket import pocket_path
    from moesaic.refactor.extract import extract
    from moesaic.refactor.pregate import OverlapTeacher, router_step
    from moesaic.refactor.profile import profile

    dense, tokenizer = load_model(str(pocket_path())), load_tokenizer(str(pocket_path()))
    dense.eval().requires_grad_(False)
    domains = tokenize_domains(data, tokenizer)
    tokens = max(LENGTH, round(PROFILE_TOKENS * scale))
    masks = extract(profile(dense, domains, tokens_per_domain=tokens, length=LENGTH), KEEP)
    torch.manual_seed(seed)
    moe = attach(dense, masks, [domain.name for domain in domains])
    assert moe.pregate is not None
    step = router_step(moe.pregate, OverlapTeacher(dense, masks))
    batches = TokenBatches(tuple(domains), BATCH, LENGTH, seed)
    label, steps = f"read-me router, seed {seed}", steps_of(STEPS, scale)
    fit(moe.pregate, lambda number: step(batches.batch(number))["router"], steps, label, lr=4e-3)
    losses = measure(dense, moe, domains, seed, scale)
    gap = losses["random"] - losses["oracle"]
    result = {f"loss_{name}": loss for name, loss in losses.items()}
    result["router_minus_oracle"] = losses["router"] - losses["oracle"]
    result["share_of_gap"] = (losses["random"] - losses["router"]) / gap
    result["random_minus_oracle"] = gap
    return result


def measure(dense: Any, moe: Any, domains: Sequence["DomainTokens"], seed: int, scale: float) -> dict[str, float]:
    """Held-out nats per token, every domain weighing the same."""
    import torch

    from moesaic.refactor.quality import window_losses

    generator, sums = torch.Generator().manual_seed(seed), dict.fromkeys(("dense", "router", "oracle", "random"), 0.0)
    with torch.inference_mode():
        for own, domain in enumerate(domains):
            ids = domain.windows(LENGTH, max(2, round(WINDOWS * scale)))
            random = torch.randint(len(domains), ids.shape, generator=generator)

            def loss(route: "Tensor | int | None", ids: "Tensor" = ids) -> float:
                logits = moe(input_ids=ids, use_cache=False, expert_index=route).logits
                return float(window_losses(logits, ids).mean())

            sums["dense"] += float(window_losses(dense(input_ids=ids, use_cache=False).logits, ids).mean())
            sums["router"] += loss(None)
            sums["oracle"] += loss(own)
            sums["random"] += loss(random)
    return {name: total / len(domains) for name, total in sums.items()}


CLAIM = Claim(
    name="read-me",
    paper="Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts",
    arxiv="2410.19123",
    headline="A dense model becomes a mixture of experts cut from its own FFNs, with one small causal router over "
    "token ids that decides for all layers before the first one runs, at little cost in quality.",
    compares=f"the packaged pocket model (6.95 M parameters), an expert per domain with {KEEP:g} of the FFN channels "
    f"from {PROFILE_TOKENS} tokens each, not healed: the pre-gate after {STEPS} steps of {BATCH} x {LENGTH} tokens; "
    "each token sent to its own domain's expert; each token sent to a random expert. Only the router is tried here; "
    "healing, and the comparison with a pruned dense model, are in docs/results.md.",
    budgets="same experts, active parameters and held-out windows; the seed decides the router's start, its batches "
    "and the random routes, the masks are the same in all seeds.",
    measures={
        "loss_dense": "loss, dense source",
        "loss_router": "loss, trained pre-gate",
        "loss_oracle": "loss, own domain's expert",
        "loss_random": "loss, random experts",
        "random_minus_oracle": "loss, random minus oracle",
        "router_minus_oracle": "loss, pre-gate minus oracle",
        "share_of_gap": "share of the gap from random to oracle that the pre-gate closes",
    },
    checks=(
        Check("random_minus_oracle", above=0.0),
        Check("share_of_gap", above=0.75),
        Check("router_minus_oracle", below=0.03),
    ),
    files=("refactor/extract.py", "refactor/profile.py", "refactor/pregate.py", "routing/pregate.py"),
    minutes=0.6,
    run=run,
)
