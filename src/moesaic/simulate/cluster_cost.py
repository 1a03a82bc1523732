"""What a stage costs on several devices: experts by a placement, tokens exchanged twice a layer, or once.

    layer  attention of the busiest device + max over devices of their experts, overlapped with the all-to-alls
Attention is data-parallel over devices / tensor groups (2201.05596, section 5.2); a context-coherent stage has one
all-to-all a layer and one AllGather (2401.08383); `AdaptiveCost` is Tutel's degree r (2206.03382, section 3).
Units: seconds, bytes of one device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple, cast

from moesaic.errors import MoesaicError
from moesaic.schedule.adaptive import AdaptiveTable, Choice
from moesaic.schedule.card import Card
from moesaic.schedule.collective import Kind, Step, all_to_all, allgather, cheapest, step_traffic
from moesaic.schedule.cost import ExpertShape, best_chunks, expert_time, overlapped
from moesaic.schedule.placement import Placement, degrees
from moesaic.schedule.topology import Topology
from moesaic.schedule.work import ANY, Call, Key
from moesaic.simulate.stage_cost import NUMBER, CostSpec, LayerCost, StageCost, StageLoad, stage_cost

DEGREES = (1, 2, 4, 8)  # chunks of an overlap (2206.03382, section 3.2)


class Sent(NamedTuple):
    """Seconds of one layer's exchanges, and the bytes a device sends inside its node and to others."""

    seconds: float = 0.0
    intra: float = 0.0
    inter: float = 0.0


@dataclass
class Slots:
    """Token-expert pairs that asked for a slot and were dropped; slots that were run."""

    asked: int = 0
    dropped: int = 0
    run: int = 0

    @property
    def drop_share(self) -> float:
        return self.dropped / self.asked if self.asked else 0.0

    @property
    def padding_share(self) -> float:
        """Share of the slots that hold no token."""
        return 1 - (self.asked - self.dropped) / self.run if self.run else 0.0


