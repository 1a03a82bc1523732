"""Zero-computation experts (MoE++, 2410.07348, eq. 3-5): free to run, nothing to load, known to caches as such."""

import torch
from torch import Tensor, nn


class Zero(nn.Module):
    """E(x) = 0: the token is done with this layer."""

    kind = "zero"

    def forward(self, x_ND: Tensor) -> Tensor:
        return torch.zeros_like(x_ND)


class Copy(nn.Module):
    """E(x) = x. Inside a residual block this doubles x; `Zero` is what skips."""

    kind = "copy"

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND


class Constant(nn.Module):
    """E(x) = a1 x + a2 v with [a1, a2] = softmax(W x), v learned."""

    kind = "constant"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width, 2, bias=False)
        self.value = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, x_ND: Tensor) -> Tensor:
        a = self.mix(x_ND).softmax(-1)
        return a[:, :1] * x_ND + a[:, 1:] * self.value


def free_experts(width: int, ffn: int, zero: int = 1, copy: int = 1, constant: int | None = None) -> list[nn.Module]:
    """Constant..., copy..., zero..., by default max(ffn / 4 - zero - copy, 1) constants (eq. 10)."""
    if constant is None:
        constant = max(ffn // 4 - zero - copy, 1)
    return [*(Constant(width) for _ in range(constant)), *(Copy() for _ in range(copy)), *(Zero() for _ in range(zero))]
