"""MoM: linear attention with several recurrent states, of which a router picks k per token (2502.13685).

An "expert" is a key/value projection and a state. A token writes to the memories of its plan and reads from the same
ones, with the same weights; the others stay as they are. A shared memory is written and read by every token.
Shapes: B batch, S sequence, N = B*S tokens, D model width, M memories, K slots, H heads, X key width of a head,
Y value width of a head, F = H*(2X+Y), T tokens of one memory, C tokens of a chunk, P used (sequence, memory) pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.routing.contract import RoutePlan

Update = Literal["linear", "gated_delta"]

CHUNK = 64


@dataclass(frozen=True)
class MemoryState:
    """What a layer remembers of B sequences; never changed in place.

    memories:  (B, M, H, X, Y) float32; with a shared memory it is the last, number M, and the axis has M + 1.
    recent:    (B, M, W-1, F) the last inputs of each memory's short convolutions; W-1 = 0 without convolutions.
    """

    memories: Tensor
    recent: Tensor

    @property
    def bytes(self) -> int:
        """Stored bytes; they do not grow with the sequence."""
        return self.memories.nbytes + self.recent.nbytes


class Written(NamedTuple):
    """What tokens bring to a memory: any leading shape, then (..., H, X), (..., H, X), (..., H, Y), (..., H) twice."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor  # 0 keeps everything
    beta: Tensor  # how much of what was stored under k is replaced


