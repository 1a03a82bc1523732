"""Routes before the backbone runs: the pre-gate over whole prompts on arrival, over chunks and sampled tokens later.

On arrival a prompt is only routed; its keys in the pre-gate are written when its chunks run, into the same slots as
the backbone's, in the layers after them.
Shapes: N tokens, E experts.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moesaic.experts import triton_blocks
from moesaic.experts.buckets import bucket
from moesaic.experts.packed import PackedLinear
from moesaic.routing.pregate import Attend, PreGate
from moesaic.serve.attention import RaggedAttention, Scores, Segment, TokenAttention
from moesaic.serve.graphs import StepGraphs
from moesaic.serve.kv import KVPool
from moesaic.serve.request import ExpertControl, RequestError

Experts = NDArray[np.int16]


class Gate:
    """The pre-gate of a served model, None where there is a single expert.

    pool: where its keys are, from layer `first` on; None where it only routes prompts.
    """

    def __init__(self, pregate: PreGate | None, experts: int, first: int, pool: KVPool | None = None) -> None:
        self.pregate, self.experts, self.first, self.pool = pregate, experts, first, pool
        self.graphs: StepGraphs | None = None
        if pregate is not None and pool is not None and triton_blocks.runs_on(pool.device):
            pregate.reach(pool.stride, pool.device)
            self.graphs = StepGraphs(self._tokens, pool.device, pool.slots)
            self.graphs.warm((0, 0, 0))
        self.device = torch.device("cpu") if pregate is None else pregate.head.weight.device
        self.filled = pregate is not None and any(isinstance(part, PackedLinear) for part in pregate.modules())

    def bias(self, control: ExpertControl) -> Tensor | None:
        """What to add to the logits (E,) so that only allowed experts win; None = nothing.

        Raises RequestError for experts that do not exist, or where none is left.
        """
        if not control:
            return None
        named = {*control.allow, *control.deny, *((control.pin,) if control.pin is not None else ())}
        if unknown := sorted(named - set(range(self.experts))):
            raise RequestError(f"there is no expert {unknown[0]}: expected 0 to {self.experts - 1}", "experts")
        allowed = {control.pin} if control.pin is not None else set(control.allow or range(self.experts))
        if not (allowed := allowed - set(control.deny)):
            raise RequestError("experts.deny forbids every expert", "experts")
        bias = torch.full((self.experts,), -torch.inf)
        bias[sorted(allowed)] = 0.0
        return bias

    @torch.inference_mode()
    def prompt(self, ids: Sequence[int], bias: Tensor | None = None) -> Experts:
        """The expert of every token of a prompt, (N,)."""
        if self.pregate is None:
            return np.zeros(len(ids), np.int16)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=len(ids) > 1)

        pos_N = torch.arange(len(ids), device=self.device)
        logits = self.pregate.run(torch.tensor([ids], device=self.device), pos_N[None], attend)[0].cpu()
        return choose(logits if bias is None else logits + bias)

    @torch.inference_mode()
    def extend(self, ids: Sequence[int], step: RaggedAttention, bias: Sequence[Tensor | None] = ()) -> Experts:
        """The experts of a step's tokens, (N,), whose keys go to their slots; one bias per token, or none at all."""
        if self.pregate is None:
            return np.zeros(len(ids), np.int16)
        # rows are filled up once here, and not for every packed product
        more = bucket(len(ids)) - len(ids) if self.filled else 0
        pos_1N = F.pad(step.pos_N[None], (0, more)) if more else step.pos_N[None]
        ids_1N = torch.tensor([[*ids, *[0] * more]], device=self.device)
        logits = self.pregate.run(ids_1N, pos_1N, self._attend(step))[0]
        return _biased(logits[: len(ids)].cpu(), bias)

    @torch.inference_mode()
    def sampled(self, ids: Sequence[int], rows: Sequence[Segment], bias: Sequence[Tensor | None] = ()) -> Experts:
        """As `extend`, of newly sampled tokens: a step of one token for each of `rows`."""
        if self.pregate is None:
            return np.zeros(len(ids), np.int16)
        assert self.pool is not None, "only prompts can be routed without keys"
        if self.graphs is None or not self.graphs.suits(len(ids)):
            return self.extend(ids, RaggedAttention(self.pool, rows), bias)
        logits = self.graphs((ids, [row.slot for row in rows], [row.past for row in rows]))
        return _biased(logits.cpu(), bias)

    def _tokens(self, integers_3B: Tensor) -> Tensor:
        """Logits (B, E) of single tokens: their ids, slots and positions; nothing waits for the device."""
        ids_B, slot_B, pos_B = integers_3B
        assert self.pregate is not None and self.pool is not None
        return self.pregate.run(ids_B[None], pos_B[None], self._attend(TokenAttention(self.pool, slot_B, pos_B)))[0]

    def _attend(self, step: RaggedAttention | TokenAttention) -> Attend:
        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            rows = [x[0].transpose(0, 1) for x in (query, key, value)]
            scores = Scores(query.shape[-1] ** -0.5)
            out_NHD = step.attend(self.first + layer, rows[0].contiguous(), rows[1], rows[2], scores)
            return out_NHD.transpose(0, 1)[None]

        return attend


def _biased(logits_NE: Tensor, bias: Sequence[Tensor | None]) -> Experts:
    for row, extra in enumerate(bias):
        if extra is not None:
            logits_NE[row] += extra
    return choose(logits_NE)


def choose(logits_NE: Tensor) -> Experts:
    """The first of the largest logits, as the pre-gate's own policy does; (N,)."""
    return logits_NE.argmax(-1).numpy().astype(np.int16)
