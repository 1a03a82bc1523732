"""What a step of a model has to do at least, from its configuration and headers alone; without torch.

Bytes that must be read: weights that every token uses, the entries of the experts that run, keys and values of decode
tokens. Flop: two for each weight and row, four for each number of a query and token it attends to.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.experts.lowbit_sizes import bits_of, matrix_bytes
from moesaic.schedule.card import Card
from moesaic.schedule.work import Key, keys_of
from moesaic.serve.lowbit_entries import (
    HEADS,
    PREGATE,
    looked_up,
    quantized,
    served_entries,
    shape_of,
    whole_experts,
)
from moesaic.serve.memory_plan import ITEM_BYTES, AttentionShape, MemoryPlan, served_dtype, text_config
from moesaic.serve.model_files import BITS, CONFIG, ModelFiles, read_json
from moesaic.simulate.calibration import Calibration, Costs, Model, Reads


@dataclass
class Load:
    """What ran in one step. rows: of each expert, in every layer alike; pairs: tokens attended to, over all tokens."""

    prefill: int = 0
    decode: int = 0
    prefill_pairs: int = 0
    decode_pairs: int = 0
    rows: Counter[int] = field(default_factory=Counter)
    outputs: int = 0


class ModelWork:
    """A refactored model's sizes in the dtype and the weights that it is served in.

    Raises MoesaicError for a folder that is none.
    """

    def __init__(self, folder: str | Path, dtype: str = "auto", weights: str = "stored") -> None:
        self.files = ModelFiles(folder)
        self.config = read_json(self.files.folder / CONFIG)
        if not self.config.get("layouts"):
            raise MoesaicError(f"{folder} is no refactored model: give what moesaic refactor wrote")
        self.dtype = served_dtype(self.config, dtype)
        self.item = ITEM_BYTES[self.dtype]
        self.weights, self.bits = weights, bits_of(weights)
        self.layout, self.parts = served_entries(self.config, self.files, weights, self.item)
        self.shape = AttentionShape.of(text_config(self.config))
        self.experts = int(self.config["layouts"][0][0])
        self.expert_bytes = [
            sum(self.layout.bytes[key] for layer in self.layout.layers for key in self.layout.entries[layer, expert])
            for expert in range(self.experts)
        ]
        whole = whole_experts(self.layout, self.parts)
        self._shapes = {key: shape_of(self.files, parts) for key, parts in whole.items()}
        self.expert_numbers = [
            sum(shape.numbers for key, shape in self._shapes.items() if key.unit == expert)
            for expert in range(self.experts)
        ]
        self.card = self._card()
        self._dense_bytes, self._row_params, self._output_params = self._dense()

    @property
    def model(self) -> Model:
        """Which model this is. Weights are not looked at: they change routes, but no step."""
        files = {place.file for place in self.files.tensors.values()}
        return Model(
            self.files.folder.resolve().name,
            self.dtype,
            fingerprint(self.config, self.files),
            sum(file.stat().st_size for file in files),
            self.weights,
        )

    def amounts(self, load: Load) -> tuple[float, ...]:
        """In the order of `Costs`."""
        calls, size = self.called(load.rows)
        return 1, load.prefill, load.decode, load.prefill_pairs, load.decode_pairs, calls, size

    def called(self, experts: Mapping[int, int]) -> tuple[int, int]:
        """Calls of these experts in all layers, and the bytes they read."""
        return len(experts) * self.card.layers, sum(self.expert_bytes[expert] for expert in experts)

    def least_bytes(self, load: Load) -> int:
        """What must be read, every entry once."""
        calls = [self.layout.calls([{expert: 1}]) for expert in load.rows]
        entries = {key for each in calls for key in keys_of(each)}
        keys = 2 * self.shape.keys * self.shape.layers * self.item * load.decode_pairs
        return self._dense_bytes + sum(self.layout.bytes[key] for key in entries) + keys

    def least_flop(self, load: Load) -> float:
        """What must be computed."""
        rows = load.prefill + load.decode
        experts = sum(count * self.expert_numbers[expert] for expert, count in load.rows.items())
        pairs = (load.prefill_pairs + load.decode_pairs) * self.shape.query * self.shape.layers
        return 2.0 * (rows * self._row_params + load.outputs * self._output_params + experts) + 4.0 * pairs

    def _card(self) -> Card:
        text, sites, layouts = text_config(self.config), self.config["sites"], self.config["layouts"]
        heads = next((text[n] for n in ("num_attention_heads", "n_head", "n_heads") if text.get(n)), 1)
        width = self.shape.query // heads
        return Card(
            model=self.files.folder.resolve().name,
            layers=len(layouts),
            experts=self.experts,
            top_k=1,
            known_at="request",
            d=int(sites[0]["hidden"]),
            ffn=max(int(source) for _, source, _ in layouts),
            heads=heads,
            kv_heads=max(self.shape.keys // width, 1),
            head_dim=width,
            vocab=int(text["vocab_size"]),
            matrices=3 if sites[0].get("gate") else 2,
            weight_bytes=self.item if self.bits is None else sum(self.expert_bytes) / sum(self.expert_numbers),
            blocks=tuple(self._blocks(layer, blocks) for layer, (_, _, blocks) in enumerate(layouts)),
        )

    def _blocks(self, layer: int, blocks: Sequence[Any]) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Channels and owners; in few bits every expert has its own."""
        if self.bits is None:
            return tuple((width, tuple(owners)) for width, owners in blocks)
        return tuple((self._shapes[Key(layer, expert)].width, (expert,)) for expert in range(self.experts))

    def _dense(self) -> tuple[int, int, int]:
        """Bytes that every step reads, and weights that a row and an output multiply."""
        stored, text = {part.tensor for ranges in self.parts.values() for part in ranges}, text_config(self.config)
        size = rows = outputs = 0
        for name, place in self.files.tensors.items():
            if name in stored or looked_up(name, place, text):
                continue
            own = 4 if name.startswith(PREGATE) else self.item
            if self.bits is not None and quantized(name, place, text):
                size += matrix_bytes(place.shape, self.bits, own)
            else:
                floats = place.dtype.startswith(("F", "BF"))
                size += place.elements * own if floats else place.elements * BITS[place.dtype] // 8
            if name.endswith(HEADS):
                outputs += place.elements
            elif len(place.shape) == 2:
                rows += place.elements
        if not outputs:  # the head shares the embedding's weights
            outputs = self.card.vocab * self.card.d
            tied = (self.card.vocab, self.card.d)
            size += outputs * self.item if self.bits is None else matrix_bytes(tied, self.bits, self.item)
        return size, rows, outputs


