"""Stock mixtures in the engine: the tokens are those of generate(), whatever of the experts is in memory."""

import time

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

from families import COMMON
from moesaic.errors import MoesaicError
from moesaic.models.stock import record_plans
from moesaic.schedule.work import Key
from moesaic.serve.memory_plan import plan
from moesaic.serve.request import ExpertControl, RequestError, Routed, Token
from moesaic.serve.store import ExpertMemory, ExpertStore
from serving import alone, ask, ask_all, engine, greedy, letters, prompts

E, K, TOKENS = 6, 2, 10
SIZES = dict(num_experts=E, num_experts_per_tok=K, moe_intermediate_size=16)
FAMILIES = {
    "qwen3-moe": lambda: t.Qwen3MoeConfig(**COMMON, **SIZES, head_dim=8),
    "qwen3-moe-normed": lambda: t.Qwen3MoeConfig(**COMMON, **SIZES, head_dim=8, norm_topk_prob=True),
    "qwen3-moe-dense-first": lambda: t.Qwen3MoeConfig(
        **{**COMMON, "num_hidden_layers": 3}, **SIZES, head_dim=8, mlp_only_layers=[0]
    ),
    "mixtral": lambda: t.MixtralConfig(**COMMON, num_local_experts=E, num_experts_per_tok=K),
    "olmoe": lambda: t.OlmoeConfig(**COMMON, num_experts=E, num_experts_per_tok=K),
    "qwen2-moe": lambda: t.Qwen2MoeConfig(**COMMON, **SIZES, shared_expert_intermediate_size=24),
}


def stock_folder(folder, family="qwen3-moe", **saving):
    """A random mixture of a family, its weights large enough that routes change from token to token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder, **saving)
    letters().save_pretrained(folder)
    return folder


def stock_reference(folder, **changes):
    """The whole model, its experts as transformers' plain loop computes them."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", **changes
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stock_folder(tmp_path_factory.mktemp("stock") / "tiny")


@pytest.fixture(scope="module")
def wanted(folder):
    model, asked = stock_reference(folder), prompts(16)
    return asked, [alone(model, prompt, TOKENS) for prompt in asked]


