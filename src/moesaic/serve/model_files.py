"""Where the tensors of a checkpoint lie on the disk, and which bytes each expert is made of; without torch.

Only the headers of safetensors files are read: 8 bytes with the header's length, little-endian, then JSON, then the
data without gaps. Layer numbers count the layers that have experts, from 0.
Shapes: E experts, W stored channels, D model width.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.errors import MoesaicError
from moesaic.files import human_bytes
from moesaic.schedule.work import Key, Layout

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
HEADER_LIMIT = 100_000_000  # bytes; safetensors itself refuses longer headers

BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32}
BITS |= {"U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6}
SERVED = ("F32", "F16", "BF16")  # what experts may be stored in

CUT_OFF = "it was probably cut off while being copied or downloaded: fetch it again or write it anew"


class TensorPlace(NamedTuple):
    """Bytes `start` to `stop` (exclusive) of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class Part(NamedTuple):
    """Bytes `start` to `stop` (exclusive) of `file`, whole rows of `tensor`."""

    file: Path
    start: int
    stop: int
    tensor: str


Parts = dict[Key, tuple[Part, ...]]


class ModelFiles:
    """The weights of a model folder, one file or shards with an index.

    tensors:     where each one lies.
    fingerprint: name, bytes and time of change of each file that the folder's model is read from.

    Raises MoesaicError, naming the file, if one is missing, truncated or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        weight_map = _weight_map(self.folder)
        self._names = sorted({CONFIG, *weight_map.values()} | ({INDEX} if weight_map else {WEIGHTS}))
        self.fingerprint = self._look()  # before anything is read: what changes meanwhile shows later
        if not weight_map:
            self.tensors = read_header(self.folder / WEIGHTS)
            return
        shards = {name: read_header(self.folder / name) for name in sorted(set(weight_map.values()))}
        for tensor, name in weight_map.items():
            if tensor not in shards[name]:
                raise MoesaicError(
                    f"{self.folder / name} lacks {tensor!r}, which {INDEX} says is there: files of two checkpoints are "
                    "mixed; copy the folder again"
                )
        self.tensors = {tensor: shards[name][tensor] for tensor, name in weight_map.items()}

    def check(self) -> None:
        """Raise MoesaicError if a file was changed, replaced or removed since this object was made."""
        for then, now in zip(self.fingerprint, self._look(), strict=True):
            if then != now:
                raise MoesaicError(
                    f"{self.folder / now[0]} was changed while the model was in use; restart on the new checkpoint"
                )

    def _look(self) -> tuple[tuple[str, int, int], ...]:
        found = []
        for name in self._names:
            try:
                status = (self.folder / name).stat()
            except (OSError, ValueError) as error:
                raise _unreadable(self.folder / name, error) from None
            found.append((name, status.st_size, status.st_mtime_ns))
        return tuple(found)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises MoesaicError, naming the file, if there is none."""
    try:
        return _json_object(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise error if isinstance(error, MoesaicError) else _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> MoesaicError:
    if isinstance(error, FileNotFoundError):
        return MoesaicError(f"{path} does not exist; expected a model folder with {CONFIG} and {WEIGHTS} or its shards")
    reason = getattr(error, "strerror", None) or error
    return MoesaicError(f"{path} cannot be read: {reason}; expected a file that this user may read")


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or a number of absurd length
        raise MoesaicError(f"{what} is no JSON ({error}): it is damaged; fetch it again or write it anew") from None
    if not isinstance(value, dict):
        raise MoesaicError(f"{what} is a JSON {type(value).__name__}, expected an object; fetch it again")
    return value


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> shard; empty where all weights are in one file. One file wins, as it does in transformers."""
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists() and folder.is_dir():
            raise MoesaicError(f"{folder} has neither {WEIGHTS} nor {INDEX}: expected a model saved as safetensors")
        return {}
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MoesaicError(f"{folder / INDEX} has no weight_map of tensors to files; fetch it again")
    for name in weight_map.values():
        # Only files of this folder: an index from elsewhere must not make us read others.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise MoesaicError(f"{folder / INDEX} names the file {name!r}: expected a .safetensors file of its folder")
    return weight_map


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Where the tensors of a safetensors file lie. Raises MoesaicError if it is missing, truncated or damaged."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise MoesaicError(
                    f"{path} has {human_bytes(size)}, less than its header: {CUT_OFF} (or it is no safetensors file)"
                )
            if not 2 <= length <= HEADER_LIMIT:
                raise MoesaicError(
                    f"{path} begins with a header of {human_bytes(length)}: expected 2 B to "
                    f"{human_bytes(HEADER_LIMIT)}, so it is damaged or no safetensors file; fetch it again"
                )
            raw = file.read(length)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, MoesaicError) else _unreadable(path, error) from None
    header = _json_object(raw, f"the header of {path}")
    header.pop("__metadata__", None)
    places = {name: _place(path, name, entry, 8 + length) for name, entry in header.items()}
    _without_gaps(path, places, 8 + length, size)
    return places


def _place(path: Path, name: str, entry: Any, data: int) -> TensorPlace:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise MoesaicError(
            f"the header of {path} describes {name!r} by something else than dtype, shape and data_offsets: it is "
            "damaged; fetch it again"
        )
    if dtype not in BITS:
        raise MoesaicError(f"{name!r} in {path} has the unknown dtype {dtype!r}: expected one of {', '.join(BITS)}")
    # Sizes of absurd shapes can have more digits than Python prints, so they are not named.
    if math.prod(shape) * BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise MoesaicError(
            f"the header of {path} gives {name!r} another number of bytes than its shape and dtype {dtype} have: it is "
            "damaged; fetch it again"
        )
    return TensorPlace(path, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _without_gaps(path: Path, places: Mapping[str, TensorPlace], start: int, size: int) -> None:
    """Raise MoesaicError unless the tensors fill the file from `start` to its end, each byte belonging to one."""
    end, before = start, "the header"
    for name, place in sorted(places.items(), key=lambda item: item[1][3:]):
        if place.start != end:
            wrong = "overlap" if place.start < end else "leave a gap"
            raise MoesaicError(f"{before} and {name!r} {wrong} in {path}: it is damaged; fetch it again")
        end, before = place.stop, repr(name)
    if end > size:
        raise MoesaicError(f"{path} is too short for the tensors that its header lists: {CUT_OFF}")
    if end < size:
        raise MoesaicError(
            f"{path} has {human_bytes(size - end)} more than its header says: it is damaged; fetch it again"
        )


def expert_entries(config: Mapping[str, Any], files: ModelFiles, itemsize: int) -> tuple[Layout, Parts]:
    """What is cached: the channel blocks of a moesaic checkpoint, or the experts of each layer of a stock mixture.

    itemsize: bytes of a number in memory; the layout counts in these, the parts in bytes of the files.

    Raises MoesaicError if the model has no experts, or the checkpoint does not hold what the config says.
    """
    if config.get("layouts"):
        return _block_entries(config, files, itemsize)
    return _stock_entries(files, itemsize)


def block_names(config: Mapping[str, Any]) -> list[str]:
    """Of each layer of a moesaic checkpoint, the beginning of the names of its blocks' tensors."""
    sites = config["sites"]
    # An inline FFN has no module of its own: the blocks stand where its first linear was.
    return [f"backbone.{s['path']}{'.' + s['up'] if s.get('inline') else ''}.blocks" for s in sites]


def _block_entries(config: Mapping[str, Any], files: ModelFiles, itemsize: int) -> tuple[Layout, Parts]:
    blocks_LE: list[list[list[int]]] = []
    bytes_LC: list[list[int]] = []
    parts: Parts = {}
    try:
        layers = [(name, *layout) for name, layout in zip(block_names(config), config["layouts"], strict=True)]
        for layer, (name, experts, _, blocks) in enumerate(layers):
            wanted = ["up", "down", *(["gate"] if config["sites"][layer].get("gate") else [])]
            tensors = _row_tensors(files, name, wanted, rows=sum(width for width, _ in blocks))
            blocks_LE.append([[c for c, (_, owners) in enumerate(blocks) if e in owners] for e in range(experts)])
            bytes_LC.append([])
            row = 0
            for c, (width, _) in enumerate(blocks):
                parts[Key(layer, c)] = tuple(_rows(files, tensor, row, row + width) for tensor in tensors)
                bytes_LC[-1].append(_bytes(files, parts[Key(layer, c)], itemsize))
                row += width
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, MoesaicError):
            raise
        raise MoesaicError(
            f"sites and layouts in {files.folder / CONFIG} are not those of a moesaic checkpoint ({error!r}); "
            "copy it again"
        ) from None
    return Layout.blocks(blocks_LE, bytes_LC), parts


