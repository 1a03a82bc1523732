"""Files are whole or absent, whatever fails: exceptions, full disks, truncation. And progress stays out of the way."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moesaic import files, progress
from moesaic.errors import MoesaicError


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB, where the machine lets us mount one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_text_and_json_replace_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    files.atomic_write_text(path, "old")
    files.atomic_write_json(path, {"ü": [1, 2.5]})
    assert json.loads(path.read_text()) == {"ü": [1, 2.5]}
    with pytest.raises(ValueError):
        files.atomic_write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"ü": [1, 2.5]}
    assert names(path.parent) == ["a.json"]


def test_json_lines_and_checksum(tmp_path: Path) -> None:
    for step in (1, 2):
        files.append_jsonl(tmp_path / "log", {"step": step})
    assert (tmp_path / "log").read_text() == '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "abc").write_text("abc")
    published = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's example
    assert files.sha256_file(tmp_path / "abc") == published


@pytest.mark.parametrize("existing", [False, True])
def test_directory_appears_only_on_success(tmp_path: Path, existing: bool) -> None:
    path = tmp_path / "model"
    if existing:
        path.mkdir()
        (path / "old").touch()
    with pytest.raises(KeyError), files.atomic_directory(path) as folder:
        (folder / "half").touch()
        raise KeyError
    assert names(tmp_path) == (["model"] if existing else [])
    with files.atomic_directory(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "whole").touch()
        assert not existing or names(path) == ["old"], "the old folder stands until the swap"
    assert names(tmp_path) == ["model"]
    assert names(path) == ["sub"]


@pytest.mark.parametrize("failing", [1, 2])
def test_directory_survives_a_failing_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    path, calls, rename = tmp_path / "model", [], os.rename
    path.mkdir()
    (path / "old").touch()

    def flaky(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise PermissionError
        rename(source, target)

    monkeypatch.setattr(os, "rename", flaky)
    with pytest.raises(PermissionError), files.atomic_directory(path):
        pass
    assert names(tmp_path) == ["model"]
    assert names(path) == ["old"]


def test_directory_killed_between_the_two_renames_comes_back(tmp_path: Path) -> None:
    backup = tmp_path / ".model.moesaic-old"
    backup.mkdir()
    (backup / "old").touch()
    (tmp_path / ".model.moesaic-tmp-01234567").mkdir()
    (tmp_path / ".vim.old").mkdir()
    files.clean_leftovers(tmp_path)
    assert names(tmp_path) == [".vim.old", "model"]
    assert names(tmp_path / "model") == ["old"]


def test_directory_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(MoesaicError, match="is a file"), files.atomic_directory(tmp_path / "model"):
        pass


def test_tensors_round_trip(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5, dtype=torch.bfloat16), "c": torch.empty(0)}
    files.save_tensors(tmp_path / "t", tensors, {"made": "here"})
    loaded = files.load_tensors(tmp_path / "t")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert files.load_metadata(tmp_path / "t") == {"made": "here"}


def test_damaged_tensors_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "t"
    with pytest.raises(MoesaicError, match="does not exist"):
        files.load_tensors(path)
    files.save_tensors(path, {"a": torch.zeros(100)})
    whole = path.read_bytes()
    for data in (b"", whole[:5], whole[:40], whole[:-1], b"\xff" * 200):
        path.write_bytes(data)
        for load in (files.load_tensors, files.load_metadata):
            with pytest.raises(MoesaicError, match=r"t \(\d+ B\) is not a whole safetensors file"):
                load(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_by_error_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "a.txt"
    files.atomic_write_text(path, "old")

    def full(target: Path, data: bytes) -> None:
        target.write_bytes(data[:2])
        raise OSError(code, "full")

    monkeypatch.setattr(files, "_write_bytes", full)
    with pytest.raises(files.DiskFullError, match=r"a\.txt could not be written \(5 B needed\).*Free some space"):
        files.atomic_write_text(path, "newer")
    assert path.read_text() == "old"
    message = r"disk is full: .*/model could not be written \(3 B needed\)"
    with pytest.raises(files.DiskFullError, match=message), files.atomic_directory(tmp_path / "model") as folder:
        files.atomic_write_text(folder / "x", "new")
    assert names(tmp_path) == ["a.txt"]


def test_full_disk_for_real(tiny_disk: Path) -> None:
    files.save_tensors(tiny_disk / "t", {"a": torch.ones(1000)})
    big = {"a": torch.zeros(100_000)}
    with pytest.raises(files.DiskFullError, match=r"390\.6 KiB needed"):
        files.save_tensors(tiny_disk / "t", big)
    message = "model could not be written"
    with pytest.raises(files.DiskFullError, match=message), files.atomic_directory(tiny_disk / "model") as folder:
        (folder / "raw").write_bytes(bytes(400_000))
    assert files.load_tensors(tiny_disk / "t")["a"].sum() == 1000

    row = {"text": "x" * 3000}
    with pytest.raises(files.DiskFullError, match="log could not be written"):
        for _ in range(1000):
            files.append_jsonl(tiny_disk / "log", row)
    assert set((tiny_disk / "log").read_text().splitlines()) == {json.dumps(row)}, "no torn line"
    assert names(tiny_disk) == ["log", "t"]


def test_track_yields_everything_and_is_silent_when_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track([1, 2, 3], "count")) == [1, 2, 3]
    assert list(progress.track(iter("ab"), "count", total=2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_plain_lines_at_most_every_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress("heal", total=30, completed=10) as bar:
        for _ in range(10):
            clock[0] += 4.0
            bar.advance(loss=2.34567)
        assert bar.seconds_left() == 40.0
    assert capsys.readouterr().err.splitlines() == [
        "heal: 13/30 steps, 0:01:08 left, loss 2.346",
        "heal: 16/30 steps, 0:00:56 left, loss 2.346",
        "heal: 19/30 steps, 0:00:44 left, loss 2.346",
    ]


@pytest.mark.parametrize("how", ["environment", "set_quiet"])
def test_progress_can_be_switched_off(
    how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    if how == "environment":
        monkeypatch.setenv("MOESAIC_PROGRESS", "0")
    progress.set_quiet(how == "set_quiet")
    try:
        assert len(list(progress.track(range(5), "count"))) == 5
    finally:
        progress.set_quiet(False)
    assert capsys.readouterr().err == ""


def test_bars_in_a_terminal_nest_and_show_the_latest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(KeyError), progress.Progress("rounds", total=2) as outer:
        for layer in progress.track(range(3), "layers [x]", unit="layers"):
            outer.update(layer=layer, loss=1.25)
        outer.advance()
        raise KeyError
    shown = capsys.readouterr().err
    assert "layers [x]" in shown
    assert "3/3" in shown
    assert "layer 2, loss 1.25" in shown
    assert progress._bars._display is None, "the display is closed with the last bar, also after an error"
