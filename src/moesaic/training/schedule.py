"""What a stage is: its settings, and the learning rates and optimizers they mean.

A schedule is a pure function from an optimizer step to a multiplier of the peak rate. `step` counts optimizer steps
from 0; micro-batches and processes never advance it. All reach their end value at `step == steps`, one past the last
update, so that no update is wasted on a rate of zero.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from moesaic.errors import MoesaicError
from moesaic.training.state import trainable_parameters

HEAD_NAMES = {"head", "lm_head", "embed_out", "score", "classifier"}


def constant(step: int, steps: int, *, warmup: int = 0) -> float:
    """Linear warmup over `warmup` steps, then 1."""
    return _warmup(step, warmup)


def cosine_to_zero(step: int, steps: int, *, warmup: int = 0) -> float:
    """Linear warmup, then half a cosine to 0 at `steps`: one round of Read-ME (arXiv 2410.19123, Table 2)."""
    progress = max(0, min(step, steps) - warmup) / max(1, steps - warmup)
    return _warmup(step, warmup) * 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd(step: int, steps: int, *, warmup: int = 0, decay: float = 0.2) -> float:
    """Warmup, stable, decay (MiniCPM, arXiv 2404.06395), falling linearly to 0 over the last `decay` share."""
    left = max(0, steps - step) / max(1.0, decay * steps)
    return _warmup(step, warmup) * min(1.0, left)


def round_factor(round_index: int, decay: float = 0.8) -> float:
    """Peak rate of an alternation's round relative to round 0: `decay ** round_index` (Read-ME, Table 2)."""
    return float(decay**round_index)


SCHEDULES: dict[str, Callable[..., float]] = {"constant": constant, "cosine_to_zero": cosine_to_zero, "wsd": wsd}


def find_schedule(name: str) -> Callable[..., float]:
    """The schedule function called `name`; raises MoesaicError listing the known ones."""
    if name not in SCHEDULES:
        raise MoesaicError(f"no schedule is called {name!r}; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage without its model, loss and data. Everything except `checkpoint_every` decides the numbers."""

    name: str
    steps: int  # optimizer steps
    lr: float  # peak, in round 0
    coefficients: Mapping[str, float] = field(default_factory=lambda: {"loss": 1.0})  # of the losses, by name
    optimizer: str = "adamw"  # or "muon": hidden matrices by Muon, the rest by AdamW
    weight_decay: float = 0.01  # decoupled; never on biases and norms (tensors of one dimension)
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    grad_clip: float | None = 1.0  # largest global gradient norm; None = no clipping
    schedule: str = "cosine_to_zero"
    schedule_args: Mapping[str, float] = field(default_factory=dict)
    round_index: int = 0  # which round of an alternation this is
    round_decay: float = 0.8  # the peak falls by this factor per round
    micro_batches: int = 1  # parts per process in which a batch is computed
    dtype: str = "fp32"  # or "bf16": autocast; parameters stay in float32
    seed: int = 0
    checkpoint_every: int = 100  # optimizer steps between states

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("micro_batches", 1), ("checkpoint_every", 1), ("round_index", 0)):
            if getattr(self, name) < low:
                raise MoesaicError(f"stage {self.name!r}: {name} is {getattr(self, name)}, expected at least {low}")
        for name, known in (("optimizer", ("adamw", "muon")), ("dtype", ("fp32", "bf16"))):
            if getattr(self, name) not in known:
                raise MoesaicError(f"stage {self.name!r}: {name} is {getattr(self, name)!r}, expected one of {known}")
        if not self.coefficients:
            raise MoesaicError(f"stage {self.name!r} has no coefficients; name at least one loss")
        self.lr_at(0)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update after `step` updates."""
        try:
            factor = find_schedule(self.schedule)(step, self.steps, **self.schedule_args)
        except TypeError as error:
            raise MoesaicError(f"stage {self.name!r}: wrong schedule_args for {self.schedule!r}: {error}") from error
        return self.lr * round_factor(self.round_index, self.round_decay) * factor


def build_optimizers(stage: Stage, model: nn.Module) -> list[Optimizer]:
    """AdamW for everything, or Muon for hidden matrices and AdamW for the rest; one learning rate serves both.

    Muon's update is scaled to AdamW's RMS ("Muon is scalable for LLM training", arXiv 2502.16982, section 2.2).
    """
    trainable = trainable_parameters(model)
    if not trainable:
        raise MoesaicError(f"stage {stage.name!r}: no parameter of the model requires a gradient; nothing to train")
    if small := sorted({str(p.dtype) for p in trainable.values() if p.dtype in (torch.bfloat16, torch.float16)}):
        advice = "small updates round away; load the model in float32 and set dtype='bf16' for speed"
        warnings.warn(f"stage {stage.name!r}: trainable parameters are {small}: {advice}", stacklevel=3)
    hidden = _hidden_matrices(model) if stage.optimizer == "muon" else {}
    rest = [parameter for name, parameter in trainable.items() if name not in hidden]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[Optimizer] = [torch.optim.AdamW(groups, lr=stage.lr, betas=stage.betas)] if groups else []
    if hidden:
        decay, scale = stage.weight_decay, "match_rms_adamw"
        optimizers.append(torch.optim.Muon(hidden.values(), lr=stage.lr, weight_decay=decay, adjust_lr_fn=scale))
    return optimizers


def _warmup(step: int, warmup: int) -> float:
    """1/warmup at step 0 (a rate of 0 would waste an update), 1 from step warmup - 1 on."""
    return min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0


def _hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable 2-D parameters that are neither embeddings nor output heads, by name."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {
        name: parameter
        for name, parameter in trainable_parameters(model).items()
        if parameter.ndim == 2 and id(parameter) not in outer and not HEAD_NAMES & set(name.split("."))
    }
