"""The one training loop: pretraining, router distillation and healing differ only in their Stage, loss and batches.

    batches.batch(step)  the GLOBAL batch of an optimizer step, tensors of shape (B, ...), the same on every machine
      -> split along B into micro_batches x processes parts; a part weighs by its share of the counted tokens
      -> loss_fn(part) returns unweighted losses and metrics; the stage owns the coefficients
      -> one update, one line in WORKDIR/log.jsonl, and every `checkpoint_every` steps an exact state (see state.py)

So micro-batches and processes change memory and speed, but neither the learning rate nor (up to rounding) the result.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.files import append_jsonl, clean_leftovers, remove_directory, sync_to_disk
from moesaic.progress import Progress
from moesaic.training.schedule import Stage, build_optimizers
from moesaic.training.state import (
    Position,
    capture_rng,
    fingerprint,
    load_newest,
    prune_states,
    save_state,
    seed_rng,
    state_directories,
    trainable_parameters,
    truncate_log,
)

__all__ = ["BatchSource", "Stage", "TrainResult", "count_tokens", "make_accelerator", "split_batch", "train"]

Batch = dict[str, Tensor]
LossFn = Callable[[Batch], Mapping[str, Any]]
Callback = Callable[[dict[str, Any]], None]


class BatchSource(Protocol):
    """Deterministic batches by step: seekable, so that a resumed run reads what the killed one would have read."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever any batch changes."""

    def batch(self, step: int) -> Batch:
        """The global batch of optimizer step `step` (from 0) on the CPU; 0-d tensors go to every part unsplit."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Where a stage ended, where it was resumed (0 = from the start), and its last log row."""

    step: int
    tokens: int
    resumed_from: int
    fingerprint: str
    log: Path
    last: dict[str, Any]


def train(
    stage: Stage,
    model: nn.Module,
    loss_fn: LossFn,
    batches: BatchSource,
    workdir: str | os.PathLike[str],
    *,
    inputs: Mapping[str, str | int | float] | None = None,
    callbacks: Sequence[Callback] = (),
    restart: bool = False,
    accelerator: Any = None,
) -> TrainResult:
    """Train the parameters of `model` that require gradients, from the newest state in `workdir` if there is one.

    `loss_fn(part)` returns one scalar per name in `stage.coefficients`, unweighted and a mean over tokens; whatever
    else it returns (numbers, or lists such as loads) is averaged and logged under "metrics". It draws at random only
    from the global generators, which are seeded here. `callbacks` get each log row. `inputs` names what else decides
    the numbers (a teacher's hash). A finished stage loads its parameters and returns at once. `restart` drops what is
    there.

    Raises:
        MoesaicError: the settings differ from the ones in `workdir`; a loss or gradient norm is not finite (the
            parameters are not updated then, and the last good state is kept); the disk is full.
        MissingExtraError: accelerate is not installed.
    """
    accelerator = accelerator or make_accelerator()
    trainer = _Trainer(stage, model.to(accelerator.device), loss_fn, batches, Path(workdir), accelerator)
    settings = _settings(trainer, inputs or {})
    start, row = trainer.begin(settings, restart)
    position, first = start, accelerator.is_main_process
    bar = Progress(stage.name, total=stage.steps, completed=start.step) if first else contextlib.nullcontext()
    with bar as progress, _training_mode(model):
        while not position.finished:
            row = trainer.update(position)
            position = Position(step=row["step"], tokens=row["tokens"], finished=row["step"] == stage.steps)
            if first:
                append_jsonl(trainer.log, row)
            for callback in callbacks:  # before the state is saved, which then holds what they drew at random
                callback(row)
            if position.finished or position.step % stage.checkpoint_every == 0:
                trainer.save(position, settings)
            if progress is not None:
                progress.advance(loss=row["loss"], lr=row["lr"])
    return TrainResult(
        step=position.step,
        tokens=position.tokens,
        resumed_from=start.step,
        fingerprint=fingerprint(settings),
        log=trainer.log,
        last=row,
    )


