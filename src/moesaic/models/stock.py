"""Mixtures of experts as transformers ships them: find their gates, record and replay plans, put in another router.

Since transformers 5 a mixture block asks `gate(hidden) -> (logits, weights, indices)` and hands the last two to
`experts(hidden, indices, weights)`: Mixtral, OLMoE, Qwen2/3-MoE, DeepSeek-V2/V3, gpt-oss, Granite and others, read in
5.23. Blocks are found by that structure, not by class, and every triple is checked where it is read.
What records and replays takes a `RoutedForCausalLM` too.
Shapes: N tokens of one forward, E experts, K slots, D model width, L mixture layers.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.errors import MoesaicError
from moesaic.models.routed import ExpertLayer, Modality, RoutedCall, RoutedForCausalLM
from moesaic.models.routes import Current
from moesaic.routing.contract import EMPTY, RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.policies import Fixed
from moesaic.routing.pregate import positions

GATE_NAMES = ("gate", "router")

Change = Callable[[int, RoutePlan], RoutePlan]


@dataclass(frozen=True)
class StockGate:
    """A gate, the block it stands in, and what it chooses from."""

    path: str  # of the gate inside the model
    block: nn.Module
    name: str  # of the gate inside its block
    experts: int
    width: int

    @property
    def module(self) -> nn.Module:
        """What stands there now."""
        module: nn.Module = getattr(self.block, self.name)
        return module


def find_stock_gates(model: nn.Module) -> list[StockGate]:
    """The gates of all mixture blocks, in layer order.

    A block holds stacked `experts` (parameters of three axes) beside a `gate` or `router` with a matrix (E, D).
    Raises MoesaicError if there is none.
    """
    found = []
    for path, block in model.named_modules():
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module) or not any(p.ndim == 3 for p in experts.parameters()):
            continue
        for name in GATE_NAMES:
            gate = getattr(block, name, None)
            if isinstance(gate, GateAdapter):
                found.append(gate.routing.gates[gate.layer])
                break
            matrix = next((p for p in gate.parameters() if p.ndim == 2), None) if isinstance(gate, nn.Module) else None
            if matrix is not None:
                found.append(StockGate(f"{path}.{name}".lstrip("."), block, name, *matrix.shape))
                break
    if not found:
        raise MoesaicError(
            f"{type(model).__name__} has no mixture of experts of the kind transformers 5 builds: expected blocks with "
            f"stacked `experts` beside a `gate` or `router`; for a dense model use attach_router"
        )
    return found


def plan_of(output: Any, gate: StockGate) -> RoutePlan:
    """The plan in a gate's answer, a detached copy; raises MoesaicError if that is not (logits, weights, indices)."""
    parts = output if isinstance(output, tuple) and all(isinstance(part, Tensor) for part in output) else ()
    if (
        len(parts) != 3
        or parts[1].shape != parts[2].shape
        or parts[2].is_floating_point()
        or not parts[1].is_floating_point()
        or parts[0].shape[-1] != gate.experts
    ):
        got = [tuple(part.shape) for part in parts] or type(output).__name__
        raise MoesaicError(
            f"{gate.path} answers {got}, expected (logits (N, {gate.experts}), weights (N, K), indices (N, K)); "
            "this family's gate follows another contract, so its plans cannot be read"
        )
    logits, weights, indices = (part.detach().reshape(-1, part.shape[-1]) for part in parts)
    # Copies: blocks may scale their weights in place after the gate has answered.
    return RoutePlan(indices.to(torch.int32, copy=True), weights.to(torch.float32, copy=True), logits.float())


