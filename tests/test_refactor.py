"""Stages 1 to 4 against slow references written from the papers: profile, extract, cluster, router labels, healing."""

import copy
import gc
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from families import tiny
from moesaic.data.tokens import DomainTokens
from moesaic.errors import MoesaicError
from moesaic.models.attach import attach
from moesaic.models.ffn_sites import find_ffn_sites
from moesaic.refactor import profile as profile_module
from moesaic.refactor.cluster import cluster_domains, signatures
from moesaic.refactor.extract import extract, extract_pruned, keep_per_layer, ownership, top_channels
from moesaic.refactor.heal import (
    HealConfig,
    expert_step,
    heal,
    train_experts,
    train_router,
)
from moesaic.refactor.pregate import OverlapTeacher, overlap_target, router_loss, router_step
from moesaic.refactor.profile import Profile, profile
from moesaic.training.losses import distillation_loss, next_token_loss

PAD = 0
NAMES = ["a", "b", "c"]


def domain(name, tokens=240, low=3, high=96, seed=0):
    rng = np.random.default_rng(seed)
    train, validation = (rng.integers(low, high, size, dtype=np.int32) for size in (tokens, tokens // 2))
    return DomainTokens(name, train, validation, 1.0)


@pytest.fixture
def domains():
    return [domain(name, low=3 + 31 * i, high=34 + 31 * i, seed=i) for i, name in enumerate(NAMES)]


def activations(model, ids):
    """One (S, W) float64 tensor per layer of a Llama: silu(gate x) * up x, computed beside the model."""
    inputs = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids[None])
        for hook in hooks:
            hook.remove()
        mlps = [layer.mlp for layer in model.model.layers]
        return [
            (F.silu(m.gate_proj(x)) * m.up_proj(x)).double() for m, x in zip(mlps, inputs, strict=True)
        ]  # fmt: skip


# -- profile ----------------------------------------------------------------------------------------------------------


def test_profile_is_the_mean_over_tokens_of_the_down_projections_input(domains):
    model = tiny("llama")
    result = profile(model, domains, tokens_per_domain=96, length=24, batch_size=3)
    for row, tokens in enumerate(domains):
        rows = [activations(model, ids) for ids in tokens.windows(24, 4, "train")]
        for layer in range(2):
            size = torch.cat([row[layer] for row in rows]).abs()
            torch.testing.assert_close(result.magnitude[layer][row].double(), size.mean(0), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(result.peak[layer][row].double(), size.amax(0), rtol=1e-5, atol=1e-7)
    assert result.tokens.tolist() == [96, 96, 96] and result.names == NAMES


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_contribution_is_magnitude_times_the_norm_of_the_down_column(family, domains):
    model = tiny(family)
    result = profile(model, domains, tokens_per_domain=48, length=24)
    for layer, site in enumerate(find_ffn_sites(model)):
        down = model.get_submodule(f"{site.path}.{site.down}").weight.detach()
        columns = down if family == "gpt2" else down.T  # Conv1D stores (in, out)
        norms = torch.stack([column.norm() for column in columns])
        torch.testing.assert_close(result.importance("contribution")[layer], result.magnitude[layer] * norms)
        assert torch.equal(result.importance("magnitude")[layer], result.magnitude[layer])


def test_one_batch_or_many_give_the_same_statistics(domains):
    model = tiny("llama")
    one, *others = [profile(model, domains, length=24, batch_size=size) for size in (100, 1, 3)]
    for other in others:
        torch.testing.assert_close(other.magnitude, one.magnitude, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(other.peak, one.peak, rtol=1e-5, atol=1e-8)
        assert torch.equal(other.tokens, one.tokens)


def test_memory_does_not_grow_with_the_corpus(monkeypatch):
    def live():
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if issubclass(type(o), torch.Tensor))

    counted = []

    def spy(batches, *args, **kwargs):
        for number, batch in enumerate(batches):
            yield batch
            if number in (1, len(batches) - 1):
                counted.append(live())

    monkeypatch.setattr(profile_module, "track", spy)
    profile(tiny("llama"), [domain("a", 1200)], length=24, batch_size=1)
    assert counted[1] <= counted[0], "activations of earlier batches must be gone"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_run_equals_an_unpadded_one(family, side):
    model, length = tiny(family), 12
    texts = [torch.randint(3, 96, (size,)) for size in (12, 9, 5)]
    rows = [F.pad(t, (length - len(t), 0) if side == "left" else (0, length - len(t)), value=PAD) for t in texts]
    rows += [torch.full((length,), PAD)]  # nothing but padding, a batch of its own
    padded = DomainTokens("d", torch.cat(rows).numpy().astype(np.int32), np.zeros(2, np.int32), 1.0)
    result = profile(model, [padded], length=length, batch_size=3, pad_token_id=PAD)
    assert result.tokens.tolist() == [26]
    singles = [
        profile(model, [DomainTokens("d", t.numpy().astype(np.int32), np.zeros(2, np.int32), 1.0)], length=len(t))
        for t in texts
    ]
    for layer in range(2):
        mean = sum(s.magnitude[layer] * len(t) for s, t in zip(singles, texts, strict=True)) / 26
        torch.testing.assert_close(result.magnitude[layer], mean, rtol=1e-4, atol=1e-6)
        peak = torch.stack([s.peak[layer] for s in singles]).amax(0)
        torch.testing.assert_close(result.peak[layer], peak, rtol=1e-4, atol=1e-6)


def test_coverage_names_thin_domains_and_dead_channels(domains):
    model = tiny("llama")  # 48 channels: 8 * 48 tokens are enough
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[[4, 7]] = 0
    coverage = profile(model, [*domains[:2], domain("large", 600)], tokens_per_domain=600, length=24).coverage()
    assert coverage["tokens"] == {"a": 240, "b": 240, "large": 600}
    assert coverage["never_active_channels"] == [0, 2]
    assert [text.split(":")[0] for text in coverage["warnings"]] == ["domain 'a'", "domain 'b'"]


def test_profile_leaves_the_model_as_it_was_and_survives_a_file(domains, tmp_path):
    model = tiny("llama").train()
    before = copy.deepcopy(model.state_dict())
    result = profile(model, domains, tokens_per_domain=48, length=24)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    result.save(tmp_path / "p.safetensors")
    again = Profile.load(tmp_path / "p.safetensors", NAMES)
    for name in ("magnitude", "peak", "down_norm"):
        assert all(map(torch.equal, getattr(again, name), getattr(result, name)))
    assert torch.equal(again.tokens, result.tokens) and again.names == NAMES


def test_domains_with_one_name_are_refused():
    with pytest.raises(MoesaicError, match="same name"):
        profile(tiny("llama"), [domain("a"), domain("a")], length=24)


# -- extract ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=24), st.floats(0.01, 1))
def test_top_channels_is_a_true_top_k_even_with_ties(scores, keep):
    mask = top_channels(torch.tensor([scores, scores[::-1]]).float(), keep)
    count = max(1, round(keep * len(scores)))
    assert mask.sum(1).tolist() == [count, count], "not one less, not every tie"
    for row, chosen in zip((scores, scores[::-1]), mask.tolist(), strict=True):
        inside = [s for s, c in zip(row, chosen, strict=True) if c]
        outside = [s for s, c in zip(row, chosen, strict=True) if not c]
        assert not outside or min(inside) >= max(outside)


def made_profile(magnitudes, norms=None):
    """A profile with given (G, W) magnitudes per layer."""
    magnitudes = [torch.tensor(m, dtype=torch.float32) for m in magnitudes]
    norms = [torch.tensor(n) for n in norms] if norms else [torch.ones(m.shape[1]) for m in magnitudes]
    names = [f"d{i}" for i in range(len(magnitudes[0]))]
    return Profile(names, magnitudes, magnitudes, norms, torch.full((len(names),), 100))


def test_experts_own_their_domains_channels_layer_by_layer():
    masks = extract(made_profile([[[9, 1, 5, 2], [1, 9, 5, 2]], [[1, 2, 3, 4], [4, 3, 2, 1]]]), keep=0.5)
    assert masks[0].int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    assert masks[1].int().tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert ownership(masks) == {"shared": [1, 0], "dropped": [1, 0], "exclusive": [2, 4]}


def test_importance_decides_what_is_kept():
    loud_but_unheard = made_profile([[[9.0, 1.0], [9.0, 1.0]]], norms=[[0.1, 1.0]])
    assert extract(loud_but_unheard, 0.5, "magnitude")[0].int().tolist() == [[1, 0], [1, 0]]
    assert extract(loud_but_unheard, 0.5, "contribution")[0].int().tolist() == [[0, 1], [0, 1]]


def test_keep_may_differ_from_layer_to_layer():
    scores = torch.rand(2, 10, generator=torch.Generator().manual_seed(0)).tolist()
    masks = extract(made_profile([scores] * 3), keep=[0.2, 1.0, 0.55])
    assert [mask.sum(1).tolist() for mask in masks] == [[2, 2], [10, 10], [round(5.5)] * 2]
    assert keep_per_layer(0.3, 2) == [0.3, 0.3]


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, math.nan, math.inf, [0.5, 0], [0.5, 2.0]])
def test_keep_outside_its_range_is_refused(keep):
    with pytest.raises(MoesaicError, match=r"outside \(0, 1\]"):
        keep_per_layer(keep, 2)


