"""Attention heads as experts: each token chooses which heads write to it (Union of Experts, 2503.02495).

Attention is a sum over heads, out = sum_g W_o[:, g] z_g + b_o, where z_g is the output of head group g: one head, or
all heads that share a key-value head (grouped-query attention is cut there, or keys would be stored twice).
So y_n = sum_g weight_ng W_o[:, g] z_gn + b_o is the dense block when all weights are one. The released code instead
lets a head choose tokens of the whole sequence, whose later tokens then decide about earlier ones; here each token
chooses from its own hidden state, and all keys and values stay available, so a cache works as before.
Shapes: B batch, S new tokens, N = B * S, D model width, G head groups, Z width of a group's output.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moesaic.configuration import HeadsConfig
from moesaic.errors import MoesaicError
from moesaic.models.depth import PlannedForCausalLM
from moesaic.models.ffn_sites import decoder_layers
from moesaic.models.routed import RoutedCall
from moesaic.models.routes import Current
from moesaic.routing.contract import RoutePlan, Router
from moesaic.routing.family import build_router


class HeadOutput(nn.Module):
    """The output projection of an attention block, seen as G experts of Z inputs each."""

    def __init__(self, linear: nn.Module, groups: int, plan: Current[RoutePlan]) -> None:
        super().__init__()
        self.linear, self.groups, self.plan = linear, groups, plan

    def forward(self, z: Tensor) -> Tensor:
        """(B, S, G * Z) -> (B, S, D)."""
        plan = self.plan.value
        assert plan is not None, "set by HeadLayer"
        gate_NG = gates(plan, self.groups).to(z.dtype)
        chosen = z.reshape(len(gate_NG), self.groups, -1) * gate_NG[..., None]
        result: Tensor = self.linear(chosen.view(z.shape))
        return result


class HeadLayer(nn.Module):
    """Stands where an attention block stood: plans from its input, then runs it with the chosen heads."""

    def __init__(self, attention: nn.Module, output: str, layer: int, model: "HeadsForCausalLM") -> None:
        super().__init__()
        self.plan: Current[RoutePlan] = Current()
        self.attention, self.layer = attention, layer
        setattr(attention, output, HeadOutput(getattr(attention, output), model.config.groups, self.plan))
        self.current, self.router = model.current, [model.router]

    def __getattr__(self, name: str) -> Any:  # models ask their attention things like is_causal
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("attention"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the attention block's forward."""
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        call: RoutedCall | None = self.current.value
        if call is None:
            raise MoesaicError("the heads of a routed model run only inside its own forward, which knows the tokens")
        with self.plan.use(call.plan(self.router[0], self.layer, hidden.reshape(-1, hidden.shape[-1]))):
            return self.attention(*args, **kwargs)


def gates(plan: RoutePlan, groups: int) -> Tensor:
    """The weight of every group for every token, (N, G): zero where it was not chosen."""
    index = plan.index.long().masked_fill(~plan.used, groups)
    gate = torch.zeros(len(index), groups + 1, device=index.device).scatter_add(1, index, plan.weight.float())
    return gate[:, :groups]


class HeadsForCausalLM(PlannedForCausalLM):
    """See the module. Any causal router of `routing.family` may choose; the default is "union", whose weights sum to k.

    The choice gates what heads write; all heads are still computed. `activated` says how much work is needed at least.
    """

    config_class = HeadsConfig

    def make_router(self, dense: PreTrainedModel) -> Router:
        options = {name: value for name, value in self.config.router.items() if name != "name"}
        width = dense.config.get_text_config(decoder=True).hidden_size
        return build_router(self.config.router["name"], width, self.config.groups, len(self.config.places), **options)

    def place(self, dense: PreTrainedModel) -> None:
        if not self.router.caps.causal:
            raise MoesaicError(
                f"{type(self.router).__name__} compares tokens of a sequence: a later one would change which heads an "
                f"earlier one hears; use {self.router.caps.causal_alternative}"
            )
        for layer, (path, output) in enumerate(self.config.places):
            parent, _, name = path.rpartition(".")
            module = HeadLayer(dense.get_submodule(path), output, layer, self)
            setattr(dense.get_submodule(parent), name, module)

    def activated(self) -> float:
        """Share of head groups used by valid tokens in the last forward, between 0 and 1."""
        if self.last is None:
            raise MoesaicError("no forward has run yet, so no heads were chosen")
        valid = self.last.inp.valid
        used = [(gates(plan, self.config.groups)[valid] != 0).float().mean() for plan in self.plans()]
        return float(torch.stack(used).mean())


@torch.no_grad()
def find_heads(model: PreTrainedModel) -> tuple[list[list[str]], int]:
    """Per decoder layer the attention block and its output projection, and the number of head groups.

    The block is the one module of the layer, called with the hidden states, under which all but the FFN's linears lie;
    its output projection is the linear it calls last. Both are seen in a forward of two tokens, not guessed from names.
    Raises MoesaicError if a layer has no such block, or its width does not divide into the model's key-value heads.
    """
    path, layers = decoder_layers(model)
    config = model.config.get_text_config(decoder=True)
    groups = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    called: list[tuple[str, int]] = []  # linears in the order they are called

    handles = [
        module.register_forward_hook(lambda _, inputs, out, name=name: called.append((name, inputs[0].shape[-1])))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    training = model.training
    try:
        model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    places = []
    for index, layer in enumerate(layers):
        name = _attention(layer, f"{path}.{index}")
        own = [(linear, width) for linear, width in called if linear.startswith(f"{path}.{index}.{name}.")]
        if not own or own[-1][1] % groups:
            raise MoesaicError(f"{path}.{index}.{name}: no output projection whose inputs divide into {groups} heads")
        places.append([f"{path}.{index}.{name}", own[-1][0].rpartition(".")[2]])
    return places, groups


def _attention(layer: nn.Module, path: str) -> str:
    """The child of a decoder layer that takes keys and values of the past."""
    found = [
        name
        for name, child in layer.named_children()
        if any(isinstance(m, nn.Linear | Conv1D) for m in child.modules())
        and {"past_key_values", "layer_past", "attention_mask"} & set(inspect.signature(child.forward).parameters)
    ]
    if len(found) != 1:
        raise MoesaicError(f"{path} has {len(found)} attention blocks ({', '.join(found) or 'none'}); expected one")
    return found[0]


@torch.no_grad()
def attach_heads(dense: PreTrainedModel, router: str | dict[str, Any] | Router | None = None) -> HeadsForCausalLM:
    """Let each token of a copy of `dense` choose its head groups; the weights are the dense model's.

    router:  as of `attach_router`; by default "union" over half of the groups, and at least two: the renormalised
             weight of one group is always one, and would train no router.

    Raises MoesaicError if attention is of an unknown structure, or the router is not causal.
    """
    dense = copy.deepcopy(dense)
    places, groups = find_heads(dense)
    if router is None:
        router = {"name": "union", "k": min(groups, max(2, groups // 2))}
    named: Any = router if isinstance(router, dict) else {"name": router if isinstance(router, str) else "custom"}
    config = HeadsConfig(places, groups, base_config=copy.deepcopy(dense.config), router=dict(named), dtype=dense.dtype)
    model = HeadsForCausalLM(config, dense, router if isinstance(router, Router) else None)
    model.router.to(dense.device)
    return model.train(dense.training)


AutoModelForCausalLM.register(HeadsConfig, HeadsForCausalLM, exist_ok=True)
