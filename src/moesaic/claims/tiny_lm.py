"""A tiny causal LM around the package's own routers and pools, its data as bytes, and the loop that trains it.

Only the transformer is made here: pre-norm, learned positions, torch's attention. Routers, policies, pools, losses,
batches and learning-rate schedules are the package's.
Shapes: B batch, S sequence, N = B * S tokens, D model width, E experts, L layers, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.balance.load_balance import LoadBalance
from moesaic.data.domain import Domain
from moesaic.data.tokens import DomainTokens, TokenBatches, tokenize_domains
from moesaic.experts.bank import FFNBank
from moesaic.experts.pool import Pool, all_on
from moesaic.progress import track
from moesaic.routing.contract import Phase, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.family import build_router, router_class
from moesaic.training.schedule import cosine_to_zero

BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The transformer around the experts."""

    vocabulary: int = BYTES
    width: int = 48
    heads: int = 4
    layers: int = 3
    length: int = 48
    dropout: float = 0.0


@dataclass
class Output:
    """One forward: logits (B, S, V), the plan of each layer, and what each layer's router was given."""

    logits: Tensor
    plans: list[RoutePlan]
    inputs: list[RouteInput]


class Block(nn.Module):
    """h += attention(norm h); h += pool(norm h) under the plan."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads, self.dropout = sizes.heads, sizes.dropout
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=0.1)

    def attend(self, h_BSD: Tensor) -> Tensor:
        batch, length, width = h_BSD.shape
        qkv = self.qkv(self.attention_norm(h_BSD)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return h_BSD + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class TinyLM(nn.Module):
    """`router` None runs every expert with weight one: a dense FFN.

    carry:  hand the router's state from layer to layer; False makes every layer the first.
    """

    def __init__(self, sizes: Sizes, router: Router | None, pools: Sequence[Pool], carry: bool = True) -> None:
        super().__init__()
        self.sizes, self.router, self.carry = sizes, router, carry
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.position = nn.Embedding(sizes.length, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width, eps=1e-6)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        for module in (self.embedding, self.position, self.head):
            nn.init.normal_(module.weight, std=0.1)
        self.pools = nn.ModuleList(pools)

    def forward(self, ids_BS: Tensor, plans: Sequence[RoutePlan] | None = None, **fields: Any) -> Output:
        """`plans` replaces the router; `fields` of the RouteInput (step, modality, ...)."""
        phase: Phase = "train" if self.training else "eval"
        start = RouteInput.of(ids_BS, phase=phase, **fields)
        state, made, inputs = RouterState(), [], []
        h_BSD = self.embedding(ids_BS) + self.position.weight[: ids_BS.shape[1]]
        for layer, (block, pool) in enumerate(zip(self.blocks, self.pools, strict=True)):
            h_BSD = block.attend(h_BSD)  # type: ignore[operator]
            x_ND = block.ffn_norm(h_BSD).flatten(0, 1)  # type: ignore[operator]
            inp = replace(start, hidden=x_ND, layer=layer)
            if plans is not None:
                plan = plans[layer]
            elif self.router is None:
                plan = all_on(len(x_ND), pool.experts)  # type: ignore[arg-type]
            else:
                plan, state = self.router.plan(inp, state if self.carry else RouterState())
            h_BSD = h_BSD + block.drop(pool(x_ND, plan).view(h_BSD.shape))  # type: ignore[operator]
            made.append(plan)
            inputs.append(inp)
        return Output(self.head(self.norm(h_BSD)), made, inputs)


def build(
    sizes: Sizes,
    router: str | None,
    *,
    experts: int,
    hidden: int,
    seed: int,
    pool: Callable[[FFNBank], Pool] = Pool,
    carry: bool = True,
    **options: Any,
) -> TinyLM:
    """A freshly initialised model: `experts` FFNs of width `hidden` per layer, and the router of that name over them.

    pool:   makes the pool of a bank, for free or shared experts. Models of one seed share the transformer's start.
    """
    torch.manual_seed(seed)
    model = TinyLM(sizes, None, [], carry)
    pools = [pool(FFNBank(experts, sizes.width, hidden)) for _ in range(sizes.layers)]
    for made in pools:
        made.bank.reset(0.1)  # type: ignore[operator]
    model.pools.extend(pools)
    if router is not None:
        if "seed" in inspect.signature(router_class(router)).parameters:  # frozen or drawn: the seed's own
            options = {"seed": seed, **options}
        model.router = build_router(router, sizes.width, pools[0].experts, sizes.layers, **options)
    return model


class Bytes:
    """A tokenizer whose ids are UTF-8 bytes; documents begin with byte 0."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = None

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        return {"input_ids": [list(document.encode()) for document in text]}

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        return bytes(token_ids).decode(errors="replace")


