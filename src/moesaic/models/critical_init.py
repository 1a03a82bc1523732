"""Critical initialisation: weights and biases for which signals neither die nor explode with depth (2106.10165).

A plain network z' = b + W act(z), with E b^2 = C_b and E W_ij^2 = C_W / fan_in, maps the kernel K = E z^2 to
C_b + C_W <act(z)^2>_K, where <.>_K averages over z ~ N(0, K). Two growth rates must be one (ch. 5):
chi_par = C_W d<act^2>_K/dK (of a change of the kernel) and chi_perp = C_W <act'^2>_K (of the distance of two inputs).
Where they meet depends on the activation alone. Attention, norms, residuals and gates are outside this theory; there
only what is measured counts: `initialisation_report`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from moesaic.errors import MoesaicError
from moesaic.experts.bank import FFN, FFNBank, ModuleBank
from moesaic.experts.pool import Pool
from moesaic.models.ffn_sites import decoder_layers
from moesaic.routing.contract import Router

Activation = Callable[[Tensor], Tensor]
Kind = Literal["scale-invariant", "half-stable", "zero"]

SCAN = (1e-2, 1e3)  # kernels searched for K*: every activation looks linear below and like a ReLU above
REACH, POINTS = 12.0, 400_001  # of the quadrature, in standard deviations; fine enough for kinks


@dataclass(frozen=True)
class Critical:
    """Variances of bias and weight (times fan-in) at criticality, and the kernel they hold.

    K_star:  None when every kernel is held (scale-invariant); 0 when K falls like 1/l ("zero", as tanh).
    kind:    "half-stable": kernels below K_star are drawn to it, kernels above run away slowly (GELU, SiLU).
    """

    C_b: float
    C_W: float
    K_star: float | None
    kind: Kind


# -- the solver -------------------------------------------------------------------------------------------------------


def critical(activation: str | Activation) -> Critical:
    """The critical point of an elementwise activation, given as a function or by its transformers name.

    Raises MoesaicError if there is none (softplus, sigmoid), or the name or function cannot be used.
    """
    act, name = _activation(activation)
    if (slopes := _scale_invariant(act)) is not None:
        return Critical(0.0, 2 / (slopes[0] ** 2 + slopes[1] ** 2), None, "scale-invariant")
    for low, high in _brackets(act):
        kernel = _bisect(lambda K: _mismatch(act, K), low, high)
        weight = 1 / _averages(act, kernel)[2]
        bias = kernel - weight * _averages(act, kernel)[0]
        if bias >= 0:
            return Critical(bias, weight, kernel, "half-stable")
    value, first, second, third = _derivatives_at_zero(act)
    if abs(value) < 1e-12 and abs(first) > 1e-12 and third / first + 0.75 * (second / first) ** 2 < 0:
        return Critical(0.0, 1 / first**2, 0.0, "zero")
    raise MoesaicError(
        f"{name} has no critical point: no bias and weight variance keeps its signals alive at every depth; use GELU, "
        "SiLU, tanh or ReLU, or a normalisation after every layer"
    )


def _activation(activation: str | Activation) -> tuple[Activation, str]:
    if not isinstance(activation, str):
        return activation, getattr(activation, "__name__", type(activation).__name__)
    if activation not in ACT2FN:
        raise MoesaicError(f"unknown activation {activation!r}: expected one of {', '.join(sorted(ACT2FN))}")
    function: Activation = ACT2FN[activation]
    return function, activation


def _scale_invariant(act: Activation) -> tuple[float, float] | None:
    """The slopes right and left of zero if that is all there is to `act` (ReLU, leaky ReLU, identity)."""
    z = torch.logspace(-6, 3, 19, dtype=torch.float64)
    right, left = act(z) / z, act(-z) / -z
    if torch.allclose(right, right[:1], rtol=1e-9) and torch.allclose(left, left[:1], rtol=1e-9):
        return float(right[0]), float(left[0])
    return None


def _averages(act: Activation, kernel: float, points: int = POINTS) -> tuple[float, float, float]:
    """<act^2>, d<act^2>/dK = <act^2 (z^2 - K)> / 2K^2 and <act'^2> at the kernel, by the trapezoid rule."""
    unit = torch.linspace(-REACH, REACH, points, dtype=torch.float64)
    weight = (-unit.square() / 2).exp()
    weight = weight / weight.sum()
    z = (unit * kernel**0.5).requires_grad_()
    value = act(z)
    if value.shape != z.shape:
        raise MoesaicError(
            f"an activation maps (N,) to (N,), this one gives {tuple(value.shape)}: it is not elementwise"
        )
    (slope,) = torch.autograd.grad(value.sum(), z)
    square = value.detach().square()
    growth = (weight * square * (unit.square() - 1)).sum() / (2 * kernel)
    return float((weight * square).sum()), float(growth), float((weight * slope.square()).sum())


