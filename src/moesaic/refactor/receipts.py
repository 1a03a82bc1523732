"""Stage 5: the receipts of a refactoring: numbers as JSON, one page of Markdown, four pictures."""

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from moesaic.data.tokens import DomainTokens
from moesaic.errors import MissingExtraError
from moesaic.experts.channel_blocks import BlockLayout
from moesaic.files import TEMPORARY, atomic_write_json, atomic_write_text, storage_errors
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.refactor.extract import ownership
from moesaic.refactor.machine import device_name
from moesaic.refactor.quality import measure_bytes, measure_quality, measure_router
from moesaic.refactor.report import receipt_markdown
from moesaic.refactor.speed import measure_speed

if TYPE_CHECKING:
    from moesaic.refactor.pipeline import Refactoring

FORMAT = 1
SPEED_SECONDS = 20.0  # rounds of the speed measurement stop after this; benchmarks/speed.py takes longer


def write_receipts(run: "Refactoring") -> dict[str, Any]:
    """Measure everything about `run` and write OUT/receipts; returns the receipt."""
    config = run.config
    common = {"windows": config.windows, "length": config.heal.length, "batch_size": config.heal.batch_size}
    pruned = run.pruned if config.control else None
    receipt: dict[str, Any] = {
        "format": FORMAT,
        "model": _model(run),
        "settings": _settings(run),
        "environment": environment(),
        "quality": measure_quality(
            run.dense, run.healed, run.domains, pruned=pruned, unhealed=run.unhealed, seed=config.heal.seed, **common
        ),
        "router": measure_router(run.healed, run.teacher, run.domains, **common),
        "layout": _layout(run),
        "bytes": measure_bytes(run.dense, run.healed, run.dtype),
        "coverage": run.profile.coverage(),
        "speed": _speed(run) if config.speed else None,
    }
    folder = run.out / "receipts"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_json(folder / "receipt.json", receipt)
    receipt["pictures"] = _pictures(run, receipt, folder)
    atomic_write_json(folder / "receipt.json", receipt)
    atomic_write_text(folder / "receipt.md", receipt_markdown(receipt))
    atomic_write_json(run.work / "receipt.json", receipt)
    return receipt


def saved_receipt(run: "Refactoring") -> dict[str, Any] | None:
    """What `write_receipts` returned before; None if there is nothing yet, or some of what it writes is missing."""
    path = run.work / "receipt.json"
    receipt: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    names = ["receipt.json", "receipt.md", *receipt.get("pictures", [])]
    whole = receipt.get("pictures") and all((run.out / "receipts" / name).exists() for name in names)
    return receipt if whole and receipt["format"] == FORMAT else None


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _model(run: "Refactoring") -> dict[str, Any]:
    text = run.dense.config.get_text_config(decoder=True)
    return {
        "source": run.source,
        "name": Path(run.source).name or type(run.dense).__name__,
        "architecture": type(run.dense).__name__,
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "ffn_width": run.masks[0].shape[1],
        "vocabulary": text.vocab_size,
        "experts": run.names,
        "dtype": str(run.dtype).removeprefix("torch."),
    }


def _settings(run: "Refactoring") -> dict[str, Any]:
    config = run.config
    return {
        "keep": config.to_dict()["keep"],
        "importance": config.importance,
        "tied": not config.untied,
        "labels": "domains" if config.experts is None else "clusters",
        "profile_tokens_per_domain": config.profile_tokens,
        "heal_tokens": config.heal.expert_steps * config.heal.rounds * config.heal.batch_size * config.heal.length,
        **{k: v for k, v in config.heal.to_dict().items() if k != "tokens"},
    }


def _layout(run: "Refactoring") -> dict[str, list[int]]:
    layouts = [BlockLayout.from_list(raw) for raw in run.healed.config.layouts]
    owned = ownership(run.masks)
    return {
        "widths": [layout.width for layout in layouts],
        "source_widths": [mask.shape[1] for mask in run.masks],
        "shared": owned["shared"],
        "exclusive": owned["exclusive"],
        "dropped": owned["dropped"],
        "blocks": [len(layout.blocks) for layout in layouts],
        "runs": [max(len(layout.runs(e)) for e in range(layout.experts)) for layout in layouts],
    }


