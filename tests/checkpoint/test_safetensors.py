"""The safetensors container and grokkit's own layout in it, against the safetensors library."""

import json
import shutil
import struct
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from grokkit.checkpoint import (
    ArraySpan,
    Checkpoint,
    Entry,
    TensorFile,
    convert,
    load_params,
    open_checkpoint,
    read_tensor,
    stored_specs,
    tensor_keys,
    write_tensor,
)
from grokkit.checkpoint.int4 import INT4, pack, unpack
from grokkit.checkpoint.plan_files import Piece, choose_storages, plan_files
from grokkit.checkpoint.safetensors_file import encode_header, read_safetensors
from grokkit.checkpoint.tensor_file import StackedTensors
from grokkit.config import GROK_1
from grokkit.errors import CheckpointError
from grokkit.model import param_specs
from grokkit.sharding import make_mesh

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """The golden checkpoint as safetensors, a few layers a file."""
    target = tmp_path_factory.mktemp("converted") / "tiny"
    convert(golden, target, shard_bytes=560_000, progress=False)
    return target


@pytest.fixture
def damaged(converted, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(converted, tmp_path / "tiny")


def refused(directory, *messages):
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(directory)
    text = str(e.value)
    assert [line.split(":")[0] for line in text.splitlines()[1:]] == [
        "  expected",
        "  found",
        "  what to do",
    ]
    for message in messages:
        assert message in text


# The container


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint8"])
def test_what_the_library_wrote_is_read(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    save_file({"a": array, "b.c": array[0]}, tmp_path / "x.safetensors", {"note": "n"})
    file = read_safetensors(tmp_path / "x.safetensors")
    assert file.metadata == {"note": "n"}
    assert {name: span.shape for name, span in file.spans.items()} == {
        "a": (2, 3, 4),
        "b.c": (3, 4),
    }
    span = file.spans["a"]
    found = np.memmap(file.path, span.dtype, "r", span.offset, span.shape)
    assert found.dtype == array.dtype and found.tobytes() == array.tobytes()


def test_the_library_reads_what_is_written(converted):
    """The index and every file's header and metadata, by the library."""
    index = json.loads((converted / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 5 and len(index) == 2 + 12 * (2 * 7 + 5)
    files = {name: safe_open(converted / name, framework="numpy") for name in set(index.values())}
    assert all(index[name] == file for file, f in files.items() for name in f.keys())  # noqa: SIM118
    assert "blocks.11.moe.gate.weight" in index and "embedding.weight" in index
    notes = files[index["embedding.weight"]].metadata()
    assert notes["format"] == "grokkit" and "emb_size" in json.loads(notes["config"])["model"]
    assert json.loads(notes["storage"])["blocks.attention.out"] == "int8/8"


def test_arrays_equal_the_official_files(converted, golden, golden_weights, golden_names):
    """In the orientation that the model holds, under names with the layer's number."""
    index = json.loads((converted / "model.safetensors.index.json").read_text())["weight_map"]

    def read(name):
        with safe_open(converted / index[name], framework="numpy") as file:
            return file.get_tensor(name)

    for layer in (0, 2, 10):
        weight = read(f"blocks.{layer}.moe.out.weight").swapaxes(-1, -2)
        scales = read(f"blocks.{layer}.moe.out.scales")
        name = f"transformer/decoder_layer_{layer}/moe/linear_1/w"
        np.testing.assert_array_equal(
            reference.dequantize(weight, scales), np.asarray(golden_weights[name], np.float64)
        )
        name = f"transformer/decoder_layer_{layer}/router/w"
        np.testing.assert_array_equal(read(f"blocks.{layer}.moe.router"), golden_weights[name])
    np.testing.assert_array_equal(
        read("embedding.weight"), golden_weights["language_model/in_out_embed/embeddings"]
    )


def test_grok_1_has_a_layer_a_file():
    """From shapes alone: the embedding, then each layer; 318 GB in all, of at most 5 GB each."""
    entries = []
    for key in tensor_keys(GROK_1):
        scales = key.scales_shape and ArraySpan(BFLOAT16, key.scales_shape, 0)
        entries.append(
            Entry(key, TensorFile(Path("x"), 0, ArraySpan(key.dtype, key.shape, 0), scales))
        )
    checkpoint = Checkpoint(Path("x"), GROK_1, tuple(entries))
    storages = choose_storages(checkpoint, "safetensors", None, None, 32)
    files = plan_files(checkpoint, "safetensors", storages)
    names = [[p.name for p in f.pieces if isinstance(p, Piece)] for f in files]
    assert [f.name for f in files][::64] == [
        "model-00001-of-00065.safetensors",
        "model-00065-of-00065.safetensors",
    ]
    assert names[0] == ["embedding.weight"]
    for layer in range(64):
        assert {n.split(".")[1] for n in names[layer + 1]} - {"scale"} == {str(layer)}
    assert "final_norm.scale" in names[64]
    assert max(f.size for f in files) < 5_000_000_000
    assert 0 < sum(f.size for f in files) - 318_239_694_848 < 65 * 10_000


def test_data_is_aligned(converted):
    for path in converted.glob("*.safetensors"):
        for span in read_safetensors(path).spans.values():
            assert span.offset % span.dtype.itemsize == 0


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_header_is_read_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError):
        read_safetensors(path)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
NOT_OF_THE_FORMAT = "expected: a safetensors file\n  found: "


@pytest.mark.parametrize(
    "header, message",
    [
        ({"a": GOOD | {"dtype": "I64", "shape": [1]}}, "in one of F32"),
        ({"a": GOOD | {"extra": 1}}, "data_offsets of 'a'"),
        ({"a": GOOD | {"shape": [3]}}, NOT_OF_THE_FORMAT),
        ({"a": GOOD | {"shape": [-2]}}, NOT_OF_THE_FORMAT),
        ({"a": GOOD | {"shape": [2.0]}}, NOT_OF_THE_FORMAT),
        ({"a": GOOD | {"shape": [1 << 40, 1 << 40]}}, NOT_OF_THE_FORMAT),
        ({"a": GOOD | {"data_offsets": [4, 12]}}, NOT_OF_THE_FORMAT),
        ({"a": GOOD, "b": GOOD}, NOT_OF_THE_FORMAT),
        ({"__metadata__": {"x": 1}, "a": GOOD}, NOT_OF_THE_FORMAT),
        ({"a": GOOD | {"shape": [2, 1], "data_offsets": [0, 16]}}, NOT_OF_THE_FORMAT),
        ([], NOT_OF_THE_FORMAT),
    ],
)
def test_bad_headers(tmp_path, header, message):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError) as e:
        read_safetensors(tmp_path / "x.safetensors")
    assert message in str(e.value) and "what to do: " in str(e.value)


def test_stand_ins(tmp_path):
    path = tmp_path / "x.safetensors"
    for content, message in [
        (b"", f"{NOT_OF_THE_FORMAT}0 bytes: "),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (struct.pack("<Q", 1 << 60) + b"{}", f"{NOT_OF_THE_FORMAT}10 bytes: "),
        (b'\x20\0\0\0\0\0\0\0{"a":1,"a":2}                   ', NOT_OF_THE_FORMAT),
        (encode_header({"a": (np.dtype("f4"), (2,))}, {}), f"{NOT_OF_THE_FORMAT}4,096 bytes: "),
        (struct.pack("<Q", 100_005) + b'{"a":' + b"[" * 100_000, NOT_OF_THE_FORMAT),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as e:
            read_safetensors(path)
        assert message in str(e.value)


# Arrays that are unpacked or put together where they are sliced


@given(data=st.data())
def test_packing(data, tmp_path_factory):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)))
    values = np.random.default_rng(0).integers(-8, 8, (*shape[:2], 2 * shape[2]), np.int8)
    packed = pack(values)
    assert packed.nbytes * 2 == values.nbytes
    np.testing.assert_array_equal(unpack(packed), values)
    path = tmp_path_factory.mktemp("packed") / "file"
    path.write_bytes(b"..." + packed.tobytes())
    file = TensorFile(path, 3 + packed.nbytes, ArraySpan(INT4, values.shape, 3))
    stored = file.open(file.weight)
    assert stored.shape == values.shape and stored.dtype == np.int8
    start = 2 * data.draw(st.integers(0, shape[2] - 1))
    place = (slice(None), slice(0, 1), slice(start, start + 2))
    np.testing.assert_array_equal(stored[place], values[place])
    np.testing.assert_array_equal(stored[0], values[0])
    with pytest.raises(ValueError, match=r"packed in pairs.*fewer 'model' devices"):
        stored[0, 0, 1:2]