def test_keep_of_the_wrong_length_is_refused():
    with pytest.raises(MoesaicError, match="3 entries, but the model has 2 layers"):
        keep_per_layer([0.5, 0.5, 0.5], 2)


def test_the_pruned_control_listens_to_all_domains_alike():
    quiet, loud = [4, 3, 2, 0, 1, 0], [0, 1000, 3000, 4000, 2000, 0]
    # shares: .4 .3 .2 0 .1 0 and 0 .1 .3 .4 .2 0; sums .4 .4 .5 .4 .3 0
    masks = extract_pruned(made_profile([[quiet, loud]]), keep=1 / 6)
    assert masks[0].int().tolist() == [[0, 0, 1, 0, 0, 0]], "the loud domain's favourite is channel 3"
    assert extract_pruned(made_profile([[quiet, loud]] * 2), keep=[0.5, 1.0])[1].all()


# -- clusters ---------------------------------------------------------------------------------------------------------


def mixed(name, seed):
    """A domain whose windows of 12 tokens come in two kinds, by turns: few low ids and few high ids."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(*((3, 6) if i % 2 else (60, 63)), 12, dtype=np.int32) for i in range(24)]
    return DomainTokens(name, np.concatenate(rows[:16]), np.concatenate(rows[16:]), 2.0 + seed)


def test_clusters_follow_the_activations_and_not_the_labels():
    domains = [mixed("x", 0), mixed("y", 1)]
    clusters = cluster_domains(tiny("llama"), domains, 2, length=12, seed=3)
    assert [cluster.name for cluster in clusters] == ["cluster-0", "cluster-1"]
    kinds = [set((np.concatenate([c.train, c.validation]) > 30).tolist()) for c in clusters]
    assert sorted(kinds, key=str) == [{False}, {True}]
    for split in ("train", "validation"):
        given = sorted(np.concatenate([getattr(d, split) for d in domains]).tolist())
        assert sorted(np.concatenate([getattr(c, split) for c in clusters]).tolist()) == given, "no token is lost"
    again = cluster_domains(tiny("llama"), domains, 2, length=12, seed=3)
    assert all(np.array_equal(a.train, b.train) for a, b in zip(clusters, again, strict=True))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_signature_does_not_depend_on_its_batch(family):
    model, windows = tiny(family), torch.randint(3, 96, (7, 12))
    whole = signatures(model, windows, width=16)
    assert whole.shape == (7, 2 * 16)
    torch.testing.assert_close(signatures(model, windows, width=16, batch_size=2), whole, rtol=1e-4, atol=1e-4)
    assert (whole - whole[0]).norm(dim=1)[1:].min() > 0.1, "and differs from text to text"


@pytest.mark.parametrize(
    ("experts", "message"), [(17, "17 experts cannot be filled from 32 sequences"), (1, "1 experts")]
)
def test_clusters_that_cannot_be_filled_are_refused(experts, message):
    with pytest.raises(MoesaicError, match=message):
        cluster_domains(tiny("llama"), [mixed("x", 0), mixed("y", 1)], experts, length=12)


# -- router labels ----------------------------------------------------------------------------------------------------


def equal_masks(experts=3, width=48, layers=2, keep=24, seed=1):
    """Random masks, every expert with `keep` channels, the first eight shared by all."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for _ in range(layers):
        mask = torch.zeros(experts, width, dtype=torch.bool)
        mask[:, :8] = True
        for row in mask:
            row[8 + torch.randperm(width - 8, generator=generator)[: keep - 8]] = True
        mask[:, 8:] &= ~mask[:, 8:].all(0)  # what happens to be common would make experts unequal
        for row in mask:
            free = (~row & (mask.sum(0) < experts - 1)).nonzero()[:, 0]
            row[free[: keep - int(row.sum())]] = True
        masks.append(mask)
    assert all((m.sum(1) == keep).all() and m.all(0).sum() == 8 for m in masks)
    return masks


