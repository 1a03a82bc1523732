"""The accelerator's tier: entries are the checkpoint's wherever they lie, in one tier at a time, within both budgets.

Without a GPU the CPU is the device: every line runs but those of streams and graphs.
"""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesaic.cli.main import app
from moesaic.errors import MoesaicError
from moesaic.serve.arena import PAGE
from moesaic.serve.decoder import FusedDecoder, decoder_of
from moesaic.serve.engine import Engine
from moesaic.serve.layers import FusedLayer
from moesaic.serve.loading import load, served_device
from moesaic.serve.memory_plan import plan
from moesaic.serve.model_files import ModelFiles, expert_entries, read_json
from moesaic.serve.options import EngineOptions
from moesaic.serve.request import ExpertControl
from moesaic.serve.slab import Slab, SlabMemory
from moesaic.serve.store import ExpertMemory, ExpertStore
from serving import DEVICE, alone, ask, ask_all, engine, greedy, prompts, reference, served_folder
from test_serve_stock import stock_folder, stock_reference

TOKENS = 10
MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served_folder(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def wanted(folder):
    model, asked = reference(folder), prompts(16)
    return asked, [alone(model, prompt, TOKENS) for prompt in asked]


# -- memory -----------------------------------------------------------------------------------------------------------
def slab_memory(folder, share: float = 1.0, room: int = MIB) -> tuple[SlabMemory, ExpertMemory]:
    """Entries of a checkpoint on the device, and a memory that holds all of them to compare with."""
    files = ModelFiles(folder)
    layout, parts = expert_entries(read_json(folder / "config.json"), files, 4)
    host, whole = (ExpertMemory(files, parts, torch.float32) for _ in "ab")
    whole.load(*parts)

    def channels(key):
        found = {}
        for part in host.parts[key]:
            place = files.tensors[part.tensor]
            row = (place.stop - place.start) // place.shape[0]
            first, last = ((at - place.start) // row for at in (part.start, part.stop))
            found[part.tensor.rpartition(".")[2]] = host.tensor(part.tensor)[first:last]
        return found

    return SlabMemory(host, channels, int(layout.total_bytes * share), room, torch.device(DEVICE)), whole


def content(memory: SlabMemory, key) -> dict[str, torch.Tensor]:
    """What the device holds of an entry."""
    return {name: part[memory.index(key)].cpu() for name, part in memory.slab.parts.items()}


def check(memory: SlabMemory, whole: ExpertMemory, there: set) -> None:
    """Entries that are there are the checkpoint's; nobody else's; no entry lies twice."""
    rows = [row for key in there for row in memory.index(key).tolist()]
    assert len(rows) == len(set(rows)) == memory.slab.taken
    for key in there:
        for part in whole.parts[key]:
            place = whole.files.tensors[part.tensor]
            row = (place.stop - place.start) // place.shape[0]
            first, last = ((at - place.start) // row for at in (part.start, part.stop))
            assert torch.equal(
                content(memory, key)[part.tensor.rpartition(".")[2]], whole.tensor(part.tensor)[first:last]
            )
    assert memory.host._loaded == set(memory._behind), "main memory holds what the device does not, and no more"
    if memory.stays:
        assert there <= set(memory._behind), "main memory holds all that was ever there"
    else:
        assert not there & set(memory._behind)
    assert memory.behind <= memory.room


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_entries_are_the_checkpoints_in_one_tier_at_a_time(folder, data):
    memory, whole = slab_memory(folder)
    rooms = [max(map(memory.host.bytes, memory.host.parts)), memory.host.whole - PAGE, memory.host.whole]
    memory, whole = slab_memory(folder, room=data.draw(st.sampled_from(rooms)))
    keys, there = sorted(memory.host.parts), set()
    for _ in range(data.draw(st.integers(1, 12))):
        chosen = data.draw(st.lists(st.sampled_from(keys), max_size=6))
        if data.draw(st.booleans()):
            memory.load(*chosen)
            there |= set(chosen)
        else:
            for key in chosen:
                memory.left(key)
                memory.release(key)
            there -= set(chosen)
        check(memory, whole, there)
    memory.close()


@pytest.mark.parametrize("stays", [False, True])
def test_what_left_is_read_from_main_memory_and_not_from_the_disk(folder, monkeypatch, stays):
    memory, whole = slab_memory(folder)
    memory, whole = slab_memory(folder, room=memory.host.whole - (0 if stays else PAGE))
    keys = sorted(memory.host.parts)
    memory.load(*keys)
    assert memory.stays == stays == (memory.behind > 0)
    for key in keys[:4]:
        memory.release(key)
    behind = memory.behind
    assert behind > 0
    read = []
    monkeypatch.setattr(memory.host, "load", lambda *new: read.extend(new))
    memory.load(*keys[:4])
    assert not read and memory.behind == (behind if memory.stays else 0)
    check(memory, whole, set(keys))


def test_entries_that_cannot_be_read_leave_no_trace(folder, tmp_path):
    import shutil

    copy = shutil.copytree(folder, tmp_path / "copy")
    memory, whole = slab_memory(copy)
    keys = sorted(memory.host.parts)
    memory.load(keys[0])
    memory.release(keys[0])  # lies in main memory
    with open(copy / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(MoesaicError, match=r"model\.safetensors"):
        memory.load(keys[0], keys[1])
    check(memory, whole, set())
    assert memory.slab.taken == 0
    memory.load(keys[0])
    check(memory, whole, {keys[0]})


def test_a_slab_gives_the_lowest_rows_and_no_more_than_it_has():
    slab = Slab({"up": torch.ones(5, 4), "bias": torch.ones(5)}, capacity=100, device=torch.device(DEVICE))
    assert slab.row_bytes == 20 and slab.rows == 5
    assert slab.take(2) == [0, 1] and slab.take(3) == [2, 3, 4]
    slab.give([1, 3])
    with pytest.raises(MoesaicError, match="3 rows are wanted"):
        slab.take(3)
    assert sorted(slab.take(2)) == [1, 3]
    with pytest.raises(MoesaicError, match="no channel of 20 bytes"):
        Slab({"up": torch.ones(5, 5)}, capacity=19, device=torch.device(DEVICE))


# -- the engine -------------------------------------------------------------------------------------------------------
SETTINGS = {
    "all": {},
    "half": {"experts": 0.5},
    "least, little behind": {"experts": 0.4, "host_memory": "64KiB"},
    "no prefetch": {"experts": 0.5, "lookahead": 0},
    "small steps": {"experts": 0.5, "max_tokens": 7},
    "one at a time": {"experts": 0.5, "max_requests": 1},
    "lru, fcfs, unpacked": {"experts": 0.6, "policy": "lru", "batcher": "fcfs", "pack": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_those_of_generate(folder, wanted, setting):
    with engine(folder, device=DEVICE, memory="1GiB", **SETTINGS[setting]) as own:
        assert ask_all(own, wanted[0], greedy(TOKENS)) == wanted[1]
        memory, capacity = own.runner.machine.store.memory, own.stats().memory.experts_capacity
        assert isinstance(memory, SlabMemory)
        assert 0 < memory.resident <= capacity
        assert memory.slab.rows * memory.slab.row_bytes <= capacity
        assert memory.behind <= memory.room
        assert (own.stats().hit_ratio == 1) == ("experts" not in SETTINGS[setting])


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "opt"])
def test_biases_norms_and_other_attention(tmp_path, family):
    folder = served_folder(tmp_path / family, family)
    asked = prompts(6)
    model = reference(folder)
    with engine(folder, device=DEVICE, memory="1GiB", experts=0.6) as own:
        assert ask_all(own, asked, greedy(TOKENS)) == [alone(model, prompt, TOKENS) for prompt in asked]


def test_untied_experts(tmp_path):
    folder = served_folder(tmp_path / "untied", untied=True)
    asked, model = prompts(6), reference(folder)
    with engine(folder, device=DEVICE, memory="1GiB", experts=0.6) as own:
        assert ask_all(own, asked, greedy(TOKENS)) == [alone(model, prompt, TOKENS) for prompt in asked]


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "qwen2-moe"])
def test_stock_mixtures(tmp_path, family):
    folder = stock_folder(tmp_path / family, family)
    asked, model = prompts(8), stock_reference(folder)
    with engine(folder, device=DEVICE, memory="1GiB", experts=0.5) as own:
        assert ask_all(own, asked, greedy(TOKENS)) == [alone(model, prompt, TOKENS) for prompt in asked]
        assert own.stats().hit_ratio < 1
        few = [ask(own, prompt, greedy(TOKENS, experts_per_token=1)).wait().ids for prompt in asked[:3]]
    with engine(folder, memory="1GiB") as own:
        assert few == [ask(own, prompt, greedy(TOKENS, experts_per_token=1)).wait().ids for prompt in asked[:3]]


def test_sampling_and_expert_control_are_the_hosts(folder):
    wishes = greedy(TOKENS, experts=ExpertControl(pin=1), logprobs=3), greedy(TOKENS, seed=4)
    asked = prompts(4)
    answers = []
    for options in ({"device": DEVICE}, {}):
        with engine(folder, memory="1GiB", **options) as own:
            answers.append([ask(own, prompt, wish).wait().ids for prompt in asked for wish in wishes])
    assert answers[0] == answers[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_reader_is_replaced(folder, wanted, monkeypatch):
    """As with main memory: another thread takes up the transfers that it left."""
    move, deaths = ExpertStore._move, []

    def dying(self, batch):
        if not deaths:
            deaths.append(batch)
            raise SystemExit  # ends the thread without a word
        move(self, batch)

    monkeypatch.setattr(ExpertStore, "_move", dying)
    with engine(folder, device=DEVICE, memory="1GiB", experts=0.5) as own:
        assert ask_all(own, wanted[0], greedy(TOKENS)) == wanted[1]
    assert deaths


# -- the plan ---------------------------------------------------------------------------------------------------------
def test_the_plan_counts_what_the_device_holds(folder):
    here, there = plan(folder, memory="1GiB"), plan(folder, memory="1GiB", device=DEVICE, host_memory="1MiB")
    assert there.device == DEVICE and there.host == MIB and here.device == "" and here.host == 0
    assert there.dense == here.dense and there.buffers < here.buffers, "the process is not on the device"
    assert there.kv == there.requests * there.kv_request
    with engine(folder, device=DEVICE, memory="1GiB", host_memory="1MiB", context=64) as own:
        pool = own.runner.pool
        planned = plan(folder, memory="1GiB", device=DEVICE, context=64).kv
        assert 0 < pool._arena.size <= planned


def test_fewer_requests_than_wanted_where_their_keys_do_not_fit(folder, wanted):
    rich = plan(folder, memory="1GiB", device=DEVICE, context=64)
    some = rich.least_budget + rich.all_experts
    planned = plan(folder, memory=some, device=DEVICE, context=64)
    assert 1 <= planned.requests < 32
    with engine(folder, device=DEVICE, memory=some, context=64) as own:
        assert own.options.max_requests == 32 and own.runner.options.max_requests == planned.requests
        assert ask_all(own, wanted[0], greedy(TOKENS)) == wanted[1]


def test_what_cannot_be_is_said(folder):
    with pytest.raises(MoesaicError, match="device 'nowhere' cannot be used"):
        Engine(folder, EngineOptions(memory="1GiB", device="nowhere"))
    if not torch.cuda.is_available():
        with pytest.raises(MoesaicError, match="device 'cuda' cannot be used"):
            plan(folder, device="cuda")
        with pytest.raises(MoesaicError, match="device 'cuda' cannot be used"):
            served_device("cuda", MIB)
    with pytest.raises(MoesaicError, match="does not say how much memory it has"):
        plan(folder, device="cpu")
    with pytest.raises(MoesaicError, match="name one, such as"):
        EngineOptions(host_memory="1GiB")
    with pytest.raises(MoesaicError, match=r"host memory of 4\.0 KiB"):
        Engine(folder, EngineOptions(memory="1GiB", device=DEVICE, host_memory=4096))


def test_the_command_shows_both_memories(folder):
    options = ["plan", str(folder), "--memory", "1GiB", "--device", DEVICE, "--host-memory", "2MiB"]
    shown = CliRunner().invoke(app, options)
    assert shown.exit_code == 0, shown.output
    assert DEVICE in shown.output and "2.0 MiB" in shown.output
    found = json.loads(CliRunner().invoke(app, [*options, "--json"]).output)
    assert found["device"] == DEVICE and found["host"] == 2 * MIB


def test_fused_layers_can_be_moved(folder):
    """To a device; what inference mode has made has no version, and views of it fail once it lies elsewhere."""
    loaded = load(folder, torch.float32)
    assert any(isinstance(module, FusedLayer) for module in loaded.model.backbone.modules())
    assert not any(weight.is_inference() for weight in loaded.model.backbone.parameters())
    loaded = load(folder, torch.float32, device=torch.device(DEVICE))
    loaded.model.backbone.double().float()
    assert isinstance(decoder_of(loaded.model.backbone, False), FusedDecoder)
