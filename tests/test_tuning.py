"""Backends and the table that chooses among them: equal results, kept limits, a cache file that survives anything."""

import copy
import json
import multiprocessing
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.test_channel_blocks import MASK, by_the_equation, make, masks
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import moesaic
from moesaic.cli.main import app
from moesaic.errors import MoesaicError
from moesaic.experts import bank_backends, measure, packed, tuning
from moesaic.experts.backends import BACKENDS, choose
from moesaic.experts.bank import FFNBank
from moesaic.experts.bank_backends import BANK_BACKENDS
from moesaic.experts.channel_blocks import ChannelBlocks, TokenGroups, layout_from_masks
from moesaic.experts.copies import LEAST_LIMIT, Copies
from moesaic.models.tuning import limit_copies
from moesaic.routing.policies import TopK

ON_CPU = [name for name in BACKENDS if "triton" not in name]
ORDERS = st.permutations(ON_CPU)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of this test's own, empty."""
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    monkeypatch.setenv("MOESAIC_TUNE", "on")
    tuning.reload()
    yield tuning
    tuning.reload()


def prefer(table, shape, *names):
    """Let the table name these backends in this order, whatever the tokens."""
    row = {name: 10.0**place for place, name in enumerate(names, start=1)}
    table.save(shape, {(tokens, used): row for tokens in measure.TOKENS for used in (1, 2, 4)})


@torch.no_grad()
def test_rows_of_experts_are_few_numbers_in_bfloat16(monkeypatch):
    """oneDNN compiles a kernel for every number of rows: of experts these change with every prompt."""
    blocks, _ = make(MASK)
    blocks, seen, plain = blocks.bfloat16(), set(), ChannelBlocks.activate
    monkeypatch.setattr(ChannelBlocks, "activate", lambda own, x, *rest: seen.add(len(x)) or plain(own, x, *rest))
    for tokens in range(40, 60):
        BACKENDS["grouped"].path(blocks, torch.randn(tokens, 7).bfloat16(), TokenGroups(torch.arange(tokens) % 4))
    assert seen == {12, 16}


# -- every backend is right -----------------------------------------------------------------------------------------


@given(masks(), st.integers(1, 40), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(ON_CPU))
@torch.no_grad()
def test_every_backend_equals_the_equation(mask, tokens, gated, bias, untied, name):
    blocks, weights = make(mask, gated=gated, bias=bias, untied=untied)
    if not BACKENDS[name].suits(blocks):
        assert untied or blocks.layout.is_whole or not packed.available(torch.float32)
        return
    x, expert = torch.randn(tokens, 7), torch.randint(len(mask), (tokens,))
    y = BACKENDS[name].path(blocks, x, TokenGroups(expert))
    torch.testing.assert_close(y, by_the_equation(weights, mask, x, expert), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ON_CPU)
@torch.no_grad()
def test_backends_agree_in_bfloat16(name):
    mask = torch.rand(4, 64, generator=torch.Generator().manual_seed(3)) < 0.5
    blocks, _ = make(mask, hidden=32)
    x, expert = torch.randn(21, 32), torch.randint(4, (21,))
    expected = BACKENDS["masked"].path(blocks, x, TokenGroups(expert))
    y = BACKENDS[name].path(blocks.bfloat16(), x.bfloat16(), TokenGroups(expert))
    assert (y.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("name", BANK_BACKENDS)
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, False), (True, True), (False, True)])
@torch.no_grad()
def test_every_bank_backend_equals_the_loop(name, gated, bias):
    bank = FFNBank(5, 16, 24, gated=gated, up_bias=bias, down_bias=bias)
    for parameter in bank.parameters():
        nn.init.normal_(parameter)
    if not BANK_BACKENDS[name].suits(bank):
        assert name == "grouped_mm" and bias
        return
    rows, counts = torch.randn(20, 16), [3, 0, 11, 6, 0]
    expected = bank_backends.loop(bank, rows, counts)
    torch.testing.assert_close(BANK_BACKENDS[name].path(bank, rows, counts), expected, rtol=1e-3, atol=1e-3)


