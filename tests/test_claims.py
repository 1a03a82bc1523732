"""The claims harness: verdicts, intervals, resuming, stale results, the page; and every claim on a tiny budget."""

import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesaic.claims import runner
from moesaic.claims.claim import Check, Claim, claim_names, find_claim
from moesaic.claims.page import page, write_page
from moesaic.claims.runner import Settings, fingerprint, run_claim
from moesaic.claims.verdict import decide, judge, t_interval
from moesaic.data import split_documents
from moesaic.errors import MoesaicError

WORDS = ["def", "return", "import", "self", "class", "value", "the", "of", "and", "number", "apples", "adds", "three"]

GAIN = Check("gain", above=0.0)


def texts(seed=0):
    rng = random.Random(seed)
    document = lambda words: " ".join(rng.choice(words) for _ in range(400))  # noqa: E731
    return [
        split_documents("code", [document(WORDS[:7]) for _ in range(6)]),
        split_documents("prose", [document(WORDS[6:]) for _ in range(6)]),
    ]


def claim(run=None, checks=(GAIN,), **changes):
    fields = dict(
        name="union",  # any real name: its file is part of the fingerprint
        paper="A Paper",
        arxiv="0000.00000",
        headline="It helps.",
        compares="this with that",
        budgets="equal",
        measures={"gain": "the gain", "loss": "the loss"},
        checks=tuple(checks),
        files=("routing/top_k.py",),
        minutes=0.1,
        run=run or (lambda seed, data, scale=1.0: {"gain": 1.0 + seed, "loss": 2.0}),
        text=False,
    )
    return Claim(**{**fields, **changes})


# -- verdicts ---------------------------------------------------------------------------------------------------------


def test_interval_is_students():
    values = [1.0, 2.0, 4.0]
    interval = t_interval(values)
    half = 4.302652729696142 * statistics.stdev(values) / math.sqrt(3)  # t of 0.975 with two degrees of freedom
    assert interval.mean == pytest.approx(7 / 3)
    assert interval.high - interval.mean == pytest.approx(half)
    assert interval.mean - interval.low == pytest.approx(half)


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ([1.0, 1.1, 1.2], "met"),
        ([-1.0, -1.1, -1.2], "missed"),
        ([1.0, 1.1, -0.1], "undecided"),  # one seed disagrees
        ([0.01, 0.02, 3.0], "undecided"),  # all agree, but the interval crosses zero
        ([-0.01, -0.02, -3.0], "undecided"),
        ([0.0, 0.0, 0.0], "missed"),  # the threshold itself is not above it
    ],
)
def test_one_check(values, outcome):
    above, below = Check("x", above=0.0), Check("x", below=0.0)
    assert judge(above, "it", values).outcome == outcome
    assert judge(below, "it", [-value for value in values]).outcome == outcome


def test_verdicts_of_all_three_kinds():
    checks = [Check("gain", above=0.0), Check("loss", below=1.0)]
    rows = lambda gains, losses: [{"gain": g, "loss": x} for g, x in zip(gains, losses, strict=True)]  # noqa: E731
    good, bad, torn, small = [1.0, 1.1, 1.2], [-1.0, -1.1, -1.2], [1.0, -1.0, 1.0], [0.1, 0.2, 0.3]
    assert decide(claim(checks=checks), rows(good, small))[0] == "reproduced"
    assert decide(claim(checks=checks), rows(torn, small))[0] == "tie"
    assert decide(claim(checks=checks), rows(bad, small))[0] == "not reproduced"
    verdict, reason, judged = decide(claim(checks=checks), rows(torn, good))  # a miss outweighs a tie
    assert verdict == "tie" and [item.outcome for item in judged] == ["undecided", "undecided"]
    verdict, reason, _ = decide(claim(checks=checks), rows(bad, torn))
    assert verdict == "not reproduced"
    assert (
        "the gain is -1.1 [" in reason and "wanted above 0: so in 0 of 3 seeds" in reason and "the loss" not in reason
    )


