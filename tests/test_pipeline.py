"""The spine end to end on a tiny model: stages one by one, resume after kills, reruns, restarts, the command line.

Run as a script it is the driver that starts runs and kills them.
"""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import moesaic
from moesaic import progress
from moesaic.cli.main import main
from moesaic.data.arithmetic import word_problems
from moesaic.errors import MoesaicError
from moesaic.models.loading import load_model
from moesaic.refactor import pipeline, receipts
from moesaic.refactor.api import prepare
from moesaic.refactor.heal import HealConfig
from moesaic.refactor.pipeline import Refactoring
from moesaic.refactor.settings import RefactorConfig
from moesaic.training.schedule import Stage

VOCAB, DOMAINS = 320, ["code", "math", "prose"]
HEAL = HealConfig(tokens=2 * 6 * 3 * 24, rounds=2, batch_size=3, length=24, dtype="fp32", seed=3)  # 6 expert steps
CONFIG = RefactorConfig(windows=3, profile_tokens=480, speed=False, heal=HEAL)
PICTURES = ["channel_ownership.png", "expert_domain.png", "loss_curves.png", "token_strip.png"]


# -- a tiny world -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A folder with a dense model, its tokenizer, and three domains of text."""

    folder: Path

    @property
    def model(self) -> str:
        return str(self.folder / "dense")

    @property
    def specs(self) -> list[str]:
        return [f"{name}={self.folder / name}.jsonl" for name in DOMAINS]

    def prepare(self, out, config=CONFIG, *, model=None, domains=None, **kwargs) -> Refactoring:
        return prepare(model or self.model, domains or self.specs, out=out, config=config, **kwargs)


WORDS = "the old river runs under a stone bridge while children watch boats pass slowly toward open sea"


def texts() -> dict[str, list[str]]:
    rng, words = random.Random(0), WORDS.split()

    def code() -> str:
        return "\n".join(f"def f{rng.randint(0, 99)}(x):\n    return x + {rng.randint(0, 9)}" for _ in range(6))

    prose = [" ".join(rng.choices(words, k=60)) for _ in range(20)]
    return {"code": [code() for _ in range(20)], "math": list(word_problems(8)), "prose": prose}


def build_tokenizer(documents):
    """A byte-level BPE: every text encodes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")


def build_model(seed=0, **changes):
    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()


def build_world(folder: Path) -> World:
    documents = texts()
    build_model().save_pretrained(folder / "dense")
    build_tokenizer(list(itertools.chain(*documents.values()))).save_pretrained(folder / "dense")
    for name, rows in documents.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return World(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world):
    """One whole, uninterrupted run: its folder and its receipt. Tests must not change it."""
    out = world.folder / "finished"
    return SimpleNamespace(out=out, receipt=world.prepare(out).run())


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(out: Path) -> str:
    return tree(out)["model.safetensors"]


def forbid_work(monkeypatch):
    """Whoever trains or measures now fails."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(pipeline, "profile", lambda *args, **kwargs: pytest.fail("profiled again"))
    monkeypatch.setattr(receipts, "measure_quality", lambda *args, **kwargs: pytest.fail("measured again"))


# -- the whole --------------------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_checkpoint_and_receipts(finished):
    receipt = finished.receipt
    assert json.loads((finished.out / "receipts" / "receipt.json").read_text()) == receipt
    assert sorted(receipt["pictures"]) == PICTURES
    for name in PICTURES:
        assert (finished.out / "receipts" / name).read_bytes().startswith(b"\x89PNG")
    assert "code" in (finished.out / "receipts" / "receipt.md").read_text(encoding="utf-8")
    assert receipt["model"]["experts"] == receipt["quality"]["domains"] == DOMAINS and receipt["speed"] is None
    assert receipt["settings"]["heal_tokens"] == HEAL.tokens
    average = receipt["quality"]["average"]
    assert average["moe"] < average["unhealed"] - 0.05, "healing helps"
    assert sorted(average) == ["dense", "moe", "oracle", "pruned", "random", "unhealed"]
    assert not list(finished.out.rglob(".*")), "no temporary files are left"


def test_the_checkpoint_is_the_model_the_receipt_measured(world, finished):
    result = moesaic.evaluate(finished.out, world.specs, windows=3, length=24)
    nats = [result[name]["nats_per_token"] for name in DOMAINS]
    assert nats == pytest.approx(finished.receipt["quality"]["nats"]["moe"], rel=1e-5)
    bits = [result[name]["bits_per_byte"] for name in DOMAINS]
    assert bits == pytest.approx(finished.receipt["quality"]["bits_per_byte"]["moe"], rel=1e-5)
    dense = moesaic.evaluate(world.model, world.specs, windows=3, length=24)
    nats = [dense[name]["nats_per_token"] for name in DOMAINS]
    assert nats == pytest.approx(finished.receipt["quality"]["nats"]["dense"], rel=1e-5)