def reference_losses(sizes_LSW, masks, logits_SE):
    """(S,) loss of every token, one layer and token at a time, as Read-ME's released code computes it.

    NaN where two experts tie for the hard label, which rounding then decides. Two departures, on purpose: |a| for a,
    like the profile, and >= for >, so that n channels count and not n - 1.
    """
    losses = []
    for token, logits in enumerate(logits_SE):
        per_layer = []
        for sizes, mask in zip(sizes_LSW, masks, strict=True):
            unique = [[bool(own[j]) and not bool(mask[:, j].all()) for j in range(mask.shape[1])] for own in mask]
            n = sum(unique[0])
            a = sizes[token].tolist()
            ranked = sorted(a, reverse=True)
            score = [sum(x >= ranked[round(f * n) - 1] for f in (1, 0.8, 0.6, 0.4, 0.2)) / (3 * n) for x in a]
            dist = torch.tensor([sum(s for s, own in zip(score, row, strict=True) if own) for row in unique]) * 10
            hard = F.cross_entropy(logits[None].double(), dist.argmax()[None], label_smoothing=0.5)
            if dist.topk(2).values.diff().abs() < 1e-5:
                hard = hard * math.nan
            soft = -(dist.softmax(0) * logits.double().log_softmax(0)).sum()
            per_layer.append(0.75 * hard + 0.25 * soft)
        losses.append(sum(per_layer) / len(per_layer))
    return torch.stack(losses)


