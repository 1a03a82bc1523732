"""Recorded routes are those of one whole forward over the same tokens, whatever the batch; cards fit their models."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel, Qwen2MoeConfig
from typer.testing import CliRunner, Result

from families import COMMON, tiny
from moesaic.analyze.route_recording import Prompt, Sampling, card_of, domain_prompts, read_prompts, record
from moesaic.cli.main import app
from moesaic.data.domain import Domain
from moesaic.errors import MoesaicError
from moesaic.models.attach import attach
from moesaic.models.ffn_sites import find_ffn_sites
from moesaic.models.loading import load_model, load_tokenizer
from moesaic.models.modeling_moesaic import MoesaicForCausalLM
from moesaic.models.routed import attach_router
from moesaic.models.stock import record_plans
from moesaic.pocket import pocket_path
from moesaic.schedule.trace import Trace
from moesaic.schedule.work import ANY, Key

TEXTS = ["ab", "the quick brown fox", "b", "jumps over the lazy dog and on", "x y z", "seven words"]
PROMPTS = [Prompt(f"p{number}", text) for number, text in enumerate(TEXTS)]
OUTPUTS = [9, 1, 20, 3, 0, 12]
GREEDY = Sampling(temperature=0.0)


class Letters:
    """A tokenizer with a token per letter."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[3 + ord(letter) % 90 for letter in each] for each in text]}

    def decode(self, token_ids: Any, **_: Any) -> str:
        return " ".join(map(str, token_ids))


def refactored(family: str = "llama") -> MoesaicForCausalLM:
    dense = tiny(family)
    generator = torch.Generator().manual_seed(7)
    masks = [torch.rand(3, site.width, generator=generator) < 0.5 for site in find_ffn_sites(dense)]
    model = attach(dense, masks, ["alpha", "beta", "gamma"])
    for name, parameter in model.pregate.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def stock(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "mixtral":
        config: Any = MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    else:
        options = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
        config = Qwen2MoeConfig(**COMMON, **options, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def routed(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**COMMON)).eval()
    return attach_router(dense, name, experts=4, noise=0.5)


MODELS = {
    "refactored": refactored,
    "refactored-gpt2": lambda: refactored("gpt2"),
    "mixtral": lambda: stock("mixtral"),
    "qwen2-moe": lambda: stock("qwen2-moe"),
    "top-k": lambda: routed("top-k"),
    "top-p": lambda: routed("top-p"),
}


def recorded(model: PreTrainedModel, **changes: Any) -> Trace:
    return record(model, Letters(), PROMPTS, **{"output_tokens": OUTPUTS, "batch": 4, **changes})


def whole_forward(model: PreTrainedModel, ids: list[int]) -> list[list[set[int]]]:
    """Per token and layer the experts, from one forward over everything."""
    ids_1S = torch.tensor([ids])
    with torch.no_grad():
        if isinstance(model, MoesaicForCausalLM):
            return [[{int(expert)}] for expert in model(ids_1S).expert_index[0]]
        with record_plans(model) as log:
            model(input_ids=ids_1S)
    layers = [plan.index.tolist() for plan in log.last]
    return [[set(layer[t]) - {-1} for layer in layers] for t in range(len(ids))]


@pytest.mark.parametrize("name", MODELS)
def test_routes_are_those_of_a_whole_forward(name: str) -> None:
    model = MODELS[name]()
    trace = recorded(model)
    seen = set()
    for r in range(trace.requests):
        first = int(trace.prompt_row[r])
        rows = slice(first, first + int(trace.prompt_rows[r] + trace.decode_rows[r]))
        assert trace.prompt_tokens[r] == len(TEXTS[r]) + 1
        assert trace.decode_rows[r] == max(OUTPUTS[r] - 1, 0) and trace.decode_row[r] == first + trace.prompt_rows[r]
        expected = whole_forward(model, trace.token_ids[rows].tolist())
        assert [[set(layer) - {-1} for layer in row] for row in trace.routes[rows].tolist()] == expected
        seen.update(str(row) for row in expected)
    assert len(seen) > 2  # the routes vary
    assert trace.stretched() == 0.0


@pytest.mark.parametrize("name", MODELS)
def test_batches_change_nothing(name: str) -> None:
    model = MODELS[name]()
    alone, together = recorded(model, batch=1), recorded(model, batch=6)
    assert np.array_equal(alone.token_ids, together.token_ids)
    assert np.array_equal(alone.routes, together.routes)
    assert (alone.weights is None) == (together.weights is None) == name.startswith("refactored")
    if alone.weights is not None:
        np.testing.assert_allclose(alone.weights, together.weights, atol=2e-3)
        assert ((alone.weights > 0) <= (alone.routes >= 0)).all()


def test_greedy_is_what_generate_gives() -> None:
    model = refactored()
    trace = recorded(model, sampling=GREEDY, output_tokens=8)
    ids = torch.tensor([[1, *Letters()(TEXTS[1:2])["input_ids"][0]]])
    expected = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)[0, :-1]
    first = int(trace.prompt_row[1])
    assert trace.token_ids[first : first + len(expected)].tolist() == expected.tolist()


