"""What a run and a sweep leave behind: exact tables, the same bytes twice, pictures that say what was found."""

import csv
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import plotting
from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.schedule.synthetic import Synthetic, synthesize
from moesaic.simulate import figures, output
from moesaic.simulate.assemble import assemble
from moesaic.simulate.report import latencies, report
from moesaic.simulate.simulator import Run, Served, StageRow
from moesaic.simulate.system import BatcherOptions, CacheOptions, System

WIDE = "\u00a0"  # between a number and its unit, so that no line breaks there
Cell = dict[str, Any]


def stage(
    start: float, seconds: float, *, stall: float = 0.0, queued: int = 0, running: int = 1, held: int = 8
) -> StageRow:
    return StageRow(
        start, seconds, stall, 0.1, 0.2, 0.0, 3, 2, 2, 6, 10, 2.0, 2.0, 0.0, 0.0, queued, queued, running, held
    )


def make_run() -> Run:
    """Two requests, three stages, and a pause between the second and the third."""
    first = Served(10.0, 7, 5, 10.0, 10.4, 11.2, 0.1)
    second = Served(10.3, 4, 1, 10.4, 1 / 3 + 11, 1 / 3 + 11)
    stages = [stage(10.0, 0.4, queued=1), stage(10.4, 0.9, stall=0.3, queued=4, running=2), stage(12.0, 1.0, held=5)]
    return Run([first, second], stages, end_s=13.0)


def make_result(run: Run, **changes: Any) -> dict[str, Any]:
    """A report in which only what tables and pictures show is there."""
    result = {
        "system": {"name": "small", "device": "cpu-box"},
        "capacity_bytes": 8,
        "all_bytes": 16,
        "hit_ratio": {"use": 0.5},
        "kept_ratio": {"own": 0.4, "lru": 0.3, "oracle": 0.6},
        "bytes_per_token": 2.5e6,
        "stall_share": 0.13,
        "experts_per_step": 2.0,
        "latency_s": latencies(run),
        "throughput": {"tokens_per_s": 2.0},
        "longest_wait_s": {"admission": 0.1, "decode": 0.1},
    }
    return {**result, **changes}


def make_sweep(axes: dict[str, list[Any]], kept: Callable[[Cell], float], slow: Callable[[Cell], float]) -> list[Any]:
    """Cells of a grid; `kept` and `slow`: a cell's kept ratio (the oracle's is 0.1 more) and mean latency."""
    cells: list[Cell] = [{}]
    for axis, values in axes.items():
        cells = [{**cell, axis: value} for cell in cells for value in values]
    return [(cell, make_cell(cell, kept(cell), slow(cell))) for cell in cells]


def make_cell(cell: Cell, kept: float, slow: float) -> dict[str, Any]:
    result = make_result(make_run())
    result["capacity_bytes"] = round(1000 * cell.get("cache.capacity", 0.5))
    result["all_bytes"] = 1000
    result["kept_ratio"] = {"own": kept, "lru": kept - 0.1, "oracle": kept + 0.1}
    result["latency_s"]["normalised"] = {"mean": slow, "p95": 2 * slow}
    return result


POLICIES = {"cache.policy": ["lru", "belady"], "cache.capacity": [0.25, 0.5, 0.75]}


def policies(cell: Cell) -> float:
    return cell["cache.capacity"] * (0.8 if cell["cache.policy"] == "belady" else 0.6)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_picture(path: Path) -> bool:
    from matplotlib.image import imread

    height, width, _ = imread(path).shape
    return 300 < height < 1500 and 1000 < width < 2000 and imread(path)[..., :3].std() > 0.02


# -- one run -------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("error")
def test_a_simulated_run_as_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = Synthetic(requests=20, rate=200.0, prompt=20, output=6, layers=2, route_layers=2, experts=4, d=64, ffn=64)
    system = System(name="tiny", cache=CacheOptions(capacity=0.5), batcher=BatcherOptions(kind="fcfs"))
    simulator = assemble(synthesize(options), system)
    run = simulator.run()
    result = report(simulator, run, system, 0)
    files = output.save(tmp_path, result, run)
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    assert json.loads((tmp_path / "report.json").read_text())["requests"] == 20
    assert (
        sum(int(row["output_tokens"]) for row in read_csv(tmp_path / "requests.csv")) == result["tokens"]["generated"]
    )
    assert sum(int(row["calls"]) for row in read_csv(tmp_path / "stages.csv")) == result["events"]["calls"]
    assert is_picture(tmp_path / "latency.png") and is_picture(tmp_path / "timeline.png")
    assert all(math.isfinite(value) for value in output.flat(result).values())


