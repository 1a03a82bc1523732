"""The advisor: eight machines and traces with the methods it must propose, its numbers by hand, and bad input."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moesaic.cli.main import app
from moesaic.errors import MoesaicError
from moesaic.schedule.card import Card
from moesaic.schedule.synthetic import Synthetic, synthesize
from moesaic.schedule.trace import Trace
from moesaic.simulate import advise as advisor
from moesaic.simulate.advise import advise
from moesaic.simulate.advise_facts import (
    Ask,
    backbone_bytes,
    budget_of,
    head,
    held_bytes,
    machine_of,
    model_of,
    routes_of,
)
from moesaic.simulate.advise_rules import RULES, Facts, base, combine, methods, propose
from moesaic.simulate.report import dumps
from moesaic.simulate.simulator import Limits
from moesaic.simulate.system import System, build

SMALL = Limits(64, 8)
GATE: dict[str, Any] = {"known_at": "gate", "route_layers": 3}


def made(**options: Any) -> Trace:
    """A tiny trace; its backbone has 33 MiB, most of it embedding and head."""
    tiny = {"requests": 16, "rate": 50.0, "prompt": 16, "output": 8, "layers": 3, "experts": 8, "d": 256, "ffn": 512}
    return synthesize(Synthetic(**{**tiny, **options}))


def predicted(trace: Trace) -> Trace:
    """With the answers of a predictor that is always right."""
    return replace(trace, predicted=trace.routes)


def scenarios() -> dict[str, tuple[Trace, Ask, str, set[str], set[str]]]:
    """Name -> trace, machine, model, what must be ranked and what must be listed."""
    quantised = {"quantise-8-bit", "quantise-4-bit"}
    return {
        "laptop": (
            made(shared=0.3, stay=0.7, layers=16, d=512, ffn=1024, requests=8),
            Ask("cpu-box", "16GiB", "2GB/s", limits=SMALL),
            "llama-3.2-1b",
            {"all-resident"},
            set(),
        ),
        "one 24 GB card": (
            made(layers=32, stay=0.9, requests=6),
            Ask("a100-pcie", "24GB", "25GB/s", limits=SMALL),
            "llama-2-7b",
            {"lru", "belady-known", "persist", "regroup", *quantised},
            set(),
        ),
        "one node": (
            made(**GATE, experts=16, k=2, skew=1.0),
            Ask("2x8-a100-ib", devices=8, limits=SMALL),
            "trace",
            {"expert-parallel", "adaptive-degree"},
            set(),
        ),
        "two nodes": (
            made(**GATE, experts=16, sharpness=0.02),
            Ask("2x8-a100-ib", limits=SMALL),
            "trace",
            {"expert-parallel", "adaptive-degree", "affinity-placement", "hierarchical-exchange"},
            set(),
        ),
        "edge": (
            made(shared=0.3, stay=0.2, ffn=4096),
            Ask("cpu-box", "42MiB", "200MB/s", limits=SMALL),
            "trace",
            {"lru", "belady-known", "blocks", "adaptive-batcher", "regroup", *quantised},
            set(),
        ),
        "pool of whole models": (
            made(known_at="prompt", stay=1.0, experts=12),
            Ask("sn40l-node", "40MiB", limits=SMALL),
            "trace",
            {"lru", "belady-known", "prompt-grouping"},
            set(),
        ),
        "low entropy": (
            made(**GATE, skew=2.0, stay=0.8, sharpness=0.02, experts=20),
            Ask("a100-pcie", "36MiB", "1GB/s", limits=SMALL),
            "trace",
            {"lru", "pinned", "persist", "markov-prefetch", *quantised},
            {"merge-experts"},
        ),
        "uniform": (
            made(**GATE, stay=0.0, requests=24),
            Ask("a100-pcie", "40MiB", limits=SMALL),
            "trace",
            {"lru", *quantised},
            set(),
        ),
    }


@pytest.fixture(scope="module")
def answers() -> dict[str, dict[str, Any]]:
    return {name: advise(trace, ask, model) for name, (trace, ask, model, *_) in scenarios().items()}


@pytest.mark.parametrize("name", list(scenarios()))
def test_scenario(name: str, answers: dict[str, dict[str, Any]]) -> None:
    answer, (*_, ranked, listed) = answers[name], scenarios()[name]
    assert {row["id"] for row in answer["ranked"] if row["rule"] != "helped-alone"} == ranked
    assert {row["id"] for row in answer["listed"]} == listed
    for row in (*answer["ranked"], *answer["listed"]):
        assert row["rule"] in RULES or row["rule"] == "helped-alone"
        assert row["reason"] and row["numbers"] and row["paper"]
        assert all(isinstance(value, int | float | str) for value in row["numbers"].values())
        assert row["level"] in ("model", "system", "hardware")
    assert all(row["why_not"] for row in answer["listed"])
    assert all("result" not in row for row in answer["listed"])
    p95 = [row["result"]["e2e_p95_s"] for row in answer["ranked"]]
    assert p95 == sorted(p95) and p95[0] > 0
    assert answer["bytes"]["fits"] == (answer["bytes"]["need_bytes"] <= answer["bytes"]["memory_bytes"])
    fits = ("laptop", "one node", "two nodes")
    assert answer["bytes"]["fits"] == (name in fits)


def test_bounds_that_bind(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["uniform"]["bound"]["plain"] == answers["edge"]["bound"]["plain"] == "link"
    assert answers["two nodes"]["bound"]["plain"] == "exchange"
    plain = answers["uniform"]["plain_run"]
    assert plain["link_needed"] > plain["link_there"]
    numbers = {"link_needed": 1.0, "link_there": 2.0, "collective_share": 0.1, "busy_share": 0.99}
    assert advisor.bound(numbers, True) == "compute"
    assert advisor.bound({**numbers, "busy_share": 0.5}, True) == "nothing"
    assert advisor.bound({**numbers, "busy_share": 0.5}, False) == "memory"


def test_answer_is_the_same_bytes_again(answers: dict[str, dict[str, Any]]) -> None:
    for name in ("edge", "two nodes"):
        trace, ask, model, *_ = scenarios()[name]
        assert dumps(advise(trace, ask, model)) == dumps(answers[name])


def test_wish_is_met_first_then_bytes_count(answers: dict[str, dict[str, Any]]) -> None:
    trace, ask, model, *_ = scenarios()["edge"]
    by_time = [row["result"]["e2e_p95_s"] for row in answers["edge"]["ranked"]]
    slo = (by_time[2] + by_time[3]) / 2
    rows = advise(trace, replace(ask, slo=slo), model)["ranked"]
    late = [row["result"]["e2e_p95_s"] > slo for row in rows]
    moved = [row["result"]["bytes_per_token"] for row in rows if row["result"]["e2e_p95_s"] <= slo]
    assert late == sorted(late) and late.count(False) == len(moved) == 3
    assert moved == sorted(moved)


def test_combination_keeps_what_helped(answers: dict[str, dict[str, Any]]) -> None:
    rows = {row["id"]: row for row in answers["edge"]["ranked"]}
    (together,) = (row for row in rows.values() if row["rule"] == "helped-alone")
    under, *parts = together["id"].split(" + ")
    assert under == "belady-known" and "blocks" in parts and len(parts) >= 2
    for part in parts:
        assert methods()[part].part
        assert rows[part]["result"]["e2e_p95_s"] < advisor.HELPS * rows[under]["result"]["e2e_p95_s"]


def test_parts_that_set_one_key_differently_are_not_combined() -> None:
    under = {"cache.policy": "belady", "predictor.kind": "exact-pre-gate"}
    one, other, third = ({**under, **changes} for changes in ({"b": 1}, {"b": 2, "c": 3}, {"c": 4}))
    names, merged = combine(under, {"one": one, "other": other, "third": third})
    assert names == ["one", "third"]
    assert merged == {**under, "b": 1, "c": 4}


def test_registry_is_whole() -> None:
    for name, method in methods().items():
        values: dict[str, Any] = {}
        for key, value in method.changes.items():
            table, option = key.split(".")
            values.setdefault(table, {})[option] = value
        assert build(System, values), name
        assert method.level in ("model", "system", "hardware")
        assert method.changes_output in ("no", "approx", "yes")


def test_two_units_and_a_predictor() -> None:
    two = advise(made(**GATE), Ask("h100+logic-pim", devices=1, limits=SMALL))
    assert {row["id"] for row in two["ranked"]} == {"all-resident", "duplex-split"}
    learned = advise(predicted(made(**GATE, stay=0.0)), Ask("a100-pcie", "40MiB", limits=SMALL))
    assert {row["id"] for row in learned["ranked"]} == {"lru", "predicted-set", "quantise-8-bit", "quantise-4-bit"}


def test_every_method_is_proposed_somewhere(answers: dict[str, dict[str, Any]]) -> None:
    seen = {row["id"] for answer in answers.values() for row in (*answer["ranked"], *answer["listed"])}
    assert methods().keys() - seen == {"predicted-set", "duplex-split"}  # the test above has these


def test_devices_without_room_are_listed_not_ranked() -> None:
    """Offloading on several devices cannot be simulated; experts in 4 bits fit."""
    answer = advise(made(**GATE, experts=16, k=2), Ask("2x8-a100-ib", "36MiB", devices=8, limits=SMALL))
    assert not answer["bytes"]["fits"] and answer["plain_run"] is None and answer["bound"]["plain"] is None
    assert {row["id"] for row in answer["ranked"]} == {"quantise-4-bit", "quantise-8-bit"}
    assert "expert-parallel" in {row["id"] for row in answer["listed"]}


# -- numbers by hand ---------------------------------------------------------------------------------------------------
def test_bytes() -> None:
    trace = made(prompt=10, prompt_sigma=0, output=5, output_sigma=0)
    card = trace.card
    experts = 3 * 8 * 3 * 256 * 512 * 2
    backbone = 2 * (3 * (4 * 256 * 256 + 256 * 8) + 2 * 256 * 32_000)
    kv = 8 * (10 + 4) * 3 * 2 * 256 * 2  # 8 requests; layers, keys and values, width, bytes
    budget = budget_of(trace, machine_of(Ask(memory="1GiB")), SMALL)
    assert (budget.memory, budget.backbone, budget.kv, budget.experts) == (2**30, backbone, kv, experts)
    assert (budget.held, budget.step, budget.need) == (experts, experts // 24, backbone + kv + experts)
    assert budget_of(trace, machine_of(Ask()), SMALL, 0.5).experts == experts // 4
    assert backbone_bytes(card) == backbone
    assert held_bytes(card, 3) == experts * 3 // 8
    assert held_bytes(card, 16) == experts // 16


def test_shared_channels_are_held_by_every_device_that_needs_them() -> None:
    blocks = (((6, (0, 1, 2, 3)), (2, (0,)), (3, (1, 2))),)
    card = Card("x", 1, 4, 1, "gate", 8, 16, 1, 1, 8, 10, blocks=blocks)
    channel = 3 * 8 * 2
    assert held_bytes(card, 1) == 11 * channel
    assert held_bytes(card, 2) == (6 + 2 + 3) * channel  # experts 0 and 1
    assert held_bytes(card, 4) == 9 * channel  # experts 1 or 2
    assert held_bytes(card, 8) == -(-9 * channel // 2)


def test_routes_by_hand() -> None:
    """Two layers; the second follows the first for certain, experts 0 and 1 alternate, 2 and 3 are idle."""
    trace = made(layers=2, route_layers=2, experts=4, known_at="gate")
    first = np.arange(len(trace.routes)) % 2
    routes = routes_of(replace(trace, routes=np.stack([first, 1 - first], 1)[:, :, None]))
    assert routes["least_half"] == 0
    assert routes["imbalance"] == pytest.approx(2.0, rel=0.1)
    assert routes["alone_bits"] == pytest.approx(1.0, abs=0.05)
    assert routes["transition_bits"] < 0.05
    assert routes["stay"] == 0
    assert routes_of(made())["transition_bits"] is None


def test_random_routes_do_not_look_predictable() -> None:
    """Each pair of 64 experts was hardly ever seen: counting on the same rows would find structure."""
    routes = routes_of(made(**GATE, experts=64, stay=0.0, requests=4))
    assert routes["transition_ratio"] > 0.98


def test_quantised_experts_leave_the_backbone_as_it_is() -> None:
    trace = made(stay=0.0)
    ask = Ask("cpu-box", limits=SMALL)
    facts = Facts(trace, machine_of(ask), ask, budget_of(trace, machine_of(ask), SMALL), {}, "one device")
    changes = {"cache.policy": "all-resident", "cache.capacity": 1.0}
    runs = [advisor.run_option(facts, "x", changes, bits) for bits in (None, 1.0)]
    (plain, plain_run), (half, half_run) = runs
    assert half["all_bytes"] * 2 == plain["all_bytes"]
    assert half_run.stages[0].attention_s == plain_run.stages[0].attention_s
    decode = [(a, b) for a, b in zip(plain_run.stages, half_run.stages, strict=False) if not a.prefill_tokens]
    assert decode and half["experts_share"] < plain["experts_share"]


def test_machine_takes_memory_and_link() -> None:
    machine = machine_of(Ask("cpu-box", "3GiB", "5GB/s"))
    assert machine.tier("ram").capacity == 3 * 2**30 and machine.links[0].bandwidth == 5e9
    assert machine.tier("disk").capacity == machine_of(Ask("cpu-box")).tier("disk").capacity
    several = machine_of(Ask(devices=4))
    assert (several.devices, several.per_node, several.inter) == (4, 4, machine_of(Ask("2x8-a100-ib")).inter)


def test_head_keeps_within_the_events() -> None:
    trace = made(prompt_sigma=0, output_sigma=0, prompt=16, output=9)
    calls = 3 * (8 + 8)  # layers; experts of the prompt, decode tokens
    assert head(trace, 5 * calls, SMALL).requests == 5
    assert head(trace, 1, SMALL).requests == 2
    assert head(trace, 10**9, SMALL).requests == trace.requests


def test_base_knows_as_much_as_the_trace_allows() -> None:
    ask = Ask(memory="40MiB", limits=SMALL)

    def of(trace: Trace) -> tuple[str, dict[str, Any]]:
        machine = machine_of(ask)
        return base(Facts(trace, machine, ask, budget_of(trace, machine, SMALL), {}, "one device"))

    assert of(made(known_at="prompt"))[1]["predictor.kind"] == "prompt-router"
    assert of(made())[1]["predictor.kind"] == "exact-pre-gate"
    assert of(predicted(made(**GATE)))[0] == "predicted-set"
    assert of(made(**GATE))[0] == "lru"


def test_rules_alone_propose_nothing_for_a_machine_with_room() -> None:
    trace, ask = made(), Ask(limits=SMALL)
    machine = machine_of(ask)
    facts = Facts(trace, machine, ask, budget_of(trace, machine, SMALL), routes_of(trace), "one device")
    assert [proposal.method for proposal in propose(facts)] == ["all-resident"]


# -- bad input ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ask", "model", "says"),
    [
        (Ask("h20"), "trace", "h200"),
        (Ask(link="0GB/s"), "trace", "zero-bandwidth"),
        (Ask(link=0.0), "trace", "zero-bandwidth"),
        (Ask(link="fast"), "trace", "fast"),
        (Ask("a100-pcie", devices=2), "trace", "2x8-a100-ib"),
        (Ask(devices=12), "trace", "12 devices"),
        (Ask(), "mixtral-8x7", "mixtral-8x7b"),
        (Ask(), "mixtral-8x7b", "2 experts a token"),
        (Ask(), "olmoe-1b-7b", "8 experts a token"),
    ],
)
def test_unknown_names_and_mismatches(ask: Ask, model: str, says: str) -> None:
    with pytest.raises(MoesaicError, match=says):
        advise(made(), ask, model)


def test_wishes_that_make_no_sense() -> None:
    for wrong in ({"slo": 0.0}, {"slo": math.nan}, {"events": 0}):
        with pytest.raises(MoesaicError, match=next(iter(wrong))):
            Ask(**wrong)  # type: ignore[arg-type]


def test_too_little_memory_says_the_least_that_runs() -> None:
    trace = made()
    with pytest.raises(MoesaicError, match="below the minimum") as error:
        advise(trace, Ask(memory="33MiB", limits=SMALL))
    least = int(str(error.value).split("(")[1].split(" bytes")[0])
    with pytest.raises(MoesaicError, match="below the minimum"):
        advise(trace, Ask(memory=least - 1, limits=SMALL))
    assert advise(trace, Ask(memory=least, limits=SMALL))["ranked"]


def test_slow_memory_must_hold_the_experts() -> None:
    trace = made(layers=32, requests=2)
    big = replace(trace, card=replace(trace.card, d=4096, ffn=400_000))
    with pytest.raises(MoesaicError, match="than the disk of cpu-box holds"):
        advise(big, Ask("cpu-box", limits=SMALL))


def test_checkpoint_of_ours(tmp_path: Path) -> None:
    trace = made()
    config = {"model_type": "moesaic", "layouts": [[]] * 3, "expert_names": list("abcdefgh")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_of(trace, str(tmp_path)) is trace
    (tmp_path / "config.json").write_text(json.dumps({**config, "layouts": [[]]}))
    with pytest.raises(MoesaicError, match="1 layers and 8 experts, but the trace"):
        model_of(trace, str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(MoesaicError, match="no JSON"):
        model_of(trace, str(tmp_path))


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    made(shared=0.3, requests=6, ffn=4096).save(path)
    call = ["advise", "trace", "--trace", str(path), "--memory", "42MiB", "--link", "1GB/s", "--max-requests", "4"]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, shown.output
    assert (
        "does not fit" in shown.stdout and "belady-known" in shown.stdout and "binds without any method" in shown.stdout
    )
    answer = json.loads(CliRunner().invoke(app, [*call, "--json"]).stdout)
    assert answer["machine"]["memory_bytes"] == 42 * 2**20 and answer["limits"]["max_requests"] == 4
    missing = CliRunner().invoke(app, ["advise", "trace"])
    assert isinstance(missing.exception, MoesaicError) and "moesaic trace record" in str(missing.exception)
