"""Channel blocks on a GPU: three ways of `compute.py` as Triton kernels, for inference.

token_decode      a single token through its expert's channels, hidden activations never stored.
masked_decode     as `masked`, for few tokens. Each weight is read once for all tokens; tiles of channels that no
                  token's expert owns are not read. The device is not asked which experts occur: nothing waits for it.
grouped_prefill   as `grouped`, for many: tiles of tokens of one expert meet tiles of its channels, all experts in one
                  launch; no expert's tokens are padded to another's.

They run on a GPU, and anywhere in triton's interpreter (TRITON_INTERPRET=1 before triton is imported), for tests.
Shapes: N tokens, W stored channels, D model width, E experts.
"""

import os
from collections.abc import Callable
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.experts.triton_kernels import Tiling, kernels

if TYPE_CHECKING:
    from moesaic.experts.channel_blocks import ChannelBlocks
    from moesaic.experts.compute import TokenGroups

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DECODE_TOKENS = 64  # most tokens of masked_decode: one tile of them, so that weights are read once
SUMMED = 8192  # numbers that a program of decode_sum adds up


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles and how it is launched."""

    channels: int
    step: int = 64  # bytes of a row that one product takes
    columns: int = 64  # of the model's width
    tokens: int = 0  # of a tile; 0: as few as hold the batch
    warps: int = 4
    stages: int = 3  # loads that are under way
    programs: int = 0  # that keep a GPU busy: splitting the sum over channels makes up for a narrow model


class Launches(NamedTuple):
    """How each kernel is launched."""

    decode_hidden: Tiles
    decode_down: Tiles
    token_part: Tiles
    prefill_hidden: Tiles
    prefill_down: Tiles


SMALL = Launches(  # fit 99 KiB of shared memory in every dtype; not measured
    Tiles(channels=32, step=128),
    Tiles(channels=32, columns=64, programs=256),
    Tiles(channels=4, warps=8, programs=256),
    Tiles(tokens=64, channels=64, step=128),
    Tiles(tokens=64, channels=64, columns=64),
)
LARGE = Launches(  # the best on an H200 in bfloat16, of widths 2,048 and 4,096 together
    Tiles(channels=32, step=256, stages=4),
    Tiles(channels=64, columns=128, programs=512),
    Tiles(channels=4, warps=8, programs=264),
    Tiles(tokens=128, channels=128, step=128, warps=8),
    Tiles(tokens=128, channels=64, columns=128, warps=8, stages=4),
)
LARGE_SHARED = 200 * 1024  # bytes of shared memory that LARGE takes


@cache
def launches(dtype: torch.dtype, device: torch.device) -> Launches:
    """For weights of this dtype on this device."""
    if device.type != "cuda" or dtype.itemsize > 2:
        return SMALL
    shared: int = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return LARGE if shared >= LARGE_SHARED else SMALL


class Stored(NamedTuple):
    """Where the channels of an FFN lie: matrices (R, D) and biases (R,), a row a channel.

    rows: (W,) int32, the row of each stored channel; None = in order.
    """

    gate: Tensor | None
    up: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down: Tensor
    rows: Tensor | None = None

    @property
    def first(self) -> tuple[Tensor | None, ...]:
        """What hidden activations are computed from."""
        return self.gate, self.up, self.gate_bias, self.up_bias


def stored(blocks: "ChannelBlocks") -> Stored:
    """The blocks' own parameters."""
    return Stored(blocks.gate, blocks.up, blocks.gate_bias, blocks.up_bias, blocks.down)


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