def test_tokens_and_text_survive_in_the_checkpoint(world, finished):
    ours, theirs = moesaic.load_tokenizer(finished.out), moesaic.load_tokenizer(world.model)
    text = "def f(x):\n    return 'ünïcode ☂' # river"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"] and ours.decode(ours(text)["input_ids"]) == text


def test_the_source_stays_as_it_was(world, finished):
    pairs = zip(load_model(world.model).parameters(), build_model().parameters(), strict=True)
    assert all(torch.equal(now, before) for now, before in pairs)


def test_the_front_door_stays_open_after_its_package_is_imported():
    """The function and the package have one name; importing any module of the package must not hide the function."""
    assert "moesaic.refactor.pipeline" in sys.modules and callable(moesaic.refactor)


def test_a_model_object_in_bf16(world, tmp_path):
    model, tokenizer = build_model().to(torch.bfloat16), moesaic.load_tokenizer(world.model)
    before = [parameter.clone() for parameter in model.parameters()]
    result = moesaic.refactor(model, texts(), out=tmp_path, tokenizer=tokenizer, config=replace(CONFIG, control=False))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters()), "the caller's model is not converted"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stored.ffns()[0].up.dtype == torch.bfloat16, "stored as it came"
    torch.testing.assert_close(stored.ffns()[0].up, result.model.ffns()[0].up.to(torch.bfloat16), rtol=0, atol=0)
    assert result.receipt["model"]["dtype"] == "bfloat16" and "pruned" not in result.receipt["quality"]["nats"]
    assert result.receipt["bytes"]["dense"] == 2 * result.receipt["bytes"]["dense_parameters"]


def test_clusters_instead_of_labels(world, tmp_path):
    run = world.prepare(tmp_path, replace(CONFIG, experts=2, control=False))
    receipt = run.run()
    assert receipt["model"]["experts"] == ["cluster-0", "cluster-1"] and receipt["settings"]["labels"] == "clusters"
    assert load_model(tmp_path).config.expert_names == ["cluster-0", "cluster-1"]


def test_untied_experts_and_a_keep_per_layer(world, tmp_path):
    run = world.prepare(tmp_path, replace(CONFIG, untied=True, keep=[0.25, 0.5]))
    run.run("heal")
    layouts = [blocks.layout for blocks in load_model(tmp_path).ffns()]
    assert [layout.width for layout in layouts] == [3 * 12, 3 * 24]
    assert all(len(block.owners) == 1 for layout in layouts for block in layout.blocks)
    assert [mask.shape for mask in (run.pruned.ffns()[0].layout.mask(), run.pruned.ffns()[1].layout.mask())] == [
        (1, 12), (1, 24)
    ], "the control is as wide as one expert"  # fmt: skip


def test_speed_is_asked_for_with_enough_tokens(world, finished, monkeypatch):
    """Also when a domain is shorter than the prompts."""
    asked = []
    monkeypatch.setattr(receipts, "measure_speed", lambda dense, moe, ids, **kwargs: asked.append((ids, kwargs)))
    run = world.prepare(finished.out)
    receipts._speed(run)
    short = replace(run.labelled[0], train=run.labelled[0].train[:30], validation=run.labelled[0].validation[:30])
    for domains in ([short, *run.labelled[1:]], [short]):
        receipts._speed(SimpleNamespace(dense=run.dense, healed=None, domains=domains))
    for (prompts, kwargs), length in zip(asked, (96, 96, 30), strict=True):
        assert prompts.shape == (32, length) and kwargs["prefill_tokens"] == length
        assert kwargs["decode_context"] + kwargs["decode_steps"] <= length
    strips = receipts.token_strips(load_model(finished.out), run.tokenizer, [short])
    assert len(strips[0][1]) == 30


# -- stages, reruns, restarts -----------------------------------------------------------------------------------------


def test_stage_by_stage_equals_one_go(world, finished, tmp_path, monkeypatch):
    leaves = {
        "profile": {"run.json", "profile.safetensors", "coverage.json"},
        "extract": {"masks.safetensors", "ownership.json"},
        "pregate": {"pregate.safetensors"},
        "heal": set(),
    }
    expected = set()
    for stage, new in leaves.items():
        assert world.prepare(tmp_path).run(stage) is None
        expected |= new
        assert {path.name for path in (tmp_path / "work").iterdir() if path.is_file()} == expected, stage
        assert (tmp_path / "model.safetensors").exists() == (stage == "heal")
    assert weights(tmp_path) == weights(finished.out)
    receipt = world.prepare(tmp_path).run()
    for part in ("quality", "router", "layout", "bytes", "coverage"):
        assert receipt[part] == finished.receipt[part], part


