"""Mixtures of experts as transformers ships them, as the engine holds them: dense part loaded, experts on the disk.

The model stays transformers' own code. A mixture block asks its `gate`, then `experts(hidden, indices, weights)`; what
stands there asks the step that runs. Which experts a token needs is known only then, layer by layer.
Shapes: N tokens, M tokens of one expert, E experts, K chosen per token, D model width, W channels of an expert.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from moesaic.errors import MoesaicError
from moesaic.experts.buckets import bucket
from moesaic.experts.packed import steady
from moesaic.models.routes import Current
from moesaic.models.stock import StockGate, find_stock_gates
from moesaic.schedule.work import Key
from moesaic.serve.experts import Packs
from moesaic.serve.model_files import ALONE, ModelFiles, Part

ROLES = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj", "w2"),
}


class Step(Protocol):
    """The step that runs. experts_N: how many experts each token's routers choose, None = all as the model says."""

    experts_N: Tensor | None

    def experts(self, layer: int, hidden_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """The weighted sum of each token's experts, (N, D)."""
        ...


class ServedExperts(nn.Module):
    """Stands where the experts of layer `layer` stood; `own` is what stood there, without its weights."""

    def __init__(self, own: Any, layer: int, step: Current[Step]) -> None:
        super().__init__()
        self.shapes = tuple(own.gate_up_proj.shape), tuple(own.down_proj.shape)
        self.count = self.shapes[0][0]
        for name in list(own._parameters):
            own._parameters[name] = None
        self.own, self.layer, self.step = own, layer, step

    def forward(self, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """(N, D) -> (N, D); zero outside of steps: shapes can be found without any expert."""
        step = self.step.value
        if step is None:
            return torch.zeros_like(hidden)
        flat = (part.reshape(-1, part.shape[-1]) for part in (hidden, index, weight))
        return step.experts(self.layer, *flat).view(hidden.shape)


class ServedGate(nn.Module):
    """A router whose answer for a token depends neither on its batch mates nor on their numbers of experts.

    adjustable: whether it chooses as many experts as its `top_k` says, so that a request can have another number.
    """

    def __init__(self, gate: nn.Module, width: int, experts: int, step: Current[Step]) -> None:
        super().__init__()
        self.gate, self.experts, self.step = gate, experts, step
        self.top_k: int = getattr(gate, "top_k", 0)
        self.adjustable = self.top_k > 0 and self._follows(width)

    def _follows(self, width: int) -> bool:
        x_ND = torch.zeros(2, width, dtype=next(self.gate.parameters()).dtype)
        answers = [self._run(x_ND, count) for count in (1, self.top_k)]
        return all(
            isinstance(answer, tuple) and len(answer) == 3 and answer[1].shape == answer[2].shape == (2, count)
            for answer, count in zip(answers, (1, self.top_k), strict=True)
        )

    def forward(self, hidden: Tensor, *args: Any) -> Any:
        """What the gate answers: mostly logits (N, E), weights (N, K) and indices (N, K)."""
        x_ND = hidden.reshape(-1, hidden.shape[-1])
        wanted_N = None if self.step.value is None else self.step.value.experts_N
        if wanted_N is None:
            return self._run(x_ND, self.top_k, *args)
        # Empty places have the index E and no weight, which the step skips.
        most = int(wanted_N.max())
        index_NK = wanted_N.new_full((len(x_ND), most), self.experts)
        logits, weight_NK = x_ND.new_zeros(len(x_ND), self.experts), x_ND.new_zeros(len(x_ND), most)
        for count in wanted_N.unique().tolist():
            rows = wanted_N == count
            logits[rows], weights, index_NK[rows, :count] = self._run(x_ND[rows], count, *args)
            weight_NK = weight_NK.to(weights.dtype)
            weight_NK[rows, :count] = weights
        return logits, weight_NK, index_NK

    def _run(self, x_ND: Tensor, top_k: int, *args: Any) -> Any:
        rows = len(x_ND)
        filled = nn.functional.pad(x_ND, (0, 0, 0, bucket(rows) - rows))
        if self.top_k:
            self.gate.top_k = top_k  # type: ignore[assignment]
        out = self.gate(filled, *args)
        if self.top_k:
            self.gate.top_k = self.top_k  # type: ignore[assignment]
        return tuple(part[:rows] for part in out) if isinstance(out, tuple) else out[:rows]


class StockExperts:
    """The experts of one layer: down (act(gate x) * up x), in the order in which transformers computes it.

    matrices: of each expert what makes the hidden channels, one (2 W, D) or two (W, D), then down (D, W).
    """

    def __init__(self, served: ServedExperts, matrices: Sequence[Sequence[Tensor]], packs: Packs) -> None:
        self.activate: Callable[[Tensor], Tensor] = served.own._apply_gate
        self.layer, self.matrices, self.packs = served.layer, matrices, packs

    def run(self, expert: int, x_MD: Tensor) -> Tensor:
        """(M, D) -> (M, D)."""
        at = self.layer, expert
        if (packed := self.packs.get(at)) is not None:
            *first, down = packed
            hidden = [product(x_MD) for product in first]
            return down(self.activate(hidden[0] if len(hidden) == 1 else torch.cat(hidden, -1)))
        *rows, last = self.matrices[expert]
        if last.dtype != torch.float32:  # which is never packed, and lies in one piece as it is
            self.packs.offer(at, *rows, last)
        hidden = [steady(x_MD, matrix) for matrix in rows]
        return steady(self.activate(hidden[0] if len(hidden) == 1 else torch.cat(hidden, -1)), last)


class ServedStock:
    """A stock mixture without its experts' weights. `most`: of experts per token, None where it cannot be changed."""

    pregate = None
    expert_names: tuple[str, ...] = ()

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.config, self.generation_config = backbone.config, backbone.generation_config
        self.step: Current[Step] = backbone.served_step
        self.experts: list[ServedExperts] = backbone.served_experts
        self.gates: list[ServedGate] = []

    @property
    def most(self) -> int | None:
        """Of experts per token, None where requests cannot change their number."""
        return min(gate.top_k for gate in self.gates) if all(gate.adjustable for gate in self.gates) else None


def load_stock(folder: Path, dtype: torch.dtype) -> tuple[ServedStock, set[str]]:
    """The model with everything but its experts, and the names of tensors that are missing.

    Raises MoesaicError if it is no mixture that can be served.
    """
    config = AutoConfig.from_pretrained(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MoesaicError(f"{folder} holds a {config.model_type} model, which transformers has no text generator for")
    found: list[StockGate] = []
    model, info = _hollow(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], found).from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    served = ServedStock(model)
    for gate in found:
        served.gates.append(ServedGate(gate.module, gate.width, gate.experts, served.step))
        setattr(gate.block, gate.name, served.gates[-1])
    return served, set(info["missing_keys"])


def _hollow(family: type[PreTrainedModel], found: list[StockGate]) -> type[PreTrainedModel]:
    """The class, whose models have no experts of their own from the beginning: none is read or takes memory."""

    class Hollow(family):
        _keys_to_ignore_on_load_unexpected = [*(family._keys_to_ignore_on_load_unexpected or ()), r"\.experts\."]

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            found[:] = find_stock_gates(self)
            self.served_step: Current[Step] = Current()
            self.served_experts: list[ServedExperts] = []
            for layer, gate in enumerate(found):
                _check_kind(gate.block.experts, family.__name__)
                gate.block.experts = ServedExperts(gate.block.experts, layer, self.served_step)
                self.served_experts.append(gate.block.experts)

    Hollow.__name__ = family.__name__
    return Hollow


def _check_kind(experts: Any, family: str) -> None:
    """Raise MoesaicError unless y = down (act(gate x) * up x)."""
    plain = {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    wrong = [name for name, wanted in plain.items() if getattr(experts, name, not wanted) != wanted]
    if wrong or not hasattr(experts, "_apply_gate"):
        raise MoesaicError(
            f"the experts of {family} are of another kind ({', '.join(wrong) or 'their own gating'}): serving takes "
            "experts of three matrices, gate, up and down, without biases"
        )


def expert_matrices(
    served: ServedExperts, files: ModelFiles, parts: Mapping[Key, Sequence[Part]], tensor: Callable[[str], Tensor]
) -> list[list[Tensor]]:
    """Of each expert of a layer, its matrices where the store will put them, `down` last.

    Raises MoesaicError if the checkpoint holds other tensors than such an expert has.
    """
    (_, twice, width), (_, outputs, inner) = served.shapes
    wanted = {
        "gate": (twice // 2, width),
        "up": (twice // 2, width),
        "gate_up": (twice, width),
        "down": (outputs, inner),
    }
    layer = []
    for expert in range(served.count):
        found: dict[str, Tensor] = {}
        for part in parts.get(Key(served.layer, expert), ()):
            whole = tensor(part.tensor)
            matrix = whole if ALONE.fullmatch(part.tensor) else whole[expert]
            if (role := _role(part.tensor)) is None or tuple(matrix.shape) != wanted[role]:
                shapes = ", ".join(f"{name} {shape}" for name, shape in wanted.items())
                raise MoesaicError(
                    f"{part.tensor} in {files.folder} has the shape {files.tensors[part.tensor].shape}: expected a "
                    f"matrix of an expert, {shapes}"
                )
            found[role] = matrix
        if set(found) not in ({"gate", "up", "down"}, {"gate_up", "down"}):
            raise MoesaicError(
                f"expert {expert} of layer {served.layer} in {files.folder} consists of {sorted(found)}: expected "
                "gate, up and down; copy the checkpoint again"
            )
        layer.append([found[role] for role in ROLES if role in found])
    return layer


def _role(tensor: str) -> str | None:
    name = re.sub(r"\.weight$", "", tensor).rpartition(".")[2]
    return next((role for role, names in ROLES.items() if name in names), None)