def test_two_seeds_give_no_verdict():
    with pytest.raises(MoesaicError, match="at least 3"):
        decide(claim(), [{"gain": 1.0, "loss": 1.0}] * 2)
    with pytest.raises(MoesaicError, match="--seeds 2"):
        Settings(seeds=2)


def test_checks_and_claims_that_make_no_sense():
    with pytest.raises(MoesaicError, match="either above or below"):
        Check("x")
    with pytest.raises(MoesaicError, match="'speed'"):
        claim(checks=[Check("speed", above=0.0)])


# -- running ----------------------------------------------------------------------------------------------------------


def test_a_killed_run_keeps_its_finished_seeds(tmp_path):
    ran = []

    def run(seed, data, scale=1.0):
        if seed == 2 and len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(seed)
        return {"gain": 1.0 + 0.1 * seed, "loss": 2.0}

    with pytest.raises(KeyboardInterrupt):
        run_claim(claim(run), [], Settings(work=tmp_path))
    assert ran == [0, 1]
    ran.append("again")
    result = run_claim(claim(run), [], Settings(work=tmp_path))
    assert ran == [0, 1, "again", 2]
    assert result["measures"]["gain"]["values"] == [1.0, 1.1, 1.2]
    run_claim(claim(run), [], Settings(work=tmp_path, restart=True))
    assert ran == [0, 1, "again", 2, 0, 1, 2]


def test_stale_results_are_not_used(tmp_path, monkeypatch):
    ran = []

    def run(seed, data, scale=1.0):
        ran.append(seed)
        return {"gain": 1.0, "loss": 2.0}

    run_claim(claim(run), [], Settings(work=tmp_path))
    run_claim(claim(run), [], Settings(work=tmp_path, scale=0.5))
    assert ran == [0, 1, 2] * 2, "another scale is another run"
    run_claim(claim(run, files=("routing/union.py",)), [], Settings(work=tmp_path))
    assert ran == [0, 1, 2] * 3, "other code under test is another run"
    path = tmp_path / f"union-{fingerprint(claim(run), [], 1.0)}" / "seed-1.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "fingerprint": "0" * 16}))
    with pytest.raises(MoesaicError, match="other settings, data or code"):
        run_claim(claim(run), [], Settings(work=tmp_path))
    path.write_text("{")
    with pytest.raises(MoesaicError, match="damaged"):
        run_claim(claim(run), [], Settings(work=tmp_path))
    assert ran == [0, 1, 2] * 3


def test_words_and_thresholds_do_not_make_results_stale_but_code_does():
    source = (runner.PACKAGE / "claims/papers/random.py").read_text()
    reworded, changed = (
        source.replace("headline=", "headline='' or "),
        source.replace("STEPS, DROPOUT = 4", "STEPS = 4"),
    )
    assert reworded != source and changed != source
    assert runner.deciding(reworded) == runner.deciding(source) != runner.deciding(changed)


def test_fingerprint_follows_the_data_of_claims_that_read_text():
    one, two = texts(0), texts(1)
    assert fingerprint(claim(text=True), one, 1.0) != fingerprint(claim(text=True), two, 1.0)
    assert fingerprint(claim(text=True), one, 1.0) == fingerprint(claim(text=True), texts(0), 1.0)
    assert fingerprint(claim(), one, 1.0) == fingerprint(claim(), two, 1.0)


@pytest.mark.parametrize(
    ("measures", "message"),
    [({"gain": math.nan, "loss": 1.0}, "gain is nan"), ({"gain": 1.0}, "different measures: loss")],
)
def test_bad_measures_are_not_kept(tmp_path, measures, message):
    with pytest.raises(MoesaicError, match=message):
        run_claim(claim(lambda seed, data, scale=1.0: measures), [], Settings(work=tmp_path))
    assert not list(tmp_path.rglob("*.json"))


def test_a_text_claim_without_text_is_refused(tmp_path):
    with pytest.raises(MoesaicError, match="needs labelled text"):
        run_claim(claim(text=True), [], Settings(work=tmp_path))