def _mismatch(act: Activation, kernel: float, points: int = POINTS) -> float:
    """chi_par - chi_perp, up to the factor C_W."""
    _, parallel, perpendicular = _averages(act, kernel, points)
    return parallel - perpendicular


def _brackets(act: Activation, steps: int = 120) -> Iterator[tuple[float, float]]:
    """Neighbouring kernels between which the mismatch changes sign by more than rounding, smallest first."""
    kernels = torch.logspace(math.log10(SCAN[0]), math.log10(SCAN[1]), steps, dtype=torch.float64).tolist()
    values = [_mismatch(act, kernel, 8001) for kernel in kernels]
    for (low, before), (high, after) in zip(
        zip(kernels[:-1], values[:-1], strict=True), zip(kernels[1:], values[1:], strict=True), strict=True
    ):
        if before * after < 0 and min(abs(before), abs(after)) > 1e-12:
            yield low, high


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """A zero of `function` between two points of opposite sign: secant steps, kept inside the bracket (Illinois)."""
    at_low, at_high = function(low), function(high)
    for _ in range(60):
        middle = high - at_high * (high - low) / (at_high - at_low)
        value = function(middle)
        if abs(value) < 1e-15 or abs(high - low) < 1e-13 * high:
            return middle
        if value * at_high < 0:
            low, at_low = high, at_high
        else:
            at_low /= 2
        high, at_high = middle, value
    return high


def _derivatives_at_zero(act: Activation) -> tuple[float, float, float, float]:
    """act(0) and its first three derivatives there."""
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value, results = act(zero), []
    for _ in range(4):
        results.append(float(value.detach()))
        if not value.requires_grad:
            break
        (value,) = torch.autograd.grad(value, zero, create_graph=True, allow_unused=True, materialize_grads=True)
    first = results + [0.0] * (4 - len(results))
    return first[0], first[1], first[2], first[3]


# -- initialisers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise_(module: nn.Module, point: Critical, generator: torch.Generator | None = None) -> nn.Module:
    """Draw the weights of new experts (FFNBank, FFN, ModuleBank, Pool), a router or a linear at the critical point.

    Plain FFNs and linears: weight variance C_W / fan_in, bias variance C_b. A router's last map has no activation
    before its scores: variance 1 / fan_in, the critical point of the identity, and zero bias.
    Gated FFNs: act(gate x) * (up x) squares the scale of its input, so no C_W, C_b make chi_par one for all kernels and
    the theory gives none. Gate and up keep the kernel of x (variance 1 / fan_in), then down is scaled so that the
    *measured* kernel of the output is that of a standard normal input.

    Raises MoesaicError for a module that is none of these, and where C_b > 0 has no bias to go to.
    """
    if isinstance(module, Pool):
        for bank in (module.bank, module.shared):
            if bank is not None:
                initialise_(bank, point, generator)
    elif isinstance(module, ModuleBank):
        for member in module.members:
            initialise_(member, point, generator)
    elif isinstance(module, FFN):
        initialise_(module.bank, point, generator)
    elif isinstance(module, FFNBank):
        (_gated if module.gated else _plain)(module, point, generator)
    elif isinstance(module, Router):
        _router(module, point, generator)
    elif isinstance(module, nn.Linear | Conv1D):
        _draw(module.weight, _fan_in(module), point.C_W, generator)
        _draw_bias(module.bias, point.C_b, generator, type(module).__name__)
    else:
        raise MoesaicError(f"cannot initialise a {type(module).__name__}: give experts, a router or a linear layer")
    return module


def _fan_in(module: nn.Linear | Conv1D) -> int:
    return int(module.in_features if isinstance(module, nn.Linear) else module.nx)


def _draw(weight: Tensor, fan_in: int, variance: float, generator: torch.Generator | None) -> None:
    weight.normal_(std=(variance / fan_in) ** 0.5, generator=generator)


def _draw_bias(bias: Tensor | None, variance: float, generator: torch.Generator | None, owner: str) -> None:
    if bias is not None:
        bias.normal_(std=variance**0.5, generator=generator)
    elif variance > 0:
        raise MoesaicError(
            f"the critical point needs biases of variance {variance:.4g}, but this {owner} has none; give it "
            "biases, or use a scale-invariant activation (ReLU)"
        )


def _plain(bank: FFNBank, point: Critical, generator: torch.Generator | None) -> None:
    for weight, bias, fan_in in (
        (bank.gate_up, bank.gate_up_bias, bank.width),
        (bank.down, bank.down_bias, bank.hidden),
    ):
        _draw(weight, fan_in, point.C_W, generator)
        _draw_bias(bias, point.C_b, generator, "FFN")


