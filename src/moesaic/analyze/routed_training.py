"""Train a language model under any router: a TOML file in, a checkpoint, its metrics and its log out.

    OUT/config.json, model.safetensors, tokenizer...   a RoutedForCausalLM, read by AutoModelForCausalLM
        metrics.json                                   settings, what the router does with held-out text, cost, speed
        work/                                          the training loop's log and exact states

Under torchrun the batch of a step is split over the processes; steps, batches and learning rates stay the same.
"""

import difflib
import hashlib
import inspect
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moesaic.analyze.router_metrics import measure_router, next_token_sum
from moesaic.balance.load_balance import LoadBalance
from moesaic.balance.router_losses import consistency_loss
from moesaic.data.sources import load_domains
from moesaic.data.tokens import DomainTokens, TokenBatches, tokenize_domains
from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_json
from moesaic.models.checkpoint import MANIFEST, copy_tokenizer, verify_checkpoint
from moesaic.models.loading import load_model, load_tokenizer
from moesaic.models.routed import RoutedForCausalLM, attach_router
from moesaic.pocket import pocket_path
from moesaic.routing.family import router_class
from moesaic.routing.zero_computation import heterogeneous_eta
from moesaic.training.loop import Callback, make_accelerator, train
from moesaic.training.schedule import Stage

# Coefficients from the papers; where a paper has none (union), those of plain top-k.
PAPER_LOSSES: dict[str, dict[str, float]] = {
    "top-k": {"load_balance": 0.01},
    "recurrent": {"load_balance": 0.01},
    "union": {"load_balance": 0.01},
    "top-p": {"load_balance": 0.01, "entropy": 1e-4},
    "zero-computation": {"load_balance": 0.01},
    "fine-grained": {"load_balance": 0.01},
    "big-small": {"budget": 1.0},
    "random": {"consistency": 1.0},
}
LOSSES = ("load_balance", "entropy", "z", "consistency", "budget")
BALANCE = ("scope", "micro_floor", "tau")
SHAPE = {"layers": 4, "hidden": 128, "ffn": 256, "heads": 4, "kv_heads": None, "tokenizer": "pocket"}


