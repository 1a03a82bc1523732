"""Bad input gets one clear error and leaves nothing half-written, in Python and on the command line.

Also here: full disks, damaged checkpoints and states, interrupted writes, and NaN.
"""

import errno
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import moesaic
from moesaic.errors import MoesaicError
from moesaic.files import DiskFullError
from moesaic.models.checkpoint import MANIFEST
from moesaic.models.loading import load_model
from moesaic.refactor import heal as heal_module
from moesaic.refactor.pipeline import Refactoring
from moesaic.refactor.settings import RefactorConfig
from test_pipeline import CONFIG, HEAL, World, build_model, build_world, run_cli, tree, weights


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def healed(world) -> Path:
    """A refactored checkpoint without receipts. Tests work on copies."""
    world.prepare(world.folder / "healed").run("heal")
    return world.folder / "healed"


@pytest.fixture
def copy(healed, tmp_path) -> Path:
    return Path(shutil.copytree(healed, tmp_path / "copy"))


def clear(code: int, err: str, message: str) -> None:
    """Exit code 2 and one line that says what is wrong (beside the bars of transformers)."""
    lines = [line for line in err.splitlines() if line and not line.startswith(("Loading weights", "Writing model"))]
    assert code == 2, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert re.search(message, lines[0]), lines[0]


# -- refused before anything is written -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """Input of `refactor`, as a function of the world and an empty folder, and what the error must say."""

    message: str
    model: Any = None  # (world, folder) -> path
    domains: Any = None  # (world, folder) -> specs
    settings: dict[str, Any] = field(default_factory=dict)  # of RefactorConfig
    options: tuple[Any, ...] = ()  # the same for the command line


def written(name: str, content: str | bytes):
    """Specs of the tiny world, with one more domain `bad` from a file of this content."""

    def domains(world, folder):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
        return [*world.specs[:2], f"bad={folder / name}"]

    return domains


def broken(damage):
    """A copy of the dense model with something wrong."""

    def model(world, folder):
        shutil.copytree(world.model, folder / "dense")
        damage(folder / "dense")
        return folder / "dense"

    return model


def saved(build):
    """A model of another kind with the tiny world's tokenizer."""

    def model(world, folder):
        build().save_pretrained(folder / "other")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(world.model) / name, folder / "other" / name)
        return folder / "other"

    return model


def shards(folder, damage):
    build_model().save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    damage(sorted(folder.glob("model-*.safetensors"))[1])


def mamba():
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=320, hidden_size=16, state_size=4, num_hidden_layers=2)
    )


def mixture():
    sizes = dict(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_local_experts=2)
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    return transformers.MixtralForCausalLM(config)


def refactored(world, folder):
    world.prepare(folder / "moe").run("heal")
    return folder / "moe"


def nan_model():
    model = build_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[3, 3] = math.nan
    return model


