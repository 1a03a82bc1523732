"""What a stage costs on a device: attention, experts, head; on one unit, on two that share a memory, on tensor ranks.

    projections  2 m P flop, P weights                          m rows, P parameters of one layer's attention
    scores       4 pairs heads head_dim flop, keys and values   prefill and decode are two operators
    entry        2 m P flop, its bytes and m rows in and out    once over the rows of all experts that share it
Every operator is a roofline (`cost.op_time`); norms and embeddings are ignored. Two units: 2409.01141, section V-B.
Units: seconds, bytes, flop. Numbers that are not weights have 16 bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from moesaic.errors import MoesaicError
from moesaic.schedule.card import Card
from moesaic.schedule.collective import Traffic, allreduce
from moesaic.schedule.cost import fit_roofline, op_time, read_op_times
from moesaic.schedule.family import near
from moesaic.schedule.placement import Placement
from moesaic.schedule.split import coprocess
from moesaic.schedule.topology import Topology, Unit
from moesaic.schedule.work import ANY, Call, Key

NUMBER = 2.0  # bytes of an activation, a key or a value
SPLITS_KEPT = 1 << 16  # splits remembered: moments repeat their token counts, but not for ever

SPLITS = ("coprocess", "xpu", "pim")
COLLECTIVES = ("flat", "hierarchical", "2dh", "coordinated", "cheapest", "coherent")


@dataclass(frozen=True)
class StageLoad:
    """What a stage carries beside expert calls.

    prefill_pairs, decode_pairs: sum over tokens of the context each attends to.
    prefill_context: tokens whose keys and values prefill chunks read, once per chunk; decode reads `decode_pairs`.
    outputs: rows that go through the head.
    """

    prefill_tokens: int
    decode_tokens: int
    prefill_pairs: int
    decode_pairs: int
    prefill_context: int
    outputs: int

    @property
    def rows(self) -> int:
        return self.prefill_tokens + self.decode_tokens

    def shared_by(self, devices: int) -> "StageLoad":
        """The part of the busiest of `devices`: prefill cut evenly, decode dealt by sequence."""
        if devices == 1:
            return self
        decode = -(-self.decode_tokens // devices)
        return StageLoad(
            -(-self.prefill_tokens // devices),
            decode,
            -(-self.prefill_pairs // devices),
            -(-self.decode_pairs * decode // max(self.decode_tokens, 1)),  # a sequence is whole on one device
            -(-self.prefill_context // devices),
            -(-self.outputs // devices),
        )


class LayerCost(NamedTuple):
    """The experts of a moment: seconds of the slowest device, and of collectives that nothing hides.

    Bytes are what one device sends inside its node and to others; busy: seconds each unit of a device works, the mean
    of devices.
    """

    experts_s: float
    collective_s: float
    intra_bytes: float
    inter_bytes: float
    busy: tuple[float, ...]


@dataclass(frozen=True)
class Overhead:
    """Seconds beside the operators: of a stage, a layer, an entry that is run, a further chunk of an overlap.

    0 where nobody measured them: rooflines are lower bounds.
    """

    step: float = 0.0
    layer: float = 0.0
    op: float = 0.0
    chunk: float = 0.0

    def __post_init__(self) -> None:
        if min(self.step, self.layer, self.op, self.chunk) < 0:
            raise MoesaicError(f"{self}: seconds must be at least 0")


@dataclass(frozen=True)
class CostSpec:
    """How a stage is spread over units and devices.

    split:       experts on two units of a device: "coprocess" both, "xpu" or "pim" all on the unit of that name.
    placement:   where experts live; None = one device, or one group of tensor ranks.
    collective:  all-to-all variant, two a layer; "coherent" is one a layer and an AllGather a stage (2401.08383);
                 None = all devices hold all tokens.
    tensor:      ranks of a node that slice what is not an expert, and without a placement the experts too.
    overlap:     chunks in which all-to-all and experts are pipelined.
    adaptive_r:  choose degree, chunks and variant by capacity (2206.03382).
    capacity:    factor f of slots a token-expert pair, what does not fit is dropped; 0 drops nothing.
    leave:       share of a layer's tokens that change device, inter_leave that change node; None = experts anywhere.
                 It matters to "flat" and "coherent": the other variants send equal parts to all.
    efficiency:  share of a unit's bandwidth that is reached.

    Raises MoesaicError for a value that is none of these, with the nearest name.
    """

    split: str | None = None
    placement: Placement | None = None
    collective: str | None = None
    tensor: int = 1
    overlap: int | Literal["best"] = 1
    adaptive_r: bool = False
    capacity: float = 0.0
    leave: float | None = None
    inter_leave: float | None = None
    efficiency: float = 1.0
    overhead: Overhead = Overhead()

    def __post_init__(self) -> None:
        for value, known, what in ((self.split, SPLITS, "split"), (self.collective, COLLECTIVES, "collective")):
            if value is not None and value not in known:
                raise near(value, known, what)
        if self.tensor < 1 or (self.overlap != "best" and self.overlap < 1):
            raise MoesaicError(f"tensor {self.tensor} and overlap {self.overlap}: expected at least 1 rank and chunk")
        if not 0 < self.efficiency <= 1:
            raise MoesaicError(f"efficiency {self.efficiency}: expected a share above 0 and up to 1")
        if not 0 <= self.capacity < float("inf"):
            raise MoesaicError(f"capacity {self.capacity}: expected a factor above 0, or 0 to drop nothing")


class Times(dict[float, float]):
    """Seconds of one stored entry by the rows that run through it, computed when first looked up."""

    def __init__(self, unit: Unit, params: float, size: float, row: float, launch: float) -> None:
        super().__init__()
        self.unit, self.params, self.size, self.row, self.launch = unit, params, size, row, launch

    def __missing__(self, tokens: float) -> float:
        seconds = op_time(self.unit, 2.0 * tokens * self.params, self.size + tokens * self.row) + self.launch
        self[tokens] = seconds
        return seconds


def rows_of(calls: Sequence[Call]) -> dict[Key, int]:
    """Rows that run through each entry: of all experts that share it."""
    rows: dict[Key, int] = {}
    for call in calls:
        tokens = call.tokens
        for key in call.keys:
            rows[key] = rows.get(key, 0) + tokens
    return rows


class StageCost:
    """One device, or `spec.tensor` ranks of a node as one device of so many times the rates, with their all-reduces.

    sizes: bytes of each entry. A call of layer ANY stands for all layers: its entry has the bytes of all of them.
    `attention` is one layer's, with the FFN that all tokens share; `ends` is once a stage.

    Raises MoesaicError for tensor ranks that do not divide a node, and a split on a machine without such units.
    """

    def __init__(self, card: Card, sizes: Mapping[Key, int], machine: Topology, spec: CostSpec | None = None) -> None:
        self.card, self.sizes, self.machine = card, sizes, machine
        self.spec = spec = spec or CostSpec()
        if machine.per_node % spec.tensor:
            raise MoesaicError(f"{spec.tensor} tensor ranks do not divide the {machine.per_node} devices of a node")
        self.units = tuple(_scaled(unit, spec) for unit in machine.units)
        self.used = [self.units.index(unit) for unit in self._chosen()]
        heads, kv = card.heads * card.head_dim, card.kv_heads * card.head_dim
        self.attention_params = 2 * card.d * (heads + kv)
        self.head_params = card.d * card.vocab
        self.kv_layer = 2 * kv * NUMBER  # bytes of a token's keys and values in one layer
        self.pair_flops = 4.0 * heads
        self.tables = [self._table(self.units[each]) for each in self.used]
        self._reduced: dict[int, Traffic] = {}

    def _chosen(self) -> tuple[Unit, ...]:
        """The units that run, the one strong in flops first."""
        if self.spec.split is None:
            return self.units[:1]
        if self.spec.split != "coprocess":
            name = self.machine.unit(self.spec.split).name
            return tuple(unit for unit in self.units if unit.name == name)
        if len(self.units) < 2:
            raise MoesaicError(f"split coprocess needs two units that share a memory; {self.machine.name} has one")
        return self.units[:2]

    def _table(self, unit: Unit) -> dict[Key, Times]:
        """Entries of equal bytes share their times."""
        card, shared, table = self.card, {}, {}
        for key, size in self.sizes.items():
            layers = card.layers if key.layer == ANY else 1
            if (size, layers) not in shared:
                params = size / card.weight_bytes
                row = NUMBER * (card.matrices * card.d * layers + params / card.d)  # m k + m n of each matrix
                shared[size, layers] = Times(unit, params, size, row, self.spec.overhead.op * layers)
            table[key] = shared[size, layers]
        return table

    # -- one layer -----------------------------------------------------------------------------------------------------
    def attention(self, load: StageLoad) -> float:
        """Seconds of one layer without its routed experts: projections, scores, the FFN that all tokens share."""
        rows = load.rows
        if not rows:
            return 0.0
        seconds = self._dense(self.attention_params, rows) + self._scores(load) + self.spec.overhead.layer
        if self.card.shared_params:
            seconds += self._dense(self.card.shared_params, rows)
        return seconds + self._reduce(rows).seconds

    def _dense(self, params: int, rows: int) -> float:
        """Weights that all rows use, on the faster unit."""
        flops, size = 2.0 * rows * params, params * self.card.weight_bytes
        return min(op_time(self.units[each], flops, size) for each in self.used)

    def _scores(self, load: StageLoad) -> float:
        """Prefill and decode one after the other; with two units at the same time where that is faster."""
        prefill, decode = (
            [op_time(self.units[each], pairs * self.pair_flops, read * self.kv_layer) for each in self.used]
            for pairs, read in ((load.prefill_pairs, load.prefill_context), (load.decode_pairs, load.decode_pairs))
        )
        alone = min(a + b for a, b in zip(prefill, decode, strict=True))
        return alone if len(self.used) == 1 else min(alone, max(prefill[0], decode[1]))

    def experts(self, calls: Sequence[Call], load: StageLoad) -> LayerCost:
        """One moment, or a part of one."""
        table = self.tables[0]
        seconds = 0.0
        for key, rows in rows_of(calls).items():
            seconds += table[key][rows]
        return self._layer(calls, load, seconds, (seconds,))

    def _layer(self, calls: Sequence[Call], load: StageLoad, seconds: float, used: Sequence[float]) -> LayerCost:
        busy = [0.0] * len(self.units)
        for each, time in zip(self.used, used, strict=True):
            busy[each] = time
        if self.spec.tensor == 1:
            return LayerCost(seconds, 0.0, 0.0, 0.0, tuple(busy))
        sent = self._reduce(min(load.rows, sum(call.tokens for call in calls)))
        times = self.card.layers if calls and calls[0].layer == ANY else 1
        return LayerCost(seconds, times * sent.seconds, times * sent.intra_bytes, 0.0, tuple(busy))

    def _reduce(self, rows: int) -> Traffic:
        """The all-reduce of `rows` rows over the tensor ranks."""
        if rows not in self._reduced:
            ranks = self.spec.tensor
            size = rows * self.card.d * NUMBER if ranks > 1 else 0.0
            self._reduced[rows] = allreduce(self.machine.spread(ranks, ranks), size)
        return self._reduced[rows]

    # -- once a stage --------------------------------------------------------------------------------------------------
    def ends(self, load: StageLoad) -> float:
        """Seconds of a stage beside its layers: the head, and what a stage costs however small."""
        head = self._dense(self.head_params, load.outputs) if load.outputs else 0.0
        return head + self.spec.overhead.step

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of `tokens` tokens' keys and values in all layers."""
        return int(tokens * self.card.layers * self.kv_layer)