def test_seeds_and_temperature() -> None:
    model = refactored()
    traces = [recorded(model, sampling=Sampling(*each)) for each in ((1.0, 0), (1.0, 0), (1.0, 1), (0.0, 1), (1e-4, 2))]
    same = [np.array_equal(traces[0].token_ids, trace.token_ids) for trace in traces]
    assert same == [True, True, False, False, False]
    assert np.array_equal(traces[3].token_ids, traces[4].token_ids)  # a cold draw is the most probable token
    ends = recorded(model, output_tokens=60, batch=6, sampling=Sampling(5.0))
    assert 2 not in ends.token_ids and len(np.unique(ends.token_ids)) > 80
    with pytest.raises(MoesaicError, match="temperature nan"):
        Sampling(float("nan"))


def test_draws_follow_the_model() -> None:
    model, prompts = refactored(), [Prompt(str(number), "a") for number in range(3000)]
    trace = record(model, Letters(), prompts, 2, batch=1000)
    ids = trace.token_ids.reshape(3000, 3)
    with torch.no_grad():
        logits = model(torch.tensor(ids[:1, :2])).logits[0, -1]
    logits[2] = -torch.inf
    counts = np.bincount(ids[:, 2], minlength=96) / 3000
    assert np.abs(counts - logits.softmax(-1).numpy()).sum() < 0.2


def test_a_recording_changes_nothing_and_has_its_sources(tmp_path: Path) -> None:
    model = refactored().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace = recorded(model, arrival_s=[0, 0, 1, 2, 3, 3.5])
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert trace.arrival_s.tolist() == [0, 0, 1, 2, 3, 3.5]
    assert trace.meta["prompt_ids"] == [prompt.id for prompt in PROMPTS] and trace.meta["cut"] == 0
    trace.save(tmp_path / "a.trace")
    assert np.array_equal(Trace.load(tmp_path / "a.trace").routes, trace.routes)


def test_prompts_leave_room_for_outputs() -> None:
    model = refactored()  # 128 positions
    trace = recorded(model, output_tokens=119)
    assert trace.prompt_tokens.tolist() == [3, 10, 2, 10, 6, 10]  # 10 + 118 = 128
    assert trace.meta["cut"] == 3
    assert recorded(model, prompt_tokens=5).prompt_tokens.tolist() == [3, 5, 2, 5, 5, 5]
    with pytest.raises(MoesaicError, match="130 output tokens leave no room for a prompt: the model has 128"):
        recorded(model, output_tokens=130)
    with pytest.raises(MoesaicError, match="and prompts may have 0 tokens"):
        recorded(model, prompt_tokens=0)


