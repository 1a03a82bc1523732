"""The loop equals plain torch, resumes bit for bit after a kill at any moment, and refuses what would mislead.

Run as a script it is the driver that kills and resumes real processes, or one process of several.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moesaic import files
from moesaic.errors import MissingExtraError, MoesaicError
from moesaic.training.loop import Stage, count_tokens, split_batch, train
from moesaic.training.schedule import build_optimizers, constant, cosine_to_zero, round_factor, wsd
from moesaic.training.state import load_newest, seed_rng, state_directories

VOCAB, DIM, ROWS, LENGTH = 11, 6, 4, 5


class TinyModel(nn.Module):
    """Embedding, one hidden matrix, norm, head, and a buffer that changes with every batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, DIM)
        self.hidden = nn.Linear(DIM, 2 * DIM)
        self.norm = nn.BatchNorm1d(2 * DIM)
        self.dropout = nn.Dropout(0.2)
        self.lm_head = nn.Linear(2 * DIM, VOCAB, bias=False)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_ND = self.hidden(self.embed(ids_BS)).flatten(0, 1)
        return self.lm_head(self.dropout(self.norm(x_ND))).view(*ids_BS.shape, VOCAB)


@dataclass
class RandomBatches:
    """Batch `step` is a pure function of seed and step."""

    seed: int = 0
    rows: int = ROWS

    @property
    def fingerprint(self) -> str:
        return f"random-{self.seed}"

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        return {"input_ids": torch.randint(VOCAB, (self.rows, LENGTH), generator=generator)}


@dataclass
class TwoLosses:
    """Next-token and z loss, with metrics and with noise from all three global generators."""

    model: nn.Module

    def __call__(self, batch: dict[str, Tensor]) -> Mapping[str, Any]:
        ids_BS = batch["input_ids"]
        logits_BSV = self.model(ids_BS)
        noise = random.random() + float(np.random.rand())
        ce = nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())
        z = logits_BSV.logsumexp(-1).square().mean() * (1 + 0.01 * noise)
        return {"ce": ce, "z": z, "loads": [noise, 1.0], "entropy": logits_BSV.detach().std(), "absent": math.nan}


def make_stage(**changes: Any) -> Stage:
    settings: dict[str, Any] = {"name": "tiny", "steps": 12, "lr": 0.01, "checkpoint_every": 3, "seed": 7}
    return Stage(**settings | {"coefficients": {"ce": 1.0, "z": 0.1}} | changes)


def run(workdir: Path, model: nn.Module | None = None, **changes: Any) -> tuple[nn.Module, Any]:
    model = model or TinyModel()
    return model, train(make_stage(**changes), model, TwoLosses(model), RandomBatches(), workdir)


def same(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Stop(Exception):
    """Raised by a callback to interrupt a run."""


def stop_after(step: int) -> Any:
    def callback(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Stop

    return callback


def interrupted(workdir: Path, step: int, **changes: Any) -> None:
    model = TinyModel()
    with pytest.raises(Stop):
        train(make_stage(**changes), model, TwoLosses(model), RandomBatches(), workdir, callbacks=[stop_after(step)])


# ---- schedules


def test_schedule_values() -> None:
    assert [cosine_to_zero(step, 4) for step in range(5)] == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)
    assert [cosine_to_zero(step, 6, warmup=2) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.853553], abs=1e-6)
    assert cosine_to_zero(9, 4) == 0, "never climbs again"
    assert [wsd(step, 10, warmup=2, decay=0.4) for step in range(11)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [constant(step, 5, warmup=4) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert [round_factor(n) for n in range(3)] == pytest.approx([1, 0.8, 0.64])


def test_stage_learning_rate() -> None:
    stage = make_stage(steps=4, lr=5e-4, round_index=2)
    assert [stage.lr_at(step) for step in (0, 2, 4)] == pytest.approx([3.2e-4, 1.6e-4, 0])
    stage = make_stage(schedule="wsd", schedule_args={"warmup": 2, "decay": 0.5})
    assert [stage.lr_at(step) for step in (0, 1, 6, 9)] == pytest.approx([0.005, 0.01, 0.01, 0.005])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"micro_batches": 0}, "micro_batches is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"round_index": -1}, "round_index is -1"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', expected one of"),
        ({"dtype": "fp16"}, "dtype is 'fp16'"),
        ({"schedule": "spiral"}, "no schedule is called 'spiral'; choose one of constant"),
        ({"schedule_args": {"worm": 1}}, "wrong schedule_args for 'cosine_to_zero'"),
        ({"coefficients": {}}, "no coefficients"),
    ],
)
def test_stage_refuses_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoesaicError, match=message):
        make_stage(**changes)


