"""What is read off the headers of a checkpoint: places, damage, and the bytes each expert is made of."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moesaic.errors import MoesaicError
from moesaic.models.attach import attach
from moesaic.schedule.work import Key
from moesaic.serve.model_files import ModelFiles, expert_entries, read_header

D, W, LAYERS = 16, 24, 2
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refactored model with biases, in shards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=D,
        intermediate_size=W,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp_bias=True,
    )
    masks = [torch.rand(3, W) < 0.5 for _ in range(LAYERS)]
    folder = tmp_path_factory.mktemp("checkpoint")
    attach(LlamaForCausalLM(config), masks, ["a", "b", "c"]).save_pretrained(folder, max_shard_size="8KB")
    return folder


def single(folder: Path, tensors: dict[str, torch.Tensor]) -> ModelFiles:
    """A folder with one file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return ModelFiles(folder)


def read(files: ModelFiles, tensor: str) -> torch.Tensor:
    place = files.tensors[tensor]
    raw = place.file.read_bytes()[place.start : place.stop]
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[place.dtype]).view(place.shape)


def test_places_are_where_the_tensors_are(checkpoint: Path) -> None:
    files = ModelFiles(checkpoint)
    assert len({place.file for place in files.tensors.values()}) > 1
    stored = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert files.tensors.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(read(files, name), tensor)


def test_blocks_of_a_moesaic_checkpoint(checkpoint: Path) -> None:
    files, config = ModelFiles(checkpoint), json.loads((checkpoint / "config.json").read_text())
    layout, parts = expert_entries(config, files, itemsize=2)
    assert layout.layers == (0, 1)
    for layer, (_, _, blocks) in enumerate(config["layouts"]):
        row = 0
        for c, (width, owners) in enumerate(blocks):
            key = Key(layer, c)
            assert layout.bytes[key] == 2 * width * (3 * D + 2)  # three rows and two biases a channel
            assert [e for e in range(3) if key in layout.entries[layer, e]] == owners
            for part in parts[key]:
                whole = read(files, part.tensor)
                raw = part.file.read_bytes()[part.start : part.stop]
                rows = torch.frombuffer(bytearray(raw), dtype=whole.dtype).view(width, *whole.shape[1:])
                assert torch.equal(rows, whole[row : row + width])
            kinds = sorted(part.tensor.rpartition(".")[2] for part in parts[key])
            assert kinds == ["down", "gate", "gate_bias", "up", "up_bias"]
            row += width
    assert parts.keys() == layout.bytes.keys()


def test_an_inline_ffn_is_found(tmp_path: Path) -> None:
    name = "backbone.model.decoder.layers.0.fc1.blocks"
    files = single(tmp_path, {f"{name}.up": torch.ones(5, 4), f"{name}.down": torch.ones(5, 4)})
    site = {"path": "model.decoder.layers.0", "inline": True, "up": "fc1", "gate": None}
    layout, parts = expert_entries({"sites": [site], "layouts": [[2, 6, [[2, [0]], [3, [0, 1]]]]]}, files, 4)
    assert layout.bytes == {Key(0, 0): 2 * 8 * 4, Key(0, 1): 3 * 8 * 4}
    assert [part.tensor for part in parts[Key(0, 0)]] == [f"{name}.up", f"{name}.down"]


@pytest.mark.parametrize("change", ["rows", "gate", "layouts", "sites"])
def test_blocks_that_do_not_fit_the_config_are_refused(tmp_path: Path, change: str) -> None:
    name = "backbone.model.layers.0.mlp.blocks"
    tensors = {f"{name}.{part}": torch.ones(5, 4) for part in ("gate", "up", "down")}
    config = {"sites": [{"path": "model.layers.0.mlp", "gate": "g"}], "layouts": [[1, 6, [[5, [0]]]]]}
    if change == "rows":
        tensors[f"{name}.down"] = torch.ones(4, 4)
    elif change == "gate":
        del tensors[f"{name}.gate"]
    else:
        config[change] = [{"path": 1}, {}] if change == "sites" else [[1, 6, 7]]
    with pytest.raises(MoesaicError, match=r"down|gate|layouts"):
        expert_entries(config, single(tmp_path, tensors), 2)


def mixture(stacked: bool, biases: bool = False) -> dict[str, torch.Tensor]:
    """11 layers, the first of them dense, of 3 experts."""
    tensors = {"model.layers.0.mlp.gate_proj.weight": torch.ones(8, D)}
    for layer in range(1, 11):
        name = f"model.layers.{layer}.mlp"
        tensors[f"{name}.gate.weight"] = torch.ones(3, D)
        tensors[f"{name}.shared_experts.up_proj.weight"] = torch.ones(8, D)
        if stacked:
            tensors[f"{name}.experts.gate_up_proj"] = torch.ones(3, 2 * W, D) * layer
            tensors[f"{name}.experts.down_proj"] = torch.ones(3, D, W)
            if biases:
                tensors[f"{name}.experts.down_proj_bias"] = torch.ones(3, D)
        else:
            for e in range(3):
                for part in ("w1", "w3"):
                    tensors[f"{name}.experts.{e}.{part}.weight"] = torch.ones(W, D) * layer
                tensors[f"{name}.experts.{e}.w2.weight"] = torch.ones(D, W)
    return tensors


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_experts_of_stock_mixtures(tmp_path: Path, stacked: bool, biases: bool) -> None:
    files = single(tmp_path, mixture(stacked, biases))
    layout, parts = expert_entries({}, files, itemsize=2)
    assert layout.layers == tuple(range(10))
    size = 2 * (3 * W * D + (D if stacked and biases else 0))
    assert set(layout.bytes.values()) == {size}
    assert sum(part.stop - part.start for part in parts[Key(9, 1)]) == 2 * size  # stored as float32
    first = parts[Key(9, 1)][0 if not stacked else [p.tensor[-4:] for p in parts[Key(9, 1)]].index("proj")]
    assert "model.layers.10." in first.tensor  # not 9, which comes before it in the alphabet
    if stacked:
        place = files.tensors["model.layers.10.mlp.experts.gate_up_proj"]
        part = next(p for p in parts[Key(9, 1)] if p.tensor.endswith("gate_up_proj"))
        assert (part.start - place.start, part.stop - place.start) == (2 * W * D * 4, 4 * W * D * 4)


