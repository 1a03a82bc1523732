"""The Python front door: five lines from a dense model to receipts."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moesaic.data.domain import Domain, split_documents
from moesaic.data.sources import load_domains
from moesaic.errors import MoesaicError
from moesaic.models.loading import load_model, load_tokenizer, stored_dtype
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.refactor.pipeline import Refactoring
from moesaic.refactor.settings import RefactorConfig

Domains = Sequence[str] | Sequence[Domain] | Mapping[str, Sequence[str]] | None


@dataclass(frozen=True)
class Refactored:
    """What `refactor` returns: the model (float32, eval mode), its tokenizer, its receipt, and where it was saved."""

    model: MoesaicForCausalLM
    tokenizer: Any
    receipt: dict[str, Any]
    out: Path


def as_domains(domains: Domains, max_bytes: int | None) -> list[Domain]:
    """Domains from command-line style specs, from {name: documents}, or as they are; None = the installed ones."""
    if domains is None:
        return load_domains(None, max_bytes)
    if isinstance(domains, Mapping):
        return [split_documents(name, documents) for name, documents in domains.items()]
    specs = [domain for domain in domains if isinstance(domain, str)]
    given = [domain for domain in domains if isinstance(domain, Domain)]
    if specs and given:
        raise MoesaicError("give domains either as specs (strings) or as Domain objects, not both")
    if not given:
        return load_domains(specs, max_bytes)
    names = [domain.name for domain in given]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise MoesaicError(f"two domains are named {twice[0]!r}; every domain needs a name of its own")
    return given


def prepare(
    model: str | os.PathLike[str] | PreTrainedModel,
    domains: Domains = None,
    *,
    out: str | os.PathLike[str],
    config: RefactorConfig | None = None,
    tokenizer: Any = None,
    max_bytes: int | None = 4_000_000,
    restart: bool = False,
) -> Refactoring:
    """Load what is named and open a run, without running a stage; see `refactor` for the arguments."""
    texts = as_domains(domains, max_bytes)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise MoesaicError("pass tokenizer= together with a model object")
        dtype, source = model.dtype, getattr(model, "name_or_path", "")
        dense = model if dtype == torch.float32 else copy.deepcopy(model).float()  # the caller's model stays as it is
    else:
        dense, dtype, source = load_model(model), stored_dtype(model), str(model)
        tokenizer = tokenizer or load_tokenizer(model)
    if isinstance(dense, MoesaicForCausalLM):
        raise MoesaicError(f"{source} is a moesaic model already; refactor starts from a dense one")
    return Refactoring(dense, tokenizer, texts, Path(out), config, dtype=dtype, source=source, restart=restart)


def refactor(
    model: str | os.PathLike[str] | PreTrainedModel,
    domains: Domains = None,
    *,
    out: str | os.PathLike[str],
    config: RefactorConfig | None = None,
    tokenizer: Any = None,
    max_bytes: int | None = 4_000_000,
    restart: bool = False,
) -> Refactored:
    """Refactor a dense model into a pre-gated mixture of experts, heal it, and write receipts.

    model:      a folder, a hub name, or a loaded model (then give `tokenizer` too).
    domains:    specs such as "python", "code=./src", "web=hf:allenai/c4"; or {name: [documents]}; None = the six
                domains of text every installation carries.
    out:        the checkpoint's folder; an interrupted run continues there.
    config:     all settings, see `RefactorConfig`.
    max_bytes:  text taken per domain at most.
    restart:    drop an earlier run in `out`.

    Raises MoesaicError for bad input, before anything is written.
    """
    run = prepare(model, domains, out=out, config=config, tokenizer=tokenizer, max_bytes=max_bytes, restart=restart)
    receipt = run.run()
    assert receipt is not None
    return Refactored(run.healed, run.tokenizer, receipt, run.out)


@torch.inference_mode()
def evaluate(
    model: str | os.PathLike[str] | PreTrainedModel,
    domains: Domains = None,
    *,
    tokenizer: Any = None,
    windows: int = 24,
    length: int = 256,
    max_bytes: int | None = 4_000_000,
) -> dict[str, dict[str, float]]:
    """Held-out nats per token and bits per byte of each domain, for a dense or a moesaic model, in eval mode."""
    import math

    from moesaic.data.tokens import tokenize_domains
    from moesaic.progress import track
    from moesaic.refactor.quality import window_losses

    if not isinstance(model, PreTrainedModel):
        tokenizer = tokenizer or load_tokenizer(model)
        model = load_model(model)
    if tokenizer is None:
        raise MoesaicError("pass tokenizer= together with a model object")
    model.eval()
    result = {}
    streams = tokenize_domains(as_domains(domains, max_bytes), tokenizer)
    for stream in track(streams, "evaluate", unit="domains"):
        ids = stream.windows(length, windows).to(model.device)
        losses = [window_losses(model(input_ids=part, use_cache=False).logits, part) for part in ids.split(8)]
        nats = float(torch.cat(losses).mean())
        bits = nats / math.log(2) / stream.bytes_per_token
        result[stream.name] = {"nats_per_token": nats, "bits_per_byte": bits, "windows": float(len(ids))}
    return result
