"""Checkpoints that are whole or absent: written aside, renamed into place, checked against a manifest on load."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_json, sha256_file, storage_errors

MANIFEST = "moesaic.manifest.json"


def save_checkpoint(save: Callable[..., Any], directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Let `save(folder, **kwargs)` write into a temporary folder, then move its files into `directory`, manifest last.

    Other files of `directory` (tokenizer, receipts) stay. A load between the moves fails the manifest check instead of
    reading a mixture of two models.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise MoesaicError(f"{target} is a file; a checkpoint needs a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with storage_errors(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        written = Path(name)
        save(written, **kwargs)
        files = sorted(path for path in written.iterdir() if path.is_file())
        entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in files}
        target.mkdir(exist_ok=True)
        stale = _weights(target) - set(entries)
        for path in files:
            os.replace(path, target / path.name)
        for name in stale:
            (target / name).unlink()
        atomic_write_json(target / MANIFEST, {"files": entries})


def _weights(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("model*.safetensors*")}


def verify_checkpoint(directory: str | os.PathLike[str]) -> None:
    """Check every file listed in the manifest; a folder without one passes (it was written by other software).

    Raises MoesaicError naming the file that is missing, truncated or altered.
    """
    folder = Path(directory)
    manifest = folder / MANIFEST
    if not manifest.exists():
        return
    try:
        entries = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        raise MoesaicError(f"{manifest} is damaged; copy the checkpoint again from its source") from None
    for name, expected in entries.items():
        path, remedy = folder / name, "copy it again from its source, or run the refactoring again"
        if not path.exists():
            raise MoesaicError(f"checkpoint {folder} lacks {name}; {remedy}")
        if name.endswith(".json"):
            continue  # people edit configs by hand; that is allowed
        if (size := path.stat().st_size) != expected["bytes"]:
            raise MoesaicError(f"{path} has {size} bytes, expected {expected['bytes']}: it is truncated; {remedy}")
        if sha256_file(path) != expected["sha256"]:
            raise MoesaicError(f"{path} does not match its checksum: it was altered or damaged; {remedy}")


def copy_tokenizer(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy tokenizer files as they are, so that the refactored model tokenizes byte for byte like its source."""
    names = ("tokenizer", "special_tokens_map", "vocab", "merges", "added_tokens", "spiece", "chat_template")
    for path in Path(source).iterdir():
        if path.is_file() and path.name.startswith(names):
            shutil.copy2(path, Path(target) / path.name)