def test_a_rerun_returns_the_same_receipt_without_working(world, finished, monkeypatch):
    before = tree(finished.out)
    forbid_work(monkeypatch)
    assert world.prepare(finished.out).run() == finished.receipt
    assert tree(finished.out) == before


def test_a_rerun_replaces_what_was_deleted_and_trains_nothing(world, finished, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(finished.out, out)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: pytest.fail("trained again"))
    for name in ("model.safetensors", "receipts/receipt.md", "tokenizer.json"):
        (out / name).unlink()
    receipt = world.prepare(out).run()
    for part in ("quality", "router", "layout", "bytes"):
        assert receipt[part] == finished.receipt[part], part
    assert tree(finished.out).keys() == tree(out).keys() and weights(out) == weights(finished.out)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"config": replace(CONFIG, keep=0.4)}, "settings"),
        ({"config": replace(CONFIG, heal=replace(HEAL, seed=4))}, "settings"),
        ({"domains": lambda world: world.specs[:2]}, "data"),
        ({"domains": lambda world: world.specs[::-1]}, "data"),
        ({"model": lambda world: build_model(seed=1)}, "model"),
    ],
)
def test_a_changed_run_is_refused_and_nothing_is_touched(world, finished, changed, what):
    before = tree(finished.out)
    arguments = {key: value(world) if callable(value) else value for key, value in changed.items()}
    if "model" in arguments:
        arguments["tokenizer"] = moesaic.load_tokenizer(world.model)
    with pytest.raises(MoesaicError, match=f"holds a run with different {what}; .*--restart, or choose another --out"):
        world.prepare(finished.out, **arguments).run()
    assert tree(finished.out) == before


def test_restart_drops_the_earlier_run(world, tmp_path):
    world.prepare(tmp_path).run("heal")
    (tmp_path / "receipts").mkdir()
    (tmp_path / "receipts" / "receipt.json").write_text("{}")
    first = weights(tmp_path)
    other = replace(CONFIG, heal=replace(HEAL, seed=4))
    world.prepare(tmp_path, other, restart=True).run("pregate")
    assert not (tmp_path / "receipts").exists() and not (tmp_path / "work" / "heal" / "round-0-experts").exists()
    assert weights(tmp_path) == first, "the old checkpoint stays until there is a new one"
    world.prepare(tmp_path, other).run("heal")
    assert weights(tmp_path) != first