def stock_slots(plan: RoutePlan, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(weights, indices) as stock experts take them: an empty slot becomes expert 0 with weight 0.

    They do not know EMPTY: the grouped kernels accept index -1 without a word and corrupt other tokens' outputs.
    Raises MoesaicError for plans that skip whole blocks, which a stock block cannot do.
    """
    if plan.run is not None:
        raise MoesaicError("this plan skips blocks (`run`), which stock mixture blocks cannot do; use attach_router")
    weights = plan.weight.masked_fill(~plan.used, 0.0).to(dtype, copy=True)
    return weights, plan.index.long().masked_fill(~plan.used, 0)


def mixture_layers(model: nn.Module) -> int:
    """Number of routed layers of a stock mixture or a RoutedForCausalLM."""
    return len(model.pools() if isinstance(model, RoutedForCausalLM) else find_stock_gates(model))


# -- recording --------------------------------------------------------------------------------------------------------
@dataclass
class PlanLog:
    """The plans of every forward inside `record_plans`: `forwards[call][layer]`, detached."""

    forwards: list[list[RoutePlan]] = field(default_factory=list)

    @property
    def last(self) -> list[RoutePlan]:
        """The plans of the last forward, one per layer; raises MoesaicError if none ran."""
        if not self.forwards:
            raise MoesaicError("no forward of the model has run inside record_plans, so there are no plans")
        return self.forwards[-1]

    def joined(self) -> list[RoutePlan]:
        """One plan per layer over the tokens of all forwards, in order."""
        self.last  # noqa: B018 - refuses an empty log

        def join(plans: Sequence[RoutePlan]) -> RoutePlan:
            logits = [plan.logits for plan in plans if plan.logits is not None]
            return RoutePlan(
                torch.cat([plan.index for plan in plans]),
                torch.cat([plan.weight for plan in plans]),
                torch.cat(logits) if len(logits) == len(plans) else None,
            )

        return [join(plans) for plans in zip(*self.forwards, strict=True)]


@contextmanager
def record_plans(model: nn.Module) -> Iterator[PlanLog]:
    """Record the plans of every forward inside the block; the model computes exactly what it computes without.

    What gradient checkpointing recomputes is not recorded again. Raises MoesaicError if `model` is no mixture.
    """
    log = PlanLog()
    with ExitStack() as stack:
        if isinstance(model, RoutedForCausalLM):
            own = model.register_forward_hook(lambda *_: log.forwards.append([_detached(p) for p in model.plans()]))
            stack.callback(own.remove)
        else:
            _record_stock(model, log, stack)
        yield log


def _record_stock(model: nn.Module, log: PlanLog, stack: ExitStack) -> None:
    call: Current[dict[int, RoutePlan]] = Current()

    def record(gate: StockGate, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if call.value is not None:
                call.value.setdefault(layer, plan_of(output, gate))

        return hook

    def begin(*_: Any) -> None:
        call.value = {}

    def end(*_: Any) -> None:
        log.forwards.append([plan for _, plan in sorted((call.value or {}).items())])
        call.value = None

    root = _decoder(model)
    gates = find_stock_gates(model)
    hooks = [gate.module.register_forward_hook(record(gate, layer)) for layer, gate in enumerate(gates)]
    for hook in (*hooks, root.register_forward_pre_hook(begin), root.register_forward_hook(end)):
        stack.callback(hook.remove)


def _decoder(model: nn.Module) -> nn.Module:
    """What runs once per forward whether the user calls the model or the decoder inside it."""
    inner = getattr(model, "base_model", None)
    return inner if isinstance(inner, nn.Module) else model


def _detached(plan: RoutePlan) -> RoutePlan:
    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()

    return replace(plan, weight=plan.weight.detach(), logits=cut(plan.logits), probs=cut(plan.probs), aux={})


# -- replaying --------------------------------------------------------------------------------------------------------
class _ChangedRouter(Router):
    """Another router's plans, changed."""

    def __init__(self, router: Router, change: Change) -> None:
        super().__init__(router.scorer, router.policy)
        self.router, self.change, self.caps = router, change, router.caps

    def plan(self, inp: RouteInput, state: RouterState | None = None) -> tuple[RoutePlan, RouterState]:
        plan, state = self.router.plan(inp, state)
        return self.change(inp.layer, plan), state


@contextmanager
def override_plans(model: nn.Module, change: Change) -> Iterator[None]:
    """Inside the block every layer uses `change(layer, its own plan)` instead of its own plan.

    The model's own plan is computed from what the changed layers before it gave. Raises MoesaicError if `model` is no
    mixture.
    """
    with ExitStack() as stack:
        if isinstance(model, RoutedForCausalLM):
            for layer in [module for module in model.modules() if isinstance(module, ExpertLayer)]:
                stack.callback(layer.router.__setitem__, 0, layer.router[0])
                layer.router[0] = _ChangedRouter(layer.router[0], change)
        else:
            for number, gate in enumerate(find_stock_gates(model)):
                stack.callback(gate.module.register_forward_hook(_changing(gate, number, change)).remove)
        yield


def _changing(gate: StockGate, layer: int, change: Change) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        weights, indices = stock_slots(change(layer, plan_of(output, gate)), output[1].dtype)
        return output[0], weights, indices

    return hook


@contextmanager
def replay_plans(model: nn.Module, plans: Sequence[RoutePlan]) -> Iterator[None]:
    """Inside the block every forward uses the recorded `plans`, one per layer, bit-exactly.

    Raises MoesaicError if there is not one plan per layer, or a forward has another number of tokens.
    """
    if len(plans) != (layers := mixture_layers(model)):
        raise MoesaicError(
            f"{len(plans)} recorded plans for the {layers} mixture layers of {type(model).__name__}: expected one plan "
            "per layer, as `record_plans` gives for this model"
        )
    policy, nothing = Fixed(list(plans)), torch.empty(0)

    def recorded(layer: int, own: RoutePlan) -> RoutePlan:
        row = own.index[:, 0]
        return policy(nothing, RouteInput(row, row, row, row != EMPTY, layer=layer))

    with override_plans(model, recorded):
        yield


# -- replacing --------------------------------------------------------------------------------------------------------
class GateAdapter(nn.Module):
    """Stands where a stock gate stood, asks a moesaic router, answers as the block expects."""

    def __init__(self, routing: "StockRouting", layer: int) -> None:
        super().__init__()
        self.routing, self.layer = routing, layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (N, E), weights (N, K) float32, indices (N, K) int64) for hidden states (..., D)."""
        routing = self.routing
        if routing.last is None:
            raise MoesaicError("replaced gates work only inside the model's own forward, which knows the tokens")
        x_ND = hidden.reshape(-1, hidden.shape[-1])
        plan = routing.last.plan(routing.router, self.layer, x_ND)
        logits = x_ND.new_zeros(len(x_ND), routing.router.experts) if plan.logits is None else plan.logits
        return logits, *stock_slots(plan)


class StockRouting:
    """A stock model under a moesaic router, from `replace_gates` until `restore()` or the end of the `with` block.

    modality:  ids -> modality of each token, for routers that need it.
    step:      what schedules and draws read.
    """

    def __init__(self, model: nn.Module, router: Router, gates: list[StockGate]) -> None:
        self.model, self.router, self.gates = model, router, gates
        self.modality: Modality | None = None
        self.step = 0
        self.last: RoutedCall | None = None
        self.originals = [gate.module for gate in gates]
        for layer, gate in enumerate(gates):
            setattr(gate.block, gate.name, GateAdapter(self, layer))
        model.add_module("moesaic_router", router)  # its parameters are trained, moved and counted with the model's
        self.hook = _decoder(model).register_forward_pre_hook(self.begin, with_kwargs=True)

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before each forward: what routers may read, and a fresh depth state."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        config = getattr(module, "config", None)
        if given.get("output_router_logits") or getattr(config, "output_router_logits", False):
            raise MoesaicError(
                "output_router_logits finds gates by their class and so none of a replaced gate; keep it off, read "
                "`plans()`, and take losses from moesaic.balance"
            )
        if module.training and getattr(module, "is_activation_checkpointing", False):
            raise MoesaicError(
                "gradient checkpointing recomputes layers when replaced gates may have seen another forward already; "
                "switch it off (activation_checkpointing_disable), or use attach_router, which supports it"
            )
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        inp = self._input(given.get("input_ids"), given.get("attention_mask"), given.get("position_ids"), past)
        inp.phase = "train" if module.training else "decode" if past else "eval"
        self.last = RoutedCall(inp, {0: RouterState(time=cache)})

    def _input(self, ids_BS: Tensor | None, mask_BT: Tensor | None, pos_BS: Tensor | None, past: int) -> RouteInput:
        if ids_BS is None:
            raise MoesaicError("routers may read token ids: pass input_ids, not inputs_embeds")
        mask_BT = mask_BT if mask_BT is not None and mask_BT.ndim == 2 else None
        inp = RouteInput.of(ids_BS, step=self.step)
        pos_BS = positions(ids_BS, mask_BT, past) if pos_BS is None or pos_BS.ndim != 2 else pos_BS
        inp.pos = pos_BS.expand(ids_BS.shape).flatten()
        if mask_BT is not None:
            inp.valid = mask_BT[:, past : past + ids_BS.shape[1]].bool().flatten()
        inp.modality = None if self.modality is None else self.modality(ids_BS).flatten()
        return inp

    def plans(self) -> list[RoutePlan]:
        """The plans of the last forward, one per layer, with their gradients."""
        if self.last is None:
            raise MoesaicError("no forward has run yet, so there are no plans")
        return [self.last.plans[layer] for layer in sorted(self.last.plans)]

    def restore(self) -> None:
        """Put the stock gates back; does nothing the second time."""
        if "moesaic_router" not in self.model._modules:
            return
        for gate, original in zip(self.gates, self.originals, strict=True):
            setattr(gate.block, gate.name, original)
        del self.model._modules["moesaic_router"]
        self.hook.remove()

    def __enter__(self) -> "StockRouting":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def replace_gates(model: nn.Module, router: Router) -> StockRouting:
    """Let `router` decide in every mixture layer of a stock model; undone by `restore()` or a `with` block.

    While it is in place: `router` is the submodule `moesaic_router` (save it by itself: `from_pretrained` of a stock
    class would not rebuild it), and `output_router_logits=True` is refused, because transformers captures gates by
    class.

    Raises MoesaicError if the model is no stock mixture, has replaced gates already, or another number of experts.
    """
    if "moesaic_router" in model._modules:
        raise MoesaicError("this model's gates are replaced already; call restore() on what replace_gates returned")
    gates = find_stock_gates(model)
    if wrong := [gate for gate in gates if gate.experts != router.experts]:
        raise MoesaicError(
            f"{type(router).__name__} chooses among {router.experts} experts, but {wrong[0].path} has "
            f"{wrong[0].experts}; build the router for that number"
        )
    return StockRouting(model, router, gates)
