"""The simulator: hand-computed runs, conservation, exactness against plain replays, presets, sweeps that resume."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesaic.cli.main import app
from moesaic.errors import MoesaicError
from moesaic.schedule.cost import move_time
from moesaic.schedule.family import BATCHERS
from moesaic.schedule.synthetic import Synthetic, synthesize
from moesaic.schedule.trace import Trace
from moesaic.simulate.assemble import assemble, machine_of
from moesaic.simulate.models import SHAPES, at_size, find_shape
from moesaic.simulate.report import dumps, report
from moesaic.simulate.stage_cost import StageLoad
from moesaic.simulate.sweep import Sweep, read_axes, run_sweep, simulate
from moesaic.simulate.system import System, read_system, size, system_names


def made(**options: Any) -> Trace:
    base: dict[str, Any] = {"requests": 12, "rate": 50.0, "prompt": 12, "output": 6, "layers": 3, "experts": 5, "d": 64}
    return synthesize(Synthetic(**{**base, "ffn": 256, **options}))


def system(**changes: Any) -> System:
    base: dict[str, Any] = {"predictor.kind": "none", "predictor.lookahead": 0, "batcher.kind": "decode-first"}
    base |= {"cache.capacity": 0.5, "cache.preload": False, "cache.policy": "lru", "limits.max_tokens": 16}
    return read_system("read-me", {**base, **{key.replace("__", "."): value for key, value in changes.items()}})


def one_request(output: int = 2) -> Trace:
    """A prompt of one token and `output` tokens; every token uses expert 0, in two layers."""
    trace = made(requests=1, layers=2, experts=2, prompt=1, prompt_sigma=0, output=output, output_sigma=0)
    return replace(trace, routes=np.zeros_like(trace.routes), arrival_s=np.zeros(1))


# -- by hand -----------------------------------------------------------------------------------------------------------
def test_a_run_by_hand() -> None:
    """Two stages: the first fetches each layer's expert when the layer asks, the second finds both."""
    trace, own = one_request(), system(cache__capacity=1.0)
    simulator = assemble(trace, own)
    cost, link = simulator.cost, machine_of(own).links[0]
    run = simulator.run()
    prefill, decode = StageLoad(1, 0, 1, 0, 1, 1), StageLoad(0, 1, 0, 2, 0, 1)
    calls = [call for call in simulator.work.decode(0, 1, 0).calls]
    experts = [cost.experts((call,), decode).experts_s for call in calls]
    fetch = [move_time(link, trace.layout("layer-expert").bytes[call.keys[0]]) for call in calls]
    first = 2 * cost.attention(prefill) + sum(fetch) + sum(experts) + cost.ends(prefill)
    second = 2 * cost.attention(decode) + sum(experts) + cost.ends(decode)
    assert run.stages[0].seconds == pytest.approx(first)
    assert run.stages[0].stall_s == pytest.approx(sum(fetch))
    assert run.stages[1].seconds == pytest.approx(second)
    assert run.requests[0].first_s == pytest.approx(first)
    assert run.requests[0].end_s == pytest.approx(first + second)


def test_looking_ahead_hides_a_fetch_behind_a_layer() -> None:
    trace = one_request()
    without = simulate(trace, system(cache__capacity=1.0))
    ahead = simulate(trace, system(cache__capacity=1.0, predictor__kind="exact-pre-gate", predictor__lookahead=1))
    assert ahead["latency_s"]["ttft"]["mean"] < without["latency_s"]["ttft"]["mean"]
    assert ahead["moved_bytes"] == without["moved_bytes"]
    assert ahead["kept_ratio"] == without["kept_ratio"]  # what is fetched ahead is a load all the same


def test_all_resident_never_stalls() -> None:
    result = simulate(made(), system(cache__capacity=1.0, cache__preload=True))
    assert result["stall_share"] == 0
    assert result["moved_bytes"] == 0
    assert result["hit_ratio"] == dict.fromkeys(("use", "call", "token", "byte"), 1.0)