def test_restart_does_not_delete_a_work_folder_of_somebody_else(world, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("three years")
    world.prepare(tmp_path, restart=True).run("profile")
    assert (tmp_path / "work" / "thesis.txt").read_text() == "three years"


# -- kills ------------------------------------------------------------------------------------------------------------

LOG_KILLS = [2, 7, 11, 16]  # before this log row: in the first router, experts, second router, second experts stage
RENAME_STRIDE = 11


def test_killed_runs_continue_to_the_same_weights(world, finished, tmp_path):
    """SIGKILL in the middle of healing and before every few renames; the rerun's bytes are the uninterrupted run's."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    environment = os.environ | {"MOESAIC_PROGRESS": "0"}
    done = subprocess.run(
        [sys.executable, __file__, str(world.folder), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed = json.loads(done.stdout.splitlines()[-1])
    assert all(f"log-{number}" in killed for number in LOG_KILLS) and len(killed) >= 9
    assert list((tmp_path / "log-7/work/heal/round-0-experts").glob("state-*")), "this one resumes inside a stage"
    for name in killed:
        world.prepare(tmp_path / name).run("heal")
        assert weights(tmp_path / name) == weights(finished.out), name
        for log in sorted((finished.out / "work/heal").glob("*/log.jsonl")):
            again = tmp_path / name / log.relative_to(finished.out)
            assert again.read_text() == log.read_text(), f"{name}: {log.parent.name}"
        assert not list((tmp_path / name).rglob(".*")), f"{name}: leftovers of killed writers are removed"


def drive(world: World, out: Path) -> None:
    """Start runs in forked children that kill themselves at many points; print the names of the killed ones."""
    from moesaic.training import loop

    class OftenSaved(Stage):
        def __post_init__(self):
            object.__setattr__(self, "checkpoint_every", 2)
            super().__post_init__()

    sys.modules["moesaic.refactor.heal"].Stage = OftenSaved

    def killed(name: str, arm) -> bool:
        if (child := os.fork()) == 0:
            try:
                arm()
                world.prepare(out / name).run("heal")
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)

    def before(module, name: str, number: int) -> None:
        """Replace `module.name` by itself, with a kill before call `number` (from 1)."""
        real, count = getattr(module, name), itertools.count(1)

        def call(*args, **kwargs):
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(module, name, call)

    names = [f"log-{n}" for n in LOG_KILLS if killed(f"log-{n}", lambda n=n: before(loop, "append_jsonl", n))]
    for target in ("rename", "replace"):
        for number in itertools.count(1, RENAME_STRIDE):
            name = f"{target}-{number}"
            if not killed(name, lambda target=target, number=number: before(os, target, number)):
                break
            names.append(name)
    print(json.dumps(names))


# -- command line -----------------------------------------------------------------------------------------------------


def run_cli(monkeypatch, capsys, *arguments):
    """Exit code, stdout and stderr of `moesaic ARGUMENTS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["moesaic", *map(str, arguments)])
    monkeypatch.setattr(progress, "_quiet", False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_refactor_from_the_command_line_is_the_same_run(world, finished, tmp_path, monkeypatch, capsys):
    domains = [argument for spec in world.specs for argument in ("-d", spec)]
    settings = ["--tokens", HEAL.tokens, "--length", 24, "--batch-size", 3, "--seed", 3, "--no-speed", "--no-control"]
    command = ["refactor", world.model, "--out", tmp_path, *domains, *settings]
    code, out, _ = run_cli(monkeypatch, capsys, *command, "--until", "profile")
    assert code == 0 and "stage profile is done" in out
    code, out, _ = run_cli(monkeypatch, capsys, *command, "--json")
    receipt = json.loads(out)
    assert code == 0 and receipt["settings"]["heal_tokens"] == HEAL.tokens
    assert receipt["quality"]["domains"] == DOMAINS and receipt["speed"] is None
    code, out, _ = run_cli(monkeypatch, capsys, *command)
    assert code == 0 and "receipt.md" in out and "oracle" in out, "again, for people"


def test_profile_from_the_command_line(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "thin.jsonl").write_text('"A first sentence of a few words."\n"And a second one, no longer."\n')
    domains = f"{world.specs[0]},thin={tmp_path / 'thin.jsonl'}"
    arguments = ["profile", world.model, "--out", tmp_path / "out", "-d", domains]
    code, out, _ = run_cli(monkeypatch, capsys, *arguments, "--json")
    coverage = json.loads(out)
    assert code == 0 and set(coverage["tokens"]) == {"code", "thin"}
    code, out, _ = run_cli(monkeypatch, capsys, *arguments)
    assert code == 0 and f"{coverage['tokens']['code']:,d} tokens" in out
    assert "warning: domain 'thin'" in out, "too thin to refactor is still worth a report"


def test_looking_at_a_checkpoint(world, finished, tmp_path, monkeypatch, capsys):
    text = "def f(x): return x"
    code, out, _ = run_cli(monkeypatch, capsys, "inspect", text, "--model", finished.out, "--json")
    rows = json.loads(out)["tokens"]
    assert code == 0 and "".join(row["token"] for row in rows).endswith(text)
    assert {row["expert"] for row in rows} <= set(DOMAINS)
    (tmp_path / "text.txt").write_text(text)
    assert run_cli(monkeypatch, capsys, "inspect", f"@{tmp_path / 'text.txt'}", "-m", finished.out, "--json")[1] == out
    assert "def" in run_cli(monkeypatch, capsys, "inspect", text, "--model", finished.out)[1]
    common = ["generate", "def f", "--model", finished.out, "--max-new-tokens", 4, "--json"]
    code, out, _ = run_cli(monkeypatch, capsys, *common)
    assert code == 0 and json.loads(out)["text"].startswith("def f")
    code, out, _ = run_cli(monkeypatch, capsys, *common, "--expert", 1)
    assert code == 0 and {row["expert"] for row in json.loads(out)["tokens"]} == {"math"}
    evaluate = ["evaluate", finished.out, "--windows", 3, "--length", 24, "-d", ",".join(world.specs)]
    code, out, _ = run_cli(monkeypatch, capsys, *evaluate, "--json")
    nats = [json.loads(out)[name]["nats_per_token"] for name in DOMAINS]
    assert code == 0 and nats == pytest.approx(finished.receipt["quality"]["nats"]["moe"], rel=1e-5)
    code, out, _ = run_cli(monkeypatch, capsys, *evaluate)
    assert code == 0 and f"{nats[1]:.4f}" in out


def test_ctrl_c_says_how_to_go_on(world, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "profile", interrupt)
    code, _, err = run_cli(monkeypatch, capsys, "profile", world.model, "--out", tmp_path, "-d", ",".join(world.specs))
    assert code == 130 and "the same command continues where it stopped" in err


if __name__ == "__main__":
    drive(World(Path(sys.argv[1])), Path(sys.argv[2]))
