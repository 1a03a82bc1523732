"""Find the FFN of every decoder layer by structure, and prove by numbers that it is one we know.

An FFN is down(act(gate x) * up x) or down(act(up x)). It may be a module of its own (most models), may fuse gate and up
into one linear (Phi-3), may use transposed weights (GPT-2), or may lie open in the decoder layer (OPT). Names are only
hints: a candidate counts when our own computation reproduces its output on random input.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moesaic.errors import MoesaicError
from moesaic.experts.channel_blocks import BlockLayout, ChannelBlocks, FFNWeights, layout_from_masks

TOLERANCE = 2e-2  # relative; loose enough for bf16, far below any structural mistake


@dataclass(frozen=True)
class FFNSite:
    """Where one FFN sits, and which of its parts play which role. Names are relative to `path`."""

    path: str  # module that contains the linears: the FFN, or the decoder layer itself when `inline`
    inline: bool  # the linears lie open in the decoder layer
    hidden: int  # D
    width: int  # W
    up: str
    down: str
    activation: str
    gate: str | None = None  # equal to `up` when fused
    gate_first: bool = True  # fused: the upper half of the rows is the gate
    up_bias: bool = False
    down_bias: bool = False
    dropout: float = 0.0

    @property
    def fused(self) -> bool:
        """One linear holds gate and up."""
        return self.gate is not None and self.gate == self.up

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "FFNSite":
        """Inverse of `to_dict`."""
        return cls(**raw)


# -- reading a site ---------------------------------------------------------------------------------------------------


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, else None."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return None


def _weight(module: nn.Module) -> Tensor:
    """Oriented (out, in)."""
    assert isinstance(module.weight, Tensor)
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def get_ffn_weights(model: nn.Module, site: FFNSite) -> FFNWeights:
    """The dense FFN's weights at `site`; views, not copies."""
    parent = model.get_submodule(site.path)
    up, down = parent.get_submodule(site.up), parent.get_submodule(site.down)
    up_weight, up_bias, gate_weight, gate_bias = _weight(up), _bias(up), None, None
    if site.fused:
        halves = up_weight.chunk(2), (up_bias.chunk(2) if up_bias is not None else (None, None))
        first, second = (0, 1) if site.gate_first else (1, 0)
        gate_weight, up_weight = halves[0][first], halves[0][second]
        gate_bias, up_bias = halves[1][first], halves[1][second]
    elif site.gate is not None:
        gate = parent.get_submodule(site.gate)
        gate_weight, gate_bias = _weight(gate), _bias(gate)
    return FFNWeights(up_weight, _weight(down), gate_weight, gate_bias, up_bias, _bias(down))


def build_blocks(model: nn.Module, site: FFNSite, layout: BlockLayout) -> ChannelBlocks:
    """Empty channel blocks that fit `site`; the activation is the model's own."""
    return ChannelBlocks(
        layout,
        site.hidden,
        getattr(model.get_submodule(site.path), site.activation),
        gated=site.gate is not None,
        up_bias=site.up_bias,
        down_bias=site.down_bias,
        dropout=site.dropout,
    )


def replace_ffn(model: nn.Module, site: FFNSite, module: nn.Module) -> None:
    """Put `module`, which computes the whole FFN, where the dense FFN was."""
    if site.inline:
        layer = model.get_submodule(site.path)
        setattr(layer, site.up, module)
        setattr(layer, site.activation, nn.Identity())
        setattr(layer, site.down, nn.Identity())
        return
    parent, _, name = site.path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@contextmanager
