"""What holds of the engine with the Triton kernels: `test_experts_triton.py` runs this file in a process of its own.

With TRITON_INTERPRET=1 on the CPU as the device, in triton's interpreter; without, on a GPU, where steps of single
tokens are CUDA graphs.
"""

import os

import numpy as np
import pytest
import torch

from families import tiny
from moesaic.experts.compute import TokenGroups
from moesaic.models.attach import attach
from moesaic.models.ffn_sites import find_ffn_sites
from moesaic.serve import attention
from moesaic.serve.attention import Scores, Segment
from moesaic.serve.graphs import StepGraphs
from moesaic.serve.kernel_experts import KernelExperts
from moesaic.serve.kv import KVPool, KVShape
from moesaic.serve.layers import Rotation
from moesaic.serve.request import ExpertControl
from moesaic.serve.step import Part
from moesaic.serve.triton_attention import attend, place
from serving import alone, ask, ask_all, engine, greedy, letters, prompts, reference, served_folder

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
TOKENS = 6


# -- attention --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "groups", "width", "scores"),
    [
        (8, 2, 64, Scores(0.125)),
        (4, 4, 20, Scores(0.3)),
        (6, 2, 32, Scores(0.2, window=100)),
        (4, 1, 16, Scores(0.25, cap=5.0)),
        (8, 2, 64, Scores(0.125, window=70, cap=3.0)),
    ],
)
def test_attention_is_that_of_each_token_alone(dtype, heads, groups, width, scores):
    torch.manual_seed(0)
    keys, values = (torch.randn(5, groups, 700, width, device=DEVICE, dtype=dtype) for _ in "kv")
    positions, slots = [0, 5, 255, 256, 699, 63, 64], [0, 1, 2, 3, 4, 0, 2]
    for slot, position in zip(slots, positions, strict=True):
        if slot in (1, 3, 4):  # who reads on reads what is no number
            keys[slot, :, position + 1 :] = values[slot, :, position + 1 :] = float("nan")
    query = torch.randn(7, heads, width, device=DEVICE, dtype=dtype)
    place = [torch.tensor(each, device=DEVICE) for each in (slots, positions)]
    found = attend(query, keys, values, *place, scores)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        seen = (x[slot, :, : position + 1].float() for x in (keys, values))
        wanted = attention._one(query[row].float(), *seen, scores)
        torch.testing.assert_close(found[row].float(), wanted, rtol=tolerance, atol=tolerance)
        single = [each[row : row + 1] for each in place]
        assert torch.equal(attend(query[row : row + 1], keys, values, *single, scores)[0], found[row])


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 16), (3, 1, 20), (2, 2, 64)])
def test_tokens_are_rotated_and_placed(heads, groups, width):
    torch.manual_seed(0)
    keys, values = (torch.zeros(3, groups, 50, width, device=DEVICE) for _ in "kv")
    qkv = torch.randn(2, heads + 2 * groups, width, device=DEVICE)
    angle = torch.rand(1, 2, width // 2, device=DEVICE).mul(6.0).repeat(1, 1, 2)
    angles = angle.cos(), angle.sin()
    slots, positions = [2, 0], [7, 49]
    where = tuple(torch.tensor(x, device=DEVICE) for x in (slots, positions))
    query = place(qkv, heads, angles, (keys, values), where)
    turned = Rotation().turn(qkv[:, : heads + groups], angles)
    torch.testing.assert_close(query, turned[:, :heads], rtol=1e-5, atol=1e-6)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        torch.testing.assert_close(keys[slot, :, position], turned[row, heads:], rtol=1e-5, atol=1e-6)
        assert torch.equal(values[slot, :, position], qkv[row, heads + groups :])
    assert int((keys != 0).any(-1).sum()) == int((values != 0).any(-1).sum()) == 2 * groups


# -- graphs -----------------------------------------------------------------------------------------------------------
def test_graphs_answer_what_the_function_does():
    weight = torch.randn(50, 3, device=DEVICE)
    graphs = StepGraphs(lambda integers: weight[integers[0]] * integers[1][:, None], DEVICE, most=8)
    graphs.warm((0, 0))
    assert graphs.usable and not graphs.suits(0) and not graphs.suits(9)
    for tokens in (1, 3, 8, 5, 1):
        first, second = torch.randint(50, (2, tokens))
        found = graphs((first.tolist(), second.tolist()))
        assert torch.equal(found.cpu(), (weight.cpu()[first] * second[:, None]))


def test_what_waits_for_the_device_is_not_captured():
    graphs = StepGraphs(lambda integers: integers[0] * int(integers.max()), DEVICE, most=2)
    graphs.warm((1,))
    assert graphs.usable == (DEVICE.type == "cpu")


# -- the engine -------------------------------------------------------------------------------------------------------
SETTINGS = {
    "all": {},
    "half": {"experts": 0.5},
    "small steps": {"experts": 0.6, "max_tokens": 7},
    "one at a time": {"max_requests": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def wanted(folder):
    model, asked = reference(folder), prompts(8, longest=24)
    return asked, [alone(model, prompt, TOKENS) for prompt in asked]


@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_those_of_generate(folder, wanted, setting, monkeypatch):
    replays, plain = [], StepGraphs.__call__
    monkeypatch.setattr(StepGraphs, "__call__", lambda own, columns: replays.append(1) or plain(own, columns))
    with engine(folder, device=DEVICE.type, memory="1GiB", **SETTINGS[setting]) as own:
        backbone, gate = own.runner.machine.backbone, own.runner.machine.gate
        assert all(isinstance(each, KernelExperts) for each in backbone.experts)
        assert backbone.graphs.usable and gate.graphs.usable
        before = len(replays)
        assert ask_all(own, wanted[0], greedy(TOKENS)) == wanted[1]
        assert len(replays) > before


def test_a_prompt_that_ends_a_step_with_one_token_answers_only_at_its_end(folder):
    parts = [
        Part(slot, 0, [5 + slot], np.array([slot], np.int16), prompt=True, last=last)
        for slot, last in enumerate((False, True, False, True))
    ]
    parts[3].experts[0] = 1
    with engine(folder, device=DEVICE.type, memory="1GiB") as own:
        backbone = own.runner.machine.backbone
        found = backbone.run(parts, complete=True).clone()
        backbone.graphs = None
        wanted = backbone.run(parts, complete=True)
    assert len(wanted) == 2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "untied"])
def test_other_families(tmp_path, family):
    folder = served_folder(tmp_path / family, "llama" if family == "untied" else family, untied=family == "untied")
    asked, model = prompts(3, longest=12), reference(folder)
    for share in (1.0, 0.6):
        with engine(folder, device=DEVICE.type, memory="1GiB", experts=share) as own:
            assert ask_all(own, asked, greedy(TOKENS)) == [alone(model, prompt, TOKENS) for prompt in asked]


def test_a_dense_model_is_served_as_one_expert(tmp_path):
    dense = tiny("llama")
    masks = [torch.ones(1, site.width, dtype=torch.bool) for site in find_ffn_sites(dense)]
    attach(dense, masks, ["all"]).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    asked = prompts(3, longest=12)
    with engine(tmp_path, device=DEVICE.type, memory="1GiB") as own:
        assert own.runner.machine.backbone.graphs.usable
        assert ask_all(own, asked, greedy(TOKENS)) == [alone(dense, prompt, TOKENS) for prompt in asked]


def test_sampling_and_expert_control_are_the_hosts(folder):
    wishes = greedy(TOKENS, experts=ExpertControl(pin=1), logprobs=3), greedy(TOKENS, seed=4, ignore_eos=True)
    asked = prompts(2, longest=12)
    answers = []
    for options in ({"device": DEVICE.type}, {}):
        with engine(folder, memory="1GiB", **options) as own:
            answers.append([ask(own, prompt, wish).wait().ids for prompt in asked for wish in wishes])
    assert answers[0] == answers[1]


def test_groups_move_with_what_the_host_knows():
    groups = TokenGroups(torch.tensor([2, 0, 2, 1]))
    there = groups.to(DEVICE)
    assert there.expert_N.device.type == there.order.device.type == DEVICE.type
    assert there.counts == [1, 1, 2] and there.used == [0, 1, 2] and there.order.tolist() == [1, 3, 0, 2]


def test_a_step_of_single_tokens_and_prompts_mixed():
    pool = KVPool([KVShape(2, 16, torch.float32)], 4, 300, None if DEVICE.type == "cpu" else DEVICE)
    torch.manual_seed(0)
    rows = [Segment(2, 0, 1, 10), Segment(0, 1, 1, 0), Segment(1, 2, 5, 3)]
    for keys in pool.matrices(0):
        keys.normal_()
    query, key, value = torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.randn(7, 2, 16)
    step = attention.RaggedAttention(pool, rows)
    found = step.attend(0, *(x.to(DEVICE) for x in (query, key, value)), Scores(0.25)).cpu()
    for slot, start, tokens, past in rows:
        keys, values = (x.cpu() for x in pool.read(0, slot, past + tokens))
        assert torch.equal(keys[:, past:], key[start : start + tokens].transpose(0, 1))
        for token in range(tokens):
            seen = (x[:, : past + token + 1] for x in (keys, values))
            wanted = attention._one(query[start + token], *seen, Scores(0.25))
            torch.testing.assert_close(found[start + token], wanted, rtol=1e-5, atol=1e-5)