def runs_on(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors there: on a GPU, or anywhere in triton's interpreter."""
    if device.type == "cuda":
        return available()
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None and interpreted()


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


@lru_cache(maxsize=1024)  # of each layer another object
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
def masked_decode(blocks: "ChannelBlocks", x_ND: Tensor, groups: "TokenGroups", at: Stored | None = None) -> Tensor:
    """One pass over the union of the tokens' experts, at most DECODE_TOKENS tokens. at: None = the blocks' own weights.

    Raises MoesaicError for what the kernels cannot compute, MissingExtraError without triton.
    """
    at = at or stored(blocks)
    launch, x_ND = kernels(), _checked(blocks, at, x_ND)
    tokens, width, channels = len(x_ND), x_ND.shape[1], blocks.layout.width
    if tokens > DECODE_TOKENS:
        raise MoesaicError(f"{tokens} tokens for masked_decode: expected at most {DECODE_TOKENS}; use grouped_prefill")
    if not tokens:
        return blocks.finish(torch.empty_like(x_ND))
    up, down, *_ = launches(x_ND.dtype, x_ND.device)
    columns = _parts(width, down.columns)
    # Not of the number of tokens: the order of sums must not depend on it.
    splits = min(_parts(channels, down.channels), _parts(down.programs, columns))
    hidden, y = x_ND.new_empty(tokens, channels), torch.empty_like(x_ND)
    live = torch.empty(channels, dtype=torch.uint8, device=x_ND.device)
    sums = torch.empty(splits, tokens, width, dtype=torch.float32, device=x_ND.device)
    mask, expert_N = blocks.mask(torch.uint8, x_ND.device), groups.expert_N.contiguous()
    with torch.cuda.device_of(x_ND):
        launch["decode_hidden"][(_parts(channels, up.channels),)](
            x_ND, at.first, at.rows, mask, expert_N, hidden, live, tokens, channels, **_options(blocks, up, tokens)
        )
        launch["decode_down"][(columns, splits)](
            hidden, at.down, at.rows, live, sums, tokens, channels, **_options(blocks, down, tokens)
        )
        _sum(sums, y)
    return blocks.finish(y)


@torch.no_grad()
def token_decode(blocks: "ChannelBlocks", x_1D: Tensor, groups: "TokenGroups", at: Stored | None = None) -> Tensor:
    """A single token through its expert. at: None = the blocks' own weights.

    Raises MoesaicError for what the kernels cannot compute, MissingExtraError without triton.
    """
    at = at or stored(blocks)
    x_1D = _checked(blocks, at, x_1D)
    if len(x_1D) != 1:
        raise MoesaicError(f"{len(x_1D)} tokens for token_decode: expected one; use masked_decode")
    tiles = launches(x_1D.dtype, x_1D.device).token_part
    width = x_1D.shape[1]
    programs = min(tiles.programs, _parts(blocks.layout.widest, tiles.channels))
    sums = torch.empty(programs, 1, width, dtype=torch.float32, device=x_1D.device)
    owned, y = blocks.owned(x_1D.device), torch.empty_like(x_1D)
    options = _options(blocks, tiles._replace(columns=1 << (width - 1).bit_length()), 1)
    with torch.cuda.device_of(x_1D):
        kernels()["token_part"][(programs,)](x_1D, at.first, at.down, at.rows, owned, groups.expert_N, sums, **options)
        _sum(sums, y)
    return blocks.finish(y)


def _sum(sums: Tensor, y_ND: Tensor) -> None:
    """y = the sum over the first axis."""
    splits = 1 << (len(sums) - 1).bit_length()
    block = max(16, SUMMED // splits)
    grid = (_parts(y_ND.numel(), block),)
    kernels()["decode_sum"][grid](sums, y_ND, len(sums), y_ND.numel(), SPLITS=splits, BLOCK=block)


@torch.no_grad()
def grouped_prefill(blocks: "ChannelBlocks", x_ND: Tensor, groups: "TokenGroups", at: Stored | None = None) -> Tensor:
    """Tokens sorted by expert, each through its expert's own channels. at: None = the blocks' own weights.

    Raises MoesaicError for what the kernels cannot compute, MissingExtraError without triton.
    """
    at = at or stored(blocks)
    launch, x_ND = kernels(), _checked(blocks, at, x_ND)
    if not len(x_ND):
        return blocks.finish(torch.empty_like(x_ND))
    *_, up, down = launches(x_ND.dtype, x_ND.device)
    owned = blocks.owned(x_ND.device)
    widest = max(blocks.layout.expert_width(expert) for expert in groups.used)
    step = max(up.channels, down.channels)
    stride = _parts(widest, step) * step
    hidden, y = x_ND.new_empty(len(x_ND), stride), torch.empty_like(x_ND)
    with torch.cuda.device_of(x_ND):
        tiles = groups.tiles(up.tokens)
        launch["prefill_hidden"][(len(tiles[0]), _parts(widest, up.channels))](
            x_ND, at.first, at.rows, groups.order, tiles, owned, hidden, stride, **_options(blocks, up)
        )
        tiles = groups.tiles(down.tokens)
        launch["prefill_down"][(len(tiles[0]), _parts(x_ND.shape[1], down.columns))](
            hidden, at.down, at.rows, groups.order, tiles, owned, y, stride, **_options(blocks, down)
        )
    return blocks.finish(y)


def kernel_for(tokens: int) -> "Callable[..., Tensor]":
    """The kernel for so many tokens."""
    if tokens == 1:
        return token_decode
    return masked_decode if tokens <= DECODE_TOKENS else grouped_prefill


def _parts(whole: int, part: int) -> int:
    return -(-whole // part)


def tiling(blocks: "ChannelBlocks", tiles: Tiles, tokens: int = 0) -> Tiling:
    """What a kernel is compiled for."""
    return Tiling(
        width=blocks.up.shape[1],
        tokens=tiles.tokens or max(16, 1 << (tokens - 1).bit_length()),
        channels=tiles.channels,
        step=max(16, tiles.step // blocks.up.element_size()),
        columns=tiles.columns,
        activation=str(activation_name(blocks.activation)),
        widen=interpreted(),
    )


def _options(blocks: "ChannelBlocks", tiles: Tiles, tokens: int = 0) -> dict[str, Any]:
    return {"TILING": tiling(blocks, tiles, tokens), "num_warps": tiles.warps, "num_stages": tiles.stages}


@cache
def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, where tensors may lie anywhere."""
    import triton

    return not isinstance(kernels()["decode_sum"], triton.JITFunction)


def _checked(blocks: "ChannelBlocks", at: Stored, x_ND: Tensor) -> Tensor:
    """The tokens, contiguous."""
    if (reason := refusal(blocks)) is not None:
        raise MoesaicError(f"the Triton kernels cannot compute this FFN: {reason}; compute.masked and grouped can")
    if x_ND.dtype != at.up.dtype or x_ND.device != at.up.device:
        raise MoesaicError(
            f"tokens are {x_ND.dtype} on {x_ND.device}, weights {at.up.dtype} on {at.up.device}: expected the "
            "same; convert one with .to()"
        )
    if not x_ND.is_cuda and not interpreted():
        raise MoesaicError(
            f"the Triton kernels run on a GPU, but tokens are on {x_ND.device}: use compute.masked or grouped, or set "
            "TRITON_INTERPRET=1 before triton is imported"
        )
    return x_ND.contiguous()