def test_stacks(tmp_path):
    whole = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    parts = []
    for i, part in enumerate(whole):
        write_tensor(tmp_path / f"{i}", part)
        parts.append(read_tensor(tmp_path / f"{i}"))
    stack = StackedTensors.of(parts)
    stored = stack.open(stack.weight)
    assert stored.shape == whole.shape and stored.dtype == whole.dtype
    np.testing.assert_array_equal(stored, whole)
    for index in [(slice(None),), (slice(1, 3), slice(0, 1)), (2, slice(1, 2), slice(0, 2)), 3]:
        np.testing.assert_array_equal(stored[index], whole[index])


# Opening


def test_opened_as_the_original(converted, golden):
    original, checkpoint = open_checkpoint(golden), open_checkpoint(converted)
    assert checkpoint.config == original.config
    assert [e.key for e in checkpoint] == [e.key for e in original]
    assert "  5 safetensors files, 2,206,976 bytes, 1,942,592 parameters" in repr(checkpoint)
    assert checkpoint.layout == "safetensors"
    specs, mesh = param_specs(original.config), make_mesh(2, 4)
    assert stored_specs(checkpoint, specs) == specs
    a, b = (load_params(c, specs, mesh, progress=False) for c in (original, checkpoint))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.sharding == y.sharding
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_missing_and_truncated_files(damaged):
    shard = damaged / "model-00003-of-00005.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(damaged, str(shard), f"{len(content):,} bytes, as manifest.json says")
    shard.unlink()
    refused(damaged, str(shard), "found: none")
    shard.write_bytes(content)
    (damaged / "manifest.json").unlink()
    refused(damaged, "no manifest.json", "it goes on where it stopped")


