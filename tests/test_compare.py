"""Comparing routers: equal budgets, equal data and seeds, resumed runs, words and numbers, files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moesaic.analyze import compare as analysis
from moesaic.analyze.compare import compare, markdown, recipe, summary, tables
from moesaic.analyze.routed_training import PAPER_LOSSES, RoutedTraining, build_model, tokenizer_source
from moesaic.cli.main import app
from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.models.loading import load_tokenizer
from moesaic.routing.family import ROUTERS, router_class

BASE = RoutedTraining(
    model={"layers": 2, "hidden": 16, "heads": 2, "ffn": 8},
    experts=8,
    hidden=8,
    domains=["arithmetic"],
    max_bytes=40_000,
    steps=2,
    batch_size=2,
    length=16,
    windows=2,
    lr=1e-2,
)
CAUSAL = sorted(name for name in ROUTERS if router_class(name).caps.causal)  # type: ignore[attr-defined]


def expert_flops(config: RoutedTraining, per_token: float) -> float:
    """FLOPs per layer and token: routed ones, and the shared."""
    assert config.hidden is not None
    return 2 * 3 * 16 * config.hidden * (per_token + config.shared)


@pytest.mark.parametrize("name", ["dense", *CAUSAL])
def test_every_recipe_spends_the_budget(name: str) -> None:
    """8 experts of width 8, 2 active: all parameters and FLOPs the same, but where the router itself forbids it."""
    config = recipe(name, BASE)
    model = build_model(config, load_tokenizer(tokenizer_source(config)))
    options = model.config.router
    active = {"big-small": 0.5, "random": 1.0, "top-p": 2.0}.get(name, float(options.get("k", 0)))
    assert expert_flops(config, active) == expert_flops(replace(BASE, shared=0), 2)
    pool = model.pools()[0]
    stored = sum(p.numel() for p in pool.parameters()) / (3 * 16 * 8)
    expected = {"dense": 2, "big-small": 4}.get(name, 8)
    assert stored == pytest.approx(expected, abs=0.2), "constant experts are small"
    assert (config.steps, config.batch_size, config.lr, config.seed) == (2, 2, 1e-2, 0)


def test_all_causal_routers_have_a_recipe_and_known_losses() -> None:
    """A new router is compared by name, or says why not; the papers' losses name routers that exist."""
    assert set(PAPER_LOSSES) <= set(CAUSAL)
    with pytest.raises(MoesaicError, match="would see the future"):
        recipe("union-data-selection", BASE)


