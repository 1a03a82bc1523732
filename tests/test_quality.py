"""The receipt's numbers against slow references: losses, intervals, router statistics, bytes."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from families import tiny
from moesaic.balance.information import mutual_information
from moesaic.data.tokens import DomainTokens
from moesaic.models.attach import attach
from moesaic.models.ffn_sites import find_ffn_sites
from moesaic.refactor.pregate import OverlapTeacher, overlap_target
from moesaic.refactor.quality import (
    compare,
    measure_bytes,
    measure_quality,
    measure_router,
    paired_interval,
    window_losses,
)

NAMES = ["a", "b", "c"]
LENGTH = 10


def make_masks(model, experts=3, keep=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for site in find_ffn_sites(model):
        mask = torch.rand(experts, site.width, generator=generator) < keep
        mask[:, :5], mask[:, 5] = True, False  # some shared by all, one dropped
        masks.append(mask)
    return masks


@pytest.fixture
def dense():
    return tiny("llama")


@pytest.fixture
def moe(dense):
    model = attach(dense, make_masks(dense), NAMES)
    for name, parameter in model.pregate.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)  # so that routes change from token to token
    return model


@pytest.fixture
def domains():
    """Three domains with 5, 4 and 2 windows, so that counts and batches are uneven."""
    rng = np.random.default_rng(0)
    sizes, widths = (55, 40, 25), (2.0, 3.0, 4.5)
    return [
        DomainTokens(name, np.arange(3, 30, dtype=np.int32), rng.integers(3, 96, size, dtype=np.int32), width)
        for name, size, width in zip(NAMES, sizes, widths, strict=True)
    ]


@torch.no_grad()
def hf_loss(model, ids, **kwargs):
    """The loss transformers computes for one window."""
    return float(model(input_ids=ids[None], labels=ids[None], use_cache=False, **kwargs).loss)


# -- losses -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_window_losses_are_hugging_faces_losses(dense):
    ids = torch.randint(3, 96, (3, LENGTH))
    losses = window_losses(dense(ids).logits, ids)
    assert losses.tolist() == pytest.approx([hf_loss(dense, row) for row in ids], rel=1e-5)


def test_compare_by_hand():
    reference = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 1.0]]])
    agreement, kl = compare(logits, reference)
    assert agreement == 0.5, "argmax of a tie is the first; the second position differs"
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    p = 1 / (1 + math.exp(-1))
    second = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    assert kl == pytest.approx((first + second) / 2, rel=1e-5), "KL(reference || model), not the other way round"
    assert compare(reference, reference) == (1.0, 0.0)


def test_quality_equals_the_losses_of_single_windows(dense, moe, domains):
    pruned = attach(dense, [mask[:1] for mask in make_masks(dense, seed=9)], ["pruned"])
    unhealed = attach(dense, make_masks(dense, seed=4), NAMES)
    result = measure_quality(
        dense, moe, domains, pruned=pruned, unhealed=unhealed, windows=5, length=LENGTH, batch_size=2
    )
    held_out = [domain.windows(LENGTH, 5) for domain in domains]

    def nats(model, **kwargs):
        return [float(np.mean([hf_loss(model, ids, **kwargs) for ids in rows])) for rows in held_out]

    expected = {"dense": nats(dense), "moe": nats(moe), "unhealed": nats(unhealed)}
    expected["pruned"] = nats(pruned, expert_index=0)
    matrix = [nats(moe, expert_index=expert) for expert in range(3)]
    expected["oracle"] = [matrix[i][i] for i in range(3)]
    for name, values in expected.items():
        assert result["nats"][name] == pytest.approx(values, rel=1e-5), name
        assert result["average"][name] == pytest.approx(np.mean(values), rel=1e-5)
        bits = [v / math.log(2) / d.bytes_per_token for v, d in zip(values, domains, strict=True)]
        assert result["bits_per_byte"][name] == pytest.approx(bits, rel=1e-5)
    assert np.array(result["matrix"]) == pytest.approx(np.array(matrix), rel=1e-5), "rows are experts"
    assert result["nats"]["oracle"] == [result["matrix"][i][i] for i in range(3)], "the oracle is the diagonal"
    difference = np.array(expected["moe"]) - np.array(expected["pruned"])
    versus = result["moe_minus_pruned"]
    assert [row[0] for row in versus["per_domain"]] == pytest.approx(difference, abs=1e-5)
    assert versus["mean"] == pytest.approx(difference.mean(), abs=1e-5), "every domain counts alike, every window too"
    assert versus["better_domains"] == (difference < 0).sum() and versus["low"] < versus["high"]
    gap = result["average"]["pruned"] - result["average"]["dense"]
    if gap > 0:
        share = (result["average"]["moe"] - result["average"]["dense"]) / gap
        assert result["gap_share"] == pytest.approx(share)
    assert result["domains"] == NAMES and result["windows_per_domain"] == 2


def test_quality_does_not_depend_on_the_batch_size(dense, moe, domains):
    one, two = (measure_quality(dense, moe, domains, windows=5, length=LENGTH, batch_size=size) for size in (1, 4))
    assert one["agreement"]["moe"] == pytest.approx(two["agreement"]["moe"])
    assert one["kl"]["moe"] == pytest.approx(two["kl"]["moe"], rel=1e-4)
    assert one["nats"]["moe"] == pytest.approx(two["nats"]["moe"], rel=1e-5)
    assert "pruned" not in one["nats"] and "moe_minus_pruned" not in one


def test_random_routes_are_seeded_and_random(dense, moe, domains):
    def random(seed):
        return measure_quality(dense, moe, domains, windows=5, length=LENGTH, seed=seed)["nats"]["random"]

    assert random(1) == random(1) and random(1) != random(2)


def test_with_all_channels_kept_every_variant_is_the_dense_model(dense, domains):
    whole = attach(dense, [torch.ones(3, site.width) > 0 for site in find_ffn_sites(dense)], NAMES)
    result = measure_quality(dense, whole, domains, windows=3, length=LENGTH)
    for name in ("moe", "oracle", "random"):
        assert result["nats"][name] == pytest.approx(result["nats"]["dense"], rel=1e-5), name
    assert result["agreement"]["moe"] == 1.0 and result["kl"]["moe"] == pytest.approx(0, abs=1e-6)


# -- intervals --------------------------------------------------------------------------------------------------------

floats = st.floats(-5, 5).map(lambda x: round(x, 3))
groups = st.lists(st.lists(floats, min_size=1, max_size=12).map(np.array), min_size=1, max_size=4)


@given(groups)
def test_an_interval_lies_in_the_data_and_around_the_mean(differences):
    *rows, average = paired_interval(differences, draws=200)
    assert len(rows) == len(differences)
    for (mean, low, high), values in zip(rows, differences, strict=True):
        assert mean == pytest.approx(values.mean())
        assert values.min() - 1e-9 <= low <= high <= values.max() + 1e-9
        assert low - 1e-9 <= mean <= high + 1e-9
    assert average[0] == pytest.approx(np.mean([row[0] for row in rows])), "groups count alike"


@given(groups, st.floats(-3, 3), st.floats(0.1, 10))
def test_an_interval_moves_and_stretches_with_the_data(differences, shift, scale):
    before = np.array(paired_interval(differences, draws=200))
    after = np.array(paired_interval([scale * row + shift for row in differences], draws=200))
    assert after == pytest.approx(scale * before + shift, abs=1e-6)


@given(st.lists(st.floats(0.1, 2), min_size=2, max_size=12))
def test_a_difference_of_one_sign_excludes_zero(values):
    (_, low, _), _ = paired_interval([np.array(values)], draws=200)
    assert low > 0


def test_a_constant_difference_has_no_width():
    assert paired_interval([np.full(6, 0.25)]) == [[0.25, 0.25, 0.25]] * 2


def test_the_interval_has_the_width_it_should_have():
    values = np.random.default_rng(0).normal(size=400)
    (mean, low, high), _ = paired_interval([values])
    half = 1.96 * values.std() / math.sqrt(400)
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.15)
    *_, (_, low, high) = paired_interval([values, values[::-1]])
    assert (high - low) / 2 == pytest.approx(half / math.sqrt(2), rel=0.15), "groups are drawn independently"


# -- router -----------------------------------------------------------------------------------------------------------


def test_router_statistics_equal_a_count_by_hand(dense, moe, domains):
    teacher = OverlapTeacher(dense, make_masks(dense))
    result = measure_router(moe, teacher, domains, windows=4, length=LENGTH, batch_size=3)
    right = stays = transitions = 0
    chosen = [[0] * 3 for _ in NAMES]
    joint = torch.zeros(3, 3)
    for label, domain in enumerate(domains):
        for ids in domain.windows(LENGTH, 4):
            route = moe.plan(ids[None]).expert.tolist()
            overlaps = teacher.overlaps(ids[None])
            target = overlap_target(overlaps).argmax(-1).tolist()
            right += sum(r == t for r, t in zip(route, target, strict=True))
            stays += sum(a == b for a, b in pairwise(route))
            transitions += LENGTH - 1
            for expert in route:
                chosen[label][expert] += 1
            for first, second in zip(overlaps[0].argmax(-1), overlaps[1].argmax(-1), strict=True):
                joint[first, second] += 1
    tokens = sum(map(sum, chosen))
    load = np.array(chosen).sum(0) / tokens
    assert len(set(np.round(load, 3))) == 3, "all experts are in use, or this test sees little"
    assert result["label_accuracy"] == pytest.approx(right / tokens)
    assert result["stay_probability"] == pytest.approx(stays / transitions)
    assert result["load"] == pytest.approx(load)
    assert result["entropy"] == pytest.approx(-(load * np.log(load)).sum(), rel=1e-5)
    assert result["max_entropy"] == math.log(3)
    shares = np.array(chosen) / np.array(chosen).sum(1, keepdims=True)
    assert np.array(result["confusion"]) == pytest.approx(shares.T, rel=1e-5), "rows are experts, columns domains"
    assert result["domain_accuracy"] == pytest.approx(np.diag(shares).mean(), rel=1e-5)
    assert result["layer_mutual_information"] == pytest.approx([mutual_information(joint, corrected=False)])


@pytest.mark.parametrize(
    ("table", "nats"),
    [
        ([[1, 1], [1, 1]], 0.0),
        ([[5, 0], [0, 5]], math.log(2)),
        ([[0, 7], [7, 0]], math.log(2)),
        ([[2, 1], [1, 2]], 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)),
        ([[3, 0], [1, 0]], 0.0),
        ([[1, 1, 0], [0, 0, 2], [0, 0, 0]], math.log(2)),
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_mutual_information_by_hand(table, nats):
    assert mutual_information(torch.tensor(table).float(), corrected=False) == pytest.approx(nats, abs=1e-9)


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=3, max_size=3))
def test_mutual_information_is_symmetric_and_bounded_by_entropy(table):
    joint = torch.tensor(table).float()
    information = mutual_information(joint, corrected=False)
    assert information == pytest.approx(mutual_information(joint.T, corrected=False), abs=1e-9)
    p = joint.sum(1).double() / max(1.0, float(joint.sum()))
    assert -1e-9 <= information <= float(-(p * p.clamp_min(1e-300).log()).sum()) + 1e-9


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "gemma3"])
def test_bytes_are_those_on_the_disk(family, tmp_path):
    dense = tiny(family)
    masks = make_masks(dense)
    moe = attach(dense, masks, NAMES)
    untied = attach(dense, masks, NAMES, untied=True)
    result = measure_bytes(dense, moe, torch.bfloat16)
    for name, model in (("dense", dense), ("moe", moe), ("untied", untied)):
        getattr(model, "backbone", model).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        stored = load_file(tmp_path / name / "model.safetensors")
        assert result[name] == sum(t.numel() * t.element_size() for t in stored.values()), name
        parameters = {"dense": "dense_parameters", "moe": "moe_parameters"}.get(name)
        if parameters:
            assert result[parameters] == sum(t.numel() for t in stored.values())
    assert result["ratio"] == result["moe"] / result["dense"]
    assert result["router"] == 4 * sum(p.numel() for p in moe.pregate.parameters())


def test_active_parameters_by_hand(dense):
    masks = make_masks(dense)
    result = measure_bytes(dense, attach(dense, masks, NAMES), torch.float32)
    ffn = sum(3 * site.width * site.hidden for site in find_ffn_sites(dense))
    experts = [sum(3 * 32 * int(mask[expert].sum()) for mask in masks) for expert in range(3)]
    outside = result["dense_parameters"] - ffn + result["router"] // 4
    assert result["active_parameters"] == outside + round(sum(experts) / 3)
    stored = sum(3 * 32 * int(mask.any(0).sum()) for mask in masks)
    assert result["moe_parameters"] == outside + stored
    assert result["untied"] - result["moe"] == 4 * (sum(experts) - stored)


def test_bytes_of_a_model_without_a_router(dense):
    result = measure_bytes(dense, attach(dense, [m[:1] for m in make_masks(dense)], ["pruned"]), torch.bfloat16)
    assert result["router"] == 0 and result["untied"] == result["moe"] == 2 * result["moe_parameters"]