def test_shards_of_two_checkpoints(damaged, golden, tmp_path):
    convert(golden, tmp_path / "other", dtype="bfloat16", shard_bytes=800_000, progress=False)
    other = min((tmp_path / "other").glob("*.safetensors"))
    mine = damaged / "model-00005-of-00005.safetensors"
    shutil.copy(other, mine)
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["files"][mine.name]["size"] = mine.stat().st_size
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    refused(damaged, "other metadata: the file is of another checkpoint")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(version=2), "version 2"),
        (lambda m: m.update(format="x"), "format 'x'"),
        (lambda m: m.update(files={"a": 1}), "a size and a sha256"),
        (lambda m: m.update(files={"../a": {"size": 1, "sha256": "0" * 64}}), "'../a'"),
        (lambda m: m["files"].pop("model-00002-of-00005.safetensors"), "none of this name"),
    ],
)
def test_bad_manifests(damaged, change, message):
    manifest = json.loads((damaged / "manifest.json").read_text())
    change(manifest)
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    refused(damaged, message)


def test_metadata_is_checked(converted, tmp_path):
    """A header that claims another model, with a size to match."""
    path = converted / "model-00001-of-00005.safetensors"
    notes = read_safetensors(path).metadata
    for change, message in [
        ({"version": "2"}, "version '2'"),
        ({"config": "["}, "config and storage"),
        ({"storage": "{}"}, "nothing on it"),
        ({"storage": json.dumps({"embedding.weight": "int8/1"})}, "a way to store embedding"),
        ({"storage": json.dumps({"embedding.weight": "float64"})}, "KeyError"),
    ]:
        target = tmp_path / message.replace(" ", "")
        target.mkdir()
        save_file({"x": np.zeros(2, np.float32)}, target / "m.safetensors", notes | change)
        size = (target / "m.safetensors").stat().st_size
        record = {"size": size, "sha256": "0" * 64}
        (target / "manifest.json").write_text(
            json.dumps({"format": "grokkit", "version": 1, "files": {"m.safetensors": record}})
        )
        refused(target, message)


def test_other_safetensors(tmp_path):
    save_file({"transformer.wte": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    refused(tmp_path, "transformer.wte", "a port of Grok-1")
