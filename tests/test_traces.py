"""Traces: their checks, their file, their statistics against slow references, and those that are made."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from moesaic.errors import MoesaicError
from moesaic.schedule.replay import Arrivals, read_arrivals, replay
from moesaic.schedule.synthetic import Synthetic, synthesize
from moesaic.schedule.trace import DTYPES, EMPTY, FORMAT, REQUEST_COLUMNS, Card, Trace
from moesaic.schedule.work import ANY, Key, Known

CARD = Card("m", layers=2, experts=4, top_k=2, known_at="gate", d=8, ffn=16, heads=2, kv_heads=1, head_dim=4, vocab=10)
BLOCKS = ((8, (0, 1, 2, 3)), (4, (0, 1)), (2, (2,)), (1, (3,)))


def small(**changes: Any) -> Trace:
    """Two requests: the second is stretched and shares the first one's decode rows."""
    routes = [[[0, 1], [1, 2]], [[2, 3], [0, EMPTY]], [[3, 0], [1, 2]], [[0, 3], [2, 1]], [[1, 2], [3, 0]]]
    columns: dict[str, Any] = {
        "arrival_s": [0.0, 1.5],
        "prompt_tokens": [2, 3],
        "output_tokens": [4, 6],
        "routes": routes,
        "prompt_row": [0, 0],
        "prompt_rows": [2, 1],
        "decode_row": [2, 2],
        "decode_rows": [3, 3],
        "card": CARD,
    }
    return Trace(**{**columns, **changes})


def made(seed: int = 0, **options: Any) -> Trace:
    return synthesize(Synthetic(**{"requests": 12, "prompt": 6.0, "output": 5.0, "layers": 3, "seed": seed, **options}))


def same(one: Trace, two: Trace) -> bool:
    arrays = [(getattr(one, name), getattr(two, name)) for name in DTYPES]
    return (one.card, one.meta) == (two.card, two.meta) and all(
        (a is b) if a is None or b is None else a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays
    )


# -- where the routes lie ----------------------------------------------------------------------------------------------
def test_routes_of_tokens() -> None:
    trace = small()
    assert trace.prompt_routes(0, 0, 2).tolist() == trace.routes[:2].tolist()
    assert trace.prompt_routes(1, 1, 3).tolist() == trace.routes[[0, 0]].tolist()
    assert trace.decode_routes(1, 4).tolist() == trace.routes[3].tolist()


