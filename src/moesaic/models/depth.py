"""Mixture of depths around the decoder layers of any HF decoder: a token that does not run skips attention and FFN.

y = x + g (block(x) - x) for tokens that run, y = x for the others (2404.02258; MoMa 2407.21770, sec. 2.3); attention
is among running tokens only, at their own positions. A skipped token has no keys and values in that layer, also not in
the cache. Shapes: B batch, S new tokens, C the most tokens that run in one sequence, T cached keys of the layer.
"""

import copy
import inspect
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from moesaic.balance.load_balance import LoadBalance
from moesaic.configuration import DepthConfig, RoutedConfig
from moesaic.errors import MoesaicError
from moesaic.models.ffn_sites import decoder_layers
from moesaic.models.routed import RoutedCall, RoutedForCausalLM
from moesaic.routing.contract import Router
from moesaic.routing.depth import AuxiliaryDepthRouter, DepthRouter


class PlannedForCausalLM(RoutedForCausalLM):
    """A decoder in which something other than one bank of equal FFNs follows the plans; subclasses put it in place."""

    config_class: type[RoutedConfig]

    def __init__(
        self, config: RoutedConfig, backbone: PreTrainedModel | None = None, router: Router | None = None
    ) -> None:
        super(RoutedForCausalLM, self).__init__(config)
        dense = backbone if backbone is not None else AutoModelForCausalLM.from_config(config.base_config)
        self.backbone = dense  # before the router, which is always fp32: a model's dtype is that of its first parameter
        self.modality, self.last, self.step, self.balance = None, None, 0, LoadBalance()
        self.router = router if router is not None else self.make_router(dense)
        self.place(dense)
        self.ready()

    @abstractmethod
    def make_router(self, dense: PreTrainedModel) -> Router:
        """The router `config.router` describes."""

    @abstractmethod
    def place(self, dense: PreTrainedModel) -> None:
        """Replace modules of `dense`; `self.router` and `self.current` exist."""

    def set_router(self, router: Router) -> None:
        """Use another router in all layers."""
        use_router(self, router)


def use_router(model: RoutedForCausalLM, router: Router) -> None:
    """Let another router plan all layers of a routed model, on the device of the old one."""
    model.router = router.to(model.device)
    for module in model.backbone.modules():
        if isinstance(getattr(module, "router", None), list):  # layers keep it in a list, so as not to own it
            module.router[0] = router


class DepthCacheLayer(DynamicLayer):
    """Keys and values of the tokens that ran: their place in the sequence beside them, gaps where a batch is ragged.

    column:  (B, T) place of each key in the whole sequence; real: (B, T) bool, False in gaps. `seen` counts all tokens,
             skipped ones too: it is what the model takes for the length of its past.
    """

    column: Tensor | None = None
    real: Tensor | None = None
    seen: int = 0

    def extend(self, column_BC: Tensor, real_BC: Tensor) -> None:
        """Note where the keys that were just added belong."""
        self.column = column_BC if self.column is None else torch.cat([self.column, column_BC], dim=1)
        self.real = real_BC if self.real is None else torch.cat([self.real, real_BC], dim=1)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def _each(self, function: Any) -> None:
        for name in ("keys", "values", "column", "real"):
            if (value := getattr(self, name)) is not None and self.column is not None:
                setattr(self, name, function(value))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda value: value[indices])

    def crop(self, tokens_to_remove: int) -> None:
        self.seen -= abs(tokens_to_remove)
        if self.real is not None and self.column is not None:
            self.real = self.real & (self.column < self.seen)  # keys past the end turn into gaps

    def reset(self) -> None:
        self.column = self.real = None
        self.seen = 0
        super().reset()


