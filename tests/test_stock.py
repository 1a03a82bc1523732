"""Stock mixtures: recording changes nothing, replay is bit-exact, a foreign router computes its own plan."""

from collections.abc import Iterator

import pytest
import torch
import transformers as t
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from families import COMMON
from moesaic.errors import MoesaicError
from moesaic.models.routed import RoutedForCausalLM, attach_router
from moesaic.models.stock import (
    find_stock_gates,
    mixture_layers,
    override_plans,
    plan_of,
    record_plans,
    replace_gates,
    replay_plans,
    stock_slots,
)
from moesaic.routing.contract import EMPTY, RoutePlan
from moesaic.routing.family import build_router
from moesaic.routing.predicted_plan import PredictedPlanRouter
from moesaic.routing.recurrent import RecurrentRouter
from moesaic.routing.top_k import TopKRouter

E, K, D = 4, 2, 32
SHAPE = {**COMMON, "vocab_size": 64}
DEEPSEEK = dict(
    moe_intermediate_size=16,
    n_routed_experts=E,
    n_shared_experts=1,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    num_key_value_heads=4,
)
FAMILIES = {  # config class, its own settings, gates
    "mixtral": ("MixtralConfig", dict(num_local_experts=E), 2),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        dict(num_experts=E, moe_intermediate_size=16, shared_expert_intermediate_size=16),
        2,
    ),
    "qwen3-moe": ("Qwen3MoeConfig", dict(num_experts=E, moe_intermediate_size=16, head_dim=8), 2),
    "olmoe": ("OlmoeConfig", dict(num_experts=E), 2),
    "deepseek-v2": ("DeepseekV2Config", dict(DEEPSEEK, topk_method="greedy", routed_scaling_factor=1.5), 1),
    "deepseek-v3": ("DeepseekV3Config", dict(DEEPSEEK, n_group=1, topk_group=1), 1),
    "granite-moe": ("GraniteMoeConfig", dict(num_local_experts=E), 2),
    "minimax-m2": ("MiniMaxM2Config", dict(num_local_experts=E, head_dim=8, rotary_dim=8), 2),
    "gpt-oss": ("GptOssConfig", dict(num_local_experts=E, head_dim=8), 2),
}


def tiny(family: str, **changes: object) -> PreTrainedModel:
    """A random mixture whose experts and gates all matter."""
    torch.manual_seed(0)
    name, options, _ = FAMILIES[family]
    config = getattr(t, name)(**{**SHAPE, **options, "num_experts_per_tok": K, **changes})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def routed() -> RoutedForCausalLM:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(t.LlamaConfig(**SHAPE)).eval()
    return attach_router(dense, {"name": "recurrent", "state_width": 8}, experts=E, noise=0.5)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_changes_nothing_and_replay_is_exact(family: str, ids: Tensor) -> None:
    model = tiny(family)
    layers = FAMILIES[family][2]
    assert len(find_stock_gates(model)) == mixture_layers(model) == layers
    before = model(ids).logits
    with record_plans(model) as log:
        assert torch.equal(model(ids).logits, before)
        other = model(ids.flip(1)).logits
    assert len(log.forwards) == 2 and [len(plans) for plans in log.forwards] == [layers, layers]
    assert [plan.index.shape for plan in log.last] == [(18, K)] * layers
    for plan in log.last:
        plan.check(E)
        assert plan.logits is not None and plan.logits.shape == (18, E)
    with replay_plans(model, log.forwards[0]):
        assert torch.equal(model(ids).logits, before)
        with record_plans(model) as again:
            changed = model(ids.flip(1)).logits
        assert torch.equal(again.last[-1].index, log.forwards[0][-1].index)
    assert not torch.allclose(changed, other, atol=1e-3), "another text's plans must change the output"
    assert torch.equal(model(ids).logits, before), "nothing stays behind"


def test_one_interface_for_routed_models(ids: Tensor) -> None:
    model = routed()
    before = model(ids).logits
    with record_plans(model) as log:
        assert torch.equal(model(ids).logits, before)
        other = model(ids.flip(1)).logits
    assert mixture_layers(model) == len(log.last) == 2
    with replay_plans(model, log.forwards[0]):
        assert torch.equal(model(ids).logits, before)
        assert not torch.allclose(model(ids.flip(1)).logits, other, atol=1e-5)
    assert torch.equal(model(ids).logits, before)


def test_recorded_plans_are_what_the_experts_got(ids: Tensor) -> None:
    """Mixtral's plan from its logits: softmax, the two largest, renormalised."""
    with record_plans(model := tiny("mixtral")) as log:
        model(ids)
    for plan in log.last:
        assert plan.logits is not None
        top, index = plan.logits.softmax(-1).topk(K)
        assert torch.equal(index.int(), plan.index)
        torch.testing.assert_close(top / top.sum(-1, keepdim=True), plan.weight)


