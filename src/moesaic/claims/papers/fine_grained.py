"""DeepSeekMoE (2401.06066): many thin experts and shared ones, at the parameters and FLOPs of few wide ones."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from moesaic.data.domain import Domain

SYMBOLS, FEATURES, WIDTH = 16, 16, 48
EXPERTS, K, HIDDEN, GRANULARITY, SHARED = 8, 2, 64, 4, 2
STEPS, BATCH, TEST = 500, 512, 8192


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Test error of three segmentations of the same experts on a compositional regression; see `Run`."""
    import torch

    from moesaic.routing.fine_grained import segment

    draw = task(seed)
    test = draw(max(64, round(TEST * scale)), torch.Generator().manual_seed(10_000 + seed))
    result: dict[str, float] = {}
    routed, routed_k = segment(EXPERTS, K, GRANULARITY, SHARED)
    shapes = {
        "gshard": (EXPERTS, K, HIDDEN, 0),
        "fine": (EXPERTS * GRANULARITY, K * GRANULARITY, HIDDEN // GRANULARITY, 0),
        "deepseek": (routed, routed_k, HIDDEN // GRANULARITY, SHARED),
    }
    for name, shape in shapes.items():
        model = train(shape, seed, draw, scale, f"fine-grained {name}, seed {seed}")
        result[f"mse_{name}"] = error(model, test)
        result[f"parameters_{name}"] = sum(p.numel() for p in model.parameters())
    model.pool.shared = None  # type: ignore[union-attr]
    result["mse_shared_off"] = error(model, test)
    result["deepseek_minus_gshard"] = result["mse_deepseek"] - result["mse_gshard"]
    result["shared_off_minus_on"] = result["mse_shared_off"] - result["mse_deepseek"]
    return result


def task(seed: int) -> "Callable[[int, Generator], tuple[Tensor, Tensor]]":
    """target = tanh(W_a x) + tanh(U_b x) + tanh(C x): two tables of knowledge, chosen apart, and one common map.

    Returns (count, generator) -> inputs (N, 2 * SYMBOLS + FEATURES) and targets (N, FEATURES).
    """
    import torch
    import torch.nn.functional as F

    source = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(SYMBOLS, FEATURES, FEATURES, generator=source) / FEATURES**0.5 for _ in range(2))
    common = torch.randn(FEATURES, FEATURES, generator=source) / FEATURES**0.5

    def draw(count: int, generator: torch.Generator) -> "tuple[Tensor, Tensor]":
        a, b = torch.randint(SYMBOLS, (2, count), generator=generator)
        x = torch.randn(count, FEATURES, generator=generator)
        target = (x @ common).tanh()
        for table, symbol in ((first, a), (second, b)):
            target = target + torch.einsum("nf,nfg->ng", x, table[symbol]).tanh()
        return torch.cat([F.one_hot(a, SYMBOLS), F.one_hot(b, SYMBOLS), x], -1), target

    return draw


def train(
    shape: tuple[int, int, int, int],
    seed: int,
    draw: "Callable[[int, Generator], tuple[Tensor, Tensor]]",
    scale: float,
    label: str,
) -> "nn.Module":
    """A linear map, one routed layer of shape (experts, k, width, shared experts) beside a residual, a linear map."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from moesaic.balance.load_balance import LoadBalance
    from moesaic.claims.tiny_lm import fit, steps_of
    from moesaic.experts.bank import FFNBank
    from moesaic.experts.pool import Pool
    from moesaic.routing.contract import RouteInput
    from moesaic.routing.family import build_router

    experts, k, hidden, shared = shape

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, FEATURES)
            self.pool = Pool(FFNBank(experts, WIDTH, hidden), shared=FFNBank(shared, WIDTH, hidden) if shared else None)
            for bank in (self.pool.bank, self.pool.shared):
                if bank is not None:
                    bank.reset(0.1)  # type: ignore[operator]
            self.router = build_router("fine-grained", WIDTH, experts, 1, k=k)

        def forward(self, x_ND: "Tensor") -> "tuple[Tensor, Tensor]":
            h_ND = self.first(x_ND)
            inp = RouteInput.of(torch.zeros(len(x_ND), 1, dtype=torch.long), h_ND)
            plan, _ = self.router.plan(inp)
            return self.last(h_ND + self.pool(h_ND, plan)), LoadBalance()([plan], inp.valid)

    torch.manual_seed(seed)
    model, generator = Net(), torch.Generator().manual_seed(1_000 + seed)

    def loss_of(step: int) -> "Tensor":
        x, target = draw(BATCH, generator)
        out, balance = model(x)
        return F.mse_loss(out, target) + 0.01 * balance

    fit(model, loss_of, steps_of(STEPS, scale), label)
    return model.eval()


def error(model: "nn.Module", test: "tuple[Tensor, Tensor]") -> float:
    """Mean squared error on held-out draws."""
    import torch

    with torch.no_grad():
        return float((model(test[0])[0] - test[1]).square().mean())


CLAIM = Claim(
    name="fine-grained",
    paper="DeepSeekMoE: Towards Ultimate Expert Specialization",
    arxiv="2401.06066",
    headline="Cutting every expert into thinner ones, using more of them at once, and setting some aside as shared "
    "for all tokens specialises experts: lower loss than GShard-style mixtures of the same size.",
    compares="a regression whose targets add two lookup-table maps, chosen independently, and one common map: "
    f"{EXPERTS} experts of width {HIDDEN}, top-{K} (GShard-style); {EXPERTS * GRANULARITY} of width "
    f"{HIDDEN // GRANULARITY}, top-{K * GRANULARITY}; {SHARED} shared and top-{K * GRANULARITY - SHARED} of "
    f"{EXPERTS * GRANULARITY - SHARED}. {STEPS} steps of {BATCH}, raw probabilities, balance loss 0.01. Text is too "
    "noisy for this difference at toy size.",
    budgets="same expert parameters, expert FLOPs per input, draws and seeds; the routers' sizes follow the number of "
    "experts (see parameters).",
    measures={
        "mse_gshard": "test error, GShard-style",
        "mse_fine": "test error, fine without shared",
        "mse_deepseek": "test error, fine and shared",
        "deepseek_minus_gshard": "test error, fine and shared minus GShard-style",
        "mse_shared_off": "test error with the shared experts switched off",
        "shared_off_minus_on": "what switching the shared experts off costs",
        "parameters_gshard": "parameters, GShard-style",
        "parameters_fine": "parameters, fine without shared",
        "parameters_deepseek": "parameters, fine and shared",
    },
    checks=(Check("deepseek_minus_gshard", below=0.0), Check("shared_off_minus_on", above=0.0)),
    files=("routing/fine_grained.py", "routing/policies.py", "experts/pool.py", "experts/bank.py"),
    minutes=0.3,
    run=run,
    text=False,
)