BAD = {
    # a model path that is no model
    "no such folder": Bad("no config.json", model=lambda world, folder: folder / "nowhere"),
    "no config": Bad("no config.json", model=lambda world, folder: folder),
    "a file": Bad("is a file", model=lambda world, folder: world.folder / "code.jsonl"),
    "hub name, offline": Bad("cannot load a causal language model from no/such", model=lambda *_: "no/such"),
    "config of garbage": Bad("not a valid JSON", model=broken(lambda p: (p / "config.json").write_text("{nope"))),
    "no weights": Bad("no file named model.safetensors", model=broken(lambda p: (p / "model.safetensors").unlink())),
    "no tokenizer": Bad("no tokenizer could be loaded", model=broken(lambda p: (p / "tokenizer.json").unlink())),
    "a moesaic model": Bad("is a moesaic model already", model=refactored),
    # a dense checkpoint with a damaged shard
    "missing shard": Bad(
        "No such file.*model-00002", model=broken(lambda p: shards(p, lambda shard: shard.unlink()))
    ),
    "truncated shard": Bad(
        "cannot load", model=broken(lambda p: shards(p, lambda shard: shard.write_bytes(shard.read_bytes()[:-9])))
    ),
    # a model without FFNs we know
    "no FFN": Bad("no FFN of a known form", model=saved(mamba)),
    "already a mixture": Bad("is a mixture of experts already", model=saved(mixture)),
    "another tokenizer": Bad("they do not belong together", model=saved(lambda: build_model(vocab_size=200))),
    "NaN weights": Bad("FFN of layer 1 computes NaN or infinity on domain 'code'", model=saved(nan_model)),
    # domains
    "empty file": Bad("'bad' has 0 non-empty", domains=written("a.txt", "")),
    "blank file": Bad("'bad' has 0 non-empty", domains=written("a.txt", " \n\n \n")),
    "empty jsonl": Bad("'bad' has 0 non-empty", domains=written("a.jsonl", "\n")),
    "one document": Bad("'bad' has 1 non-empty", domains=written("a.txt", "Just one short text.")),
    "one document twice": Bad("'bad' has 1 non-empty", domains=written("a.jsonl", '"same"\n"same"\n')),
    "empty folder": Bad("'bad' has 0 non-empty", domains=lambda world, folder: [world.specs[0], f"bad={folder}"]),
    "too short": Bad("'bad' has .* (fewer|not more) than one window", domains=written("a.jsonl", '"a"\n"b"\n')),
    "two of one name": Bad("two domains are named 'code'", domains=lambda world, _: [*world.specs, world.specs[0]]),
    "no such text": Bad("is no file or folder", domains=lambda world, folder: [*world.specs, f"x={folder / 'x.txt'}"]),
    "one domain": Bad("one domain gives one expert", domains=lambda world, _: world.specs[:1]),
    "Latin-1": Bad(r"a.txt is not UTF-8 text \(byte 3: .*iconv", domains=written("a.txt", b"caf\xe9 au lait" * 500)),
    "Latin-1 jsonl": Bad("a.jsonl is not UTF-8", domains=written("a.jsonl", b'"caf\xe9"\n"au lait"\n')),
    "half a character": Bad("'bad' has a document that is not", domains=written("a.jsonl", '"\\ud800 x"\n"y"\n')),
    # settings
    "keep 0": Bad(r"outside \(0, 1\]", settings={"keep": 0.0}, options=("--keep", 0)),
    "keep above 1": Bad(r"outside \(0, 1\]", settings={"keep": 1.5}, options=("--keep", 1.5)),
    "keep below 0": Bad(r"outside \(0, 1\]", settings={"keep": -0.5}, options=("--keep=-0.5",)),
    "keep NaN": Bad(r"outside \(0, 1\]", settings={"keep": math.nan}, options=("--keep", "nan")),
    "keep of one layer": Bad(r"outside \(0, 1\]", settings={"keep": [0.5, 0.0]}, options=("--keep", "0.5,0")),
    "too many keeps": Bad("3 entries, .* 2 layers", settings={"keep": [0.5] * 3}, options=("--keep", "0.5,0.5,0.5")),
    "importance": Bad("importance = 'loud'", settings={"importance": "loud"}, options=("--importance", "loud")),
    "one expert": Bad("a mixture needs at least 2", settings={"experts": 1}, options=("--experts", 1)),
    "more experts than sequences": Bad(
        r"999 experts cannot be filled from \d+ sequences", settings={"experts": 999}, options=("--experts", 999)
    ),
}  # fmt: skip
SMALL = ("--length", 24, "--batch-size", 3, "--tokens", HEAL.tokens, "--no-speed", "--no-control", "--json")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(name, world, tmp_path, monkeypatch, capsys):
    bad, folder, out = BAD[name], tmp_path / "input", tmp_path / "out"
    folder.mkdir()
    model = bad.model(world, folder) if bad.model else world.model
    domains = bad.domains(world, folder) if bad.domains else world.specs
    with pytest.raises(MoesaicError, match=f"(?s){bad.message}"):
        moesaic.refactor(model, domains, out=out, config=replace(CONFIG, control=False, **bad.settings))
    assert not out.exists(), "nothing at all"
    flags = [flag for spec in domains for flag in ("-d", spec)]
    code, _, err = run_cli(monkeypatch, capsys, "refactor", model, "--out", out, *flags, *SMALL, *bad.options)
    clear(code, err, bad.message)
    assert not out.exists()


