"""The learned route predictor: it learns, sees no later token, is measured against a slow twin, and fills a trace."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesaic.analyze.route_predictor import (
    CONFIG,
    FitConfig,
    RoutePredictor,
    RoutePredictorConfig,
    annotate,
    answers,
    cross_annotate,
    fit,
    route_loss,
)
from moesaic.analyze.route_recall import measure
from moesaic.analyze.route_sequences import TokenRows, folds, groups, popularity, sequences, split, token_ids
from moesaic.cli.main import app
from moesaic.errors import MoesaicError
from moesaic.schedule.synthetic import Synthetic, synthesize
from moesaic.schedule.trace import EMPTY, Card, Trace
from moesaic.simulate.sweep import simulate
from moesaic.simulate.system import read_system

V, E, L, K = 24, 8, 2, 2
CARD = Card("m", layers=L, experts=E, top_k=K, known_at="gate", d=8, ffn=16, heads=2, kv_heads=1, head_dim=4, vocab=V)
SIZES = {"width": 8, "hidden": 32}


def made(requests: int = 40, prompt: int = 6, output: int = 11, seed: int = 0) -> Trace:
    """Each token's experts are a fixed function of its id and the id before (0 at the start)."""
    rng, rows = np.random.default_rng(seed), prompt + output - 1
    table = np.argsort(np.random.default_rng(7).random((L, V, 3, E)), axis=-1)[..., :K]
    ids = rng.integers(0, V, (requests, rows))
    before = np.concatenate((np.zeros((requests, 1), int), ids[:, :-1]), 1) % 3
    start = np.arange(requests) * rows
    return Trace(
        arrival_s=np.zeros(requests),
        prompt_tokens=[prompt] * requests,
        output_tokens=[output] * requests,
        routes=table[:, ids, before].transpose(1, 2, 0, 3).reshape(-1, L, K),
        prompt_row=start,
        prompt_rows=[prompt] * requests,
        decode_row=start + prompt,
        decode_rows=[output - 1] * requests,
        card=CARD,
        token_ids=ids.flatten(),
    )


def untrained(mixer: str, **sizes: Any) -> RoutePredictor:
    torch.manual_seed(0)
    return RoutePredictor(RoutePredictorConfig(vocab=V, layers=L, experts=E, mixer=mixer, **{**SIZES, **sizes})).eval()


@pytest.fixture(scope="module")
def trace() -> Trace:
    return made(requests=160)


@pytest.fixture(scope="module")
def parts(trace: Trace) -> tuple[Any, Any]:
    return split(trace, 0.25)


@pytest.fixture(scope="module")
def fitted(trace: Trace, parts: tuple[Any, Any]) -> tuple[RoutePredictor, list[dict[str, float]]]:
    return fit(trace, *parts, FitConfig(steps=400, lr=2e-2, sizes=SIZES))


# -- learning ----------------------------------------------------------------------------------------------------------
def test_it_learns_what_the_baselines_cannot(trace: Trace, parts: Any, fitted: Any) -> None:
    model, history = fitted
    assert len(history) == 10 and history[-1]["step"] == 400
    assert history[-1]["held_out"] < 0.5 * history[0]["held_out"]
    found = measure(model, trace, *parts, batches=(4, 8), draws=64)
    for part in ("prompt", "decode"):
        recalls = {name: row[part]["recall@k"] for name, row in found["token"].items()}
        assert recalls["learned"] > 0.9
        assert recalls["learned"] > recalls["token id"] + 0.15  # the id alone leaves out the token before
        for name in ("previous token", "previous layer", "popularity"):
            assert recalls["token id"] > recalls[name] + 0.1
    row = found["batch"]["8"]
    assert row["learned"]["recall"] > 0.9 > row["previous token"]["recall"]
    assert row["learned"]["recall"] > row["popularity, as many"]["recall"]
    assert row["learned, p >= 0.5"]["recall"] > 0.8
    assert json.loads(json.dumps(found)) == found


