"""A refactored model is a Hugging Face model: Auto classes, generate, Trainer, padding, caches, lm-eval."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

import moesaic
from families import tiny
from moesaic.errors import MoesaicError
from moesaic.models.attach import attach
from moesaic.models.checkpoint import MANIFEST
from moesaic.models.ffn_sites import find_ffn_sites
from moesaic.models.modeling_moesaic import MoesaicForCausalLM

NAMES = ["alpha", "beta", "gamma"]
ROUTE_STD = 0.5  # far from initialisation, so that routes change from token to token


def make(family="llama", untied=False):
    dense = tiny(family)
    generator = torch.Generator().manual_seed(7)
    masks = [torch.rand(3, site.width, generator=generator) < 0.5 for site in find_ffn_sites(dense)]
    moe = attach(dense, masks, NAMES, untied=untied)
    for name, parameter in moe.pregate.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=ROUTE_STD, generator=generator)
    return moe


@pytest.fixture
def moe():
    return make()


def prompt(batch=2, length=9):
    return torch.randint(3, 96, (batch, length))


def greedy(model, ids, **kwargs):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, **kwargs)


def test_routes_vary_in_these_tests(moe):
    assert len(moe.plan(prompt(4, 30)).expert.unique()) == 3


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "opt"])
@torch.no_grad()
def test_auto_classes_round_trip(family, tmp_path):
    model, ids = make(family), prompt()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is MoesaicForCausalLM
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert AutoConfig.from_pretrained(tmp_path).expert_names == NAMES


def test_a_fresh_process_needs_only_import_moesaic(moe, tmp_path):
    moe.save_pretrained(tmp_path)
    code = (
        "import moesaic, sys; assert 'torch' not in sys.modules; from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained(r'{tmp_path}'); print(type(m).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "MoesaicForCausalLM"


@pytest.mark.parametrize("first", ["moesaic.models.modeling_moesaic", "transformers", "moesaic.models.attach"])
def test_import_order_does_not_matter(first):
    code = f"import {first}, moesaic; from transformers import AutoModelForCausalLM as A; import moesaic.models.attach"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@torch.no_grad()
def test_bf16_load_keeps_the_router_in_fp32(moe, tmp_path):
    moe.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = prompt(2, 40)
    assert half.ffns()[0].up.dtype == torch.bfloat16
    assert {p.dtype for p in half.pregate.parameters()} == {torch.float32}
    assert torch.equal(half.plan(ids).index, moe.plan(ids).index)
    assert torch.isfinite(half(ids).logits).all()


@torch.no_grad()
def test_sharded_checkpoint(moe, tmp_path):
    moe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ids = prompt()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, moe(ids).logits)
    moe.save_pretrained(tmp_path)  # one file now: the old shards must not stay behind
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


@torch.no_grad()
def test_untied_experts_start_equal_to_tied_ones(moe, tmp_path):
    untied, ids = make(untied=True), prompt(2, 40)
    torch.testing.assert_close(untied(ids).logits, moe(ids).logits, rtol=1e-4, atol=1e-4)
    untied.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, untied(ids).logits)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "lacks model.safetensors"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"), "altered or damaged"),
    ],
)
def test_damaged_checkpoints_are_named(moe, tmp_path, damage, message):
    moe.save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(MoesaicError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_newer_format_is_refused(moe, tmp_path):
    moe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["moesaic_format"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoesaicError, match=r"format 99.*update moesaic"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_failed_save_leaves_the_old_checkpoint(moe, tmp_path, monkeypatch):
    moe.save_pretrained(tmp_path / "m")
    before = (tmp_path / "m" / MANIFEST).read_bytes()
    monkeypatch.setattr(
        "transformers.modeling_utils.safe_save_file", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(MoesaicError, match="disk is full"):
        moe.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / MANIFEST).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "opt", "falcon"])
def test_cached_decoding_equals_recomputation(family):
    model, ids = make(family), prompt()
    expected = greedy(model, ids, use_cache=False)
    assert torch.equal(greedy(model, ids), expected)


def test_static_cache_equals_dynamic_cache(moe):
    ids = prompt()
    assert torch.equal(greedy(moe, ids, cache_implementation="static"), greedy(moe, ids))


def test_incremental_routes_equal_full_prefix_routes(moe):
    ids = prompt(2, 24)
    cache, routes = DynamicCache(config=moe.config.get_text_config(decoder=True)), []
    with torch.no_grad():
        for piece in ids.split([10, 1, 1, 12], dim=1):
            routes.append(moe(piece, past_key_values=cache, use_cache=True).expert_index)
        assert torch.equal(torch.cat(routes, 1), moe(ids).expert_index)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_left_padded_batch_routes_and_scores_like_single_sequences(family):
    model, short, long = make(family), prompt(1, 6), prompt(1, 15)
    batch = torch.cat([torch.cat([torch.zeros(1, 9, dtype=torch.long), short], 1), long])
    mask = (torch.arange(15) >= torch.tensor([[9], [0]])).long()
    together = model(batch, attention_mask=mask)
    for row, ids in ((0, short), (1, long)):
        single = model(ids)
        assert torch.equal(together.expert_index[row, -ids.shape[1] :], single.expert_index[0])
        torch.testing.assert_close(together.logits[row, -ids.shape[1] :], single.logits[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_left_padded_generation_equals_single_generation(moe, cache):
    short, long = prompt(1, 5), prompt(1, 12)
    batch = torch.cat([torch.cat([torch.zeros(1, 7, dtype=torch.long), short], 1), long])
    mask = (torch.arange(12) >= torch.tensor([[7], [0]])).long()
    together = greedy(moe, batch, attention_mask=mask, cache_implementation=cache)
    for row, ids in ((0, short), (1, long)):
        assert torch.equal(together[row, -8:], greedy(moe, ids)[0, -8:])


@torch.no_grad()
def test_beam_search_and_sampling(moe):
    ids = prompt()
    beams = moe.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    again = moe.generate(
        ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=False
    )
    assert torch.equal(beams, again), "the router's cache must be reordered with the beams"
    torch.manual_seed(1)
    one = moe.generate(ids, max_new_tokens=6, do_sample=True, pad_token_id=0)
    torch.manual_seed(1)
    assert torch.equal(one, moe.generate(ids, max_new_tokens=6, do_sample=True, pad_token_id=0))


@torch.no_grad()
def test_experts_can_be_chosen_by_the_caller(moe):
    ids = prompt()
    own = moe(ids).expert_index
    assert torch.equal(moe(ids, expert_index=own).logits, moe(ids).logits)
    per_sequence = moe(ids, expert_index=torch.tensor([0, 2]))
    torch.testing.assert_close(per_sequence.logits[1:], moe(ids[1:], expert_index=2).logits)
    assert greedy(moe, ids, expert_index=1).shape == (2, 17)


def test_a_cache_without_room_for_the_router_is_refused(moe):
    with pytest.raises(MoesaicError, match="needed: the pre-gate keeps its own keys"):
        moe(prompt(), past_key_values=DynamicCache(config=moe.config.base_config), use_cache=True)


def test_embeddings_without_ids_are_refused(moe):
    with pytest.raises(MoesaicError, match="routes by token ids"):
        moe(inputs_embeds=torch.randn(1, 3, 32))


# -- training ---------------------------------------------------------------------------------------------------------


def test_task_loss_trains_the_backbone_and_not_the_router(moe):
    ids = prompt()
    moe.train()
    moe(ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in moe.pregate.parameters()), "caps.trainable is False"
    for name, parameter in moe.backbone.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # no dropout: the two runs must draw nothing
def test_gradient_checkpointing_recomputes_under_the_routes_of_its_own_forward(family):
    plain, ids, others = make(family), prompt(), prompt()
    plain.train()
    model = copy.deepcopy(plain)
    model.activation_checkpointing_enable()
    plain(ids, labels=ids).loss.backward()
    loss = model(ids, labels=ids).loss
    model(others)  # another forward before backward: its routes must not leak into the recomputation
    loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_trainer_trains_and_saves_a_loadable_checkpoint(moe, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in prompt(8, 12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
        save_steps=3, logging_steps=1, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    before = moe.ffns()[0].up.detach().clone()
    trainer = Trainer(model=moe, args=arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(before, moe.ffns()[0].up)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    ids = prompt()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, moe.eval()(ids).logits)


@pytest.mark.slow
def test_lm_eval_scores_a_local_task(tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from moesaic.pocket import pocket_path

    dense = AutoModelForCausalLM.from_pretrained(pocket_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    width = dense.config.intermediate_size
    model = attach(dense, [torch.rand(2, width) < 0.7 for _ in range(dense.config.num_hidden_layers)], ["a", "b"])
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": f"def f{i}(x): return x + {i}"}) for i in range(4))
    )
    task = {
        "task": "local_text", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    results = lm_eval.simple_evaluate(HFLM(model, tokenizer=tokenizer, batch_size=2), tasks=[task], bootstrap_iters=0)
    assert 0 < results["results"]["local_text"]["bits_per_byte,none"] < 20


def test_public_names_resolve():
    for name in moesaic.__all__:
        assert getattr(moesaic, name) is not None
