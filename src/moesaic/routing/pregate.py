"""The pre-gate: a small causal transformer over token ids whose one answer routes every layer (Read-ME, 2410.19123).

Because it reads nothing but ids, the routes of a whole prompt are known before layer 0 of the backbone runs.
Differences to the released router, each with its reason: it honours padding and per-sequence positions, so that a
left-padded batch routes like single sequences; it has a KV cache of its own, so that decoding routes exactly like one
pass over the full text; attention logits are scaled by 1/sqrt(head width).

Shapes: B batch, S new tokens, T cached + new tokens, E experts, R router width, H heads.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.routing.contract import Caps, RoutePlan
from moesaic.routing.policies import TopK


class KeyValueCache(Protocol):
    """The part of a transformers Cache that the pre-gate uses."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]: ...

    def get_seq_length(self, layer_idx: int = 0) -> Any: ...


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer of the pre-gate, query, key, value), each (B, H, S, R/H), to attended values like query."""


@dataclass(frozen=True, kw_only=True)
class PreGateConfig:
    """Sizes of the router. The paper's, for a 4096-wide model: width 512, MLP 512, 4 heads, 1 layer: 18.0 M weights."""

    vocab_size: int
    experts: int
    width: int = 512  # R; also the embedding width
    mlp_width: int = 512
    heads: int = 4
    layers: int = 1
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise MoesaicError(f"pre-gate width {self.width} must be a multiple of 2 * heads = {2 * self.heads}")

    @classmethod
    def for_model(cls, vocab_size: int, hidden_size: int, experts: int) -> "PreGateConfig":
        """A quarter of the model's width, between 32 (4 heads of 8) and the paper's 512."""
        width = min(512, max(32, hidden_size // 4 // 8 * 8))
        return cls(vocab_size=vocab_size, experts=experts, width=width, mlp_width=width)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for config.json."""
        return asdict(self)


class PreGateLayer(nn.Module):
    """h += o(attention(norm h)); h += down(silu(up(norm h))), causal, rotary positions."""

    def __init__(self, config: PreGateConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.heads, config.width // config.heads
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(
        self, h_NR: Tensor, length: int, rotary: tuple[Tensor, Tensor], attend: Callable[..., Tensor]
    ) -> Tensor:
        """`attend(query, key, value)`, each (B, H, S, R/H), remembers keys and values and answers like query.

        Tokens are flat, N = B * S: products of matrices take fewer operators than those of batches.
        """
        qkv = self.qkv(self.attention_norm(h_NR)).view(-1, length, 3, self.heads, self.head_width)
        query, key = _rotate(qkv[:, :, :2], *rotary).transpose(1, 3).unbind(2)
        attended = attend(query, key, qkv[:, :, 2].transpose(1, 2))
        h_NR = h_NR + self.out(attended.transpose(1, 2).reshape(h_NR.shape))
        return h_NR + self.down(F.silu(self.up(self.mlp_norm(h_NR))))


class PreGate(nn.Module):
    """Token ids -> one expert per token, the same in every layer (Read-ME, section 3; Table 1)."""

    caps = Caps(reads=frozenset({"ids"}), causal=True, trainable=False, precompute="exact")

    def __init__(self, config: PreGateConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(PreGateLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.experts, bias=False)
        self.policy = TopK(1)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}  # rotary tables, rebuilt when needed
        self._reached: set[torch.device] = set()  # where a table is large enough for good

    def _rotary(self, pos_BS: Tensor) -> tuple[Tensor, Tensor]:
        """For each position cos, and sin with the sign it has in each half, (B, S, 1, 1, 1 or 2, R/H/2) float32.

        From a table that grows by doubling.
        """
        table = self._tables.get(pos_BS.device)
        if table is not None and pos_BS.device.type == "cpu":
            with contextlib.suppress(IndexError):  # a look that fails costs less than looking for the largest
                return table[0][pos_BS], table[1][pos_BS]
        if pos_BS.device not in self._reached:
            needed = int(pos_BS.max()) + 1
            if table is None or len(table[0]) < needed:
                self._tabulate(2 * needed, pos_BS.device)
        cosine, sine = self._tables[pos_BS.device]
        return cosine[pos_BS], sine[pos_BS]

    def _tabulate(self, rows: int, device: torch.device) -> None:
        half = self.config.width // self.config.heads // 2
        frequency = self.config.rope_theta ** (-torch.arange(half, device=device) / half)
        angle = (torch.arange(max(512, rows), device=device)[:, None] * frequency)[:, None, None, None, :]
        self._tables[device] = (angle.cos(), torch.cat((-angle.sin(), angle.sin()), dim=-2))

    def reach(self, positions: int, device: torch.device) -> None:
        """No position on this device will be `positions` or more: nothing waits for it to tell the largest."""
        self._tabulate(positions, device)
        self._reached.add(device)

    def forward(
        self,
        ids_BS: Tensor,
        mask_BT: Tensor | None = None,
        pos_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
        first_slot: int = 0,
    ) -> Tensor:
        """Logits over experts, (B, S, E) float32.

        ids_BS:     the new tokens.
        mask_BT:    1 for real tokens, 0 for padding, over cached and new tokens; None = no padding.
        pos_BS:     position of each new token inside its own sequence; None = counted from `mask_BT` or the cache.
        cache:      a transformers Cache; layer i of the pre-gate uses its layer `first_slot + i`.
        """
        length = ids_BS.shape[1]
        past = int(cache.get_seq_length(first_slot)) if cache is not None else 0
        if pos_BS is None:
            pos_BS = positions(ids_BS, mask_BT, past)
        keys = max(past + length, _static_length(cache, first_slot))
        mask = _attention_mask(mask_BT, past, length, keys, ids_BS.device)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if cache is not None:
                key, value = cache.update(key, value, first_slot + layer)
            causal = mask is None and query.shape[2] > 1
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)

        return self.run(ids_BS, pos_BS, attend)

    def run(self, ids_BS: Tensor, pos_BS: Tensor, attend: Attend) -> Tensor:
        """As forward, with an attention of the caller's, who knows which tokens are one sequence."""
        with torch.autocast(ids_BS.device.type, enabled=False):  # fp32 router under autocast
            h_NR = self.embedding(ids_BS.reshape(-1)).to(self.head.weight.dtype)
            rotary = self._rotary(pos_BS)
            for number, layer in enumerate(self.layers):
                h_NR = layer(h_NR, ids_BS.shape[1], rotary, partial(attend, number))
            return self.head(self.norm(h_NR)).float().view(*ids_BS.shape, -1)

    def plan(self, *args: Any, **kwargs: Any) -> RoutePlan:
        """The plan of every layer, N = B * S tokens; arguments as in `forward`."""
        return self.policy(self(*args, **kwargs).flatten(0, 1))


def positions(ids_BS: Tensor, mask_BT: Tensor | None, past: int) -> Tensor:
    """Position of each new token in its own sequence, padding not counted, (B, S) int64."""
    length = ids_BS.shape[1]
    if mask_BT is None:
        return (torch.arange(past, past + length, device=ids_BS.device)).expand(ids_BS.shape)
    return (mask_BT.long().cumsum(-1) - 1).clamp_min(0)[:, past : past + length]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last axis of (B, S, ., H, R/H) by each token's angle.

    (one, two) cos + (two, one) (-sin, sin).
    """
    halves = x.float().unflatten(-1, (2, -1))
    return torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2).to(x.dtype)


def _static_length(cache: KeyValueCache | None, slot: int) -> int:
    """Key length of a preallocated cache layer (it returns all its slots), else 0."""
    layers = getattr(cache, "layers", None)
    if layers is None or slot >= len(layers):
        return 0
    return max(0, layers[slot].get_max_length())


def _attention_mask(mask_BT: Tensor | None, past: int, length: int, keys: int, device: torch.device) -> Tensor | None:
    """Which keys each new token may see, (B or 1, 1, S, keys) bool; None when plain causal attention says it all.

    Every query may see itself, so that a padding row is well defined (its output is never used).
    """
    padded = mask_BT is not None and not bool(mask_BT.all())
    if not padded and keys == past + length and (past == 0 or length == 1):
        return None
    query = torch.arange(past, past + length, device=device)
    key = torch.arange(keys, device=device)
    mask = (key <= query[:, None])[None, None]
    if padded:
        assert mask_BT is not None
        real = F.pad(mask_BT.bool(), (0, keys - mask_BT.shape[1]))[:, :keys]
        mask = mask & real[:, None, None, :] | (key == query[:, None])
    return mask