def test_keep_must_be_numbers(world, tmp_path, monkeypatch, capsys):
    code, _, err = run_cli(monkeypatch, capsys, "refactor", world.model, "-o", tmp_path / "out", "--keep", "half")
    clear(code, err, "--keep 'half' is no number")


def test_python_domains_are_checked_too(world, tmp_path):
    cases = [
        ({"a": ["x", "y"], "b": ["only one"]}, "domain 'b' has 1 non-empty"),
        ({"a": ["x", "y"], "b": "one long string"}, "domain 'b' is one string; expected a list of documents"),
        ({"a": ["x", "y"], "b": ["x", "\udc80"]}, "domain 'b' has a document that is not Unicode"),
        ([moesaic.data.Domain("a", ("x",), ("y",))] * 2, "two domains are named 'a'"),
        ([moesaic.data.Domain("a", ("x",), ("y",)), "python"], "not both"),
    ]
    for domains, message in cases:
        with pytest.raises(MoesaicError, match=message):
            moesaic.refactor(world.model, domains, out=tmp_path / "out", config=CONFIG)
    with pytest.raises(MoesaicError, match="pass tokenizer="):
        moesaic.refactor(build_model(), world.specs, out=tmp_path / "out")
    with pytest.raises(MoesaicError, match="pass tokenizer="):
        moesaic.evaluate(build_model(), world.specs)
    assert not (tmp_path / "out").exists()


def test_a_mended_mistake_is_not_held_against_the_next_run(world, tmp_path):
    """A refused run must not claim the folder for its settings."""
    with pytest.raises(MoesaicError, match="cannot be filled"):
        world.prepare(tmp_path, replace(CONFIG, experts=999)).run()
    world.prepare(tmp_path, replace(CONFIG, experts=2)).run("profile")


def test_an_output_that_cannot_be_a_folder(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(MoesaicError, match="is no writable folder; choose another --out"):
            world.prepare(out)
    code, _, err = run_cli(
        monkeypatch, capsys, "profile", world.model, "--out", tmp_path / "file", "-d", ",".join(world.specs)
    )
    clear(code, err, "cannot be written to")
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_stage(world, tmp_path):
    with pytest.raises(MoesaicError, match="no stage 'train'; the stages are profile, extract"):
        world.prepare(tmp_path / "out").run("train")
    assert not (tmp_path / "out").exists()


def test_a_real_process_prints_one_line_and_no_traceback(tmp_path):
    code = "from moesaic.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "refactor",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "-d",
        "arithmetic,licence",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    clear(done.returncode, done.stderr, "no config.json")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "x", "--model", "{dense}"], "is a dense model and has no experts"),
        (["inspect", "", "--model", "{dense}"], "is a dense model"),
        (["inspect", "@{folder}/nothing.txt", "--model", "{healed}"], "nothing.txt is no file"),
        (["inspect", "@{folder}/latin.txt", "--model", "{healed}"], "latin.txt is not UTF-8 text"),
        (["inspect", "x", "--model", "{folder}"], "no config.json"),
        (["generate", "x", "--model", "{healed}", "--expert", "3"], "--expert 3: .* has 3 experts, numbered from 0"),
        (["generate", "x", "--model", "{dense}", "--expert", "0"], "--expert 0: .* has 0 experts"),
        (["evaluate", "{dense}", "-d", "nonsense"], "no installed domain 'nonsense'"),
        (["evaluate", "{dense}", "-d", "arithmetic", "--windows", "0"], "0 windows"),
        (["evaluate", "{dense}", "-d", "arithmetic", "--length", "999999"], "fewer than one window of 999999"),
    ],
)
def test_looking_at_what_cannot_be_seen(arguments, message, world, healed, tmp_path, monkeypatch, capsys):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    filled = [a.format(dense=world.model, healed=healed, folder=tmp_path) for a in arguments]
    code, _, err = run_cli(monkeypatch, capsys, *filled)
    clear(code, err, message)


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "lacks model-00002-of"),
        (truncate, r"model-00002-of.*bytes, expected \d+: it is truncated"),
        (alter, "model-00002-of.* does not match its checksum"),
    ],
)
def test_a_damaged_shard_is_named(damage, message, copy, monkeypatch, capsys):
    load_model(copy).save_pretrained(copy, max_shard_size="20KB")
    damage(sorted(copy.glob("model-*.safetensors"))[1])
    with pytest.raises(MoesaicError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(copy)
    for command in (
        ["generate", "x", "--model", copy],
        ["inspect", "x", "-m", copy],
        ["evaluate", copy, "-d", "arithmetic"],
    ):
        code, _, err = run_cli(monkeypatch, capsys, *command)
        clear(code, err, message)


def test_a_damaged_manifest_is_named(copy, monkeypatch, capsys):
    (copy / MANIFEST).write_text("{")
    code, _, err = run_cli(monkeypatch, capsys, "inspect", "x", "--model", copy)
    clear(code, err, f"{MANIFEST} is damaged")


def test_a_config_from_a_newer_version_asks_for_an_update(copy, monkeypatch, capsys):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"moesaic_format": 99, "layouts": "of tomorrow"}))
    with pytest.raises(MoesaicError, match=r"moesaic format 99, .* update moesaic \(pip install -U moesaic\)"):
        load_model(copy)
    code, _, err = run_cli(monkeypatch, capsys, "generate", "x", "--model", copy)
    clear(code, err, "update moesaic")