@dataclass(frozen=True, kw_only=True)
class RoutedTraining:
    """Everything that decides a run; a TOML file has the same keys.

    model:      "pocket", a folder or hub name; or a table of SHAPE's keys: a small Llama from scratch.
    router:     a name of `routing.family`, or a table {name, options...}.
    experts, upcycle, hidden, shared, free, noise, scale:   the pool, see `models.routed.attach_router`; `upcycle` is
                "copy" for a trained model and "scratch" for a shape unless it is given.
    losses:     coefficients of LOSSES beside the next-token loss; None = the router's paper's. "consistency" runs two
                forwards with fresh draws: CE1 + CE2 + coefficient * symmetric KL (THOR, 2110.04260).
    balance:    scope = "micro", "sequence" or "global", micro_floor, and tau, the weight of free experts (MoE++).
    """

    model: str | dict[str, Any] = "pocket"
    router: str | dict[str, Any] = "top-k"
    experts: int = 8
    upcycle: str | None = None
    hidden: int | None = None
    shared: int = 0
    free: dict[str, int] = field(default_factory=dict)
    noise: float = 0.0
    scale: float = 1.0
    losses: dict[str, float] | None = None
    balance: dict[str, Any] = field(default_factory=dict)
    domains: list[str] | None = None
    max_bytes: int = 4_000_000
    steps: int = 300
    batch_size: int = 8
    length: int = 256
    micro_batches: int = 1
    lr: float = 1e-3
    optimizer: str = "adamw"
    schedule: str = "cosine_to_zero"
    warmup: int = 10
    weight_decay: float = 0.01
    dtype: str = "fp32"
    seed: int = 0
    checkpoint_every: int = 100
    windows: int = 24

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(RoutedTraining).items():
            if not _fits(getattr(self, name), hint):
                wanted = str(hint).replace("<class '", "").replace("'>", "")
                raise MoesaicError(f"{name} = {getattr(self, name)!r}: expected {wanted}")
        for name, low in (("experts", 1), ("batch_size", 1), ("windows", 1), ("length", 2)):
            if getattr(self, name) < low:
                raise MoesaicError(f"{name} = {getattr(self, name)}: expected at least {low}")
        if isinstance(self.model, dict):
            _check_keys("model", self.model, SHAPE)
            if bad := [
                key for key, value in self.model.items() if not _fits(value, str if key == "tokenizer" else int)
            ]:
                raise MoesaicError(f"model.{bad[0]} = {self.model[bad[0]]!r}: expected a whole number")
        _check_keys("losses", self.losses or {}, LOSSES)
        _check_keys("balance", self.balance, BALANCE)
        if bad := [key for key in ("micro_floor", "tau") if not _fits(self.balance.get(key, 0.0), float)]:
            raise MoesaicError(f"balance.{bad[0]} = {self.balance[bad[0]]!r}: expected a number")
        LoadBalance(scope=self.balance.get("scope", "micro"))
        _check_keys("free", self.free, ("zero", "copy", "constant"))
        if not (caps := router_class(self.router_name).caps).causal:  # type: ignore[attr-defined]
            raise MoesaicError(
                f"router {self.router_name!r} compares a token with later ones, so that a language model trained with "
                f"it would see the future; use {caps.causal_alternative}"
            )
        self.stage()

    @property
    def router_name(self) -> str:
        """The router's name in `routing.family`."""
        return self.router if isinstance(self.router, str) else str(self.router.get("name", "without a name"))

    @property
    def auxiliary(self) -> dict[str, float]:
        """Coefficients of the losses beside the next-token loss, without zeros."""
        losses = PAPER_LOSSES.get(self.router_name, {}) if self.losses is None else self.losses
        return {name: value for name, value in losses.items() if value}

    def stage(self) -> Stage:
        """The settings of the training loop."""
        losses = self.auxiliary
        return Stage(
            name=self.router_name,
            steps=self.steps,
            lr=self.lr,
            # CE1 + CE2: twice the mean that is logged, so that the coefficient of consistency is the paper's alpha
            coefficients={"lm": 2.0 if "consistency" in losses else 1.0, **losses},
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            schedule_args={"warmup": min(self.warmup, self.steps // 10)},
            micro_batches=self.micro_batches,
            dtype=self.dtype,
            seed=self.seed,
            checkpoint_every=self.checkpoint_every,
        )


def read_config(path: str | os.PathLike[str]) -> RoutedTraining:
    """The training that a TOML file describes.

    Raises MoesaicError for a file that is missing or no TOML, and for unknown keys, with the nearest known one.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoesaicError(f"{path} does not exist; expected a TOML file that describes a training") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MoesaicError(f"{path} cannot be read as TOML: {error}") from None
    try:
        _check_keys("", values, [item.name for item in fields(RoutedTraining)])
        return RoutedTraining(**values)
    except MoesaicError as error:
        raise MoesaicError(f"{path}: {error}") from None


def _check_keys(table: str, values: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]) -> None:
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise MoesaicError(f"unknown key {table}{'.' * bool(table)}{key}: {hint}known are {', '.join(known)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value is of a field's type; an integer is a number too, but no bool is."""
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(item, get_args(hint)[1]) for item in value.values())
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is Any or isinstance(value, bool):
        return hint is Any
    return isinstance(value, (int, float) if hint is float else hint)


# -- the model -----------------------------------------------------------------------------------------------------
def tokenizer_source(config: RoutedTraining) -> str:
    """Folder or hub name of the tokenizer: the model's own, or the one that the shape names."""
    source = config.model if isinstance(config.model, str) else config.model.get("tokenizer", SHAPE["tokenizer"])
    return str(pocket_path()) if source == "pocket" else str(source)


def build_model(config: RoutedTraining, tokenizer: Any) -> RoutedForCausalLM:
    """The untrained routed model, a function of the config alone: random numbers come from its seed."""
    upcycle = config.upcycle or ("copy" if isinstance(config.model, str) else "scratch")
    losses = {name: value for name, value in config.auxiliary.items() if name != "consistency"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = attach_router(
            _dense(config, tokenizer),
            _seeded(config),
            experts=config.experts,
            upcycle=upcycle,
            hidden=config.hidden,
            shared=config.shared,
            free=config.free,
            losses=losses,
            noise=config.noise,
            scale=config.scale,
        )
    options = dict(config.balance)
    tau = options.pop("tau", None)
    if tau is not None:
        options["eta"] = heterogeneous_eta(config.experts, sum(config.free.values()), tau)
    model.balance = LoadBalance(**options)
    return model


def _seeded(config: RoutedTraining) -> dict[str, Any]:
    """The router's name and options; one that draws at random follows the seed of the run unless it has its own."""
    router: dict[str, Any] = {"name": config.router} if isinstance(config.router, str) else dict(config.router)
    if "seed" in inspect.signature(router_class(config.router_name)).parameters:
        router.setdefault("seed", config.seed)
    return router


def _dense(config: RoutedTraining, tokenizer: Any) -> PreTrainedModel:
    if isinstance(config.model, str):
        return load_model(tokenizer_source(config))
    shape = SHAPE | config.model
    width, heads, kv_heads = shape["hidden"], shape["heads"], shape["kv_heads"] or shape["heads"]
    if width % (2 * heads) or heads % kv_heads:
        raise MoesaicError(
            f"model.hidden = {width} with {heads} heads, {kv_heads} of keys and values: a head's width must be "
            "a whole, even number, and kv_heads must divide heads"
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=shape["ffn"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=max(1024, config.length),
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# -- the loss ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SteppedBatches:
    """Batches that carry their step, so that whatever follows it (schedules, draws, resets) resumes exactly."""

    source: TokenBatches

    @property
    def fingerprint(self) -> str:
        """The source's."""
        return self.source.fingerprint

    def batch(self, step: int) -> dict[str, Tensor]:
        """`input_ids` (B, S) and `domain` (B,) of the source, and `step`, 0-d."""
        return {**self.source.batch(step), "step": torch.tensor(step)}


class RoutedLoss:
    """The unweighted losses of one part of a batch, by name: `lm` and those of `names`; and what routes it took.

    `lm` is the mean next-token loss, over both forwards if there are two; the others are of the last. The router's
    schedule and the reset of the balance counts happen once per optimizer step, at the first of its parts.
    """

    def __init__(self, model: RoutedForCausalLM, names: Sequence[str], steps: int) -> None:
        self.model, self.steps, self.step = model, steps, -1
        self.names = [name for name in names if name != "consistency"]
        self.forwards = 1 + ("consistency" in names)

    def begin(self, step: int) -> None:
        """Enter optimizer step `step`; nothing happens where it has been entered already."""
        if step != self.step:
            self.step = step
            self.model.router.schedule(step, self.steps)
            self.model.balance.reset()

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        model, ids, mask = self.model, batch["input_ids"], batch.get("attention_mask")
        self.begin(int(batch["step"]))
        logits = []
        for draw in range(self.forwards):
            model.step = self.forwards * self.step + draw
            logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
        losses = [total / max(1, count) for total, count in (next_token_sum(each, ids, mask) for each in logits)]
        result: dict[str, Any] = {"lm": torch.stack(losses).mean(), **model.losses(self.names)}
        assert model.last is not None
        valid_N = model.last.inp.valid
        if self.forwards == 2:
            result["consistency"] = consistency_loss(logits[0].flatten(0, 1), logits[1].flatten(0, 1), valid_N)
        used = torch.stack([plan.used[valid_N].sum(-1).float().mean() for plan in model.plans()])
        return {**result, "experts_per_token": used.tolist()}


# -- the run -------------------------------------------------------------------------------------------------------
def train_routed(
    config: RoutedTraining,
    out: str | os.PathLike[str],
    *,
    domains: Sequence[DomainTokens] | None = None,
    callbacks: Sequence[Callback] = (),
    restart: bool = False,
) -> dict[str, Any] | None:
    """Train, save and measure; returns what metrics.json holds, or None in a torchrun process that is not the first.

    domains:    tokenised already; None = those that the config names.

    A killed run continues exactly where its last state was when called again; a finished one returns at once.
    Raises MoesaicError when `out` holds a run with other settings, unless `restart` drops it.
    """
    out, accelerator = Path(out), make_accelerator()
    source = tokenizer_source(config)
    tokenizer = load_tokenizer(source)
    model = build_model(config, tokenizer)
    if domains is None:
        domains = tokenize_domains(load_domains(config.domains, config.max_bytes), tokenizer)
    batches = SteppedBatches(TokenBatches(tuple(domains), config.batch_size, config.length, config.seed))
    inputs = _inputs(config, model)
    settings = json.loads(json.dumps({"config": asdict(config), "inputs": inputs, "data": batches.fingerprint}))
    first = accelerator.is_main_process
    if restart and first:
        (out / "metrics.json").unlink(missing_ok=True)
    if not restart and (done := finished(out, settings)) is not None:
        return done if first else None
    loss = RoutedLoss(model, list(config.auxiliary), config.steps)
    result = train(
        config.stage(), model, loss, batches, out / "work",
        inputs=inputs, callbacks=callbacks, restart=restart, accelerator=accelerator,
    )  # fmt: skip
    if not first:
        return None
    model.step = 0
    model.router.schedule(config.steps - 1, config.steps)  # also where a finished stage was only loaded
    model.eval()
    measured = measure_router(
        model, domains, windows=config.windows, length=config.length, batch_size=config.batch_size
    )
    model.save_pretrained(out)
    copy_tokenizer(source, out) if Path(source).is_dir() else tokenizer.save_pretrained(out)
    metrics = {
        "format": 1,
        "settings": settings,
        "training": {"steps": result.step, "tokens": result.tokens, "last": result.last},
        "measured": measured,
        "environment": environment(model.device),
    }
    atomic_write_json(out / "metrics.json", metrics)
    plain: dict[str, Any] = json.loads(json.dumps(metrics))
    return plain


def finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metrics of a finished run with these settings whose checkpoint is whole; None if there is none in `out`."""
    path = out / "metrics.json"
    if not path.exists() or not (out / MANIFEST).exists():
        return None
    metrics: dict[str, Any] = json.loads(path.read_text())
    if metrics.get("format") != 1 or metrics.get("settings") != settings:
        return None
    try:
        verify_checkpoint(out)
    except MoesaicError:  # it is written again from the last state
        return None
    return metrics


def environment(device: torch.device) -> dict[str, Any]:
    """What numbers were measured on."""
    kind = "CPU" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return {"device": kind, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _inputs(config: RoutedTraining, model: RoutedForCausalLM) -> dict[str, str | int | float]:
    """What decides the numbers beside the stage and the data: the router, its pool, and every weight at the start."""
    names = ("router", "experts", "upcycle", "hidden", "shared", "free", "balance")
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    told = {name: json.dumps(getattr(config, name), sort_keys=True) for name in names}
    return {**told, "weights": digest.hexdigest()[:16]}