class SplitCost(StageCost):
    """Two units of a device run the experts at the same time, by the best split of `split.coprocess`.

    Entries of different bytes need tables of their own and are split size by size, one after the other.
    """

    def __init__(self, card: Card, sizes: Mapping[Key, int], machine: Topology, spec: CostSpec) -> None:
        super().__init__(card, sizes, machine, spec)
        first, second = self.tables
        self._groups = {id(first[key]): (first[key], second[key]) for key in sizes}
        self._group_of = {key: id(first[key]) for key in sizes}
        self._best = lru_cache(SPLITS_KEPT)(self._split)

    def experts(self, calls: Sequence[Call], load: StageLoad) -> LayerCost:
        """One moment, or a part of one."""
        groups: dict[int, list[int]] = {}
        for key, rows in rows_of(calls).items():
            groups.setdefault(self._group_of[key], []).append(rows)
        seconds = first = second = 0.0
        for group, tokens in groups.items():
            tokens.sort()
            both, a, b = self._best(group, tuple(tokens))
            seconds, first, second = seconds + both, first + a, second + b
        return self._layer(calls, load, seconds, (first, second))

    def _split(self, group: int, tokens: tuple[int, ...]) -> tuple[float, float, float]:
        first, second = self._groups[group]
        split = coprocess(tokens, first.__getitem__, second.__getitem__)
        return split.seconds, split.first_seconds, split.second_seconds