def test_log_joins_forwards_and_refuses_to_be_empty(ids: Tensor) -> None:
    model = tiny("mixtral")
    with record_plans(model) as log:
        with pytest.raises(MoesaicError, match="no forward"):
            _ = log.last
        model(ids)
        model.model(ids[:, :4])  # the decoder alone is a forward too
    joined = log.joined()
    assert len(joined) == 2 and len(joined[0].index) == 18 + 8
    assert torch.equal(joined[1].weight[18:], log.last[1].weight)


def test_recomputed_layers_are_not_recorded_twice(ids: Tensor) -> None:
    model = tiny("mixtral").train()
    model.activation_checkpointing_enable()
    with torch.enable_grad(), record_plans(model) as log:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(log.forwards) == 1 and len(log.last) == 2
    assert not any(plan.weight.requires_grad for plan in log.last)


def test_bf16_weights_replay_exactly(ids: Tensor) -> None:
    model = tiny("granite-moe").to(torch.bfloat16)  # its gate answers in the model's dtype
    before = model(ids).logits
    with record_plans(model) as log:
        model(ids)
    assert log.last[0].weight.dtype == torch.float32
    with replay_plans(model, log.last):
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("make", [lambda: tiny("mixtral"), routed], ids=["stock", "routed"])
def test_replay_refuses_other_shapes(make, ids: Tensor) -> None:
    model = make()
    with record_plans(model) as log:
        model(ids)
    with (
        pytest.raises(MoesaicError, match="1 recorded plans for the 2 mixture layers"),
        replay_plans(model, log.last[:1]),
    ):
        pass
    with replay_plans(model, log.last), pytest.raises(MoesaicError, match="for 18 tokens, but 10"):
        model(ids[:, :5])
    before = model(ids).logits
    with pytest.raises(RuntimeError, match="broke"), override_plans(model, _broken):
        model(ids)
    assert torch.equal(model(ids).logits, before), "restored after an error too"


def _broken(layer: int, plan: RoutePlan) -> RoutePlan:
    raise RuntimeError("broke")


def test_what_is_no_mixture_is_refused(ids: Tensor) -> None:
    dense = AutoModelForCausalLM.from_config(t.LlamaConfig(**SHAPE))
    with pytest.raises(MoesaicError, match="no mixture of experts"):
        find_stock_gates(dense)
    llama4 = t.Llama4TextConfig(**SHAPE, num_local_experts=E, num_experts_per_tok=1, intermediate_size_mlp=48)
    model = AutoModelForCausalLM.from_config(llama4)
    with record_plans(model), pytest.raises(MoesaicError, match="another contract"):
        model(ids)


def test_a_gate_with_swapped_answers_is_refused() -> None:
    gate = find_stock_gates(tiny("mixtral"))[0]
    logits, weights, indices = gate.module(torch.randn(3, D))
    assert plan_of((logits, weights, indices), gate).index.shape == (3, K)
    for wrong in [(indices, weights, logits), (logits, indices, weights), (logits, weights), logits]:
        with pytest.raises(MoesaicError, match="expected \\(logits"):
            plan_of(wrong, gate)


# -- replaced gates ---------------------------------------------------------------------------------------------------
def test_the_same_router_gives_the_same_logits(ids: Tensor) -> None:
    model = tiny("mixtral")
    before = model(ids).logits
    gates = find_stock_gates(model)
    router = TopKRouter(D, E, 2, k=K)
    for head, gate in zip(router.scorer.heads, gates, strict=True):
        head.weight.copy_(gate.module.weight)
    names = set(model.state_dict())
    with replace_gates(model, router) as routing:
        torch.testing.assert_close(model(ids).logits, before)
        assert [plan.index.shape for plan in routing.plans()] == [(18, K)] * 2
        assert any(p is router.scorer.heads[0].weight for p in model.parameters()), "trained with the model"
        with record_plans(model) as log:
            model(ids)
        assert torch.equal(log.last[1].index, routing.plans()[1].index)
        with pytest.raises(MoesaicError, match="replaced already"):
            replace_gates(model, router)
    assert torch.equal(model(ids).logits, before) and set(model.state_dict()) == names
    routing.restore()


