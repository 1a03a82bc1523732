"""The exact state of a training stage on disk: kill it at any moment, and the resumed run repeats it bit for bit.

    WORKDIR/state-<step>/parameters.safetensors   trainable parameters and persistent buffers
                         optimizer.safetensors    moments of every optimizer (absent once the stage is finished)
                         state.json               step, tokens, settings, random states, SHA-256 of the two files

No pickle anywhere. The two newest states are kept, so that a damaged newest one costs steps and not the run; a finished
stage keeps one, without the moments that nobody will need again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moesaic.errors import MoesaicError
from moesaic.files import (
    atomic_directory,
    atomic_write_json,
    atomic_write_text,
    load_tensors,
    remove_directory,
    save_tensors,
    sha256_file,
)

KEPT = 2
Rng = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a stage has come: optimizer steps done, tokens seen, and whether it is over."""

    step: int = 0
    tokens: int = 0
    finished: bool = False


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Hex SHA-256 of everything that decides a stage's numbers."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with `requires_grad`, by name, in the model's order; tied ones appear once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_directories(workdir: Path) -> list[Path]:
    """The states in `workdir`, newest first."""
    found = [path for path in workdir.glob("state-*") if re.fullmatch(r"state-\d+", path.name)]
    return sorted(found, key=_step_of, reverse=True)


def save_state(
    workdir: Path,
    position: Position,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    settings: Mapping[str, Any],
    rngs: Sequence[Rng],
) -> Path:
    """Write `WORKDIR/state-<step>` atomically and drop the states it replaces; `rngs` has one entry per process."""
    moments, numbers = _flatten(optimizers)
    with atomic_directory(workdir / f"state-{position.step}") as folder:
        save_tensors(folder / "parameters.safetensors", _changing_tensors(model))
        if not position.finished:
            save_tensors(folder / "optimizer.safetensors", moments)
        record = asdict(position) | {
            "settings": settings,
            "fingerprint": fingerprint(settings),
            "numbers": numbers,
            "rngs": list(rngs),
            "sha256": {file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))},
        }
        atomic_write_json(folder / "state.json", record, indent=None)
    prune_states(workdir, position)
    return workdir / f"state-{position.step}"


def prune_states(workdir: Path, position: Position) -> None:
    """Keep the state at `position` and, unless the stage is finished, the one before it."""
    # A state ahead of `position` is a damaged one that the run fell back from.
    usable = [path for path in state_directories(workdir) if _step_of(path) <= position.step]
    kept = usable[: 1 if position.finished else KEPT]
    for path in state_directories(workdir):
        if path not in kept:
            remove_directory(path)


def load_newest(
    workdir: Path, model: nn.Module, optimizers: Sequence[Optimizer], settings: Mapping[str, Any], process: int = 0
) -> Position | None:
    """Put the newest whole state into the model, the optimizers and the random generators; None where there is none.

    Raises:
        MoesaicError: the state belongs to other settings (they are named), or every state is damaged.
    """
    folders = state_directories(workdir)
    for folder in folders:
        try:
            record, parameters, moments = _read(folder)
        except (MoesaicError, OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{folder} is damaged ({error}); trying the state before it", stacklevel=2)
            continue
        _refuse_changes(record["settings"], settings, workdir)
        with torch.no_grad():
            for name, tensor in _changing_tensors(model).items():
                tensor.copy_(parameters[name])
        if not record["finished"]:
            _unflatten(optimizers, moments, record["numbers"])
        restore_rng(record["rngs"][process])
        return Position(step=record["step"], tokens=record["tokens"], finished=record["finished"])
    if folders:
        raise MoesaicError(f"no state in {workdir} can be read; start the stage again with restart (--restart)")
    return None


def truncate_log(path: Path, step: int) -> dict[str, Any]:
    """Keep the rows of a JSON lines log up to `step`, so that a resumed run repeats none; returns the last one kept."""
    rows: list[dict[str, Any]] = []
    lines = path.read_text().split("\n") if path.exists() else []
    with contextlib.suppress(ValueError, KeyError, TypeError):  # a kill may have torn the last line
        while len(rows) < len(lines) and (row := json.loads(lines[len(rows)]))["step"] <= step:
            rows.append(row)
    atomic_write_text(path, "".join(line + "\n" for line in lines[: len(rows)]))
    return rows[-1] if rows else {}


def seed_rng(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_rng(device: torch.device) -> Rng:
    """The states of python's, numpy's, torch's and the device's generators, as JSON."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    rng: Rng = {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device.type != "cpu":
        rng["device"] = [device.type, torch.get_device_module(device).get_rng_state().numpy().tobytes().hex()]
    return rng


def restore_rng(rng: Rng) -> None:
    """Undo `capture_rng`."""
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = rng["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes_tensor(rng["torch"]))
    if "device" in rng:
        kind, state = rng["device"]
        torch.get_device_module(kind).set_rng_state(_bytes_tensor(state))


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("state-"))


def _changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a step may change: trainable parameters, and the buffers that a checkpoint would hold too."""
    saved = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**trainable_parameters(model), **buffers}


def _flatten(optimizers: Sequence[Optimizer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer states as {"<optimizer>.<parameter>.<name>": value}: tensors apart from plain numbers.

    Hyper-parameters are left out: they come from the stage, and its fingerprint must agree anyway.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for number, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"{number}.{index}.{name}"] = value
    return tensors, numbers


def _unflatten(optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for key, value in {**tensors, **numbers}.items():
        number, index, name = key.split(".", 2)
        states[int(number)].setdefault(int(index), {})[name] = value
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A state's record, parameters and moments, after checking every byte of them."""
    record = json.loads((folder / "state.json").read_text())
    contents: dict[str, dict[str, Tensor]] = {"optimizer.safetensors": {}}
    for name, digest in record["sha256"].items():
        # cloned, because a file's mapped memory is aligned otherwise and disappears with the file
        contents[name] = {key: tensor.clone() for key, tensor in load_tensors(folder / name).items()}
        if sha256_file(folder / name) != digest:
            raise MoesaicError(f"{name} differs from its checksum")
    for key in ("step", "tokens", "finished", "settings", "numbers", "rngs"):
        record[key]
    return record, contents["parameters.safetensors"], contents["optimizer.safetensors"]


def _refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Path) -> None:
    changed = [
        f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise MoesaicError(
            f"{workdir} holds a run with other settings: {'; '.join(changed)}. Continue it with its own settings, "
            "give a new work directory, or start over with restart (--restart)."
        )
