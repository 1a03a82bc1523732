"""The calibration: fitted costs, what steps are told to contain, the file, and the commands that write and read it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moesaic.cli.main import app
from moesaic.errors import MoesaicError
from moesaic.schedule.synthetic import Synthetic, synthesize
from moesaic.serve.bench import BenchOptions, bench, fit_reads
from moesaic.serve.bench_steps import Kind, Recorder, kinds
from moesaic.serve.bench_work import Load, ModelWork
from moesaic.simulate.calibration import CalibratedCost, Calibration, Costs, fit, read_calibration, simulator
from moesaic.simulate.report import report
from moesaic.simulate.stage_cost import StageLoad
from moesaic.simulate.sweep import Measured, Sweep, run_sweep
from moesaic.simulate.system import read_system
from serving import engine, served_folder

COSTS = Costs(3e-3, 2e-5, 1e-4, 0.0, 1e-8, 4e-5, 2e-10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_folder(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def calibration(folder: Path) -> Calibration:
    return bench(folder, BenchOptions(memory="2GiB", dtype="float32", threads=1, seconds=0.5))


def failing(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert isinstance(result.exception, MoesaicError)
    return str(result.exception)


def test_fit_finds_the_costs_that_made_the_seconds() -> None:
    rng = np.random.default_rng(0)
    amounts = rng.integers(1, 100, (60, 7)) * np.array([0, 1, 1, 50, 50, 1, 10_000]) + np.array([1, 0, 0, 0, 0, 0, 0])
    seconds = np.array([COSTS.seconds(row) for row in amounts])
    found = fit(amounts, seconds, seconds**-2)
    for name in ("stage_s", "prefill_s", "decode_s", "decode_pair_s", "call_s", "byte_s"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=1e-4)
    assert found.prefill_pair_s < 1e-13


def test_fit_gives_nothing_below_zero() -> None:
    tokens = np.arange(1, 9)
    amounts = np.stack([np.ones(8), tokens], 1)
    amounts = np.pad(amounts, ((0, 0), (0, 5)))
    found = fit(amounts, 1.0 - 0.05 * tokens, np.ones(8))  # falls with tokens: no token costs less than nothing
    assert found.prefill_s == 0 and 0.6 < found.stage_s < 1.0


def test_reads_are_a_latency_and_a_rate() -> None:
    found = fit_reads([(size, 1e-4 + size / 2e9) for size in (1000, 50_000, 200_000)])
    assert found.bytes_s == pytest.approx(2e9) and found.latency_s == pytest.approx(1e-4)
    assert fit_reads([(1000, 1e-3), (1000, 1e-3)]).bytes_s == pytest.approx(1e6)


def test_kinds_fit_into_context_and_places() -> None:
    found = kinds(128, 8, 512, 3)
    assert {kind.requests for kind in found} == {1, 4, 8}
    assert all(kind.prompt + kind.outputs <= 128 for kind in found)
    assert Kind("decode 4, one expert", 4, 64, 32, 1) in found and Kind("prefill 127", 1, 127, 1) in found
    assert not any("one expert" in kind.name for kind in kinds(128, 8, 512, 1))
    longest = max(kinds(4096, 32, 512, 3), key=lambda kind: kind.prompt * (kind.outputs > 1))
    assert longest.prompt + longest.requests <= 512  # else the last prompt waits until nobody decodes


def test_recorder_hears_what_every_step_ran(folder: Path) -> None:
    with engine(folder, batcher="decode-first", prefix_reuse=False) as own:
        recorder = Recorder(own)
        for expert in (0, 2):
            recorder.send([5, 6, 7, 8], 6, expert)
        recorder.wait()
    loads = [step.load for step in recorder.steps]
    assert sum(load.prefill for load in loads) == 8 and sum(load.decode for load in loads) == 10
    assert sum((load.rows for load in loads), Counter()) == {0: 9, 2: 9}
    assert sum(load.prefill_pairs for load in loads) == 20 and sum(load.decode_pairs for load in loads) == 2 * 35
    assert all(step.seconds is not None and step.seconds > 0 for step in recorder.steps)
    assert [len(heard.experts) for heard in recorder.heard] == [6, 6]


def test_least_work_by_hand(folder: Path) -> None:
    work = ModelWork(folder, "float32")
    card, one = work.card, Load(decode=1, decode_pairs=10, rows=Counter([0]), outputs=1)
    none = Load(decode=1, decode_pairs=10, outputs=1)
    entries = sum(work.layout.bytes[key] for layer in range(card.layers) for key in work.layout.entries[layer, 0])
    assert work.least_bytes(one) - work.least_bytes(none) == entries == work.expert_bytes[0]
    assert work.least_flop(one) - work.least_flop(none) == 2 * entries / 4
    keys = work.least_bytes(replace(none, decode_pairs=11)) - work.least_bytes(none)
    assert keys == 2 * card.layers * card.kv_heads * card.head_dim * 4
    head = work.least_flop(none) - work.least_flop(replace(none, outputs=0))
    assert head == 2 * card.vocab * card.d


def test_stage_costs_what_the_formula_says(folder: Path, calibration: Calibration) -> None:
    work = ModelWork(folder, "float32")
    cost = CalibratedCost(work.card, work.layout.bytes, calibration.topology(), COSTS)
    load, rows = StageLoad(20, 3, 210, 90, 20, 4), Counter({0: 13, 2: 10})
    whole = cost.ends(load) + cost.attention(load) * work.card.layers
    for layer in work.layout.layers:
        calls = [call for call in work.layout.calls([dict(rows)]) if call.layer == layer]
        whole += cost.experts(calls, load).experts_s
    assert whole == pytest.approx(COSTS.seconds(work.amounts(Load(20, 3, 210, 90, rows, 4))))


def test_bench_measures_and_checks_itself(calibration: Calibration) -> None:
    names = [cell.name for cell in calibration.cells]
    assert {"decode 1", "decode 8", "decode 8, one expert", "prefill 32"} <= set(names)
    for cell in calibration.cells:
        assert 0 < cell.best_s <= cell.mean_s and cell.floor_s > 0 and cell.steps > 0 and cell.fit_s > 0
        assert cell.tokens_s == pytest.approx(cell.tokens / cell.mean_s)
    floors = calibration.floors
    assert min(floors.read_bytes_s, floors.flops, floors.page_cache.bytes_s, floors.disk.bytes_s) > 0
    assert calibration.machine.threads == 1 and calibration.model.dtype == "float32"
    assert calibration.costs.stage_s > 0 and calibration.check.simulated_s > 0
    # requests arrive while the first step runs, so the engine may take a step or two more
    assert abs(calibration.check.live_steps - calibration.check.simulated_steps) <= 3


def test_file_comes_back_as_it_was(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(path := tmp_path / "c.json")
    assert read_calibration(path) == calibration
    assert calibration.elsewhere() is None
    assert "other CPU" in str(replace(calibration, machine=replace(calibration.machine, cpu="other CPU")).elsewhere())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "else"}, "no calibration"),
        ({"version": 99}, "version 99"),
        ({"costs": {"stage_s": 1.0}}, "damaged"),
        ({"floors": None}, "damaged"),
        ({"cells": [{"name": 3}]}, "damaged"),
    ],
)
def test_bad_files_are_one_line(calibration: Calibration, tmp_path: Path, change: dict, says: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(calibration.to_dict() | change))
    with pytest.raises(MoesaicError, match=says) as caught:
        read_calibration(path)
    assert "\n" not in str(caught.value)


def test_negative_costs_and_missing_files_are_refused(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    with pytest.raises(MoesaicError, match="cannot be read"):
        read_calibration(path)
    path.write_text("{")
    with pytest.raises(MoesaicError, match="no JSON"):
        read_calibration(path)
    replace(calibration, costs=replace(calibration.costs, call_s=-1.0)).save(path)
    with pytest.raises(MoesaicError, match="call_s"):
        read_calibration(path)


def test_simulate_takes_the_measured_seconds(calibration: Calibration, tmp_path: Path) -> None:
    costs = replace(calibration, costs=Costs(0.5, 0, 0, 0, 0, 0, 0))
    costs.save(path := tmp_path / "c.json")
    trace = synthesize(Synthetic(requests=3, rate=50.0, prompt=8, output=4, layers=2, experts=3, d=64, ffn=64))
    trace.save(tmp_path / "t.trace")
    arguments = ["simulate", str(tmp_path / "t.trace"), "--calibration", str(path), "--json", "--no-bounds"]
    result = CliRunner().invoke(app, [*arguments, "--set", "cache.capacity=1.0"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["system"]["device"] == calibration.machine.cpu
    assert found["latency_s"]["tpot"]["mean"] == pytest.approx(0.5)
    assert "routes of synthetic" in result.stderr


def test_sweeps_take_the_measured_seconds(calibration: Calibration, tmp_path: Path) -> None:
    """A cell of the sweep is the run of simulate, and another calibration is another run."""
    trace = synthesize(Synthetic(requests=12, rate=50.0, prompt=8, output=4, layers=2, experts=3, d=64, ffn=64))
    trace.save(tmp_path / "t.trace")
    calibration.save(tmp_path / "a.json")
    slower = replace(calibration.costs, stage_s=calibration.costs.stage_s + 0.5)
    replace(calibration, costs=slower).save(tmp_path / "b.json")
    axes = {"cache.capacity": [0.5, 1.0]}
    found = {}
    for name in "ab":
        measured = Measured(tmp_path / f"{name}.json")
        found[name] = run_sweep(Sweep(tmp_path / "t.trace", "moesaic", axes, False, measured), tmp_path / "out")
        for cell, result in found[name]:
            own = read_system("moesaic", cell)
            alone = simulator(trace, own, measured.calibration)
            assert report(alone, alone.run(own.name), own, 0, bounds=False) == result
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 4
    first = [found[name][0][1]["latency_s"]["ttft"]["mean"] for name in "ab"]
    assert first[1] > first[0] + 0.5
    arguments = ["sweep", str(tmp_path / "t.trace"), "-s", "moesaic", "-a", "cache.capacity=0.5,1.0", "--no-bounds"]
    arguments += ["--calibration", str(tmp_path / "a.json"), "--out", str(tmp_path / "out"), "--jobs", "1", "--json"]
    shown = CliRunner().invoke(app, arguments)
    assert [each["report"] for each in json.loads(shown.stdout)] == [result for _, result in found["a"]]
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 4, "finished runs are not repeated"


def test_replay_needs_a_system_for_a_calibration(calibration: Calibration, tmp_path: Path) -> None:
    synthesize(Synthetic(requests=3, rate=50.0, prompt=8, output=4, layers=2, experts=3, d=64, ffn=64)).save(
        tmp_path / "t.trace"
    )
    calibration.save(tmp_path / "a.json")
    assert "name one with --system" in failing("replay", tmp_path / "t.trace", "--calibration", tmp_path / "a.json")


def test_simulate_refuses_what_was_not_measured(calibration: Calibration, tmp_path: Path) -> None:
    trace = synthesize(Synthetic(requests=3, rate=50.0, prompt=8, output=4, layers=2, experts=5, d=64, ffn=64))
    with pytest.raises(MoesaicError, match="has 5 experts"):
        simulator(trace, read_system("read-me"), calibration)
    with pytest.raises(MoesaicError, match="spreads over devices"):
        simulator(trace, read_system("exflow"), calibration)
    calibration.save(path := tmp_path / "c.json")
    trace.save(tmp_path / "t.trace")
    both = ("simulate", tmp_path / "t.trace", "--calibration", path)
    assert "leave --shape" in failing(*both, "--shape", "llama-2-7b")
    assert "keep or drop" in failing(*both, "--page-cache", "lose")


def test_plan_says_how_fast(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(path := tmp_path / "c.json")
    plan = ["plan", str(folder), "--dtype", "float32", "--memory", "2GiB", "--calibration", str(path), "--json"]
    found = json.loads(CliRunner().invoke(app, plan).stdout)["expected"]
    assert [step["requests"] for step in found["steps"]] == [1, 4, 8, 16, 32]
    assert all(0 < step["least_s"] <= step["most_s"] for step in found["steps"]) and found["miss_s"] is None
    found = json.loads(CliRunner().invoke(app, [*plan, "--experts", "0.8"]).stdout)["expected"]
    assert found["miss_s"] > 0 and found["miss_disk_s"] > 0
    shown = CliRunner().invoke(app, plan[:-1])
    assert "tokens/s" in shown.stdout and "64" not in shown.stderr


def test_plan_refuses_other_models_and_dtypes(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(path := tmp_path / "c.json")
    plan = ("plan", folder, "--memory", "2GiB", "--calibration", path)
    assert "measured in float32" in failing(*plan, "--dtype", "bfloat16")
    replace(calibration, model=replace(calibration.model, fingerprint="0")).save(path)
    assert "another model" in failing(*plan, "--dtype", "float32")


def test_bench_command_writes_the_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    arguments = ["bench", str(folder), "-o", str(path), "--memory", "2GiB", "--seconds", "0.01", "--threads", "1"]
    arguments += ["--context", "48"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "share" in result.stdout and "burst of" in result.stdout
    assert read_calibration(path).model.name == folder.name


def test_bench_refuses_bad_options(folder: Path, tmp_path: Path) -> None:
    assert "is a folder" in failing("bench", folder, "-o", tmp_path)
    assert "seconds" in failing("bench", folder, "--seconds", "0")
    assert "threads" in failing("bench", folder, "--threads", "0")
    assert "config.json" in failing("bench", tmp_path / "nothing")