class MixtureOfMemories(nn.Module):
    """o_t = sum_j g_tj q_t M^j_t (+ q_t M^shared_t), over the memories j of the plan (eq. 5-8), gated, projected.

    memories:    M, what the router chooses from; a plan uses at most `k` of them.
    shared:      one more memory with its own projections, used by all tokens with weight 1.
    update:      "linear": M + k^T v (eq. 5); "gated_delta": a (I - b k^T k) M + b k^T v with q and k of length one
                 (Gated DeltaNet, 2412.06464), where a token's decay `a` acts only on the memories it writes.
    conv:        width of short causal convolutions on q, k, v, 0 for none; they see the tokens of one memory only.

    Raises MoesaicError for sizes that do not fit and for unknown updates.
    """

    def __init__(
        self,
        width: int,
        memories: int = 4,
        k: int = 2,
        shared: bool = True,
        heads: int = 4,
        update: Update = "linear",
        *,
        key_width: int | None = None,
        value_width: int | None = None,
        conv: int = 0,
    ) -> None:
        super().__init__()
        if update not in ("linear", "gated_delta"):
            raise MoesaicError(f"update = {update!r}: expected linear or gated_delta")
        if not 1 <= k <= memories:
            raise MoesaicError(f"k = {k} of {memories} memories: k must be from 1 to the number of memories")
        self.key_width, self.value_width = (w or width // heads for w in (key_width, value_width))
        if min(heads, self.key_width, self.value_width) < 1 or conv < 0 or conv == 1:
            raise MoesaicError(
                f"{heads} heads with keys of {self.key_width} and values of {self.value_width}, conv = {conv}: sizes "
                "must be at least 1, and a convolution 0 (none) or at least 2 wide"
            )
        self.width, self.memories, self.k, self.shared, self.heads = width, memories, k, shared, heads
        self.update, self.conv = update, conv
        total, keys, values = memories + shared, heads * self.key_width, heads * self.value_width
        self.query = nn.Linear(width, keys, bias=False)
        self.key_value = nn.Parameter(torch.empty(total, width, keys + values))
        self.gate = nn.Linear(width, values, bias=False)
        self.out = nn.Linear(values, width, bias=False)
        self.norm = nn.RMSNorm(self.value_width, eps=1e-5)
        if conv:
            self.short = nn.Parameter(torch.empty(2 * keys + values, conv))
        if update == "gated_delta":
            self.rates = nn.Parameter(torch.empty(total, width, 2 * heads))  # of beta and of the decay
            self.log_decay = nn.Parameter(torch.empty(heads))
            self.decay_bias = nn.Parameter(torch.empty(heads))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Xavier projections; decays between 1 and 16 per unit of time, time steps between 0.001 and 0.1."""
        for matrix in [self.query.weight, self.gate.weight, self.out.weight, *self.key_value]:
            nn.init.xavier_uniform_(matrix)
        if self.conv:
            nn.init.uniform_(self.short, -(self.conv**-0.5), self.conv**-0.5)
        if self.update == "gated_delta":
            for matrix in self.rates:
                nn.init.xavier_uniform_(matrix)
            self.log_decay.copy_(torch.empty(self.heads).uniform_(1, 16).log())
            step = torch.empty(self.heads).uniform_(-3, -1).mul(2.302585).exp()  # log-uniform
            self.decay_bias.copy_(step + torch.log(-torch.expm1(-step)))  # so that softplus(bias) = step

    def initial(self, batch: int) -> MemoryState:
        """Empty memories for `batch` sequences."""
        weight, total = self.key_value, self.memories + self.shared
        rows = self.heads * (2 * self.key_width + self.value_width)
        return MemoryState(
            weight.new_zeros(batch, total, self.heads, self.key_width, self.value_width, dtype=torch.float32),
            weight.new_zeros(batch, total, max(self.conv - 1, 0), rows),
        )

    def forward(
        self, x_BSD: Tensor, plan: RoutePlan, state: MemoryState | None = None, valid_BS: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """All tokens at once: (B, S, D) -> (B, S, D), and the state after the last one.

        plan:   of the N tokens, sequence after sequence, from any router over M experts with renormalised weights.
        valid:  False at padding, which reads 0 and writes nothing.

        Raises MoesaicError if plan, state or mask do not fit the tokens.
        """
        state = self._fit(x_BSD, plan, state, valid_BS)
        valid_BS = x_BSD.new_ones(x_BSD.shape[:2], dtype=torch.bool) if valid_BS is None else valid_BS.bool()
        weight_BSM, chosen_BSM = self._dense(plan, valid_BS)
        # Stable: the tokens of a memory come first, in the order of time.
        order_BMS = (~chosen_BSM).transpose(1, 2).byte().argsort(dim=-1, stable=True)
        length_BM = chosen_BSM.sum(1)
        order_BMT = order_BMS[..., : max(1, int(length_BM.max()))]
        read_BMTHY, memories, recent = self._segments(x_BSD, order_BMT, length_BM, state, range(self.memories))
        weight_BMT = weight_BSM.transpose(1, 2).gather(-1, order_BMT)  # 0 behind a segment's end
        read = (read_BMTHY * weight_BMT[..., None, None]).flatten(1, 2).flatten(2)
        where = order_BMT.flatten(1)[..., None].expand_as(read)
        out = read.new_zeros(*x_BSD.shape[:2], read.shape[-1]).scatter_add(1, where, read)
        if self.shared:
            order_B1S = (~valid_BS).byte().argsort(dim=-1, stable=True)[:, None]
            read_B1SHY, one, last = self._segments(x_BSD, order_B1S, valid_BS.sum(1)[:, None], state, [self.memories])
            read = read_B1SHY[:, 0].flatten(2) * valid_BS.gather(1, order_B1S[:, 0])[..., None]
            out = out.scatter_add(1, order_B1S[:, 0, :, None].expand_as(read), read)
            memories, recent = torch.cat([memories, one], 1), torch.cat([recent, last], 1)
        return self._finish(x_BSD, out), MemoryState(memories, recent)

    def step(
        self, x_BD: Tensor, plan: RoutePlan, state: MemoryState, valid_B: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """One token of each sequence: (B, D) -> (B, D). Only the memories of the plan are read and written."""
        state = self._fit(x_BD[:, None], plan, state, None if valid_B is None else valid_B[:, None])
        valid_B = torch.ones(len(x_BD), dtype=torch.bool, device=x_BD.device) if valid_B is None else valid_B.bool()
        weight_BM, chosen_BM = (t[:, 0] for t in self._dense(plan, valid_B[:, None]))
        if self.shared:
            weight_BM = F.pad(weight_BM, (0, 1), value=1.0)
            chosen_BM = torch.cat([chosen_BM, valid_B[:, None]], 1)
        b_P, m_P = chosen_BM.nonzero(as_tuple=True)
        raw_PF, rates = self._project(x_BD[b_P, None], m_P)
        window_PWF = torch.cat([state.recent[b_P, m_P], raw_PF], 1)
        w = Written(*(part[:, 0] for part in self._written(window_PWF, rates)))
        with torch.autocast(x_BD.device.type, enabled=False):
            read_PHY, new_PHXY = self._update(w, state.memories[b_P, m_P])
        read_PHY = read_PHY * weight_BM[b_P, m_P, None, None]
        out = read_PHY.new_zeros(len(x_BD), self.heads * self.value_width).index_add(0, b_P, read_PHY.flatten(1))
        memories = state.memories.index_put((b_P, m_P), new_PHXY)
        recent = state.recent.index_put((b_P, m_P), window_PWF[:, 1:] if self.conv else window_PWF[:, :0])
        return self._finish(x_BD, out), MemoryState(memories, recent)

    def _dense(self, plan: RoutePlan, valid_BS: Tensor) -> tuple[Tensor, Tensor]:
        """The plan as weights and choices (B, S, M), nothing chosen at padding."""
        used_NK = plan.used & valid_BS.reshape(-1, 1)
        weight_NM = plan.weight.new_zeros(len(used_NK), self.memories)
        index_NK = plan.index.long().clamp_min(0)
        weight_NM = weight_NM.scatter_add(1, index_NK, plan.weight * used_NK)  # add: empty slots all point at 0
        chosen_NM = torch.zeros_like(weight_NM).scatter_add(1, index_NK, used_NK.to(weight_NM.dtype)) > 0
        return weight_NM.view(*valid_BS.shape, -1), chosen_NM.view(*valid_BS.shape, -1)

    def _segments(
        self, x_BSD: Tensor, order_BMT: Tensor, length_BM: Tensor, state: MemoryState, which: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run memories `which` over their own tokens: what is read (B, M, T, H, Y), new memories, new `recent`."""
        rows = slice(which[0], which[-1] + 1)
        batch, length = len(order_BMT), order_BMT.shape[-1]
        x_BMTD = x_BSD[torch.arange(batch, device=x_BSD.device)[:, None, None], order_BMT]
        raw_BMTF, rates = self._project(x_BMTD, torch.arange(rows.start, rows.stop, device=x_BSD.device))
        window = torch.cat([state.recent[:, rows], raw_BMTF], 2)
        written = self._written(window, rates)
        real = torch.arange(length, device=x_BSD.device) < length_BM[..., None]
        with torch.autocast(x_BSD.device.type, enabled=False):  # sums over the whole past: fp32 whatever the backbone's
            read, new = scan(written, real, state.memories[:, rows], self.update == "gated_delta")
        untouched = (length_BM == 0)[..., None, None, None]
        new = torch.where(untouched, state.memories[:, rows], new)
        last = length_BM[..., None] + torch.arange(state.recent.shape[2], device=x_BSD.device)
        recent = window.gather(2, last[..., None].expand(*last.shape, window.shape[-1]))
        return read, new, recent

    def _project(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., M, T, D) and memory numbers (M,) -> raw q, k, v (..., M, T, F), and rates (..., M, T, 2H)."""
        raw = torch.cat([self.query(x), x @ self.key_value[memory]], -1)
        return raw, x @ self.rates[memory] if self.update == "gated_delta" else None

    def _written(self, window: Tensor, rates: Tensor | None) -> Written:
        """Convolve (..., W-1+T, F) inputs, and split them into what is written and read."""
        if self.conv:
            taps = window.unfold(-2, self.conv, 1)  # (..., T, F, W)
            window = F.silu((taps * self.short).sum(-1))
        keys = self.heads * self.key_width
        q, k, v = (
            part.float().unflatten(-1, (self.heads, -1))
            for part in window.split([keys, keys, window.shape[-1] - 2 * keys], -1)
        )
        if rates is None:
            nothing = q.new_zeros(q.shape[:-1])
            return Written(q, k, v, nothing, nothing)
        beta, decay = rates.float().chunk(2, -1)
        log_decay = -self.log_decay.exp() * F.softplus(decay + self.decay_bias)
        return Written(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, log_decay, beta.sigmoid())

    def _update(self, w: Written, old_PHXY: Tensor) -> tuple[Tensor, Tensor]:
        """One step of P memories: what is read (P, H, Y), and the new states."""
        if self.update == "linear":
            new_PHXY = old_PHXY + w.k[..., None] * w.v[..., None, :]
        else:
            kept = w.log_decay.exp()[..., None, None] * old_PHXY
            stored = torch.einsum("phx,phxy->phy", w.k, kept)
            new_PHXY = kept + w.k[..., None] * (w.beta[..., None] * (w.v - stored))[..., None, :]
        return torch.einsum("phx,phxy->phy", w.q, new_PHXY), new_PHXY

    def _finish(self, x: Tensor, read: Tensor) -> Tensor:
        """Normalise each head, gate by the token, project: (..., H*Y) -> (..., D)."""
        normed = self.norm(read.to(x.dtype).unflatten(-1, (self.heads, -1))).flatten(-2)
        result: Tensor = self.out(normed * F.silu(self.gate(x)))
        return result

    def _fit(self, x_BSD: Tensor, plan: RoutePlan, state: MemoryState | None, valid_BS: Tensor | None) -> MemoryState:
        batch, length = x_BSD.shape[:2]
        if len(plan.index) != batch * length:
            raise MoesaicError(f"the plan is for {len(plan.index)} tokens, but {batch} x {length} are mixed")
        if plan.index.shape[1] > self.k or int(plan.index.max()) >= self.memories:
            raise MoesaicError(
                f"the plan has {plan.index.shape[1]} slots and goes up to memory {int(plan.index.max())}; this layer "
                f"takes top-{self.k} of {self.memories}: build its router with experts={self.memories}, k={self.k}"
            )
        if valid_BS is not None and valid_BS.shape != x_BSD.shape[:2]:
            raise MoesaicError(f"the mask is {tuple(valid_BS.shape)}, but the tokens are {batch} x {length}")
        if state is not None and len(state.memories) != batch:
            raise MoesaicError(f"the state is of {len(state.memories)} sequences, but {batch} are continued")
        return self.initial(batch) if state is None else state


def scan(w: Written, real: Tensor, state: Tensor, delta: bool) -> tuple[Tensor, Tensor]:
    """The recurrence over T tokens, chunk after chunk: what each token reads, (..., T, H, Y), and the last state.

    real:   (..., T) bool: what lies behind the end of a segment changes nothing; what it reads has no meaning.
    state:  (..., H, X, Y)
    delta:  the gated delta rule; without it, w.beta is not read.
    """
    keep = real[..., None]
    wide = [w.q, w.k * keep[..., None], w.v * keep[..., None]]
    wide = [t.transpose(-2, -3) for t in wide] + [(t * keep).mT[..., None] for t in (w.log_decay, w.beta)]
    reads = []
    for q, k, v, log_decay, beta in zip(*(t.split(CHUNK, -2) for t in wide), strict=True):  # each (..., H, C, .)
        read, state = chunk(Written(q, k, v, log_decay, beta), state, delta)
        reads.append(read)
    return torch.cat(reads, -2).transpose(-2, -3), state


def chunk(w: Written, state: Tensor, delta: bool) -> tuple[Tensor, Tensor]:
    """C steps of M_t = a_t M_{t-1} + k_t^T u_t, o_t = q_t M_t as matrix products (2412.06464, section 3.3).

    Linear: u_t = v_t. Gated delta: u_t = b_t (v_t - a_t k_t M_{t-1}), in which earlier u of the chunk appear: they are
    the solution of a unit lower triangular system. Here w has C before the widths, and rates of width 1.
    """
    total = w.log_decay.cumsum(-2)  # (..., H, C, 1), log of the decay since the chunk's start
    later = torch.ones(total.shape[-2], total.shape[-2], dtype=torch.bool, device=total.device).triu(1)
    fade = (total - total.mT).masked_fill(later, -torch.inf).exp()  # from token j to token i >= j
    u = w.v
    if delta:
        u = w.beta * (w.v - total.exp() * (w.k @ state))
        lower = (w.beta * fade * (w.k @ w.k.mT)).tril(-1)
        u = torch.linalg.solve_triangular(lower, u, upper=False, unitriangular=True)
    read = total.exp() * (w.q @ state) + (fade * (w.q @ w.k.mT)) @ u
    end = total[..., -1:, :]
    return read, end.exp() * state + (w.k * (end - total).exp()).mT @ u
