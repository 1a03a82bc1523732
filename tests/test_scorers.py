"""Scorers that no named router uses yet: each against its equation, layer by layer, with gradients."""

import pytest
import torch
import torch.nn.functional as F

from moesaic.routing.contract import RouteInput, Router, RouterState
from moesaic.routing.policies import TopK
from moesaic.routing.scorers import MLP, Cosine

WIDTH, HIDDEN, EXPERTS, LAYERS = 8, 6, 5, 2


def given(layer, scale=1.0):
    hidden = scale * torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    return RouteInput.of(torch.zeros(2, 3, dtype=torch.long), hidden, layer=layer)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_mlp(layer):
    scorer, inp = MLP(WIDTH, HIDDEN, EXPERTS, LAYERS), given(layer)
    expected = F.silu(inp.hidden @ scorer.first[layer].weight.T) @ scorer.second[layer].weight.T
    torch.testing.assert_close(scorer(inp, RouterState())[0], expected)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_cosine_does_not_see_the_length_of_its_input(layer):
    scorer = Cosine(WIDTH, HIDDEN, EXPERTS, LAYERS, temperature=0.1)
    logits, _ = scorer(given(layer), RouterState())
    x = given(layer).hidden @ scorer.project[layer].weight.T
    expected = F.cosine_similarity(x[:, None], scorer.embeddings[layer][None], dim=-1) / 0.1
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(logits, scorer(given(layer, scale=7.0), RouterState())[0])


@pytest.mark.parametrize("scorer", [MLP(WIDTH, HIDDEN, EXPERTS, LAYERS), Cosine(WIDTH, HIDDEN, EXPERTS, LAYERS)])
def test_the_weights_train_the_layer_that_was_asked(scorer):
    plan, _ = Router(scorer, TopK(2, "renorm")).plan(given(layer=1))
    plan.check(EXPERTS).weight[:, 0].sum().backward()
    trained = {name for name, parameter in scorer.named_parameters() if parameter.grad is not None}
    layers = [name for name in trained if name != "log_temperature"]
    assert layers and all(".1" in name for name in layers)
