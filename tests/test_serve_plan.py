"""The memory plan: bytes counted by hand, budgets kept, and what is said where they are too small."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from moesaic.cli import plan_commands
from moesaic.errors import MoesaicError
from moesaic.models.attach import attach
from moesaic.routing.pregate import PreGateConfig
from moesaic.serve.machine_memory import available_bytes
from moesaic.serve.memory_plan import BASE, PAGE, AttentionShape, plan

D, W, V, LAYERS, HEADS, KV_HEADS = 64, 96, 100, 2, 4, 2
EXPERT_ROWS = [[60, 48], [96, 32]]  # channels of the two experts, layer by layer
CONTEXT = 4096


def dense_model() -> LlamaForCausalLM:
    sizes = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": W,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes))


def expert_masks() -> list[torch.Tensor]:
    """Expert 0 owns the first channels of each layer, expert 1 the last; they overlap where there are not enough."""
    masks = torch.zeros(LAYERS, 2, W, dtype=torch.bool)
    for layer, (first, second) in enumerate(EXPERT_ROWS):
        masks[layer, 0, :first] = True
        masks[layer, 1, W - second :] = True
    return list(masks)


R, M = 32, 48  # width of the pre-gate and of its MLP


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refactored model in bfloat16."""
    pregate = PreGateConfig(vocab_size=V, experts=2, width=R, heads=2, layers=1, mlp_width=M)
    model = attach(dense_model(), expert_masks(), ["a", "b"], pregate=pregate)
    target = tmp_path_factory.mktemp("plan") / "model"
    model.to(torch.bfloat16).save_pretrained(target)
    return target


EVERY_EXPERT = 2 * 96 * 3 * D * 2  # all 96 channels of both layers are owned; 3 matrices, 2 bytes
LARGEST_EXPERT = 96 * 3 * D * 2
EXPERT_WIDTHS = len({rows for layer in EXPERT_ROWS for rows in layer})
KV_2048 = 2 * 2 * 2048 * 32 * 2 + 2 * 2048 * R * 4  # two layers in bfloat16, the pre-gate in float32; whole pages
ENOUGH = 10 * 2**30


def test_bytes_counted_by_hand(folder: Path) -> None:
    result = plan(folder, memory=ENOUGH, context=2048, max_requests=3)
    layer = 2 * D * D + 2 * D * 32 + 2 * D
    backbone = V * D + LAYERS * layer + D
    pregate = V * R + 2 * R + 3 * R + (3 * R * R + 3 * R) + (R * R + R) + (M * R + M) + (R * M + R)
    assert result.dense == 2 * backbone + 4 * pregate + 2 * V * D  # the head is packed: a copy of the embedding
    assert (result.all_experts, result.experts, result.least_experts) == (EVERY_EXPERT, EVERY_EXPERT, LARGEST_EXPERT)
    assert result.kv_token == 2 * 2 * 32 * 2 + 2 * R * 4
    assert result.kv_request == KV_2048
    assert (result.kv, result.kv_full, result.requests) == (3 * KV_2048, 3 * KV_2048, 3)
    assert (result.dtype, result.context, result.model_context) == ("bfloat16", 2048, CONTEXT)
    assert result.problems == result.advice == []
    assert BASE + result.kernels < result.buffers < BASE + result.kernels + 2**26


def test_buffers_grow_with_the_step_and_the_requests(folder: Path) -> None:
    small, large = (plan(folder, memory=ENOUGH, context=2048, max_tokens=tokens) for tokens in (512, 1024))
    width = LARGEST_EXPERT // (2 * D * 2)
    token = (6 * D + 4 * D + 4 * 32 + 3 * width) * 2
    more = large.kernels - small.kernels
    assert large.buffers - small.buffers == 512 * token + 2048 * 512 * 3 + more
    few, many = (plan(folder, memory=ENOUGH, context=2048, max_requests=requests) for requests in (1, 11))
    assert many.buffers - few.buffers == 10 * V * 22


def test_float32_takes_twice_as_much(folder: Path) -> None:
    half, full = (plan(folder, memory=ENOUGH, context=2048, dtype=dtype) for dtype in ("auto", "float32"))
    assert full.all_experts == 2 * half.all_experts
    assert full.kv_request == KV_2048 + 2 * 2 * 2048 * 32 * 2


def test_pages_are_counted_whole(folder: Path) -> None:
    heads = 2 * 2 + 2  # of keys and of values in both layers and in the pre-gate
    assert plan(folder, memory=ENOUGH, context=3).kv_request == 2 * heads * PAGE