# ---- one update


def test_single_process_equals_plain_torch(tmp_path: Path) -> None:
    """Accelerate, coefficients, logging and states leave the numbers of a hand-written loop untouched."""
    ours, result = run(tmp_path)
    model, batches, stage = TinyModel(), RandomBatches(), make_stage()
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    seed_rng(7)
    for step in range(12):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * cosine_to_zero(step, 12)
        optimizer.zero_grad()
        losses = TwoLosses(model)(batches.batch(step))
        (losses["ce"] + 0.1 * losses["z"]).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert same(ours, model)
    row = result.last
    assert row["losses"] == {name: losses[name].item() for name in ("ce", "z")}
    assert row["grad_norm"] == float(norm)
    assert row["lr"] == stage.lr_at(11)
    assert row["tokens"] == result.tokens == 12 * ROWS * LENGTH


def test_log_rows(tmp_path: Path) -> None:
    _, result = run(tmp_path)
    rows = [json.loads(line) for line in result.log.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1] == result.last
    for row in rows:
        assert row["loss"] == pytest.approx(row["losses"]["ce"] + 0.1 * row["losses"]["z"])
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert row["shares"]["ce"] == pytest.approx(row["losses"]["ce"] / row["loss"])
        assert len(row["metrics"]["loads"]) == 2
        assert row["metrics"]["entropy"] > 0
        assert row["metrics"]["absent"] is None


@dataclass
class LinearLoss:
    """Mean squared error per row; also counts how often it is called."""

    model: nn.Module
    calls: int = 0

    def __call__(self, batch: dict[str, Tensor]) -> Mapping[str, Any]:
        self.calls += 1
        return {"loss": (self.model(batch["x"]) - batch["scale"]).square().mean(), "rows": len(batch["x"])}


class Rows:
    fingerprint = "rows"

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return {"x": torch.randn(7, 3, generator=generator), "scale": torch.tensor(float(step))}


def test_micro_batches_change_neither_result_nor_learning_rate(tmp_path: Path) -> None:
    """Seven rows in 1, 2 (uneven) and 7 parts: equal gradients up to rounding, one schedule step per update."""
    models, rows, calls = [], [], []
    for parts in (1, 2, 7):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        loss_fn = LinearLoss(model)
        stage = Stage(name="linear", steps=5, lr=0.1, micro_batches=parts)
        result = train(stage, model, loss_fn, Rows(), tmp_path / str(parts))
        models.append(model)
        calls.append(loss_fn.calls)
        rows.append([json.loads(line) for line in result.log.read_text().splitlines()])
    assert calls == [5, 10, 35]
    for model, log in zip(models[1:], rows[1:], strict=True):
        torch.testing.assert_close(model.state_dict(), models[0].state_dict(), rtol=1e-5, atol=1e-6)
        assert [row["lr"] for row in log] == [row["lr"] for row in rows[0]]
        assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in rows[0]], rel=1e-5)
        assert [row["tokens"] for row in log] == [7, 14, 21, 28, 35]


def test_parts_weigh_by_their_counted_tokens(tmp_path: Path) -> None:
    """Padded rows: a mean over counted tokens stays that mean when split (rows with 1 and 4 labels)."""
    labels = torch.full((2, 4), -100)
    labels[0, 0], labels[1] = 3, torch.arange(4)

    class Padded:
        fingerprint = "padded"

        def batch(self, step: int) -> dict[str, Tensor]:
            return {"labels": labels}

    def loss_fn(batch: dict[str, Tensor]) -> Mapping[str, Any]:
        kept = batch["labels"][batch["labels"] != -100]
        return {"loss": (model.weight.sum() * kept).mean()}

    norms = []
    for parts in (1, 2):
        model = nn.Linear(1, 1, bias=False)
        stage = Stage(name="padded", steps=1, lr=0.1, micro_batches=parts)
        norms.append(train(stage, model, loss_fn, Padded(), tmp_path / str(parts)).last["grad_norm"])
    assert norms == pytest.approx([9 / 5, 9 / 5])


