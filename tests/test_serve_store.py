"""The store: bytes are those of the checkpoint, the resident set is the budget's, faults are survived or told."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from moesaic.errors import MoesaicError
from moesaic.schedule.eviction import LRU
from moesaic.schedule.predict import Null
from moesaic.schedule.residency import Residency
from moesaic.schedule.work import Key, Known, Layout, WorkItem
from moesaic.serve.arena import PAGE, Arena, resident_bytes
from moesaic.serve.model_files import ModelFiles, expert_entries, read_json
from moesaic.serve.store import ExpertMemory, ExpertStore, Piece, merged
from serving import alone, ask, ask_all, engine, greedy, prompts, reference, served_folder

MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_folder(tmp_path_factory.mktemp("served") / "tiny")


def memory_of(folder: Path, dtype: torch.dtype = torch.float32) -> ExpertMemory:
    files = ModelFiles(folder)
    _, parts = expert_entries(read_json(folder / "config.json"), files, dtype.itemsize)
    return ExpertMemory(files, parts, dtype)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=1, max_size=6))
def test_steps_with_all_entries_are_counted_as_the_residency_does(steps):
    """Each step has a request for each number in it, at that expert."""
    keys = [[Key(layer, unit) for unit in range(4)] for layer in range(2)]
    entries = {(layer, e): (keys[layer][e], keys[layer][3]) for layer in range(2) for e in range(3)}
    layout = Layout(entries, {key: 10 + key.unit for own in keys for key in own})
    routes = [layout.calls([{e: 1}, {e: 1}]) for e in range(3)]
    plain, kept = (Residency(layout, 1000, LRU, Null(), preload=sorted(layout.bytes)) for _ in "ab")
    store = ExpertStore(None, lambda left: kept)  # moves nothing
    for number, experts in enumerate(steps):
        items = [WorkItem(r, number, "decode", 1, routes[e], Known.STEP) for r, e in enumerate(experts)]
        plain.pass_by(items)
        store.passed(items)
        assert kept.tally == plain.tally and kept.stage == plain.stage


# -- memory -----------------------------------------------------------------------------------------------------------
def test_pages_come_and_go():
    """Measured, not assumed: the process grows by what is written and shrinks by what is released."""
    arena = Arena(256 * MIB)
    before = resident_bytes()
    arena.tensor(0, (64 * MIB,), torch.uint8).fill_(1)
    written = resident_bytes()
    arena.release(0, 48 * MIB)
    after = resident_bytes()
    assert 60 * MIB < written - before < 70 * MIB
    assert 44 * MIB < written - after < 52 * MIB
    assert int(arena.tensor(48 * MIB, (16 * MIB,), torch.uint8).sum()) == 16 * MIB
    assert int(arena.tensor(0, (MIB,), torch.uint8).sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_rows_are_the_checkpoints(folder, dtype):
    memory = memory_of(folder, dtype)
    stored = load_file(folder / "model.safetensors")
    for key in memory.parts:
        memory.load(key)
    names = {part.tensor for parts in memory.parts.values() for part in parts}
    assert names
    for name in names:
        assert torch.equal(memory.tensor(name), stored[name].to(dtype))


def test_released_rows_are_gone_and_neighbours_stay(folder):
    memory = memory_of(folder)
    stored = load_file(folder / "model.safetensors")
    keys = list(memory.parts)
    for key in keys:
        memory.load(key)
    full = memory.resident
    for key in keys[::2]:
        memory.release(key)
        memory.release(key)  # again: nothing happens
    for key in keys[1::2]:
        for part in memory.parts[key]:
            place = memory.files.tensors[part.tensor]
            row = (place.stop - place.start) // place.shape[0]
            rows = slice((part.start - place.start) // row, (part.stop - place.start) // row)
            assert torch.equal(memory.tensor(part.tensor)[rows], stored[part.tensor][rows])
        memory.release(key)
    assert memory.resident == 0 < full
    assert all(not memory.tensor(part.tensor).any() for parts in memory.parts.values() for part in parts)
    assert full % PAGE == 0


def test_entries_loaded_together_are_those_loaded_one_by_one(folder):
    """And they leave one by one, whoever came with them."""
    together, alone_ = memory_of(folder), memory_of(folder)
    keys = sorted(together.parts)
    together.load(*keys, keys[0])
    for key in keys:
        alone_.load(key)
    for part in {part.tensor for parts in together.parts.values() for part in parts}:
        assert torch.equal(together.tensor(part), alone_.tensor(part))
    assert together.resident == alone_.resident > 0
    for key in keys:
        together.release(key)
        alone_.release(key)
        assert together.resident == alone_.resident
    assert together.resident == 0


def test_of_entries_that_cannot_all_be_read_none_is_there(own_copy):
    memory = memory_of(own_copy)
    keys = sorted(memory.parts)
    memory.load(keys[0])
    before = memory.resident
    os.truncate(own_copy / "model.safetensors", max(part.stop for part in memory.parts[keys[1]]) - 1)
    memory._handles.clear()  # the change itself would be noticed
    with pytest.raises(MoesaicError, match="truncated"):
        memory.load(keys[1], keys[2])
    assert memory.resident == before
    assert memory._loaded == {keys[0]}


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(1, 9)), max_size=12))
def test_merged_pieces_are_the_same_bytes(candidates):
    taken, pieces = set(), []
    for tensor, start, length in candidates:
        if not (cells := cells_of(piece := Piece(tensor, start, start + length))) & taken:
            taken |= cells
            pieces.append(piece)
    result = merged(pieces)
    assert set().union(*map(cells_of, result)) == taken
    assert sum(piece.stop - piece.start for piece in result) == len(taken)
    assert all(one.stop != two.start for one in result for two in result if one.tensor == two.tensor), (
        "neighbours are one"
    )


def cells_of(piece: Piece) -> set[tuple[int, int]]:
    return {(piece.tensor, at) for at in range(piece.start, piece.stop)}


# -- faults -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def own_copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_truncated_shard_fails_its_requests_and_no_other(own_copy, folder):
    """The file is cut while it is served: requests that need what is gone are told, the others' tokens are right."""
    model = reference(folder)
    by_expert: dict[int, list[int]] = {}
    for prompt in prompts(200, longest=2, seed=1):
        plan = model.plan(torch.tensor([prompt + alone(model, prompt, 3)])).expert.tolist()
        if len(set(plan)) == 1:
            by_expert.setdefault(plan[0], prompt)
    assert len(by_expert) > 1
    with engine(own_copy, experts=0.45, prefix_reuse=False) as own:
        store = own.runner.machine.store
        real = store.memory.load
        doomed = {key for (_, expert), keys in store.residency.layout.entries.items() if expert == 0 for key in keys}
        kept = {key for (_, expert), keys in store.residency.layout.entries.items() if expert == 1 for key in keys}

        def load(*keys):
            if (doomed - kept).intersection(keys):
                raise MoesaicError("model.safetensors ends at byte 5: it is truncated; copy it again")
            real(*keys)

        store.memory.load = load
        with store.lock() as residency:
            residency.pools[0].resize(1)  # everything leaves
            residency.pools[0].resize(own.runner.machine.memory.fixed)
        results = {expert: ask(own, prompt, greedy(3)).wait() for expert, prompt in by_expert.items()}
        assert own.failure is None
        store.memory.load = real  # the disk is back
        again = ask(own, by_expert[1], greedy(3)).wait()
    assert results[1].ids == again.ids == alone(model, by_expert[1], 3)
    assert results[0].end.reason == "error"
    assert "it is truncated" in results[0].end.message


