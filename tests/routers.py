"""Every router of the family, far from initialisation, and inputs to run it on: for the tests of the routing family."""

from dataclasses import replace

import torch
from torch import nn

from moesaic.routing.contract import RouteInput, RouterState
from moesaic.routing.family import ROUTERS, build_router, router_class
from moesaic.routing.modality import AuxiliaryRouter

WIDTH, EXPERTS, LAYERS, VOCAB = 8, 4, 3, 96
OPTIONS = {
    "recurrent": {"state_width": 8},
    "fine-grained": {"k": 2},
    "modality": {"groups": [2, 2]},
    "embedding-random": {"embedding": torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(3))},
}
SPREAD = {"frozen-random": {"k": 2}, "embedding-random": {"k": 2}, "random": {"eval_draw": "token"}}  # plans that vary
AUXILIARY = "auxiliary"
VARIANTS = {
    "top-k-raw": ("top-k", {"k": 1, "weighting": "probs"}),
    "top-p-capped": ("top-p", {"p": 0.9, "max_k": 2}),
    "random-by-sequence": ("random", {"eval_draw": "sequence", "train_draw": "token"}),
    "zero-computation-plain": ("zero-computation", {"gating_residual": False}),
}
NAMES = [*ROUTERS, AUXILIARY, *VARIANTS]


def kind_of(name):
    """The class of a router or variant."""
    return AuxiliaryRouter if name == AUXILIARY else router_class(VARIANTS.get(name, (name, {}))[0])


CAUSAL = [name for name in NAMES if kind_of(name).caps.causal]
NON_CAUSAL = [name for name in NAMES if not kind_of(name).caps.causal]
EXACT = [name for name in NAMES if kind_of(name).caps.precompute == "exact"]


def make(name, seed=0, layers=LAYERS):
    """A router far from initialisation, so that plans differ from token to token."""
    torch.manual_seed(seed)
    if name == AUXILIARY:
        router = AuxiliaryRouter(make("modality", seed, layers), WIDTH, layers)
    else:
        base, options = VARIANTS.get(name, (name, {}))
        options = {**OPTIONS.get(base, {}), **SPREAD.get(base, {}), **options}
        frozen = {"seed": seed} if base in ("frozen-random", "embedding-random") else {}
        router = build_router(base, WIDTH, EXPERTS, layers, **options, **frozen)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.5)
    return router


def batch(sequences=3, length=7, layers=LAYERS, seed=1, **fields):
    """The inputs of all layers: ids, and hidden states that do not depend on any plan."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (sequences, length), generator=generator)
    hidden = torch.randn(layers, sequences * length, WIDTH, generator=generator)
    base = RouteInput.of(ids, modality=(ids % 2).flatten(), **fields)
    return [replace(base, hidden=x, layer=layer) for layer, x in enumerate(hidden)]


def pick(inp, rows):
    """The input of some tokens, or of all in another order."""
    parts = {name: getattr(inp, name)[rows] for name in ("ids", "seq", "pos", "valid", "hidden", "modality")}
    return replace(inp, **parts)


def run(router, inputs):
    """The plans of one forward: the state starts empty and passes from layer to layer."""
    state, plans = RouterState(), []
    for inp in inputs:
        plan, state = router.plan(inp, state)
        plans.append(plan.check(router.experts))
    return plans


def assert_same(plans, others, exact=True):
    for one, other in zip(plans, others, strict=True):
        assert torch.equal(one.index, other.index)
        torch.testing.assert_close(one.weight, other.weight, **({"rtol": 0, "atol": 0} if exact else {}))