# -- the choice -----------------------------------------------------------------------------------------------------


@given(ORDERS, st.integers(1, 900), st.integers(0, 2**20))
@torch.no_grad()
def test_the_first_of_the_table_that_fits_is_chosen(names, tokens, limit):
    blocks, _ = make(MASK)
    blocks.copies.limit = limit
    groups = TokenGroups(torch.randint(4, (tokens,)))
    found = tuning.Shape({(cell, used): dict(zip(names, (1.0, 2.0, 4.0, 8.0, 16.0), strict=True))
                          for cell in measure.TOKENS for used in (1, 2, 4)})  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "empty", lambda: False)
        patch.setattr(tuning, "ranking", lambda shape, tokens, used: found.ranking(tokens, used))
        chosen = choose(blocks, groups)
        affordable = [n for n in names if BACKENDS[n].extra_bytes(blocks, groups.used) <= limit]
        assert chosen is BACKENDS[affordable[0]].path
        chosen(blocks, torch.randn(tokens, 7), groups)
    assert blocks.copies.bytes == BACKENDS[affordable[0]].extra_bytes(blocks, groups.used) <= limit


@torch.no_grad()
def test_copies_of_one_kind_leave_no_room_for_another(table):
    blocks, _ = make(MASK)
    blocks.copies.limit = blocks.copy_bytes(None)
    prefer(table, tuning.blocks_shape(blocks), "prepacked", "masked")
    alone, all_experts = torch.zeros(8, dtype=torch.long), torch.arange(4)
    assert choose(blocks, TokenGroups(alone)) is BACKENDS["prepacked"].path
    blocks(torch.randn(8, 7), alone)
    assert choose(blocks, TokenGroups(all_experts)) is BACKENDS["masked"].path
    assert choose(blocks, TokenGroups(alone)) is BACKENDS["prepacked"].path, "what is there is used"


@torch.no_grad()
def test_copies_of_experts_leave_room_for_all_channels_where_that_is_best_for_mixtures(table):
    blocks, _ = make(MASK)
    whole, expert = blocks.copy_bytes(None), blocks.copy_bytes(0)
    shape = tuning.blocks_shape(blocks)
    alone, mixed = {"prepacked": 1.0, "masked": 3.0}, {"masked_prepacked": 1.0, "masked": 3.0}
    cells = {(tokens, 1): alone for tokens in measure.TOKENS} | {(tokens, 4): mixed for tokens in measure.TOKENS}
    table.save(shape, cells)
    one = TokenGroups(torch.zeros(2, dtype=torch.long))
    for limit, name in ((expert, "prepacked"), (whole, "masked"), (whole + expert, "prepacked")):
        blocks.copies.limit = limit
        assert choose(blocks, one) is BACKENDS[name].path


def test_training_ignores_the_table(table):
    blocks, _ = make(MASK)
    prefer(table, tuning.blocks_shape(blocks), "prepacked")
    y = blocks(torch.randn(5, 7), torch.arange(5) % 4)
    assert y.requires_grad and not len(blocks.copies)


@torch.no_grad()
def test_what_is_compiled_needs_no_copies(table, monkeypatch):
    """torch.compile knows no weights in oneDNN's own order: it fails on them."""
    blocks, _ = make(MASK)
    prefer(table, tuning.blocks_shape(blocks), "masked_prepacked", "prepacked")
    groups = TokenGroups(torch.tensor([0, 1]))
    assert choose(blocks, groups) is BACKENDS["masked_prepacked"].path
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose(blocks, groups) is BACKENDS["masked"].path


@torch.no_grad()
def test_off_means_constants(table, monkeypatch):
    blocks, _ = make(MASK)
    prefer(table, tuning.blocks_shape(blocks), "masked")
    groups = TokenGroups(torch.zeros(2, dtype=torch.long))
    assert choose(blocks, groups) is BACKENDS["masked"].path
    monkeypatch.setenv("MOESAIC_TUNE", "off")
    tuning.reload()
    name = "prepacked" if packed.available(torch.float32) else "packed"
    assert choose(blocks, groups) is BACKENDS[name].path


