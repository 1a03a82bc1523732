"""One step of a stock mixture: every layer's router speaks when the layer runs, and only then experts are demanded.

A token's experts are added up in ascending order, one after the other, as transformers' plain loop does: whatever else
is in the step, and in whichever order its experts could be run.
Shapes: N tokens of the step, K experts chosen per token, P = N K pairs of both, D model width, E experts.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.schedule.work import Call, Key, Known, WorkItem
from moesaic.serve.kv import KVPool
from moesaic.serve.step import Backbone, Part
from moesaic.serve.stock import ServedStock, StockExperts
from moesaic.serve.store import ExpertReadError, ExpertStore


class StockBackbone(Backbone):
    """A loaded mixture with its experts and its keys."""

    filled = False  # the routers would choose experts for such rows too

    def __init__(self, model: ServedStock, experts: Sequence[StockExperts], store: ExpertStore, pool: KVPool) -> None:
        super().__init__(model, (), store, pool)
        self.stock, self.by_layer = model, experts
        self._single: dict[tuple[int, int], Call] = {}

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], complete: bool = False) -> Tensor:
        """As any backbone; ExpertReadError says in which slots the requests are that cannot go on."""
        step = StockStep(self, parts, complete)
        with self.stock.step.use(step):
            logits = self.forward(parts)
        if complete:
            with self.store.lock() as residency:
                residency.passed(step.routes)
        self.routes = step.first
        return logits

    def call(self, layer: int, expert: int, tokens: int) -> Call:
        """The call of an expert; those of single tokens are built once."""
        if (layer, expert) not in self._single:
            keys = self.store.residency.layout.entries[layer, expert]
            self._single[layer, expert] = Call(layer, expert, 1, keys)
        call = self._single[layer, expert]
        return call if tokens == 1 else call._replace(tokens=tokens)


class StockStep:
    """What the blocks of a step ask for."""

    def __init__(self, backbone: StockBackbone, parts: Sequence[Part], complete: bool) -> None:
        self.backbone, self.parts, self.complete = backbone, parts, complete
        self.ends = np.cumsum([len(part.ids) for part in parts])
        self.routes: list[list[Call]] = []  # of each layer so far
        self.first: list[WorkItem] = []  # the items with their calls in the first layer
        self.experts_N = self._wanted()

    def _wanted(self) -> Tensor | None:
        if all(part.experts_per_token is None for part in self.parts):
            return None
        most = self.backbone.stock.most or 0
        counts = [part.experts_per_token or most for part in self.parts for _ in part.ids]
        return torch.tensor(counts, device=self.backbone.pool.device)

    def experts(self, layer: int, hidden_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """(N, D): the weighted sum of each token's experts."""
        pairs = Pairs(index_NK, weight_NK)
        experts = self.backbone.by_layer[layer]
        count = len(experts.matrices)
        out_PD = hidden_ND.new_zeros(len(pairs.weight_P), hidden_ND.shape[-1])
        calls = [self.backbone.call(layer, e, tokens) for e, tokens in pairs.groups() if e < count]
        self.routes.append(calls)
        if not self.complete or not self.first:
            items = self._items(calls, pairs)
            self.first = self.first or items
        for wave in [calls] if self.complete else self._waves(layer, calls, items):
            for call in wave:
                at_M = pairs.of(call.expert)
                y_MD = experts.run(call.expert, hidden_ND[at_M // pairs.each])
                out_PD[at_M] = (y_MD * pairs.weight_P[at_M, None]).to(out_PD.dtype)
        out_NKD = out_PD.view(len(hidden_ND), pairs.each, -1)
        total_ND = out_NKD[:, 0].clone()
        for place in range(1, pairs.each):
            total_ND += out_NKD[:, place]
        return total_ND

    def _waves(self, layer: int, calls: Sequence[Call], items: Sequence[WorkItem]) -> Iterator[Sequence[Call]]:
        """Calls whose entries are there for as long as they are worked on."""
        store = self.backbone.store
        with store.lock() as residency:
            residency.routed(layer, calls, items)
            waves = residency.waves(layer)
        for wave in waves:
            try:
                with store.held(layer, wave):
                    yield wave
            except ExpertReadError as error:
                error.slots = self._slots(items, error.keys)
                raise

    def _items(self, calls: Sequence[Call], pairs: "Pairs") -> list[WorkItem]:
        """The step's work items, each with its own calls in this layer alone."""
        there = {call.expert for call in calls}
        items, start = [], 0
        for part, end in zip(self.parts, self.ends.tolist(), strict=True):
            experts, tokens = np.unique(pairs.index_NK[start:end], return_counts=True)
            own = tuple(
                self.backbone.call(calls[0].layer, e, n)
                for e, n in zip(experts.tolist(), tokens.tolist(), strict=True)
                if e in there
            )
            item = part.item
            assert item is not None
            items.append(WorkItem(item.request, item.step, item.phase, item.tokens, own, Known.GATE))
            start = end
        return items

    def _slots(self, items: Sequence[WorkItem], keys: Sequence[Key]) -> frozenset[int]:
        broken = set(keys)
        pairs = zip(self.parts, items, strict=True)
        return frozenset(part.slot for part, item in pairs if broken & set(item.keys))


class Pairs:
    """Tokens and their experts as pairs, p = n K + k with a token's experts in ascending order."""

    def __init__(self, index_NK: Tensor, weight_NK: Tensor) -> None:
        sorted_NK, order_NK = index_NK.sort(-1)
        self.each = index_NK.shape[1]
        self.index_NK: NDArray[np.int64] = sorted_NK.cpu().numpy()
        self.weight_P = weight_NK.gather(-1, order_NK).flatten()
        self._counts = np.bincount(self.index_NK.reshape(-1))
        self._ends = np.cumsum(self._counts)
        places = torch.from_numpy(np.argsort(self.index_NK.reshape(-1), kind="stable"))
        self._places = places.to(index_NK.device)

    def groups(self) -> list[tuple[int, int]]:
        """(expert, tokens) of every expert that is wanted."""
        return [(int(e), int(self._counts[e])) for e in np.flatnonzero(self._counts)]

    def of(self, expert: int) -> Tensor:
        """The pairs of an expert."""
        return self._places[self._ends[expert] - self._counts[expert] : self._ends[expert]]
