"""Any HF decoder with its FFNs replaced by pools of experts, and a router that plans layer by layer.

Where `MoesaicForCausalLM` knows one plan before layer 0, here each layer asks the router when it is reached; the
router's state passes from layer to layer inside one forward.
Shapes: B batch, S new tokens, N = B * S, D model width, L layers.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from moesaic.balance.load_balance import LoadBalance
from moesaic.balance.router_losses import router_entropy, z_loss
from moesaic.configuration import RoutedConfig
from moesaic.errors import MoesaicError
from moesaic.experts.bank import FFNBank
from moesaic.experts.free import free_experts
from moesaic.experts.pool import Pool
from moesaic.experts.upcycle import fill_copies, fill_slices
from moesaic.models.ffn_sites import FFNSite, find_ffn_sites, get_ffn_weights, replace_ffn
from moesaic.models.wrapper import WrappedCausalLM
from moesaic.routing.contract import RouteInput, RoutePlan, Router, RouterState
from moesaic.routing.family import build_router
from moesaic.routing.pregate import positions

Modality = Callable[[Tensor], Tensor]


@dataclass
class RoutedCall:
    """One forward: what routers may read, the state before each layer, and the plans made so far."""

    inp: RouteInput
    states: dict[int, RouterState] = field(default_factory=lambda: {0: RouterState()})
    plans: dict[int, RoutePlan] = field(default_factory=dict)

    def plan(self, router: Router, layer: int, x_ND: Tensor) -> RoutePlan:
        """The plan of `layer`. Asked again when a layer is recomputed, it repeats itself and records nothing new."""
        plan, state = router.plan(replace(self.inp, hidden=x_ND, layer=layer), self.states[layer])
        self.states.setdefault(layer + 1, state)
        return self.plans.setdefault(layer, plan) if layer not in self.plans else plan


class ExpertLayer(nn.Module):
    """Stands where the dense FFN stood: asks the model's router for a plan and lets its pool carry it out."""

    def __init__(self, pool: Pool, layer: int, model: "RoutedForCausalLM") -> None:
        super().__init__()
        self.pool, self.layer = pool, layer
        self.current = model.current
        self.router = [model.router]  # in a list: the router's parameters belong to the model, not to every layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        call: RoutedCall | None = self.current.value
        if call is None:
            raise MoesaicError("the layers of a routed model run only inside its own forward, which knows the tokens")
        x_ND = hidden.reshape(-1, hidden.shape[-1])
        return self.pool(x_ND, call.plan(self.router[0], self.layer, x_ND)).view(hidden.shape)


