"""Critical initialisation (2106.10165): where signals survive depth, and how fast their fluctuations grow."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moesaic.claims.claim import Check, Claim

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from moesaic.data.domain import Domain

WIDTH, DEPTH, NETS = 256, 50, 24
NARROW, DRAWS = 64, 4000


def run(seed: int, data: Sequence["Domain"], scale: float = 1.0) -> dict[str, float]:
    """Median kernel ratios over depth, and normalised fluctuations of ReLU networks; see `Run`."""
    import math

    import torch
    import torch.nn.functional as F

    from moesaic.models.critical_init import critical

    generator = torch.Generator().manual_seed(seed)
    gelu, relu = critical("gelu"), critical("relu")
    nets = max(4, round(NETS * scale))

    def ratio(act: Callable[["Tensor"], "Tensor"], weight: float, bias: float, start: float) -> float:
        kernels = kernel_of(act, weight, bias, start, generator, nets, WIDTH, DEPTH)
        return math.log10(float((kernels[DEPTH - 1] / kernels[0]).median().clamp_min(1e-30)))

    start = gelu.K_star or 1.0
    result = {
        "gelu_critical": ratio(F.gelu, gelu.C_W, gelu.C_b, start),
        "gelu_he": ratio(F.gelu, 2.0, 0.0, start),
        "gelu_high": ratio(F.gelu, 1.1 * gelu.C_W, gelu.C_b, start),
        "gelu_low": ratio(F.gelu, 0.9 * gelu.C_W, gelu.C_b, start),
        "relu_critical": ratio(F.relu, relu.C_W, relu.C_b, 1.0),
        "relu_high": ratio(F.relu, 1.1 * relu.C_W, 0.0, 1.0),
        "relu_low": ratio(F.relu, 0.9 * relu.C_W, 0.0, 1.0),
        "relu_default": ratio(F.relu, 1 / 3, 1 / (3 * WIDTH), 1.0),
    }
    draws = max(200, round(DRAWS * scale))
    for layer in (2, 4):
        value = fluctuation(F.relu, relu.C_W, layer, generator, draws)
        result[f"relu_fluctuation_{layer}"] = value
        result[f"relu_fluctuation_error_{layer}"] = abs(value / (5 * (layer - 1)) - 1)
    result["gelu_off"] = abs(result["gelu_critical"])
    result["relu_off"] = abs(result["relu_critical"])
    return result


def kernel_of(
    act: Callable[["Tensor"], "Tensor"],
    weight: float,
    bias: float,
    start: float,
    generator: "Generator",
    nets: int,
    width: int,
    depth: int,
) -> list["Tensor"]:
    """The mean square of each layer's pre-activations, (nets,) a layer, for networks drawn one by one."""
    import torch

    made = []
    for _ in range(nets):
        z = torch.randn(width, generator=generator) * start**0.5
        kernels = []
        for _ in range(depth):
            kernels.append(z.square().mean())
            matrix = torch.randn(width, width, generator=generator) * (weight / width) ** 0.5
            z = matrix @ act(z) + torch.randn(width, generator=generator) * bias**0.5
        made.append(torch.stack(kernels))
    return list(torch.stack(made).T)


def fluctuation(
    act: Callable[["Tensor"], "Tensor"], weight: float, layer: int, generator: "Generator", draws: int
) -> float:
    """V / K^2 = n Cov(z_i^2, z_j^2) / K^2 over networks, i != j, in layer `layer` = 1, 2, ...; theory: 5 (layer - 1).

    The mean over pairs is (E[(sum z^2)^2] - E[sum z^4]) / n(n - 1).
    """
    import torch

    squares = []
    x = torch.ones(NARROW)
    for _ in range(draws):
        z = x
        for number in range(layer):
            matrix = torch.randn(NARROW, NARROW, generator=generator) * NARROW**-0.5
            z = matrix @ z if number == 0 else weight**0.5 * (matrix @ act(z))
        squares.append(z.square())
    square = torch.stack(squares).double()
    pairs = (square.sum(1).square() - square.square().sum(1)).mean() / (NARROW * (NARROW - 1))
    kernel = square.mean()
    return float(NARROW * (pairs - kernel**2) / kernel**2)


CLAIM = Claim(
    name="critical-init",
    paper="The Principles of Deep Learning Theory",
    arxiv="2106.10165",
    headline="Each activation has one bias and weight variance at which signals neither die nor explode with depth; at "
    "finite width their fluctuations grow in proportion to depth over width.",
    compares=f"plain networks of width {WIDTH} and {DEPTH} layers, median over {NETS} of the mean square of the last "
    "layer's pre-activations over the first's: critical constants from the solver, 10 % more or less weight variance, "
    f"He's constants with GELU, and torch's default. Fluctuations: {DRAWS} ReLU networks of width {NARROW}, "
    "n Cov(z_i^2, z_j^2) / K^2 against 5 (l - 1).",
    budgets="nothing is trained; networks of one width and depth, differing in two variances only.",
    measures={
        "gelu_critical": "log10 of the kernel's growth; GELU, critical",
        "gelu_high": "GELU, 10 % more weight variance",
        "gelu_low": "GELU, 10 % less weight variance",
        "gelu_he": "GELU, He's C_W = 2 and no bias",
        "relu_critical": "log10 of the kernel's growth; ReLU, critical",
        "relu_high": "ReLU, 10 % more weight variance",
        "relu_low": "ReLU, 10 % less weight variance",
        "relu_default": "ReLU, torch.nn.Linear's default",
        **{f"relu_fluctuation_{layer}": f"V / K^2 in layer {layer}" for layer in (2, 4)},
        **{f"relu_fluctuation_error_{layer}": f"its relative error in layer {layer}" for layer in (2, 4)},
        "gelu_off": "GELU, critical, without its sign",
        "relu_off": "ReLU, critical, without its sign",
    },
    checks=(
        Check("gelu_off", below=0.5),
        Check("relu_off", below=0.5),
        Check("gelu_high", above=1.0),
        Check("gelu_low", below=-0.5),
        Check("gelu_he", below=-1.0),
        Check("relu_high", above=1.0),
        Check("relu_low", below=-1.0),
        Check("relu_fluctuation_error_2", below=0.2),
        Check("relu_fluctuation_error_4", below=0.35),
    ),
    files=("models/critical_init.py",),
    minutes=1.0,
    run=run,
    text=False,
)
