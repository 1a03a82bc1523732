"""Files that are whole or absent: atomic writes, safetensors, JSON lines, checksums.

Everything is first written to a hidden temporary sibling, flushed to the disk, and then renamed, so a kill or a full
disk at any moment leaves either the old content or the new one. Only `save_tensors` and `load_tensors` know torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.errors import MoesaicError

if TYPE_CHECKING:
    from torch import Tensor

OLD, TEMPORARY = ".moesaic-old", ".moesaic-tmp-"  # marks of our own leftovers: nobody else's file is ever removed
PathLike = str | os.PathLike[str]
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(MoesaicError):
    """No room for `path`; nothing half-written was left behind. `needed` is in bytes, None where unknown."""

    def __init__(self, path: Path, needed: int | None = None) -> None:
        self.needed = needed
        folder = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
        wants = f" ({human_bytes(needed)} needed)" if needed is not None else ""
        super().__init__(
            f"the disk is full: {path} could not be written{wants}, {human_bytes(shutil.disk_usage(folder).free)} are "
            f"free in {folder}. What was there before is untouched. Free some space or choose another folder, then "
            "run the same command again."
        )


def human_bytes(count: float) -> str:
    """`count` bytes for people: 512 B, 1.5 KiB, 20.0 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def atomic_write_text(path: PathLike, text: str) -> None:
    """Replace the file `path` by `text` (UTF-8); raises DiskFullError, and then the old file still stands."""
    data = text.encode()
    with replacing(Path(path), needed=len(data)) as temporary:
        _write_bytes(temporary, data)


def atomic_write_json(path: PathLike, value: Any, *, indent: int | None = 2) -> None:
    """Replace `path` by `value` as strict JSON (NaN and infinity are refused with ValueError)."""
    atomic_write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def append_jsonl(path: PathLike, row: Mapping[str, Any]) -> None:
    """Add one line to a JSON lines file; on a full disk the torn line is cut off again."""
    path = Path(path)
    line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with storage_errors(path, len(line)), open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "short write", str(path))
        except OSError:
            file.truncate(end)
            raise


@contextlib.contextmanager
def atomic_directory(path: PathLike) -> Iterator[Path]:
    """Give a temporary folder beside `path`; it becomes `path` when the block ends well and is removed otherwise.

    An existing `path` stays readable until the swap, which is two renames. A kill exactly between them leaves the old
    folder as `.NAME.moesaic-old`; `clean_leftovers`, or the next `atomic_directory(path)`, puts it back.
    """
    path = Path(path)
    temporary, backup = _temporary(path), path.with_name(f".{path.name}{OLD}")
    if path.is_file():
        raise MoesaicError(f"{path} is a file, expected a folder or nothing there; delete it or choose another name")
    with storage_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for item in (*temporary.rglob("*"), temporary):
                sync_to_disk(item)
            _recover(backup)
            if path.exists():
                os.rename(path, backup)
            os.rename(temporary, path)
            sync_to_disk(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            _recover(backup)
            raise
    shutil.rmtree(backup, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a folder so that a kill half-way leaves no half-deleted folder under its own name."""
    doomed = _temporary(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean_leftovers(folder: PathLike) -> None:
    """Remove what killed writers left in `folder`; call it only while nobody else writes there."""
    for item in Path(folder).glob(f".*{TEMPORARY}*"):
        shutil.rmtree(item, ignore_errors=True) if item.is_dir() else item.unlink(missing_ok=True)
    for item in Path(folder).glob(f".*{OLD}"):
        _recover(item)


def sha256_file(path: PathLike) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync_to_disk(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk, so that a power cut keeps the order of writes."""
    if os.name != "posix" or path.is_symlink():
        return  # Windows syncs neither folders nor files opened for reading
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def save_tensors(path: PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to a safetensors file, atomically; tensors that share memory must be passed once.

    Raises:
        DiskFullError: says how many bytes were needed.
    """
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
    with replacing(Path(path), needed) as temporary:
        save_file(whole, temporary, dict(metadata) if metadata else None)


def load_tensors(path: PathLike, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises MoesaicError where it is missing, truncated or damaged."""
    from safetensors.torch import load_file

    with _explaining_damage(Path(path)):
        return load_file(path, device=device)


def load_metadata(path: PathLike) -> dict[str, str]:
    """The text metadata of a safetensors file. Raises MoesaicError like `load_tensors`."""
    from safetensors import safe_open

    with _explaining_damage(Path(path)), safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


@contextlib.contextmanager
def replacing(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A temporary file name beside `path` that takes its place when the block ends well."""
    temporary = _temporary(path)
    with storage_errors(path, needed):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync_to_disk(temporary)
            os.replace(temporary, path)
            sync_to_disk(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def storage_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn "no space left" from any depth into one DiskFullError that names `path`."""
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        raise DiskFullError(path, getattr(error, "needed", needed)) from error


def _is_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    # safetensors wraps the system's error in its own type and keeps only the text
    in_text = any(f"(os error {code})" in str(error) for code in FULL_DISK)
    return isinstance(error, DiskFullError) or (type(error).__name__ == "SafetensorError" and in_text)


@contextlib.contextmanager
def _explaining_damage(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    if not path.is_file():
        raise MoesaicError(f"{path} does not exist; expected a safetensors file there")
    try:
        yield
    except (SafetensorError, ValueError) as error:
        raise MoesaicError(
            f"{path} ({human_bytes(path.stat().st_size)}) is not a whole safetensors file: {error}. It was probably "
            "cut off while being copied or downloaded: fetch it again or write it anew."
        ) from error


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}{TEMPORARY}{secrets.token_hex(4)}")


def _recover(backup: Path) -> None:
    """End an interrupted swap: `.NAME.moesaic-old` goes back to NAME if that is missing, and is deleted otherwise."""
    path = backup.with_name(backup.name[1 : -len(OLD)])
    if backup.exists() and not path.exists():
        os.rename(backup, path)
    shutil.rmtree(backup, ignore_errors=True)