def test_split_and_count() -> None:
    batch = {"x": torch.arange(5), "t": torch.tensor(3)}
    assert [part["x"].tolist() for part in split_batch(batch, 2)] == [[0, 1, 2], [3, 4]]
    assert all(part["t"] == 3 for part in split_batch(batch, 5))
    for bad, parts in ((batch, 6), ({"x": torch.zeros(2), "y": torch.zeros(3)}, 1), ({}, 1)):
        with pytest.raises(MoesaicError, match="cannot be split"):
            split_batch(bad, parts)
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert count_tokens({"input_ids": ids}) == 6
    assert count_tokens({"input_ids": ids, "attention_mask": mask}) == 3
    assert count_tokens({"input_ids": ids, "labels": torch.tensor([[1, -100, -100], [-100] * 3])}) == 1
    assert count_tokens({"x": torch.zeros(4, 2)}) == 4


def test_bf16_autocast_keeps_float32_parameters(tmp_path: Path) -> None:
    seen = []

    def loss_fn(batch: dict[str, Tensor]) -> Mapping[str, Any]:
        logits = model(batch["input_ids"])
        seen.append(logits.dtype)
        return {"ce": logits.square().mean()}

    model = TinyModel()
    train(make_stage(steps=2, dtype="bf16", coefficients={"ce": 1.0}), model, loss_fn, RandomBatches(), tmp_path)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_optimizers_sort_the_parameters() -> None:
    model = TinyModel()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain, hidden = (
        {names[id(p)] for p in group["params"]}
        for optimizer in build_optimizers(make_stage(optimizer="muon", weight_decay=0.5), model)
        for group in optimizer.param_groups
    )
    assert hidden == {"hidden.weight"}
    assert decayed == {"embed.weight", "lm_head.weight"}
    assert plain == {"hidden.bias", "norm.weight", "norm.bias"}
    (adamw,) = build_optimizers(make_stage(weight_decay=0.5), model)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.5, 0.0]
    with pytest.warns(UserWarning, match="bfloat16"):
        build_optimizers(make_stage(), TinyModel().bfloat16())


def test_frozen_parameters_and_modes_stay(tmp_path: Path) -> None:
    model = TinyModel()
    model.embed.requires_grad_(False)
    model.norm.eval()
    before = model.embed.weight.clone()
    _, result = run(tmp_path, model)
    assert torch.equal(model.embed.weight, before)
    assert model.training
    assert not model.norm.training
    saved = files.load_tensors(tmp_path / "state-12" / "parameters.safetensors")
    assert "embed.weight" not in saved
    assert "norm.running_mean" in saved
    model.requires_grad_(False)
    with pytest.raises(MoesaicError, match="nothing to train"):
        run(tmp_path / "frozen", model)
    assert result.step == 12


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda w: {"z": w.sum()}, r"\['ce', 'z'\] should be scalar"),
        (lambda w: {"ce": w.sum(), "z": w.sum()}, r"\['z'\] should be scalar"),
        (lambda w: {"ce": w}, r"\['ce'\] should be scalar"),
        (lambda w: {"ce": torch.tensor(1.0)}, "no loss depends on a trainable parameter"),
    ],
)
def test_losses_without_owner_are_refused(tmp_path: Path, outputs: Any, message: str) -> None:
    model = TinyModel()
    with pytest.raises(MoesaicError, match=message):
        train(
            make_stage(coefficients={"ce": 1.0}),
            model,
            lambda batch: outputs(model.lm_head.weight),
            RandomBatches(),
            tmp_path,
        )


def test_accelerate_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"moesaic\[train\]"):
        run(tmp_path)


# ---- states


def test_a_finished_stage_is_loaded_not_repeated(tmp_path: Path) -> None:
    model, first = run(tmp_path)
    assert [path.name for path in state_directories(tmp_path)] == ["state-12"]
    assert sorted(path.name for path in (tmp_path / "state-12").iterdir()) == ["parameters.safetensors", "state.json"]
    again, second = run(tmp_path, TinyModel(seed=1))
    assert same(model, again)
    assert (second.resumed_from, second.last, second.fingerprint) == (12, first.last, first.fingerprint)
    model = TinyModel()
    redone = train(make_stage(), model, TwoLosses(model), RandomBatches(), tmp_path, restart=True)
    assert redone.resumed_from == 0
    assert redone.last == first.last


