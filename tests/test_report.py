"""The receipt for people: its sentences, tables, pictures, and the colours that all of them share."""

import copy
import io
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.refactor import figures, report, terminal

SHORT = ["python", "cpp", "markdown", "arithmetic", "english", "json"]
LONG = [f"{name} with a very long name, part {i}/$x$" for i, name in enumerate(SHORT * 2)]
VARIANTS = {"dense": 0.0, "moe": 0.15, "oracle": 0.14, "random": 0.4, "unhealed": 0.6, "pruned": 0.2}


def make_receipt(names: list[str] = SHORT, gain: float = -0.05, margin: float = 0.01) -> dict[str, Any]:
    """A whole receipt; `gain` is moe minus pruned, its interval `margin` to either side."""
    experts, base = len(names), np.linspace(1.5, 3.0, len(names))
    shift = {**VARIANTS, "pruned": VARIANTS["moe"] - gain}
    nats = {name: (base + value).tolist() for name, value in shift.items()}
    matrix = base + VARIANTS["oracle"] + 0.3 * (1 - np.eye(experts))
    confusion = np.full((experts, experts), 0.2 / max(1, experts - 1))
    np.fill_diagonal(confusion, 0.8)
    return {
        "format": 1,
        "model": {
            "source": "./dense", "name": "dense", "layers": 4, "hidden": 96, "ffn_width": 384, "vocabulary": 4096,
            "experts": names,
        },
        "settings": {"keep": 0.5, "tied": True, "router_lr": None, "heal": {"rounds": 2}},
        "environment": {"torch": "2.13.0", "cpu": "Some CPU", "threads": 2, "date": "2026-08-01"},
        "quality": {
            "domains": names, "windows_per_domain": 24, "sequence_length": 256, "nats": nats,
            "bits_per_byte": {k: [v / math.log(2) / 3 for v in values] for k, values in nats.items()},
            "average": {k: float(np.mean(values)) for k, values in nats.items()},
            "matrix": matrix.tolist(),
            "moe_minus_pruned": {
                "mean": gain, "low": gain - margin, "high": gain + margin,
                "per_domain": [[gain, gain - margin, gain + margin]] * experts,
                "better_domains": experts if gain < 0 else 0, "method": "paired bootstrap over windows, 95 %",
            },
            "gap_share": 0.75, "agreement": {"moe": 0.87, "pruned": 0.85}, "kl": {"moe": 0.08, "pruned": 0.1},
        },
        "router": {
            "label_accuracy": 0.78, "stay_probability": 0.74, "load": [1 / experts] * experts,
            "entropy": math.log(experts), "max_entropy": math.log(experts),
            "layer_mutual_information": [0.4, 0.38, 0.52], "confusion": confusion.tolist(),
        },
        "layout": {
            "widths": [320] * 4, "source_widths": [384] * 4, "shared": [100] * 4, "dropped": [64] * 4,
            "blocks": [40, 38, 41, 40], "runs": [14] * 4,
        },
        "bytes": {
            "dense": 2_480_000, "moe": 2_100_000, "untied": 5_300_000, "router": 230_000, "ratio": 0.847,
            "dense_parameters": 620_000, "moe_parameters": 560_000, "active_parameters": 430_000,
        },
        "speed": make_speed(1.31, 1.12, 1.07),
        "pictures": ["expert_domain.png", "token_strip.png"],
    }  # fmt: skip


def make_speed(*ratios: float) -> dict[str, Any]:
    def side(rate: float, limit: str) -> dict[str, Any]:
        return {"ms": 1e3 / rate, "tokens_per_second": rate, "floor_ms": 1.0, "share": 0.6, "limit": limit}

    cells = [
        {
            "name": f"decode at batch {batch}",
            "dense": side(4000.0, "bandwidth"),
            "moe": side(4000.0 * ratio, "gemm"),
            "ratio": {"median": ratio, "min": ratio - 0.05, "max": ratio + 0.05},
        }
        for batch, ratio in zip((1, 8, 32), ratios, strict=True)
    ]
    machine = {"name": "Some CPU", "threads": 2, "read_gb_s": 11.2, "gemm_gflop_s": {"float32": 92.0}, "load": 3.0}
    return {"verdict": "", "cells": cells, "machine": machine, "settings": {}}