def test_empty_slots_add_nothing_and_index_minus_one_would_corrupt(ids: Tensor) -> None:
    """Top-p leaves slots empty: the block's output is the sum over used slots, whatever kernel runs the experts."""
    model = tiny("mixtral")
    router = build_router("top-p", D, E, 2, p=0.5)
    for head in router.scorer.heads:
        torch.nn.init.normal_(head.weight, std=1.0)
    block = model.model.layers[0].mlp
    seen: dict[str, Tensor] = {}
    block.register_forward_hook(lambda _, args, out: seen.update(x=args[0].flatten(0, 1), y=out.flatten(0, 1)))
    with replace_gates(model, router) as routing:
        model(ids)
    plan = routing.plans()[0]
    assert 0 < int((~plan.used).sum()) < plan.used.numel()
    want = torch.zeros_like(seen["y"])
    for n in range(len(want)):
        for j in range(plan.index.shape[1]):
            if plan.index[n, j] != EMPTY:
                expert = plan.index[n, j].view(1, 1).long()
                want[n] += block.experts(seen["x"][n : n + 1], expert, torch.ones(1, 1))[0] * plan.weight[n, j]
    torch.testing.assert_close(seen["y"], want, atol=1e-5, rtol=1e-4)
    raw = block.experts(seen["x"], plan.index.long(), plan.weight)
    assert not torch.allclose(raw, want, atol=1e-2), "transformers now handles -1: the mapping is no longer needed"
    weights, indices = stock_slots(plan)
    assert int(indices.min()) >= 0 and bool((weights[~plan.used] == 0).all())


def test_depth_state_and_inputs_reach_the_router(ids: Tensor) -> None:
    """A recurrent router under stock gates equals its own equations over the layers, fresh in every forward."""
    model = tiny("qwen2-moe")
    router = RecurrentRouter(D, E, 2, state_width=8, k=K)
    hidden: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, out: hidden.append(args[0].flatten(0, 1)))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with replace_gates(model, router) as routing:
        model(ids)
        hidden.clear()
        model(input_ids=ids, attention_mask=mask)
    scorer, state = router.scorer, None
    for layer, plan in enumerate(routing.plans()):
        state = scorer.cell(scorer.project[layer](hidden[layer]), state)
        torch.testing.assert_close(plan.logits, scorer.heads[layer](state))
    assert routing.last is not None
    inp = routing.last.inp
    assert torch.equal(inp.ids, ids.flatten()) and torch.equal(inp.valid, mask.flatten().bool())
    assert inp.pos[:9].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5] and inp.pos[9:].tolist() == list(range(9))


def test_gradients_reach_the_router(ids: Tensor) -> None:
    model, router = tiny("olmoe"), TopKRouter(D, E, 2, k=K)
    with torch.enable_grad(), replace_gates(model, router) as routing:
        model(ids, labels=ids).loss.backward()
        assert all(head.weight.grad is not None and bool(head.weight.grad.any()) for head in router.scorer.heads)
        assert routing.plans()[0].weight.requires_grad
        model.train()
        model.activation_checkpointing_enable()
        with pytest.raises(MoesaicError, match="gradient checkpointing"):
            model(ids)


def test_generation_decodes_under_the_router(ids: Tensor) -> None:
    model, router = tiny("mixtral"), TopKRouter(D, E, 2, k=K)
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    with replace_gates(model, router) as routing:
        with_cache = model.generate(ids, **options)
        assert routing.last is not None and routing.last.inp.phase == "decode" and len(routing.last.inp.ids) == 2
        assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))


def test_a_pregate_decodes_with_keys_in_the_models_cache(ids: Tensor) -> None:
    model = tiny("mixtral")
    router = PredictedPlanRouter(
        64, E, 2, first_slot=2, trunk={"width": 16, "mlp_width": 16, "heads": 2, "layers": 1}
    ).eval()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with replace_gates(model, router):
        whole = model.generate(ids, use_cache=False, **options)
        assert torch.equal(whole, model.generate(ids, past_key_values=DynamicCache(), **options))
        with pytest.raises(MoesaicError, match="needs the keys of the text so far"):
            model.generate(ids, **options)  # a cache built from the config has no layer for the pre-gate


def test_refusals(ids: Tensor) -> None:
    model = tiny("mixtral")
    with pytest.raises(MoesaicError, match=r"chooses among 3 experts, but model\.layers\.0\.mlp\.gate has 4"):
        replace_gates(model, TopKRouter(D, 3, 2))
    with replace_gates(model, TopKRouter(D, E, 2)) as routing:
        with pytest.raises(MoesaicError, match="no forward has run"):
            routing.plans()
        with pytest.raises(MoesaicError, match="output_router_logits"):
            model(ids, output_router_logits=True)
        with pytest.raises(MoesaicError, match="not inputs_embeds"):
            model(inputs_embeds=torch.randn(1, 3, D))
        with pytest.raises(MoesaicError, match="inside the model's own forward"):
            routing.gates[0].module(torch.randn(3, D))
    plan = RoutePlan(torch.zeros(3, 1).int(), torch.ones(3, 1), run=torch.tensor([True, False, True]))
    with pytest.raises(MoesaicError, match="skips blocks"):
        stock_slots(plan)
