"""The best route of every token, found by trying them all, and how much of that gain is only chance (2410.10846).

A route says for each layer which expert runs; a whole sequence is run under one route, so context and token share it.
The oracle's loss is the mean over tokens of the minimum over routes. It reads the true next token and is a minimum of
many noisy numbers: low by construction. So every report holds a control in which routes know nothing of the token.
Shapes: R routes, L layers, N scored tokens, O options a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.models.ffn_sites import decoder_layers
from moesaic.models.routed import RoutedForCausalLM
from moesaic.routing.big_small import BIG, SMALL
from moesaic.routing.contract import RoutePlan, Router
from moesaic.routing.policies import fixed
from moesaic.routing.pregate import positions

MAX_ROUTES = 20_000  # of one table; 2^14 routes of 16 k tokens are 1 GB


@dataclass
class RouteTable:
    """losses[r, n], nats: of scored token n when its whole sequence ran under route r.

    routes:  (R, L) expert ids. rows: (N,) which of the B * S tokens predicts scored token n. calls: layer calls spent.
    """

    routes: Tensor
    losses: Tensor
    rows: Tensor
    calls: int

    @property
    def budgets(self) -> Tensor:
        """Big experts of each route, (R,)."""
        return (self.routes == BIG).sum(1)


@dataclass(frozen=True)
class Forced:
    """Stands for a forward's plans: one expert for all tokens, in the layer that is being called."""

    expert: int

    def plan(self, router: Router, layer: int, x_ND: Tensor) -> RoutePlan:
        """The plan, whatever the router would say."""
        return fixed(torch.full((len(x_ND),), self.expert, device=x_ND.device))


# -- the table ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def route_table(
    model: RoutedForCausalLM,
    input_ids: Tensor,
    *,
    options: Sequence[int] = (BIG, SMALL),
    budgets: Sequence[int] | None = None,
    padding_mask: Tensor | None = None,
) -> RouteTable:
    """The losses of (B, S) tokens under all O^L routes, or under those whose number of big experts is in `budgets`.

    Routes that share their first layers share their calls: sum over l of O^l layer calls instead of L O^L.
    Raises MoesaicError for a model without expert layers, unknown options, or more than MAX_ROUTES routes.
    """
    layers, experts = len(model.pools()), min((pool.experts for pool in model.pools()), default=0)
    if not layers or not all(0 <= option < experts for option in options):
        raise MoesaicError(f"options {list(options)}: this model's layers have {experts} experts, numbered from 0")
    count = count_routes(layers, options, budgets)
    if not 0 < count <= MAX_ROUTES:
        raise MoesaicError(f"{count} routes over {layers} layers; expected 1 to {MAX_ROUTES}: choose other budgets")
    rows, target = _targets(input_ids, padding_mask)
    routes: list[tuple[int, ...]] = []
    losses: list[Tensor] = []
    calls = 0

    def descend(hidden: Tensor, route: tuple[int, ...]) -> None:
        nonlocal calls
        if len(route) == layers:
            logits = run.tail(hidden).flatten(0, 1)[rows].float()
            losses.append(F.cross_entropy(logits, target, reduction="none"))
            routes.append(route)
            return
        for option in options:
            if feasible((*route, option), layers, budgets):
                calls += 1
                descend(run.layer(len(route), hidden, option), (*route, option))

    training = model.training
    try:
        run = _Layers(model.eval(), input_ids, padding_mask)
        descend(run.start, ())
    finally:
        model.train(training)
    return RouteTable(torch.tensor(routes), torch.stack(losses), rows, calls)


def feasible(route: Sequence[int], layers: int, budgets: Sequence[int] | None) -> bool:
    """Whether a route's beginning can still end with an allowed number of big experts."""
    big = sum(expert == BIG for expert in route)
    return budgets is None or any(big <= budget <= big + layers - len(route) for budget in budgets)


def count_routes(layers: int, options: Sequence[int], budgets: Sequence[int] | None) -> int:
    """Number of routes, without listing them."""
    counts, others = {0: 1}, sum(option != BIG for option in options)
    for _ in range(layers):
        after: dict[int, int] = {}
        for big, ways in counts.items():
            after[big] = after.get(big, 0) + ways * others
            if BIG in options:
                after[big + 1] = after.get(big + 1, 0) + ways
        counts = after
    return sum(ways for big, ways in counts.items() if budgets is None or big in budgets)