def _row_tensors(files: ModelFiles, name: str, wanted: Sequence[str], rows: int) -> list[str]:
    """The tensors of a layer's blocks that have a row for each of the `rows` channels."""
    tensors = [f"{name}.{part}" for part in (*wanted, "gate_bias", "up_bias")]
    for tensor in tensors[: len(wanted)]:
        if tensor not in files.tensors:
            raise MoesaicError(f"the checkpoint {files.folder} lacks {tensor}; copy it again")
    tensors = [tensor for tensor in tensors if tensor in files.tensors]
    for tensor in tensors:
        if (shape := files.tensors[tensor].shape)[:1] != (rows,):
            raise MoesaicError(
                f"{tensor} in {files.folder} has the shape {shape}, but the layout in {CONFIG} has {rows} channels: "
                "files of two checkpoints are mixed; copy the folder again"
            )
    return tensors


def _rows(files: ModelFiles, tensor: str, first: int, last: int) -> Part:
    """Rows `first` to `last` (exclusive)."""
    place = files.tensors[tensor]
    if place.dtype not in SERVED:
        raise MoesaicError(
            f"{tensor} in {files.folder} is stored as {place.dtype}: experts are served from {', '.join(SERVED)}; "
            "convert the checkpoint"
        )
    row = (place.stop - place.start) // place.shape[0]
    return Part(place.file, place.start + first * row, place.start + last * row, tensor)


