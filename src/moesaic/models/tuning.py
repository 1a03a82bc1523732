"""Make inference of a loaded model faster on this CPU: measure its layers' backends once, pack its dense products."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moesaic.errors import MoesaicError
from moesaic.experts import tuning
from moesaic.experts.bank import FFNBank
from moesaic.experts.channel_blocks import ChannelBlocks
from moesaic.experts.copies import own_bytes
from moesaic.experts.measure import Layer, cells, measure, rotation, unlimited
from moesaic.experts.packed import PackedLinear, pack_linears
from moesaic.progress import Progress


@dataclass(frozen=True)
class Tuned:
    """What was measured. `shapes`: microseconds of a layer by shape, cell and backend."""

    shapes: dict[str, tuning.Times]
    file: Path
    fresh: int  # cells measured by this call; the others stood in the file
    disturbed: int  # of those, not kept: other programs ran

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the choice of each cell."""
        return {
            "file": str(self.file),
            "machine": tuning.machine(),
            "threads": torch.get_num_threads(),
            "measured": self.fresh,
            "disturbed": self.disturbed,
            "shapes": {
                shape: [
                    {"tokens": cell[0], "experts": cell[1], "choice": tuning.rank(row)[0], "microseconds": row}
                    for cell, row in times.items()
                ]
                for shape, times in self.shapes.items()
            },
        }


def tune(model: nn.Module, *, again: bool = False) -> Tuned:
    """Measure which backend computes this model's expert layers fastest on this machine, and remember it.

    For CPUs. Every process of the user then chooses by it for layers of these shapes, with as many threads. Measures
    what the table lacks; `again` all. What other programs disturb is not kept. Takes seconds for each shape of a layer;
    needs up to a GiB for copies meanwhile.

    Raises MoesaicError for a model without expert layers, or on another device.
    """
    shapes: dict[str, list[Layer]] = {}
    for layer in expert_layers(model):
        shapes.setdefault(_shape(layer), []).append(layer)
    disturbed = 0
    wanted = {shape: cells(_experts(layers[0]), _whole(layers[0])) for shape, layers in shapes.items()}
    known = {shape: tuning.measured(shape) for shape in shapes}
    missing = {shape: [c for c in wanted[shape] if again or c not in known[shape]] for shape in shapes}
    with Progress("tune", total=sum(map(len, missing.values())), unit="cells") as progress, _evaluating(model):
        for shape, layers in shapes.items():
            if not missing[shape]:
                continue
            turns = rotation(layers)
            with unlimited(turns):
                for cell in missing[shape]:
                    row, steady = measure(turns, cell)
                    if steady:
                        known[shape][cell] = row
                    else:
                        disturbed += 1
                    progress.advance()
            tuning.save(shape, known[shape])
    return Tuned(known, tuning.cache_file(), sum(map(len, missing.values())), disturbed)


def expert_layers(model: nn.Module) -> list[Layer]:
    """The channel blocks and banks of a model, which lie on a CPU.

    Raises MoesaicError if there are none, or they lie elsewhere.
    """
    layers: list[Layer] = [m for m in model.modules() if isinstance(m, ChannelBlocks | FFNBank)]
    if not layers:
        raise MoesaicError("this model has no expert layers to tune: expected one that moesaic refactored or routed")
    if elsewhere := {p.device.type for layer in layers for p in layer.parameters()} - {"cpu"}:
        raise MoesaicError(f"the model is on {elsewhere.pop()}: backends are measured on CPUs only; load it there")
    return layers


def _shape(layer: Layer) -> str:
    return tuning.blocks_shape(layer) if isinstance(layer, ChannelBlocks) else tuning.bank_shape(layer)


def _experts(layer: Layer) -> int:
    return layer.layout.experts if isinstance(layer, ChannelBlocks) else layer.experts


def _whole(layer: Layer) -> bool:
    return isinstance(layer, ChannelBlocks) and layer.layout.is_whole


@contextlib.contextmanager
def _evaluating(model: nn.Module):  # type: ignore[no-untyped-def]
    """No dropout while times are taken."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def optimize(model: nn.Module, *, copies: int | None = None) -> dict[str, int]:
    """Prepare a loaded model, dense or moesaic, for inference on a CPU, in place; it cannot be trained or saved after.

    Linear layers outside the experts (attention, output head, and a dense model's FFNs) are packed into oneDNN's order
    and their weights let go; the pre-gate is left as it is, so that routes stay bit for bit what they were.

    copies:     bytes that copies of experts may take in all layers together; None leaves the limits as they are: as
                many bytes as the expert weights themselves, and at least 64 MiB a layer.

    Returns bytes: "packed" of linear layers, "limit" of all copies. Raises MoesaicError for a model elsewhere than on a
    CPU, and for negative bytes.
    """
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise MoesaicError("optimize packs weights for CPUs, but the model lies elsewhere: load it on the CPU")
    layers = [m for m in model.modules() if isinstance(m, ChannelBlocks | FFNBank)]
    if copies is not None:
        limit_copies(layers, copies)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    packed = pack_linears(getattr(model, "backbone", model))
    return {"packed": packed, "limit": sum(layer.copies.limit_for(layer) or 0 for layer in layers)}


def limit_copies(layers: Sequence[Layer], limit: int) -> None:
    """Share `limit` bytes of copies among layers by the size of their weights; copies made before are let go."""
    if limit < 0:
        raise MoesaicError(f"copies = {limit}: expected a number of bytes, 0 or more")
    sizes = [own_bytes(layer) for layer in layers]
    for layer, size in zip(layers, sizes, strict=True):
        layer.copies.clear()
        layer.copies.limit = limit * size // sum(sizes)


def refuse_packed(model: nn.Module) -> None:
    """Raise MoesaicError if `optimize` took the weights that a checkpoint would need."""
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise MoesaicError("this model was optimized for inference and cannot be saved: load it again and save that")