def _targets(input_ids: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flat places of tokens that predict a real one, (N,), and what they should predict, (N,)."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if padding_mask is None else padding_mask.bool()
    scored = torch.zeros_like(real)
    scored[:, :-1] = real[:, :-1] & real[:, 1:]
    rows = scored.flatten().nonzero().flatten()
    return rows, input_ids.flatten()[rows + 1]


class _Layers:
    """The decoder layers of a model, one call at a time, on the arguments they get in a whole forward."""

    def __init__(self, model: RoutedForCausalLM, input_ids: Tensor, padding_mask: Tensor | None) -> None:
        self.model, self.stack = model, decoder_layers(model.backbone)[1]
        self.given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": padding_mask, "use_cache": False}
        if padding_mask is not None and model._backbone_takes_positions:
            self.given["position_ids"] = positions(input_ids, padding_mask, 0)
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hooks = [layer.register_forward_pre_hook(self._note, with_kwargs=True) for layer in self.stack]
        try:
            with model.current.use(Forced(0)):
                model.backbone(**self.given)
        finally:
            for hook in hooks:
                hook.remove()
        args, kwargs = self.arguments[0]
        self.start: Tensor = args[0] if args else kwargs["hidden_states"]

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.arguments.append((args, kwargs))

    def layer(self, number: int, hidden: Tensor, expert: int) -> Tensor:
        """One layer with one expert."""
        args, kwargs = self.arguments[number]
        given = ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})
        with self.model.current.use(Forced(expert)):
            out = self.stack[number](*given[0], **given[1])
        result: Tensor = out[0] if isinstance(out, tuple) else out
        self.tuples = isinstance(out, tuple)
        return result

    def tail(self, hidden: Tensor) -> Tensor:
        """Logits (B, S, V): the model with its layers handing `hidden` through."""
        with _standing_in(self.stack, lambda *_, **__: (hidden,) if self.tuples else hidden):
            logits: Tensor = self.model.backbone(**self.given).logits
        return logits