@pytest.mark.parametrize("name", ["profile", "masks", "pregate"])
def test_a_damaged_intermediate_result_is_named(name, world, copy):
    truncate(copy / "work" / f"{name}.safetensors")
    with pytest.raises(MoesaicError, match=f"{name}.safetensors .* is not a whole safetensors file"):
        world.prepare(copy).run("heal")


def test_a_damaged_run_file_is_named(world, copy):
    (copy / "work" / "run.json").write_text("{")
    with pytest.raises(MoesaicError, match=r"run\.json is damaged; start over with --restart"):
        world.prepare(copy)
    world.prepare(copy, restart=True).run("profile")


def test_a_dense_checkpoint_that_lacks_a_tensor_is_refused(world, tmp_path):
    shutil.copytree(world.model, tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoesaicError, match="up_proj"):
        load_model(tmp_path / "dense")


# -- full disks -------------------------------------------------------------------------------------------------------


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_from(number: int, real):
    """`real` until call `number` (from 0); the disk is full then and stays so."""
    count = itertools.count()
    return lambda *args, **kwargs: full() if next(count) >= number else real(*args, **kwargs)


def no_leftovers(out: Path) -> bool:
    return not [
        path for path in out.parent.rglob(".*") if "moesaic" in path.name or path.name.startswith(f".{out.name}.")
    ]