def _gated(bank: FFNBank, point: Critical, generator: torch.Generator | None) -> None:
    _draw(bank.gate_up, bank.width, 1.0, generator)
    _draw(bank.down, bank.hidden, 1.0, generator)
    for bias in (bank.gate_up_bias, bank.down_bias):
        if bias is not None:
            bias.zero_()
    x_ND = torch.randn(256, bank.width, generator=generator).to(bank.down)
    for expert in range(bank.experts):
        kernel = bank.run(expert, x_ND).float().square().mean() / x_ND.float().square().mean()
        bank.down[expert] /= kernel.sqrt().clamp_min(1e-12).to(bank.down.dtype)


def _router(router: Router, point: Critical, generator: torch.Generator | None) -> None:
    linears = [(name, m) for name, m in router.scorer.named_modules() if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
    for name, linear in linears:
        inner = linear.out_features != router.experts or "first" in name
        _draw(linear.weight, linear.in_features, point.C_W if inner else 1.0, generator)
        if linear.bias is not None:
            linear.bias.normal_(std=point.C_b**0.5, generator=generator) if inner else linear.bias.zero_()


# -- what any network does ---------------------------------------------------------------------------------------------


@dataclass
class InitialisationReport:
    """How signals and their gradients fare through the L decoder layers of a model, measured.

    kernel:    L + 1 mean squares of the hidden states, before layer 0 and after each layer.
    jacobian:  L mean ||d h_l / d h_0||_F^2 / dim, after each layer.
    chi:       exp of the slope of log jacobian over layers; one is critical. depth: -1 / ln chi, layers per factor e.
    aspect:    L / D; fluctuations between draws grow like its root.
    """

    kernel: list[float]
    jacobian: list[float]
    chi: float
    depth: float
    aspect: float
    warnings: list[str] = field(default_factory=list)


def initialisation_report(
    model: PreTrainedModel, batch: Tensor, probes: int = 4, seed: int = 0
) -> InitialisationReport:
    """Measure a model on token ids (B, S), at initialisation or later; the model is not changed.

    The Jacobian's norm is Hutchinson's estimate, E ||J^T v||^2 over `probes` draws v ~ N(0, I): one VJP a layer and
    draw. Raises MoesaicError if the model has no stack of decoder layers.
    """
    generator = torch.Generator().manual_seed(seed)
    with _recorded(model) as states, torch.enable_grad():
        model(input_ids=batch, use_cache=False)
    start, after = states[0], states[1:]
    jacobian = []
    for state in after:
        total = 0.0
        for _ in range(probes):
            v = torch.randn(state.shape, generator=generator).to(state)
            (pulled,) = torch.autograd.grad(state, start, v, retain_graph=True)
            total += float(pulled.detach().float().square().sum())
        jacobian.append(total / probes / start.numel())
    kernel = [float(state.detach().float().square().mean()) for state in states]
    slope = _slope([math.log(max(value, 1e-300)) for value in jacobian])
    chi, depth = math.exp(slope), math.inf if slope == 0 else -1 / slope
    report = InitialisationReport(kernel, jacobian, chi, depth, len(after) / start.shape[-1])
    report.warnings = _warnings(report)
    return report


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The hidden states before layer 0 (a leaf) and after each layer of the forward inside the block, in eval mode."""
    states: list[Tensor] = []
    _, layers = decoder_layers(model)

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict]:
        hidden = args[0] if args else kwargs["hidden_states"]
        states.append(leaf := hidden.detach().clone().requires_grad_())
        return ((leaf, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaf})

    def after(_: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        states.append(out[0] if isinstance(out, tuple) else out)

    training = model.training
    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        model.eval()
        yield states
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def _slope(values: list[float]) -> float:
    """Least squares slope over 0, 1, 2, ..."""
    if len(values) < 2:
        return 0.0
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread


def _warnings(report: InitialisationReport) -> list[str]:
    """What a trainer should look at before the first step; the thresholds are rules of thumb."""
    found, (first, last) = [], (report.kernel[0], report.kernel[-1])
    layers = len(report.jacobian)
    if not all(math.isfinite(value) for value in (*report.kernel, *report.jacobian)):
        return ["hidden states or their gradients are not finite: lower the weights' scale"]
    if abs(math.log(report.chi)) * layers > math.log(10):
        word = "grow" if report.chi > 1 else "vanish"
        found.append(f"gradients {word}: chi = {report.chi:.3g} a layer over {layers} layers; critical is 1")
    if not 0.05 <= last / max(first, 1e-30) <= 20:
        found.append(f"the mean square of the hidden states goes from {first:.3g} to {last:.3g} through the layers")
    if report.aspect > 0.1:
        found.append(
            f"{layers} layers of width {layers / report.aspect:.0f}: at depth/width = {report.aspect:.2g} draws differ "
            "much; compare several seeds"
        )
    return found
