"""Channel blocks on a GPU: two ways of `compute.py` as Triton kernels, for inference. Not run on a GPU yet.

masked_decode     as `masked`, for few tokens. Each weight is read once for all tokens; tiles of channels that no
                  token's expert owns are not read. The device is not asked which experts occur: nothing waits for it.
grouped_prefill   as `grouped`, for many: tiles of tokens of one expert meet tiles of its channels, all experts in one
                  launch; no expert's tokens are padded to another's.

They run on a GPU, and anywhere in triton's interpreter (TRITON_INTERPRET=1 before triton is imported), for tests.
Shapes: N tokens, W stored channels, D model width, E experts.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.experts.layout import BlockLayout
from moesaic.experts.triton_kernels import Tiling, kernels

if TYPE_CHECKING:
    from moesaic.experts.channel_blocks import ChannelBlocks
    from moesaic.experts.compute import TokenGroups

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Chosen by hand and not measured: tiles fit the shared memory of small GPUs (99 KiB) in every dtype.
DECODE_TOKENS = 64  # most tokens of masked_decode: one tile of them, so that weights are read once
PREFILL_ROWS = 64
PROGRAMS = 256  # programs that keep a GPU busy; splitting the sum over channels makes up for a narrow D
SUM_BLOCK = 1024

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


@cache
def available() -> bool:
    """Whether triton is installed and there is a GPU that it compiles for."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    try:
        kernels()
    except ImportError:
        return False
    return True


def suits(blocks: "ChannelBlocks") -> bool:
    """Whether the kernels can take the place of the plain paths for these blocks, where they lie, as things are now."""
    if not blocks.up.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    return available() and not torch.compiler.is_compiling() and refusal(blocks) is None


def refusal(blocks: "ChannelBlocks") -> str | None:
    """Why the kernels cannot compute these blocks, whatever the device; None if they can."""
    if blocks.up.dtype not in DTYPES:
        return f"weights are {blocks.up.dtype}: expected one of {', '.join(map(str, DTYPES))}"
    if activation_name(blocks.activation) is None:
        return f"the activation {blocks.activation} is none of {', '.join(FUNCTIONS)}"
    if not all(parameter.is_contiguous() for parameter in blocks.parameters()):
        return "a weight is not contiguous: call .contiguous() on it"
    return None


