"""The spine: profile -> extract -> pregate -> heal -> receipts. Each stage leaves its result in OUT/work.

A stage that finds its result does not run again, so an interrupted run continues where it stopped.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moesaic.data.domain import Domain
from moesaic.data.tokens import DomainTokens, TokenBatches, Tokenizer, tokenize_domains
from moesaic.errors import MoesaicError
from moesaic.files import (
    TEMPORARY,
    atomic_write_json,
    clean_leftovers,
    load_tensors,
    remove_directory,
    save_tensors,
    storage_errors,
)
from moesaic.models.attach import attach
from moesaic.models.ffn_sites import find_ffn_sites
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.refactor.cluster import cluster_domains
from moesaic.refactor.extract import extract, extract_pruned, ownership
from moesaic.refactor.heal import heal, train_router
from moesaic.refactor.pregate import OverlapTeacher
from moesaic.refactor.profile import Profile, profile
from moesaic.refactor.settings import RefactorConfig

STAGES = ("profile", "extract", "pregate", "heal", "receipts")


class Refactoring:
    """One run: a dense model, labelled domains, settings, and the folder everything goes to.

    dense:      the source, float32; never modified.
    dtype:      what the refactored weights are stored in.
    source:     where the model came from, for the receipt.

    restart:    drop an earlier run in `out`.

    Raises MoesaicError for input that cannot work, or if `out` holds a run with other settings, model or data (use
    `restart` or another folder). Nothing is written before the first stage has a result.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: Any,
        domains: Sequence[Domain],
        out: Path,
        config: RefactorConfig | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        source: str = "",
        restart: bool = False,
    ) -> None:
        self.dense, self.tokenizer, self.out, self.dtype, self.source = dense.eval(), tokenizer, out, dtype, source
        self.config = config or RefactorConfig()
        self.config.check(len(find_ffn_sites(dense)), len(domains))
        self.labelled = tokenize_domains(domains, tokenizer)
        self.work = out / "work"
        self._check_data()
        self._check_folder()
        self.identity = {
            "model": model_fingerprint(self.dense),
            "data": data_fingerprint(self.labelled),
            "settings": json.loads(json.dumps(self.config.to_dict())),
        }
        if restart and (self.work / "run.json").exists():
            for folder in (out / "receipts", self.work):  # the run's identity goes last
                if folder.exists():
                    remove_directory(folder)
        self._compare_identity()

    def _check_data(self) -> None:
        """Raises MoesaicError if the texts hold ids that the model does not know."""
        vocabulary = self.dense.config.get_text_config(decoder=True).vocab_size
        for domain in self.labelled:
            highest = int(max(domain.train.max(initial=0), domain.validation.max(initial=0)))
            if highest >= vocabulary:
                raise MoesaicError(
                    f"the tokenizer gives id {highest}, but the model has {vocabulary} tokens: they do not belong "
                    "together"
                )

    def _check_lengths(self) -> None:
        """Raises MoesaicError if a domain is too short for healing or the receipts; a profile makes do with less."""
        heal = self.config.heal
        TokenBatches(tuple(self.labelled), heal.batch_size, heal.length)
        for domain in self.labelled:
            domain.windows(heal.length, 1)

    def _check_folder(self) -> None:
        """Raises MoesaicError if nothing can be written to `out`; removes what killed writers left there."""
        nearest = next(folder for folder in (self.out, *self.out.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise MoesaicError(
                f"{self.out} cannot be written to: {nearest} is no writable folder; choose another --out"
            )
        for folder in (self.out, self.work, self.out / "receipts"):
            clean_leftovers(folder)

    def _claim_folder(self) -> None:
        """Write this run's identity, just before its first result."""
        path = self.work / "run.json"
        if not path.exists():
            atomic_write_json(path, self.identity)

    def _compare_identity(self) -> None:
        """Raises MoesaicError if another run is in `out`."""
        path, identity = self.work / "run.json", self.identity
        if not path.exists():
            return
        try:
            before = dict(json.loads(path.read_text()))
        except ValueError:
            raise MoesaicError(f"{path} is damaged; start over with --restart, or choose another --out") from None
        if changed := [key for key in identity if before.get(key) != identity[key]]:
            raise MoesaicError(
                f"{self.out} holds a run with different {' and '.join(changed)}; continue it with the same ones, start "
                "over with --restart, or choose another --out"
            )

    @cached_property
    def domains(self) -> list[DomainTokens]:
        """The labelled domains, or clusters of their sequences when `config.experts` asks for them."""
        if self.config.experts is None:
            return self.labelled
        return cluster_domains(
            self.dense, self.labelled, self.config.experts, length=self.config.heal.length, seed=self.config.heal.seed
        )

    @property
    def names(self) -> list[str]:
        """Expert names."""
        return [domain.name for domain in self.domains]

    # -- stages -------------------------------------------------------------------------------------------------
    @cached_property
    def profile(self) -> Profile:
        """Stage 1; see `refactor.profile`."""
        path = self.work / "profile.safetensors"
        if path.exists():
            return Profile.load(path, self.names)
        length = min(self.config.heal.length, min(len(d.train) for d in self.domains) // 2)
        result = profile(self.dense, self.domains, tokens_per_domain=self.config.profile_tokens, length=length)
        self._claim_folder()
        result.save(path)
        atomic_write_json(self.work / "coverage.json", result.coverage())
        return result

    def _masks(self, name: str, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        path = self.work / f"{name}.safetensors"
        if not path.exists():
            save_tensors(path, {f"mask.{layer}": mask for layer, mask in enumerate(make())})
        saved = load_tensors(path)
        return [saved[f"mask.{layer}"] for layer in range(len(saved))]

    @cached_property
    def masks(self) -> list[Tensor]:
        """Stage 2; (E, W) bool per layer; see `refactor.extract`."""
        masks = self._masks("masks", lambda: extract(self.profile, self.config.keep, self.config.importance))
        atomic_write_json(self.work / "ownership.json", ownership(masks))
        return masks

    @cached_property
    def teacher(self) -> OverlapTeacher:
        """Labels for the pre-gate from the dense model's activations."""
        return OverlapTeacher(self.dense, self.masks, self.config.heal.router_loss)

    def attach(self) -> MoesaicForCausalLM:
        """A fresh refactored model, its pre-gate initialised from the seed."""
        torch.manual_seed(self.config.heal.seed)
        return attach(self.dense, self.masks, self.names, untied=self.config.untied)

    @cached_property
    def unhealed(self) -> MoesaicForCausalLM:
        """Stage 3; the refactored model with a trained pre-gate and untrained experts; see `refactor.pregate`."""
        model = self.attach()
        assert model.pregate is not None
        path = self.work / "pregate.safetensors"
        if path.exists():
            model.pregate.load_state_dict(load_tensors(path))
            return model
        train_router(model, self.teacher, self.domains, self.config.heal, self.work / "heal" / "round-0-router")
        save_tensors(path, model.pregate.state_dict())
        return model.eval()

    @cached_property
    def healed(self) -> MoesaicForCausalLM:
        """Stage 4; saved to `out` in the stored dtype; see `refactor.heal`."""
        _ = self.unhealed  # its router stage is round 0 of healing
        model = heal(self.attach(), self.dense, self.masks, self.domains, self.config.heal, self.work / "heal")
        self.save(model)
        return model

    @cached_property
    def pruned(self) -> MoesaicForCausalLM:
        """The control: one global mask of the same width, healed on the same tokens and steps, without a router."""
        masks = self._masks("pruned", lambda: extract_pruned(self.profile, self.config.keep, self.config.importance))
        torch.manual_seed(self.config.heal.seed)
        model = attach(self.dense, masks, ["pruned"])
        return heal(model, self.dense, masks, self.domains, self.config.heal, self.work / "control")

    def save(self, model: MoesaicForCausalLM) -> None:
        """Write the checkpoint and its tokenizer; training keeps its float32 weights."""
        from copy import deepcopy

        stored = deepcopy(model)
        stored.backbone.to(self.dtype)
        stored.config.dtype = self.dtype
        with (
            storage_errors(self.out),
            tempfile.TemporaryDirectory(dir=self.work, prefix=f".tokenizer{TEMPORARY}") as name,
        ):
            self.tokenizer.save_pretrained(name)
            for file in (path for path in Path(name).rglob("*") if path.is_file()):
                target = self.out / file.relative_to(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        stored.save_pretrained(self.out)

    def run(self, until: str = STAGES[-1]) -> dict[str, Any] | None:
        """Run all stages up to and including `until`; returns the receipt if that is the last one."""
        if until not in STAGES:
            raise MoesaicError(f"no stage {until!r}; the stages are {', '.join(STAGES)}")
        if until not in ("profile", "extract"):
            self._check_lengths()
        for stage in STAGES[: STAGES.index(until) + 1]:
            if stage == "receipts":
                from moesaic.refactor.receipts import saved_receipt, write_receipts

                return saved_receipt(self) or write_receipts(self)
            getattr(self, {"profile": "profile", "extract": "masks", "pregate": "unhealed", "heal": "healed"}[stage])
        return None


def model_fingerprint(model: PreTrainedModel) -> str:
    """Changes when any weight changes (sums and first values, not a full hash: models are large)."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        row = (name, tuple(parameter.shape), float(values.double().sum()), values[:8].float().tolist())
        digest.update(repr(row).encode())
    return digest.hexdigest()[:16]


def data_fingerprint(domains: Sequence[DomainTokens]) -> str:
    """Changes when any token of any domain changes."""
    digest = hashlib.sha256()
    for domain in domains:
        digest.update(domain.name.encode() + domain.train.tobytes() + domain.validation.tobytes())
    return digest.hexdigest()[:16]


__all__ = ["STAGES", "RefactorConfig", "Refactoring", "Tokenizer"]