def test_two_states_are_kept_and_log_is_cut(tmp_path: Path) -> None:
    interrupted(tmp_path, 11)
    assert [path.name for path in state_directories(tmp_path)] == ["state-9", "state-6"]
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 12, "lo')  # torn by a kill
    _, result = run(tmp_path)
    assert result.resumed_from == 9
    assert [json.loads(line)["step"] for line in result.log.read_text().splitlines()] == list(range(1, 13))


@pytest.mark.parametrize("damage", ["truncate", "flip", "json", "delete"])
def test_damaged_newest_state_falls_back(tmp_path: Path, damage: str) -> None:
    whole, _ = run(tmp_path / "whole")
    workdir = tmp_path / "cut"
    interrupted(workdir, 11)
    path = workdir / "state-9" / ("state.json" if damage == "json" else "optimizer.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.warns(UserWarning, match=r"state-9 is damaged .* trying the state before it"):
        model, result = run(workdir)
    assert result.resumed_from == 6
    assert same(model, whole)
    assert (workdir / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()

    (workdir / "state-12" / "parameters.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(MoesaicError, match=r"no state in .* can be read"):
        run(workdir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, "lr was 0.01, is 0.02"),
        ({"steps": 24}, "steps was 12, is 24"),
        ({"coefficients": {"ce": 1.0, "z": 0.2}}, "coefficients was"),
        ({"optimizer": "muon", "seed": 8}, "optimizer was 'adamw', is 'muon'; seed was 7, is 8"),
    ],
)
def test_changed_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    interrupted(tmp_path, 4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(MoesaicError, match=rf"{message}.*new work directory.*--restart"):
        run(tmp_path, **changes)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_changed_data_inputs_and_parameters_are_named(tmp_path: Path) -> None:
    model = TinyModel()
    stage, loss_fn = make_stage(), TwoLosses(model)
    with pytest.raises(Stop):
        train(stage, model, loss_fn, RandomBatches(), tmp_path, inputs={"teacher": "a"}, callbacks=[stop_after(4)])
    with pytest.raises(MoesaicError, match="data was 'random-0', is 'random-1'; input teacher was 'a', is 'b'"):
        train(stage, model, loss_fn, RandomBatches(seed=1), tmp_path, inputs={"teacher": "b"})
    model.embed.requires_grad_(False)
    with pytest.raises(MoesaicError, match="parameters was"):
        train(stage, model, loss_fn, RandomBatches(), tmp_path, inputs={"teacher": "a"})
    model.embed.requires_grad_(True)
    other_pace = make_stage(checkpoint_every=5)
    assert train(other_pace, model, loss_fn, RandomBatches(), tmp_path, inputs={"teacher": "a"}).resumed_from == 3


@pytest.mark.parametrize("bad", ["z", "gradient norm"])
def test_not_a_number_stops_before_the_update(tmp_path: Path, bad: str) -> None:
    model, seen = TinyModel(), []

    def loss_fn(batch: dict[str, Tensor]) -> Mapping[str, Any]:
        losses = dict(TwoLosses(model)(batch))
        seen.append({key: value.clone() for key, value in model.named_parameters()})
        if len(seen) == 8 and bad == "z":
            losses["z"] = losses["z"] * math.inf
        elif len(seen) == 8:  # a finite value with an infinite slope
            losses["z"] = losses["z"] + (model.lm_head.weight.sum() * 0).sqrt()
        return losses

    with pytest.raises(MoesaicError, match=rf"stage 'tiny' stopped in step 8: {bad} is (inf|nan).*state-6"):
        train(make_stage(), model, loss_fn, RandomBatches(), tmp_path)
    assert all(torch.equal(value, seen[-1][key]) for key, value in model.named_parameters()), "no update"
    assert [path.name for path in state_directories(tmp_path)] == ["state-6", "state-3"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 7


def test_full_disk_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole")
    write, states = files._write_bytes, []

    def full(path: Path, data: bytes) -> None:
        states.append(path)
        if len(states) > 3:  # the log's cut, state-3, state-6, and then there is no room
            raise OSError(28, "No space left on device")
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(MoesaicError, match=r"disk is full: .*state-9 could not be"):
        patch.setattr(files, "_write_bytes", full)
        run(tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["log.jsonl", "state-3", "state-6"]
    model, result = run(tmp_path / "cut")
    assert result.resumed_from == 6
    assert same(model, whole)


def test_load_newest_of_an_empty_folder(tmp_path: Path) -> None:
    model = TinyModel()
    assert load_newest(tmp_path, model, build_optimizers(make_stage(), model), {}) is None


# ---- other processes


def script(*arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Run this file as a program; returns what it printed."""
    command = [sys.executable, *launcher, __file__, *arguments]
    environment = os.environ | {"MOESAIC_PROGRESS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """torchrun on the CPU, from different random starts, interrupted in step 5: the numbers of one process."""
    script("linear", str(tmp_path / "one"))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    script("linear", str(tmp_path / "two"), launcher=launcher)
    one, two = ([json.loads(line) for line in (tmp_path / n / "log.jsonl").open()] for n in ("one", "two"))
    for key in ("step", "lr", "tokens", "loss", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-5)
    left, right = (files.load_tensors(tmp_path / n / "state-8" / "parameters.safetensors") for n in ("one", "two"))
    torch.testing.assert_close(left, right)


def train_linear(workdir: Path) -> None:
    """Eight steps of a linear model, interrupted once; with torchrun, each process starts elsewhere."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    model = nn.Linear(3, 1)
    stage, loss_fn = Stage(name="linear", steps=8, lr=0.1, checkpoint_every=2), LinearLoss(model)
    with pytest.raises(Stop):
        train(stage, model, loss_fn, Rows(), workdir, callbacks=[stop_after(5)])
    assert train(stage, model, loss_fn, Rows(), workdir).resumed_from == 4


EVERY = pytest.param("adamw", 1, marks=pytest.mark.slow)


@pytest.mark.parametrize(("optimizer", "stride"), [("adamw", 7), ("muon", 9), EVERY])
def test_killed_runs_resume_bit_for_bit(tmp_path: Path, optimizer: str, stride: int) -> None:
    """SIGKILL before renames, syncs and deletions, and at random moments; every resumed run equals the whole one."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    report = json.loads(script("kills", str(tmp_path), optimizer, str(stride)).splitlines()[-1])
    assert report["different"] == []
    assert report["killed"] >= 60 // stride
    assert len(report["resumed_from"]) >= 4, "kills hit different states"


def in_child(work: Any) -> int:
    """Fork, run `work` in the child, return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return child


def kill_at_operation(number: int) -> None:
    """Patch this process to kill itself at its `number`-th rename, replacement, sync or deletion."""
    count = 0

    def deadly(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in ("rename", "replace", "fsync", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def drive(out: Path, optimizer: str, stride: int) -> None:
    """Compare a whole run with killed and resumed ones; forks before torch computes, so each child starts clean."""

    def go(workdir: Path) -> None:
        run(workdir, optimizer=optimizer)

    def content(workdir: Path) -> list[bytes]:
        return [(workdir / name).read_bytes() for name in ("log.jsonl", "state-12/parameters.safetensors")]

    import accelerate  # noqa: F401  imports that are slow happen once, before the forks
    import torch._dynamo  # noqa: F401

    start = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(in_child(lambda: go(out / "whole")), 0)[1]) == 0
    duration = time.monotonic() - start
    moments = random.Random(0)
    plans: list[tuple[int, float]] = [(number, 0.0) for number in range(1, 82, stride)]
    plans += [(0, duration * (0.3 + 0.7 * moments.random())) for _ in range(8)]
    killed, resumed_from, different = 0, set(), []
    for index, (operation, wait) in enumerate(plans):
        workdir = out / f"killed-{index}"

        def victim(workdir: Path = workdir, operation: int = operation) -> None:
            kill_at_operation(operation)
            go(workdir)

        child = in_child(victim)
        if not operation:
            time.sleep(wait)
            os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        states = state_directories(workdir)
        resumed_from.add(states[0].name if states else "")
        finished = os.waitstatus_to_exitcode(os.waitpid(in_child(lambda w=workdir: go(w)), 0)[1]) == 0
        clean = sorted(path.name for path in workdir.iterdir()) == ["log.jsonl", "state-12"]
        if not finished or not clean or content(workdir) != content(out / "whole"):
            different.append([operation, wait])
    print(json.dumps({"killed": killed, "resumed_from": sorted(resumed_from), "different": different}))


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)
    match sys.argv[1:]:
        case ["kills", out, optimizer, stride]:
            drive(Path(out), optimizer, int(stride))
        case ["linear", out]:
            train_linear(Path(out))
