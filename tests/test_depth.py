"""Mixture of depths: skipped tokens are untouched and unseen, the cache keeps no keys of theirs, nothing leaks."""

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from families import FAMILIES, tiny
from moesaic.analyze.auxiliary import fit_auxiliary, record
from moesaic.errors import MoesaicError
from moesaic.models.depth import attach_depth, ranks
from moesaic.models.routed import attach_router
from moesaic.routing.contract import RouteInput
from moesaic.routing.depth import AuxiliaryDepthRouter, DepthRouter


def make(family="llama", auxiliary=False, **options):
    model = attach_depth(tiny(family), **{"capacity": 0.5, "every": 1, **options})
    for head in model.router.scorer.heads:
        torch.nn.init.normal_(head.weight, std=0.5)
    if auxiliary:
        router = AuxiliaryDepthRouter(model.router, 32, len(model.config.depth_layers))
        for head in router.scorer.second:
            torch.nn.init.normal_(head.weight, std=3.0)
        model.set_router(router)
    return model.eval()


def prompt(batch=3, length=13):
    return torch.randint(3, 96, (batch, length))


# -- the router -------------------------------------------------------------------------------------------------------


def test_the_best_share_of_each_sequence_runs():
    router = DepthRouter(8, 2, capacity=0.25)
    inp = RouteInput.of(torch.zeros(3, 8, dtype=torch.long), torch.randn(3, 8, 8), layer=1)
    inp.valid = torch.arange(24) % 8 < torch.tensor([8, 4, 1]).repeat_interleave(8)
    plan, _ = router.plan(inp)
    plan.check(1)
    scores = router.score(inp)[0][:, 0].sigmoid()
    expected = torch.zeros(24, dtype=torch.bool)
    expected[scores[:8].topk(2).indices] = True
    expected[8 + scores[8:12].argmax()] = True
    assert torch.equal(plan.run, expected)
    torch.testing.assert_close(plan.weight[:, 0], scores * expected)
    batch, _ = DepthRouter(8, 2, capacity=0.25, scope="batch").plan(inp)
    assert int(batch.run.sum()) == round(13 / 4)


def test_decoding_with_the_main_router_is_refused_and_names_the_auxiliary():
    model = make()
    ids = prompt()
    with pytest.raises(MoesaicError, match="AuxiliaryDepthRouter"):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with pytest.raises(MoesaicError, match="capacity"):
        DepthRouter(8, 1, capacity=0.0)


def test_the_auxiliary_router_does_not_look_at_other_tokens():
    main = DepthRouter(8, 1)
    router, hidden = AuxiliaryDepthRouter(main, 8, 1), torch.randn(1, 6, 8)
    torch.nn.init.normal_(router.scorer.second[0].weight, std=5.0)
    ids = torch.zeros(1, 6, dtype=torch.long)
    whole = router.plan(RouteInput.of(ids, hidden))[0]
    assert 0 < int(whole.run.sum()) < 6
    for n in range(6):
        alone = router.plan(RouteInput.of(ids[:, :1], hidden[:, n : n + 1], phase="decode"))[0]
        assert bool(alone.run[0]) == bool(whole.run[n])
        torch.testing.assert_close(alone.weight[0], whole.weight[n])


# -- the layers -------------------------------------------------------------------------------------------------------