@pytest.mark.parametrize("number", [0, 4, 9, 16, 25, 36])
def test_a_disk_that_fills_up_during_a_run(number, world, healed, tmp_path, monkeypatch):
    """Nothing reaches the disk from the n-th flush on: the run says so, and later continues to the same weights."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_from(number, os.fsync))
        with pytest.raises(
            DiskFullError, match=r"the disk is full: .* could not be written.* run the same command again"
        ):
            world.prepare(out).run("heal")
    assert no_leftovers(out)
    world.prepare(out).run("heal")
    assert weights(out) == weights(healed)


WRITERS = {
    "weights": ("transformers.modeling_utils.safe_save_file", "heal"),
    "tokenizer": ("transformers.PreTrainedTokenizerFast.save_pretrained", "heal"),
    "picture": ("matplotlib.figure.Figure.savefig", "receipts"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_is_full_keeps_the_last_checkpoint(writer, world, copy, monkeypatch):
    """A second run over an old one; its writers find the disk full, with a part of the file already there."""
    target, stage = WRITERS[writer]
    other = replace(CONFIG, control=False, heal=replace(HEAL, seed=4))
    before = {name: digest for name, digest in tree(copy).items() if not name.startswith("work/")}

    def half_written(*args, **kwargs):
        name = next((Path(a) for a in args[1:] if isinstance(a, str | os.PathLike)), None)
        (name / "tokenizer.json" if name.is_dir() else name).write_text("half")
        full()

    with monkeypatch.context() as patch:
        patch.setattr(target, half_written)
        with pytest.raises(DiskFullError, match="the disk is full"):
            world.prepare(copy, other, restart=True).run(stage)
    assert no_leftovers(copy)
    after = {name: digest for name, digest in tree(copy).items() if not name.startswith("work/")}
    if writer != "picture":
        assert after == before, "the old checkpoint, whole"
    load_model(copy)
    moesaic.load_tokenizer(copy)
    assert not list(copy.glob("receipts/*.png"))
    world.prepare(copy, other).run("heal")


def test_safetensors_own_words_for_a_full_disk_are_understood(world, tmp_path, monkeypatch, capsys):
    def full_rust(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full_rust)
    out = tmp_path / "out"
    code, _, err = run_cli(monkeypatch, capsys, "profile", world.model, "--out", out, "-d", ",".join(world.specs))
    clear(code, err, "the disk is full: .*profile.safetensors")
    assert [path.name for path in out.rglob("*") if path.is_file()] in ([], ["run.json"])


# -- interrupted writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(0, 5))
def test_an_interrupted_save_never_loads_as_a_mixture(number, world, copy, monkeypatch):
    """Ctrl-C before the n-th rename of one checkpoint over another: the old, the new, or a refusal; then repaired."""
    other = replace(CONFIG, heal=replace(HEAL, seed=4))
    run = world.prepare(copy, other, restart=True)
    run.run("pregate")
    old, new = load_model(copy).ffns()[0].up.clone(), None
    real, count = os.replace, itertools.count()

    def replace_file(source, target):
        if Path(target).parent == copy and next(count) == number:
            raise KeyboardInterrupt
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_file)
        with pytest.raises(KeyboardInterrupt):
            run.run("heal")
    try:
        found = load_model(copy).ffns()[0].up
    except MoesaicError as error:
        assert "does not match its checksum" in str(error) or "bytes, expected" in str(error)
        found = None
    world.prepare(copy, other).run("heal")
    new = load_model(copy).ffns()[0].up
    assert not torch.equal(old, new)
    assert found is None or torch.equal(found, old) or torch.equal(found, new)
    assert no_leftovers(copy)


# -- NaN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "stage"), [("lm", "experts"), ("router", "router")])
def test_nan_in_training_stops_and_keeps_the_last_good_state(name, stage, world, healed, tmp_path, monkeypatch, capsys):
    count = itertools.count(1)
    bad_step = {"experts": 4, "router": 3}[stage]

    class OftenSaved(heal_module.Stage):
        def __post_init__(self):
            object.__setattr__(self, "checkpoint_every", 2)
            super().__post_init__()

    def poisoned(make):
        @functools.wraps(make)
        def factory(*args, **kwargs):
            step = make(*args, **kwargs)

            def loss_fn(batch):
                losses = step(batch)
                return losses | {name: losses[name] * math.nan} if next(count) == bad_step else losses

            return loss_fn

        return factory

    with monkeypatch.context() as patch:
        patch.setattr(heal_module, "Stage", OftenSaved)
        patch.setattr(
            heal_module, f"{stage.rstrip('s')}_step", poisoned(getattr(heal_module, f"{stage.rstrip('s')}_step"))
        )
        message = f"stage '{stage} 1/2' stopped in step {bad_step}: {name} is nan.*Last good state: .*state-2"
        with pytest.raises(MoesaicError, match=message):
            world.prepare(tmp_path).run("heal")
    folder = tmp_path / "work" / "heal" / f"round-0-{stage}"
    assert [path.name for path in folder.glob("state-*")] == ["state-2"]
    assert len((folder / "log.jsonl").read_text().splitlines()) == bad_step - 1, "the log ends before the bad step"
    assert not (tmp_path / "model.safetensors").exists()
    world.prepare(tmp_path).run("heal")
    assert weights(tmp_path) == weights(healed), "goes on from there as if nothing had been"


def test_a_loaded_model_of_unknown_structure(tmp_path):
    with pytest.raises(MoesaicError, match="no FFN of a known form"):
        Refactoring(mamba(), None, [], tmp_path / "out", RefactorConfig())
    assert not (tmp_path / "out").exists()
