"""The engine: a request's tokens are those of generate(), whatever the budget, batch, scheduler, prefetch or family."""

import threading

import pytest
import torch

from families import FAMILIES
from moesaic.errors import MoesaicError
from moesaic.serve.experts import WHOLE, BlockExperts
from moesaic.serve.request import ExpertControl, Generation, QueueFullError, RequestError, Routed, Token
from moesaic.serve.store import ExpertStore
from serving import NAMES, alone, ask, ask_all, engine, greedy, letters, prompts, reference, served_folder

TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def wanted(folder):
    model, asked = reference(folder), prompts(24)
    return asked, [alone(model, prompt, TOKENS) for prompt in asked]


SETTINGS = {
    "all": {},
    "half": {"experts": 0.5},
    "least": {"experts": 0.4},
    "small steps": {"max_tokens": 7},
    "no prefetch": {"experts": 0.5, "lookahead": 0},
    "one at a time": {"max_requests": 1},
    "lru, fcfs": {"experts": 0.6, "policy": "lru", "batcher": "fcfs"},
    "paper": {"experts": 0.6, "batcher": "longest-queue", "max_tokens": 64},
    "prefill first": {"experts": 0.6, "batcher": "prefill-first", "max_tokens": 64},
    "random, regroup": {"experts": 0.6, "policy": "random", "batcher": "chunked-prefill", "max_tokens": 16},
    "unpacked": {"pack": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_those_of_generate(folder, wanted, setting):
    with engine(folder, prefix_reuse=False, **SETTINGS[setting]) as own:
        assert ask_all(own, wanted[0], greedy(TOKENS)) == wanted[1]
        stats = own.stats()
        capacity = stats.memory.experts_capacity
    assert stats.finished == {"length": len(wanted[0])}
    assert stats.output_tokens == TOKENS * len(wanted[0])
    assert stats.memory.kv == 0, "memory of ended requests is given back"
    assert (stats.hit_ratio == 1) == (setting not in ("half", "least") and "experts" not in SETTINGS[setting])
    assert capacity > 0


def test_minimum_budget(folder, wanted):
    with engine(folder) as own:
        least = own.runner.machine.memory.least
    with engine(folder, experts=least) as own:
        assert ask_all(own, wanted[0], greedy(TOKENS)) == wanted[1]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"falcon"}))
def test_every_family(family, tmp_path):
    folder = served_folder(tmp_path / "m", family)
    model, asked = reference(folder), prompts(6, seed=3)
    with engine(folder, max_tokens=16, experts=0.6) as own:
        assert ask_all(own, asked, greedy(8)) == [alone(model, prompt, 8) for prompt in asked]


def test_attention_outside_the_interface_is_refused(tmp_path):
    folder = served_folder(tmp_path / "m", "falcon")
    with pytest.raises(MoesaicError, match="attention in 0 of 2 layers"), engine(folder):
        pass


def test_untied_experts(tmp_path):
    folder = served_folder(tmp_path / "m", untied=True)
    model, asked = reference(folder), prompts(6, seed=3)
    with engine(folder, experts=0.5) as own:
        assert ask_all(own, asked, greedy(8)) == [alone(model, prompt, 8) for prompt in asked]


def test_batch_mates_change_no_bit(folder):
    """Not even log-probabilities: float32 products are kept independent of how many rows they have."""
    asked = prompts(9, seed=5)
    generation = greedy(TOKENS, logprobs=3)

    def tokens(heard):
        return [event for event in heard.wait().events if isinstance(event, Token)]

    with engine(folder, max_requests=1, prefix_reuse=False) as own:
        single = [tokens(ask(own, prompt, generation)) for prompt in asked]
    with engine(folder, experts=0.5, prefix_reuse=False) as own:
        heard = [ask(own, prompt, generation) for prompt in asked]
        together = [tokens(each) for each in heard]
    assert single == together


def test_pinned_requests_share_no_prefix(folder):
    """Keys depend on the experts that ran: those of a pinned request are not what the routes would have made."""
    prompt = prompts(1, seed=8)[0] * 3
    with engine(folder) as own:
        pinned = ask(own, prompt, greedy(TOKENS, experts=ExpertControl(pin=2))).wait()
        free = ask(own, prompt, greedy(TOKENS)).wait()
    assert free.end.cached_tokens == 0
    assert free.ids == alone(reference(folder), prompt, TOKENS)
    assert pinned.ids != free.ids


