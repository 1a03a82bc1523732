"""Decoder layers in half the operators: each replacement is proved by numbers before it is made.

For layers that norm before attention and FFN and rotate queries and keys (Llama, Mistral, Qwen, ...): one product makes
queries, keys and values, one norm and one rotation serve queries and keys, and nothing of transformers' bookkeeping is
left. A layer that does anything else stays as it is.
Shapes: N tokens, D model width, H query heads, G key-value heads, K head width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.serve import attention
from moesaic.serve.attention import Scores, TokenAttention
from moesaic.serve.norms import FusedRMSNorm

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest number; roundings, far below another formula
Angles = tuple[Tensor, Tensor]


class Rotation:
    """Rotary positions of a step, prepared once for the layers that share them."""

    def __init__(self) -> None:
        self._of: Angles | None = None
        self._cos_N1K = self._sin_N1K = torch.empty(0)

    def turn(self, x_NAK: Tensor, angles: Angles) -> Tensor:
        """(N, A, K) with the two halves of every head rotated by the token's angles (cos, sin), each (1, N, K)."""
        half = x_NAK.shape[-1] // 2
        if angles is not self._of:
            cos, sin = angles[0][0, :, None], angles[1][0, :, None]
            self._of, self._cos_N1K = angles, cos
            self._sin_N1K = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        swapped = torch.cat((x_NAK[..., half:], x_NAK[..., :half]), -1)
        return torch.addcmul(x_NAK * self._cos_N1K, swapped, self._sin_N1K)


class FusedLayer(nn.Module):
    """h += o(attention(norm h)); h += ffn(norm h), where layer number `index` attends as `scores` says.

    Raises AttributeError or TypeError if `layer` has not the parts of such a layer.
    """

    def __init__(self, layer: Any, index: int, scores: Scores, rotation: Rotation) -> None:
        super().__init__()
        own = layer.self_attn
        self.norm, self.ffn_norm, self.ffn = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
        self.qkv, self.out = _stacked([own.q_proj, own.k_proj, own.v_proj]), own.o_proj
        self.index, self.scores, self.width = index, scores, own.head_dim
        self.heads, self.groups = (len(matrix.weight) // self.width for matrix in (own.q_proj, own.k_proj))
        self.rotation = rotation
        self._calls: tuple[Callable[..., Tensor], ...] = ()
        self.scale_AK: Tensor | None
        self.register_buffer("scale_AK", None, persistent=False)
        if hasattr(own, "q_norm"):
            self._norm_heads(own.q_norm, own.k_norm)

    def _norm_heads(self, query: Any, key: Any) -> None:
        for norm in (query, key):
            if not isinstance(norm, FusedRMSNorm) or len(norm.weight) != self.width or norm.eps != query.eps:
                raise TypeError("norms of queries and keys differ in more than their scales")
        scales = [query.weight] * self.heads + [key.weight] * self.groups
        self.scale_AK, self.eps = torch.stack([scale.detach() for scale in scales]), query.eps

    def settle(self) -> None:
        """Its parts are final: look them up once, and call them without what a module's call looks for."""
        parts = (self.norm, self.qkv, self.out, self.ffn_norm, self.ffn)
        self._calls = tuple(part.forward for part in parts)

    def forward(self, hidden_states: Tensor, position_embeddings: Angles, **kwargs: Any) -> Tensor:
        """(1, N, D) -> (1, N, D); the keyword arguments are those of transformers' layers."""
        step = attention.current.value
        assert step is not None
        norm, project, out, ffn_norm, ffn = self._calls or (self.norm, self.qkv, self.out, self.ffn_norm, self.ffn)
        qkv = project(norm(hidden_states)).view(hidden_states.shape[1], -1, self.width)
        qk, value = qkv[:, : self.heads + self.groups], qkv[:, self.heads + self.groups :]
        if self.scale_AK is not None:
            qk = F.rms_norm(qk, (self.width,), eps=self.eps) * self.scale_AK
        if isinstance(step, TokenAttention):
            qkv = qkv if self.scale_AK is None else torch.cat((qk, value), 1)
            attended = step.turn_and_attend(self.index, qkv, self.heads, position_embeddings, self.scores)
        else:
            qk = self.rotation.turn(qk, position_embeddings)
            attended = step.attend(self.index, qk[:, : self.heads], qk[:, self.heads :], value, self.scores)
        hidden_states = hidden_states + out(attended.reshape(1, len(attended), -1))
        return hidden_states + ffn(ffn_norm(hidden_states))


def _stacked(linears: list[Any]) -> Any:
    """One linear layer whose outputs are those of all, one after the other."""
    if any(type(linear) is not nn.Linear for linear in linears):
        raise TypeError("projections that are no plain linear layers")
    rows = sum(linear.out_features for linear in linears)
    one: Any = nn.Linear(linears[0].in_features, rows, device="meta")
    one.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    if biases and len(biases) < len(linears):
        raise TypeError("a bias in some projections only")
    one.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return one


@torch.no_grad()  # in inference mode its weights could not be moved to a device
def fuse_layers(model: nn.Module) -> int:
    """Replace the decoder layers that are such layers; returns how many were."""
    replaced, rotation = 0, Rotation()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "self_attn") and (fused := _fused(child, rotation)) is not None:
                setattr(parent, name, fused)
                replaced += 1
    return replaced


def _fused(layer: Any, rotation: Rotation) -> FusedLayer | None:
    """The same layer in fewer operators; None if this is none that can be."""
    try:
        wanted = _seen(layer, layer.self_attn.head_dim)
        fused = FusedLayer(layer, wanted.layer, wanted.scores, rotation)
        found = _seen(fused, fused.width)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return None
    return fused if _same(wanted, found) else None


class _Seen(NamedTuple):
    """What a layer makes of a few tokens: what reaches attention, how it is asked to attend, what comes out."""

    layer: int
    scores: Scores
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


def _same(wanted: _Seen, found: _Seen) -> bool:
    if wanted[:2] != found[:2]:
        return False
    return all(
        one.shape == other.shape
        and float((one.float() - other.float()).abs().max()) <= TOLERANCE[one.dtype] * float(one.abs().max())
        for one, other in zip(wanted[2:], found[2:], strict=True)
    )


def _seen(layer: nn.Module, width: int) -> _Seen:
    """Tokens at far positions, so that whatever depends on them shows."""
    weight = next(layer.parameters())
    positions = torch.tensor([[1, 3, 77, 5_000, 300_000]])
    generator = torch.Generator().manual_seed(0)
    norm: Any = layer.norm if isinstance(layer, FusedLayer) else layer.input_layernorm
    x = torch.randn(1, positions.shape[1], len(norm.weight), generator=generator)
    angle = torch.rand(1, positions.shape[1], width // 2, generator=generator).mul(6.0).repeat(1, 1, 2)
    recorder = Recorder()
    with attention.current.use(recorder):  # type: ignore[arg-type]
        out = layer(
            x.to(weight.dtype),
            attention_mask=None,
            position_ids=positions,
            past_key_values=None,
            use_cache=False,
            position_embeddings=(angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)),
        )
    return _Seen(*recorder.call, out[0] if isinstance(out, tuple) else out)


class Recorder:
    """Stands for a step's attention: keeps what it is asked, and answers with something that depends on all of it."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        self.call = layer, scores, query, key, value
        return query + (key + value).mean(1, keepdim=True)