# -- cards -------------------------------------------------------------------------------------------------------------
def test_card_of_a_refactored_model() -> None:
    model = refactored()
    trace = recorded(model, weight_bytes=4)
    card, ffns = trace.card, model.ffns()
    assert (card.layers, card.experts, card.top_k, card.known_at) == (2, 3, 1, "request")
    assert (card.d, card.ffn, card.matrices, card.heads, card.kv_heads, card.head_dim) == (32, 48, 3, 4, 2, 8)
    blocks, experts = trace.layout("block"), trace.layout("expert")
    assert blocks.total_bytes == sum(ffn.bytes() for ffn in ffns)
    for expert in range(3):
        assert experts.bytes[Key(ANY, expert)] == sum(ffn.bytes([expert]) for ffn in ffns)
        assert sum(blocks.bytes[key] for key in blocks.entries[1, expert]) == ffns[1].bytes([expert])
    assert card_of(model.to(torch.bfloat16), name="pocket").weight_bytes == 2.0


@pytest.mark.parametrize("kind", ["mixtral", "qwen2-moe"])
def test_card_of_a_stock_mixture(kind: str) -> None:
    model = stock(kind)
    card = recorded(model).card
    assert (card.layers, card.experts, card.top_k, card.known_at) == (2, 4, 2, "gate")
    assert (card.d, card.ffn, card.matrices, card.weight_bytes) == (32, 48 if kind == "mixtral" else 16, 3, 4.0)
    mixture = {"mixtral": 0, "qwen2-moe": 3 * 32 * 24 + 32}[kind]  # the shared expert and its gate
    assert card.shared_params == mixture


def test_card_of_a_routed_model() -> None:
    card = card_of(routed("top-k"))
    assert (card.layers, card.experts, card.known_at, card.ffn, card.matrices) == (2, 4, "gate", 48, 3)
    assert card_of(routed("embedding-random")).known_at == "request"


# -- bad input ---------------------------------------------------------------------------------------------------------
def test_dense_models_and_bad_prompts() -> None:
    with pytest.raises(MoesaicError, match="LlamaForCausalLM is dense and has no routes to record: refactor it first"):
        recorded(tiny("llama"))
    model = refactored()
    with pytest.raises(MoesaicError, match="prompt 'void' is empty"):
        record(model, Letters(), [Prompt("void", "")], 4)
    with pytest.raises(MoesaicError, match="0 prompts in batches of 32"):
        record(model, Letters(), [], 4)
    with pytest.raises(MoesaicError, match="2 output lengths from 1 for 6 prompts"):
        recorded(model, output_tokens=[1, 2])


BAD_PROMPTS = [
    ("{", "line 1: not JSON"),
    ('{"id": "a", "text": "x"}\n[1]', "line 2: expected"),
    ('{"id": "a"}', "line 1: expected"),
    ('{"text": "a"}', "line 1: expected"),
    ('{"id": "a", "turns": ["x", 3]}', "line 1: expected"),
    ('{"id": "a", "text": "x"}\n\n{"id": "a", "text": "y"}', "line 3: the id 'a' comes twice"),
    ("\n", "has no prompts"),
]


@pytest.mark.parametrize(("text", "message"), BAD_PROMPTS)
def test_bad_prompt_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(MoesaicError, match=message):
        read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(MoesaicError, match="no prompts at"):
        read_prompts(tmp_path / "missing.jsonl")