def make_masks(experts: int, widths: tuple[int, ...] = (64, 64, 48)) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random((experts, width)) < 0.5 for width in widths]


def make_strips(experts: int) -> list[tuple[str, list[tuple[str, int]]]]:
    words = [
        "def",
        " f",
        "(",
        "x",
        "):",
        "\n",
        "\t",
        "return",
        " $x$",
        " 中文🙂",
        "\x1b[31m",
        "",
        "\n\n",
        "é",
        " " * 130,
    ]
    return [(f"domain {d}", [(word, (d + i // 3) % experts) for i, word in enumerate(words)]) for d in range(3)]


def make_log(experts: int, offset: float = 0.0, steps: int = 30) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(1), []
    for index, stage in itertools.product(range(2), ("router", "experts")):
        for step in range(1, steps + 1):
            loss = 2.0 + math.exp(-step / 10 - index) + offset + 0.02 * float(rng.normal())
            losses = {"router": loss, "load_balance": 0.1} if stage == "router" else {"lm": loss, "distillation": 0.2}
            metrics = {"load": rng.dirichlet(np.ones(experts)).tolist()}
            row = {"step": step, "loss": loss, "losses": losses, "tokens": 2048 * step, "metrics": metrics}
            rows.append({"round": index, "stage": stage, **row})
    return rows


# -- sentences -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("gain", "margin", "said"),
    [
        (-0.05, 0.01, "is better than the pruned control: 2.400 against 2.450 nats per token, 0.050 better"),
        (0.03, 0.01, "is worse than the pruned control: 2.400 against 2.370 nats per token, 0.030 worse"),
        (-0.005, 0.01, "cannot be told apart from the pruned control"),
        (0.0, 0.0, "cannot be told apart from the pruned control"),
    ],
)
def test_verdict(gain: float, margin: float, said: str) -> None:
    receipt = make_receipt(gain=gain, margin=margin)
    first = report.headline(receipt)[0]
    assert said in first
    assert f"better in {6 if gain < 0 else 0} of 6 domains" in first
    assert f"**{first}**" in report.receipt_markdown(receipt)


def test_interval_is_told_in_the_direction_of_the_verdict() -> None:
    assert "(95 % interval 0.040 to 0.060)" in report.headline(make_receipt(gain=-0.05))[0]
    assert "(95 % interval 0.020 to 0.040)" in report.headline(make_receipt(gain=0.03))[0]


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ((1.31, 1.12, 1.0), "at least as fast as its source wherever measured (1.00× to 1.31×)"),
        (
            (1.31, 0.94, 0.9),
            "slower than its source in decode at batch 8 (0.94×) and decode at batch 32 (0.90×); the best",
        ),
        ((0.8, 0.9, 0.99), "slower than its source wherever measured (0.80× to 0.99×)"),
    ],
)
def test_speed_is_told_honestly(ratios: tuple[float, ...], said: str) -> None:
    assert said in " ".join(report.headline({**make_receipt(), "speed": make_speed(*ratios)}))


@pytest.mark.parametrize(
    ("variant", "value", "said"),
    [
        ("dense", 2.1, "loses 0.300 nats to its dense source (2.100), 75 % of what the pruned control loses"),
        ("dense", 2.5, "0.100 nats better than its dense source (2.500)"),
        ("dense", 2.4, "level with its dense source"),
        ("random", 2.39, "The router does not help"),
        ("oracle", 2.42, "0.020 better than knowing the domain"),
        ("oracle", 2.4, "no different from knowing the domain"),
    ],
)
def test_the_other_comparisons(variant: str, value: float, said: str) -> None:
    receipt = make_receipt()
    receipt["quality"]["average"].update({"moe": 2.4, variant: value})
    assert said in " ".join(report.headline(receipt))


def test_larger_than_its_source_is_said() -> None:
    receipt = make_receipt()
    assert "larger" not in " ".join(report.headline(receipt))
    receipt["bytes"]["ratio"] = 1.04
    assert "104 % of the source's bytes, so it is larger than its source," in " ".join(report.headline(receipt))


def test_without_control_or_speed() -> None:
    receipt = make_receipt()
    receipt["speed"] = None
    for part in ("nats", "bits_per_byte", "average", "agreement", "kl"):
        del receipt["quality"][part]["pruned"]
    del receipt["quality"]["moe_minus_pruned"], receipt["quality"]["gap_share"]
    text = report.receipt_markdown(receipt)
    assert "not known: no pruned control" in text and "speed was not measured" in text
    assert "## Speed" not in text and "| domain | dense | moe | oracle |" in text
    assert terminal.receipt_tables(receipt)


def test_a_foreign_receipt_is_refused() -> None:
    with pytest.raises(MoesaicError, match="no 'quality' part"):
        report.receipt_markdown({"model": {"name": "x", "experts": []}})


# -- tables --------------------------------------------------------------------------------------------------------
def markdown_rows(text: str, title: str) -> list[list[str]]:
    lines = text.split(f"## {title}")[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("names", [SHORT[:2], SHORT, LONG])
def test_markdown_tables_are_whole(names: list[str]) -> None:
    text = report.receipt_markdown(make_receipt(names))
    for title in ("Quality, nats per token", "Quality, bits per byte", "Router", "Bytes", "Speed"):
        header, rule, *rows = markdown_rows(text, title)
        assert rows and {len(row) for row in (header, rule, *rows)} == {len(header)}
    assert len(markdown_rows(text, "Quality, nats per token")) == 2 + len(names) + 1
    assert "](expert_domain.png)" in text and "](token_strip.png)" in text and "loss_curves.png" not in text
    assert "tied yes" in text and "heal.rounds 2" in text and "router lr" not in text


def test_the_better_of_moe_and_pruned_is_bold() -> None:
    def bold(gain: float, title: str) -> set[int]:
        rows = markdown_rows(report.receipt_markdown(make_receipt(gain=gain)), title)[2:]
        return {column for row in rows for column, cell in enumerate(row) if cell.startswith("**")}

    for title in ("Quality, nats per token", "Quality, bits per byte"):
        assert bold(-0.05, title) == {2} and bold(0.05, title) == {3} and bold(0.0, title) == set()


def test_names_cannot_break_the_markdown() -> None:
    names = ["a|b", "**c**", "<i>_d_", "[e](f)\ng"]
    text = report.receipt_markdown(make_receipt(names))
    assert r"| a\|b |" in text and r"| \*\*c\*\* |" in text and r"\<i\>\_d\_" in text and r"\[e\](f) g" in text


def test_thin_domains_and_a_busy_machine_are_told() -> None:
    receipt = make_receipt()
    assert "Thin data" not in report.receipt_markdown(receipt)
    receipt["coverage"] = {"warnings": ["domain 'json': 12 tokens for 384 channels"]}
    text = report.receipt_markdown(receipt)
    assert "> Thin data: domain 'json': 12 tokens" in text and "busy with other work (load 3.0)" in text


@pytest.mark.parametrize("names", [SHORT, LONG])
def test_terminal_shows_the_same_in_100_columns(names: list[str]) -> None:
    receipt = make_receipt(names)
    console = Console(width=100, record=True, file=io.StringIO(), color_system=None)
    for part in terminal.receipt_tables(receipt):
        console.print(part)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    squeezed = [" ".join(line.split()) for line in lines]
    for table in report.tables(receipt):
        assert table.title in squeezed
        for row in table.rows:  # on one line: nothing wrapped, no number cut
            assert any(line.endswith(" ".join(row[1:])) for line in squeezed), row


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: report.nats(2.3456), "2.346"),
        (lambda: report.nats(None), "–"),
        (lambda: report.signed(0.037), "+0.037"),
        (lambda: report.signed(-0.037), "−0.037"),
        (lambda: report.signed(-0.0001), "0.000"),
        (lambda: report.percent(0.8142), "81.4 %"),
        (lambda: report.percent(0.0001, 0), "<1 %"),
        (lambda: report.percent(0.0, 0), "0 %"),
        (lambda: report.percent(None), "–"),
        (lambda: report.times(1.306), "1.31×"),
        (lambda: report.amount(740), "740"),
        (lambda: report.amount(12_345), "12.3 k"),
        (lambda: report.amount(999_700), "1 M"),
        (lambda: report.amount(1.24e9), "1.24 G"),
        (lambda: report.shorten("abcdefghij", 5), "ab…ij"),
        (lambda: report.visible("a\tb\r\nc\x1b\u202e"), "a    b⏎c��"),
    ],
)
def test_numbers_and_words(call: Callable[[], str], said: str) -> None:
    assert call() == said