def tokens_of(trace: Trace) -> list[int]:
    """The row of every token, by the words of the format."""
    rows = []
    for r in range(trace.requests):
        rows += [int(trace.prompt_row[r] + t % trace.prompt_rows[r]) for t in range(trace.prompt_tokens[r])]
        rows += [int(trace.decode_row[r] + t % trace.decode_rows[r]) for t in range(trace.output_tokens[r] - 1)]
    return rows


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Synthetic rows; requests that share, stretch or skip them at random."""
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    trace = made(seed, experts=5, k=int(rng.integers(1, 4)), route_layers=int(rng.choice([1, 3])), stay=rng.random())
    n, R = len(trace.routes), trace.requests
    rows = {}
    for kind in ("prompt", "decode"):
        rows[f"{kind}_row"] = rng.integers(0, n, R)
        rows[f"{kind}_rows"] = 1 + rng.integers(0, n - rows[f"{kind}_row"])
    return replace(trace, **rows)


@settings(max_examples=30, deadline=None)
@given(traces())
def test_statistics_equal_their_definitions(trace: Trace) -> None:
    used = Counter(tokens_of(trace))
    assert trace.row_tokens().tolist() == [used[row] for row in range(len(trace.routes))]
    load = Counter(int(e) for row in tokens_of(trace) for e in trace.routes[row].flat if e != EMPTY)
    assert trace.expert_load() == pytest.approx([load[e] / load.total() for e in range(5)])
    extra = [max(0, p - n) for p, n in zip(trace.prompt_tokens, trace.prompt_rows, strict=True)]
    extra += [max(0, p - n) for p, n in zip(trace.decode_tokens, trace.decode_rows, strict=True)]
    assert trace.stretched() == pytest.approx(sum(extra) / used.total())
    pairs = {
        (row - 1, row)
        for start, count in zip(trace.decode_row, trace.decode_rows, strict=True)
        for row in range(start + 1, start + count)
    }
    kept = [set(a) == set(b) for i, j in pairs for a, b in zip(trace.routes[i], trace.routes[j], strict=True)]
    assert trace.stay() == (pytest.approx(np.mean(kept)) if kept else None)


@settings(max_examples=30, deadline=None)
@given(traces(), st.integers(1, 12))
def test_head_keeps_every_route(trace: Trace, count: int) -> None:
    head = trace.head(count)
    assert head.requests == min(count, 12)
    assert len(head.routes) <= len(trace.routes) and (head.row_tokens() >= 0).all()
    for r in range(head.requests):
        stop = int(trace.prompt_tokens[r])
        assert np.array_equal(head.prompt_routes(r, 0, stop), trace.prompt_routes(r, 0, stop))
        for t in range(trace.decode_tokens[r]):
            assert np.array_equal(head.decode_routes(r, t), trace.decode_routes(r, t))


def test_unique_experts() -> None:
    alone = made(experts=4, stay=1.0, output_sigma=0.0)
    assert alone.unique_experts(1) == 1.0
    assert made(experts=8, k=3, output_sigma=0.0).unique_experts(1) == 3.0
    uniform = made(experts=8, requests=400, stay=0.0, output_sigma=0.0)
    assert uniform.unique_experts(8) == pytest.approx(8 * (1 - (7 / 8) ** 8), rel=0.05)
    assert uniform.unique_experts(8) == uniform.unique_experts(8) != uniform.unique_experts(8, seed=1)
    assert made(output=1.0, output_sigma=0.0).unique_experts(8) is None


def test_info_is_json() -> None:
    info = json.loads(json.dumps(small().info(), allow_nan=False))
    assert (info["requests"], info["prompt_tokens"], info["output_tokens"]) == (2, 5, 10)
    assert info["hours"] == pytest.approx(1.5 / 3600) and info["requests_per_s"] == pytest.approx(1 / 1.5)
    assert info["stretched"] == pytest.approx(4 / 13)
    even = made(requests=1, prompt=1.0, prompt_sigma=0.0, output=0.0, experts=1)
    assert even.info()["entropy"] == 0.0 and even.info()["requests_per_s"] is None and even.info()["stay"] is None


def test_scaled() -> None:
    assert small().scaled(3.0).arrival_s.tolist() == [0.0, 0.5]
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(MoesaicError, match="finite factor above 0"):
            small().scaled(factor)
    with pytest.raises(MoesaicError, match="at least 1"):
        small().head(0)


# -- bad input ---------------------------------------------------------------------------------------------------------
def changed(place: tuple[int, int, int], expert: int) -> Any:
    routes = small().routes.copy()
    routes[place] = expert
    return routes


BAD = {
    "unsorted": ({"arrival_s": [2.0, 1.0]}, "request 1 arrives at 1.0 s, before request 0"),
    "nan": ({"arrival_s": [0.0, float("nan")]}, "request 1 arrives at nan"),
    "negative": ({"arrival_s": [-1.0, 0.0]}, "request 0 arrives at -1.0"),
    "prompt": ({"prompt_tokens": [2, 0]}, "request 1 has prompt_tokens 0, expected at least 1"),
    "output": ({"output_tokens": [-1, 0]}, "request 0 has output_tokens -1, expected at least 0"),
    "no-rows": ({"decode_rows": [0, 3]}, "request 0 runs 3 decode tokens, but has no decode rows: a hole"),
    "outside": ({"decode_row": [2, 3]}, "request 1 has decode rows 3 to 5, but the trace has rows 0 to 4: a hole"),
    "before": ({"prompt_row": [-1, 0]}, "request 0 has prompt rows -1 to 0"),
    "huge": ({"prompt_row": [2**63 - 1, 0]}, "request 0 has prompt rows"),
    "hole": ({"routes": changed((1, 1, 0), EMPTY)}, "row 1 has no expert in layer 1"),
    "unknown": ({"routes": changed((3, 1, 1), 4)}, "row 3 names expert 4 in layer 1; expected 0 to 3"),
    "below": ({"routes": changed((3, 0, 1), -2)}, "row 3 names expert -2 in layer 0"),
    "twice": ({"routes": changed((0, 0, 0), 1)}, "row 0 has expert 1 twice in layer 0"),
    "flat": ({"routes": [[0, 1]]}, "routes has the shape"),
    "layers": ({"routes": np.zeros((5, 3, 1), int)}, "routes has 3 layers, expected 1"),
    "shape": ({"prompt_tokens": [1, 2, 3]}, r"prompt_tokens has the shape \(3,\), expected \(2\)"),
    "dtype": ({"prompt_tokens": [1.0, 2.0]}, "prompt_tokens holds float64, expected int64"),
    "overflow": ({"routes": changed((0, 0, 0), 1).astype(int) + 70_000}, "routes holds 70001 in row 0"),
    "ragged": ({"routes": [[[1]], [[1, 2]]]}, "routes is not an array"),
    "token_ids": ({"token_ids": [1, 2]}, r"token_ids has the shape \(2,\), expected \(5\)"),
    "weights": ({"weights": np.full((5, 2, 2), 1e9)}, "weights: row 0 has a weight that is not finite"),
    "predicted": ({"predicted": np.full((5, 2, 1), 9)}, "predicted: row 0 names expert 9"),
    "width": ({"predicted": np.zeros((5, 1, 3), int)}, r"expected \(5, 2, any\)"),
    "empty": ({name: [] for name in REQUEST_COLUMNS}, "no requests"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_columns(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(MoesaicError, match=message):
        small(**changes)


BAD_CARDS = [
    ({"known_at": "gates"}, "did you mean 'gate'"),
    ({"layers": 0}, "layers is 0"),
    ({"experts": 2.0}, "experts is 2.0, expected a whole number"),
    ({"weight_bytes": float("inf")}, "weight_bytes is inf"),
    ({"top_k": 5}, "top_k is 5, but there are 4 experts"),
    ({"blocks": (BLOCKS,)}, "blocks of 1 layers, expected 2"),
    ({"blocks": (BLOCKS, BLOCKS[1:2])}, "expert 2 of layer 1 owns no block"),
    ({"blocks": (BLOCKS, ((1, (9,)),))}, "block 0 of layer 1 has 1 channels and the owners"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CARDS)
def test_bad_cards(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoesaicError, match=message):
        replace(CARD, **changes)


# -- the file ----------------------------------------------------------------------------------------------------------
@settings(max_examples=10, deadline=None)
@given(traces())
def test_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("trace") / "a.trace"
    rows = trace.routes.shape
    whole = replace(
        trace,
        card=replace(trace.card, blocks=(tuple((w, tuple(range(5))) for w in (3, 2)),) * 3),
        token_ids=np.arange(rows[0]),
        weights=np.full(rows, 0.5),
        predicted=np.zeros((*rows[:2], 2), int),
    )
    for each in (trace, whole):
        each.save(path)
        assert same(Trace.load(path), each)
    assert list(path.parent.iterdir()) == [path]


def test_same_trace_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        made(topics=3, sharpness=0.5, route_layers=3, shared=0.25).save(tmp_path / name)
    made(seed=1, topics=3, sharpness=0.5, route_layers=3, shared=0.25).save(tmp_path / "c")
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_damaged_files(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.trace", np.random.default_rng(0)
    small().save(path)
    data = path.read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(MoesaicError, match=r"a\.trace: not a whole trace file"):
            Trace.load(path)
    for at in rng.integers(0, len(data), 300):  # refused, or still a consistent trace
        path.write_bytes(data[:at] + bytes([rng.integers(256)]) + data[at + 1 :])
        try:
            Trace.load(path).validate()
        except MoesaicError as error:
            assert str(error).startswith(str(path))


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match=r"no trace at .*nothing; make one"):
        Trace.load(tmp_path / "nothing")
    path = tmp_path / "x"
    about = {"format": f"{FORMAT}/1", "card": {"model": "m"}, "meta": {}}
    columns = {name: np.asarray(value) for name, value in vars(small()).items() if isinstance(value, np.ndarray)}
    for metadata, message in (
        (None, "a safetensors file, but not a trace"),
        ({FORMAT: "[]"}, "not a trace"),
        ({FORMAT: json.dumps({**about, "format": f"{FORMAT}/2"})}, "trace format 2, but this moesaic reads up to 1"),
        ({FORMAT: json.dumps(about)}, "card: .*missing"),
        ({FORMAT: json.dumps({**about, "card": {"blocks": [1]}})}, "card: .*expected the fields"),
        ({FORMAT: json.dumps({**about, "card": {"modle": "m"}})}, "unknown field 'modle'.*did you mean 'model'"),
    ):
        save_file(columns, path, metadata)
        with pytest.raises(MoesaicError, match=message):
            Trace.load(path)
    save_file({k: v for k, v in columns.items() if k != "decode_row"}, path, {FORMAT: json.dumps(about)})
    with pytest.raises(MoesaicError, match="lacks the column 'decode_row'"):
        Trace.load(path)
    save_file({**columns, "more": columns["routes"]}, path, {FORMAT: json.dumps(about)})
    with pytest.raises(MoesaicError, match="unknown column 'more'"):
        Trace.load(path)
    with pytest.raises(MoesaicError, match="cannot be written as JSON"):
        small(meta={"x": float("nan")}).save(path)


# -- stored entries ----------------------------------------------------------------------------------------------------
def test_layouts() -> None:
    per_layer = small().layout("layer-expert")
    assert per_layer.bytes == {Key(layer, e): 3 * 8 * 16 * 2 for layer in range(2) for e in range(4)}
    with pytest.raises(MoesaicError, match="differ between its 2 layers"):
        small().layout("expert")
    with pytest.raises(MoesaicError, match="has no channel blocks"):
        small().layout("block")
    with pytest.raises(MoesaicError, match="did you mean 'block'"):
        small().layout("blocks")  # type: ignore[arg-type]
    one = small(routes=small().routes[:, :1], card=replace(CARD, weight_bytes=0.5))
    assert one.layout("expert").bytes == {Key(ANY, e): 2 * 3 * 8 * 16 // 2 for e in range(4)}


def test_shared_channels() -> None:
    trace = small(routes=small().routes[:, :1], card=replace(CARD, blocks=(BLOCKS, BLOCKS)))
    blocks, experts = trace.layout("block"), trace.layout("expert")
    channel = 3 * 8 * 2
    assert blocks.total_bytes == 2 * 15 * channel
    assert blocks.entries[1, 0] == (Key(1, 0), Key(1, 1)) and blocks.entries[0, 3] == (Key(0, 0), Key(0, 3))
    assert [experts.bytes[ANY, e] for e in range(4)] == [2 * width * channel for width in (12, 12, 10, 9)]
    assert len(blocks.calls([{2: 1}])) == 2  # one row for both layers


# -- made traces -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arrival", ["poisson", "gamma", "uniform", "burst"])
def test_arrivals(arrival: str) -> None:
    trace = made(requests=4000, rate=5.0, arrival=arrival, cv=3.0, burst=4, prompt=1.0, output=0.0)
    gaps = np.diff(trace.arrival_s)
    assert gaps.mean() == pytest.approx(0.2, rel=0.15)
    expected = {"poisson": 1.0, "gamma": 3.0, "uniform": 0.0, "burst": np.sqrt(2 * 4 - 1)}[arrival]
    assert gaps.std() / gaps.mean() == pytest.approx(expected, rel=0.15, abs=1e-6)
    if arrival == "burst":
        assert (gaps[:3] == 0).all() and gaps[3] > 0


def test_lengths() -> None:
    trace = made(requests=4000, prompt=100.0, output=40.0, prompt_sigma=0.7, output_sigma=0.0, stay=1.0)
    assert trace.prompt_tokens.mean() == pytest.approx(100, rel=0.05)
    assert np.log(trace.prompt_tokens).std() == pytest.approx(0.7, rel=0.05)
    assert (trace.output_tokens == 40).all() and trace.stretched() == 0.0


@pytest.mark.parametrize("stay", [0.0, 0.6, 1.0])
def test_stay(stay: float) -> None:
    trace = made(requests=300, output=50.0, stay=stay, experts=16, route_layers=3)
    by_chance = (1 - stay) / 16
    assert trace.stay() == pytest.approx(stay + by_chance, abs=0.02)


def test_skew_and_topics() -> None:
    zipf = np.arange(1, 9) ** -1.5
    load = made(requests=3000, skew=1.5, stay=0.0).expert_load()
    assert sorted(load, reverse=True) == pytest.approx(zipf / zipf.sum(), rel=0.1)
    mixed, topical = (made(requests=300, experts=16, topics=n, concentration=0.1) for n in (0, 20))

    def within(trace: Trace) -> float:
        """Experts a request uses."""
        used = [np.unique(trace.prompt_routes(r, 0, int(trace.prompt_tokens[r]))) for r in range(trace.requests)]
        return float(np.mean([len(each) for each in used]))

    assert within(topical) < 0.8 * within(mixed)


def test_experts_are_drawn_without_replacement() -> None:
    pairs = made(requests=3000, prompt=20.0, experts=3, k=2, skew=1.0, stay=0.0).routes[:, 0]
    p = np.bincount(pairs[:, 0], minlength=3) / len(pairs)
    assert sorted(p, reverse=True) == pytest.approx(np.array([6, 3, 2]) / 11, abs=0.01)
    for a, b in ((0, 1), (0, 2), (1, 2), (2, 1)):
        assert (pairs == (a, b)).all(1).mean() == pytest.approx(p[a] * p[b] / (1 - p[a]), abs=0.01)


def test_transitions_between_layers() -> None:
    def certainty(**options: Any) -> float:
        """Share of tokens that take the commonest successor of their expert."""
        routes = made(requests=800, route_layers=3, stay=0.0, **options).routes[:, :2, 0]
        counts = np.zeros((8, 8))
        np.add.at(counts, (routes[:, 0], routes[:, 1]), 1)
        return float(counts.max(1).sum() / counts.sum())

    independent, soft, sharp = certainty(), certainty(sharpness=1.0), certainty(sharpness=0.02)
    assert independent < 0.2 < soft < 0.7 < sharp


def test_shared_share() -> None:
    trace = made(shared=0.25, ffn=100, d=4, experts=8)
    layout = trace.layout("block")
    assert layout.total_bytes == 3 * trace.card.bytes_of(100)
    assert layout.bytes[0, 0] == trace.card.bytes_of(25)
    assert trace.card.known is Known.REQUEST
    assert made(shared=1.0).layout("block").total_bytes == made().card.bytes_of(1024) * 3


BAD_OPTIONS = {
    "requests": 0, "rate": 0.0, "cv": float("nan"), "prompt": 0.5, "output": -1.0, "stay": 1.1, "skew": -0.1,
    "topics": -1, "concentration": 0.0, "sharpness": 0.0, "shared": 2.0, "k": 9, "route_layers": 2, "seed": -1,
    "experts": 1 << 15,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str) -> None:
    with pytest.raises(MoesaicError, match=f"^{name} is "):
        made(**{name: BAD_OPTIONS[name]})


def test_bad_names() -> None:
    with pytest.raises(MoesaicError, match="did you mean 'poisson'"):
        made(arrival="poison")
    with pytest.raises(MoesaicError, match="did you mean 'step'"):
        made(known_at="steps")
    with pytest.raises(MoesaicError, match=r"^shared is"):
        made(shared=0.0, ffn=7)


# -- logs and replays --------------------------------------------------------------------------------------------------
AZURE = "arrival_s,context_tokens,generated_tokens\n0.0,10,3\n0.5,4,1\n0.5,700,12\n"


def log(tmp_path: Path, text: str, name: str = "log.csv") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_read_csv(tmp_path: Path) -> None:
    arrivals = read_arrivals(log(tmp_path, AZURE))
    assert arrivals.arrival_s.tolist() == [0.0, 0.5, 0.5]
    assert (arrivals.prompt_tokens.tolist(), arrivals.output_tokens.tolist()) == ([10, 4, 700], [3, 1, 12])
    assert arrivals.prompt_id is None and len(arrivals.head(2)) == 2
    named = "arrival_s,context_tokens,generated_tokens,domain,prompt_id\n0,1,0,code,a-1\n0,2,5,math,b-2\n"
    assert read_arrivals(log(tmp_path, named)).prompt_id == ("a-1", "b-2")


def test_read_mooncake(tmp_path: Path) -> None:
    lines = [{"timestamp": 0, "input_length": 5, "output_length": 2, "hash_ids": [0]}]
    lines += [{"timestamp": 2500, "input_length": 7, "output_length": 1}]
    arrivals = read_arrivals(log(tmp_path, "\n".join(map(json.dumps, lines)), "log.jsonl"))
    assert arrivals.arrival_s.tolist() == [0.0, 2.5] and arrivals.prompt_tokens.tolist() == [5, 7]


BAD_LOGS = [
    ("", "line 1: no column 'arrival_s'"),
    (AZURE.replace("context_tokens", "context_token"), "line 1: no column 'context_tokens'.*is it 'context_token'"),
    (AZURE + "0.4,1,1\n", "line 5: arrival at 0.4 s after one at 0.5 s"),
    (AZURE + "nan,1,1\n", "line 5: arrival_s is 'nan', expected a finite number of at least 0"),
    (AZURE + "1.0,0,1\n", "line 5: context_tokens is '0', expected a finite number of at least 1"),
    (AZURE + "1.0,2.5,1\n", "line 5: context_tokens is '2.5', expected a whole number"),
    (AZURE + "1.0,2\n", "line 5: generated_tokens is None"),
    (AZURE.splitlines()[0], "has no requests"),
    ("arrival_s,context_tokens,generated_tokens,prompt_id\n0,1,1,a\n0,1,1,\n", "1 of 2 requests have a prompt_id"),
    ('{"timestamp": 1, "input_length": 1}\n', "line 1: output_length is None"),
    ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"time', "line 2: not JSON"),
    ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n[]', "line 2: a list, expected an object"),
]


@pytest.mark.parametrize(("text", "message"), BAD_LOGS)
def test_bad_logs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MoesaicError, match=message):
        read_arrivals(log(tmp_path, text))
    with pytest.raises(MoesaicError, match="no log of arrivals"):
        read_arrivals(tmp_path / "missing.csv")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_replay_gives_the_routes_of_one_sequence(seed: int, named: bool) -> None:
    rng = np.random.default_rng(seed)
    sequences = int(rng.integers(1, 20))
    library = made(seed, requests=sequences, output=10.0, output_sigma=0.0, route_layers=3)
    library = replace(library, meta={"prompt_ids": [f"p{s}" for s in range(sequences)]})
    which = rng.integers(0, sequences, 30)
    ids = tuple(f"p{s}" for s in which) if named else None
    arrivals = Arrivals(np.sort(rng.random(30)), rng.integers(1, 20, 30), rng.integers(0, 20, 30), ids)
    trace = replay(arrivals, library, seed)
    assert same(trace, replay(arrivals, library, seed))
    assert np.array_equal(trace.prompt_tokens, arrivals.prompt_tokens)
    for r in range(30):
        tokens, steps = int(arrivals.prompt_tokens[r]), int(trace.decode_tokens[r])
        far = sorted(abs(int(library.prompt_tokens[s]) - tokens) for s in range(sequences))[:8]
        near = [s for s in range(sequences) if abs(int(library.prompt_tokens[s]) - tokens) <= far[-1]]
        assert any(
            np.array_equal(trace.prompt_routes(r, 0, tokens), library.prompt_routes(s, 0, tokens))
            and all(np.array_equal(trace.decode_routes(r, t), library.decode_routes(s, t)) for t in range(steps))
            for s in ([which[r]] if named else near)
        )


def test_bad_replays() -> None:
    library = made(requests=2, output=1.0, output_sigma=0.0)
    arrivals = Arrivals(np.zeros(1), np.ones(1, int), np.ones(1, int), ("essay-1",))
    with pytest.raises(MoesaicError, match="0 prompt ids for its 2 sequences"):
        replay(arrivals, library)
    with pytest.raises(MoesaicError, match=r"request 0 sends the prompt 'essay-1'.*did you mean 'essay-2'"):
        replay(arrivals, library, keys=["essay-2", "code"])
    with pytest.raises(MoesaicError, match=r"request 0 has 5 output tokens, but sequence . of the library"):
        replay(Arrivals(np.zeros(1), np.ones(1, int), np.full(1, 5)), library)
    with pytest.raises(MoesaicError, match=r"have \[1, 2\] rows"):
        Arrivals(np.zeros(1), np.ones(2, int), np.ones(1, int))