def test_tables_give_back_every_number(tmp_path: Path) -> None:
    run = make_run()
    output.save(tmp_path, make_result(run), run)
    for row, served in zip(read_csv(tmp_path / "requests.csv"), run.requests, strict=True):
        assert {name: float(row[name]) for name in vars(served)} == vars(served)
    for row, kept in zip(read_csv(tmp_path / "stages.csv"), run.stages, strict=True):
        assert StageRow(*(float(row[name]) for name in StageRow._fields)) == kept


def test_equal_runs_leave_equal_bytes_and_foreign_files_stay(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "notes.txt").write_text("mine")
    written = []
    for _ in range(2):
        files = output.save(tmp_path, make_result(make_run()), make_run())
        written.append([(tmp_path / name).read_bytes() for name in files])
    assert written[0] == written[1] and len(written[0]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_without_matplotlib_only_the_pictures_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"latency\.png, timeline\.png.*moesaic\[plots\]"):
        assert output.save(tmp_path, make_result(make_run()), make_run()) == [
            "report.json",
            "requests.csv",
            "stages.csv",
        ]
    with pytest.warns(UserWarning, match=r"capacity\.png"):
        files = output.save_table(make_sweep(POLICIES, policies, lambda _: 1.0), tmp_path, "moesaic sweep")
    assert files == ["sweep.csv", "sweep.md"] and ".png" not in (tmp_path / "sweep.md").read_text()
    with pytest.raises(MissingExtraError):
        figures.latency(make_result(make_run()), make_run(), tmp_path / "a.png")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(MoesaicError, match="is a file, expected a folder"):
        output.save(tmp_path / "out", make_result(make_run()), make_run())


def test_a_picture_is_whole_or_absent(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), plotting.drawing(path, 4, 2, "title", "subtitle") as figure:
        figure.add_subplot().plot([0, 1 / 0])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with plotting.drawing(path, 4, 2, "title", "subtitle"):
        pass
    assert path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]


# -- time --------------------------------------------------------------------------------------------------------
STAGES = st.lists(
    st.tuples(
        st.floats(0, 2), st.floats(0.01, 3), st.floats(0, 1), st.integers(0, 9), st.integers(1, 9), st.integers(0, 99)
    ),
    min_size=1,
    max_size=12,
)  # pause before it, seconds, stalled share, queued, running, resident bytes


@settings(max_examples=60, deadline=None)
@given(STAGES, st.integers(1, 9))
def test_buckets_equal_a_slow_count(drawn: list[tuple[float, float, float, int, int, int]], count: int) -> None:
    now, stages = 5.0, []
    for pause, seconds, stalled, queued, running, held in drawn:
        now += pause
        stages.append(stage(now, seconds, stall=stalled * seconds, queued=queued, running=running, held=held))
        now += seconds
    found = figures.over_time(Run([Served(5.0, 1, 1)], stages, end_s=now), count)
    width = (now - 5.0) / count
    for i in range(count):
        low, high = 5.0 + i * width, 5.0 + (i + 1) * width
        inside = [max(0.0, min(high, row.start_s + row.seconds) - max(low, row.start_s)) / width for row in stages]
        pairs = list(zip(inside, stages, strict=True))
        assert math.isclose(found.busy[i], sum(inside), abs_tol=1e-9)
        assert math.isclose(found.queue[i], sum(share * row.queued for share, row in pairs), abs_tol=1e-8)
        assert math.isclose(found.running[i], sum(share * row.running for share, row in pairs), abs_tol=1e-8)
        stalls = sum(share * row.stall_s / row.seconds for share, row in pairs)
        assert math.isclose(found.stall[i], stalls, abs_tol=1e-9)
    assert math.isclose(found.peak.max(), max(row.queued for row in stages), abs_tol=1e-9)
    assert set(found.resident) <= {row.resident_bytes for row in stages}


def test_a_pause_is_idle_and_keeps_what_is_resident() -> None:
    line = figures.over_time(make_run(), 30)  # a tenth of a second each; the pause lasts from 1.3 to 2.0
    assert np.allclose(line.busy[14:19], 0) and np.allclose(line.busy[5:12], 1)
    assert set(line.resident[14:19]) == {8} and line.resident[-1] == 5
    assert line.peak[4] == 4 and np.allclose(line.stall[5:12], 1 / 3)