@contextmanager
def _standing_in(stack: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """Every layer computes `forward` instead."""
    try:
        for layer in stack:
            layer.forward = forward
        yield
    finally:
        for layer in stack:
            del layer.forward


# -- what it says ------------------------------------------------------------------------------------------------------


@dataclass
class RouterRoutes:
    """What a learned router did: its own loss and routes of the scored tokens, (N,) and (N, L)."""

    losses: Tensor
    routes: Tensor


@torch.no_grad()
def router_routes(model: RoutedForCausalLM, input_ids: Tensor, padding_mask: Tensor | None = None) -> RouterRoutes:
    """Losses and first-slot routes under the model's own router, for the tokens that `route_table` scores."""
    rows, target = _targets(input_ids, padding_mask)
    training = model.training
    try:
        out: Any = model.eval()(input_ids, attention_mask=padding_mask, use_cache=False)
    finally:
        model.train(training)
    losses = F.cross_entropy(out.logits.flatten(0, 1)[rows].float(), target, reduction="none")
    return RouterRoutes(losses, torch.stack([plan.expert[rows] for plan in model.plans()], 1))


@dataclass
class OracleReport:
    """Mean losses in nats, by number of big experts; lower is better.

    oracle:     per token the best route. fixed: the best single route. random: a route drawn at random.
    control:    the oracle over routes that carry no information about the token: what is left of its gain by chance.
    transfer:   routes chosen on this model, scored on another trained from another seed, beside that model's `fixed`;
                a gain that survives this is no accident of one model's noise.
    oracle_any, best_of_random:  over all routes of the table; over R routes drawn for each token.
    usage:      share of tokens whose best route is big there, per layer.
    router:     its loss; loss of its routes in the table; share of layers (agreement) and of whole routes (exact) equal
                to the best route's; big experts a token (budget, hard choices); regret against `oracle_any`.
    difficulty: (N,) loss(all small) - loss(best route): what a token has to gain, which is not how large its loss is.
    hopeless:   share of the tenth of tokens with the highest all-small loss that gain less than a tenth of it.
    """

    oracle: dict[int, float]
    fixed: dict[int, float]
    random: dict[int, float]
    control: dict[int, float]
    usage: dict[int, list[float]]
    oracle_any: float
    best_of_random: float
    transfer: dict[int, tuple[float, float]] = field(default_factory=dict)
    router: dict[str, float] = field(default_factory=dict)
    difficulty: Tensor | None = None
    hopeless: float | None = None


def oracle_report(
    table: RouteTable,
    *,
    router: RouterRoutes | None = None,
    other: RouteTable | None = None,
    draws: int = 100,
    seed: int = 0,
) -> OracleReport:
    """Everything the table shows. other: the same routes and tokens on another model; draws: R of `best_of_random`.

    Raises MoesaicError if `other` is a table of other routes or tokens.
    """
    if other is not None and (not torch.equal(table.routes, other.routes) or table.losses.shape != other.losses.shape):
        raise MoesaicError("the other table is of other routes or tokens: make both from the same ids and options")
    generator = torch.Generator().manual_seed(seed)
    losses, count = table.losses, len(table.routes)
    drawn = torch.randint(count, (draws, losses.shape[1]), generator=generator)
    best = float(losses.min(0).values.mean())
    report = OracleReport({}, {}, {}, {}, {}, best, float(losses.gather(0, drawn).min(0).values.mean()))
    for budget in table.budgets.unique().tolist():
        among = (table.budgets == budget).nonzero().flatten()
        part = losses[among]
        choice = part.argmin(0)
        report.oracle[budget] = float(part.min(0).values.mean())
        report.fixed[budget] = float(part.mean(1).min())
        report.random[budget] = float(part.mean())
        report.control[budget] = control(part, generator)
        report.usage[budget] = (table.routes[among][choice] == BIG).float().mean(0).tolist()
        if other is not None:
            scored = other.losses[among]
            report.transfer[budget] = (float(scored.gather(0, choice[None]).mean()), float(scored.mean(1).min()))
    if router is not None:
        report.router = _compare(table, router, best)
    small = ((table.routes == SMALL).all(1)).nonzero().flatten()
    if len(small):
        base = losses[small[0]]
        report.difficulty = base - losses.min(0).values
        hard = base.topk(max(1, len(base) // 10)).indices
        report.hopeless = float((report.difficulty[hard] < 0.1 * base[hard]).float().mean())
    return report


def control(losses_RN: Tensor, generator: torch.Generator, neighbours: int = 32) -> float:
    """The mean minimum over routes whose deviations were shuffled among tokens of similar mean loss.

    Each route keeps the distribution of its deviations from a token's mean over routes, also how it varies with that
    mean, but which of the similar tokens it suits is lost: the minimum is low by selection alone. Deviations from a
    mean they are part of are too small by the root of 1 - 1/R; undone here, so that on pure noise it is the oracle.
    """
    mean_N, order = losses_RN.mean(0).sort()
    routes = len(losses_RN)
    deviation = (losses_RN[:, order] - mean_N) * (routes / max(1, routes - 1)) ** 0.5
    for part in deviation.split(neighbours, dim=1):
        shuffle = torch.rand(part.shape, generator=generator).argsort(1).to(part.device)
        part.copy_(part.gather(1, shuffle))
    return float((mean_N + deviation).min(0).values.mean())


def _compare(table: RouteTable, router: RouterRoutes, best: float) -> dict[str, float]:
    """The learned router beside the oracle."""
    ideal = table.routes[table.losses.argmin(0)]
    same = (table.routes[:, None] == router.routes[None]).all(-1)  # (R, N)
    looked_up = table.losses[same.int().argmax(0), torch.arange(same.shape[1])]
    known = same.any(0)
    loss = float(router.losses.mean())
    return {
        "loss": loss,
        "table_loss": float(looked_up[known].mean()),
        "agreement": float((router.routes == ideal).float().mean()),
        "exact": float((router.routes == ideal).all(1).float().mean()),
        "budget": float((router.routes == BIG).sum(1).float().mean()),
        "regret": loss - best,
    }