def capture_activations(
    model: nn.Module, sites: Sequence[FFNSite], receive: Callable[[Tensor, int], None]
) -> Iterator[None]:
    """Inside the block, every forward calls `receive(activations, layer)` with each down projection's input (.., W)."""
    handles = []
    try:
        for layer, site in enumerate(sites):
            down = model.get_submodule(site.path).get_submodule(site.down)
            hook = lambda _, inputs, layer=layer: receive(inputs[0], layer)  # noqa: E731
            handles.append(down.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- finding sites ----------------------------------------------------------------------------------------------------


def find_ffn_sites(model: PreTrainedModel) -> list[FFNSite]:
    """One site per decoder layer, in order.

    Raises MoesaicError if the model has no stack of decoder layers, or if a layer has no FFN of a known form; the
    message names the layer and what was found there.
    """
    path, layers = decoder_layers(model)
    hidden = int(model.config.get_text_config(decoder=True).hidden_size)
    return [_find_in_layer(layer, f"{path}.{index}", hidden) for index, layer in enumerate(layers)]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers; raises MoesaicError if there is no such list."""
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        raise MoesaicError(
            f"{type(model).__name__} has no list of {count} decoder layers; moesaic refactors decoder-only transformers"
        )
    return max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _find_in_layer(layer: nn.Module, path: str, hidden: int) -> FFNSite:
    if _is_mixture(layer):  # looked at first: a shared expert alone would pass for a dense FFN
        raise MoesaicError(
            f"{path} is a mixture of experts already; moesaic refactors dense models. (For existing mixtures a "
            "pre-gate is distilled, nothing is refactored.)"
        )
    found, reasons = [], []
    for name, module in layer.named_modules():
        place = f"{path}.{name}" if name else path
        if isinstance(module, nn.ModuleList):
            continue
        for site in _candidates(module, place, hidden, inline=not name):
            reason = _refute(module, site)
            if reason is None:
                found.append(site)
                break
            reasons.append(f"{place}: {reason}")
    if found:
        return max(found, key=lambda site: site.width)  # adapters have the form of an FFN too, but are narrow
    children = ", ".join(f"{n} {_linear_shape(m)}" for n, m in layer.named_modules() if _linear_shape(m))
    raise MoesaicError(
        f"{path} has no FFN of a known form, down(act(gate x) * up x) or down(act(up x)) with x of width {hidden}. "
        f"Linear layers there: {children or 'none'}. {'; '.join(reasons)}"
    )


def _is_mixture(layer: nn.Module) -> bool:
    """A stack of experts shows as a 3-D parameter or as a child called experts."""
    return any(name.endswith("experts") for name, _ in layer.named_modules()) or any(
        p.ndim == 3 and "expert" in name for name, p in layer.named_parameters()
    )


def _activation_name(module: nn.Module) -> str | None:
    """The attribute that holds the activation function: a callable called *act* or *gelu*."""
    for name in (*module._modules, *vars(module)):
        value = getattr(module, name, None)
        if callable(value) and ("act" in name or "gelu" in name) and _linear_shape(value) is None:
            return name
    return None


def _dropout(module: nn.Module) -> float:
    return max((m.p for m in module.children() if isinstance(m, nn.Dropout)), default=0.0)


def _candidates(module: nn.Module, path: str, hidden: int, inline: bool) -> Iterator[FFNSite]:
    """Every way in which the direct linear children of `module` could form an FFN, likeliest first."""
    shapes = {name: shape for name, child in module.named_children() if (shape := _linear_shape(child))}
    activation = _activation_name(module)
    if activation is None or len(shapes) not in (2, 3):
        return
    ins = [name for name, (width_in, _) in shapes.items() if width_in == hidden]
    outs = [name for name, (_, width_out) in shapes.items() if width_out == hidden]
    for down in reversed(outs):
        width = shapes[down][0]
        rest = [name for name in ins if name != down]
        base = FFNSite(
            path,
            inline,
            hidden,
            width,
            up="",
            down=down,
            activation=activation,
            down_bias=module.get_submodule(down).bias is not None,
            dropout=_dropout(module) if not inline else 0.0,
        )
        if len(shapes) == 3 and len(rest) == 2 and all(shapes[name][1] == width for name in rest):
            rest.sort(key=lambda name: "gate" not in name)  # a hint only; the other order is tried too
            for gate, up in (rest, rest[::-1]):
                yield replace(base, gate=gate, up=up, up_bias=module.get_submodule(up).bias is not None)
        elif len(shapes) == 2 and len(rest) == 1:
            up, bias = rest[0], module.get_submodule(rest[0]).bias is not None
            if shapes[up][1] == width:
                yield replace(base, up=up, up_bias=bias)
            elif shapes[up][1] == 2 * width:
                for gate_first in (True, False):
                    yield replace(base, up=up, gate=up, gate_first=gate_first, up_bias=bias)


@torch.no_grad()
def _refute(module: nn.Module, site: FFNSite) -> str | None:
    """None if our own computation reproduces the FFN at `site` on random input, else why not."""
    if site.inline:
        return None  # the layer cannot be called without its attention; structure has to be enough
    down = module.get_submodule(site.down)
    weight = _weight(down)
    if weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, site.hidden, generator=generator).to(weight)
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        expected = module(x)
    except Exception as error:  # attention modules land here: they cannot be called with one argument
        return f"not callable as f(x) ({type(error).__name__})"
    finally:
        for submodule, training in modes:
            submodule.training = training
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        return "does not map (batch, sequence, width) to itself"
    # get_ffn_weights resolves names from a root; here the root is the module itself.
    local = replace(site, path="")
    layout, order = layout_from_masks(torch.ones(1, site.width, dtype=torch.bool))
    blocks = build_blocks(module, local, layout).to(weight).eval()
    blocks.load_dense(get_ffn_weights(module, local), order)
    difference = (blocks(x).float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-6)
    return None if difference < TOLERANCE else f"our computation differs by {float(difference):.1%}"
