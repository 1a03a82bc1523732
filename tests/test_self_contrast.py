"""Self-contrast decoding: one joint forward is two passes, and decoding from it does what the equations say."""

import json
import math
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import transformers as t
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from families import COMMON, tiny
from moesaic.cli.main import app
from moesaic.errors import MoesaicError
from moesaic.models.routed import attach_router
from moesaic.models.self_contrast import SelfContrast, contrast, joint_logits, tune_beta, weighting_of
from moesaic.routing.policies import ExpertChoice, Random, RankK, TopK

EXPERTS = 4
MOE = {"moe_intermediate_size": 24, "num_experts": EXPERTS, "num_experts_per_tok": 2}
STOCK = {
    "mixtral": lambda: t.MixtralConfig(**COMMON, num_local_experts=EXPERTS, num_experts_per_tok=2),
    "olmoe": lambda: t.OlmoeConfig(**COMMON, num_experts=EXPERTS, num_experts_per_tok=2, norm_topk_prob=False),
    "qwen2-moe": lambda: t.Qwen2MoeConfig(**COMMON, **MOE, shared_expert_intermediate_size=24, norm_topk_prob=False),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**COMMON, **MOE, head_dim=8, norm_topk_prob=True),
}
OURS = ["top-k", "zero-computation", "fine-grained", "recurrent", "union", "top-p", "frozen-random", "shared"]


def model_of(name):
    """A random mixture in which every expert and every router matters."""
    if name in STOCK:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(STOCK[name]())
    else:
        options = {"experts": EXPERTS, "upcycle": "scratch", "hidden": 24}
        options |= {"shared": 1} if name == "shared" else {"free": {"zero": 1}} if name == "zero-computation" else {}
        k = {} if name in ("top-p", "frozen-random") else {"k": 2}
        model = attach_router(tiny("llama"), {"name": "top-k" if name == "shared" else name, **k}, **options)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = None
    return model.eval()


def ids_of(batch=2, length=9):
    return torch.randint(3, 96, (batch, length))


def left_padded():
    ids = ids_of(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[2, :6] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def gates_of(model):
    return [block.gate for block in model.modules() if hasattr(block, "experts") and hasattr(block, "gate")]


def alone(model, ids, k, mask=None):
    """Logits of a pass of its own in which every gate takes only the expert of rank k; written out, no hook of ours."""
    if hasattr(model, "router"):
        before, own = model.router.policy, getattr(model.router.policy, "weighting", "probs")
        model.router.policy = RankK(k, "probs" if own == "probs" else "one")
        out = model(input_ids=ids, attention_mask=mask).logits
        model.router.policy = before
        return out
    hooks = []
    for gate in gates_of(model):

        def rank_k(gate, args, out):
            probs = out[0].float().softmax(-1)
            value, index = (x[:, k - 1 : k] for x in probs.sort(-1, descending=True))
            return out[0], value if getattr(gate, "norm_topk_prob", True) is False else torch.ones_like(value), index

        hooks.append(gate.register_forward_hook(rank_k))
    out = model(input_ids=ids, attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    return out


def by_recomputing(model, ids, mask, steps, beta=0.5, alpha=0.1, k=2):
    """Greedy tokens from full passes of their own, without any cache; equations 5 and 6 written out."""
    for _ in range(steps):
        strong = model(input_ids=ids, attention_mask=mask).logits[:, -1].double()
        weak = alone(model, ids, k, mask)[:, -1].double()
        valid = strong >= math.log(alpha) + strong.max(-1, keepdim=True).values
        score = torch.where(valid, (1 + beta) * strong - beta * weak, -math.inf)
        ids = torch.cat([ids, score.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def test_equations_5_and_6_by_hand():
    strong, weak = torch.tensor([3.0, 2.0, 0.5]), torch.tensor([4.0, 0.0, 9.0])
    got = contrast(strong, weak, beta=0.5, alpha=0.1)  # floor: 3 + ln 0.1 = 0.697
    torch.testing.assert_close(got, torch.tensor([1.5 * 3 - 0.5 * 4, 1.5 * 2 - 0.5 * 0, -math.inf]))
    assert got.argmax() == 1  # the strong model alone says 0
    assert torch.isfinite(contrast(strong, weak, 0.5, 0.08)).all()  # ln 0.08 = -2.526: now 0.5 is above 0.474
    assert torch.isfinite(contrast(strong, weak, 0.5, 1.0)).tolist() == [True, False, False]
    assert contrast(strong.bfloat16(), weak.bfloat16(), 0.5, 0.1).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*STOCK, *OURS])
def test_one_joint_forward_is_two_passes(name, padded):
    model = model_of(name)
    ids, mask = left_padded() if padded else (ids_of(), None)
    real = torch.ones_like(ids) if mask is None else mask
    for k in (1, 2, 4):
        strong, weak = joint_logits(model, ids, mask, weak=f"rank:{k}")
        for got, want in (
            (strong, model(input_ids=ids, attention_mask=mask).logits),
            (weak, alone(model, ids, k, mask)),
        ):
            torch.testing.assert_close(got[real.bool()], want[real.bool()], atol=1e-5, rtol=1e-5)
        assert (strong - weak)[real.bool()].abs().max() > 1e-3
    assert torch.equal(joint_logits(model, ids, mask)[0], joint_logits(model, ids, mask)[0])


@torch.no_grad()
@pytest.mark.parametrize("name", [*STOCK, "top-k", "zero-computation", "shared"])
def test_greedy_tokens_are_those_of_recomputation_without_a_cache(name):
    model = model_of(name)
    ids, mask = left_padded()
    got = model.generate(ids, attention_mask=mask, custom_generate=SelfContrast(), max_new_tokens=8, do_sample=False)
    assert torch.equal(got, by_recomputing(model, ids, mask, 8))
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert not torch.equal(got, plain)  # the contrast changes tokens
    single = model.generate(ids[1:2], custom_generate=SelfContrast(), max_new_tokens=8, do_sample=False)
    assert torch.equal(single, got[1:2])  # batch mates do not matter
    uncached = model.generate(
        ids, attention_mask=mask, custom_generate=SelfContrast(), max_new_tokens=8, do_sample=False, use_cache=False
    )
    assert torch.equal(uncached, got)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "top-k"])