class RoutedForCausalLM(WrappedCausalLM):
    """See the module. After a forward `last` holds its plans; the model's `step` is what schedules and draws read.

    modality:  ids -> modality of each token, for routers that need it; not saved with the checkpoint.
    """

    config_class = RoutedConfig
    _keep_in_fp32_modules_strict = {"router"}

    def __init__(
        self, config: RoutedConfig, backbone: PreTrainedModel | None = None, router: Router | None = None
    ) -> None:
        super().__init__(config)
        dense = backbone if backbone is not None else AutoModelForCausalLM.from_config(config.base_config)
        self.backbone = dense  # before the router, which is always fp32: a model's dtype is that of its first parameter
        sites = [FFNSite.from_dict(site) for site in config.sites]
        pools = [build_pool(config.pool, dense, site) for site in sites]
        if router is None:
            options = {name: value for name, value in config.router.items() if name != "name"}
            if config.router["name"] == "embedding-random":
                options["embedding"] = dense.get_input_embeddings().weight
            router = build_router(config.router["name"], sites[0].hidden, pools[0].experts, len(sites), **options)
        if router.experts != pools[0].experts:
            raise MoesaicError(f"the router chooses among {router.experts} experts, the pools hold {pools[0].experts}")
        self.router = router
        for layer, (site, pool) in enumerate(zip(sites, pools, strict=True)):
            replace_ffn(dense, site, ExpertLayer(pool, layer, self))
        self.modality: Modality | None = None
        self.step = 0
        self.last: RoutedCall | None = None
        self.balance = LoadBalance()
        self.ready()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FFNBank):
            module.reset(getattr(self.config.base_config, "initializer_range", 0.02))
        elif not any(module is part for part in self.router.modules()):  # routers initialise themselves
            super()._init_weights(module)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] | None = None, **kwargs: Any
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise MoesaicError(
                "reentrant checkpointing runs the layers without a graph: plans and the router's state would lose "
                'their gradient without a word; pass gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def pools(self) -> list[Pool]:
        """The pool of every decoder layer, in order."""
        return [module.pool for module in self.backbone.modules() if isinstance(module, ExpertLayer)]

    def route_input(
        self,
        input_ids: Tensor,
        padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past: int = 0,
    ) -> RouteInput:
        """What routers may read of the tokens (B, S) before any layer has run."""
        inp = RouteInput.of(input_ids)
        inp.pos = (
            (positions(input_ids, padding_mask, past) if position_ids is None else position_ids)
            .expand(input_ids.shape)
            .flatten()
        )
        if padding_mask is not None:
            inp.valid = padding_mask[:, past : past + input_ids.shape[1]].bool().flatten()
        inp.modality = None if self.modality is None else self.modality(input_ids).flatten()
        inp.step = self.step
        inp.phase = "train" if self.training else "decode" if past else "eval"
        return inp

    def make_cache(self, cache: Cache | None, options: dict[str, Any]) -> Cache | None:
        """The cache of a forward with these other arguments; models whose layers store something else override it."""
        return cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        padding_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As the backbone's forward. With labels, `config.losses` are added to the loss.

        Raises MoesaicError when only `inputs_embeds` is given: routers may read token ids.
        """
        input_ids, padding_mask, position_ids = self.tokens(
            input_ids, inputs_embeds, attention_mask, padding_mask, position_ids
        )
        past_key_values = self.make_cache(past_key_values, kwargs)
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        inp = self.route_input(input_ids, padding_mask, position_ids, past)
        self.last = call = RoutedCall(inp, {0: RouterState(time=past_key_values)})
        if position_ids is not None and self._backbone_takes_positions:
            kwargs["position_ids"] = position_ids
        with self.current.use(call):
            out = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                labels=labels,
                return_dict=True,
                **kwargs,
            )
        if labels is not None and self.config.losses:
            out.loss = out.loss + sum(self.config.losses[k] * v for k, v in self.losses(self.config.losses).items())
        return out if return_dict is not False else out.to_tuple()

    def plans(self) -> list[RoutePlan]:
        """The plans of the last forward, one per layer."""
        if self.last is None:
            raise MoesaicError("no forward has run yet, so there are no plans")
        return [self.last.plans[layer] for layer in sorted(self.last.plans)]

    def losses(self, names: Sequence[str] | dict[str, float]) -> dict[str, Tensor]:
        """The named losses of the last forward, unweighted; the router's own are among the names too."""
        plans, call = self.plans(), self.last
        assert call is not None
        available: dict[str, Callable[[], Tensor]] = {
            "load_balance": lambda: self.balance(plans, call.inp.valid, call.inp.seq),
            "entropy": lambda: router_entropy(plans, call.inp.valid),
            "z": lambda: z_loss(plans, call.inp.valid),
        }
        # Only asked for its own losses when one is wanted: some are of a training stage of their own.
        own = self.router.losses(plans, call.inp) if set(names) - set(available) else {}
        if unknown := [name for name in names if name not in available and name not in own]:
            raise MoesaicError(f"unknown loss {unknown[0]!r}: expected one of {', '.join([*available, *own])}")
        return {name: own[name] if name in own else available[name]() for name in names}


def build_pool(spec: dict[str, Any], dense: nn.Module, site: FFNSite) -> Pool:
    """A pool of the shape `spec` says (see RoutedConfig) for the FFN at `site`, randomly initialised."""
    weights, activation = get_ffn_weights(dense, site), getattr(dense.get_submodule(site.path), site.activation)
    options: dict[str, Any] = {"gated": weights.gate is not None, "up_bias": weights.up_bias is not None}
    sliced, bias = bool(spec.get("sliced")), weights.down_bias
    hidden = spec.get("hidden", site.width)
    bank = FFNBank(
        spec["experts"], site.hidden, hidden, activation, down_bias=bias is not None and not sliced, **options
    )
    shared = spec.get("shared", 0)
    counts = {name: spec.get(name, 0) for name in ("zero", "copy", "constant")}
    return Pool(
        bank,
        free=free_experts(site.hidden, bank.experts, **counts),
        shared=FFNBank(shared, site.hidden, hidden, activation, **options) if shared else None,
        bias=bias if sliced else None,
    )


@torch.no_grad()
def attach_router(
    dense: PreTrainedModel,
    router: str | dict[str, Any] | Router = "top-k",
    *,
    experts: int = 8,
    upcycle: str = "copy",
    hidden: int | None = None,
    shared: int = 0,
    free: dict[str, int] | None = None,
    losses: dict[str, float] | None = None,
    noise: float = 0.0,
    scale: float = 1.0,
) -> RoutedForCausalLM:
    """Give a copy of `dense` a pool of experts in every layer and a router over them.

    router:   a name, {"name": ..., options}, or a Router built for this model (then it cannot be rebuilt by name).
    upcycle:  "copy": every expert is the dense FFN; "split": equal slices of it, routed first, shared last;
              "scratch": random, `hidden` wide.
    free:     how many "zero", "copy" and "constant" experts join the pool (MoE++).
    noise:    with "copy": relative noise that lets copies part.
    scale:    with "split": of the routed slices' outputs; with weights that sum to one, E gives the dense FFN's size.

    Raises MoesaicError if the FFNs are of an unknown structure, or cannot be cut evenly.
    """
    sites = find_ffn_sites(dense)
    if upcycle not in ("copy", "split", "scratch"):
        raise MoesaicError(f"upcycle = {upcycle!r}: expected copy, split or scratch")
    if unknown := set(free or {}) - {"zero", "copy", "constant"}:
        raise MoesaicError(f"free = {free}: unknown kind {min(unknown)!r}; expected counts of zero, copy, constant")
    spec: dict[str, Any] = {"experts": experts, "shared": shared, "sliced": upcycle == "split", **(free or {})}
    width = sites[0].width
    if upcycle == "split" and width % (experts + shared):
        raise MoesaicError(f"{width} channels cannot be cut evenly into {experts} + {shared} experts")
    if upcycle == "copy" and shared:
        raise MoesaicError("copies and shared experts do not mix: a shared copy alone is the dense FFN; use split")
    spec["hidden"] = width // (experts + shared) if upcycle == "split" else hidden or width
    if upcycle == "copy" and spec["hidden"] != width:
        raise MoesaicError(f"copies are as wide as the dense FFN, {width}; hidden = {hidden} needs scratch")
    config = RoutedConfig(
        base_config=copy.deepcopy(dense.config),
        sites=[site.to_dict() for site in sites],
        router={"name": "custom"} if isinstance(router, Router) else _named(router),
        pool=spec,
        losses=losses,
        dtype=dense.dtype,
    )
    model = RoutedForCausalLM(config, copy.deepcopy(dense), router if isinstance(router, Router) else None)
    for site, pool in zip(sites, model.pools(), strict=True):
        weights = get_ffn_weights(dense, site)
        if upcycle == "copy":
            assert isinstance(pool.bank, FFNBank)
            fill_copies(pool.bank, weights, noise)
        elif upcycle == "split":
            fill_slices([bank for bank in (pool.bank, pool.shared) if isinstance(bank, FFNBank)], weights, scale)
        pool.to(device=dense.device, dtype=dense.dtype)
    model.router.to(dense.device)
    return model.train(dense.training)


def _named(router: str | dict[str, Any]) -> dict[str, Any]:
    return {"name": router} if isinstance(router, str) else dict(router)


AutoModelForCausalLM.register(RoutedConfig, RoutedForCausalLM, exist_ok=True)
