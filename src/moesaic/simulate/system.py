"""What is simulated, as data: a device, policies by name and their options, read from YAML with strict keys.

`read_system("read-me")` is a preset of the package (`systems/*.yaml`), any other text a file. Sizes are
written in bytes, as 8GiB, or as a share of all entries; times in seconds.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from moesaic.errors import MoesaicError
from moesaic.schedule.family import BATCHERS, EVICTIONS, PREDICTORS, near
from moesaic.schedule.topology import PRESETS
from moesaic.simulate.simulator import Limits
from moesaic.simulate.stage_cost import COLLECTIVES, SPLITS

T = TypeVar("T")

GRANULARITIES = ("expert", "layer-expert", "block")
PLACEMENTS = ("contiguous", "round-robin", "affinity", "parallel")


@dataclass(frozen=True)
class CacheOptions:
    """Which entries stay: policy by name, the unit that is stored, and how much of it fits.

    capacity:  bytes, 8GiB, or a share of all entries (1 = all).
    per_layer: equal slots for every layer instead of one pool.
    horizon:   stages ahead for which queued work counts as known; null = all.
    persist:   a decode token that does not exist yet is expected to need what its predecessor did.
    pinned:    share of the capacity for the most popular entries (policy pinned); the popularity is that of the first
               tenth of the trace.
    """

    policy: str = "lru"
    granularity: str = "layer-expert"
    capacity: float | str = 1.0
    per_layer: bool = False
    persist: bool = False
    horizon: int | None = None
    preload: bool = True
    pinned: float = 0.5
    sections: int = 4


@dataclass(frozen=True)
class PredictorOptions:
    """What is fetched ahead: predictor by name, keys a layer it may name, layers it looks ahead."""

    kind: str = "none"
    width: int | None = None
    lookahead: int = 1


@dataclass(frozen=True)
class BatcherOptions:
    """What runs together. max_wait_s bounds waits (adaptive); batch, mix and rounds are options of single batchers."""

    kind: str = "decode-first"
    max_wait_s: float = 1.0
    batch: int = 8
    mix: bool = False
    rounds: int = 10


@dataclass(frozen=True)
class Parallel:
    """How layers are spread over devices or units.

    devices, per_node: how many of the device, instead of the preset's; replicas: copies of hot experts a layer.
    tensor: ranks that slice what is not an expert; collective: all-to-all variant, `coherent` is ExFlow's.
    overlap: chunks in which all-to-all and experts are pipelined, 0 = the best number.
    capacity: Tutel's capacity factor f (0 = no drops); adaptive_r: choose its degree r at every step.
    efficiency: share of the unit's peak bandwidth that is reached.
    """

    devices: int | None = None
    per_node: int | None = None
    placement: str = "contiguous"
    replicas: int = 0
    collective: str | None = None
    tensor: int = 1
    overlap: int = 1
    capacity: float = 0.0
    adaptive_r: bool = False
    split: str | None = None
    efficiency: float = 1.0


@dataclass(frozen=True)
class System:
    """One serving system. Raises MoesaicError for a name that does not exist, with the nearest that does."""

    name: str = "custom"
    paper: str = ""
    device: str = "h100-pcie"
    cache: CacheOptions = field(default_factory=CacheOptions)
    predictor: PredictorOptions = field(default_factory=PredictorOptions)
    batcher: BatcherOptions = field(default_factory=BatcherOptions)
    limits: Limits = field(default_factory=Limits)
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        for name, known, what in (
            (self.device, PRESETS, "device"),
            (self.cache.policy, EVICTIONS, "cache policy"),
            (self.cache.granularity, GRANULARITIES, "granularity"),
            (self.predictor.kind, PREDICTORS, "predictor"),
            (self.batcher.kind, BATCHERS, "batcher"),
            (self.parallel.placement, PLACEMENTS, "placement"),
            (self.parallel.collective or COLLECTIVES[0], COLLECTIVES, "collective"),
            (self.parallel.split or SPLITS[0], SPLITS, "split"),
        ):
            if name not in known:
                raise near(name, known, what)


def system_names() -> list[str]:
    """The presets of the package."""
    return sorted(item.name.removesuffix(".yaml") for item in _presets().iterdir() if item.name.endswith(".yaml"))


def read_system(source: str, changes: Mapping[str, Any] | None = None) -> System:
    """A preset by name or a YAML file, with `changes` by dotted key: {"cache.capacity": "8GiB"}.

    Raises MoesaicError for an unknown preset, YAML that cannot be read, and keys unknown or ill-typed.
    """
    values = _read(source)
    for key, value in (changes or {}).items():
        *tables, last = key.split(".")
        inner = values
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise MoesaicError(f"{key}: {table} is no table of options")
        inner[last] = value
    try:
        return build(System, values)
    except MoesaicError as error:
        raise MoesaicError(f"system {source}: {error}") from None


def _presets() -> Any:
    return resources.files("moesaic.simulate") / "systems"


def _read(source: str) -> dict[str, Any]:
    if source in system_names():
        text = (_presets() / f"{source}.yaml").read_text(encoding="utf-8")
    elif Path(source).is_file():
        text = Path(source).read_text(encoding="utf-8")
    elif Path(source).suffix in (".yaml", ".yml"):
        raise MoesaicError(f"{source} does not exist; expected a YAML file that describes a system")
    else:
        raise near(source, system_names(), "system")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MoesaicError(f"{source} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise MoesaicError(f"{source} holds no table; expected keys such as device, cache and batcher")
    return values


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A dataclass from a table; nested tables are nested dataclasses. Raises MoesaicError that names the key."""
    if not isinstance(values, Mapping):
        raise MoesaicError(f"{where.rstrip('.') or 'the file'} is {values!r}; expected a table of options")
    hints = get_type_hints(kind)
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    out = {}
    for key, value in values.items():
        if key not in known:
            raise near(f"{where}{key}", [f"{where}{name}" for name in known], "key")
        hint = hints[key]
        if is_dataclass(hint):
            out[key] = build(hint, value, f"{where}{key}.")  # type: ignore[arg-type]
        elif not _fits(value, hint):
            raise MoesaicError(f"{where}{key} is {value!r}; expected {getattr(hint, '__name__', hint)}")
        else:
            out[key] = value
    return kind(**out)


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_fits(value, part) for part in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


SIZES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def size(value: float | str, whole: int | None = None) -> int:
    """Bytes of `8GiB`, `8e9`, or a share in (0, 1] of `whole`, rounded up.

    Raises MoesaicError for anything else.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]i?|)b?\s*(/s)?", str(value).lower())
    try:
        number = float(match[1]) * SIZES[match[2]] if match else -1.0
    except ValueError:
        number = -1.0
    if whole is not None and 0 < number <= 1:
        return -int(-number * whole // 1)
    if number == math.inf:
        raise MoesaicError(f"size {value!r} is infinite: expected bytes such as 8GiB")
    if number < 1:
        share = ", or a share above 0 and up to 1" if whole is not None else ""
        raise MoesaicError(f"size {value!r}: expected bytes such as 8GiB, 500MB or 8e9{share}")
    return int(number)