SETTINGS = {
    "all": {},
    "half": {"experts": 0.5},
    "no prefetch": {"experts": 0.5, "lookahead": 0},
    "small steps": {"experts": 0.5, "max_tokens": 7, "chunk": 5},
    "one at a time": {"experts": 0.5, "max_requests": 1},
    "three, far ahead": {"experts": 0.7, "max_requests": 3, "lookahead": 2, "policy": "lru"},
    "popularity": {"experts": 0.5, "predictor": "popularity", "batcher": "longest-queue"},
    "unpacked": {"pack": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_those_of_generate(folder, wanted, setting):
    with engine(folder, prefix_reuse=False, **SETTINGS[setting]) as own:
        assert ask_all(own, wanted[0], greedy(TOKENS)) == wanted[1]
        stats = own.stats()
        assert own.runner.machine.store.memory.resident <= stats.memory.experts_capacity + paging(own)
    assert stats.finished == {"length": len(wanted[0])}
    assert stats.uses > 0
    assert (stats.hit_ratio == 1) == ("experts" not in SETTINGS[setting])
    assert sum(stats.tokens_by_expert) == K * (stats.prompt_tokens + stats.output_tokens - len(wanted[0]))


def paging(own):
    """What whole pages take beyond entries of a few kilobytes, at most: a page before and after each matrix."""
    return sum(2 * 4096 * len(parts) for parts in own.runner.machine.store.memory.parts.values())


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen3-moe"}))
def test_every_family(family, tmp_path):
    folder = stock_folder(tmp_path / "m", family)
    model, asked = stock_reference(folder), prompts(6, seed=3)
    answers = [alone(model, prompt, 8) for prompt in asked]
    least = plan(folder, dtype="float32", context=64).least_experts
    for budget in (1.0, 0.5, least):
        with engine(folder, max_tokens=16, experts=budget) as own:
            assert ask_all(own, asked, greedy(8)) == answers


def test_plan_and_engine_agree_on_the_minimum(folder, wanted):
    options = {"context": 64, "max_requests": 4, "max_tokens": 16}
    least = plan(folder, dtype="float32", **options).least_budget
    with engine(folder, memory=least, **options) as own:
        assert own.runner.machine.memory.least == plan(folder, dtype="float32", **options).least_experts
        assert ask_all(own, wanted[0], greedy(TOKENS)) == wanted[1]
    with pytest.raises(MoesaicError, match=f"below the minimum of this model, {least} bytes"):
        engine(folder, memory=least - 1, **options).__enter__()


def test_budget_is_kept_while_experts_come_and_go(tmp_path, monkeypatch):
    """Matrices of whole pages, so that resident pages are the entries' own bytes."""
    monkeypatch.setitem(
        FAMILIES,
        "pages",
        lambda: t.Qwen3MoeConfig(
            **{**COMMON, "hidden_size": 64}, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16
        ),
    )
    folder, most, loads = stock_folder(tmp_path / "m", "pages"), [], ExpertStore._move

    def watched(store, *transfers):
        loads(store, *transfers)
        most.append(store.memory.resident)

    monkeypatch.setattr(ExpertStore, "_move", watched)
    with engine(folder, experts=0.3) as own:
        ask_all(own, prompts(8), greedy(TOKENS))
        assert len(most) > 20
        assert max(most) <= own.stats().memory.experts_capacity
        assert own.stats().evictions > 0


def test_batch_mates_change_no_bit(folder):
    asked = prompts(9, seed=5)
    generation = greedy(TOKENS, logprobs=3)

    def tokens(heard):
        return [event for event in heard.wait().events if isinstance(event, Token)]

    with engine(folder, max_requests=1, prefix_reuse=False) as own:
        single = [tokens(ask(own, prompt, generation)) for prompt in asked]
    for options in ({"experts": 0.5}, {"experts": 0.3, "lookahead": 0}, {}):
        with engine(folder, prefix_reuse=False, **options) as own:
            heard = [ask(own, prompt, generation) for prompt in asked]
            assert [tokens(each) for each in heard] == single


def test_routes_are_not_told(folder):
    with engine(folder) as own:
        heard = ask(own, prompts(1)[0], greedy(4)).wait()
    assert heard.events[0] == Routed(None)
    assert all(event.expert is None for event in heard.events if isinstance(event, Token))
    assert own.expert_names == []


def test_experts_cannot_be_named(folder):
    with engine(folder) as own, pytest.raises(RequestError, match="routers choose anew in every layer") as caught:
        ask(own, [5], greedy(4, experts=ExpertControl(pin=0)))
    assert caught.value.parameter == "experts"


@pytest.mark.parametrize("family", ["qwen3-moe-normed", "mixtral", "olmoe"])
def test_number_of_experts_per_request(family, tmp_path):
    """Requests of different numbers side by side; each has the tokens of a model with that number in its config."""
    folder, asked = stock_folder(tmp_path / "m", family), prompts(6, seed=4)
    one = [alone(stock_reference(folder, num_experts_per_tok=1), prompt, 8) for prompt in asked]
    two = [alone(stock_reference(folder), prompt, 8) for prompt in asked]
    assert one != two
    for options in ({}, {"experts": 0.5, "max_tokens": 16}):
        with engine(folder, **options) as own:
            heard = [ask(own, prompt, greedy(8, experts_per_token=k)) for k in (1, None, 2) for prompt in asked]
            got = [each.wait().ids for each in heard]
        assert got == one + two + two


def test_numbers_of_experts_out_of_range_are_refused(folder):
    with engine(folder) as own:
        with pytest.raises(RequestError, match="expected 1 to 2") as caught:
            ask(own, [5], greedy(4, experts_per_token=3))
        assert caught.value.parameter == "experts_per_token"
        with pytest.raises(RequestError, match="experts_per_token is 0"):
            greedy(4, experts_per_token=0)


def test_other_numbers_of_experts_share_no_prefix(folder):
    prompt = prompts(1, seed=8)[0] * 2
    with engine(folder) as own:
        first = ask(own, prompt, greedy(TOKENS)).wait()
        other = ask(own, prompt, greedy(TOKENS, experts_per_token=1)).wait()
        again = ask(own, prompt, greedy(TOKENS)).wait()
    assert (other.end.cached_tokens, again.end.cached_tokens) == (0, len(prompt) - 1)
    assert other.ids == alone(stock_reference(folder, num_experts_per_tok=1), prompt, TOKENS)
    assert first.ids == again.ids


@torch.no_grad()
def used(model, ids):
    """The experts of the last layer that run for these tokens."""
    with record_plans(model) as log:
        model(torch.tensor([ids]))
    return set(log.last[-1].index.flatten().tolist())


def test_an_expert_that_cannot_be_read_fails_who_needs_it(folder, monkeypatch):
    model, asked = stock_reference(folder), prompts(8, longest=2, seed=6)
    answers = [alone(model, prompt, 2) for prompt in asked]
    needed = [used(model, prompt + answer[:1]) for prompt, answer in zip(asked, answers, strict=True)]
    expert = next(e for e in range(E) if 0 < sum(e in each for each in needed) < len(asked))
    load = ExpertMemory.load

    def broken(memory, *keys):
        if Key(1, expert) in keys:
            raise MoesaicError("the disk is gone")
        load(memory, *keys)

    monkeypatch.setattr(ExpertMemory, "load", broken)
    with engine(folder, experts=0.5) as own:
        assert Key(1, expert) not in own.runner.residency
        heard = [ask(own, prompt, greedy(2)) for prompt in asked]
        ends = [each.wait().end for each in heard]
        assert own.failure is None
    assert [end.reason == "error" for end in ends] == [expert in each for each in needed]
    assert all(f"expert {expert} of layer 1: the disk is gone" in end.message for end in ends if end.reason == "error")
    rest = [(each.ids, answer) for each, answer in zip(heard, answers, strict=True) if each.end.reason == "length"]
    assert all(ids == answer for ids, answer in rest)


def test_shards_and_stacked_experts(tmp_path):
    folder = stock_folder(tmp_path / "m", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    stacked = stock_folder(tmp_path / "s", save_original_format=False)
    model, asked = stock_reference(folder), prompts(4, seed=3)
    answers = [alone(model, prompt, 8) for prompt in asked]
    for each in (folder, stacked):
        with engine(each, experts=0.5) as own:
            assert ask_all(own, asked, greedy(8)) == answers


def test_truncated_shard_is_refused(tmp_path):
    folder = stock_folder(tmp_path / "m", max_shard_size="40KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(MoesaicError, match=f"{shard.name} is too short"):
        engine(folder).__enter__()


def test_experts_of_another_size_than_the_config_says_are_refused(tmp_path):
    folder = stock_folder(tmp_path / "m")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"moe_intermediate_size": 16', '"moe_intermediate_size": 8'))
    with pytest.raises(MoesaicError, match="expected a matrix of an expert"):
        engine(folder).__enter__()


REFUSED = {
    "gpt-oss": (lambda: t.GptOssConfig(**COMMON, num_local_experts=E, head_dim=8), "of another kind .*has_bias"),
    "deepseek-v2": (
        lambda: t.DeepseekV2Config(
            **{**COMMON, "num_key_value_heads": 4},
            moe_intermediate_size=16,
            n_routed_experts=E,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
        ),
        "latent attention",
    ),
    "llama": (lambda: t.LlamaConfig(**COMMON), "holds no experts"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_served_is_refused(family, tmp_path, monkeypatch):
    build, problem = REFUSED[family]
    monkeypatch.setitem(FAMILIES, family, build)
    with pytest.raises(MoesaicError, match=problem):
        engine(stock_folder(tmp_path / "m", family)).__enter__()


def test_bfloat16_serves_packed_copies(folder):
    """With memory for copies of every expert; the tokens do not depend on what is hot."""
    asked = prompts(6, seed=2)
    with engine(folder, dtype="bfloat16", max_requests=1, prefix_reuse=False) as own:
        first, second = (ask_all(own, asked, greedy(20)) for _ in range(2))
        assert own.runner.machine.packs.taken > 0
    with engine(folder, dtype="bfloat16", experts=0.5, prefix_reuse=False) as own:
        assert ask_all(own, asked, greedy(20)) == first == second
        assert own.runner.machine.packs.taken == 0 or own.runner.machine.memory.for_packs(0) > 0


def test_api_serves_it(folder):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    from moesaic.serve.api.app import create_app
    from serving_http import Live

    model = stock_reference(folder)
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    ids = letters()("hello", add_special_tokens=False)["input_ids"]
    with engine(folder) as own, Live(create_app(own)) as live:

        def text(**changes):
            answer = live.post({**body, **changes})
            return answer.status_code, answer.json()

        status, told = text()
        assert (status, told["choices"][0]["text"]) == (200, letters().decode(alone(model, ids, 6)))
        one = stock_reference(folder, num_experts_per_tok=1)
        assert text(experts_per_token=1)[1]["choices"][0]["text"] == letters().decode(alone(one, ids, 6))
        assert text(return_experts=True)[0] == 200
        for refused in ({"experts_per_token": 3}, {"experts_per_token": 0}, {"experts": {"pin": 0}}):
            status, told = text(**refused)
            assert status == 400
            assert told["error"]["param"] == next(iter(refused))
        assert httpx.get(live.url + "/metrics").status_code == 200
        assert httpx.get(live.url + "/v1/moesaic/state").status_code == 200


def test_running_requests_of_other_numbers_share_no_prefix(folder):
    prompt = prompts(1, seed=8)[0] * 2
    with engine(folder) as own:
        other = ask(own, prompt, greedy(80, experts_per_token=1))
        while not other.ids and not other.ended.is_set():
            time.sleep(1e-3)
        plain = ask(own, prompt, greedy(TOKENS)).wait()
        own.cancel(other.number)
        other.wait()
    assert plain.end.cached_tokens == 0
    assert plain.ids == alone(stock_reference(folder), prompt, TOKENS)