def byte_streams(data: Sequence[Domain]) -> list[DomainTokens]:
    """The domains as streams of bytes."""
    return tokenize_domains(data, Bytes())


@dataclass(frozen=True)
class ByteData:
    """Training batches that depend on the seed, and held-out windows that do not."""

    batches: TokenBatches
    held_out: list[Tensor]  # one (n, length) int64 per domain

    @classmethod
    def of(cls, data: Sequence[Domain], seed: int, batch: int, length: int, windows: int = 32) -> "ByteData":
        """Balanced batches over all domains, and at most `windows` windows of each."""
        streams = byte_streams(data)
        return cls(
            TokenBatches(tuple(streams), batch, length, seed), [stream.windows(length, windows) for stream in streams]
        )

    def ids(self, step: int) -> Tensor:
        """(B, S) int64."""
        return self.batches.batch(step)["input_ids"]


def steps_of(full: int, scale: float) -> int:
    """Optimizer steps at this scale."""
    return max(2, round(full * scale))


def fit(
    parameters: nn.Module | Sequence[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    steps: int,
    label: str,
    lr: float = 3e-3,
) -> None:
    """AdamW over `steps` losses, 5 % warmup and a cosine to zero, gradients clipped at 1."""
    listed = list(parameters.parameters()) if isinstance(parameters, nn.Module) else list(parameters)
    optimizer = torch.optim.AdamW(listed, lr=lr, weight_decay=0.01)
    for step in track(range(steps), label):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_to_zero(step, steps, warmup=steps // 20)
        optimizer.zero_grad()
        loss_of(step).backward()
        nn.utils.clip_grad_norm_(listed, 1.0)
        optimizer.step()


def next_loss(out: Output, ids_BS: Tensor) -> Tensor:
    """Mean loss of the next token, nats."""
    return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())


def balance_of(out: Output, balance: LoadBalance) -> Tensor:
    """The balance loss of one forward."""
    return balance(out.plans, out.inputs[0].valid, out.inputs[0].seq)


def train_lm(
    model: TinyLM,
    ids_of: Callable[[int], Tensor],
    steps: int,
    label: str,
    extra: Callable[[Output], Tensor] | None = None,
    **fields: Any,
) -> TinyLM:
    """Next-token training plus `extra` losses; the router's schedule is told every step. Ends in eval mode."""

    def loss_of(step: int) -> Tensor:
        if model.router is not None:
            model.router.schedule(step, steps)
        ids = ids_of(step)
        out = model(ids, step=step, **{name: make(ids) for name, make in fields.items()})
        loss = next_loss(out, ids)
        return loss if extra is None else loss + extra(out)

    model.train()
    fit(model, loss_of, steps, label)
    return model.eval()


@torch.no_grad()
def evaluate(
    model: TinyLM, held_out: Sequence[Tensor], scale: float = 1.0, **fields: Any
) -> tuple[float, list[Output]]:
    """Mean held-out loss, every domain weighing the same, and the forward of each domain. `scale` drops windows."""
    losses, outputs = [], []
    for windows in held_out:
        ids = windows[: max(2, round(len(windows) * scale))]
        out = model(ids, **{name: make(ids) for name, make in fields.items()})
        losses.append(float(next_loss(out, ids)))
        outputs.append(out)
    return sum(losses) / len(losses), outputs
