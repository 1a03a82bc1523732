"""Linear layers whose weight lies in the order the CPU's kernels read it: oneDNN's packed format.

Two reasons. Speed: 1.3 to 2 times at few tokens, where plain products read memory at half its rate (docs/results.md).
And a row's result does not depend on how many rows run beside it, which plain float32 products do not promise: a
request's tokens must not change with its batch mates. The operators are private to torch, so they are behind this file
alone; where they are missing or the device is none they know, a plain product stands in.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.experts.buckets import PLAIN_LEAST, bucket


@cache
def available(dtype: torch.dtype) -> bool:
    """Whether this build packs `dtype` on this CPU and computes with it what a plain product does."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        weight, x = torch.eye(16, 32, dtype=dtype), torch.ones(2, 32, dtype=dtype)
        return torch.equal(_product(x, _pack(weight), None), x @ weight.T)
    except (AttributeError, RuntimeError):
        return False


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class PackedWeight:
    """A matrix (out, in), packed where that is possible and `pack` says so, else copied. `bytes`: what it holds."""

    @torch.no_grad()
    def __init__(self, weight: Tensor, pack: bool = True) -> None:
        self.bytes = weight.numel() * weight.element_size()
        self.packed = pack and weight.device.type == "cpu" and available(weight.dtype)
        self._weight = _pack(weight.contiguous()) if self.packed else weight.clone()

    def __call__(self, x_NI: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, in) -> (N, out)."""
        if not self.packed:
            return steady(x_NI, self._weight, bias)
        rows = len(x_NI)
        return _product(_filled(x_NI, bucket(rows)), self._weight, bias)[:rows]


def steady(x_NI: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
    """A plain product whose rows do not depend on how many there are: rows are filled up to a bucket.

    Small products take other kernels, with sums in another order: in float32 at some row counts below 12 that are no
    multiple of 4, in bfloat16 with 1 and 2 rows, where one number in a million differs.
    """
    rows = len(x_NI)
    return F.linear(_filled(x_NI, bucket(rows, PLAIN_LEAST)), weight_OI, bias)[:rows]


def _filled(x_NI: Tensor, rows: int) -> Tensor:
    return x_NI if len(x_NI) == rows else F.pad(x_NI, (0, 0, 0, rows - len(x_NI)))


class PackedLinear(nn.Module):
    """Stands where an nn.Linear stood, for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.product = PackedWeight(linear.weight.detach())
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.product(x.reshape(-1, x.shape[-1]), self.bias).view(*x.shape[:-1], self.out_features)


def pack_linears(model: nn.Module) -> int:
    """Replace every nn.Linear below `model` by a packed one; returns the bytes packed. Their weights are let go."""
    packed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, linear := PackedLinear(child))
                packed += linear.product.bytes
    return packed