@settings(max_examples=60)
@given(extra=st.integers(0, 2**22), more=st.integers(0, 2**22), context=st.sampled_from([None, 64, 1000, CONTEXT]))
def test_budgets_are_kept_and_more_memory_never_keeps_fewer_experts(
    folder: Path, extra: int, more: int, context: int | None
) -> None:
    least = plan(folder, memory=ENOUGH, context=context).least_budget
    small, large = (plan(folder, memory=least + bytes, context=context) for bytes in (extra, extra + more))
    for result in (small, large):
        assert result.dense + result.buffers + result.experts + result.kv + result.spare == result.budget
        assert result.spare >= 0
        assert result.least_experts <= result.experts <= result.all_experts
        assert result.kv_request <= result.kv <= result.kv_full
        assert result.context <= CONTEXT and (context is None or result.context == context)
        assert bool(result.problems) == (
            result.experts < result.all_experts or result.kv < result.kv_full or (context or CONTEXT) > result.context
        )
    assert small.experts <= large.experts
    assert small.context <= large.context


@pytest.mark.parametrize("options", [{}, {"context": 100}, {"experts": 0.75}, {"dtype": "float32"}])
def test_a_budget_below_the_minimum_names_it(folder: Path, options: dict[str, Any]) -> None:
    least = plan(folder, memory=ENOUGH, **options).least_budget
    at_least = plan(folder, memory=least, **options)
    assert at_least.budget == at_least.dense + at_least.buffers + at_least.experts + at_least.kv
    assert at_least.requests == 1
    with pytest.raises(MoesaicError, match=f"{least} bytes") as caught:
        plan(folder, memory=least - 1, **options)
    if "dtype" in options:
        less = plan(folder, memory=ENOUGH, dtype="bfloat16").least_budget < least
        assert ("--dtype bfloat16 saves" in str(caught.value)) == less
    if "context" not in options:
        assert "--context 512 saves" in str(caught.value)
    if "experts" in options:
        assert f"--experts {LARGEST_EXPERT} saves" in str(caught.value)


def test_what_an_option_is_said_to_save_is_saved(folder: Path) -> None:
    """The minimum falls by what was promised."""
    full, short = (plan(folder, memory=ENOUGH, context=context) for context in (2048, 512))
    saved = (full.least_budget - short.least_budget) / 2**20
    with pytest.raises(MoesaicError, match=rf"--context 512 saves {saved:.1f} MiB"):
        plan(folder, memory=BASE, context=2048)


def test_advice_that_is_followed_helps(folder: Path) -> None:
    tight = plan(folder, memory=plan(folder, memory=ENOUGH).least_budget)
    assert any("of experts stay in memory" in text for text in tight.problems)
    memory = next(text for text in tight.advice if "keeps all" in text).split()[1]
    assert plan(folder, memory=memory).experts == tight.all_experts
    memory = next(text for text in tight.advice if "runs 32 requests" in text).split()[1]
    assert plan(folder, memory=memory, context=tight.context).requests == 32


def test_experts_as_given(folder: Path) -> None:
    half = plan(folder, memory=ENOUGH, experts=0.5)
    assert half.experts == EVERY_EXPERT // 2
    assert any(text.startswith("without --experts") for text in half.advice)
    assert plan(folder, memory=ENOUGH, experts="100GiB").experts == EVERY_EXPERT
    with pytest.raises(MoesaicError, match=f"{LARGEST_EXPERT} bytes"):
        plan(folder, memory=ENOUGH, experts=LARGEST_EXPERT - 1)


def test_without_a_budget_no_more_is_taken_than_is_useful(folder: Path) -> None:
    result = plan(folder)
    assert result.budget <= 0.8 * 2**50
    copies = sum(map(sum, EXPERT_ROWS)) * 3 * D * 2  # packed, of every expert: used if there is room
    assert copies <= result.spare < copies + 2**20
    assert (result.experts, result.requests, result.context) == (EVERY_EXPERT, 32, CONTEXT)