def _speed(run: "Refactoring") -> dict[str, Any]:
    """Speed on real text, both models in float32 in memory."""
    longest = [max(len(domain.train), len(domain.validation)) for domain in run.domains]
    length = min(512, int(getattr(run.dense.config, "max_position_embeddings", 512) or 512) - 32, max(longest))
    texts = [domain for domain, tokens in zip(run.domains, longest, strict=True) if tokens >= length]
    prompts = torch.cat([_rows(domain, length) for domain in texts])
    need = -(-32 // len(prompts))
    return measure_speed(
        run.dense,
        run.healed,
        prompts.repeat(need, 1)[:32],
        prefill_tokens=length,
        decode_context=min(64, length // 2),
        decode_steps=min(16, length // 2),
        budget_s=SPEED_SECONDS,
    )


def _rows(domain: DomainTokens, length: int, limit: int = 6) -> torch.Tensor:
    split = "validation" if len(domain.validation) >= length else "train"
    return domain.windows(length, limit, split)


def heal_log(work: Path, rounds: int) -> list[dict[str, Any]]:
    """All log rows of a healing run in order, each with its `round` and `stage` ("router" or "experts")."""
    rows = []
    for index in range(rounds):
        for stage in ("router", "experts"):
            path = work / f"round-{index}-{stage}" / "log.jsonl"
            if path.exists():
                rows += [{"round": index, "stage": stage, **json.loads(line)} for line in path.read_text().splitlines()]
    return rows


@torch.inference_mode()
def token_strips(
    model: MoesaicForCausalLM, tokenizer: Any, domains: Sequence[DomainTokens], tokens: int = 64
) -> list[tuple[str, list[tuple[str, int]]]]:
    """One short held-out text per domain, token by token with its expert."""
    strips = []
    for domain in domains:
        ids = _rows(domain, min(tokens, max(len(domain.train), len(domain.validation))), 3)[-1:]
        experts = model.plan(ids.to(model.device)).expert.tolist()
        strips.append((domain.name, list(zip(token_texts(tokenizer, ids[0].tolist()), experts, strict=True))))
    return strips


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text each token adds. Decoding prefixes keeps leading spaces, which decoding single tokens may drop.

    A character spread over several byte tokens belongs to the token that completes it.
    """
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        complete = whole.rstrip("\ufffd") if end < len(ids) else whole
        texts.append(complete[len(before) :])
        before = max(before, complete, key=len)
    return texts


def _pictures(run: "Refactoring", receipt: dict[str, Any], folder: Path) -> list[str]:
    """Draw what can be drawn; without matplotlib the receipt is complete but has no pictures."""
    from moesaic.refactor import figures

    rounds = run.config.heal.rounds
    control = heal_log(run.work / "control", rounds) if run.config.control else None
    names = ["expert_domain.png", "channel_ownership.png", "token_strip.png", "loss_curves.png"]
    with (
        storage_errors(folder),
        contextlib.suppress(MissingExtraError),
        tempfile.TemporaryDirectory(dir=folder, prefix=f".pictures{TEMPORARY}") as temporary,
    ):
        heat, owners, strip, curves = (Path(temporary) / name for name in names)
        figures.expert_domain_heatmap(receipt, heat)
        figures.channel_ownership([mask.numpy() for mask in run.masks], run.names, owners)
        figures.token_strip(token_strips(run.healed, run.tokenizer, run.domains), run.names, strip)
        level = receipt["quality"]["average"]["dense"]
        figures.loss_curves(heal_log(run.work / "heal", rounds), run.names, curves, control, dense=level)
        for name in names:
            os.replace(Path(temporary) / name, folder / name)
        return names
    return []
