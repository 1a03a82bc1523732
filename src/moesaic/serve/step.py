"""One step of the backbone: the tokens of many requests in one row, their experts' calls carried out layer by layer.

Tokens are sorted by expert once: a plan holds in every layer. Only attention goes back to requests.
Shapes: N tokens of the step, P with rows that fill it up, R rows whose next token is wanted, V vocabulary, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moesaic.experts.compute import TokenGroups
from moesaic.experts.lowbit import prompts_from
from moesaic.experts.packed import PackedLinear
from moesaic.schedule.work import WorkItem
from moesaic.serve import attention
from moesaic.serve.attention import RaggedAttention, Segment, TokenAttention
from moesaic.serve.decoder import FusedDecoder, decoder_of
from moesaic.serve.experts import BlockExperts
from moesaic.serve.graphs import StepGraphs
from moesaic.serve.kernel_experts import KernelExperts
from moesaic.serve.kv import KVPool
from moesaic.serve.lowbit_memory import QuantizedExperts
from moesaic.serve.store import ExpertStore


@dataclass
class Part:
    """A request's share of a step: `ids` after `past` tokens in `slot`, each with its expert.

    prompt: they are of the prompt, so that the pre-gate has not kept their keys. last: a token is sampled after them.
    item: what the policies know it as. experts_per_token: see `Generation`.
    """

    slot: int
    past: int
    ids: Sequence[int]
    experts: NDArray[np.int16]
    prompt: bool
    last: bool
    item: WorkItem | None = None
    experts_per_token: int | None = None


class TokenOrder:
    """The tokens of a step by expert: rows of expert e are `slices[e]` once sorted by `order`, None if they are.

    prompts: of each expert, from which of its rows on they are of prompts; in the step, those from `first` on are.
    only: the expert of all, None where there are several.
    """

    def __init__(self, expert_N: NDArray[np.int16], first: int, device: torch.device) -> None:
        counts = np.bincount(expert_N)
        self.prompts = np.bincount(expert_N[:first], minlength=len(counts)).tolist()
        ends = np.cumsum(counts)
        self.slices = {int(e): slice(int(ends[e] - counts[e]), int(ends[e])) for e in np.flatnonzero(counts)}
        self.only = next(iter(self.slices)) if len(self.slices) == 1 else None
        sorted_already = bool((expert_N[1:] >= expert_N[:-1]).all())
        self.order = None
        if not sorted_already:
            self.order = torch.from_numpy(np.argsort(expert_N, kind="stable")).to(device)

    def gather(self, x_ND: Tensor) -> Tensor:
        """Rows by expert."""
        return x_ND if self.order is None else x_ND[self.order]

    def scatter(self, y_ND: Tensor) -> Tensor:
        """Rows as they came."""
        return y_ND if self.order is None else torch.empty_like(y_ND).index_copy_(0, self.order, y_ND)


class Backbone:
    """The loaded model with its experts and its keys; runs steps.

    routes: work items with calls in the first layer that has experts, where the step that ran has found them out.
    unions: few tokens of several experts may share a pass over all channels of a layer, though it rounds otherwise than
            an expert alone.
    """

    unions = False
    filled = True  # a step may have rows more than its tokens: what stands in for experts leaves them out

    def __init__(
        self,
        model: Any,
        experts: Sequence[BlockExperts | KernelExperts | QuantizedExperts],
        store: ExpertStore,
        pool: KVPool,
    ) -> None:
        self.model, self.store, self.pool = model, store, pool
        self.experts: Sequence[Any] = experts
        self.decoder = decoder_of(model.backbone, self.filled and _packed(model.backbone))
        self.routes: list[WorkItem] = []
        self.graphs: StepGraphs | None = None
        if self.experts and all(isinstance(each, KernelExperts) for each in experts):
            self.unions = True
            if isinstance(self.decoder, FusedDecoder):
                self.graphs = StepGraphs(self._tokens, pool.device, pool.slots)
                self.graphs.warm((0, 0, 0, 0))

    def _tokens(self, integers_4B: Tensor) -> Tensor:
        """Logits (B, V) after single tokens: their ids, slots, positions and experts; nothing waits for the device."""
        ids_B, slot_B, pos_B, expert_B = integers_4B
        groups = TokenGroups(expert_B)
        step = TokenAttention(self.pool, slot_B, pos_B)

        def ffn(layer: int, x_BD: Tensor) -> Tensor:
            return self.experts[layer].run_together(x_BD, groups)

        with self.model.step.use(ffn), attention.current.use(step):
            return self.decoder(ids_B, pos_B, torch.arange(len(ids_B), device=ids_B.device))

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], complete: bool = False) -> Tensor:
        """Logits (R, V) after the parts that are `last`, in their order.

        The residency's stage has begun, or with `complete` every expert is there and stays.

        Raises ExpertReadError if entries cannot be read; running the other parts again is then safe.
        """
        count = sum(len(part.ids) for part in parts)
        if self.graphs is not None and count == len(parts) and self.graphs.suits(count):
            # Routes are known before the first layer runs: so is whether all that the step needs can be there.
            if complete:
                return self._replay(parts)
            if self.store.at_once():
                with self.store.all_held():
                    return self._replay(parts)
        experts_N = np.concatenate([part.experts for part in parts])
        tokens = TokenOrder(experts_N, first_of_prompts(parts), self.pool.device)

        def ffn(layer: int, x_PD: Tensor) -> Tensor:
            if complete and tokens.only is not None and self.experts[layer].packed(tokens.only):
                return self.experts[layer].run(tokens.only, x_PD)
            y_ND = run(layer, x_PD[:count])
            return y_ND if len(x_PD) == count else F.pad(y_ND, (0, 0, 0, len(x_PD) - count))

        counts = {expert: rows.stop - rows.start for expert, rows in tokens.slices.items()}
        together = complete and self.unions and self.experts[0].together(counts)
        groups = TokenGroups(torch.from_numpy(experts_N.astype(np.int64))).to(self.pool.device) if together else None

        def run(layer: int, x_ND: Tensor) -> Tensor:
            if groups is not None:
                return self.experts[layer].run_together(x_ND, groups)
            x_ND = tokens.gather(x_ND)
            y_ND = torch.empty_like(x_ND)
            if complete:
                for expert, rows in tokens.slices.items():
                    y_ND[rows] = self.experts[layer].run(expert, x_ND[rows], tokens.prompts[expert])
                return tokens.scatter(y_ND)
            for wave in self.store.residency.waves(layer):
                with self.store.held(layer, wave):
                    for call in wave:
                        rows = tokens.slices[call.expert]
                        y_ND[rows] = self.experts[layer].run(call.expert, x_ND[rows], tokens.prompts[call.expert])
            return tokens.scatter(y_ND)

        with self.model.step.use(ffn):
            return self.forward(parts)

    def _replay(self, parts: Sequence[Part]) -> Tensor:
        assert self.graphs is not None
        columns = [(part.ids[0], part.slot, part.past, int(part.experts[0])) for part in parts]
        logits_BV = self.graphs(list(zip(*columns, strict=True)))
        wanted = [row for row, part in enumerate(parts) if part.last]
        return logits_BV if len(wanted) == len(parts) else logits_BV[wanted]  # not after a prompt's middle

    def forward(self, parts: Sequence[Part]) -> Tensor:
        """Logits (R, V), where what stands in for experts knows what to run."""
        step = RaggedAttention(self.pool, segments(parts))
        rows = np.cumsum([len(part.ids) for part in parts]) - 1
        wanted = [row for row, part in zip(rows.tolist(), parts, strict=True) if part.last]
        ids_N = torch.tensor([token for part in parts for token in part.ids], device=self.pool.device)
        with attention.current.use(step), prompts_from(first_of_prompts(parts)):
            logits_RV = self.decoder(ids_N, step.pos_N, torch.tensor(wanted or [0], device=self.pool.device))
        return logits_RV[: len(wanted)]


def _packed(model: torch.nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def first_of_prompts(parts: Sequence[Part]) -> int:
    """How many tokens come before those of prompts: all of them are in parts that come first."""
    return sum(len(part.ids) for part in parts if not part.prompt)


def segments(parts: Sequence[Part]) -> list[Segment]:
    """Where each part's tokens stand in the step."""
    out, start = [], 0
    for part in parts:
        out.append(Segment(part.slot, start, len(part.ids), part.past))
        start += len(part.ids)
    return out