@pytest.mark.skipif(not packed.available(torch.bfloat16), reason="needs oneDNN's products in bfloat16")
@torch.no_grad()
def test_constants_in_bfloat16_leave_room_for_all_channels(table):
    """One copy of all channels serves every mixture, so copies of experts are made only beside it."""
    blocks, _ = make(MASK)
    blocks = blocks.bfloat16()
    one, all_experts = TokenGroups(torch.zeros(2, dtype=torch.long)), TokenGroups(torch.arange(8) % 4)
    whole, expert = blocks.copy_bytes(None), blocks.copy_bytes(0)
    rooms = {
        0: ("grouped", "masked"),
        expert: ("prepacked", "masked"),
        whole: ("masked_prepacked", "masked_prepacked"),
        whole + expert: ("prepacked", "masked_prepacked"),
    }
    for limit, names in rooms.items():
        blocks.copies.clear()
        blocks.copies.limit = limit
        for groups, name in zip((one, all_experts), names, strict=True):
            assert choose(blocks, groups) is BACKENDS[name].path
            blocks(torch.randn(len(groups.expert_N), 7).bfloat16(), groups)
        assert blocks.copies.bytes <= limit
    blocks.copies.clear()
    many = TokenGroups(torch.arange(600) % 4)
    assert choose(blocks, many) is BACKENDS["grouped"].path, "experts one by one, copies of all do not fit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_no_tokens_are_no_tokens(table, dtype):
    blocks, _ = make(MASK)
    assert blocks.to(dtype)(torch.empty(0, 7, dtype=dtype), torch.empty(0, dtype=torch.long)).shape == (0, 7)


@torch.no_grad()
def test_constants_keep_the_limit():
    blocks, _ = make(MASK)
    blocks.copies.limit = 0
    groups = TokenGroups(torch.zeros(2, dtype=torch.long))
    assert choose(blocks, groups) is BACKENDS["grouped"].path


@torch.no_grad()
def test_blocks_that_every_expert_owns_need_no_mask(table):
    blocks, weights = make(torch.ones(3, 20, dtype=torch.bool))
    prefer(table, tuning.blocks_shape(blocks), "prepacked", "masked_prepacked", "masked")
    x, expert = torch.randn(6, 7), torch.tensor([0, 1, 2, 2, 1, 0])
    assert choose(blocks, TokenGroups(expert)) is BACKENDS["masked_prepacked"].path
    expected = by_the_equation(weights, torch.ones(3, 20), x, expert)
    torch.testing.assert_close(blocks(x, expert), expected, rtol=1e-4, atol=1e-4)
    assert len(blocks.copies) == 1


@torch.no_grad()
def test_a_bank_follows_the_table_and_its_limit(table):
    bank = FFNBank(4, 16, 24)
    plan = TopK(2, "renorm")(torch.randn(9, 4))
    x = torch.randn(9, 16)
    expected = bank(x, plan)
    assert not len(bank.copies)
    prefer(table, tuning.bank_shape(bank), "prepacked", "grouped_mm", "loop")
    torch.testing.assert_close(bank(x, plan), expected, rtol=1e-4, atol=1e-5)
    assert bank.copies.bytes == sum(bank.expert_bytes)
    bank.copies.clear()
    bank.copies.limit = sum(bank.expert_bytes) - 1
    assert bank_backends.choose(bank, [3, 3, 2, 1]) is bank_backends.grouped_mm
    torch.testing.assert_close(bank(x, plan), expected, rtol=1e-4, atol=1e-5)
    assert not len(bank.copies)


