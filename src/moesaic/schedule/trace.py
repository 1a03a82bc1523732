"""A trace: which requests came when, and which experts each of their tokens was routed to; one file, whole or absent.

Prompt token t of request r was routed by routes[prompt_row[r] + t % prompt_rows[r]]; the t-th processed output token,
t = 0 .. output_tokens - 2 because the last sampled token is never run, by routes[decode_row[r] + t % decode_rows[r]].
Requests may share rows, and where rows are fewer than tokens the routes repeat ("stretched").
Shapes: R requests, N rows, L' route layers (1 = the choice holds in every layer), K slots, E experts. Units: seconds,
tokens, bytes. The file is safetensors, docs/traces.md describes it.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moesaic.errors import MoesaicError
from moesaic.files import human_bytes, replacing
from moesaic.schedule.card import Card, choices
from moesaic.schedule.work import Layout

__all__ = ["EMPTY", "FORMAT", "VERSION", "Card", "Granularity", "Trace"]

EMPTY = -1
"""A slot of a row that holds no expert."""

FORMAT = "moesaic-trace"
VERSION = 1

Granularity = Literal["expert", "layer-expert", "block"]
Array = NDArray[Any]

REQUEST_COLUMNS = {
    "arrival_s": np.float64,
    "prompt_tokens": np.int64,
    "output_tokens": np.int64,
    "prompt_row": np.int64,
    "prompt_rows": np.int64,
    "decode_row": np.int64,
    "decode_rows": np.int64,
}
ROW_COLUMNS = {"routes": np.int16, "token_ids": np.int32, "weights": np.float16, "predicted": np.int16}
DTYPES: dict[str, Any] = {**REQUEST_COLUMNS, **ROW_COLUMNS}
OPTIONAL = ("token_ids", "weights", "predicted")


@dataclass(frozen=True, eq=False)
class Trace:
    """See the module. Columns are cast to the file's types and then checked.

    arrival_s, prompt_tokens, output_tokens: (R,), sorted by arrival.
    routes:     (N, L', K), EMPTY in unused slots; at least one slot of a row and layer is used.
    prompt_row, prompt_rows, decode_row, decode_rows: (R,), where the routes of a request lie.
    token_ids:  (N,), the token a row routed.
    weights:    (N, L', K), of the gate.
    predicted:  (N, L', W), a learned predictor's answer, most probable first.
    meta:       where it comes from: source, seed, command; JSON.

    Raises MoesaicError like `validate`.
    """

    arrival_s: Array
    prompt_tokens: Array
    output_tokens: Array
    routes: Array
    prompt_row: Array
    prompt_rows: Array
    decode_row: Array
    decode_rows: Array
    card: Card
    token_ids: Array | None = None
    weights: Array | None = None
    predicted: Array | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in DTYPES.items():
            value = getattr(self, name)
            if value is not None or name not in OPTIONAL:
                object.__setattr__(self, name, _cast(name, value, np.dtype(dtype)))
        self.validate()

    # -- what it holds -------------------------------------------------------------------------------------------------
    @property
    def requests(self) -> int:
        """R."""
        return len(self.arrival_s)

    @property
    def route_layers(self) -> int:
        """L'."""
        return int(self.routes.shape[1])

    @property
    def decode_tokens(self) -> Array:
        """Processed output tokens of each request, (R,)."""
        return np.maximum(self.output_tokens - 1, 0)

    def prompt_routes(self, request: int, start: int, stop: int) -> Array:
        """Routes of prompt tokens `start` to `stop` (exclusive), (stop - start, L', K)."""
        rows = self.prompt_row[request] + np.arange(start, stop) % self.prompt_rows[request]
        return np.asarray(self.routes[rows])

    def decode_routes(self, request: int, t: int) -> Array:
        """Routes of the t-th processed output token, (L', K)."""
        return np.asarray(self.routes[self.decode_row[request] + t % self.decode_rows[request]])

    # -- checks --------------------------------------------------------------------------------------------------------
    def validate(self) -> None:
        """Raise MoesaicError, naming the request, row or column, unless every column is whole and consistent."""
        self._check_shapes()
        self._check_requests()
        for kind, tokens in (("prompt", self.prompt_tokens), ("decode", self.decode_tokens)):
            self._check_ranges(kind, tokens)
        self._check_routes()
        for name in ("weights", "predicted"):
            column = getattr(self, name)
            if name == "predicted" and column is not None:
                _known_experts(column, self.card.experts, name)
            elif column is not None and not np.isfinite(column).all():
                raise MoesaicError(f"weights: row {_first(~np.isfinite(column))} has a weight that is not finite")

    def _check_shapes(self) -> None:
        if self.routes.ndim != 3 or 0 in self.routes.shape[1:]:
            raise MoesaicError(f"routes has the shape {self.routes.shape}, expected (rows, route layers, slots)")
        if self.route_layers not in (1, self.card.layers):
            raise MoesaicError(
                f"routes has {self.route_layers} layers, expected 1 (the choice holds in every layer) or the model's "
                f"{self.card.layers}"
            )
        rows, layers, slots = self.routes.shape
        wanted: dict[str, tuple[int | None, ...]] = {name: (self.arrival_s.size,) for name in REQUEST_COLUMNS}
        wanted |= {"token_ids": (rows,), "weights": (rows, layers, slots), "predicted": (rows, layers, None)}
        for name, shape in wanted.items():
            column = getattr(self, name)
            if column is not None and not _fits(column.shape, shape):
                text = ", ".join("any" if size is None else str(size) for size in shape)
                raise MoesaicError(f"{name} has the shape {column.shape}, expected ({text})")
        if not self.requests:
            raise MoesaicError("the trace has no requests, expected at least one")

    def _check_requests(self) -> None:
        arrival = self.arrival_s
        if (bad := ~(np.isfinite(arrival) & (arrival >= 0))).any():
            r = _first(bad)
            raise MoesaicError(f"request {r} arrives at {arrival[r]} s, expected a finite time of 0 or later")
        if (bad := np.diff(arrival) < 0).any():
            r = _first(bad) + 1
            raise MoesaicError(
                f"request {r} arrives at {arrival[r]} s, before request {r - 1} at {arrival[r - 1]} s: sort the "
                "requests by arrival"
            )
        for name, least in (("prompt_tokens", 1), ("output_tokens", 0)):
            if (bad := getattr(self, name) < least).any():
                r = _first(bad)
                raise MoesaicError(f"request {r} has {name} {getattr(self, name)[r]}, expected at least {least}")

    def _check_ranges(self, kind: str, tokens: Array) -> None:
        start, count = getattr(self, f"{kind}_row"), getattr(self, f"{kind}_rows")
        if (bad := (tokens > 0) & (count < 1)).any():
            r = _first(bad)
            raise MoesaicError(f"request {r} runs {tokens[r]} {kind} tokens, but has no {kind} rows: a hole")
        bad = (count < 0) | ((count > 0) & ((start < 0) | (count > len(self.routes) - start)))
        if bad.any():
            r = _first(bad)
            stop = int(start[r]) + int(count[r])
            raise MoesaicError(
                f"request {r} has {kind} rows {start[r]} to {stop - 1}, but the trace has rows 0 to "
                f"{len(self.routes) - 1}: a hole"
            )

    def _check_routes(self) -> None:
        _known_experts(self.routes, self.card.experts, "routes")
        if (bad := (self.routes == EMPTY).all(-1)).any():
            row, layer = np.argwhere(bad)[0]
            raise MoesaicError(f"row {row} has no expert in layer {layer}: a hole; expected at least one used slot")
        ordered = np.sort(self.routes, axis=-1)
        if (bad := (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != EMPTY)).any():
            row, layer, slot = np.argwhere(bad)[0]
            raise MoesaicError(f"row {row} has expert {ordered[row, layer, slot]} twice in layer {layer}")

    # -- other traces of it --------------------------------------------------------------------------------------------
    def head(self, count: int) -> "Trace":
        """The first `count` requests, with only the rows they use."""
        if count < 1:
            raise MoesaicError(f"the first {count} requests: expected at least 1")
        columns = {name: getattr(self, name)[:count] for name in REQUEST_COLUMNS}
        used = np.zeros(len(self.routes) + 1, dtype=np.int64)
        for kind in ("prompt", "decode"):
            kept = columns[f"{kind}_rows"] > 0
            np.add.at(used, columns[f"{kind}_row"][kept], 1)
            np.add.at(used, (columns[f"{kind}_row"] + columns[f"{kind}_rows"])[kept], -1)
        keep = used.cumsum()[:-1] > 0
        place = np.append(keep.cumsum() - keep, 0)  # of each old row among the kept ones
        for kind in ("prompt", "decode"):
            columns[f"{kind}_row"] = np.where(columns[f"{kind}_rows"] > 0, place[columns[f"{kind}_row"]], 0)
        rows = {name: getattr(self, name) for name in ROW_COLUMNS}
        changed: dict[str, Any] = {name: row if row is None else row[keep] for name, row in rows.items()}
        return replace(self, **columns, **changed)

    def scaled(self, factor: float) -> "Trace":
        """The same requests `factor` times as fast: arrivals divided by it."""
        if not (math.isfinite(factor) and factor > 0):
            raise MoesaicError(f"load times {factor}: expected a finite factor above 0")
        return replace(self, arrival_s=self.arrival_s / factor)

    def layout(self, granularity: Granularity) -> Layout:
        """The stored entries of the model: whole experts with all their layers, (layer, expert) or (layer, block).

        Raises MoesaicError where the model has no such entries.
        """
        if granularity not in get_args(Granularity):
            raise MoesaicError(
                f"granularity {granularity!r}, expected {choices(str(granularity), get_args(Granularity))}"
            )
        if granularity == "layer-expert":
            return Layout.layer_experts(self.card.expert_bytes())
        if granularity == "expert":
            if self.route_layers != 1:
                raise MoesaicError(
                    f"the routes of {self.card.model} differ between its {self.route_layers} layers, so an expert is "
                    'not needed in all of them at once: use "layer-expert"'
                )
            return Layout.experts([sum(layers) for layers in zip(*self.card.expert_bytes(), strict=True)])
        if self.card.blocks is None:
            raise MoesaicError(f'{self.card.model} has no channel blocks: use "expert" or "layer-expert"')
        experts = range(self.card.experts)
        owned = [[[c for c, (_, owners) in enumerate(row) if e in owners] for e in experts] for row in self.card.blocks]
        return Layout.blocks(owned, [[self.card.bytes_of(width) for width, _ in row] for row in self.card.blocks])

    # -- statistics ----------------------------------------------------------------------------------------------------
    def row_tokens(self) -> Array:
        """How many tokens of all requests each row routes, (N,)."""
        counts = np.zeros(len(self.routes) + 1, dtype=np.int64)
        for kind, tokens in (("prompt", self.prompt_tokens), ("decode", self.decode_tokens)):
            start, rows = getattr(self, f"{kind}_row"), getattr(self, f"{kind}_rows")
            runs = tokens > 0
            rounds, rest = np.divmod(tokens[runs], rows[runs])
            for end, times in ((start[runs] + rows[runs], rounds), (start[runs] + rest, 1)):
                np.add.at(counts, start[runs], times)
                np.add.at(counts, end, -times)
        return counts.cumsum()[:-1]

    def expert_load(self) -> Array:
        """Share of all (token, layer, slot) choices that fall on each expert, (E,)."""
        counts = np.zeros(self.card.experts)
        weight = np.broadcast_to(self.row_tokens()[:, None, None], self.routes.shape)
        used = self.routes != EMPTY
        np.add.at(counts, self.routes[used], weight[used])
        return counts / counts.sum()

    def stretched(self) -> float:
        """Share of the tokens whose routes are a repetition."""
        kinds = (self.prompt_tokens, self.prompt_rows), (self.decode_tokens, self.decode_rows)
        repeated = sum(int(np.maximum(tokens - rows, 0).sum()) for tokens, rows in kinds)
        return repeated / int((self.prompt_tokens + self.decode_tokens).sum())

    def stay(self) -> float | None:
        """Share of (decode token, layer) pairs whose experts are the set of the token before; None without a pair.

        Every recorded sequence counts once, however many requests share it.
        """
        joined = np.zeros(len(self.routes), dtype=bool)
        for start, rows in np.unique(np.stack([self.decode_row, self.decode_rows], 1), axis=0):
            joined[start + 1 : start + rows] = True
        after = np.flatnonzero(joined)
        if not len(after):
            return None
        sets = np.sort(self.routes, axis=-1)
        return float((sets[after] == sets[after - 1]).all(-1).mean())

    def unique_experts(self, batch: int, seed: int = 0, draws: int = 256) -> float | None:
        """Mean number of different experts in a layer for `batch` decode tokens of random requests; None without any.

        A request is drawn first, so that long ones do not fill the batch; then one of its decode rows.
        """
        running = np.flatnonzero((self.decode_tokens > 0) & (self.decode_rows > 0))
        if not len(running):
            return None
        rng = np.random.default_rng(seed)
        picked = running[rng.integers(0, len(running), (draws, batch))]
        rows = self.decode_row[picked] + (rng.random(picked.shape) * self.decode_rows[picked]).astype(np.int64)
        seen = np.zeros((draws, self.route_layers, self.card.experts + 1), dtype=bool)
        routes = self.routes[rows]  # (draws, batch, L', K); EMPTY marks the last column, which is left out
        draw, layer = np.arange(draws)[:, None, None, None], np.arange(self.route_layers)[None, None, :, None]
        seen[draw, layer, routes] = True
        return float(seen[..., :-1].sum(-1).mean())

    def info(self) -> dict[str, Any]:
        """What one wants to know of a trace, as JSON. Entropy is in bits; `stay` and the rest as their methods say."""
        span = float(self.arrival_s[-1] - self.arrival_s[0])
        load = self.expert_load()
        return {
            "requests": self.requests,
            "prompt_tokens": int(self.prompt_tokens.sum()),
            "output_tokens": int(self.output_tokens.sum()),
            "hours": span / 3600,
            "requests_per_s": (self.requests - 1) / span if span else None,
            "rows": len(self.routes),
            "stretched": self.stretched(),
            "layers": self.card.layers,
            "route_layers": self.route_layers,
            "experts": self.card.experts,
            "known_at": self.card.known_at,
            "load": load.tolist(),
            "entropy": float(-(load[load > 0] * np.log2(load[load > 0])).sum()) + 0.0,
            "stay": self.stay(),
            "unique_experts": {str(batch): self.unique_experts(batch) for batch in (8, 32)},
            "card": asdict(self.card),
            "meta": self.meta,
        }

    # -- the file ------------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all; the same trace gives the same bytes.

        Raises DiskFullError, and MoesaicError if `meta` is not JSON.
        """
        path = Path(path)
        try:
            # One entry: safetensors writes several in any order.
            about = {"format": f"{FORMAT}/{VERSION}", "card": asdict(self.card), "meta": self.meta}
            text = json.dumps(about, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise MoesaicError(f"the trace's meta cannot be written as JSON: {error}") from error
        columns = {name: getattr(self, name) for name in DTYPES if getattr(self, name) is not None}
        with replacing(path, sum(column.nbytes for column in columns.values())) as temporary:
            save_file({name: np.ascontiguousarray(c) for name, c in columns.items()}, temporary, {FORMAT: text})

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a file. Raises MoesaicError if it is missing, damaged, no trace, of a newer format, or inconsistent."""
        path = Path(path)
        if not path.is_file():
            raise MoesaicError(f"no trace at {path}; make one with `moesaic trace record`, `replay` or `synth`")
        with _naming(path):
            try:
                with safe_open(path, framework="np") as file:
                    about = _about(file.metadata() or {})
                    columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            except SafetensorError as error:
                raise MoesaicError(
                    f"not a whole trace file ({human_bytes(path.stat().st_size)}): {error}. It was probably cut off "
                    "while being copied: fetch it again or make it anew"
                ) from error
            missing = sorted(DTYPES.keys() - columns.keys() - set(OPTIONAL))
            if missing or (unknown := sorted(columns.keys() - DTYPES.keys())):
                wrong = f"lacks the column {missing[0]!r}" if missing else f"has the unknown column {unknown[0]!r}"
                raise MoesaicError(f"{wrong}; expected {', '.join(DTYPES)}")
            return cls(card=Card.from_dict(about["card"]), meta=about["meta"], **columns)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file an error is about."""
    try:
        yield
    except MoesaicError as error:
        raise MoesaicError(f"{path}: {error}") from error


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    """Format, card and meta of a file; raises MoesaicError if it is another kind of file or a newer one."""
    try:
        about: dict[str, Any] = json.loads(metadata[FORMAT])
        kind, version = about["format"].split("/")
        newer = int(version) > VERSION
        if kind != FORMAT or not (newer or (isinstance(about["card"], dict) and isinstance(about["meta"], dict))):
            raise ValueError(kind)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise MoesaicError("a safetensors file, but not a trace; expected what `moesaic trace` writes") from error
    if newer:
        raise MoesaicError(
            f"trace format {version}, but this moesaic reads up to {VERSION}; update moesaic (pip install -U moesaic)"
        )
    return about


def _cast(name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    """`value` as the file stores it; MoesaicError where that would change a number."""
    try:
        column = np.asarray(value)
    except ValueError as error:
        raise MoesaicError(f"{name} is not an array: {error}") from error
    if column.dtype.kind not in ("iuf" if dtype.kind == "f" else "iu") and column.size:
        raise MoesaicError(f"{name} holds {column.dtype}, expected {dtype}")
    if dtype.kind == "i" and column.size:
        limits = np.iinfo(dtype)
        if (bad := (column < limits.min) | (column > limits.max)).any():
            raise MoesaicError(f"{name} holds {column[bad][0]} in row {_first(bad)}, which {dtype} cannot")
    with np.errstate(over="ignore"):  # infinite weights are refused later, by row
        return np.ascontiguousarray(column, dtype=dtype)


def _known_experts(routes: Array, experts: int, name: str) -> None:
    if (bad := (routes < EMPTY) | (routes >= experts)).any():
        row, layer, slot = np.argwhere(bad)[0]
        raise MoesaicError(
            f"{name}: row {row} names expert {routes[row, layer, slot]} in layer {layer}; expected 0 to {experts - 1}, "
            f"or {EMPTY} for an unused slot"
        )


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, size) for size, want in zip(shape, wanted, strict=True))


def _first(bad: Array) -> int:
    """The first row that is marked anywhere."""
    return int(np.argwhere(bad)[0][0])