def test_the_page_grows_and_keeps_what_was_not_run(tmp_path):
    first = run_claim(claim(), [], Settings(work=tmp_path / "work"))
    second = {**first, "name": "another", "verdict": "tie"}
    write_page(tmp_path / "claims.md", [first])
    write_page(tmp_path / "claims.md", [second])
    text = (tmp_path / "claims.md").read_text()
    assert text == page([second, first])
    assert "| [union](#union) |" in text and "**tie**" in text and "## another" in text
    assert "| the gain | 2 [-0.4841, 4.484] | 1, 2, 3 |" in text


# -- the claims -------------------------------------------------------------------------------------------------------


def test_unknown_names_get_the_nearest():
    with pytest.raises(MoesaicError, match="did you mean 'recurrent'"):
        find_claim("recurent")


@pytest.mark.parametrize("name", claim_names())
def test_every_claim_is_complete(name):
    found = find_claim(name)
    assert found.checks and found.headline.endswith(".") and found.compares.endswith(".") and found.budgets
    assert all((runner.PACKAGE / file).is_file() for file in found.files)
    assert len(set(found.measures.values())) == len(found.measures)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "read-me" else n for n in claim_names()]
)
def test_every_claim_runs_and_repeats_itself(name):
    found, data = find_claim(name), texts()
    settings = Settings(scale=0.005)
    once, again, other = (runner.run_seed(found, seed, data, settings)["measures"] for seed in (1, 1, 2))
    assert all(map(math.isfinite, once.values()))
    assert once == again, "equal seeds, equal numbers"
    assert once != other, "the seed must matter"


# -- the command line -------------------------------------------------------------------------------------------------


def cli(*arguments):
    from moesaic.cli.main import app

    return CliRunner().invoke(app, ["claims", *map(str, arguments)])


def test_list_imports_no_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom moesaic.cli.main import app\n"
        "done = CliRunner().invoke(app, ['claims', 'list'])\nassert done.exit_code == 0, done.output\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\nprint(done.output)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in claim_names())


def test_show_says_what_decides():
    shown = " ".join(cli("show", "random").output.split())
    assert "2110.04260" in shown and "ratio of these KLs, weight 1 over 0: below 1" in shown


def test_run_prints_clean_json_and_writes_the_page(tmp_path):
    text = "\n\n".join(" ".join(random.Random(i).choices(WORDS, k=400)) for i in range(12))
    for name in ("one.txt", "two.txt"):
        Path(tmp_path / name).write_text(text)
    arguments = ["run", "union", "--scale", 0.005, "--work", tmp_path / "work", "--out", tmp_path / "claims.md"]
    arguments += ["--data", f"one={tmp_path / 'one.txt'}", "--data", f"two={tmp_path / 'two.txt'}", "--json"]
    done = cli(*arguments)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)
    assert row["name"] == "union" and row["verdict"] in ("reproduced", "tie", "not reproduced")
    assert set(row["data"]) == {"one", "two"} and row["seeds"] == 3
    page_text = (tmp_path / "claims.md").read_text()
    assert "--scale 0.005" in page_text and f"--data one={tmp_path / 'one.txt'}" in page_text
    assert "a trial, not a result" in page_text
    seconds = row["seconds"]
    assert json.loads(cli(*arguments).stdout)[0]["seconds"] == seconds, "finished seeds are not run again"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "name one claim, or give --all"),
        (["run", "union", "--all"], "name one claim, or give --all"),
        (["run", "unoin"], "did you mean 'union'"),
        (["run", "modality", "--data", "x=y"], "makes its own data"),
        (["run", "union", "--seeds", "1"], "at least 3"),
        (["run", "union", "--scale", "0"], "above 0"),
        (["run", "union", "--out", "page.txt"], "ending in .md"),
    ],
)
def test_bad_arguments(arguments, message):
    done = cli(*arguments)
    assert isinstance(done.exception, MoesaicError) and message in str(done.exception)