@given(st.dictionaries(st.sampled_from(ON_CPU), st.floats(1, 1e6), min_size=1))
def test_a_ranking_prefers_the_simpler_of_equals(row):
    row = {name: row[name] for name in ON_CPU if name in row}
    names = tuning.rank(row)
    assert sorted(names) == sorted(row)
    best = names[0]
    assert row[best] * (1 - tuning.MARGIN) ** len(row) <= min(row.values())
    assert all(row[best] < row[name] for name in ON_CPU[: ON_CPU.index(best)] if name in row)
    assert tuning.rank(dict.fromkeys(row, 5.0)) == tuple(row)


def test_cells_far_from_what_was_measured_are_not_guessed():
    shape = tuning.Shape({(512, 1): {"grouped": 1.0}, (512, 6): {"masked": 1.0}})
    assert shape.ranking(1, 1) == ()
    assert shape.ranking(300, 2) == ("grouped",) and shape.ranking(100_000, 5) == ("masked",)


# -- copies follow the weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packed", "masked_prepacked", "prepacked"])
@pytest.mark.parametrize("parameter", ["gate", "up", "down", "gate_bias", "up_bias"])
@torch.no_grad()
def test_changed_weights_make_copies_void(name, parameter):
    blocks, _ = make(MASK, bias=True)
    x, groups = torch.randn(6, 7), TokenGroups(torch.arange(6) % 4)
    before = BACKENDS[name].path(blocks, x, groups)
    getattr(blocks, parameter).mul_(1.5)
    after = BACKENDS[name].path(blocks, x, groups)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, BACKENDS["grouped"].path(blocks, x, groups), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_load_state_dict_and_conversions_make_copies_void():
    blocks, _ = make(MASK)
    other, _ = make(MASK, seed=1)
    x, groups = torch.randn(6, 7), TokenGroups(torch.arange(6) % 4)
    path = BACKENDS["prepacked"].path
    path(blocks, x, groups)
    blocks.load_state_dict(other.state_dict())
    torch.testing.assert_close(path(blocks, x, groups), path(other, x, groups))
    blocks.half().float()  # rounded to eleven bits, perhaps where the old values lay
    assert not len(blocks.copies) and not blocks.copies.bytes
    torch.testing.assert_close(path(blocks, x, groups), BACKENDS["grouped"].path(blocks, x, groups))
    assert path(blocks.double(), x.double(), groups).dtype == torch.float64


@torch.no_grad()
def test_deepcopies_and_state_dicts_carry_no_copies():
    blocks, _ = make(MASK)
    bank = FFNBank(2, 16, 16)
    blocks.copies.limit = 123_456
    x, groups = torch.randn(6, 7), TokenGroups(torch.arange(6) % 4)
    expected = BACKENDS["prepacked"].path(blocks, x, groups)
    bank_backends.prepacked(bank, torch.randn(3, 16), [1, 2])
    assert len(blocks.copies) == 4 and len(bank.copies) == 2
    for twin, original in ((copy.deepcopy(blocks), blocks), (copy.deepcopy(bank), bank)):
        assert not len(twin.copies) and twin.copies.limit == original.copies.limit
        assert set(twin.state_dict()) == {name for name, _ in original.named_parameters()}
    torch.testing.assert_close(BACKENDS["prepacked"].path(copy.deepcopy(blocks), x, groups), expected)


def test_limits_are_shared_by_size():
    small, large = FFNBank(2, 16, 16), FFNBank(2, 16, 48)
    assert small.copies.limit_for(small) == LEAST_LIMIT
    wide = FFNBank(8, 1024, 2048, up_bias=True)
    assert wide.copies.limit_for(wide) == sum(wide.expert_bytes) == 2 * wide.bfloat16().copies.limit_for(wide)
    limit_copies([small, large], 1000)
    assert (small.copies.limit, large.copies.limit) == (250, 750)
    with pytest.raises(MoesaicError, match="copies = -1"):
        limit_copies([small], -1)
    assert Copies(None).fits(small, [("a", 10**15)])


# -- the file -------------------------------------------------------------------------------------------------------