def test_mixtures_that_transformers_writes(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=40,
        hidden_size=D,
        intermediate_size=W,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    layout, _ = expert_entries({}, ModelFiles(tmp_path), itemsize=4)
    assert len(layout.entries) == LAYERS * 4
    assert layout.total_bytes == LAYERS * 4 * 3 * W * D * 4


def test_experts_that_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="no experts"):
        expert_entries({}, single(tmp_path / "dense", {"model.norm.weight": torch.ones(4)}), 2)
    tensors = mixture(False)
    del tensors["model.layers.3.mlp.experts.1.w1.weight"]
    del tensors["model.layers.3.mlp.experts.1.w2.weight"]
    del tensors["model.layers.3.mlp.experts.1.w3.weight"]
    with pytest.raises(MoesaicError, match=r"layers\.3\.mlp\.experts\.1"):
        expert_entries({}, single(tmp_path / "part", tensors), 2)
    with pytest.raises(MoesaicError, match="U8"):
        packed = {"mlp.experts.gate_up_proj_blocks": torch.ones(2, 3, dtype=torch.uint8)}
        expert_entries({}, single(tmp_path / "quantised", packed), 2)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="does not exist"):
        ModelFiles(tmp_path / "nowhere")
    with pytest.raises(MoesaicError, match=r"neither model\.safetensors"):
        ModelFiles(tmp_path)
    single(tmp_path, {"a": torch.ones(2)})
    (tmp_path / "config.json").unlink()
    with pytest.raises(MoesaicError, match=r"config\.json does not exist"):
        ModelFiles(tmp_path)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"a": "gone.safetensors"}, "gone.safetensors does not exist"),
        ({"b": "part.safetensors"}, "lacks 'b'"),
        ({"a": "../part.safetensors"}, "of its folder"),
        ({"a": 3}, "of its folder"),
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
    ],
)
def test_indices_that_lead_nowhere(tmp_path: Path, index: object, match: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(MoesaicError, match=match):
        ModelFiles(tmp_path)


def test_a_folder_that_changes_is_noticed(tmp_path: Path) -> None:
    files = single(tmp_path, {"a": torch.ones(2)})
    files.check()
    weights = tmp_path / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(MoesaicError, match=r"model\.safetensors was changed"):
        files.check()
    weights.unlink()
    with pytest.raises(MoesaicError, match=r"model\.safetensors does not exist"):
        files.check()


WHOLE = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def written(path: Path, header: object, data: int = 24, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data))
    return path


@pytest.mark.parametrize(
    ("header", "options", "match"),
    [
        (WHOLE, {"data": 23}, "cut off"),
        (WHOLE, {"data": 25}, "more than its header says"),
        (WHOLE, {"length": 2**63}, "less than its header"),
        (WHOLE, {"length": 0}, "expected 2 B to"),
        (b"{not json", {}, "no JSON"),
        (b"\xff\xfe{}", {}, "no JSON"),
        (b"[" * 100_000, {}, "no JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", {}, "no JSON"),
        ([], {}, "expected an object"),
        ({"a": 3}, {}, "'a'"),
        ({"a": {**WHOLE["a"], "dtype": "F31"}}, {}, "unknown dtype"),
        ({"a": {**WHOLE["a"], "dtype": []}}, {}, "'a'"),
        ({"a": {**WHOLE["a"], "shape": [2, -3]}}, {}, "'a'"),
        ({"a": {**WHOLE["a"], "shape": [2, True]}}, {}, "'a'"),
        ({"a": {**WHOLE["a"], "shape": [10**4000] * 3}}, {}, "another number of bytes"),
        ({"a": {**WHOLE["a"], "data_offsets": [24, 0]}}, {}, "another number of bytes"),
        ({"a": WHOLE["a"], "b": WHOLE["a"]}, {}, "overlap"),
        ({"a": {**WHOLE["a"], "data_offsets": [4, 28]}}, {"data": 28}, "gap"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: object, options: dict[str, int], match: str) -> None:
    path = written(tmp_path / "x.safetensors", header, **options)
    with pytest.raises(MoesaicError, match=match) as caught:
        read_header(path)
    assert "x.safetensors" in str(caught.value)


SAMPLE = json.dumps({"__metadata__": {"format": "pt"}, **WHOLE, "é": {**WHOLE["a"], "data_offsets": [24, 48]}})


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_header_is_a_moesaic_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.getbasetemp() / "damaged.safetensors", SAMPLE.encode(), data=48)
    whole = path.read_bytes()
    assert len(read_header(path)) == 2
    if data.draw(st.booleans(), label="cut"):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1), label="bytes")])
        with pytest.raises(MoesaicError):
            read_header(path)
        return
    at = data.draw(st.integers(0, len(whole) - 49), label="place")
    new = data.draw(st.binary(min_size=1, max_size=12), label="bytes")
    path.write_bytes(whole[:at] + new + whole[at + len(new) :])
    try:
        after = read_header(path)
    except MoesaicError:
        return
    # What passes has other names, shapes or dtypes, which nobody can tell from wanted ones; but it fills the file.
    data_start = min(place.start for place in after.values())
    assert sum(place.stop - place.start for place in after.values()) == path.stat().st_size - data_start