class DepthLayer(nn.Module):
    """Stands where a decoder layer stood: gathers the tokens that run, calls the layer on them, puts them back."""

    def __init__(self, block: nn.Module, number: int, place: int, model: "DepthForCausalLM") -> None:
        super().__init__()
        self.block = block
        self.number, self.place = number, place  # among the depth layers, among all layers
        self.current, self.router = model.current, [model.router]
        self.signature = inspect.signature(block.forward)
        self.returns_tuple: bool | None = None
        self.eager = model.config.base_config._attn_implementation == "eager"

    def __getattr__(self, name: str) -> Any:  # models ask their layers things like attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the block's forward."""
        bound = self.signature.bind(*args, **kwargs).arguments
        hidden = bound.pop("hidden_states")
        extra = bound.pop(next((n for n, p in self.signature.parameters.items() if p.kind is p.VAR_KEYWORD), ""), {})
        call: RoutedCall | None = self.current.value
        if call is None:
            raise MoesaicError("the layers of a depth model run only inside its own forward, which knows the tokens")
        plan = call.plan(self.router[0], self.number, hidden.flatten(0, 1))
        assert plan.run is not None
        run_BS, weight_BS = plan.run.view(hidden.shape[:2]), plan.weight[:, 0].view(hidden.shape[:2])
        cache = next((v for v in (*bound.values(), *extra.values()) if isinstance(v, Cache)), None)
        slot = None if cache is None else cache.layers[self.place]
        assert slot is None or isinstance(slot, DepthCacheLayer)
        out: Any = hidden
        if bool(run_BS.any()):
            out = self.run(hidden, run_BS, weight_BS, slot, {**bound, **extra})
        elif self.returns_tuple is None:  # once on nothing, without the cache: what does the block return?
            given = {name: None if value is cache else value for name, value in {**bound, **extra}.items()}
            out = self.run(hidden, run_BS, weight_BS, None, given)
        elif self.returns_tuple:
            out = (hidden,)
        if slot is not None:
            slot.seen += hidden.shape[1]
        return out

    def run(
        self, hidden: Tensor, run_BS: Tensor, weight_BS: Tensor, slot: DepthCacheLayer | None, given: dict[str, Any]
    ) -> Any:
        """The block on the tokens under `run_BS`, its change added back with their weights."""
        index_BC, real_BC = ranks(run_BS)
        length, past = hidden.shape[1], 0 if slot is None else slot.seen
        column_BT, real_BT = past + index_BC, real_BC
        if slot is not None and slot.column is not None and slot.real is not None:
            column_BT, real_BT = torch.cat([slot.column, column_BT], 1), torch.cat([slot.real, real_BC], 1)
        if given.get("alibi") is not None:
            raise MoesaicError("a depth layer cannot gather ALiBi biases; use a model with rotary or learned positions")
        full = given.pop("attention_mask", None)
        given = {name: pick(value, index_BC, length) for name, value in given.items()}
        x_BCD = pick(hidden, index_BC, length)
        mask = self.mask(full, hidden, index_BC, column_BT, real_BT, past)
        out = self.block(x_BCD, attention_mask=mask, **given)
        self.returns_tuple = isinstance(out, tuple)
        if slot is not None:
            slot.extend(past + index_BC, real_BC)
        change = ((out[0] if isinstance(out, tuple) else out) - x_BCD) * pick(weight_BS, index_BC, length)[..., None]
        change = change.masked_fill(~real_BC[..., None], 0.0).to(hidden.dtype)
        y = hidden.scatter_add(1, index_BC[..., None].expand_as(change), change)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def mask(
        self, full: Tensor | None, hidden: Tensor, index_BC: Tensor, column_BT: Tensor, real_BT: Tensor, past: int
    ) -> Tensor:
        """Rows and columns of the model's mask that belong to running tokens; gaps are seen by nobody but themselves.

        A bool mask (B, 1, C, T), True where attended, or an additive one for eager attention.
        """
        (batch, chosen), total = index_BC.shape, past + hidden.shape[1]
        if full is None:
            rows = past + torch.arange(hidden.shape[1], device=hidden.device)
            full = (torch.arange(total, device=hidden.device) <= rows[:, None])[None, None]
        if not isinstance(full, Tensor) or full.ndim != 4 or full.shape[-1] < total:
            raise MoesaicError(
                "a depth layer needs masks of (batch, 1, queries, keys): load the model with "
                'attn_implementation="sdpa" or "eager"'
            )
        full = full.expand(batch, -1, -1, -1)
        full = full.gather(2, index_BC[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[3]))
        full = full.gather(3, column_BT[:, None, None, :].expand(-1, full.shape[1], chosen, -1))
        itself = torch.zeros(chosen, column_BT.shape[1], dtype=torch.bool, device=hidden.device)
        itself[:, -chosen:].fill_diagonal_(True)
        real = real_BT[:, None, None, :]
        if full.dtype != torch.bool:
            return full.masked_fill(~real, least(hidden)).masked_fill(itself, 0.0)
        full = (full & real) | itself
        return torch.zeros_like(full, dtype=hidden.dtype).masked_fill(~full, least(hidden)) if self.eager else full


def least(x: Tensor) -> float:
    """The most negative number of a tensor's dtype."""
    return torch.finfo(x.dtype).min