# -- colours and lines ---------------------------------------------------------------------------------------------
# Linear RGB as seen by people without one kind of cone: Machado, Oliveira and Fernandes (2009), severity 1.
SIGHTS = {
    "normal": np.eye(3),
    "protan": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deutan": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritan": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    lms = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]) @ rgb.clip(0, 1)
    return np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]) @ np.cbrt(lms)


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_stay_apart(sight: str) -> None:
    assert len(set(figures.PALETTE)) >= 12
    seen = [oklab(SIGHTS[sight] @ linear(colour)) for colour in figures.PALETTE]
    least = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
    assert least > 0.07  # Okabe and Ito's seven alone: 0.076


def test_text_reads_on_every_colour() -> None:
    colours = [terminal.expert_colour(expert) for expert in range(24)]
    assert len(set(colours)) == 24 and terminal.expert_colour(24) == colours[0]
    for colour in colours:
        shades = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (colour, terminal.ink_on(colour)))
        assert (shades[1] + 0.05) / (shades[0] + 0.05) >= 4.5


TOKENS = st.lists(st.tuples(st.text("ab \n\t⏎", max_size=12), st.integers(0, 5)), min_size=1, max_size=20)


@given(TOKENS, st.integers(3, 9))
def test_lines_hold_every_character_once(tokens: list[tuple[str, int]], columns: int) -> None:
    pieces = terminal.layout_tokens(tokens, columns, max_lines=1000)
    whole = "".join(report.visible(text) for text, _ in tokens)
    assert "".join(text for *_, text, _ in pieces) == (whole or " ")
    end = (0, 0)
    for line, column, text, _ in pieces:
        assert (line, column) in (end, (end[0] + 1, 0)) and column + len(text) <= columns
        end = (line, column + len(text))


