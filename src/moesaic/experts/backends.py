"""Which way of computing is taken: all there are by name, what each needs, and the choice for a layer and its tokens.

Correctness never depends on the choice, only time and memory do. Where this machine was measured for a layer of this
shape (`moesaic tune`), the fastest backend whose copies fit into the layer's limit is taken; elsewhere constants are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moesaic.experts import compute, packed, triton_blocks, tuning
from moesaic.experts.compute import Path, TokenGroups

if TYPE_CHECKING:
    from moesaic.experts.channel_blocks import ChannelBlocks

# Measured on two CPU cores, six experts of half the channels. Products in oneDNN's own order take a third to two thirds
# of the time, so copies are made of that: first one of all channels, which serves any mixture of experts, and then of
# single experts, which pay from this many tokens an expert on. Small ones need more to outweigh the calls.
PREPACKED_TOKENS, SMALL_TOKENS = 20, 128
# Without room for them, or without oneDNN, one masked pass over the union is faster than sorting below this many tokens
# an expert; in bfloat16 as late as for small experts, since several small products run at half the rate of one
# (benchmarks/ffn_floor.py). Small experts are computed from plain copies, in one product instead of several.
GROUP_TOKENS = 48
SMALL = 8 * 2**20  # bytes of an expert

CopyOf = tuple[int | None, bool]
"""Expert, None = all stored channels; whether packed."""


@dataclass(frozen=True)
class Backend:
    """One way of computing channel blocks in inference.

    needs:   what it runs on, for people.
    suits:   whether it can compute these blocks, as they are and where they lie.
    copies:  which copies it computes from, given the experts that have tokens.
    """

    name: str
    path: Path
    needs: str
    suits: Callable[["ChannelBlocks"], bool]
    copies: Callable[[Sequence[int]], Sequence[CopyOf]] = lambda used: ()

    def extra_bytes(self, blocks: "ChannelBlocks", used: Sequence[int]) -> int:
        """Bytes of the copies it takes beside the stored weights for tokens of the experts `used`."""
        return sum(blocks.copy_bytes(expert) for expert, _ in self.copies(used))

    def held(self, blocks: "ChannelBlocks", used: Sequence[int]) -> bool:
        """Whether its copies are there."""
        return blocks.copies.hold(blocks, self.copies(used))

    def affordable(self, blocks: "ChannelBlocks", used: Sequence[int], beside: Sequence[CopyOf] = ()) -> bool:
        """Whether its copies are there or fit into the limit, together with those `beside` them."""
        wanted = self.copies(used)
        if not wanted or self.held(blocks, used):
            return True
        keys = {*wanted, *beside}
        return blocks.copies.fits(blocks, [(key, blocks.copy_bytes(key[0])) for key in keys])


def _onednn(blocks: "ChannelBlocks") -> bool:
    # oneDNN's operators do not know autocast.
    plain = blocks.up.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return plain and packed.available(blocks.up.dtype)


def _parts(blocks: "ChannelBlocks") -> bool:
    return not blocks.layout.is_whole  # then copies of all experts would be copies of one thing


def _all(packed: bool) -> Callable[[Sequence[int]], Sequence[CopyOf]]:
    return lambda used: [(expert, packed) for expert in used]


# The simplest first: a later one must be clearly faster to be preferred.
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("masked", compute.masked, "tied blocks", lambda blocks: not blocks.untied),
        Backend("grouped", compute.grouped, "nothing", lambda blocks: True),
        Backend("packed", compute.packed, "a copy of each expert", _parts, _all(False)),
        Backend(
            "masked_prepacked",
            compute.masked_prepacked,
            "tied blocks, oneDNN, a copy of all channels",
            lambda blocks: not blocks.untied and _onednn(blocks),
            lambda used: [(None, True)],
        ),
        Backend(
            "prepacked",
            compute.prepacked,
            "oneDNN, a copy of each expert",
            lambda blocks: _parts(blocks) and _onednn(blocks),
            _all(True),
        ),
        Backend("triton_token", triton_blocks.token_decode, "a GPU, triton, a single token", triton_blocks.suits),
        Backend("triton_decode", triton_blocks.masked_decode, "a GPU, triton, few tokens", triton_blocks.suits),
        Backend("triton_prefill", triton_blocks.grouped_prefill, "a GPU, triton", triton_blocks.suits),
    )
}


def choose(blocks: "ChannelBlocks", groups: TokenGroups) -> Path:
    """The path for these tokens."""
    if torch.is_grad_enabled():
        return compute.grouped_autograd if blocks.untied else compute.masked
    if torch.compiler.is_compiling():  # which knows neither copies nor oneDNN's own order
        return compute.grouped if blocks.untied else compute.masked
    if triton_blocks.suits(blocks):
        return triton_blocks.kernel_for(len(groups.expert_N))
    if blocks.up.device.type == "cpu" and (path := _measured(blocks, groups)) is not None:
        return path
    return by_constants(blocks, groups)


def by_constants(blocks: "ChannelBlocks", groups: TokenGroups) -> Path:
    """The path where nothing was measured."""
    if blocks.layout.is_whole or not len(groups.expert_N):
        return compute.masked
    used, tokens = groups.used, len(groups.expert_N)
    packable = not blocks.untied and _onednn(blocks)
    if packable and (path := _from_packed(blocks, used, tokens)) is not None:
        return path
    small, half = blocks.expert_bytes <= SMALL, blocks.up.dtype != torch.float32
    copied = (small or half) and not packable and BACKENDS["packed"].affordable(blocks, used)
    least = SMALL_TOKENS if small or (half and not copied) else GROUP_TOKENS
    if len(used) > 1 and tokens < least * len(used) and not blocks.untied:
        return compute.masked
    return compute.packed if copied else compute.grouped


def _from_packed(blocks: "ChannelBlocks", used: Sequence[int], tokens: int) -> Path | None:
    """The path from copies in oneDNN's order; None where they do not fit or do not pay."""
    alone, mixed, each = BACKENDS["prepacked"], BACKENDS["masked_prepacked"], tokens / len(used)
    # What is there and surely the way: the rest of the choice would take as long as a small product.
    if len(used) == 1 and alone.held(blocks, used):
        return compute.prepacked
    if len(used) > 1 and each < PREPACKED_TOKENS and mixed.held(blocks, used):
        return compute.masked_prepacked
    small = blocks.expert_bytes <= SMALL
    by_expert = len(used) == 1 or each >= (SMALL_TOKENS if small else PREPACKED_TOKENS)
    if by_expert and alone.affordable(blocks, used, _all_channels(blocks)):
        return compute.prepacked
    # Of a single narrow expert its own runs are less to read.
    worth = len(used) > 1 or 3 * blocks.layout.expert_width(used[0]) >= blocks.layout.width
    if worth and each < (SMALL_TOKENS if small else GROUP_TOKENS) and mixed.affordable(blocks, used):
        return compute.masked_prepacked
    return None


def _all_channels(blocks: "ChannelBlocks") -> Sequence[CopyOf]:
    """The copy that serves every mixture of experts; copies of single ones leave it its room, if it has any."""
    limit = blocks.copies.limit_for(blocks)
    return BACKENDS["masked_prepacked"].copies(()) if limit is None or blocks.copy_bytes(None) <= limit else ()


def _measured(blocks: "ChannelBlocks", groups: TokenGroups) -> Path | None:
    """The fastest measured path that can be had; None where this shape was not measured."""
    if tuning.empty():
        return None
    shape = tuning.blocks_shape(blocks)
    used = [0] if blocks.layout.is_whole else groups.used
    experts = blocks.layout.experts
    mixed = tuning.ranking(shape, 2 * experts, experts)
    beside = _all_channels(blocks) if mixed[:1] == ("masked_prepacked",) else ()
    for name in tuning.ranking(shape, len(groups.expert_N), len(used)):
        backend = BACKENDS.get(name)
        if backend is not None and backend.suits(blocks) and backend.affordable(blocks, used, beside):
            return backend.path
    return None