def fingerprint(config: Mapping[str, Any], files: ModelFiles) -> str:
    """Of the configuration and the tensors' names, dtypes and shapes."""
    shapes = sorted((name, place.dtype, place.shape) for name, place in files.tensors.items())
    return hashlib.sha256(json.dumps([config, shapes], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Expected:
    """A decode step of `requests` at `context` tokens each: seconds from one expert for all to as many as there are."""

    requests: int
    context: int
    least_s: float
    most_s: float


@dataclass(frozen=True)
class Speed:
    """What can be said of a plan. steps: with every expert in memory, at batches that were measured.

    miss_s, miss_disk_s: reading the largest expert of a layer from the page cache and the disk; None where all stay.
    """

    steps: list[Expected]
    miss_s: float | None = None
    miss_disk_s: float | None = None


def expected(calibration: Calibration, planned: MemoryPlan) -> Speed:
    """How fast the planned server decodes. Raises MoesaicError for a calibration of another model or dtype."""
    work = ModelWork(planned.model, planned.dtype, planned.weights)
    here, there = work.model, calibration.model
    if here.fingerprint != there.fingerprint:
        raise MoesaicError(
            f"the calibration is of another model, {there.name}: run moesaic bench {planned.model} for this one"
        )
    if here.dtype != there.dtype:
        raise MoesaicError(
            f"the calibration was measured in {there.dtype}, this plan is in {here.dtype}: run moesaic bench with "
            f"--dtype {here.dtype}"
        )
    if here.weights != there.weights:
        raise MoesaicError(
            f"the calibration was measured with weights {there.weights}, this plan is with {here.weights}: run moesaic "
            f"bench with --weights {here.weights}"
        )
    most = min(calibration.most_requests, planned.max_requests)
    context = min(planned.context, round(max(cell.context for cell in calibration.cells)))
    steps = [_expected(calibration.costs, work, batch, context) for batch in (1, 4, 8, 16, 32) if batch <= most]
    if planned.experts >= planned.all_experts:
        return Speed(steps)
    floors = calibration.floors
    return Speed(steps, _miss(work, floors.page_cache), _miss(work, floors.disk))


def _miss(work: ModelWork, reads: Reads) -> float:
    sizes = ([work.layout.bytes[key] for key in keys] for keys in work.layout.entries.values())
    return max(len(each) * reads.latency_s + sum(each) / reads.bytes_s for each in sizes)


def _expected(costs: Costs, work: ModelWork, requests: int, context: int) -> Expected:
    order = sorted(range(work.card.experts), key=lambda expert: work.expert_bytes[expert])
    few, many = order[:1], order[::-1][: min(requests, len(order))]
    seconds = [
        costs.seconds(work.amounts(Load(decode=requests, decode_pairs=requests * context, rows=Counter(experts))))
        for experts in (few, many)
    ]
    return Expected(requests, context, *seconds)