# -- on any trace ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batcher", BATCHERS)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 40),
    requests=st.integers(1, 8),
    known=st.sampled_from(["request", "gate"]),
)
@settings(max_examples=8, deadline=None)
def test_everything_is_served_and_time_goes_on(batcher: str, seed: int, tokens: int, requests: int, known: str) -> None:
    trace = made(seed=seed, known_at=known, rate=2000.0)
    own = system(batcher__kind=batcher, limits__max_tokens=tokens, limits__max_requests=requests)
    run = assemble(trace, own).run()
    assert sum(row.prefill_tokens for row in run.stages) == trace.prompt_tokens.sum()
    assert sum(row.decode_tokens for row in run.stages) == np.maximum(trace.output_tokens - 1, 0).sum()
    for each in run.requests:
        assert each.arrival_s <= each.start_s < each.first_s <= each.end_s
        assert each.done_output >= each.output_tokens
    starts = [row.start_s for row in run.stages]
    ends = [row.start_s + row.seconds for row in run.stages]
    assert all(end <= start + 1e-12 for end, start in zip(ends, starts[1:], strict=False)), "two stages at a time"
    assert max(row.running for row in run.stages) <= max(requests, 1)


@given(
    seed=st.integers(0, 999),
    capacity=st.sampled_from([0.3, 0.5, 0.8]),
    granularity=st.sampled_from(["layer-expert", "expert"]),
)
@settings(max_examples=15, deadline=None)
def test_the_cache_that_runs_is_the_cache_that_is_replayed(seed: int, capacity: float, granularity: str) -> None:
    """The live path (demand, transfers, release) and a plain replay of the same moments keep the same entries."""
    own = system(cache__capacity=capacity, cache__granularity=granularity)
    kept = simulate(made(seed=seed), own, seed)["kept_ratio"]
    assert kept["own"] == pytest.approx(kept["lru"])
    assert kept["lru"] <= kept["oracle"] + 1e-12
    assert kept["oracle"] <= kept["most"] + 1e-12


@given(seed=st.integers(0, 999), policy=st.sampled_from(["belady", "lru", "lfu", "fifo", "random", "predicted-set"]))
@settings(max_examples=30, deadline=None)
def test_no_policy_keeps_more_than_the_oracle(seed: int, policy: str) -> None:
    own = system(cache__policy=policy, cache__persist=True, predictor__kind="exact-pre-gate", predictor__lookahead=2)
    kept = simulate(made(seed=seed), own, seed)["kept_ratio"]
    assert kept["own"] <= kept["oracle"] + 1e-12
    assert kept["regret"] >= -1e-12


def test_blocks_share_bytes() -> None:
    trace = made(shared=0.5, seed=3)
    whole, blocks = (
        simulate(trace, system(cache__granularity=g, cache__capacity=60_000)) for g in ("layer-expert", "block")
    )
    assert blocks["all_bytes"] < whole["all_bytes"]
    assert blocks["bytes_per_token"] < whole["bytes_per_token"]


def test_a_layer_that_needs_more_than_the_cache_runs_in_waves() -> None:
    trace = made(rate=1e6, experts=8)
    result = simulate(trace, system(cache__capacity=1 / 8, limits__max_tokens=64))
    largest = max(trace.layout("layer-expert").bytes.values())
    assert result["capacity_bytes"] < 8 * largest  # less than a layer's experts
    assert result["experts_per_step"] > result["capacity_bytes"] // largest / 3


def test_a_slower_link_and_a_smaller_cache_never_help() -> None:
    trace = made(seed=5)
    seconds = {
        (device, share): simulate(trace, system(device=device, cache__capacity=share))["latency_s"]["ttft"]["mean"]
        for device in ("a100-pcie", "h100-pcie")
        for share in (0.4, 1.0)
    }  # fmt: skip
    assert seconds["h100-pcie", 0.4] <= seconds["a100-pcie", 0.4]
    assert seconds["a100-pcie", 1.0] <= seconds["a100-pcie", 0.4]


# -- the same bytes ----------------------------------------------------------------------------------------------------
def test_same_seed_same_bytes_in_another_process(tmp_path: Path) -> None:
    trace = tmp_path / "made.trace"
    made().save(trace)
    command = [
        sys.executable,
        "-m",
        "moesaic.cli.main",
        "simulate",
        str(trace),
        "--set",
        "cache.policy=random",
        "--json",
    ]
    said = [
        subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]
    own = read_system("read-me", {"cache.policy": "random"})
    assert said[0].decode() == dumps(simulate(Trace.load(trace), own))