TIMES = {(8, 2): {"masked": 12.5, "prepacked": 3.25}}
GARBAGE = [
    b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'{"format": 99, "machines": 5}', b"[" * 100_000,
    json.dumps({"format": 1, "machines": []}).encode(), json.dumps({"format": 1, "machines": {"x": 1}}).encode(),
]  # fmt: skip


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_a_damaged_file_is_an_empty_one_and_is_replaced(table, content):
    table.cache_file().write_bytes(content)
    assert table.load() == {} and table.ranking("s", 8, 2) == ()
    table.save("s", TIMES)
    assert table.measured("s") == TIMES and table.ranking("s", 8, 2) == ("prepacked", "masked")


def test_damaged_cells_are_left_out(table):
    table.save("s", TIMES)
    whole = json.loads(table.cache_file().read_text())
    (rows,) = whole["machines"][table.machine()].values()
    rows |= {
        "8": {"masked": 1},
        "0 1": {"masked": 1},
        "4 1": {"masked": -1},
        "4 2": {},
        "4 3": 7,
        "4 4": {"masked": "x"},
    }
    whole["machines"][table.machine()]["other"] = "text"
    table.cache_file().write_text(json.dumps(whole))
    assert table.measured("s") == TIMES
    assert list(table.load()) == [f"s {torch.get_num_threads()} threads"]