def test_prompts(tmp_path: Path) -> None:
    rows = [{"id": 7, "turns": ["one", "two"], "more": 1}, {"id": "b", "text": "x\u2028y"}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == [Prompt("7", "one\n\ntwo"), Prompt("b", "x\u2028y")]
    domain = Domain("code", ("t",), ("v0", "v1", "v2"))
    assert domain_prompts([domain], 2) == [Prompt("code-0", "v0"), Prompt("code-1", "v1")]


# -- the commands ------------------------------------------------------------------------------------------------------
def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket model with random channels and an untrained pre-gate: only its shape and its tokenizer matter."""
    folder = tmp_path_factory.mktemp("moe")
    dense = load_model(pocket_path())
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(3, site.width, generator=generator) < 0.5 for site in find_ffn_sites(dense)]
    attach(dense, masks, ["a", "b", "c"]).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer(pocket_path()).save_pretrained(folder)
    return folder


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    rows = [{"id": f"p{number}", "turns": [text]} for number, text in enumerate(TEXTS)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "p.jsonl"


def write_log(path: Path, *rows: str, named: bool = True) -> Path:
    head = "arrival_s,context_tokens,generated_tokens" + (",prompt_id" if named else "")
    path.write_text("\n".join([head, *rows]))
    return path


def test_record_and_replay_in_one_go(checkpoint: Path, prompt_file: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", "0,3,2,p1", "0.5,40,9,p3", "1.5,2,3,p1")
    out, library, again = (tmp_path / name for name in ("out.trace", "library.trace", "again.trace"))
    done = command(
        "record", checkpoint, "--prompts", prompt_file, "--arrivals", log, "--out", out, "--library", library,
        "--max-output", 5, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    about = json.loads(done.stdout)
    assert (about["requests"], about["prompt_tokens"], about["output_tokens"]) == (3, 45, 14)
    assert about["card"]["model"] == checkpoint.name and about["card"]["weight_bytes"] == 2.0
    sequences, trace = Trace.load(library), Trace.load(out)
    assert sequences.meta["prompt_ids"] == ["p1", "p3"] and sequences.output_tokens.tolist() == [3, 5]
    assert np.array_equal(trace.prompt_routes(2, 0, 2), sequences.prompt_routes(0, 0, 2))
    assert np.array_equal(trace.decode_routes(1, 7), sequences.decode_routes(1, 3))
    assert command("replay", library, "--arrivals", log, "--out", again).exit_code == 0
    assert again.read_bytes() == out.read_bytes()
    assert command("replay", library, "--arrivals", log, "--out", again, "--load", 2, "--requests", 2).exit_code == 0
    assert Trace.load(again).arrival_s.tolist() == [0, 0.25]


def test_record_without_names(checkpoint: Path, prompt_file: Path, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", "0,3,2", "0.5,40,4", named=False)
    out = tmp_path / "out.trace"
    done = command("record", checkpoint, "--prompts", prompt_file, "--arrivals", log, "--out", out)
    assert done.exit_code == 0, done.output
    assert "2 in 0.000 h" in done.stdout and "known at request; one choice for all layers" in done.stdout
    done = command("record", checkpoint, "--data", "arithmetic", "--each", 2, "--max-output", 2, "--max-prompt", 8, "-o", out)  # fmt: skip  # noqa: E501
    assert done.exit_code == 0, done.output
    assert Trace.load(out).prompt_tokens.tolist() == [8, 8] and "2 of 2 prompts were cut" in done.stderr


def test_bad_commands(checkpoint: Path, prompt_file: Path, tmp_path: Path) -> None:
    log, out = write_log(tmp_path / "log.csv", "0,3,2,p33"), tmp_path / "out.trace"
    for arguments, message in (
        (
            (checkpoint, "--prompts", prompt_file, "--arrivals", log),
            "the log names the prompt .p33..*did you mean .p3.",
        ),
        ((checkpoint, "--prompts", prompt_file, "--arrivals", log, "--requests", 0), "--requests 0"),
        ((checkpoint, "--prompts", prompt_file, "--max-output", -1), "--max-output -1"),
        ((checkpoint, "--prompts", prompt_file, "--data", "c"), "not both"),
        ((checkpoint, "--each", 0), "--each 0"),
        (("pocket", "--prompts", prompt_file), "is dense and has no routes to record: refactor it first"),
    ):
        done = command("record", *arguments, "--out", out)
        assert isinstance(done.exception, MoesaicError) and re.search(message, str(done.exception)), done.output
    assert not out.exists()


def test_synth_and_info(tmp_path: Path) -> None:
    a, b = tmp_path / "a.trace", tmp_path / "b.trace"
    made = ("synth", "--requests", 20, "--per-layer", "--layers", 3, "--experts", 12, "--k", 2, "--known-at", "gate")
    done = command(*made, "--out", a)
    assert done.exit_code == 0 and "synthetic: 3 layers, 12 experts, top 2, stored whole" in done.stdout, done.output
    assert command("info", a).stdout.splitlines() == done.stdout.splitlines()[:8]
    assert command(*made, "--out", b, "--json").stdout == command("info", a, "--json").stdout
    assert a.read_bytes() == b.read_bytes()
    done = command("synth", "--stay", 2, "--out", b)
    assert isinstance(done.exception, MoesaicError) and "stay is 2.0" in str(done.exception)