def test_router_loss_equals_the_slow_reference():
    model, masks, ids = tiny("llama"), equal_masks(), torch.randint(3, 96, (2, 9))
    logits = torch.randn(18, 3)
    overlaps = OverlapTeacher(model, masks).overlaps(ids)
    assert overlaps.shape == (2, 18, 3)
    sizes = [[a.abs() for a in activations(model, row)] for row in ids]
    expected = torch.cat([reference_losses(size, masks, logits[9 * i : 9 * i + 9]) for i, size in enumerate(sizes)])
    clear = ~expected.isnan()
    assert clear.float().mean() > 0.6
    losses = router_loss(logits, overlaps, "overlap").double()
    torch.testing.assert_close(losses[clear], expected[clear], rtol=1e-4, atol=1e-5)


def test_graded_membership_falls_in_five_steps():
    from moesaic.refactor.pregate import graded_membership

    size = torch.arange(20.0)[None].flip(1)[:, torch.randperm(20)]
    score = graded_membership(size, 10)[0]
    by_rank = score[size[0].argsort(descending=True)] * 30
    assert by_rank.round().int().tolist() == [5, 5, 4, 4, 3, 3, 2, 2, 1, 1] + [0] * 10


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 6))
def test_the_averaged_target_gives_the_mean_of_the_layers_losses(seed, layers, experts):
    generator = torch.Generator().manual_seed(seed)
    overlaps = 3 * torch.randn(layers, 4, experts, generator=generator)
    logits = torch.randn(4, experts, generator=generator)
    target = overlap_target(overlaps)
    torch.testing.assert_close(target.sum(-1), torch.ones(4))
    mean = torch.zeros(4)
    for layer in overlaps:
        hard = F.cross_entropy(logits, layer.argmax(-1), label_smoothing=0.5, reduction="none")
        mean += (0.75 * hard + 0.25 * F.cross_entropy(logits, layer.softmax(-1), reduction="none")) / layers
    torch.testing.assert_close(router_loss(logits, overlaps, "overlap"), mean, rtol=1e-4, atol=1e-5)