def make_accelerator() -> Any:
    """An Accelerator for one process or plain data parallelism (torchrun); precision and accumulation are the stage's.

    Raises:
        MissingExtraError: accelerate is not installed.
        MoesaicError: the environment asks for sharding or fp16 loss scaling, which this loop does not do.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error
    # without cpu=True, two torchrun processes on a machine without a GPU would each believe to be alone
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    accelerator.gradient_accumulation_steps = 1  # the environment may say otherwise, and backward() would divide by it
    kind, precision = accelerator.distributed_type.value, accelerator.mixed_precision
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") or precision == "fp16":
        raise MoesaicError(f"accelerate is set up for {kind}, {precision}; use one process or torchrun, without fp16")
    return accelerator


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """`parts` slices of a batch along its first axis, sizes differing by one row at most; 0-d tensors go to each."""
    rows = sorted({len(tensor) for tensor in batch.values() if tensor.ndim})
    if len(rows) != 1 or rows[0] < parts:
        raise MoesaicError(f"a batch with first axes {rows} cannot be split into {parts} parts; use a larger batch")
    pieces = {name: tensor.tensor_split(parts) if tensor.ndim else [tensor] * parts for name, tensor in batch.items()}
    return [{name: pieces[name][part] for name in batch} for part in range(parts)]


def count_tokens(batch: Batch) -> int:
    """Tokens that count in a mean loss: labels that are not -100, else unmasked tokens, else ids, else rows."""
    if "labels" in batch:
        return int((batch["labels"] != -100).sum())
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if "input_ids" in batch:
        return batch["input_ids"].numel()
    return next(len(tensor) for tensor in batch.values() if tensor.ndim)


@dataclass
class _Trainer:
    """The parts of a stage and what is done with them at its start, per update, and per state."""

    stage: Stage
    model: nn.Module
    loss_fn: LossFn
    batches: BatchSource
    workdir: Path
    accelerator: Any

    def __post_init__(self) -> None:
        self.log = self.workdir / "log.jsonl"
        self.trainable = trainable_parameters(self.model)
        self.optimizers = build_optimizers(self.stage, self.model)

    def begin(self, settings: Mapping[str, Any], restart: bool) -> tuple[Position, dict[str, Any]]:
        """Seed, resume, and bring the log to where the run goes on; returns that position and the log's last row."""
        accelerator, row = self.accelerator, {}
        if accelerator.is_main_process:
            self.workdir.mkdir(parents=True, exist_ok=True)
            clean_leftovers(self.workdir)
            for folder in state_directories(self.workdir) if restart else []:
                remove_directory(folder)
        accelerator.wait_for_everyone()
        seed_rng(self.stage.seed + accelerator.process_index)
        position = load_newest(self.workdir, self.model, self.optimizers, settings, accelerator.process_index)
        accelerator.wait_for_everyone()  # all have read before anything is pruned
        if position is None:
            position = Position()
            self._share_start()
        if accelerator.is_main_process:
            prune_states(self.workdir, position)  # a kill may have come before it
            row = truncate_log(self.log, position.step)
        return position, row

    def update(self, position: Position) -> dict[str, Any]:
        """One optimizer step; returns its log row. Nothing is updated if a loss or the gradient norm is not finite."""
        lr = self.stage.lr_at(position.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = lr
        means, tokens = self._accumulate(self.batches.batch(position.step))
        limit = math.inf if self.stage.grad_clip is None else self.stage.grad_clip
        grad_norm = float(self.accelerator.clip_grad_norm_(self.trainable.values(), limit))
        losses = {name: float(means.pop(name)) for name in self.stage.coefficients}
        for name, value in {**losses, "gradient norm": grad_norm}.items():
            if not math.isfinite(value):
                raise MoesaicError(self._bad_number(name, value, position.step + 1))
        for optimizer in self.optimizers:
            optimizer.step()
        weighted = {name: coefficient * losses[name] for name, coefficient in self.stage.coefficients.items()}
        size = sum(map(abs, weighted.values())) or 1.0
        return {
            "step": position.step + 1,
            "loss": sum(weighted.values()),
            "losses": losses,
            "shares": {name: abs(value) / size for name, value in weighted.items()},
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": position.tokens + tokens,
            "metrics": {name: _plain(value.tolist()) for name, value in means.items()},
        }

    def save(self, position: Position, settings: Mapping[str, Any]) -> None:
        """Write the state; every process takes part, for its own random state."""
        rngs = [capture_rng(self.accelerator.device)]
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rngs = gather_object(rngs)
        if self.accelerator.is_main_process:
            sync_to_disk(self.log)
            save_state(self.workdir, position, self.model, self.optimizers, settings, rngs)
        self.accelerator.wait_for_everyone()

    def _accumulate(self, batch: Batch) -> tuple[dict[str, Tensor], int]:
        """Gradients, and the mean of everything `loss_fn` returned, over the whole batch; and the batch's tokens."""
        accelerator = self.accelerator
        parts = split_batch(batch, self.stage.micro_batches * accelerator.num_processes)
        counts = [count_tokens(part) for part in parts]
        means: dict[str, Tensor] = {}
        for index in range(accelerator.process_index, len(parts), accelerator.num_processes):
            part = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in parts[index].items()}
            share = counts[index] / max(1, sum(counts))
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=self.stage.dtype == "bf16"):
                outputs = self.loss_fn(part)
            accelerator.backward(self._total(outputs) * share)
            for name, value in outputs.items():
                value = torch.as_tensor(value, device=accelerator.device).detach().float() * share
                means[name] = means[name] + value if name in means else value
        if accelerator.num_processes > 1:
            for parameter in self.trainable.values():
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = accelerator.reduce(own, "sum")
            means = accelerator.reduce(means, "sum")
        return means, sum(counts)

    def _total(self, outputs: Mapping[str, Any]) -> Tensor:
        """The weighted sum of the losses; refuses a loss that is missing, no scalar, or would be dropped silently."""
        owned = self.stage.coefficients
        bad = [name for name in owned if not isinstance(outputs.get(name), Tensor) or outputs[name].ndim]
        bad += [k for k, value in outputs.items() if k not in owned and getattr(value, "requires_grad", False)]
        if bad:
            raise MoesaicError(
                f"stage {self.stage.name!r}: the loss function returned {sorted(outputs)} for the coefficients "
                f"{sorted(owned)}; {bad} should be scalar tensors there, or be detached if they are only to be logged"
            )
        total = torch.stack([coefficient * outputs[name].float() for name, coefficient in owned.items()]).sum()
        if not total.requires_grad:
            raise MoesaicError(f"stage {self.stage.name!r}: no loss depends on a trainable parameter of the model")
        return total

    def _bad_number(self, name: str, value: float, step: int) -> str:
        good = next(iter(state_directories(self.workdir)), "none yet")
        return (
            f"stage {self.stage.name!r} stopped in step {step}: {name} is {value}. The parameters were not updated. "
            f"Last good state: {good}. Try a smaller lr, a longer warmup or dtype='fp32', in a new work directory or "
            "with restart (--restart)."
        )

    def _share_start(self) -> None:
        """Everyone starts from the first process's parameters, which may have been made at random."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast

            for tensor in (*self.trainable.values(), *self.model.buffers()):
                broadcast(tensor.data)


def _settings(trainer: _Trainer, inputs: Mapping[str, str | int | float]) -> dict[str, Any]:
    """Everything that decides the numbers, as JSON gives it back, so that it compares equal to a saved one."""
    shapes = {name: [list(p.shape), str(p.dtype)] for name, p in trainer.trainable.items()}
    settings = asdict(trainer.stage) | {
        "data": trainer.batches.fingerprint,
        "parameters": fingerprint(shapes),
        "processes": trainer.accelerator.num_processes,
        **{f"input {name}": value for name, value in inputs.items()},
    }
    del settings["checkpoint_every"]
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _plain(value: Any) -> Any:
    """Nested lists of floats, with None for what JSON cannot say (the perplexity of a domain that was absent)."""
    return [_plain(item) for item in value] if isinstance(value, list) else value if math.isfinite(value) else None


@contextlib.contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """`model.train()` inside, every module's own mode again outside."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
