"""Matrices of 8 or 4 bits a weight, for products of few rows, which take as long as the matrix takes to read.

Weight-only: rows come in and go out in the dtype they have. With 8 bits every output has a scale; with 4 bits every
group of inputs has a scale s and a zero z for each output, w = (q - 8) s + z with q from 0 to 15. torch's operators for
this are private, so they are behind this file alone; where one is missing, the matrix is made anew for every product.

A row's result does not depend on how many rows run beside it: the operators work row by row (tests hold them to it).
So many rows take many times as long as one. With 8 bits, rows of prompts therefore go another way: through a plain
product with the matrix made anew, which rounds otherwise. The way of a row depends on what it is, never on how many
there are.
Shapes: N rows, O outputs, I inputs, G groups of inputs.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.experts.lowbit_sizes import LEAST_OUTPUTS, filled_inputs, filled_outputs, group_of
from moesaic.experts.packed import PackedLinear, steady

TILE = 64  # outputs that torch's 4-bit order keeps together, at most
AT_ONCE = 2**18  # numbers that are made small in one go, within the caches: in between they are large


@cache
def available(bits: int, dtype: torch.dtype) -> bool:
    """Whether this build has the operator for `bits` and computes with it what a plain product does."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        weight = torch.eye(16, 64, dtype=dtype) * (127 / 16 if bits == 8 else 7.5)  # exact in these bits
        x = torch.arange(128).view(2, 64).to(dtype)
        return torch.equal(QuantizedWeight(weight, bits, native=True)(x), x @ weight.T)
    except (AttributeError, RuntimeError):
        return False


class QuantizedWeight:
    """A matrix (O, I) in `bits` a weight. `bytes`: what it holds; native: by torch's operator, None = if it is there.

    tensors: the weights in the operator's order, then their scales (8 bits) or scales and zeros (4 bits).
    """

    @torch.no_grad()
    def __init__(self, weight: Tensor, bits: int, native: bool | None = None) -> None:
        self.outputs, self.inputs = weight.shape
        self.bits, self.dtype = bits, weight.dtype
        self.filled = filled_inputs(self.inputs, bits)
        self.native = available(bits, weight.dtype) if native is None else native
        make = self._rows_of_8 if bits == 8 else self._groups_of_4
        step = max(TILE, AT_ONCE // self.filled // TILE * TILE)
        made = [make(self._full(weight[row : row + step])) for row in range(0, self.outputs, step)]
        weights, scales = zip(*made, strict=True)
        self.tensors: tuple[Tensor, Tensor] = torch.cat(weights), torch.cat(scales, 0 if bits == 8 else 1)

    @property
    def bytes(self) -> int:
        """What the matrix holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def moved(self, to: Callable[[Tensor], Tensor]) -> "QuantizedWeight":
        """The same matrix, its tensors where `to` puts them."""
        self.tensors = to(self.tensors[0]), to(self.tensors[1])
        return self

    def __call__(self, x_NI: Tensor, bias: Tensor | None = None, prompts: int | None = None) -> Tensor:
        """(N, I) -> (N, O). Rows from number `prompts` on are of prompts."""
        x_NI = F.pad(x_NI, (0, self.filled - self.inputs)) if self.filled > self.inputs else x_NI
        if not self.native or (prompts == 0 and self.bits == 8):
            y_NO = self._plain(x_NI)
        elif prompts is None or prompts >= len(x_NI) or self.bits == 4:
            y_NO = self._by_row(x_NI)
        else:
            y_NO = torch.cat((self._by_row(x_NI[:prompts]), self._plain(x_NI[prompts:])))
        if y_NO.shape[1] > self.outputs:
            y_NO = y_NO[:, : self.outputs]
        return y_NO if bias is None else y_NO + bias

    def _by_row(self, x_NI: Tensor) -> Tensor:
        weights, scales = self.tensors
        if self.bits == 8:
            return torch._weight_int8pack_mm(x_NI.contiguous(), weights, scales)
        group = group_of(self.filled)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_NI.contiguous(), weights, group, scales)

    def _full(self, weight_OI: Tensor) -> Tensor:
        outputs, inputs = weight_OI.shape
        more = (0, self.filled - inputs, 0, filled_outputs(outputs, self.bits) - outputs)
        return F.pad(weight_OI.float(), more) if any(more) else weight_OI.float().contiguous()

    def _rows_of_8(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        scale_O = _no_zeros((weight_OI.abs().amax(1) / 127).to(self.dtype))
        whole = (weight_OI / scale_O.float()[:, None]).round_().clamp_(-127, 127)
        return whole.to(torch.int8), scale_O

    def _groups_of_4(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        weight_OGI = weight_OI.view(len(weight_OI), -1, group_of(self.filled))
        low, high = weight_OGI.amin(-1), weight_OGI.amax(-1)
        scale = ((high - low) / 15).to(self.dtype)
        zero = (low + 8 * scale.float()).to(self.dtype)
        scale = _no_zeros(scale)
        whole = (weight_OGI - zero.float()[..., None]).div_(scale.float()[..., None]).round_().add_(8).clamp_(0, 15)
        whole_OI = whole.view(len(weight_OI), -1).to(torch.int32)
        both_GO2 = torch.stack((scale.T, zero.T), -1).contiguous()
        if self.native:
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole_OI, 1), both_GO2
        return (whole_OI[:, ::2] + 16 * whole_OI[:, 1::2]).to(torch.uint8), both_GO2

    def _plain(self, x_NI: Tensor) -> Tensor:
        """The product without the operator; 8-bit numbers are exact in every dtype, so scales can come afterwards."""
        weights, scales = self.tensors
        if self.bits == 8:
            return steady(x_NI, weights.to(x_NI.dtype)) * scales
        whole_OI = torch.stack((weights & 15, weights >> 4), -1).view(len(weights), -1)
        scale, zero = (part.T.float()[..., None] for part in scales.unbind(-1))
        made = (whole_OI.view(len(weights), -1, group_of(self.filled)).float() - 8) * scale + zero
        return steady(x_NI, made.view(len(weights), -1).to(x_NI.dtype))


def _no_zeros(scale: Tensor) -> Tensor:
    """What is all of one value divides by 1."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


class Step(threading.local):
    """Of the step that this thread runs. prompts: the row from which on they are of prompts, None = nobody says."""

    prompts: int | None = None


step = Step()


@contextmanager
def prompts_from(row: int) -> Iterator[None]:
    """Inside the block, linear layers get the rows of a step, those from `row` on of prompts."""
    step.prompts = row
    try:
        yield
    finally:
        step.prompts = None


class QuantizedLinear(nn.Module):
    """Stands where an nn.Linear stood, for inference. outputs: it is the head, whose rows are not those of the step."""

    outputs = False

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.product = QuantizedWeight(linear.weight.detach(), bits)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        prompts = None if self.outputs else step.prompts
        return self.product(x.reshape(-1, x.shape[-1]), self.bias, prompts).view(*x.shape[:-1], self.out_features)


def quantize_linears(model: nn.Module, bits: int, keep: Iterable[nn.Module] = ()) -> None:
    """Replace each nn.Linear below `model`: where it has few outputs or is in `keep` packed, else in `bits`."""
    kept = {inner for module in keep for inner in module.modules()}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                small = child.out_features < LEAST_OUTPUTS or child in kept
                setattr(parent, name, PackedLinear(child) if small else QuantizedLinear(child, bits))