def test_kernels_are_counted_by_rows_and_shapes(folder: Path) -> None:
    """Dense matrices: embedding, q and o, k and v; six of the pre-gate. Experts: a width each, up and down."""
    packed = 3 + 6
    few = plan(folder, memory=ENOUGH, max_tokens=8)
    assert few.kernels == (2 * packed + 2 * 2 * EXPERT_WIDTHS) * 2**20, "6 and 8 rows; 4 and 8 rows"
    assert plan(folder, memory=ENOUGH, max_tokens=8, dtype="float32").kernels == 2 * packed * 2**20
    many = plan(folder, memory=ENOUGH, max_tokens=256)
    assert many.kernels == ((4 + 6 + 6) * packed + (4 + 6 + 6) * 2 * EXPERT_WIDTHS) * 2**20
    assert many.buffers > many.kernels


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"memory": "-8GiB"}, "memory: size '-8GiB'"),
        ({"memory": "lots"}, "memory: size 'lots'"),
        ({"memory": 0}, "memory: size 0"),
        ({"memory": "1e400"}, "infinite"),
        ({"experts": -0.5}, "experts: size"),
        ({"context": 1}, "2 to 4096"),
        ({"context": CONTEXT + 1}, "2 to 4096"),
        ({"max_requests": 0}, "max_requests 0"),
        ({"max_tokens": -1}, "max_tokens -1"),
        ({"dtype": "int4"}, "'int4' is not served"),
    ],
)
def test_options_out_of_range(folder: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(MoesaicError, match=match):
        plan(folder, **{"memory": ENOUGH} | options)


def test_float16_is_served_as_bfloat16(tmp_path: Path) -> None:
    attach(dense_model(), expert_masks(), ["a", "b"]).to(torch.float16).save_pretrained(tmp_path)
    result = plan(tmp_path, memory=ENOUGH)
    assert (result.dtype, result.all_experts) == ("bfloat16", EVERY_EXPERT)


def test_a_stock_mixture(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=W,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_local_experts=4,
        max_position_embeddings=CONTEXT,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    result = plan(tmp_path, memory=ENOUGH, context=2048)
    assert (result.least_experts, result.all_experts) == (3 * W * D * 4, LAYERS * 4 * 3 * W * D * 4)
    assert result.dense + result.all_experts == 4 * sum(weight.numel() for weight in model.parameters())


LLAMA = {"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 64}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, (3, 64, 64)),
        (LLAMA | {"num_key_value_heads": 2}, (3, 64, 16)),
        (LLAMA | {"num_key_value_heads": 2, "head_dim": 16}, (3, 128, 32)),
        (LLAMA | {"num_key_value_heads": None, "layer_types": ["sliding_attention"] * 3}, (3, 64, 64)),
        (LLAMA | {"multi_query": True}, (3, 64, 8)),
        ({"n_layer": 2, "n_head": 4, "n_embd": 32}, (2, 32, 32)),
    ],
)
def test_keys_of_families(config: dict[str, Any], expected: tuple[int, int, int]) -> None:
    shape = AttentionShape.of(config)
    assert (shape.layers, shape.query, shape.keys) == expected


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LLAMA | {"kv_lora_rank": 8}, "latent attention"),
        (LLAMA | {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        (LLAMA | {"num_hidden_layers": None}, "num_hidden_layers"),
        (LLAMA | {"num_attention_heads": "8"}, "num_attention_heads"),
    ],
)
def test_attention_that_cannot_be_planned(config: dict[str, Any], match: str) -> None:
    with pytest.raises(MoesaicError, match=match):
        AttentionShape.of(config)


# -- what the machine has ---------------------------------------------------------------------------------------------
def machine(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:  2000 kB\nMemAvailable:  1000 kB\n"


def test_available_memory_of_a_plain_system(tmp_path: Path) -> None:
    assert available_bytes(machine(tmp_path, proc__meminfo=MEMINFO)) == 1000 * 1024
    with pytest.raises(MoesaicError, match="give a budget"):
        available_bytes(tmp_path / "elsewhere")


def test_the_narrowest_control_group_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/a/b\n")
    top = root / "sys/fs/cgroup/a"
    (top / "b").mkdir(parents=True)
    for folder, limit in ((top, "500000"), (top / "b", "max")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("300000")
    assert available_bytes(root) == 200_000
    (top / "memory.stat").write_text("anon 250000\ninactive_file 40000\n")  # read files would be given back
    assert available_bytes(root) == 240_000
    (top / "b" / "memory.max").write_text("100000")
    assert available_bytes(root) == 0


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    root = machine(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="5:cpu:/x\n4:cpuset,memory:/host/path\n0::/\n")
    folder = root / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("700000")
    (folder / "memory.usage_in_bytes").write_text("300000")
    assert available_bytes(root) == 400_000


# -- the command ------------------------------------------------------------------------------------------------------
@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    plan_commands.add_to(app)
    return app


def test_the_command_prints_a_row_for_each_use(app: typer.Typer, folder: Path) -> None:
    memory = plan(folder, memory=ENOUGH).least_budget
    result = CliRunner().invoke(app, ["plan", str(folder), "--memory", str(memory)])
    assert result.exit_code == 0, result.output
    for text in ("weights", "buffers", "experts", "keys, values", "1 request of", "keeps all of them in memory"):
        assert text in " ".join(result.output.split())


def test_the_command_prints_json(app: typer.Typer, folder: Path) -> None:
    options = ["--memory", "1GiB", "--experts", "0.75", "--context", "1024", "--max-requests", "2", "--json"]
    result = CliRunner().invoke(app, ["plan", str(folder), *options])
    said = json.loads(result.output)
    expected = plan(folder, memory=2**30, experts=0.75, context=1024, max_requests=2)
    assert {name: said[name] for name in ("experts", "kv", "requests", "spare", "advice")} == {
        name: getattr(expected, name) for name in ("experts", "kv", "requests", "spare", "advice")
    }


def test_the_command_does_without_torch(folder: Path) -> None:
    code = (
        "import sys, typer; from moesaic.cli import plan_commands; app = typer.Typer(); plan_commands.add_to(app); "
        "app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["all_experts"] == EVERY_EXPERT