class ClusterCost(StageCost):
    """Experts on the devices of `spec.placement`; slices of one are tensor ranks with their all-reduce.

    slots: what `spec.capacity` dropped and padded; it pads every expert of the layer to equal slots.

    Raises MoesaicError for a placement of another model or machine, and slots for experts stored in blocks.
    """

    def __init__(self, card: Card, sizes: Mapping[Key, int], machine: Topology, spec: CostSpec) -> None:
        super().__init__(card, sizes, machine, spec)
        placement = _checked(card, machine, spec)
        alone = replace(spec, placement=None, collective=None, capacity=0.0, adaptive_r=False, tensor=placement.parts)
        self.device = stage_cost(card, sizes, machine, alone)
        self.groups = machine.devices // spec.tensor  # that share the tokens
        self.homes = {at: tuple(each.device for each in shards) for at, shards in placement.shards.items()}
        self.copies = {at: placement.copies(at) for at in self.homes}
        self.slots = Slots()
        self._sent: dict[int, Sent] = {}

    # -- beside the experts --------------------------------------------------------------------------------------------
    def attention(self, load: StageLoad) -> float:
        """Seconds of one layer on the busiest device, without its routed experts."""
        return super().attention(load.shared_by(self.groups))

    def ends(self, load: StageLoad) -> float:
        """Head and overhead of the busiest device; the AllGather that makes all contexts known to all devices."""
        seconds = super().ends(load.shared_by(self.groups))
        if self.spec.collective == "coherent":
            size = -(-load.rows // self.machine.devices) * self.card.d * NUMBER
            seconds += allgather(self.machine, size * self.machine.devices).seconds
        return seconds

    # -- experts -------------------------------------------------------------------------------------------------------
    def experts(self, calls: Sequence[Call], load: StageLoad) -> LayerCost:
        """One moment, or a part of one."""
        if not calls:
            return self.device.experts(calls, load)
        layers = self.card.layers if calls[0].layer == ANY else 1
        if self.spec.capacity:
            calls = self._slotted(calls)
        ran = [self.device.experts(mine, load) for mine in self._dealt(calls)]
        compute, reduced = max(each.experts_s for each in ran), max(each.collective_s for each in ran)
        sent = self._exchange(sum(call.tokens for call in calls))
        total = self._overlapped(layers * sent.seconds, compute, layers)
        intra = sum(each.intra_bytes for each in ran) / self.machine.devices + layers * sent.intra
        busy = tuple(sum(times) / self.machine.devices for times in zip(*(each.busy for each in ran), strict=True))
        return LayerCost(compute, total - compute + reduced, intra, layers * sent.inter, busy)

    def _dealt(self, calls: Sequence[Call]) -> list[list[Call]]:
        """The calls of each device that has some; copies of an expert share its tokens evenly."""
        dealt: dict[int, list[Call]] = {}
        for call in calls:
            at = (max(call.layer, 0), call.expert)
            if (copies := self.copies[at]) > 1:
                call = call._replace(tokens=-(-call.tokens // copies))
            for device in self.homes[at]:
                dealt.setdefault(device, []).append(call)
        return list(dealt.values())

    def _overlapped(self, comm: float, compute: float, layers: int) -> float:
        overhead = layers * self.spec.overhead.chunk
        if self.spec.overlap == "best":
            return best_chunks(comm, compute, overhead, DEGREES)[1]
        return overlapped(comm, compute, self.spec.overlap, overhead)

    def _exchange(self, rows: int) -> Sent:
        """All exchanges of one layer in which `rows` token-expert pairs go to their experts and back."""
        if rows not in self._sent:
            self._sent[rows] = self._timed(-(-rows // self.groups))
        return self._sent[rows]

    def _timed(self, tokens: int) -> Sent:
        """`tokens` pairs a device; a group of tensor ranks holds the same ones."""
        kind, machine, width = self.spec.collective, self.machine, self.card.d * NUMBER
        if kind is None:
            return Sent()
        if kind in ("flat", "coherent"):
            both = step_traffic(Step(1, tokens, width, *self._leave()), machine, coherent=False)
            share = 0.5 if kind == "coherent" else 1.0  # a token stays where its expert was
            return Sent(share * both.seconds, share * both.intra_bytes, share * both.inter_bytes)
        size, tensor = tokens * width, self.spec.tensor
        name = cheapest(machine, size, tensor)[0] if kind == "cheapest" else cast(Kind, kind)
        once = all_to_all(name, machine, size, tensor)
        sent = Sent(2 * once.seconds, 2 * once.intra_bytes, 2 * once.inter_bytes)
        if name == "coordinated" and tensor > 1:  # only the way back is gathered: going, each rank takes its part
            gathered = allgather(machine.spread(tensor, tensor), size)
            sent = Sent(sent.seconds - gathered.seconds, sent.intra - gathered.intra_bytes, sent.inter)
        return sent

    def _leave(self) -> tuple[float, float]:
        """Shares of the tokens that change device and node."""
        p, m = self.machine.devices, self.machine.per_node
        leave, inter = self.spec.leave, self.spec.inter_leave
        leave = (p - 1) / p if leave is None else leave
        return leave, (leave * (p - m) / max(p - 1, 1) if inter is None else inter)

    # -- slots ---------------------------------------------------------------------------------------------------------
    def _capacity(self, calls: Sequence[Call]) -> int:
        """Slots of an expert: k int(f ceil(T / E)), at least 1; what the fullest one needs where f = 0."""
        if not self.spec.capacity:
            return max(call.tokens for call in calls)
        slots, experts = self.card.top_k, self.card.experts
        tokens = sum(call.tokens for call in calls) / slots
        return max(1, slots * int(self.spec.capacity * -(-tokens // experts)))

    def _counted(self, calls: Sequence[Call]) -> int:
        """The capacity, with what it drops and pads."""
        capacity = self._capacity(calls)
        self.slots.asked += sum(call.tokens for call in calls)
        self.slots.dropped += sum(max(0, call.tokens - capacity) for call in calls)
        self.slots.run += capacity * self.card.experts
        return capacity

    def _slotted(self, calls: Sequence[Call]) -> list[Call]:
        """Every expert of the layer with equal slots: what a padded batch of products runs."""
        layer, capacity = calls[0].layer, self._counted(calls)
        return [Call(layer, expert, capacity, (Key(layer, expert),)) for expert in range(self.card.experts)]


class AdaptiveCost(ClusterCost):
    """Degree r, chunks and all-to-all chosen by capacity, as `schedule.adaptive` describes them; slots always padded.

    The weights lie in equal parts on all devices whatever r is, so of the placement only the devices matter.

    Raises MoesaicError where experts and devices do not divide one another, and for two units or a coherent exchange.
    """

    def __init__(self, card: Card, sizes: Mapping[Key, int], machine: Topology, spec: CostSpec) -> None:
        super().__init__(card, sizes, machine, spec)
        if spec.split == "coprocess" or spec.collective == "coherent":
            raise MoesaicError(
                "an adaptive degree runs experts on one unit and sends tokens back: no split, no coherent"
            )
        self.owners = degrees(machine.devices, card.experts)[1]
        self.shape = ExpertShape(card.d, card.ffn, card.matrices, card.weight_bytes, NUMBER)
        kinds = {None: ("flat", "2dh"), "cheapest": ("flat", "2dh", "hierarchical")}
        self.table = AdaptiveTable(
            self.owners,
            lambda capacity, choice: self._run(capacity, choice)[0],
            DEGREES if spec.overlap == "best" else (spec.overlap,),
            kinds.get(spec.collective) or (str(spec.collective),),
        )
        self._ran: dict[tuple[int, Choice], tuple[float, float, Sent]] = {}

    def experts(self, calls: Sequence[Call], load: StageLoad) -> LayerCost:
        """One moment, or a part of one."""
        if not calls:
            return self.device.experts(calls, load)
        layers = self.card.layers if calls[0].layer == ANY else 1
        capacity = self._counted(calls)
        total, compute, sent = self._run(capacity, self.table.lookup(capacity))
        busy = [0.0] * len(self.units)
        busy[self.device.used[0]] = layers * compute
        return LayerCost(
            layers * compute, layers * (total - compute), layers * sent.intra, layers * sent.inter, tuple(busy)
        )

    def _run(self, capacity: int, choice: Choice) -> tuple[float, float, Sent]:
        """Seconds of a layer, of its products, and what is sent."""
        if (capacity, choice) not in self._ran:
            compute = self._products(capacity, choice.r)
            tokens, weights = self._tokens(capacity, choice), self._weights(choice.r)
            total = weights.seconds + overlapped(tokens.seconds, compute, choice.chunks, self.spec.overhead.chunk)
            sent = Sent(tokens.seconds + weights.seconds, tokens.intra + weights.intra, tokens.inter + weights.inter)
            self._ran[capacity, choice] = total, compute, sent
        return self._ran[capacity, choice]

    def _products(self, capacity: int, r: int) -> float:
        """r = 0: all experts over the device's own tokens; else 1 / r of its own over r / R of their slots."""
        devices, experts = self.machine.devices, self.card.experts
        if r:
            shape = replace(self.shape, ffn=-(-self.card.ffn // r))
            held, rows = max(1, experts // devices), -(-capacity * r // self.owners)
        else:
            shape, held, rows = self.shape, experts, -(-capacity // devices)
        unit = self.device.units[self.device.used[0]]
        return held * (expert_time(unit, shape, rows) + self.spec.overhead.op)

    def _tokens(self, capacity: int, choice: Choice) -> Sent:
        """Dispatch and return of a device's slots, r times."""
        if not choice.r:
            return Sent()
        slots = -(-capacity * self.card.experts // self.groups)
        size = slots * self.card.d * NUMBER * choice.r
        once = all_to_all(cast(Kind, choice.kind), self.machine, size, self.spec.tensor)
        return Sent(2 * once.seconds, 2 * once.intra_bytes, 2 * once.inter_bytes)

    def _weights(self, r: int) -> Sent:
        """AllGather of all experts (r = 0), or of 1 / r of one over the R / r neighbours that hold it."""
        group = self.owners // r if r else self.machine.devices
        if group == 1:
            return Sent()
        size = self.shape.bytes / r if r else self.shape.bytes * self.card.experts
        sent = allgather(self.machine.spread(group, gcd(group, self.machine.per_node)), size)
        return Sent(sent.seconds, sent.intra_bytes, sent.inter_bytes)


def _checked(card: Card, machine: Topology, spec: CostSpec) -> Placement:
    placement = spec.placement
    if placement is None:
        raise MoesaicError(f"{machine.devices} devices need a placement of the experts")
    has, needs = (placement.layers, placement.experts, placement.devices), (card.layers, card.experts, machine.devices)
    if has != needs:
        raise MoesaicError(
            f"the placement is of {has[0]} layers, {has[1]} experts and {has[2]} devices, but {card.model} on "
            f"{machine.name} has {needs[0]}, {needs[1]} and {needs[2]}"
        )
    if card.blocks is not None and (spec.capacity or spec.adaptive_r):
        raise MoesaicError(f"{card.model} stores experts in blocks that they share; equal slots need whole experts")
    return placement