def test_the_timeline_says_when_the_queue_peaked() -> None:
    run = make_run()
    words = figures._timeline_words(make_result(run), run)
    assert words == f"The queue peaked at 4 portions after 400{WIDE}ms; the engine stalled 13{WIDE}% of its time"
    run.stages = [row._replace(queued=0) for row in run.stages]
    assert figures._timeline_words(make_result(run), run).startswith("Nothing that was ready ever stayed behind")


@pytest.mark.filterwarnings("error")
def test_pictures_of_little(tmp_path: Path) -> None:
    """One request of one token, at no cost at all: no TPOT, no time, nothing on a logarithmic axis."""
    pytest.importorskip("matplotlib")
    run = Run([Served(0.0, 1, 1, 0.0, 0.0, 0.0)], [stage(0.0, 0.0)])
    assert len(output.save(tmp_path, make_result(run), run)) == 5
    assert len(output.save(tmp_path / "none", make_result(run), Run([]))) == 3


# -- many runs -----------------------------------------------------------------------------------------------------
def test_the_table_has_every_axis_and_digit(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    axes = {"cache.policy": ["a|b"], "cache.preload": [True, False], "seed": [0, 1]}
    results = make_sweep(axes, lambda cell: 1 / 3 + cell["seed"], lambda _: 0.1)
    del results[1][1]["kept_ratio"]
    assert output.save_table(results, tmp_path, "moesaic sweep t.trace -a seed=0,1") == ["sweep.csv", "sweep.md"]
    rows = read_csv(tmp_path / "sweep.csv")
    assert list(rows[0]) == [*axes, *output.COLUMNS]
    assert [row["cache.preload"] for row in rows] == ["true", "true", "false", "false"]
    assert float(rows[0]["kept.own"]) == 1 / 3 and float(rows[0]["mb_per_token"]) == 2.5
    assert math.isnan(float(rows[1]["kept.oracle"])) and math.isnan(output.flat(results[1][1])["kept.lru"])
    text = (tmp_path / "sweep.md").read_text()
    assert "moesaic sweep t.trace -a seed=0,1" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 and all(line.replace("\\|", "").count("|") == 3 + 16 + 1 for line in table)
    before = text, (tmp_path / "sweep.csv").read_bytes()
    output.save_table(results, tmp_path, "moesaic sweep t.trace -a seed=0,1")
    assert ((tmp_path / "sweep.md").read_text(), (tmp_path / "sweep.csv").read_bytes()) == before


def test_a_table_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="without a run"):
        output.save_table([], tmp_path, "")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("axes", "pictures"),
    [
        (POLICIES, ["capacity.png"]),
        ({"cache.capacity": [0.25, 0.5], "load": [0.5, 1.2], "seed": [0, 1]}, ["capacity.png", "load.png"]),
        ({"batcher.kind": [f"kind-{i}" for i in range(12)], "rate": [1, 4]}, ["load.png"]),
        ({"cache.capacity": [0.5], "load": [0.8], "seed": [0, 1]}, []),
    ],
    ids=["capacity", "both", "12 lines", "none"],
)
def test_pictures_of_the_axes_that_vary(axes: dict[str, list[Any]], pictures: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = make_sweep(
        axes, lambda cell: cell.get("cache.capacity", 0.5) * 0.8, lambda cell: 0.01 + cell.get("seed", 0)
    )
    assert output.save_table(results, tmp_path, "moesaic sweep")[2:] == pictures
    assert all(is_picture(tmp_path / name) for name in pictures)
    assert all(f"]({name})" in (tmp_path / "sweep.md").read_text() for name in pictures)


def test_capacity_without_bounds_or_over_bytes(tmp_path: Path) -> None:
    """No kept ratios: hits. Entries of other sizes: bytes, as the same share of both is not the same room."""
    pytest.importorskip("matplotlib")
    results = make_sweep(POLICIES, policies, lambda _: 1.0)
    for cell, result in results:
        del result["kept_ratio"]
        result["all_bytes"] += 500 * (cell["cache.policy"] == "lru")
    assert "capacity.png" in output.save_table(results, tmp_path, "moesaic sweep")


def curve(*points: tuple[float, float]) -> figures.Curve:
    x, y = np.array(points).T
    return figures.Curve(x, y, y, y)


def test_the_capacity_curve_says_where_the_policy_matters_most() -> None:
    def words(**lines: figures.Curve) -> str:
        oracles = {name: figures.Curve(c.x, c.mean + 0.1, c.low, c.high) for name, c in lines.items()}
        return figures._capacity_words(lines, oracles, "keeps", figures._share).replace(WIDE, " ")

    lru, belady = curve((0.25, 0.2), (0.5, 0.3), (1, 0.9)), curve((0.25, 0.3), (0.5, 0.6), (1, 0.9))
    found = words(lru=lru, belady=belady)
    assert found == "With room for 50 % of the experts, belady keeps 60.0 % (its oracle 70.0 %), lru 30.0 %"
    assert words(lru=lru).startswith("With room for 25 % of the experts the cache keeps 20.0 % (its oracle 30.0 %)")
    assert words(a=lru, b=lru).startswith("All lines are equal at every capacity")
    apart = words(a=lru, b=curve((0.3, 0.95)))
    assert apart == "b keeps 95.0 % with room for 30 % of the experts, a 90.0 % with room for 100 % of the experts"


def test_the_load_curve_says_who_is_fastest() -> None:
    mean = {"fcfs": curve((0.5, 0.1), (1.2, 0.4)), "adaptive": curve((0.5, 0.1), (1.2, 0.2))}
    p95 = {"fcfs": curve((0.5, 0.2), (1.2, 0.9)), "adaptive": curve((0.5, 0.2), (1.2, 0.5))}
    assert figures._load_words(mean, p95, "load").replace(WIDE, " ") == (
        "At 120 % load adaptive is fastest and fcfs slowest: mean 200 ms and 400 ms a token, p95 500 ms and 900 ms"
    )
    one = figures._load_words({"": mean["fcfs"]}, {"": p95["fcfs"]}, "rate").replace(WIDE, " ")
    assert (
        one
        == "From 0.5× to 1.2× the trace's rate the mean goes from 100 ms to 400 ms a token, p95 from 200 ms to 900 ms"
    )


def test_lines_are_combinations_while_there_are_colours() -> None:
    axes = {
        "limits.max_tokens": [64, 128],
        "cache.policy": ["lru", "belady"],
        "seed": [0, 1],
        "cache.capacity": [0.2, 0.4],
    }
    results = make_sweep(axes, policies, lambda _: 1.0)
    assert figures.line_axes(results, "cache.capacity", "cache.policy") == ["cache.policy", "limits.max_tokens"]
    many = make_sweep({**axes, "limits.max_tokens": [1, 2, 3, 4]}, policies, lambda _: 1.0)
    assert figures.line_axes(many, "cache.capacity", "cache.policy") == ["cache.policy"]
    lines = figures.curves(
        results,
        ["cache.policy", "limits.max_tokens"],
        lambda c, _: c["cache.capacity"],
        lambda r: r["kept_ratio"]["own"],
    )
    assert list(lines)[:2] == ["lru · max_tokens 64", "belady · max_tokens 64"]
    assert np.allclose(lines["belady · max_tokens 64"].mean, [0.16, 0.32])


def test_curves_are_means_and_ranges() -> None:
    axes = {"load": [1.2, 0.5], "seed": [0, 1, 2]}
    results = make_sweep(axes, lambda _: 0.5, lambda cell: cell["load"] + cell["seed"])
    (found,) = figures.curves(results, [], lambda cell, _: cell["load"], figures._normalised("mean")).values()
    assert found.x.tolist() == [0.5, 1.2]
    assert np.allclose([found.low, found.mean, found.high], [[0.5, 1.2], [1.5, 2.2], [2.5, 3.2]])
    assert math.isclose(found.at(1.2), 2.2) and math.isnan(found.at(0.7))


# -- words ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (2e-5, "20 µs"),
        (0.0031, "3.1 ms"),
        (0.9996, "1 s"),
        (12.34, "12.3 s"),
        (119, "119 s"),
        (750, "12.5 min"),
        (12240, "3.4 h"),
    ],
)
def test_durations_read_well(seconds: float, words: str) -> None:
    assert plotting.duration(seconds) == words.replace(" ", WIDE)


@given(st.floats(1e-6, 1e7))
def test_durations_keep_two_digits(seconds: float) -> None:
    number, unit = plotting.duration(seconds).replace(",", "").split(WIDE)
    scale = {"µs": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600}[unit]
    assert math.isclose(float(number) * scale, seconds, rel_tol=0.0051)
