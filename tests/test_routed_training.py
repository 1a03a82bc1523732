"""Training under a router: configs, what happens once per step, exact resume, two processes, the checkpoint."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moesaic import files
from moesaic.analyze.routed_training import (
    RoutedLoss,
    RoutedTraining,
    SteppedBatches,
    build_model,
    read_config,
    tokenizer_source,
    train_routed,
)
from moesaic.balance.load_balance import LoadBalance
from moesaic.cli.main import app
from moesaic.data.tokens import DomainTokens, TokenBatches
from moesaic.errors import MoesaicError
from moesaic.models.loading import load_tokenizer
from moesaic.models.routed import RoutedForCausalLM

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"layers": 2, "hidden": 16, "ffn": 8, "heads": 2}
TINY = RoutedTraining(
    model=SHAPE, experts=4, hidden=8, steps=6, batch_size=4, length=8, lr=1e-2, warmup=0, windows=2, checkpoint_every=2
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(tokenizer_source(TINY))


@pytest.fixture(scope="module")
def domains() -> list[DomainTokens]:
    rng = np.random.default_rng(0)
    # two domains with vocabularies of their own, so that experts have something to tell apart
    streams = [rng.integers(100 + 300 * d, 250 + 300 * d, size=600).astype(np.int32) for d in (0, 0, 1, 1)]
    return [DomainTokens(f"d{i}", streams[2 * i], streams[2 * i + 1], 3.0) for i in range(2)]


# ---- configs


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_examples_describe_trainings(tokenizer: Any) -> None:
    configs = {path.stem: read_config(path) for path in sorted((ROOT / "examples").glob("*.toml"))}
    assert len(configs) == 2
    first = build_model(configs["train_top_p"], tokenizer)
    assert first.config.router["p"] == 0.4 and first.pools()[0].bank.experts == 8
    second = build_model(configs["train_upcycled_global"], tokenizer)
    assert second.balance.scope == "global" and second.balance.micro_floor == 0.01
    assert second.config.hidden_size == 256


BAD = [
    ("step = 3", "unknown key step: did you mean 'steps'"),
    ("[balance]\nscpe = 'micro'", "unknown key balance.scpe: did you mean 'scope'"),
    ("[model]\nlayer = 3", "unknown key model.layer: did you mean 'layers'"),
    ("[losses]\nload_balanc = 1.0", "unknown key losses.load_balanc: did you mean 'load_balance'"),
    ("[free]\nzeros = 1", "unknown key free.zeros: did you mean 'zero'"),
    ("router = 'topk'", "did you mean 'top-k'"),
    ("steps = '3'", "steps = '3': expected int"),
    ("steps = true", "steps = True: expected int"),
    ("losses = {entropy = 'much'}", "losses = .*expected dict"),
    ("steps = 0", "steps is 0, expected at least 1"),
    ("length = 1", "length = 1: expected at least 2"),
    ("[model]\nlayers = 'four'", "model.layers = 'four'"),
    ("balance = {scope = 'all'}", "balance scope 'all'"),
    ("balance = {tau = 'x'}", "balance.tau"),
    ("router = 'union-data-selection'", "would see the future; use UnionRouter"),
    ("steps = ", "cannot be read as TOML"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_configs_are_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MoesaicError, match=message) as error:
        read_config(write(tmp_path / "bad.toml", text))
    assert "bad.toml" in str(error.value)


def test_a_missing_config_is_explained(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match=r"none\.toml does not exist"):
        read_config(tmp_path / "none.toml")


def test_heads_must_divide_the_width(tokenizer: Any) -> None:
    with pytest.raises(MoesaicError, match=r"model\.hidden = 18 with 4 heads"):
        build_model(replace(TINY, model={**SHAPE, "hidden": 18, "heads": 4}), tokenizer)


def test_losses_default_to_the_papers() -> None:
    assert replace(TINY, router="top-p").auxiliary == {"load_balance": 0.01, "entropy": 1e-4}
    assert replace(TINY, router="top-p", losses={"z": 1e-3, "entropy": 0.0}).auxiliary == {"z": 1e-3}
    assert replace(TINY, router="random").stage().coefficients == {"lm": 2.0, "consistency": 1.0}
    assert TINY.stage().coefficients == {"lm": 1.0, "load_balance": 0.01}


def test_random_numbers_come_from_the_config_alone(tokenizer: Any) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = build_model(replace(TINY, router="frozen-random"), tokenizer)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    again = build_model(replace(TINY, router="frozen-random"), tokenizer)
    other = build_model(replace(TINY, router="frozen-random", seed=1), tokenizer)
    assert torch.equal(first.pools()[1].bank.down, again.pools()[1].bank.down)
    assert torch.equal(first.router.scorer.weight, again.router.scorer.weight)
    assert not torch.equal(first.router.scorer.weight, other.router.scorer.weight), "the frozen router has a seed too"


# ---- the loss


def part(batches: SteppedBatches, step: int, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] if tensor.ndim else tensor for name, tensor in batches.batch(step).items()}


def source(domains: list[DomainTokens], config: RoutedTraining = TINY) -> SteppedBatches:
    return SteppedBatches(TokenBatches(tuple(domains), config.batch_size, config.length, config.seed))


def test_schedule_and_reset_once_per_optimizer_step(tokenizer: Any, domains: list[DomainTokens]) -> None:
    """With scope global the counts hold both parts of a step, and nothing of the step before."""
    model = build_model(replace(TINY, balance={"scope": "global"}), tokenizer).train()
    loss, seen = RoutedLoss(model, ["load_balance"], steps=6), []
    model.router.schedule = lambda step, steps: seen.append((step, steps))
    batches, totals = source(domains), []
    for step in (0, 1):
        for rows in (slice(0, 2), slice(2, 4)):
            loss(part(batches, step, rows))
            counts = model.balance.counts_LE
            assert counts is not None
            totals.append(float(counts[0].sum()))
    assert seen == [(0, 6), (1, 6)]
    assert totals == [32, 64, 32, 64]  # 2 sequences x 8 tokens x top-2


def test_each_loss_is_unweighted_and_named(tokenizer: Any, domains: list[DomainTokens]) -> None:
    model = build_model(replace(TINY, losses={"load_balance": 0.5, "entropy": 2.0, "z": 3.0}), tokenizer).train()
    batch = part(source(domains), 0)
    found = RoutedLoss(model, ["load_balance", "entropy", "z"], steps=6)(batch)
    ids = batch["input_ids"]
    logits = model(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(found["lm"], expected)
    assert model.last is not None
    balance = LoadBalance()(model.plans(), model.last.inp.valid)
    torch.testing.assert_close(found["load_balance"], balance)
    assert found["experts_per_token"] == [2, 2]


def test_consistency_compares_two_draws(tokenizer: Any, domains: list[DomainTokens]) -> None:
    """The two forwards draw differently, other steps again, and the same step the same in every part."""
    model = build_model(replace(TINY, router="random", experts=64), tokenizer).train()
    loss, batches, draws, logits = RoutedLoss(model, ["consistency"], steps=6), source(domains), [], []
    forward = model.forward

    def record(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        draws.append([int(plan.expert[0]) for plan in model.plans()])
        logits.append(out.logits.detach().log_softmax(-1))
        return out

    model.forward = record  # type: ignore[method-assign]
    batch = part(batches, 0, slice(0, 2))
    found = loss(batch)
    loss(part(batches, 0, slice(2, 4)))
    loss(part(batches, 1))
    assert draws[0] == draws[2] and draws[1] == draws[3]
    assert len({tuple(draw) for draw in draws}) == 4
    p, q = logits[:2]
    kl = [(a.exp() * (a - b)).sum(-1).mean() for a, b in ((p, q), (q, p))]
    torch.testing.assert_close(found["consistency"].detach(), (kl[0] + kl[1]) / 2, rtol=1e-3, atol=1e-8)
    assert found["consistency"].requires_grad and bool(found["consistency"] > 0)
    target = batch["input_ids"][:, 1:, None]
    cross = [-x[:, :-1].gather(-1, target).mean() for x in (p, q)]
    torch.testing.assert_close(found["lm"].detach(), (cross[0] + cross[1]) / 2)


def test_a_loss_without_scores_is_refused(tmp_path: Path, domains: list[DomainTokens]) -> None:
    with pytest.raises(MoesaicError, match="carries no scores"):
        train_routed(replace(TINY, router="random", losses={"load_balance": 0.01}), tmp_path, domains=domains)


# ---- the run


class Stop(Exception):
    pass


def stop_after(step: int) -> Callable[[dict[str, Any]], None]:
    def callback(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Stop

    return callback


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "work" / "log.jsonl").open()]


EXACT = {
    "random": {"router": "random", "micro_batches": 2},
    "global": {"router": "top-k", "balance": {"scope": "global"}, "micro_batches": 2},
    "frozen-random": {"router": {"name": "frozen-random", "k": 4, "k_min": 1, "growth": "linear"}},
    "big-small": {"router": "big-small", "experts": 1, "free": {"zero": 1}},
}


@pytest.mark.parametrize("name", EXACT)
def test_an_interrupted_run_repeats_the_whole_one(tmp_path: Path, domains: list[DomainTokens], name: str) -> None:
    """Draws, counts, k and temperature follow the step: a resumed run starts them anywhere but at their beginning."""
    config = replace(TINY, **EXACT[name])  # type: ignore[arg-type]
    whole = train_routed(config, tmp_path / "whole", domains=domains)
    with pytest.raises(Stop):
        train_routed(config, tmp_path / "part", domains=domains, callbacks=[stop_after(5)])
    resumed = train_routed(config, tmp_path / "part", domains=domains)
    assert log(tmp_path / "part") == log(tmp_path / "whole")
    left, right = (files.load_tensors(tmp_path / n / "model.safetensors") for n in ("whole", "part"))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert whole is not None and resumed is not None
    for metrics in (whole, resumed):
        metrics["measured"].pop("tokens_per_second")
    assert whole == resumed


def test_schedules_move_during_training(tmp_path: Path, domains: list[DomainTokens]) -> None:
    config = replace(TINY, **EXACT["frozen-random"])  # type: ignore[arg-type]
    metrics = train_routed(config, tmp_path, domains=domains)
    used = [row["metrics"]["experts_per_token"][0] for row in log(tmp_path)]
    assert used[0] == 1 and used[-1] == 4 and used == sorted(used)
    assert metrics is not None and metrics["measured"]["experts_per_token"] == [4, 4]


def test_the_checkpoint_is_the_trained_model(tmp_path: Path, domains: list[DomainTokens], tokenizer: Any) -> None:
    config = replace(TINY, router={"name": "recurrent", "state_width": 8}, steps=20, lr=0.05)
    metrics = train_routed(config, tmp_path, domains=domains)
    assert metrics is not None
    losses = [row["losses"]["lm"] for row in log(tmp_path)]
    assert losses[-1] < losses[0] - 0.3, "it learns"
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model, RoutedForCausalLM) and model.config.router["name"] == "recurrent"
    state = files.load_tensors(tmp_path / "work" / "state-20" / "parameters.safetensors")
    torch.testing.assert_close(model.router.scorer.cell.weight_hh, state["router.scorer.cell.weight_hh"])
    text = "def area(r):\n    return 3.14 * r ** 2"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored == metrics and set(stored["measured"]["loss_by_domain"]) == {"d0", "d1"}


def test_a_finished_run_is_not_repeated_and_another_is_refused(tmp_path: Path, domains: list[DomainTokens]) -> None:
    first = train_routed(TINY, tmp_path, domains=domains)
    written = (tmp_path / "metrics.json").stat().st_mtime_ns
    assert train_routed(TINY, tmp_path, domains=domains) == first
    assert (tmp_path / "metrics.json").stat().st_mtime_ns == written
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert train_routed(TINY, tmp_path, domains=domains) is not None, "written again from the last state"
    AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(MoesaicError, match=r"other settings.*input router"):
        train_routed(replace(TINY, router="union"), tmp_path, domains=domains)
    again = train_routed(replace(TINY, router="union"), tmp_path, domains=domains, restart=True)
    assert again is not None and again["settings"]["config"]["router"] == "union"


# ---- the command


def command(*arguments: str) -> str:
    """What `moesaic ARGUMENTS` prints, in this process."""
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def torchrun(*arguments: str) -> str:
    """The same in two processes on the CPU."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moesaic.cli.main")
    line = [sys.executable, *launcher, *arguments]
    done = subprocess.run(line, env=dict(os.environ), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def written_config(tmp_path: Path) -> Path:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    for name, start in (("a", 0), ("b", 5)):
        lines = (" ".join(words[(start + i * j) % 10] for j in range(40)) for i in range(1, 60))
        write(tmp_path / f"{name}.jsonl", "\n".join(json.dumps(f"{i} {line}") for i, line in enumerate(lines)))
    sources = [f"{name}={tmp_path / name}.jsonl" for name in "ab"]
    keys = {"experts": 4, "hidden": 8, "steps": 6, "batch_size": 8, "length": 16, "lr": 0.01, "windows": 2}
    model = ", ".join(f"{key} = {value}" for key, value in SHAPE.items())
    return write(
        tmp_path / "run.toml",
        "\n".join(f"{key} = {value}" for key, value in keys.items())
        + f"\ndomains = {json.dumps(sources)}\nmodel = {{{model}}}\nlosses = {{load_balance = 1.0}}\n"
        + 'balance = {scope = "global"}\n',
    )


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """torchrun over gloo: counts of the balance loss are summed over both, once per part, and the rest splits."""
    config = str(written_config(tmp_path))
    assert "Held-out text" in command("train", config, "--out", str(tmp_path / "one"))
    printed = torchrun("train", config, "--out", str(tmp_path / "two"), "--json")
    assert len(re.findall('"format": 1', printed)) == 1, "the second process prints nothing"
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == 6
    for row, other in zip(one, two, strict=True):
        for key in ("loss", "grad_norm", "tokens", "lr"):
            assert other[key] == pytest.approx(row[key], rel=1e-4), key
        assert other["losses"] == pytest.approx(row["losses"], rel=1e-4)
    left, right = (files.load_tensors(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)
    micro = write(
        tmp_path / "micro.toml", Path(config).read_text().replace('"global"', '"micro"') + "micro_batches = 2\n"
    )
    assert command("train", str(micro), "--out", str(tmp_path / "micro"))
    first, other, apart = (log(tmp_path / name)[0]["losses"]["load_balance"] for name in ("one", "two", "micro"))
    # near-uniform scores at the start: the scopes differ little, but far more than rounding
    assert abs(first - other) < 1e-5 and abs(first - apart) > 1e-4