def test_another_seed_is_another_run() -> None:
    own = system(cache__policy="random")
    assert dumps(simulate(made(), own, 0)) != dumps(simulate(made(), own, 1))


def test_measured_operator_times_slow_a_device_down(tmp_path: Path) -> None:
    """A GPU that was seen to reach a tenth of its peaks: experts take ten times as long, fetches as before."""
    rows = ["gpu,num_tokens,tensor_parallel,mlp_up_proj,mlp_down_proj"]
    for tokens in (1, 8, 64, 512, 4096):
        seconds = [
            10 * max(2 * tokens * a * b / 312e12, 2 * (a * b + tokens * (a + b)) / 1.935e12)
            for a, b in ((4096, 22016), (11008, 4096))
        ]
        rows.append(f"slow,{tokens},1,{seconds[0] * 1e3},{seconds[1] * 1e3}")
    (tmp_path / "times.csv").write_text("\n".join(rows))
    made().save(trace := tmp_path / "made.trace")
    command = ["simulate", str(trace), "--set", "cache.capacity=1.0", "--json"]
    plain = json.loads(CliRunner().invoke(app, command).stdout)
    slow = json.loads(
        CliRunner().invoke(app, [*command, "--op-times", str(tmp_path / "times.csv"), "--gpu", "slow"]).stdout
    )
    assert slow["latency_s"]["tpot"]["mean"] == pytest.approx(10 * plain["latency_s"]["tpot"]["mean"], rel=0.05)


# -- presets -----------------------------------------------------------------------------------------------------------
TRACES = {
    "sn40l-coe": {"known_at": "prompt", "stay": 1.0},
    "expertflow": {"route_layers": 3, "known_at": "gate"},
    "moesaic": {"shared": 0.3},
}
CLUSTER = {"parallel.devices": 4, "parallel.per_node": 2}


@pytest.mark.parametrize("name", system_names())
def test_every_preset_runs(name: str) -> None:
    trace = made(**({"experts": 8} | TRACES.get(name, {"route_layers": 3, "known_at": "gate"})))
    if name == "expertflow":
        trace = replace(trace, predicted=trace.routes)
    changes = CLUSTER if name in ("exflow", "deepspeed", "tutel") else {}
    result = simulate(trace, read_system(name, changes))
    assert result["tokens"]["run"] == (trace.prompt_tokens + np.maximum(trace.output_tokens - 1, 0)).sum()
    assert 0 < result["latency_s"]["end_to_end"]["p50"] < 60
    if name == "exflow":
        assert 0 < result["crossing_share"]["all"] < 1


def test_a_perfect_learned_predictor_is_the_pre_gate() -> None:
    trace = made()
    trace = replace(trace, predicted=trace.routes)
    learned, exact = (
        simulate(trace, system(cache__policy="predicted-set", predictor__kind=kind, predictor__lookahead=1))
        for kind in ("learned", "exact-pre-gate")
    )
    assert learned["recall"] == exact["recall"] == 1.0
    assert learned["kept_ratio"]["own"] == pytest.approx(exact["kept_ratio"]["own"])


def test_other_sizes_under_the_same_routes() -> None:
    trace = made(shared=0.25)
    large = at_size(trace, find_shape("llama-2-7b"))
    assert large.card.layers == 32
    assert np.array_equal(large.routes, trace.routes)
    widths = [sum(w for w, _ in row) for row in large.card.blocks or ()]
    assert max(widths) == pytest.approx(SHAPES["llama-2-7b"].ffn, rel=0.01)
    with pytest.raises(MoesaicError, match="has 8 experts, but the trace chooses among 5"):
        at_size(trace, find_shape("mixtral-8x7b"))


# -- sweeps ------------------------------------------------------------------------------------------------------------
AXES = {"cache.policy": ["lru", "belady"], "cache.capacity": [0.4, 0.8], "load": [0.8]}