def test_other_machines_and_other_threads_are_kept_apart(table, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(tuning, "machine", lambda: "another machine")
        table.save("s", {(8, 2): {"grouped": 1.0}})
    assert table.measured("s") == {}
    table.save("s", TIMES)
    assert table.measured("s") == TIMES
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert table.measured("s") == {} and table.ranking("s", 8, 2) == ()
    assert "another machine" in json.loads(table.cache_file().read_text())["machines"]


def test_unknown_backends_are_passed_over(table):
    blocks, _ = make(MASK)
    prefer(table, tuning.blocks_shape(blocks), "of_the_future", "grouped")
    with torch.no_grad():
        assert choose(blocks, TokenGroups(torch.arange(4))) is BACKENDS["grouped"].path


def _writer(folder, number):
    os.environ["MOESAIC_CACHE"] = folder
    for turn in range(4):
        tuning.save(f"shape {number} {turn}", TIMES)


def test_processes_that_write_at_once_lose_nothing(table, tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writer, args=(str(tmp_path), number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    assert len(table.load()) == 16 and all(shape.times == TIMES for shape in table.load().values())


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.delenv("MOESAIC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_file() == tmp_path / "moesaic" / "compute.json"
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "mine"))
    assert tuning.cache_file() == tmp_path / "mine" / "compute.json"


def test_layers_that_differ_by_little_share_a_shape():
    torch.manual_seed(0)
    shapes = set()
    for _ in range(4):
        layout, _ = layout_from_masks(torch.rand(4, 512) < 0.5)
        shapes.add(tuning.blocks_shape(ChannelBlocks(layout, 8, F.silu)))
    layout, _ = layout_from_masks(torch.rand(4, 1024) < 0.5)
    assert len(shapes) == 1 and tuning.blocks_shape(ChannelBlocks(layout, 8, F.silu)) not in shapes


# -- measuring ------------------------------------------------------------------------------------------------------


def test_cells_never_ask_for_more_experts_than_tokens():
    assert all(used <= tokens and used <= 6 for tokens, used in measure.cells(6))
    assert {used for _, used in measure.cells(6)} == {1, 3, 6}
    assert {used for _, used in measure.cells(1)} == {used for _, used in measure.cells(8, whole=True)} == {1}


def test_disturbed_measurements_say_so():
    import time

    lazy = iter([0, 0, 0, *[0, 0.004, 0.004] * 20])
    found, disturbed = measure.times(
        {"a": lambda: time.sleep(0.0005 + next(lazy)), "b": lambda: time.sleep(0.0005)}, 0.01
    )
    assert disturbed and set(found) == {"a", "b"}


@pytest.fixture
def few_cells(monkeypatch):
    """Shorter, and never disturbed: the machine is shared."""
    monkeypatch.setattr(measure, "TOKENS", (1, 8))
    monkeypatch.setattr(measure, "CELL_SECONDS", 0.001)
    monkeypatch.setattr(measure, "DISTURBED", float("inf"))


def test_tune_measures_once_and_leaves_no_copies(table, few_cells, refactored):
    model, ids = refactored
    before = model(ids).logits.detach()
    tuned = moesaic.tune(model)
    assert tuned.fresh > 0 and tuned.file == table.cache_file()
    for times in tuned.shapes.values():
        assert set(times) == set(measure.cells(model.config.experts))
        assert all(set(row) == set(ON_CPU) for row in times.values())
    assert not any(len(blocks.copies) for blocks in model.ffns())
    assert moesaic.tune(model).fresh == 0 and moesaic.tune(model, again=True).fresh == tuned.fresh
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_nothing_measured_under_disturbance_is_kept(table, few_cells, refactored, monkeypatch):
    monkeypatch.setattr(measure, "DISTURBED", 0.0)
    tuned = moesaic.tune(refactored[0])
    assert tuned.disturbed == tuned.fresh > 0 and not any(tuned.shapes.values())


def test_the_command(table, few_cells, refactored, tmp_path):
    refactored[0].save_pretrained(tmp_path / "moe")
    run = CliRunner().invoke(app, ["tune", str(tmp_path / "moe"), "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["measured"] > 0 and found["shapes"]
    assert {cell["choice"] for rows in found["shapes"].values() for cell in rows} <= set(BACKENDS)
    shown = CliRunner().invoke(app, ["tune", str(tmp_path / "moe")])
    assert shown.exit_code == 0 and "0 cells measured" in shown.stdout and "prepacked" in shown.stdout


def test_banks_of_routed_models_are_tuned_too(table, few_cells, dense):
    model = moesaic.attach_router(dense, router="top-k", experts=4, upcycle="split")
    ids = torch.randint(64, (2, 9))
    before = model(ids).logits.detach()
    tuned = moesaic.tune(model)
    assert [shape.split()[0] for shape in tuned.shapes] == ["bank"]
    assert {name for times in tuned.shapes.values() for row in times.values() for name in row} == set(BANK_BACKENDS)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_a_model_without_experts_is_refused(dense):
    with pytest.raises(MoesaicError, match="no expert layers"):
        moesaic.tune(dense)


# -- optimize -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dense():
    """A dense model of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def refactored(dense):
    """A refactored model of two layers, and ids."""
    mask = torch.rand(3, 48, generator=torch.Generator().manual_seed(1)) < 0.5
    return moesaic.attach(dense, [mask, mask], ["a", "b", "c"]), torch.randint(64, (2, 9))


@torch.no_grad()
def test_optimize_changes_no_token_and_no_route(refactored, table):
    model, ids = refactored
    for blocks in model.ffns():
        prefer(table, tuning.blocks_shape(blocks), "prepacked", "masked")
    plain = copy.deepcopy(model)
    expected = plain.generate(ids[:1], max_new_tokens=8, do_sample=False)
    done = moesaic.optimize(model, copies=10**6)
    assert done["packed"] > 0 and 0 < done["limit"] <= 10**6
    assert torch.equal(model.generate(ids[:1], max_new_tokens=8, do_sample=False), expected)
    ours, theirs = model(ids), plain(ids)
    assert torch.equal(ours.expert_index, theirs.expert_index) and torch.equal(ours.router_logits, theirs.router_logits)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    assert 0 < sum(blocks.copies.bytes for blocks in model.ffns()) <= 10**6


@torch.no_grad()
def test_a_dense_model_can_be_optimized_too(dense):
    ids = torch.randint(64, (2, 9))
    expected = dense(ids).logits
    assert moesaic.optimize(dense)["packed"] > 0
    torch.testing.assert_close(dense(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_optimized_model_is_neither_saved_nor_converted(refactored, tmp_path):
    model, _ = refactored
    moesaic.optimize(model)
    with pytest.raises(MoesaicError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(MoesaicError, match="cannot be converted"):
        model.bfloat16()
    assert not any(parameter.requires_grad for parameter in model.parameters())
