"""Stage 4: alternate router and expert training until the refactored model has recovered (Read-ME, Table 2).

Router stage: the pre-gate learns from the dense model's activations, everything else frozen.
Expert stage: the backbone learns next-token prediction under the frozen router, with an optional pull towards the
frozen dense teacher. Steps and learning rates follow the token budget and the model's width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.balance.load_balance import expert_load
from moesaic.data.tokens import DomainTokens, TokenBatches
from moesaic.errors import MoesaicError
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.refactor.pregate import OverlapTeacher, RouterLoss, router_step
from moesaic.refactor.profile import padded_inputs
from moesaic.training.loop import train
from moesaic.training.losses import distillation_loss, next_token_loss
from moesaic.training.schedule import Stage

PAPER_WIDTH, PAPER_LR = 4096, 5e-5  # Read-ME's expert stage: hidden size and learning rate


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """How much to heal, and how. `tokens` counts what the expert stages read; the router reads half as much again."""

    tokens: int = 400_000
    rounds: int = 2
    batch_size: int = 8
    length: int = 256
    router_steps_ratio: float = 0.5  # router steps per expert step (the paper: 100 to 200)
    router_lr: float | None = None  # None: 5e-4 * 512 / the pre-gate's width, at most 5e-3
    expert_lr: float | None = None  # None: 5e-5 * sqrt(4096 / width)
    router_loss: RouterLoss = "overlap"
    load_penalty: float = 0.0  # coefficient of the load-balancing loss in the router stage
    distillation: float = 1.0  # coefficient of KL(dense || refactored); 0 is the paper's recipe
    weight_decay: float = 0.01
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.length < 2:
            raise MoesaicError(f"batches of {self.batch_size} x {self.length} tokens: at least 1 x 2 are needed")
        if self.router_loss not in get_args(RouterLoss):
            raise MoesaicError(f"router_loss = {self.router_loss!r}: expected one of {', '.join(get_args(RouterLoss))}")
        if self.rounds < 1 or self.tokens < self.rounds * self.batch_size * self.length:
            raise MoesaicError(
                f"{self.tokens} healing tokens in {self.rounds} rounds is less than one step a round of "
                f"{self.batch_size} x {self.length}; raise tokens or lower rounds"
            )

    @property
    def expert_steps(self) -> int:
        """Optimizer steps of one expert stage."""
        return max(1, self.tokens // (self.rounds * self.batch_size * self.length))

    @property
    def router_steps(self) -> int:
        """Optimizer steps of one router stage."""
        return max(1, round(self.expert_steps * self.router_steps_ratio))

    def precision(self, device: torch.device) -> str:
        """bf16 autocast where the device has bf16 arithmetic, else fp32."""
        if self.dtype != "auto":
            return self.dtype
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
        return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"

    def router_stage(self, width: int, round_index: int, device: torch.device) -> Stage:
        """Settings of the router stage of a round; `width` is the pre-gate's (512 in the paper)."""
        return Stage(
            name=f"router {round_index + 1}/{self.rounds}",
            steps=self.router_steps,
            lr=self.router_lr or min(5e-3, 5e-4 * 512 / width),
            coefficients={"router": 1.0, "load_balance": self.load_penalty},
            weight_decay=self.weight_decay,
            schedule_args={"warmup": min(10, self.router_steps // 10)},
            round_index=round_index,
            dtype=self.precision(device),
            seed=self.seed + 1000 + round_index,
        )

    def expert_stage(self, width: int, round_index: int, device: torch.device) -> Stage:
        """Settings of the expert stage of a round; `width` is the model's hidden size."""
        return Stage(
            name=f"experts {round_index + 1}/{self.rounds}",
            steps=self.expert_steps,
            # Not 1/width: four times as much (8e-4 at width 256) undoes what experts know (docs/log.md).
            lr=self.expert_lr or PAPER_LR * (PAPER_WIDTH / width) ** 0.5,
            coefficients={"lm": 1.0, "distillation": self.distillation} if self.distillation else {"lm": 1.0},
            weight_decay=self.weight_decay,
            schedule_args={"warmup": min(10, self.expert_steps // 10)},
            round_index=round_index,
            dtype=self.precision(device),
            seed=self.seed + 2000 + round_index,
        )

    def batches(self, domains: Sequence[DomainTokens], stage: Stage) -> TokenBatches:
        """Balanced batches over all domains, different ones in every stage."""
        return TokenBatches(tuple(domains), self.batch_size, self.length, seed=stage.seed)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def expert_step(
    model: MoesaicForCausalLM, dense: PreTrainedModel, distil: bool
) -> Callable[[Mapping[str, Tensor]], dict[str, Any]]:
    """The loss function of an expert stage: `lm` and `distillation`, and the loads it ran under."""
    experts = model.config.experts

    def step(batch: Mapping[str, Tensor]) -> dict[str, Any]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        routes = 0 if experts == 1 else None
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, expert_index=routes)
        result: dict[str, Any] = {"lm": next_token_loss(out.logits, ids, mask)}
        if distil:
            with torch.no_grad():
                teacher = dense(**padded_inputs(dense, ids, mask)).logits
            result["distillation"] = distillation_loss(out.logits, teacher, mask)
        result["load"] = expert_load(out.expert_index.flatten(), experts).tolist()
        return result

    return step


def train_router(
    model: MoesaicForCausalLM,
    teacher: OverlapTeacher,
    domains: Sequence[DomainTokens],
    config: HealConfig,
    workdir: Path,
    *,
    round_index: int = 0,
    restart: bool = False,
) -> None:
    """Train the pre-gate for one router stage; the backbone is not touched."""
    if model.pregate is None:
        raise MoesaicError("this model has no pre-gate to train (it has one expert)")
    model.pregate.requires_grad_(True)
    stage = config.router_stage(model.pregate.config.width, round_index, model.device)
    step = router_step(model.pregate, teacher, config.router_loss)
    train(stage, model.pregate, step, config.batches(domains, stage), workdir, restart=restart)
    model.pregate.requires_grad_(False)


def train_experts(
    model: MoesaicForCausalLM,
    dense: PreTrainedModel,
    domains: Sequence[DomainTokens],
    config: HealConfig,
    workdir: Path,
    *,
    round_index: int = 0,
    restart: bool = False,
) -> None:
    """Train the backbone for one expert stage; the pre-gate is frozen."""
    model.requires_grad_(True)
    if model.pregate is not None:
        model.pregate.requires_grad_(False)
    stage = config.expert_stage(model.config.hidden_size, round_index, model.device)
    step = expert_step(model, dense, bool(config.distillation))
    train(stage, model, step, config.batches(domains, stage), workdir, restart=restart)


def heal(
    model: MoesaicForCausalLM,
    dense: PreTrainedModel,
    masks: Sequence[Tensor],
    domains: Sequence[DomainTokens],
    config: HealConfig,
    workdir: Path,
    *,
    restart: bool = False,
) -> MoesaicForCausalLM:
    """Run all rounds, router first; resumable: a finished stage is loaded from `workdir`, not trained again.

    With one expert (the pruned control) there is no router, and the expert stages are the same in every respect.
    Returns `model`, trained in place, in eval mode.
    """
    dense.requires_grad_(False)
    dense.eval()
    teacher = OverlapTeacher(dense, masks, config.router_loss)
    for index in range(config.rounds):
        if model.pregate is not None:
            train_router(
                model, teacher, domains, config, workdir / f"round-{index}-router", round_index=index, restart=restart
            )
        train_experts(
            model, dense, domains, config, workdir / f"round-{index}-experts", round_index=index, restart=restart
        )
    return model.eval()