def _bytes(files: ModelFiles, parts: Sequence[Part], itemsize: int) -> int:
    return sum((part.stop - part.start) * 8 // BITS[files.tensors[part.tensor].dtype] * itemsize for part in parts)


ALONE = re.compile(r"(.*\.)?experts\.(\d+)\..+")  # a tensor for each expert
STACKED = re.compile(r"(.*\.)?experts\.[A-Za-z_]\w*(\.weight|\.bias)?")  # one for all; the first axis is the expert


def _stock_entries(files: ModelFiles, itemsize: int) -> tuple[Layout, Parts]:
    layers: dict[str, dict[int, list[Part]]] = {}
    for tensor, place in files.tensors.items():
        if match := ALONE.fullmatch(tensor):
            rows = {int(match[2]): (0, place.shape[0] if place.shape else 0)}
        elif match := STACKED.fullmatch(tensor):
            rows = {e: (e, e + 1) for e in range(place.shape[0] if len(place.shape) > 1 else 0)}
        else:
            continue
        for expert, (first, last) in rows.items():
            if last:
                experts = layers.setdefault(match[1] or "", {})
                experts.setdefault(expert, []).append(_rows(files, tensor, first, last))
    if not layers:
        raise MoesaicError(f"{files.folder} holds no experts: expected a moesaic checkpoint or a mixture of experts")
    parts: Parts = {}
    bytes_LE: list[list[int]] = []
    for layer, name in enumerate(sorted(layers, key=_natural)):
        experts = layers[name]
        if sorted(experts) != list(range(len(experts))):
            missing = min(set(range(len(experts))) - set(experts))
            raise MoesaicError(f"the checkpoint {files.folder} lacks {name}experts.{missing}; copy it again")
        parts |= {Key(layer, e): tuple(experts[e]) for e in range(len(experts))}
        bytes_LE.append([_bytes(files, experts[e], itemsize) for e in range(len(experts))])
    return Layout.layer_experts(bytes_LE), parts


def _natural(name: str) -> list[Any]:
    """Sorts layer 10 after layer 9."""
    return [int(piece) if place % 2 else piece for place, piece in enumerate(re.split(r"(\d+)", name))]