def test_changed_file_is_noticed(own_copy):
    with engine(own_copy, experts=0.4, prefix_reuse=False) as own:
        assert len(ask(own, prompts(1)[0], greedy(3)).wait().ids) == 3
        path = own_copy / "model.safetensors"
        os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
        heard = [ask(own, prompt, greedy(8)).wait() for prompt in prompts(6, seed=3)]
        assert own.failure is None
    messages = [each.end.message for each in heard if each.end.reason == "error"]
    assert messages
    assert all("was changed while it was served" in message for message in messages)


def test_renamed_checkpoint_goes_on(own_copy):
    """Open files outlive their names: a folder that is replaced by a rename does not disturb who serves it."""
    model = reference(own_copy)
    asked = prompts(6, seed=3)
    with engine(own_copy, experts=0.4) as own:
        ask(own, asked[0], greedy(3)).wait()
        shutil.move(own_copy, own_copy.with_name("moved"))
        assert ask_all(own, asked, greedy(8)) == [alone(model, prompt, 8) for prompt in asked]


def test_damaged_weights_fail_one_request_alone(folder):
    """Logits that are not finite end their request with the reason; the engine lives."""
    with engine(folder) as own:
        backbone = own.runner.machine.backbone
        run = backbone.run

        def poisoned(parts, complete=False):
            logits = run(parts, complete)
            rows = [part for part in parts if part.last]
            for row, part in enumerate(rows):
                if part.slot == 0:
                    logits[row] = float("nan")
            return logits

        backbone.run = torch.inference_mode()(poisoned)
        heard = [ask(own, prompt, greedy(5)) for prompt in prompts(3, seed=2)]
        ends = [each.wait().end for each in heard]
        assert own.failure is None
    assert sorted(end.reason for end in ends) == ["error", "length", "length"]
    assert any("not finite" in end.message for end in ends)


@pytest.mark.parametrize("reuse", [False, True])
def test_keys_that_are_not_finite_leave_with_their_request(folder, reuse):
    """Requests read, under a mask, beyond their own keys: nothing of an earlier tenant may be there."""
    with engine(folder, max_requests=1, prefix_reuse=reuse) as own:
        write = own.runner.pool.write
        own.runner.pool.write = lambda layer, at, keys, values: write(layer, at, keys * float("nan"), values)
        long, short = list(range(3, 43)), list(range(3, 8))
        assert ask(own, long, greedy(5)).wait().end.reason == "error"
        own.runner.pool.write = write
        assert ask(own, short, greedy(20)).wait().ids == alone(reference(folder), short, 20)


def test_budget_is_kept_under_load(folder):
    with engine(folder, experts=0.45, prefix_reuse=False) as own:
        heard = [ask(own, prompt, greedy(20)) for prompt in prompts(20, seed=4)]
        store = own.runner.machine.store
        most = 0
        while not all(each.ended.is_set() for each in heard):
            most = max(most, store.residency.taken)
        capacity = store.residency.pools[0].capacity
        assert most <= capacity
        pages = store.memory.resident
        edges = 2 * PAGE * sum(len(store.memory.parts[key]) for key in store.memory._loaded)
    assert pages <= capacity + edges
    assert np.isfinite(most)