def test_ranks_pads_ragged_rows():
    run = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    index, real = ranks(run)
    assert index.shape == (3, 3)
    assert [row[keep].tolist() for row, keep in zip(index, real, strict=True)] == [[0, 2, 3], [1], []]
    assert ranks(run[2:])[0].shape == (1, 1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_when_all_run_with_weight_one_it_is_the_dense_model(family):
    dense, ids = tiny(family), prompt()
    model = attach_depth(dense, capacity=1.0, every=1, bias=40.0)
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_layer_is_the_block_on_its_tokens_alone():
    """Against a slow twin: per sequence, the block runs on the gathered tokens at their own positions."""
    model, ids = make(start=1), prompt()
    block, inner = model.backbone.model.layers[1].block, {}
    model.backbone.model.layers[1].register_forward_hook(
        lambda _, args, kwargs, out: inner.update(x=args[0], y=out, rope=kwargs["position_embeddings"]),
        with_kwargs=True,
    )
    model(ids, use_cache=False)
    plan = model.plans()[0]
    run, weight = plan.run.view(ids.shape), plan.weight.view(ids.shape)
    assert set(run.sum(1).tolist()) == {6}
    for b in range(len(ids)):
        rows = run[b].nonzero().flatten()
        causal = torch.ones(len(rows), len(rows)).tril().bool()[None, None]
        rope = tuple(part[0, rows][None] for part in inner["rope"])
        x = inner["x"][b, rows][None]
        out = block(x, attention_mask=causal, position_embeddings=rope)
        torch.testing.assert_close(inner["y"][b, rows][None], x + weight[b, rows][None, :, None] * (out - x))
        assert torch.equal(inner["y"][b, ~run[b]], inner["x"][b, ~run[b]])


def test_the_gradient_reaches_the_router():
    model = make().train()
    ids = prompt()
    model(ids, labels=ids).loss.backward()
    assert all(head.weight.grad.abs().max() > 1e-4 for head in model.router.scorer.heads)


@torch.no_grad()
def test_gradient_checkpointing_and_eager_change_nothing():
    ids = prompt()
    model = make()
    dense = tiny("llama")
    dense.set_attn_implementation("eager")
    eager = attach_depth(dense, capacity=0.5, every=1)
    eager.load_state_dict(model.state_dict())
    torch.testing.assert_close(eager(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    model.train()
    model.backbone.config.attention_dropout = 0.0
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids).loss.backward()
    for got, want in zip((p.grad for p in model.parameters()), expected, strict=True):
        torch.testing.assert_close(got, want)


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_incremental_decoding_is_the_full_forward(family):
    model, ids = make(family, auxiliary=True), prompt()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    full = model(ids, attention_mask=mask, use_cache=False).logits
    runs = [plan.run.view(ids.shape) for plan in model.plans()]
    assert all(0.1 < run.float().mean() < 0.9 for run in runs)
    out = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    parts = [out.logits]
    for start, stop in ((6, 7), (7, 10), (10, 11), (11, 12), (12, 13)):
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], full[mask.bool()], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_skipped_tokens_leave_no_keys_in_the_cache():
    model, ids = make(auxiliary=True), prompt(1, 20)
    out = model(ids[:, :8], use_cache=True)
    for n in range(8, 20):
        out = model(ids[:, n : n + 1], past_key_values=out.past_key_values, use_cache=True)
    cache = out.past_key_values
    model(ids, use_cache=False)
    for layer, plan in zip(cache.layers, model.plans(), strict=True):
        assert layer.keys.shape[2] == int(plan.run.sum()) < 20
        assert layer.column[0].tolist() == plan.run.nonzero().flatten().tolist()
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
@torch.no_grad()
def test_generate_with_and_without_a_cache_agree(family, beams):
    model, ids = make(family, auxiliary=True), prompt()
    options = dict(max_new_tokens=8, num_beams=beams, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_only_the_main_router_lets_the_future_in():
    ids = prompt(4, 30)
    later = ids.clone()
    later[:, -1] = 3 + (ids[:, -1] + 40) % 90
    leak = {}
    for auxiliary in (False, True):
        model = make(auxiliary=auxiliary)
        leak[auxiliary] = float((model(later).logits - model(ids).logits)[:, :-1].abs().max())
    assert leak[False] > 1e-2  # so the probe can see a leak
    assert leak[True] < 1e-5  # another number of tokens, another order of sums


def test_what_a_depth_model_cannot_do_is_said():
    model, ids = make(auxiliary=True), prompt()
    with pytest.raises(MoesaicError, match="output_hidden_states"):
        model(ids, output_hidden_states=True)
    with pytest.raises(MoesaicError, match="StaticCache"):
        model(ids, past_key_values=StaticCache(model.config.base_config, max_cache_len=32))
    with pytest.raises(MoesaicError, match="only inside its own forward"):
        model.backbone(ids)
    with pytest.raises(MoesaicError, match="filled by another model"):
        model(ids[:, -1:], past_key_values=tiny("llama")(ids, use_cache=True).past_key_values)
    with pytest.raises(MoesaicError, match="no layer to wrap"):
        attach_depth(tiny("llama"), start=2)


@torch.no_grad()
def test_round_trip(tmp_path):
    for auxiliary in (False, True):
        model, ids = make(auxiliary=auxiliary), prompt()
        model.save_pretrained(tmp_path / str(auxiliary))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(auxiliary))
        assert torch.equal(again(ids).logits, model(ids).logits)


# -- auxiliary routers ------------------------------------------------------------------------------------------------


def test_fitting_an_auxiliary_router_makes_a_depth_model_decode():
    model, batches = make(), [prompt(8, 24) for _ in range(3)]
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    poor = fit_auxiliary(make(), batches, steps=1)
    report = fit_auxiliary(model, batches, steps=150)
    assert isinstance(model.router, AuxiliaryDepthRouter)
    assert min(report.precision) > 0.7 and min(report.recall) > 0.7
    assert sum(report.recall) > sum(poor.recall) + 0.1
    assert report.without[0] == pytest.approx(0.5) and report.without[1] == pytest.approx(0.5, abs=0.05)
    assert all(torch.equal(before[name], value) for name, value in model.backbone.state_dict().items())
    assert model.generate(batches[0][:2], max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= 27


def test_fitting_an_auxiliary_router_of_modalities():
    torch.manual_seed(0)
    model = attach_router(tiny("llama"), {"name": "modality", "groups": [2, 2]}, experts=4)
    model.modality = lambda ids: (ids > 48).long()
    batches, held_out = [prompt(8, 24) for _ in range(3)], [prompt(8, 24)]
    seen = record(model, held_out[0])
    none = sum(float((~plan.used.any(1)).float().mean()) for _, plan in seen) / 2
    report = fit_auxiliary(model, batches, steps=150, held_out=held_out)
    assert report.without[0] == pytest.approx(none) and none > 0
    assert min(report.recall) > 0.6  # a choice at random would hit one in two
    assert report.selected[1] == pytest.approx(report.selected[0], abs=0.15)
    model.generate(held_out[0][:2], max_new_tokens=3, do_sample=False, pad_token_id=0)
    with pytest.raises(MoesaicError, match="needs no auxiliary router"):
        fit_auxiliary(model, batches, steps=1)
    with pytest.raises(MoesaicError, match="no batches"):
        fit_auxiliary(model, [])
