"""Experts in few bits: read from the checkpoint as they are, quantised at once, and only the result is kept.

    QuantizedMemory    what an ExpertStore moves entries with: an entry is a whole expert of a layer, and has its place
                       in virtual memory, with pages only while it is resident
    QuantizedExperts   the experts of one layer over that memory

Reading is that of `ExpertMemory`, whose pages an expert has only until it is quantised.
Shapes: M tokens of one expert, D model width, W channels of an expert, filled up; R matrices of rows.
"""

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import MoesaicError
from moesaic.experts.lowbit import QuantizedWeight
from moesaic.experts.lowbit_sizes import bits_of, filled_inputs
from moesaic.schedule.work import Key, Layout
from moesaic.serve.arena import Arena
from moesaic.serve.lowbit_entries import DOWN, GATE, LINE, Shape, served_entries, shape_of
from moesaic.serve.model_files import ModelFiles
from moesaic.serve.store import EntryMemory, ExpertMemory


class Matrices(NamedTuple):
    """An expert: `first` (R W, D) with its bias, one after the other what the activation takes; `down` (D, W)."""

    first: QuantizedWeight
    bias: Tensor | None
    down: QuantizedWeight


class QuantizedMemory:
    """Whole experts in `bits` a weight.

    files:       reads an expert's parts as they are stored, in the dtype of the rows that will run.
    sizes:       bytes of each entry, whole pages.
    transposed:  the checkpoint has a row of `down` for every channel.
    """

    def __init__(self, files: ExpertMemory, sizes: Mapping[Key, int], bits: int, transposed: bool) -> None:
        self.source, self.bits, self.transposed = files, bits, transposed
        self.parts = files.parts
        keys = sorted(sizes)
        starts = [0, *accumulate(sizes[key] for key in keys)]
        self._ranges = {key: (starts[i], starts[i + 1]) for i, key in enumerate(keys)}
        self._shapes = {key: shape_of(files.files, files.parts[key]) for key in keys}
        self._arena = Arena(starts[-1])
        self._loaded: dict[Key, Matrices] = {}

    @property
    def resident(self) -> int:
        """Bytes of pages that hold entries."""
        return sum(stop - start for start, stop in map(self._ranges.__getitem__, list(self._loaded)))

    def matrices(self, key: Key) -> Matrices:
        """An entry that is loaded."""
        return self._loaded[key]

    def load(self, *keys: Key) -> None:
        """Read and quantise entries. Raises MoesaicError, naming the file, if some cannot be had.

        Then none of them is loaded that was not before.
        """
        new = [key for key in dict.fromkeys(keys) if key not in self._loaded]
        try:
            for key in new:
                self.source.load(key)
                try:
                    self._loaded[key] = self._quantised(key)
                finally:
                    self.source.release(key)
        except BaseException:
            for key in new:
                self.release(key)
            raise

    def release(self, key: Key) -> None:
        """Give back the entry's pages."""
        if self._loaded.pop(key, None) is not None:
            self._arena.release(*self._ranges[key])

    def close(self) -> None:
        """Close the files."""
        self.source.close()

    @torch.no_grad()
    def _quantised(self, key: Key) -> Matrices:
        rows_RWD, bias_RW, down_DW = raw_matrices(self.source, key, self._shapes[key], self.transposed)
        more = filled_inputs(down_DW.shape[1], self.bits) - down_DW.shape[1]
        at = self._ranges[key][0]

        def place(tensor: Tensor) -> Tensor:
            nonlocal at
            own = self._arena.tensor(at, tuple(tensor.shape), tensor.dtype)
            at += -(-tensor.numel() * tensor.element_size() // LINE) * LINE
            return own.copy_(tensor)

        if more:
            rows_RWD, down_DW = F.pad(rows_RWD, (0, 0, 0, more)), F.pad(down_DW, (0, more))
        first = QuantizedWeight(rows_RWD.flatten(0, 1), self.bits).moved(place)
        down = QuantizedWeight(down_DW, self.bits).moved(place)
        return Matrices(first, None if bias_RW is None else place(F.pad(bias_RW, (0, more)).flatten()), down)


def raw_matrices(
    memory: ExpertMemory, key: Key, shape: Shape, transposed: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A loaded expert's rows (R, W, D), their biases (R, W) and `down` (D, W), as they are stored."""
    rows: dict[str, list[Tensor]] = {}
    for part in memory.parts[key]:
        place = memory.files.tensors[part.tensor]
        each = (place.stop - place.start) // place.shape[0]
        first, last = ((at - place.start) // each for at in (part.start, part.stop))
        rows.setdefault(part.tensor, []).append(memory.tensor(part.tensor)[first:last])
    found = {name: torch.cat(pieces) for name, pieces in rows.items()}
    first_names = sorted(
        (name for name in found if not DOWN.fullmatch(name)), key=lambda name: not GATE.fullmatch(name)
    )
    down = next(found[name] for name in found if DOWN.fullmatch(name))
    down = down.T if transposed else down.reshape(shape.hidden, shape.width)
    biases = [found[name] for name in first_names if found[name].ndim == 1]
    matrices = [found[name].reshape(-1, shape.width, shape.hidden) for name in first_names if found[name].ndim > 1]
    return torch.cat(matrices), torch.stack(biases) if biases else None, down


def entry_memory(
    config: Mapping[str, Any], files: ModelFiles, weights: str, dtype: torch.dtype, drop: bool
) -> tuple[Layout, ExpertMemory, EntryMemory]:
    """What is cached, what reads it from the files, and what holds it: the same where experts stay as stored."""
    bits = bits_of(weights)
    layout, parts = served_entries(config, files, weights, dtype.itemsize)
    source = ExpertMemory(files, parts, dtype, drop)
    if bits is None:
        return layout, source, source
    return layout, source, QuantizedMemory(source, layout.bytes, bits, transposed=bool(config.get("layouts")))


class QuantizedExperts:
    """The experts of layer `layer`: y = down activate(first x), with `down_bias` where there is one."""

    def __init__(
        self, memory: QuantizedMemory, layer: int, activate: Callable[[Tensor], Tensor], down_bias: Tensor | None = None
    ) -> None:
        self.memory, self.layer, self.activate, self.down_bias = memory, layer, activate, down_bias
        self.count = sum(key.layer == layer for key in memory.parts)
        if bool(activate(torch.zeros(1, 2)).any()):
            raise MoesaicError("these experts' activation makes something of nothing: serve them with --weights stored")

    def packed(self, expert: int) -> bool:
        """Whether it takes rows beyond the step's tokens: never, for each of them costs."""
        return False

    def run(self, expert: int, x_MD: Tensor, prompts: int | None = None) -> Tensor:
        """(M, D) -> (M, D). Rows from number `prompts` on are of prompts."""
        first, bias, down = self.memory.matrices(Key(self.layer, expert))
        y_MD = down(self.activate(first(x_MD, bias, prompts)), None, prompts)
        return y_MD if self.down_bias is None else y_MD.add_(self.down_bias)
