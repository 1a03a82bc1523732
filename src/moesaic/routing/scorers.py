"""Scorers: what a router computes its logits from. Each holds the parameters of all layers and reads `inp.layer`.

Shapes: N tokens, D model width, E experts, L routed layers, P hidden width of the scorer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.routing.contract import RouteInput, RouterState

INIT_STD = 0.02


def small_(linear: nn.Linear, std: float = INIT_STD) -> nn.Linear:
    """Normal weights, zero bias: near-uniform routing at the start."""
    nn.init.normal_(linear.weight, std=std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


class Linear(nn.Module):
    """logits = W_l x, the router of most mixtures."""

    def __init__(self, width: int, experts: int, layers: int, bias: bool = False) -> None:
        super().__init__()
        self.experts = experts
        self.heads = nn.ModuleList(small_(nn.Linear(width, experts, bias=bias)) for _ in range(layers))

    def forward(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]:
        return self.heads[inp.layer](inp.need_hidden().float()), state


class MLP(nn.Module):
    """logits = B_l act(A_l x)."""

    def __init__(self, width: int, hidden: int, experts: int, layers: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.experts = experts
        self.activation = activation or nn.SiLU()
        self.first = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(layers))
        self.second = nn.ModuleList(small_(nn.Linear(hidden, experts, bias=False)) for _ in range(layers))

    def forward(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]:
        hidden = self.activation(self.first[inp.layer](inp.need_hidden().float()))
        return self.second[inp.layer](hidden), state


class Cosine(nn.Module):
    """logits = cos(P_l x, e) / tau: scores that do not depend on the length of x (X-MoE, 2204.09179)."""

    def __init__(self, width: int, hidden: int, experts: int, layers: int, temperature: float = 0.1) -> None:
        super().__init__()
        self.experts = experts
        self.project = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(layers))
        self.embeddings = nn.ParameterList(torch.randn(experts, hidden) for _ in range(layers))
        self.log_temperature = nn.Parameter(torch.full((layers,), temperature).log())

    def forward(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]:
        x = F.normalize(self.project[inp.layer](inp.need_hidden().float()), dim=-1)
        cosine = x @ F.normalize(self.embeddings[inp.layer], dim=-1).T
        return cosine / self.log_temperature[inp.layer].exp(), state


class FrozenRandom(nn.Module):
    """logits = R_l x with R_l drawn once and never trained: buffers, so that no optimizer or average can move them.

    embedding:  (vocabulary, D): score the embedding of the token id instead of the hidden state.
    """

    weight: Tensor
    embedding: Tensor | None

    def __init__(self, width: int, experts: int, layers: int, seed: int = 0, embedding: Tensor | None = None) -> None:
        super().__init__()
        self.experts = experts
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(layers, experts, width, generator=generator) / width**0.5)
        self.register_buffer("embedding", None if embedding is None else embedding.detach().float().clone())

    def forward(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]:
        x = inp.need_hidden().float() if self.embedding is None else self.embedding[inp.ids]
        return x @ self.weight[inp.layer].T, state


class Recurrent(nn.Module):
    """One GRU cell over LAYERS, shared; per-layer projections in and out (RMoE, 2408.06793, eq. 4-6).

    The state passes from layer to layer of one forward with its gradient; detaching it is worse than no recurrence.
    """

    def __init__(self, width: int, hidden: int, experts: int, layers: int) -> None:
        super().__init__()
        self.experts = experts
        self.project = nn.ModuleList(small_(nn.Linear(width, hidden, bias=False)) for _ in range(layers))
        self.cell = nn.GRUCell(hidden, hidden)
        self.heads = nn.ModuleList(small_(nn.Linear(hidden, experts, bias=False)) for _ in range(layers))
        for parameter in self.cell.parameters():
            nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]:
        depth = self.cell(self.project[inp.layer](inp.need_hidden().float()), state.depth)
        return self.heads[inp.layer](depth), RouterState(depth, state.time)


class Residual(nn.Module):
    """G_l = scorer(x) + W_l G_{l-1}: the previous layer's logits are a prior (MoE++, 2410.07348, eq. 6)."""

    def __init__(self, scorer: nn.Module, layers: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.experts: int = scorer.experts  # type: ignore[assignment]
        self.carry = nn.ModuleList(nn.Linear(self.experts, self.experts, bias=False) for _ in range(layers))
        for parameter in self.carry.parameters():
            nn.init.zeros_(parameter)  # starts as the plain router

    def forward(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]:
        logits, state = self.scorer(inp, state)
        if state.depth is not None:
            logits = logits + self.carry[inp.layer](state.depth)
        return logits, RouterState(logits, state.time)


class Nothing(nn.Module):
    """No logits at all: zeros, for policies that read none (random, fixed)."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, inp: RouteInput, state: RouterState) -> tuple[Tensor, RouterState]:
        return torch.zeros(len(inp.ids), self.experts, device=inp.ids.device), state