def test_a_fit_is_reproducible_and_leaves_the_generator(trace: Trace, parts: Any) -> None:
    state = torch.get_rng_state()
    config = FitConfig(steps=3, sizes=SIZES)
    one, two = fit(trace, *parts, config), fit(trace, *parts, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert one[1] == two[1] and torch.equal(one[0].heads.weight, two[0].heads.weight)
    assert fit(trace, *parts, replace(config, seed=1))[1] != one[1]


def test_it_starts_at_popularity(trace: Trace, parts: Any) -> None:
    model, _ = fit(trace, *parts, FitConfig(steps=1, lr=1e-9, sizes=SIZES))
    expected = popularity(trace, sequences(trace, parts[0]))
    assert torch.allclose(model.heads.bias.sigmoid().view(L, E), expected, atol=1e-4)


@pytest.mark.parametrize("mixer", ["gru", "t5"])
def test_every_parameter_gets_a_gradient(trace: Trace, mixer: str) -> None:
    model = untrained(mixer)
    route_loss(model, trace, token_ids(trace), sequences(trace)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_loss_is_the_mean_binary_cross_entropy(trace: Trace) -> None:
    model, batch = untrained("gru"), [TokenRows(np.arange(5), 5), TokenRows(np.arange(20, 23), 0)]
    found = dict(answers(model, trace, batch))
    terms = []
    for i, sequence in enumerate(batch):
        for row, p in zip(sequence.rows, found[i].sigmoid().double(), strict=True):
            for layer in range(L):
                used = set(trace.routes[row, layer].tolist())
                terms += [-np.log(float(p[layer, e] if e in used else 1 - p[layer, e])) for e in range(E)]
    assert float(route_loss(model, trace, token_ids(trace), batch).detach()) == pytest.approx(np.mean(terms), rel=1e-5)


# -- what it may see ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mixer", "prompt"), [("gru", 0), ("gru", 6), ("t5", 0), ("t5", 6)])
def test_no_later_token_is_seen(mixer: str, prompt: int) -> None:
    model, ids = untrained(mixer), torch.randint(0, V, (1, 12), generator=torch.Generator().manual_seed(1))
    before = model(ids, torch.tensor([prompt]))[0]
    for place in range(12):
        changed = ids.clone()
        changed[0, place] = (ids[0, place] + 1) % V
        after = model(changed, torch.tensor([prompt]))[0]
        moved = (after - before).abs().amax((1, 2)) > 1e-6
        first = 0 if mixer == "t5" and place < prompt else place
        assert not moved[:first].any()
        assert moved[first:].all()  # what may be seen is


@pytest.mark.parametrize("mixer", ["gru", "t5"])
def test_padding_changes_nothing(trace: Trace, mixer: str) -> None:
    model = untrained(mixer)
    chosen = [TokenRows(np.arange(16), 6), TokenRows(np.arange(16, 21), 3), TokenRows(np.arange(32, 33), 1)]
    together = dict(answers(model, trace, chosen))
    for i, sequence in enumerate(chosen):
        [(_, alone)] = answers(model, trace, [sequence])
        assert torch.allclose(together[i], alone, atol=1e-5)


# -- measures ----------------------------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 5))
def test_recall_against_sets(seed: int, size: int) -> None:
    """One decode row per sequence and batches of all sequences: every draw is the same union."""
    trace = made(requests=5 + size, prompt=2, output=2, seed=seed)
    train, held_out = np.arange(5), np.arange(5, 5 + size)
    model = untrained("gru")
    found = measure(model, trace, train, held_out, batches=(size,), draws=3)
    chosen = sequences(trace, held_out)
    logits = dict(answers(model, trace, chosen))
    needed: list[set[int]] = [set() for _ in range(L)]
    guess: list[set[int]] = [set() for _ in range(L)]
    last: list[set[int]] = [set() for _ in range(L)]
    for i, sequence in enumerate(chosen):
        for layer in range(L):
            needed[layer] |= set(trace.routes[sequence.rows[-1], layer].tolist())
            last[layer] |= set(trace.routes[sequence.rows[-2], layer].tolist())
            guess[layer] |= set(logits[i][-1, layer].topk(K).indices.tolist())
    row = found["batch"][str(size)]
    assert row["needed"] == pytest.approx(np.mean([len(each) for each in needed]))
    for name, sets in (("learned", guess), ("previous token", last)):
        both = [len(n & g) for n, g in zip(needed, sets, strict=True)]
        recalls = [b / len(n) for b, n in zip(both, needed, strict=True)]
        assert row[name]["recall"] == pytest.approx(np.mean(recalls))
        assert row[name]["precision"] == pytest.approx(sum(both) / sum(len(each) for each in sets))
        assert row[name]["predicted"] == pytest.approx(np.mean([len(each) for each in sets]))
    assert row["popularity, as many"]["predicted"] == row["learned"]["predicted"]


def test_a_routed_layer_that_holds_everywhere_has_no_layer_before(trace: Trace, parts: Any) -> None:
    single = replace(trace, routes=trace.routes[:, :1])
    model, _ = fit(single, *parts, FitConfig(steps=2, sizes=SIZES))
    found = measure(model, single, *parts, batches=(4,), draws=4)
    assert "previous layer" not in found["token"] and "previous token" in found["token"]


def test_batches_need_as_many_sequences(trace: Trace, parts: Any, fitted: Any) -> None:
    with pytest.raises(MoesaicError, match=r"batch of 41 decode rows .* 40 held-out sequences"):
        measure(fitted[0], trace, *parts, batches=(41,))


# -- sequences and divisions -------------------------------------------------------------------------------------------
def shared() -> Trace:
    """Requests 0 and 2 share decode rows, 2 and 4 prompt rows, 1 and 3 stand alone."""
    base = made(requests=5)
    prompt_row, decode_row, decode_rows = base.prompt_row.copy(), base.decode_row.copy(), base.decode_rows.copy()
    decode_row[2], decode_rows[2] = decode_row[0], 4
    prompt_row[4] = prompt_row[2]
    return replace(base, prompt_row=prompt_row, decode_row=decode_row, decode_rows=decode_rows)


def test_groups_join_what_shares_rows() -> None:
    group = groups(shared())
    assert group[0] == group[2] == group[4]
    assert len({group[0], group[1], group[3]}) == 3


def test_shared_sequences_come_once() -> None:
    trace = made(requests=3)
    twice = replace(trace, prompt_row=[0, 0, 16], decode_row=[6, 6, 22], decode_rows=[10, 4, 10])
    assert [(each.rows.tolist(), each.prompt) for each in sequences(twice)] == [
        (list(range(16)), 6),
        (list(range(16, 32)), 6),
    ]
    assert [each.rows.tolist() for each in sequences(twice, [1])] == [list(range(10))]


@settings(max_examples=50, deadline=None)
@given(
    starts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=2, max_size=12), seed=st.integers(0, 9)
)
def test_divisions_share_no_row(starts: list[tuple[int, int]], seed: int) -> None:
    base = made(requests=len(starts), prompt=2, output=3)
    routes, ids = np.resize(base.routes, (40, L, K)), np.resize(base.token_ids, 40)
    prompt_row, decode_row = zip(*starts, strict=True)
    trace = replace(base, routes=routes, token_ids=ids, prompt_row=prompt_row, decode_row=decode_row)
    rows = [{p, p + 1, d, d + 1} for p, d in starts]
    slow = list(range(len(rows)))  # the smallest request that can be reached over shared rows
    for _ in rows:
        slow = [min(slow[b] for b in range(len(rows)) if rows[a] & rows[b]) for a in range(len(rows))]
    group = groups(trace)
    assert [[a == b for b in slow] for a in slow] == (group[:, None] == group).tolist()
    if len(set(slow)) < 2:
        with pytest.raises(MoesaicError, match="share rows"):
            split(trace, 0.3, seed)
        return
    for division in (split(trace, 0.3, seed), folds(trace, 2, seed)):
        assert sorted(np.concatenate(division).tolist()) == list(range(len(rows)))
        one, two = (set().union(*(rows[r] for r in part)) for part in division)
        assert one and two and not one & two


# -- answers in a trace ------------------------------------------------------------------------------------------------
def test_annotate_orders_by_probability(trace: Trace, fitted: Any) -> None:
    done = annotate(fitted[0], trace, 4)
    assert done.predicted is not None and done.predicted.shape == (len(trace.routes), L, 4)
    chosen = sequences(trace)
    for i, logits in answers(fitted[0], trace, chosen):
        own = torch.from_numpy(done.predicted[chosen[i].rows].astype(np.int64))
        values = logits.gather(-1, own)
        assert (values[..., :-1] >= values[..., 1:]).all()
        assert torch.equal(values, logits.sort(-1, descending=True).values[..., :4])
    kept = annotate(fitted[0], done, 4, [3])
    assert np.array_equal(kept.predicted, done.predicted)  # the others keep theirs
    only = annotate(fitted[0], trace, 4, [3])
    assert (only.predicted != EMPTY).all((1, 2)).nonzero()[0].tolist() == list(range(48, 64))


def test_cross_annotate_answers_unseen_requests(trace: Trace) -> None:
    config = FitConfig(steps=150, lr=2e-2, sizes=SIZES)
    done = cross_annotate(trace, K, 2, config)
    part = folds(trace, 2, config.seed)[0]
    model, _ = fit(trace, np.setdiff1d(np.arange(trace.requests), part), part, config)
    alone = annotate(model, trace, K, part)
    mine = (alone.predicted != EMPTY).all((1, 2))
    assert mine.sum() == len(part) * 16
    assert np.array_equal(done.predicted[mine], alone.predicted[mine])
    hits = (done.predicted[..., None] == trace.routes[..., None, :]).any(-1).mean()
    assert hits > 0.6 and (done.predicted != EMPTY).all()


def test_the_command_makes_a_trace_that_expertflow_runs_on(tmp_path: Path, trace: Trace) -> None:
    trace.save(path := tmp_path / "plain.trace")
    common = [
        "trace",
        "predict",
        str(path),
        "--out",
        str(out := tmp_path / "predicted.trace"),
        "--steps",
        "30",
        "--json",
    ]
    said = CliRunner().invoke(app, common)
    assert said.exit_code == 0, said.output
    predicted = Trace.load(out)
    assert predicted.predicted is not None and predicted.predicted.shape == (*trace.routes.shape[:2], 2 * K)
    assert np.array_equal(predicted.routes, trace.routes)
    result = simulate(predicted, read_system("expertflow", {"limits.max_tokens": 8}))
    assert 0.3 < result["recall"] <= 1  # two of eight experts at random: less than that, for single tokens


# -- files -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mixer", ["gru", "t5"])
def test_saved_and_loaded_is_the_same(tmp_path: Path, trace: Trace, mixer: str) -> None:
    model = untrained(mixer)
    model.save(tmp_path / "p")
    again = RoutePredictor.load(tmp_path / "p")
    assert again.config == model.config and again.parameter_count == model.parameter_count
    for (_, one), (_, two) in zip(
        answers(model, trace, sequences(trace)), answers(again, trace, sequences(trace)), strict=True
    ):
        assert torch.equal(one, two)


def test_a_damaged_predictor_is_named(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="no route predictor"):
        RoutePredictor.load(tmp_path)
    untrained("gru").save(tmp_path / "p")
    path = tmp_path / "p" / CONFIG
    good = json.loads(path.read_text())
    for change, message in (
        ({"format": "other/1"}, "has the format 'other/1'"),
        ({"experts": E + 1}, "does not fit"),
        ({"colour": 1}, "does not describe"),
        ({"mixer": "gruu"}, "did you mean 'gru'"),
        ({"width": "wide"}, "does not describe"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(MoesaicError, match=message):
            RoutePredictor.load(tmp_path / "p")
    path.write_text("[1")
    with pytest.raises(MoesaicError, match="does not describe"):
        RoutePredictor.load(tmp_path / "p")


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_bad_input(trace: Trace, parts: Any, fitted: Any) -> None:
    model, few = fitted[0], FitConfig(steps=1, sizes=SIZES)
    with pytest.raises(MoesaicError, match=r"no token_ids.*moesaic trace record"):
        fit(synthesize(Synthetic(requests=4)), [0, 1], [2], few)
    with pytest.raises(MoesaicError, match="no token_ids"):
        annotate(model, replace(trace, token_ids=None), 2)
    with pytest.raises(MoesaicError, match="row 0 holds token 99, expected 0 to 23"):
        fit(replace(trace, token_ids=np.full(len(trace.routes), 99)), *parts, few)
    with pytest.raises(MoesaicError, match="held-out request 2 shares rows"):
        fit(shared(), [0, 1], [3, 2], few)
    with pytest.raises(MoesaicError, match="no requests"):
        fit(trace, [0], [], few)
    with pytest.raises(MoesaicError, match="9 predicted experts per layer, expected 1 to 8"):
        annotate(model, trace, 9)
    with pytest.raises(MoesaicError, match="answers of width 3, expected width 2"):
        annotate(model, annotate(model, trace, 3), 2, [0])
    with pytest.raises(MoesaicError, match="2 layers of 8 experts, the trace has 1 of 8"):
        annotate(model, replace(trace, routes=trace.routes[:, :1]), 2)
    with pytest.raises(MoesaicError, match="knows 24 tokens, the trace's model 25"):
        annotate(model, replace(trace, card=replace(CARD, vocab=V + 1)), 2)
    with pytest.raises(MoesaicError, match="share of 1"):
        split(trace, 1)
    with pytest.raises(MoesaicError, match="200 folds, expected 2 to 160"):
        folds(trace, 200)
    with pytest.raises(MoesaicError, match="lr of a fit"):
        FitConfig(lr=0)
    with pytest.raises(MoesaicError, match="width 6 of a t5"):
        untrained("t5", width=6)
