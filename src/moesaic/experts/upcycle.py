"""Experts from a dense FFN: copies (sparse upcycling, 2212.05055) or slices of it (Union of Experts, 2503.02495)."""

import torch
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.experts.bank import FFNBank
from moesaic.experts.channel_blocks import FFNWeights
from moesaic.experts.pool import Pool


@torch.no_grad()
def fill_copies(bank: FFNBank, weights: FFNWeights, noise: float = 0.0) -> None:
    """Every expert becomes the dense FFN, plus noise of `noise` times each weight's standard deviation."""
    stacked = torch.cat([w for w in (weights.gate, weights.up) if w is not None])
    _expect(bank, weights, bank.hidden == len(weights.up))
    if (bank.down_bias is None) != (weights.down_bias is None):
        raise MoesaicError("the down bias is in the dense FFN or in the experts, but not in both")
    for target, source in ((bank.gate_up, stacked), (bank.down, weights.down)):
        target.copy_(source.expand_as(target))
        if noise:
            target.add_(torch.randn_like(target) * (noise * source.std()))
    if bank.gate_up_bias is not None:
        bank.gate_up_bias.copy_(torch.cat([b for b in (weights.gate_bias, weights.up_bias) if b is not None]))
    if bank.down_bias is not None and weights.down_bias is not None:
        bank.down_bias.copy_(weights.down_bias)


@torch.no_grad()
def fill_slices(banks: list[FFNBank], weights: FFNWeights, scale: float = 1.0) -> None:
    """Cut the dense FFN's channels, in order, into the experts of `banks`; with all of them on it is the dense FFN.

    scale:  of the first bank's down projections, to make up for routed weights below one (E for raw probabilities).
    """
    start = 0
    for number, bank in enumerate(banks):
        for expert in range(bank.experts):
            rows = slice(start, start + bank.hidden)
            start += bank.hidden
            parts = [w[rows] for w in (weights.gate, weights.up) if w is not None]
            _expect(bank, weights, len(parts[-1]) == bank.hidden)
            bank.gate_up[expert] = torch.cat(parts)
            bank.down[expert] = weights.down[:, rows] * (scale if number == 0 else 1.0)
            if bank.gate_up_bias is not None:
                biases = [b[rows] for b in (weights.gate_bias, weights.up_bias) if b is not None]
                bank.gate_up_bias[expert] = torch.cat(biases)
    _expect(banks[0], weights, start == len(weights.up))


def slice_dense(weights: FFNWeights, experts: int, activation: object, *, shared: int = 0, scale: float = 1.0) -> Pool:
    """A pool of `experts` routed and `shared` shared slices of equal width that together are the dense FFN.

    The down bias is added once, outside the experts. Raises MoesaicError if the width cannot be cut evenly.
    """
    channels, width = weights.up.shape
    if channels % (experts + shared):
        raise MoesaicError(f"{channels} channels cannot be cut evenly into {experts} + {shared} experts")
    hidden = channels // (experts + shared)
    options = {"gated": weights.gate is not None, "up_bias": weights.up_bias is not None}
    banks = [FFNBank(n, width, hidden, activation, **options) for n in (experts, shared) if n]  # type: ignore[arg-type]
    fill_slices(banks, weights, scale)
    return Pool(banks[0], shared=banks[1] if shared else None, bias=weights.down_bias)


def _expect(bank: FFNBank, weights: FFNWeights, fits: bool) -> None:
    shape: Tensor = weights.up
    if (bank.gate_up_bias is None) != (weights.up_bias is None):
        raise MoesaicError("the up bias is in the dense FFN or in the experts, but not in both")
    if not fits or bank.width != shape.shape[1] or bank.gated != (weights.gate is not None):
        raise MoesaicError(
            f"a dense FFN of {tuple(shape.shape)} {'with' if weights.gate is not None else 'without'} gate does not "
            f"fill {bank.experts} experts of {bank.hidden} x {bank.width} {'with' if bank.gated else 'without'} gate"
        )