def test_lines_break_between_tokens_and_end() -> None:
    tokens = [("one", 0), (" two", 1), (" three", 2), ("\n\n", 0), ("four", 1)]
    lines = [(line, column, text) for line, column, text, _ in terminal.layout_tokens(tokens, 9, 10)]
    assert lines == [(0, 0, "one"), (0, 3, " two"), (1, 0, " three"), (1, 6, "⏎⏎"), (2, 0, "four")]
    assert terminal.layout_tokens([("abcdefgh", 3)], 3, 2) == [(0, 0, "abc", 3), (1, 0, "def", 3)]


def test_coloured_tokens() -> None:
    tokens = [("def f():\n", 1), ("  pass", 0), ("\x1b[31m", 0), ("", 1)]
    text = terminal.coloured_tokens(tokens, ["prose", "code"])
    assert text.plain.startswith("def f():⏎\n  pass�[31m\n") and "\x1b" not in text.plain
    assert "50.0 %  prose" in text.plain and "50.0 %  code" in text.plain
    style = str(text.spans[0].style)
    assert style.endswith(f"on {terminal.expert_colour(1)}") and str(text.spans[1].style) != style
    assert terminal.coloured_tokens([], ["prose"]).plain.strip() == ""


@given(st.lists(st.floats(0, 1), max_size=17), st.floats(0.01, 0.2))
def test_labels_never_overlap(positions: list[float], gap: float) -> None:
    moved = figures.spread(np.sort(np.array(positions)), gap)
    gap = min(gap, 1 / max(1, len(positions)))
    assert np.all(np.diff(moved) >= gap - 1e-9) and np.all(moved <= 1) and np.all(moved >= -1e-9)