def test_kl_loss_is_the_papers():
    model, masks, ids = tiny("llama"), equal_masks(), torch.randint(3, 96, (1, 9))
    logits = torch.randn(9, 3)
    overlaps = OverlapTeacher(model, masks, "kl").overlaps(ids)
    losses = []
    for token in range(9):
        per_layer = []
        for sizes, mask in zip(activations(model, ids[0]), masks, strict=True):
            own = set(sizes[token].abs().argsort(descending=True)[:24].tolist())
            common = torch.tensor([float(len(own & set(row.nonzero()[:, 0].tolist()))) for row in mask])
            p, q = logits[token].softmax(0), common.softmax(0)
            per_layer.append((p * (p / q).log()).sum())
        losses.append(torch.stack(per_layer).mean())
    torch.testing.assert_close(router_loss(logits, overlaps, "kl"), torch.stack(losses), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["overlap", "kl", "domain"])
def test_padding_does_not_touch_the_router_loss(family, side, kind):
    model = tiny(family)
    masks = equal_masks()
    moe = attach(model, masks, NAMES)
    step = router_step(moe.pregate, OverlapTeacher(model, masks, kind), kind)
    texts = [torch.randint(3, 96, (size,)) for size in (10, 6)]
    pads = [(10 - len(t), 0) if side == "left" else (0, 10 - len(t)) for t in texts]
    batch = {
        "input_ids": torch.stack([F.pad(t, p, value=PAD) for t, p in zip(texts, pads, strict=True)]),
        "attention_mask": torch.stack([F.pad(torch.ones_like(t), p) for t, p in zip(texts, pads, strict=True)]),
        "domain": torch.tensor([0, 2]),
    }
    padded = step(batch)
    singles = [step({"input_ids": t[None], "domain": d[None]}) for t, d in zip(texts, batch["domain"], strict=True)]

    def mean(name):
        return sum(torch.as_tensor(s[name]) * len(t) for s, t in zip(singles, texts, strict=True)) / 16

    torch.testing.assert_close(padded["router"], mean("router"), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(padded["load"]), mean("load"))
    assert padded["domain_accuracy"] == pytest.approx(float(mean("domain_accuracy")))


def test_router_loss_trains_the_router_and_nothing_else():
    model, masks = tiny("llama"), equal_masks()
    moe = attach(model, masks, NAMES)
    step = router_step(moe.pregate, OverlapTeacher(model, masks))
    losses = step({"input_ids": torch.randint(3, 96, (2, 9)), "domain": torch.tensor([0, 1])})
    (losses["router"] + losses["load_balance"]).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in moe.pregate.parameters())
    assert all(p.grad is None for p in [*model.parameters(), *moe.backbone.parameters()])


# -- losses of healing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right", None])
def test_distillation_is_kl_from_the_teacher_over_real_tokens(side):
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.ones(2, 5, dtype=torch.long)
    if side:
        mask[1, slice(0, 3) if side == "left" else slice(2, 5)] = 0
    terms = []
    for b, s in mask.nonzero().tolist():
        p, q = teacher[b, s].double().softmax(0), student[b, s].double().softmax(0)
        terms.append((p * (p.log() - q.log())).sum())
    loss = distillation_loss(student, teacher, mask if side else None)
    assert float(loss) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)