def stage_cost(card: Card, sizes: Mapping[Key, int], machine: Topology, spec: CostSpec | None = None) -> StageCost:
    """The cost of a stage as `spec` spreads it; raises MoesaicError for a spec that the machine cannot run."""
    from moesaic.simulate.cluster_cost import AdaptiveCost, ClusterCost  # they are made of what is above

    spec = spec or CostSpec()
    if spec.placement is not None:
        return (AdaptiveCost if spec.adaptive_r else ClusterCost)(card, sizes, machine, spec)
    if spec.adaptive_r or spec.capacity or spec.collective:
        raise MoesaicError("capacity, collective and adaptive_r need a placement of the experts on devices")
    if spec.split == "coprocess":
        return SplitCost(card, sizes, machine, spec)
    return StageCost(card, sizes, machine, spec)


def calibrated(machine: Topology, op_times: str | Path, gpu: str, d: int = 4096, ffn: int = 11008) -> Topology:
    """The machine with the rates that a GPU reached in a measured gated FFN, in place of its first unit's peaks.

    op_times: a file of `cost.read_op_times` with mlp_up_proj (gate and up in one) and mlp_down_proj of an FFN of
    (d, ffn) in 16 bits; the defaults are Llama-2-7B's.
    Raises MoesaicError for a file that cannot be read, or without these operators.
    """
    measured = read_op_times(op_times, gpu)
    points = []
    for op, inputs, outputs in (("mlp_up_proj", d, 2 * ffn), ("mlp_down_proj", ffn, d)):
        for m in measured.tokens:
            size = NUMBER * (inputs * outputs + m * (inputs + outputs))
            points.append((2.0 * m * inputs * outputs, size, measured.time(op, m)))
    unit = machine.units[0]
    fit = fit_roofline(*np.array(points).T)
    return replace(machine, units=(fit.unit(unit.name, unit.tier), *machine.units[1:]))


def _scaled(unit: Unit, spec: CostSpec) -> Unit:
    """The unit at the bandwidth it reaches, as many times as there are tensor ranks."""
    bandwidth = unit.bandwidth * spec.efficiency * spec.tensor
    return replace(unit, flops=unit.flops * spec.tensor, bandwidth=bandwidth)
