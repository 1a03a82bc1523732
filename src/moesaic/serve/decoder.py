"""A decoder's forward without transformers' bookkeeping, where it is known to be the same: proved by numbers.

Between embedding and head there are only the layers, a norm and the angles of positions. What else transformers does in
a forward (masks, caches, recording of outputs) takes as long as a layer at batch 1 and changes nothing here.
Shapes: N tokens of the step, P of them with what fills them up, R rows whose next token is wanted, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.experts.buckets import bucket
from moesaic.serve import attention
from moesaic.serve.layers import TOLERANCE, FusedLayer, Recorder


class Decoder:
    """Calls transformers' model. `filled`: whether it may be given more rows than there are tokens."""

    filled = False

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids_N: Tensor, pos_N: Tensor, rows_R: Tensor) -> Tensor:
        """Logits (R, V) after the rows; inside a step's attention."""
        out = self.model(input_ids=ids_N[None], position_ids=pos_N[None], use_cache=False, logits_to_keep=rows_R)
        logits: Tensor = out.logits[0]
        return logits


class FusedDecoder(Decoder):
    """Embeds, runs fused layers, norms and projects the wanted rows.

    With `filled` rows are filled up to a bucket once, and not for every product of packed weights. Layers see all of
    them, attention the tokens alone.

    Raises AttributeError or TypeError if `model` has not the parts of such a decoder.
    """

    def __init__(self, model: Any, filled: bool) -> None:
        super().__init__(model)
        inner = model.base_model
        self.embed, self.rotary, self.norm, self.head = inner.embed_tokens, inner.rotary_emb, inner.norm, model.lm_head
        self.layers = list(inner.layers)
        self.filled = filled
        if not self.layers or not all(isinstance(layer, FusedLayer) for layer in self.layers):
            raise TypeError("layers that are not fused")

    def __call__(self, ids_N: Tensor, pos_N: Tensor, rows_R: Tensor) -> Tensor:
        """As transformers' model."""
        if self.filled and (more := bucket(len(ids_N)) - len(ids_N)):
            ids_N, pos_N = F.pad(ids_N, (0, more)), F.pad(pos_N, (0, more))
        hidden = self.embed(ids_N[None])
        angles = self.rotary(hidden, pos_N[None])
        for layer in self.layers:
            hidden = layer(hidden, angles)
        logits: Tensor = self.head(self.norm(hidden[0, rows_R]))
        return logits


@torch.inference_mode()
def decoder_of(model: Any, filled: bool) -> Decoder:
    """The fastest way to run `model`, a causal language model whose attention is the step's."""
    own = Decoder(model)
    try:
        fused = FusedDecoder(model, filled)
        wanted, found = (_answer(each) for each in (own, fused))
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return own
    far = float((wanted.float() - found.float()).abs().max())
    return fused if far <= TOLERANCE[wanted.dtype] * float(wanted.abs().max()) else own


def _answer(decoder: Decoder) -> Tensor:
    """Logits after some tokens at far positions; what follows from them must show in every row."""
    model: nn.Module = decoder.model
    device = next(model.parameters()).device
    ids, positions = torch.arange(5, device=device) * 7 + 1, torch.tensor([0, 1, 77, 500, 3000], device=device)
    with attention.current.use(Recorder()):  # type: ignore[arg-type]
        return decoder(ids, positions, torch.tensor([1, 4], device=device))