def test_experts_told_are_the_plan(folder):
    model, (prompt,) = reference(folder), prompts(1, seed=11)
    with engine(folder) as own:
        heard = ask(own, prompt, greedy(TOKENS)).wait()
    plan = model.plan(torch.tensor([prompt + heard.ids])).expert.tolist()
    routed = next(event for event in heard.events if isinstance(event, Routed))
    assert list(routed.experts) == plan[: len(prompt)]
    told = [event.expert for event in heard.events if isinstance(event, Token)]
    assert told[:-1] == plan[len(prompt) : -1]
    assert told[-1] is None, "the last token never runs"
    assert len(set(plan)) > 1


def test_prefix_is_reused(folder):
    model, (prompt,) = reference(folder), prompts(1, longest=1, seed=2)
    prompt = prompts(1, seed=8)[0] * 4
    with engine(folder) as own:
        first = ask(own, prompt, greedy(TOKENS)).wait()
        longer = prompt + first.ids + prompts(1, seed=9)[0]
        second = ask(own, longer, greedy(TOKENS)).wait()
        third = ask(own, prompt, greedy(TOKENS)).wait()
    assert first.end.cached_tokens == 0
    assert second.end.cached_tokens == len(prompt) + TOKENS - 1
    assert third.end.cached_tokens == len(prompt) - 1, "the last token runs: its output is wanted"
    assert second.ids == alone(model, longer, TOKENS)
    assert third.ids == first.ids == alone(model, prompt, TOKENS)