def ranks(run_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the True entries of each row in order, (B, C), and which are real; C is the largest count, or 1.

    Where a row has fewer, the gaps hold places of its False entries.
    """
    count = max(1, int(run_BS.sum(1).max()))
    index_BC = (~run_BS).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    return index_BC, run_BS.gather(1, index_BC)


def pick(value: Any, index_BC: Tensor, length: int) -> Any:
    """Rows of a (B or 1, S, ...) tensor, or of each in a tuple; everything else as it is."""
    if isinstance(value, tuple):
        return tuple(pick(part, index_BC, length) for part in value)
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != length:
        return value
    value = value.expand(len(index_BC), *value.shape[1:])
    return value[torch.arange(len(index_BC), device=value.device)[:, None], index_BC]


class DepthForCausalLM(PlannedForCausalLM):
    """See the module. With its DepthRouter it trains and scores; to decode, fit an AuxiliaryDepthRouter.

    Raises MoesaicError on decoding with the DepthRouter, with caches of fixed size, and when hidden states or attention
    maps are asked for: those of a depth layer cover only the tokens that ran.
    """

    config_class = DepthConfig

    def make_router(self, dense: PreTrainedModel) -> Router:
        options = dict(self.config.router)
        width, layers = dense.config.get_text_config(decoder=True).hidden_size, len(self.config.depth_layers)
        auxiliary = options.pop("auxiliary", False)
        main = DepthRouter(width, layers, **options)
        return AuxiliaryDepthRouter(main, width, layers) if auxiliary else main

    def place(self, dense: PreTrainedModel) -> None:
        _, layers = decoder_layers(dense)
        self.layers = len(layers)
        for number, place in enumerate(self.config.depth_layers):
            layers[place] = DepthLayer(layers[place], number, place, self)

    def make_cache(self, cache: Cache | None, options: dict[str, Any]) -> Cache | None:
        """A DynamicCache whose depth layers know which tokens they hold."""
        for name in ("output_hidden_states", "output_attentions"):
            if options.get(name):
                raise MoesaicError(f"{name} is not available in a depth model: its layers see only some of the tokens")
        caching = options.get("use_cache", getattr(self.config.base_config, "use_cache", False)) and not self.training
        if cache is None and caching:
            cache = DynamicCache()
        if cache is not None:
            self.prepare_cache(cache)
        options["use_cache"] = cache is not None
        return cache

    def prepare_cache(self, cache: Cache) -> None:
        """Give an empty cache the layers this model needs; sliding layers become full ones, their masks stay."""
        if not isinstance(cache, DynamicCache):
            raise MoesaicError(
                f"a depth model cannot use a {type(cache).__name__}: how many keys a layer stores depends on the "
                "tokens; use a DynamicCache"
            )
        for place in range(self.layers):
            wanted = DepthCacheLayer if place in self.config.depth_layers else DynamicLayer
            if place == len(cache.layers):
                cache.layers.append(wanted())
            elif type(cache.layers[place]) is not wanted and cache.layers[place].is_initialized:
                raise MoesaicError(f"layer {place} of the cache was filled by another model; start with an empty cache")
            elif type(cache.layers[place]) is not wanted:
                cache.layers[place] = wanted()

    def set_router(self, router: Router) -> None:
        """Use another router, such as a fitted AuxiliaryDepthRouter, in all depth layers."""
        super().set_router(router)
        self.config.router = {**self.config.router, "auxiliary": isinstance(router, AuxiliaryDepthRouter)}


@torch.no_grad()
def attach_depth(
    dense: PreTrainedModel,
    *,
    capacity: float = 0.25,
    every: int = 2,
    start: int = 0,
    scope: str = "sequence",
    bias: float = 0.0,
) -> DepthForCausalLM:
    """Let tokens skip layers start, start + every, ... of a copy of `dense`; options as of `DepthRouter`.

    Raises MoesaicError if the model has no stack of decoder layers, or no layer would be wrapped.
    """
    dense = copy.deepcopy(dense)
    places = list(range(start, len(decoder_layers(dense)[1]), every))
    if not places:
        raise MoesaicError(f"no layer to wrap: start = {start} is past the last layer")
    config = DepthConfig(
        places,
        base_config=copy.deepcopy(dense.config),
        router={"capacity": capacity, "scope": scope, "bias": bias},
        dtype=dense.dtype,
    )
    model = DepthForCausalLM(config, dense)
    model.router.to(dense.device)
    return model.train(dense.training)


AutoModelForCausalLM.register(DepthConfig, DepthForCausalLM, exist_ok=True)