@pytest.mark.parametrize(
    ("routers", "message"),
    [(["topk"], "did you mean 'top-k'"), ([], "distinct routers"), (["top-k", "top-k"], "distinct routers")],
)
def test_bad_requests_stop_before_any_training(tmp_path: Path, routers: list[str], message: str) -> None:
    with pytest.raises(MoesaicError, match=message):
        compare(routers, BASE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_that_does_not_divide_is_refused() -> None:
    with pytest.raises(MoesaicError, match="fine-grained halves"):
        recipe("fine-grained", replace(BASE, hidden=7))
    with pytest.raises(MoesaicError, match="9 of 8 experts"):
        recipe("top-k", BASE, k=9)


def measured(loss: float, flops: float = 2e6) -> dict[str, Any]:
    """A run's metrics, as far as the comparison reads them."""
    settings = {name: getattr(BASE, name) for name in RoutedTraining.__dataclass_fields__}
    return {
        "settings": {"config": settings},
        "training": {"tokens": 1_000},
        "environment": {"device": "CPU", "threads": 1, "torch": "2"},
        "measured": {
            "loss": loss, "loss_by_domain": {"a": loss - 1, "b": loss + 1}, "windows": {"a": 2, "b": 2}, "experts": 8,
            "parameters": 4e6, "active_parameters": 3e6, "expert_flops_per_token": flops,
            "experts_per_token": [1.0, 2.0], "load_entropy": [2.0, 1.0], "router_entropy": None,
            "domain_nmi": [0.1, 0.3], "adjacent_layers_information": [0.4], "tokens_per_second": 1234.0,
        },
    }  # fmt: skip


def test_differences_are_paired_and_sizes_relative() -> None:
    runs = {"top-k": [measured(3.0), measured(5.0)], "top-p": [measured(3.1, 3e6), measured(5.3, 3e6)]}
    result = summary(runs, "moesaic compare")
    row = result["routers"]["top-p"]
    assert row["loss"]["mean"] == pytest.approx(4.2) and row["loss"]["deviation"] == pytest.approx(2.2 / math.sqrt(2))
    assert row["difference"]["mean"] == pytest.approx(0.2)
    assert row["difference"]["deviation"] == pytest.approx(0.2 / math.sqrt(2)), "not the spread of unpaired losses"
    assert row["loss_by_domain"] == {"a": pytest.approx(3.2), "b": pytest.approx(5.2)}
    size, routes, domains = tables(result)
    assert size.rows[0] == ["top-k", "4.000±1.414", "–", "4.00 M", "3.00 M", "2.00 M"]
    assert size.rows[1] == ["top-p", "4.200±1.556", "+0.200±0.141", "+0.0 %", "+0.0 %", "+50.0 %"]
    assert routes.rows[1] == ["top-p", "1.50", "1.50/2.08", "–", "0.200", "0.40", "1,234"]
    assert domains.columns == ["router", "a", "b"]
    text = markdown(result)
    assert "moesaic compare" in text and "| top-p | 4.200±1.556 |" in text
    assert "fewer than three seeds no difference is claimed" in text


def test_comparison_is_written_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call repeats no run; the third seed trains only what is missing; every file is there and whole."""
    trained: list[str] = []
    train = analysis.train_routed

    def count(config: RoutedTraining, out: Path, **options: Any) -> Any:
        before = (out / "metrics.json").exists()
        result = train(config, out, **options)
        if not before:
            trained.append(out.name)
        return result

    monkeypatch.setattr(analysis, "train_routed", count)
    first = compare(["top-k", "random"], BASE, tmp_path)
    assert trained == ["top-k-seed0", "random-seed0"]
    assert first["routers"]["top-k"]["loss"]["deviation"] is None
    picture = (tmp_path / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture.endswith(b"IEND\xaeB`\x82")
    assert json.loads((tmp_path / "compare.json").read_text()) == first
    second = compare(["top-k", "random"], BASE, tmp_path, seeds=2)
    assert trained[2:] == ["top-k-seed1", "random-seed1"]
    assert second["seeds"] == [0, 1]
    assert second["routers"]["top-k"]["loss"]["seeds"][0] == first["routers"]["top-k"]["loss"]["mean"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.md", "compare.png", "runs"]
    logs = {
        name: json.loads((tmp_path / "runs" / f"{name}-seed0" / "metrics.json").read_text())
        for name in ("top-k", "random")
    }
    assert logs["top-k"]["settings"]["data"] == logs["random"]["settings"]["data"], "the same batches"


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise MissingExtraError("matplotlib", "plots")

    monkeypatch.setattr(analysis, "draw", missing)
    result = compare(["top-k"], BASE, tmp_path)
    assert result["picture"] is None and "compare.png" not in (tmp_path / "compare.md").read_text()


def test_the_command(tmp_path: Path) -> None:
    sizes = [
        "--layers",
        "2",
        "--width",
        "32",
        "--experts",
        "4",
        "--expert-width",
        "8",
        "--length",
        "16",
        "--windows",
        "1",
    ]
    data = ["--data", "arithmetic", "--max-bytes", "30000", "--steps", "1", "--batch-size", "2"]
    arguments = ["compare", "--routers", "top-k,dense", *data, *sizes, "--out", str(tmp_path)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "Loss and size" in done.output and "layer MI" in done.output
    printed = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout
    assert json.loads(printed)["reference"] == "top-k"