def test_beta_zero_is_masked_greedy_and_rank_one_is_top_one(name):
    model, ids = model_of(name), ids_of()
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    zero = model.generate(ids, max_new_tokens=8, do_sample=False, custom_generate=SelfContrast(beta=0.0))
    assert torch.equal(zero, plain)
    strong = joint_logits(model, ids)[0]
    masked = SelfContrast(beta=0.0, alpha=0.2).logits(model, ids)
    kept = strong >= strong.amax(-1, keepdim=True) + math.log(0.2)
    assert torch.equal(masked, strong.masked_fill(~kept, -math.inf))
    first = joint_logits(model, ids, weak=RankK(1, "one"))[1]
    torch.testing.assert_close(first, joint_logits(model, ids, weak=TopK(1, "one"))[1])
    torch.testing.assert_close(first, joint_logits(model, ids, weak=TopK(1, "renorm"))[1])
    assert (first - strong).abs().max() > 1e-3


def test_the_contrast_decides_and_stronger_strong_passes_are_possible():
    model, ids = model_of("mixtral"), ids_of()
    top3, _ = joint_logits(model, ids, strong="top:3")
    for gate in gates_of(model):
        gate.top_k = 3
    torch.testing.assert_close(top3, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    same = SelfContrast(weak="top:3", beta=0.7, alpha=1e-9).logits(model, ids)  # (1 + b) z - b z = z
    torch.testing.assert_close(same, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["olmoe", "qwen2-moe"])
def test_text_is_weighted_as_the_model_weighs_and_a_policy_as_it_says(name):
    model, ids = model_of(name), ids_of()
    raw = joint_logits(model, ids, weak="rank:2")[1]
    torch.testing.assert_close(raw, joint_logits(model, ids, weak=RankK(2, "probs"))[1])
    assert (raw - joint_logits(model, ids, weak=RankK(2, "one"))[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen2-moe", "shared"])
def test_shared_experts_run_in_the_weak_pass(name):
    model, ids = model_of(name), ids_of()
    before = joint_logits(model, ids)[1]
    with torch.no_grad():
        if name == "shared":
            for pool in model.pools():
                pool.shared.down.zero_()
        else:
            for layer in model.model.layers:
                layer.mlp.shared_expert.down_proj.weight.zero_()
    assert (joint_logits(model, ids)[1] - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mixtral", "top-k"])
def test_random_weak_routes_do_not_depend_on_the_cache_or_on_the_strong_half(name):
    model, (ids, mask) = model_of(name), left_padded()
    decoder = SelfContrast(weak=Random(EXPERTS), beta=0.9)
    options = {"attention_mask": mask, "custom_generate": decoder, "max_new_tokens": 8, "do_sample": False}
    cached, full = model.generate(ids, **options), model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, full)
    mirrored = joint_logits(model, ids, mask, strong=Random(EXPERTS), weak=Random(EXPERTS))
    torch.testing.assert_close(mirrored[0][mask.bool()], mirrored[1][mask.bool()])


@pytest.mark.parametrize("name", ["mixtral", "top-k"])
def test_end_of_sequence_ends_it(name):
    model, ids = model_of(name), ids_of(3, 6)
    decoder = SelfContrast()
    free = model.generate(ids, max_new_tokens=8, do_sample=False, custom_generate=decoder)
    end = int(free[0, 8])  # the third new token of the first sequence
    stopped = model.generate(
        ids, max_new_tokens=8, do_sample=False, custom_generate=decoder, eos_token_id=end, pad_token_id=0
    )
    for row, want in zip(stopped.tolist(), free.tolist(), strict=True):
        where = next((i for i in range(6, 14) if want[i] == end), 13)
        assert row[: where + 1] == want[: where + 1][: len(row)]
        assert set(row[where + 1 :]) <= {0}
    assert stopped.shape[1] < 14 or (stopped[0, 9:] == 0).all()


def test_sampling_follows_the_contrasted_distribution():
    model, ids = model_of("mixtral"), ids_of(1, 5)
    decoder = SelfContrast(beta=0.5, alpha=0.3)
    probs = decoder.logits(model, ids)[0, -1].softmax(-1)
    torch.manual_seed(0)
    out = model.generate(
        ids, custom_generate=decoder, max_new_tokens=1, do_sample=True, top_k=0, num_return_sequences=4000
    )
    drawn = torch.bincount(out[:, -1], minlength=96) / 4000
    assert (probs > 0).sum() > 1 and drawn[probs == 0].sum() == 0
    assert (drawn - probs).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_scores_and_processors_are_those_of_generate():
    model, ids = model_of("top-k"), ids_of()
    free = model.generate(ids, custom_generate=SelfContrast(), max_new_tokens=1, do_sample=False)
    banned = int(free[0, -1])
    out = model.generate(
        ids,
        custom_generate=SelfContrast(),
        max_new_tokens=3,
        do_sample=False,
        suppress_tokens=[banned],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert banned not in out.sequences[:, 9:]
    torch.testing.assert_close(out.logits[0], SelfContrast().logits(model, ids)[:, -1], atol=1e-4, rtol=1e-4)
    assert len(out.past_key_values.layers[0].keys) == 4  # both passes in one cache: 2 * 2 rows


@pytest.mark.parametrize("name", ["mixtral", "top-k"])
def test_the_model_is_as_before_also_after_an_error(name):
    model, ids = model_of(name), ids_of()
    want = model(input_ids=ids).logits
    for decoder in (SelfContrast(), SelfContrast(weak="rank:9")):
        with suppress(MoesaicError):
            model.generate(ids, custom_generate=decoder, max_new_tokens=2, do_sample=False)
        assert torch.equal(model(input_ids=ids).logits, want)
        assert not model._forward_hooks and not model._forward_pre_hooks


def test_tune_beta_takes_the_most_accurate_on_the_held_out_set_and_the_smallest_of_equals():
    model = model_of("mixtral")
    ids = ids_of(4, 12)
    strong, weak = joint_logits(model, ids)
    betas = (0.9, 0.0, 3.0)
    labels = ids.clone()
    labels[:, 1:] = contrast(strong, weak, 3.0, 0.1).argmax(-1)[:, :-1]
    labels[0, :6] = -100
    choice = tune_beta(model, [(ids[:2], labels[:2]), (ids[2:], labels[2:])], betas)
    assert choice.beta == 3.0 and choice.accuracy[3.0] == 1.0
    assert list(choice.accuracy) == [0.0, 0.9, 3.0] and choice.accuracy[0.0] < 1.0
    counted = labels[:, 1:] != -100
    right = (contrast(strong, weak, 0.9, 0.1).argmax(-1)[:, :-1] == labels[:, 1:]) & counted
    assert choice.accuracy[0.9] == pytest.approx(int(right.sum()) / int(counted.sum()))
    never = torch.full_like(ids, 95)
    never[:, 1:] = (strong.argmin(-1))[:, :-1]  # nothing is right: all equal
    assert tune_beta(model, [(ids, never)], betas).beta == 0.0
    with pytest.raises(MoesaicError, match="0 labelled tokens"):
        tune_beta(model, [(ids, torch.full_like(ids, -100))])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": -0.1}, "beta = -0.1"),
        ({"beta": math.nan}, "beta = nan"),
        ({"alpha": 0.0}, "alpha = 0.0"),
        ({"alpha": 1.5}, "alpha = 1.5"),
        ({"weak": "rank:0"}, "rank:0"),
        ({"weak": "second"}, "expected rank:K or top:K"),
        ({"strong": "top:"}, "top:"),
        ({"weak": ExpertChoice()}, "later tokens"),
    ],
)
def test_bad_values_are_named(options, words):
    with pytest.raises(MoesaicError, match=words):
        SelfContrast(**options)


def test_models_that_cannot_be_contrasted_are_named():
    ids = ids_of()

    def decode(model, **options):
        model.generate(ids, custom_generate=SelfContrast(), max_new_tokens=2, do_sample=False, **options)

    with pytest.raises(MoesaicError, match="LlamaForCausalLM has no router"):
        decode(tiny("llama"))
    for name in ("union-data-selection", "random"):
        model = attach_router(tiny("llama"), name, experts=EXPERTS, upcycle="scratch", hidden=24)
        words = "UnionRouter" if name == "union-data-selection" else "RandomRouter does not rank"
        with pytest.raises(MoesaicError, match=words):
            decode(model)
    for name in ("mixtral", "top-k"):
        with pytest.raises(MoesaicError, match="rank 9 of 4 experts"):
            joint_logits(model_of(name), ids, weak="rank:9")
        with pytest.raises(MoesaicError, match="rank 9 of 4 experts"):
            joint_logits(model_of(name), ids, weak=RankK(9))
        with pytest.raises(MoesaicError, match="num_beams = 2"):
            decode(model_of(name), num_beams=2)
    model = model_of("mixtral")
    cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(MoesaicError, match="empty one"):
        decode(model, past_key_values=cache)


def test_gates_whose_logits_do_not_rank_are_refused():
    config = t.DeepseekV3Config(
        **COMMON, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=0, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    with pytest.raises(MoesaicError, match="is not softmax and top-k"):
        joint_logits(AutoModelForCausalLM.from_config(config).eval(), ids_of())
    logits = torch.randn(6, 4)
    probs, index = logits.softmax(-1).topk(2)
    gate = torch.nn.Identity()
    assert weighting_of(gate, (logits, probs.flip(-1), index.flip(-1))) == "probs"  # some gates do not sort
    assert weighting_of(gate, (logits, F.normalize(probs, p=1), index)) == "renorm"
    assert weighting_of(gate, (logits.bfloat16(), probs.bfloat16(), index)) == "probs"
    for weight, chosen in ((2.5 * probs, index), (probs, (index + 1) % 4)):
        with pytest.raises(MoesaicError, match="Identity is not"):
            weighting_of(gate, (logits, weight, chosen))


def test_sliding_windows_and_half_precision():
    torch.manual_seed(0)
    config = replace_config(STOCK["mixtral"](), sliding_window=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids, mask = left_padded()
    got = model.generate(
        ids, attention_mask=mask, custom_generate=SelfContrast(), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert torch.equal(got, by_recomputing(model, ids, mask, 8))
    low = model.bfloat16().generate(ids, attention_mask=mask, custom_generate=SelfContrast(), max_new_tokens=3)
    assert low.shape[1] <= 11


def replace_config(config, **changes):
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.fixture(scope="module")
def routed_checkpoint(tmp_path_factory):
    """The packaged model as a mixture, with its tokenizer."""
    from moesaic.models.loading import load_model, load_tokenizer
    from moesaic.pocket import pocket_path

    folder = tmp_path_factory.mktemp("routed")
    torch.manual_seed(0)
    model = attach_router(load_model(pocket_path()), {"name": "top-k", "k": 2}, experts=EXPERTS, noise=0.5)
    model.save_pretrained(folder)
    load_tokenizer(pocket_path()).save_pretrained(folder)
    return folder, model


def test_cli_decodes_by_self_contrast(routed_checkpoint):
    from moesaic.models.loading import load_tokenizer

    folder, model = routed_checkpoint
    arguments = ["generate", "def f(x):", "-m", str(folder), "--max-new-tokens", "6", "--json"]
    decode = [*arguments, "--decode", "self-contrast", "--weak", "rank:3", "--beta", "0.9", "--alpha", "0.05"]
    result = CliRunner().invoke(app, decode)
    assert result.exit_code == 0, result.output
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("def f(x):", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []) + ids])
    decoder = replace(SelfContrast(), weak="rank:3", beta=0.9, alpha=0.05)
    want = model.generate(ids, custom_generate=decoder, max_new_tokens=6, do_sample=False)
    assert json.loads(result.stdout)["text"] == tokenizer.decode(want[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--decode", "contrast"], "self-contrast"),
        (["--decode", "self-contrast", "--beta", "-1"], "beta = -1"),
        (["--decode", "self-contrast", "--alpha", "2"], "alpha = 2"),
        (["--decode", "self-contrast", "--weak", "rank:7"], "rank 7 of 4"),
        (["--decode", "self-contrast", "--weak", "worst"], "rank:K"),
    ],
)
def test_cli_names_bad_options(routed_checkpoint, options, words):
    result = CliRunner().invoke(app, ["generate", "x", "-m", str(routed_checkpoint[0]), *options])
    assert result.exit_code != 0
    assert words in result.output + str(result.exception)