@lru_cache(maxsize=64)
def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Which of FUNCTIONS this is, by what it computes: the same function comes in many classes."""
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return None
    far = torch.tensor([20.0, 60.0, 1e3, 1e4])
    points = torch.cat([torch.linspace(-12, 12, 1201), far, -far])
    try:
        with torch.no_grad():
            values = activation(points)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(values, Tensor) or values.shape != points.shape:
        return None
    same = (name for name, function in FUNCTIONS.items() if torch.allclose(values, function(points), atol=1e-5))
    return next(same, None)


@torch.no_grad()
def masked_decode(blocks: "ChannelBlocks", x_ND: Tensor, groups: "TokenGroups") -> Tensor:
    """One pass over the union of the tokens' experts, at most DECODE_TOKENS tokens.

    Raises MoesaicError for what the kernels cannot compute, MissingExtraError without triton.
    """
    launch, x_ND = kernels(), _checked(blocks, x_ND)
    tokens, width, stored = len(x_ND), x_ND.shape[1], blocks.layout.width
    if tokens > DECODE_TOKENS:
        raise MoesaicError(f"{tokens} tokens for masked_decode: expected at most {DECODE_TOKENS}; use grouped_prefill")
    if not tokens:
        return blocks.finish(torch.empty_like(x_ND))
    tiling = decode_tiling(blocks, tokens)
    tiles, columns = -(-stored // tiling.channels), -(-width // tiling.columns)
    splits = min(tiles, -(-PROGRAMS // columns))  # not of the number of tokens: the order of sums must not depend on it
    hidden, y = x_ND.new_empty(tokens, stored), torch.empty_like(x_ND)
    live = torch.empty(tiles, dtype=torch.int32, device=x_ND.device)
    sums = torch.empty(splits, tokens, width, dtype=torch.float32, device=x_ND.device)
    mask, expert_N = blocks.mask(torch.uint8, x_ND.device), groups.expert_N.contiguous()
    with torch.cuda.device_of(x_ND):
        launch["decode_hidden"][(tiles,)](
            x_ND, _ffn(blocks), mask, expert_N, hidden, live, tokens, stored, TILING=tiling
        )
        launch["decode_down"][(columns, splits)](hidden, blocks.down, live, sums, tokens, stored, TILING=tiling)
        launch["decode_sum"][(-(-y.numel() // SUM_BLOCK),)](sums, y, splits, y.numel(), BLOCK=SUM_BLOCK)
    return blocks.finish(y)


@torch.no_grad()
def grouped_prefill(blocks: "ChannelBlocks", x_ND: Tensor, groups: "TokenGroups") -> Tensor:
    """Tokens sorted by expert, each through its expert's own channels.

    Raises MoesaicError for what the kernels cannot compute, MissingExtraError without triton.
    """
    launch, x_ND = kernels(), _checked(blocks, x_ND)
    if not len(x_ND):
        return blocks.finish(torch.empty_like(x_ND))
    tiling = prefill_tiling(blocks)
    tiles, owned = groups.tiles(tiling.tokens), owned_channels(blocks.layout, x_ND.device)
    widest = max(blocks.layout.expert_width(expert) for expert in groups.used)
    hidden, y = x_ND.new_empty(len(x_ND), widest), torch.empty_like(x_ND)
    rows = len(tiles[0])
    up_grid, down_grid = (rows, -(-widest // tiling.channels)), (rows, -(-x_ND.shape[1] // tiling.columns))
    with torch.cuda.device_of(x_ND):
        launch["prefill_hidden"][up_grid](x_ND, _ffn(blocks), groups.order, tiles, owned, hidden, widest, TILING=tiling)
        launch["prefill_down"][down_grid](hidden, blocks.down, groups.order, tiles, owned, y, widest, TILING=tiling)
    return blocks.finish(y)


def decode_tiling(blocks: "ChannelBlocks", tokens: int) -> Tiling:
    """What masked_decode is compiled for."""
    rows = max(16, 1 << (tokens - 1).bit_length())
    return _tiling(blocks, tokens=rows, channels=32, step=128 // blocks.up.element_size(), columns=64)


def prefill_tiling(blocks: "ChannelBlocks") -> Tiling:
    """What grouped_prefill is compiled for."""
    size = 128 // blocks.up.element_size()
    return _tiling(blocks, tokens=PREFILL_ROWS, channels=size, step=size, columns=64)


def _tiling(blocks: "ChannelBlocks", **sizes: int) -> Tiling:
    name = activation_name(blocks.activation)
    return Tiling(width=blocks.up.shape[1], activation=str(name), widen=interpreted(), **sizes)


@cache
def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, where tensors may lie anywhere."""
    import triton

    return not isinstance(kernels()["decode_sum"], triton.JITFunction)


@lru_cache(maxsize=1024)  # a layout a layer
def owned_channels(layout: BlockLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """The experts' stored channels one after another, and (E + 1,) where each expert's begin; int32."""
    runs = [torch.arange(start, stop) for expert in range(layout.experts) for start, stop in layout.runs(expert)]
    widths = [0, *map(layout.expert_width, range(layout.experts))]
    begins = torch.tensor(widths).cumsum(0)
    return torch.cat(runs).to(device, torch.int32), begins.to(device, torch.int32)


def _ffn(blocks: "ChannelBlocks") -> tuple[Any, ...]:
    return blocks.gate, blocks.up, blocks.gate_bias, blocks.up_bias


def _checked(blocks: "ChannelBlocks", x_ND: Tensor) -> Tensor:
    """The tokens, contiguous."""
    if (reason := refusal(blocks)) is not None:
        raise MoesaicError(f"the Triton kernels cannot compute this FFN: {reason}; compute.masked and grouped can")
    if x_ND.dtype != blocks.up.dtype or x_ND.device != blocks.up.device:
        raise MoesaicError(
            f"tokens are {x_ND.dtype} on {x_ND.device}, weights {blocks.up.dtype} on {blocks.up.device}: expected the "
            "same; convert one with .to()"
        )
    if not x_ND.is_cuda and not interpreted():
        raise MoesaicError(
            f"the Triton kernels run on a GPU, but tokens are on {x_ND.device}: use compute.masked or grouped, or set "
            "TRITON_INTERPRET=1 before triton is imported"
        )
    return x_ND.contiguous()