def test_next_token_loss_is_hugging_faces():
    model, ids = tiny("llama"), torch.randint(3, 96, (2, 9))
    with torch.no_grad():
        out = model(ids, labels=ids)
    torch.testing.assert_close(next_token_loss(out.logits, ids), out.loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_next_token_loss_ignores_padding(side):
    ids, logits = torch.randint(3, 9, (1, 6)), torch.randn(1, 6, 9)
    pad = (3, 0) if side == "left" else (0, 3)
    padded_logits = F.pad(logits, (0, 0, *pad), value=5.0)
    loss = next_token_loss(padded_logits, F.pad(ids, pad), F.pad(torch.ones_like(ids), pad))
    torch.testing.assert_close(loss, next_token_loss(logits, ids))


def test_task_and_distillation_loss_give_the_router_no_gradient():
    model = tiny("llama")
    moe = attach(model, equal_masks(), NAMES)
    assert all(p.requires_grad for p in moe.parameters()), "nothing is frozen here, on purpose"
    losses = expert_step(moe, model, distil=True)({"input_ids": torch.randint(3, 96, (2, 9))})
    (losses["lm"] + losses["distillation"]).backward()
    assert all(p.grad is None for p in moe.pregate.parameters())
    assert all(p.grad is not None for p in moe.backbone.parameters())
    assert all(p.grad is None for p in model.parameters()), "the teacher is not trained either"
    assert sum(losses["load"]) == pytest.approx(1)


def test_without_distillation_the_teacher_does_not_run():
    losses = expert_step(attach(tiny("llama"), equal_masks(), NAMES), None, distil=False)(
        {"input_ids": torch.randint(3, 96, (2, 9))}
    )
    assert set(losses) == {"lm", "load"}


# -- stages of healing ------------------------------------------------------------------------------------------------

CONFIG = HealConfig(tokens=2 * 4 * 3 * 12, rounds=2, batch_size=3, length=12, dtype="fp32", seed=5)  # 4 steps a stage


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def rows(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def test_router_stage_leaves_the_backbone_and_expert_stage_the_router(domains, tmp_path):
    dense, masks = tiny("llama"), equal_masks()
    moe = attach(dense, masks, NAMES)
    backbone, router, teacher = snapshot(moe.backbone), snapshot(moe.pregate), snapshot(dense)
    train_router(moe, OverlapTeacher(dense, masks), domains, CONFIG, tmp_path / "router")
    assert changed(moe.backbone, backbone) == set()
    assert changed(moe.pregate, router) == set(router)
    router = snapshot(moe.pregate)
    train_experts(moe, dense, domains, CONFIG, tmp_path / "experts")
    assert changed(moe.pregate, router) == set()
    assert changed(moe.backbone, backbone) == set(backbone)
    assert changed(dense, teacher) == set(), "the teacher stays what it was"


def test_schedule_advances_once_per_optimizer_step(domains, tmp_path):
    dense, masks = tiny("llama"), equal_masks()
    heal(attach(dense, masks, NAMES), dense, masks, domains, CONFIG, tmp_path)
    peaks = {
        "router": (CONFIG.router_steps, 5e-3),
        "experts": (CONFIG.expert_steps, 5e-5 * (4096 / dense.config.hidden_size) ** 0.5),
    }
    assert (CONFIG.router_steps, CONFIG.expert_steps) == (2, 4)
    for index in range(2):
        for stage, (steps, peak) in peaks.items():
            log = rows(tmp_path / f"round-{index}-{stage}")
            assert [row["step"] for row in log] == list(range(1, steps + 1))
            expected = [peak * 0.8**index * 0.5 * (1 + math.cos(math.pi * k / steps)) for k in range(steps)]
            assert [row["lr"] for row in log] == pytest.approx(expected), "cosine to 0 in a round, 0.8 between rounds"
            assert log[-1]["tokens"] == steps * 3 * 12


def test_budget_becomes_steps():
    config = HealConfig(tokens=400_000)
    assert config.expert_steps == 400_000 // (2 * 8 * 256) and config.router_steps == round(config.expert_steps / 2)
    with pytest.raises(MoesaicError, match="less than one step a round"):
        HealConfig(tokens=2 * 8 * 256 - 1)


def test_every_step_logs_losses_loads_entropy_and_rate(domains, tmp_path):
    dense, masks = tiny("llama"), equal_masks()
    config = HealConfig(**{**CONFIG.to_dict(), "load_penalty": 0.5, "rounds": 1, "tokens": 4 * 36})
    heal(attach(dense, masks, NAMES), dense, masks, domains, config, tmp_path)
    for row in rows(tmp_path / "round-0-router"):
        assert row["loss"] == pytest.approx(row["losses"]["router"] + 0.5 * row["losses"]["load_balance"])
        load = np.array(row["metrics"]["load"])
        assert load.sum() == pytest.approx(1) and len(load) == 3
        assert row["metrics"]["entropy"] == pytest.approx(-(load * np.log(np.maximum(load, 1e-9))).sum(), abs=1e-5)
    for row in rows(tmp_path / "round-0-experts"):
        assert row["loss"] == pytest.approx(row["losses"]["lm"] + row["losses"]["distillation"])
        assert sum(row["metrics"]["load"]) == pytest.approx(1) and row["lr"] > 0


def test_the_control_is_healed_on_the_same_batches_without_a_router(domains, tmp_path):
    dense, masks = tiny("llama"), equal_masks()
    heal(attach(dense, masks, NAMES), dense, masks, domains, CONFIG, tmp_path / "moe")
    single = [mask[:1] for mask in masks]
    control = heal(attach(dense, single, ["pruned"]), dense, single, domains, CONFIG, tmp_path / "control")
    assert control.pregate is None
    assert sorted(path.name for path in (tmp_path / "control").iterdir()) == ["round-0-experts", "round-1-experts"]
    for name in ("round-0-experts", "round-1-experts"):
        (one,), (two,) = ((tmp_path / run / name).glob("state-*/state.json") for run in ("moe", "control"))
        one, two = json.loads(one.read_text())["settings"], json.loads(two.read_text())["settings"]
        assert {key for key in one if one[key] != two[key]} == {"parameters"}, "same data, seed, steps, rates"


def test_a_finished_healing_is_loaded_and_not_repeated(domains, tmp_path, monkeypatch):
    dense, masks = tiny("llama"), equal_masks()
    first = heal(attach(dense, masks, NAMES), dense, masks, domains, CONFIG, tmp_path)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: pytest.fail("trained again"))
    again = heal(attach(dense, masks, NAMES), dense, masks, domains, CONFIG, tmp_path)
    assert changed(again, snapshot(first)) == set()


def test_untied_experts_heal_apart(domains, tmp_path):
    dense, masks = tiny("llama"), equal_masks()
    config = HealConfig(**{**CONFIG.to_dict(), "rounds": 1})
    moe = heal(attach(dense, masks, NAMES, untied=True), dense, masks, domains, config, tmp_path)
    blocks = moe.ffns()[0]
    shared = [blocks.up[start] for expert in range(3) for start, _ in blocks.layout.runs(expert)[:1]]
    assert blocks.layout.width == 3 * 24 and not torch.equal(shared[0], shared[1]), "channel 0, owned by all three"
    tied = heal(attach(dense, masks, NAMES), dense, masks, domains, config, tmp_path / "tied")
    assert tied.ffns()[0].layout.width < 3 * 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batches of 0"),
        ({"length": 1}, "x 1 tokens"),
        ({"router_loss": "mse"}, "router_loss = 'mse'"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(MoesaicError, match=message):
        HealConfig(**changes)
