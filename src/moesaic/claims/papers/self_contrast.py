"""SCMoE (2405.14507): lower-ranked experts give another distribution, and contrasting it a better answer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moesaic.data.domain import Domain
    from moesaic.models.routed import RoutedForCausalLM

PLUS, EQUALS, VOCABULARY = 10, 11, 12
SUMS, WIDTH, LAYERS, EXPERTS, K = 8, 48, 3, 6, 2
STEPS, BATCH, EVERY, STOP = 1600, 32, 20, 0.6
DEV, TEST = 256, 1024
BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
WEAK = "rank:2"


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """How far each rank's pass is from the usual one, and what contrasting with rank 2 does to answers; see `Run`."""
    import torch

    from moesaic.models.self_contrast import contrast, joint_logits, tune_beta

    model = trained(seed, scale)
    generator = torch.Generator().manual_seed(10_000)
    dev, test = (running_sums(max(8, round(n * scale)), generator) for n in (DEV, TEST))
    beta = tune_beta(model, [(dev, answers_only(dev))], BETAS, weak=WEAK).beta
    result, divergences = {"beta": beta}, []
    for k in range(1, EXPERTS + 1):
        strong, weak = joint_logits(model, test, weak=f"rank:{k}")
        p, q = strong[:, :-1].log_softmax(-1), weak[:, :-1].log_softmax(-1)
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
        result |= {f"kl_rank{k}": divergences[-1], f"accuracy_rank{k}": accuracy(weak, test)}
        if f"rank:{k}" == WEAK:
            result["accuracy_contrast"] = accuracy(contrast(strong, weak, beta, 0.1), test)
            result["accuracy_contrast_half"] = accuracy(contrast(strong, weak, 0.5, 0.1), test)
    result["kl_ratio"] = min(divergences[1:]) / max(divergences[0], 1e-9)
    result["accuracy_greedy"] = accuracy(strong, test)
    result["gain"] = result["accuracy_contrast"] - result["accuracy_greedy"]
    with torch.no_grad():
        result["joint_error"] = float((model(input_ids=test).logits - strong).abs().max())
    return result


def trained(seed: int, scale: float) -> "RoutedForCausalLM":
    """A small mixture, trained until it answers `STOP` of the held-out sums: one that is always right has no use."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moesaic.claims.tiny_lm import steps_of
    from moesaic.models.routed import attach_router
    from moesaic.progress import track

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = attach_router(
        LlamaForCausalLM(config),
        {"name": "top-k", "k": K},
        experts=EXPERTS,
        upcycle="scratch",
        hidden=WIDTH,
        losses={"load_balance": 0.01},
    )
    generator = torch.Generator().manual_seed(seed)
    probe = running_sums(64, torch.Generator().manual_seed(20_000))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in track(range(steps_of(STEPS, scale)), f"self-contrast, seed {seed}"):
        if step % EVERY == 0:
            with torch.no_grad():
                if accuracy(model.eval()(input_ids=probe).logits, probe) > STOP:
                    break
            model.train()
        ids = running_sums(BATCH, generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def running_sums(count: int, generator: "torch.Generator") -> "Tensor":
    """Sequences such as 3+4=7+5=2: a digit, then `SUMS` times plus, a digit, equals, the sum modulo ten."""
    import torch

    digits = torch.randint(10, (count, SUMS + 1), generator=generator)
    sums = digits.cumsum(1) % 10
    signs = torch.tensor([PLUS, EQUALS]).expand(count, SUMS, 2)
    steps = torch.stack([signs[..., 0], digits[:, 1:], signs[..., 1], sums[:, 1:]], -1)
    return torch.cat([digits[:, :1], steps.flatten(1)], 1)


def answers_only(ids_BS: "Tensor") -> "Tensor":
    """The sums as labels, -100 elsewhere."""
    labels = ids_BS.clone()
    labels[:, 1:][ids_BS[:, :-1] != EQUALS] = -100
    labels[:, 0] = -100
    return labels


def accuracy(logits_BSV: "Tensor", ids_BS: "Tensor") -> float:
    """Share of right sums under the true prefix."""
    labels = answers_only(ids_BS)[:, 1:]
    counts = labels != -100
    return float((logits_BSV[:, :-1].argmax(-1) == labels)[counts].float().mean())


RANKS = range(1, EXPERTS + 1)

CLAIM = Claim(
    name="self-contrast",
    paper="Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast",
    arxiv="2405.14507",
    headline="The experts a router ranks second and lower give another distribution than the usual pass, and decoding "
    "from the contrast of the two answers better than greedy decoding.",
    compares=f"Running sums modulo ten: {EXPERTS} experts, top-{K}, against itself with only the expert of rank k. "
    "Checked are the mechanics: rank 1 is close to the usual pass, every other rank is far. Whether the "
    "contrast answers better is reported, at the strength chosen on other sequences and at 0.5, not checked: experts "
    "this small do not stand in for each other, and their weak pass is no weaker reasoner.",
    budgets=f"no training for the method; the mixture is trained until it answers {STOP:.0%} (at most {STEPS} steps of "
    f"{BATCH}); {TEST} sequences under true prefixes.",
    measures={
        **{f"kl_rank{k}": f"KL of the rank-{k} pass from the usual one, nats" for k in RANKS},
        **{f"accuracy_rank{k}": f"right sums, rank-{k} pass alone" for k in RANKS},
        "kl_ratio": "smallest KL of ranks 2 and lower over that of rank 1",
        "joint_error": "largest difference of a logit between the joint and a single strong pass",
        "beta": "strength chosen on other sequences",
        "accuracy_greedy": "right sums, usual pass",
        "accuracy_contrast": "right sums, contrast with rank 2 at the chosen strength",
        "accuracy_contrast_half": "right sums, contrast with rank 2 at strength 0.5",
        "gain": "right sums, contrast at the chosen strength minus greedy",
    },
    checks=(Check("kl_ratio", above=5.0), Check("joint_error", below=1e-3)),
    files=("models/self_contrast.py", "models/routed.py", "routing/policies.py"),
    minutes=0.8,
    run=run,
    text=False,
)