def test_a_sweep_resumes_and_does_not_depend_on_jobs(tmp_path: Path) -> None:
    trace = tmp_path / "made.trace"
    made().save(trace)
    sweep = Sweep(trace, "read-me", AXES)
    first = run_sweep(sweep, tmp_path / "a")
    runs = sorted((tmp_path / "a" / "runs").glob("*.json"))
    assert len(runs) == 5  # four cells, and the saturation they share
    kept = {path: path.stat().st_mtime_ns for path in runs[1:]}
    runs[0].unlink()
    again = run_sweep(sweep, tmp_path / "a", jobs=2)
    assert json.dumps(again) == json.dumps(first)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.dumps(run_sweep(sweep, tmp_path / "b", jobs=2)) == json.dumps(first)


def test_cells_of_one_load_face_the_same_arrivals(tmp_path: Path) -> None:
    trace = tmp_path / "made.trace"
    made().save(trace)
    cells = run_sweep(Sweep(trace, "read-me", {"batcher.kind": ["decode-first", "adaptive"], "load": [0.5]}), tmp_path)
    rates = {result["requests"] for _, result in cells}
    assert rates == {12}


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache.polciy": "lru"}, r"unknown key 'cache.polciy': did you mean 'cache.policy'"),
        ({"cahce.policy": "lru"}, r"did you mean 'cache'"),
        ({"cache.policy": "beladi"}, r"unknown cache policy 'beladi': did you mean 'belady'"),
        ({"batcher.kind": "adaptve"}, r"did you mean 'adaptive'"),
        ({"device": "a100-pci"}, r"did you mean 'a100-pcie'"),
        ({"limits.max_tokens": 0}, r"at least one token"),
        ({"limits.max_tokens": "many"}, r"limits.max_tokens is 'many'; expected int"),
        ({"cache": 3}, r"expected a table"),
    ],
)
def test_a_system_with_a_slip_names_the_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MoesaicError, match=words):
        read_system("read-me", changes)


def test_a_file_with_a_slip_names_the_key(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"device": "h200", "cache": {"capcity": 0.5}}))
    with pytest.raises(MoesaicError, match=r"own.yaml: unknown key 'cache.capcity': did you mean 'cache.capacity'"):
        read_system(str(path))
    path.write_text("cache: [")
    with pytest.raises(MoesaicError, match="cannot be read as YAML"):
        read_system(str(path))
    with pytest.raises(MoesaicError, match="did you mean 'read-me'"):
        read_system("readme")


def test_a_capacity_below_one_expert_says_the_minimum() -> None:
    trace = made()
    need = max(trace.layout("layer-expert").bytes.values())
    with pytest.raises(MoesaicError, match=f"give it at least {need} bytes"):
        simulate(trace, system(cache__capacity=float(need - 1)))


@pytest.mark.parametrize("value", ["8 apples", 0, -1, "GiB", "1.2.3GB"])
def test_sizes_that_are_none(value: Any) -> None:
    with pytest.raises(MoesaicError, match="expected bytes such as 8GiB"):
        size(value, 100)


@pytest.mark.parametrize("value", ["1e400", "1e308GiB", "1e400GB/s", float("inf"), float("nan")])
def test_sizes_are_finite(value: Any) -> None:
    with pytest.raises(MoesaicError, match="expected bytes such as 8GiB"):
        size(value)


def test_sizes() -> None:
    assert [size(v, 1000) for v in (0.5, 1, 1.0, "8KiB", "2e3", 2000, "25GB/s")] == [
        500,
        1000,
        1000,
        8192,
        2000,
        2000,
        25 * 10**9,
    ]


def test_axes() -> None:
    assert read_axes(["cache.capacity=0.5,8GiB", "seed=1"]) == {"cache.capacity": [0.5, "8GiB"], "seed": [1]}
    for wrong in (["cache.capacity"], ["=1"], ["seed=1", "seed=2"]):
        with pytest.raises(MoesaicError, match="axis"):
            read_axes(wrong)


def test_the_learned_predictor_needs_its_answers() -> None:
    with pytest.raises(MoesaicError, match="trace with its answers"):
        simulate(made(), read_system("expertflow"))


def test_the_report_has_what_is_promised() -> None:
    simulator = assemble(made(), own := system())
    result = report(simulator, simulator.run(), own, 0)
    assert {"hit_ratio", "bytes_per_token", "stall_share", "experts_per_step", "crossing_share", "latency_s"} <= set(
        result
    )
    assert {"ttft", "tpot", "end_to_end", "normalised"} == set(result["latency_s"])
    json.loads(dumps(result))