def test_smooth_keeps_the_start_and_calms_the_end() -> None:
    values = np.array([9.0, *[1.0, 2.0] * 20])
    smoothed = figures.smooth(values, share=0.2)
    assert smoothed[0] == 9 and abs(smoothed[-1] - 1.5) < 0.11


def test_ownership_shares() -> None:
    masks = [np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool), np.array([[1, 0], [1, 1]], bool)]
    owners, alone = figures.ownership_shares(masks)
    assert np.allclose(owners, [2 / 6, 2 / 6, 2 / 6]) and np.allclose(alone, [1 / 6, 1 / 6])


# -- pictures ------------------------------------------------------------------------------------------------------
def draw_heatmap(names: list[str], path: Path) -> None:
    figures.expert_domain_heatmap(make_receipt(names), path)


def draw_channels(names: list[str], path: Path) -> None:
    figures.channel_ownership(make_masks(len(names)), names, path)


def draw_tokens(names: list[str], path: Path) -> None:
    figures.token_strip(make_strips(len(names)), names, path)


def draw_losses(names: list[str], path: Path) -> None:
    log = make_log(len(names))
    figures.loss_curves(log, names, path, make_log(len(names), 0.1), dense=1.9)


DRAW = [draw_heatmap, draw_channels, draw_tokens, draw_losses]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("names", [SHORT[:2], LONG], ids=["2", "12 long"])
@pytest.mark.parametrize("draw", DRAW)
def test_pictures(draw: Callable[[list[str], Path], None], names: list[str], tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    before = copy.deepcopy(dict(matplotlib.rcParams))
    path = tmp_path / "new" / "picture.png"
    draw(names, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size < 1_000_000
    height, width, _ = imread(path).shape
    assert 300 < height < 3000 and 800 < width < 3000
    assert imread(path)[..., :3].std() > 0.02
    assert dict(matplotlib.rcParams) == before


def test_pictures_are_reproducible(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        draw_channels(SHORT, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_pictures_of_little(tmp_path: Path) -> None:
    """One expert; one layer; one token; one step; a router alone: smaller than anybody draws, yet drawn."""
    pytest.importorskip("matplotlib")
    figures.channel_ownership([np.ones((1, 5), bool)], ["only"], tmp_path / "a.png")
    figures.token_strip([("x", [("word", 0)]), ("empty", [])], ["only"], tmp_path / "b.png")
    log = make_log(2, steps=1)
    figures.loss_curves(log[1:2], ["a", "b"], tmp_path / "c.png")
    figures.loss_curves(log[:1], ["a", "b"], tmp_path / "d.png")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_clusters_have_no_own_domain(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    receipt = make_receipt()
    receipt["model"]["experts"] = [f"cluster-{i}" for i in range(6)]
    figures.expert_domain_heatmap(receipt, tmp_path / "a.png")
    assert markdown_rows(report.receipt_markdown(receipt), "Router")[2][2] == "–"


@pytest.mark.parametrize(
    ("off_diagonal", "title"),
    [(0.3, "Every domain is best"), (0.0, "No domain is best"), (-0.3, "No domain is best")],
)
def test_heatmap_title_states_the_finding(off_diagonal: float, title: str) -> None:
    loss = 2 + off_diagonal * (1 - np.eye(3))
    assert figures._heatmap_words(loss - loss.min(0), {0: 0, 1: 1, 2: 2})[0].startswith(title)


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: figures.channel_ownership([], SHORT, path),
        lambda path: figures.channel_ownership(make_masks(2), SHORT, path),
        lambda path: figures.token_strip([("x", [])], SHORT, path),
        lambda path: figures.loss_curves([], SHORT, path),
    ],
)
def test_nothing_to_draw_is_an_error(draw: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(MoesaicError):
        draw(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("draw", DRAW)
def test_without_matplotlib(
    draw: Callable[[list[str], Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"moesaic\[plots\]"):
        draw(SHORT, tmp_path / "a.png")