def test_pinned_expert(folder):
    model, (prompt,) = reference(folder), prompts(1, seed=4)
    with engine(folder) as own:
        heard = ask(own, prompt, greedy(TOKENS, experts=ExpertControl(pin=2))).wait()
        denied = ask(own, prompt, greedy(TOKENS, experts=ExpertControl(deny=(0, 1)))).wait()
    with torch.no_grad():
        ids = torch.tensor([prompt])
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(ids, expert_index=2, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert heard.ids == ids[0, len(prompt) :].tolist() == denied.ids
    assert set(next(e for e in heard.events if isinstance(e, Routed)).experts) == {2}


def test_seeded_sampling_ignores_batch_mates(folder):
    asked = prompts(8, seed=6)
    generation = Generation(max_tokens=TOKENS, temperature=1.0, top_p=0.9, seed=5)
    with engine(folder, prefix_reuse=False) as own:
        single = [ask(own, prompt, generation).wait().ids for prompt in asked]
        together = ask_all(own, asked, generation)
        other = ask_all(own, asked, Generation(max_tokens=TOKENS, temperature=1.0, top_p=0.9, seed=6))
    assert single == together != other


def test_cancel_frees_memory(folder):
    with engine(folder) as own:
        heard = ask(own, prompts(1)[0], greedy(60))
        while not heard.ids:
            pass
        assert own.stats().memory.kv > 0
        own.cancel(heard.number)
        heard.wait()
        own.cancel(heard.number)  # again: nothing happens
        own.cancel(12345)
        ask(own, prompts(1)[0], greedy(1)).wait()
        assert heard.end.reason == "cancelled"
        assert own.stats().running == 0


def test_full_queue_is_refused(folder):
    with engine(folder, max_requests=1, max_waiting=1) as own:
        heard = [ask(own, prompts(1)[0], greedy(50)) for _ in range(2)]
        with pytest.raises(QueueFullError) as error:
            ask(own, prompts(1)[0], greedy(5))
        assert error.value.retry_after_s >= 0
        assert [each.wait().end.reason for each in heard] == ["length"] * 2
        assert own.stats().rejected == 1


@pytest.mark.parametrize(
    ("prompt", "changes", "parameter", "text"),
    [
        ([], {}, "prompt", "empty"),
        ([3, 96], {}, "prompt", "token 96 is outside the vocabulary of 96"),
        ([3], {"max_tokens": 10_000}, "max_tokens", "the context is 128"),
        ([3] * 200, {}, "prompt", "the context is 128"),
        ([3], {"experts": ExpertControl(pin=3)}, "experts", "no expert 3"),
        ([3], {"experts": ExpertControl(deny=(0, 1, 2))}, "experts", "every expert"),
        ([3], {"logit_bias": {500: 1.0}}, "logit_bias", "500"),
    ],
)
def test_impossible_requests_are_refused_at_once(folder, prompt, changes, parameter, text):
    with engine(folder) as own, pytest.raises(RequestError, match=text) as error:
        ask(own, prompt, Generation(**{"max_tokens": 4, **changes}))
    assert error.value.parameter == parameter


def test_memory_moves_between_keys_and_experts(folder):
    """Under load keys take what experts held; afterwards experts have it back. Nobody's tokens change."""
    model = reference(folder)
    with engine(folder) as own:
        memory = own.runner.machine.memory
    spare = memory.all_experts + int(2.8 * own.runner.pool.bytes_for(120))  # the third request needs the experts' share
    with engine(folder, memory=memory.dense + memory.buffers + spare, context=128) as own:
        pool = own.runner.machine.memory.pool
        asked = prompts(12, seed=12)
        seen = []
        heard = [ask(own, prompt, greedy(80)) for prompt in asked]
        while not all(each.ended.is_set() for each in heard):
            now = own.stats().memory
            seen.append((now.experts_capacity, now.kv))
        assert [each.wait().ids for each in heard] == [alone(model, prompt, 80) for prompt in asked]
        after = own.stats().memory.experts_capacity
    assert min(capacity for capacity, _ in seen) < after
    assert all(capacity + kv <= pool for capacity, kv in seen)


def test_a_failing_client_is_cut_off(folder):
    def broken(event):
        raise RuntimeError("gone")

    with engine(folder) as own:
        own.submit(prompts(1)[0], greedy(50), broken)
        assert len(ask(own, prompts(1)[0], greedy(5)).wait().ids) == 5
        while own.stats().running:
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_store_thread_is_replaced(folder, wanted):
    """What kills it once is survived: another thread takes up the transfer it left."""
    with engine(folder, experts=0.4) as own:
        store: ExpertStore = own.runner.machine.store
        move, killed = store._move, threading.Event()

        def dying(transfer):
            if not killed.is_set():
                killed.set()
                raise SystemExit
            move(transfer)

        store._move = dying
        assert ask_all(own, wanted[0], greedy(TOKENS)) == wanted[1]
        assert killed.is_set()


def test_names_and_lists(folder):
    with engine(folder) as own:
        assert own.expert_names == NAMES
        stats = own.stats()
        assert len(stats.resident) == 2
        assert all(len(row) == 3 for row in stats.resident)
        assert all(share == 1 for row in stats.resident for share in row)


@pytest.fixture(scope="module")
def half(folder, tmp_path_factory):
    """The model in bfloat16."""
    target = tmp_path_factory.mktemp("half") / "tiny"
    reference(folder).to(torch.bfloat16).save_pretrained(target)
    letters().save_pretrained(target)
    return target


def logprobs(own, asked):
    heard = [ask(own, prompt, greedy(TOKENS, logprobs=2)) for prompt in asked]
    return [[event.logprob for event in each.wait().events if isinstance(event, Token)] for each in heard]


def test_few_tokens_of_several_experts_share_a_pass(half, monkeypatch):
    """In bfloat16: log-probabilities are those of an expert at a time up to rounding, packed or not."""
    asked = prompts(12, seed=3)
    passes = []
    together = BlockExperts.run_together

    def counted(self, x_MD, groups):
        passes.append(len(groups.used))
        return together(self, x_MD, groups)

    monkeypatch.setattr(BlockExperts, "run_together", counted)
    with engine(half, dtype="bfloat16", batch_invariant=True, prefix_reuse=False) as own:
        wanted = logprobs(own, asked)
        assert not passes
        alone_first = [logprobs(own, [prompt])[0] for prompt in asked]
        assert alone_first == wanted, "batch-invariant means every bit"
    for pack in (True, False):
        passes.clear()
        with engine(half, dtype="bfloat16", pack=pack, prefix_reuse=False) as own:
            found = logprobs(own, asked)
            held = own.runner.machine.packs
            assert any(at[1] == WHOLE for at in held._copies) == pack
            assert held.taken == sum(weight.bytes for copy in held._copies.values() for weight in copy)
        assert passes and min(passes) > 1
        first = [(a[0], b[0]) for a, b in zip(found, wanted, strict=True)]
        assert all(abs(a - b) < 0.05 for a, b in first)


def test_float32_never_shares_a_pass(folder, monkeypatch):
    monkeypatch.setattr(BlockExperts, "run_together", lambda *args: pytest.fail("bits would depend on batch mates"))
    with engine(folder) as own:
        ask_all(own, prompts(8), greedy(4))


def test_a_pass_over_all_channels_pays_where_experts_share(folder):
    with engine(folder) as own:
        experts = own.runner.machine.backbone.experts[0]
    assert experts.together({0: 1, 1: 1, 2: 1}), "three halves are more than what all own together"
    assert not experts.together({0: 1})
    assert not experts.together({0: 200, 1: 200, 2: 200}), "arithmetic counts, and most of it would be wasted"
