"""Critical initialisation: its constants, that signals live at depth, and that reports see what is broken."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from families import tiny
from moesaic.errors import MoesaicError
from moesaic.experts.bank import FFN, FFNBank, ModuleBank
from moesaic.experts.pool import Pool, all_on
from moesaic.models.critical_init import Critical, critical, initialisation_report, initialise_
from moesaic.routing.family import build_router

HALF_STABLE = {  # activation: C_b, C_W, K*
    "gelu": (0.17292239, 1.98305826, (3 + 17**0.5) / 2),
    "silu": (0.55514317, 1.98800468, 14.3201736),
    "gelu_pytorch_tanh": (0.17289520, 1.98288824, 3.55677),
    "quick_gelu": (0.19163988, 1.98800468, 4.94344),
    "mish": (0.09452179, 2.01352407, 1.67017),
}


@pytest.mark.parametrize("name", HALF_STABLE)
def test_constants_of_smooth_activations(name):
    point, (bias, weight, kernel) = critical(name), HALF_STABLE[name]
    assert point.kind == "half-stable"
    assert (point.C_b, point.C_W) == pytest.approx((bias, weight), abs=1e-6)
    assert point.K_star == pytest.approx(kernel, rel=1e-5)


def test_the_critical_point_is_one_by_monte_carlo():
    point = critical("gelu")
    z = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0)).double() * point.K_star**0.5
    z.requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(z).sum(), z)
    square = F.gelu(z.detach()).square()
    assert point.C_W * float(slope.square().mean()) == pytest.approx(1, abs=3e-3)
    assert point.C_b + point.C_W * float(square.mean()) == pytest.approx(point.K_star, rel=5e-3)
    parallel = point.C_W * float((square * (z.detach().square() - point.K_star)).mean()) / (2 * point.K_star**2)
    assert parallel == pytest.approx(1, abs=1e-2)


def test_scale_invariant_and_odd_activations():
    assert critical("relu") == Critical(0.0, 2.0, None, "scale-invariant")
    assert critical("linear") == Critical(0.0, 1.0, None, "scale-invariant")
    leaky = critical(lambda z: F.leaky_relu(z, 0.5))
    assert (leaky.C_b, leaky.C_W) == pytest.approx((0, 2 / 1.25))
    for odd in ("tanh", torch.sin):
        point = critical(odd)
        assert point.kind == "zero"
        assert (point.C_b, point.C_W, point.K_star) == pytest.approx((0, 1, 0), abs=1e-9)


@pytest.mark.parametrize("activation", [F.softplus, "sigmoid"])
def test_activations_without_a_critical_point_are_refused(activation):
    with pytest.raises(MoesaicError, match="no critical point"):
        critical(activation)


def test_bad_activations_are_named():
    with pytest.raises(MoesaicError, match="unknown activation 'glue'"):
        critical("glue")
    with pytest.raises(MoesaicError, match="not elementwise"):
        critical(lambda z: z.relu().mean()[None])


def depth_ratio(activation, weight, bias, start, layers=50, width=128, nets=12):
    """Median over networks of K at the last layer over K at the first."""
    generator, ratios = torch.Generator().manual_seed(0), []
    for _ in range(nets):
        z = torch.randn(1, width, generator=generator) * start**0.5
        first = z.square().mean()
        for _ in range(layers):
            linear = initialise_(nn.Linear(width, width), Critical(bias, weight, None, "half-stable"), generator)
            z = linear(activation(z))
        ratios.append(float(z.detach().square().mean() / first))
    return sorted(ratios)[nets // 2]


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_signals_survive_fifty_layers_only_at_the_critical_point(name):
    point, activation = critical(name), getattr(F, name)
    start = point.K_star or 1.0
    assert 0.3 < depth_ratio(activation, point.C_W, point.C_b, start) < 3
    assert depth_ratio(activation, 0.9 * point.C_W, point.C_b, start) < 0.3
    assert depth_ratio(activation, 1.1 * point.C_W, point.C_b, start) > 10


def test_plain_experts_get_the_critical_variances():
    point = critical("gelu")
    bank = FFNBank(3, 64, 256, F.gelu, gated=False, up_bias=True, down_bias=True)
    initialise_(bank, point, torch.Generator().manual_seed(0))
    for weight, fan_in in ((bank.gate_up, 64), (bank.down, 256)):
        assert float(weight.detach().var()) * fan_in == pytest.approx(point.C_W, rel=0.03)
    for bias in (bank.gate_up_bias, bank.down_bias):
        assert float(bias.detach().var()) == pytest.approx(point.C_b, rel=0.25)
    with pytest.raises(MoesaicError, match="needs biases"):
        initialise_(FFNBank(3, 64, 256, F.gelu, gated=False), point)
    initialise_(FFNBank(3, 64, 256, F.relu, gated=False), critical("relu"))  # needs none


def test_gated_experts_keep_the_measured_kernel():
    bank = FFNBank(2, 64, 96, F.silu, gated=True)
    initialise_(Pool(ModuleBank([FFN(64, 8)]), shared=bank), critical("silu"), torch.Generator().manual_seed(0))
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    for expert in range(2):
        assert float(bank.run(expert, x).detach().square().mean()) == pytest.approx(1, rel=0.15)
    assert float(bank(x, all_on(2000, 2)).square().mean()) == pytest.approx(2, rel=0.2)


def test_routers_score_with_unit_variance():
    x = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))
    router = build_router("top-k", 64, 32, 2)
    initialise_(router, critical("silu"), torch.Generator().manual_seed(0))
    assert float((x @ router.scorer.heads[1].weight.T).var()) == pytest.approx(1, rel=0.15)
    with pytest.raises(MoesaicError, match="cannot initialise a Dropout"):
        initialise_(nn.Dropout(), critical("silu"))


def exact_jacobian(model, ids):
    """||d h_L / d h_0||_F^2 / dim by one backward pass for every output number."""
    layers = model.model.layers
    seen = {}
    handles = [
        layers[0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0])),
        layers[-1].register_forward_hook(lambda _, args, out: seen.update(last=out)),
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    flat, total = seen["last"].flatten(), 0.0
    for number in flat:
        total += float(torch.autograd.grad(number, seen["first"], retain_graph=True)[0].square().sum())
    return total / flat.numel()


def test_hutchinson_is_the_jacobian_norm():
    model, ids = tiny("llama"), torch.randint(3, 96, (1, 4))
    report = initialisation_report(model, ids, probes=200)
    assert report.jacobian[-1] == pytest.approx(exact_jacobian(model, ids), rel=0.15)
    assert len(report.kernel) == 3 and len(report.jacobian) == 2
    assert report.chi == pytest.approx(report.jacobian[1] / report.jacobian[0])
    assert report.depth == pytest.approx(-1 / math.log(report.chi))


def test_the_report_warns_of_what_is_broken_and_leaves_the_model_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, vocab_size=96)
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)).train()
    nn.init.normal_(model.model.embed_tokens.weight)  # at 0.02 the norms amplify: chi would be 1.4
    ids = torch.randint(3, 96, (2, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sane = initialisation_report(model, ids)
    assert not sane.warnings and abs(math.log(sane.chi)) < 0.2
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(3000)
    text = " ".join(initialisation_report(model, ids).warnings)
    assert "mean square of the hidden states" in text
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    assert "not finite" in initialisation_report(model, ids).warnings[0]
    deep = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, **{**sizes, "hidden_size": 32}))
    assert "compare several seeds" in " ".join(initialisation_report(deep, ids).warnings)
