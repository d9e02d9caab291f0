"""Opening a directory: what is accepted, and what each mistake is told."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from grokkit.checkpoint import open_checkpoint, read_tensor, tensor_keys, write_tensor
from grokkit.checkpoint.tensor_writer import layout
from grokkit.config import GROK_1, GrokConfig
from grokkit.errors import CheckpointError, ConfigError


def refused(directory: Path, *messages: str, config: GrokConfig | None = None) -> str:
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(directory, config)
    text = str(e.value)
    assert text.startswith(str(directory))
    assert [line.split(":")[0] for line in text.splitlines()[1:]] == [
        "  expected",
        "  found",
        "  what to do",
    ]
    for message in messages:
        assert message in text
    return text


def test_golden(golden, golden_names):
    checkpoint = open_checkpoint(golden)
    assert checkpoint.directory == golden
    assert checkpoint.config == GrokConfig.from_json(golden / "config.json")
    assert len(checkpoint) == 146
    assert checkpoint.nbytes == sum(f.stat().st_size for f in (golden / "ckpt-0").iterdir())
    assert [entry.key.name for entry in checkpoint] == golden_names
    assert checkpoint.tokenizer_file is None
    entry = checkpoint["transformer/decoder_layer_10/moe/linear/w"]
    assert entry.key.file_name == entry.file.path.name == "tensor00026_000"
    assert (entry.key.path, entry.key.layer) == ("blocks.moe.gate", 10)
    with pytest.raises(KeyError, match="no/such"):
        checkpoint["no/such"]


def test_repr_worth_reading(golden):
    lines = repr(open_checkpoint(golden)).splitlines()
    assert lines[0] == f"Checkpoint({str(golden)!r})"
    assert lines[1] == "  146 files, 2,204,552 bytes, 1,942,592 parameters"
    assert "12 layers, d_model 64, 16 heads of 8 (8 key/value), 8 experts of 88" in lines[2]
    assert len(lines) == 3 + 14
    assert lines[5].split("  ")[-1] == "12 x int8[8, 64, 88] * bfloat16[8, 1, 88]"
    entry = str(open_checkpoint(golden).entries[26])
    assert entry == (
        "tensor00026_000  blocks.moe.gate layer 10  int8[8, 64, 88] * bfloat16[8, 1, 88]  46,766 B"
    )


def test_the_folder_itself_and_relative_paths(golden, monkeypatch):
    whole = open_checkpoint(golden)
    assert open_checkpoint(golden / "ckpt-0") == whole
    assert open_checkpoint(str(golden)) == whole
    monkeypatch.chdir(golden / "ckpt-0")
    assert open_checkpoint(".") == whole
    assert open_checkpoint("..").entries[3].key == whole.entries[3].key
    monkeypatch.chdir(golden.parent)
    assert open_checkpoint("tiny") == whole


def test_files_behind_links(copy, tmp_path):
    """A download cache keeps the content elsewhere, under other names."""
    (tmp_path / "blobs").mkdir()
    for path in (copy / "ckpt-0").iterdir():
        shutil.move(path, tmp_path / "blobs" / f"{path.name[6:11]}abc")
        path.symlink_to(tmp_path / "blobs" / f"{path.name[6:11]}abc")
    assert len(open_checkpoint(copy)) == 146


def test_tokenizer_and_hidden_files(copy):
    (copy / "tokenizer.model").write_bytes(b"x")
    (copy / "ckpt-0" / ".DS_Store").write_bytes(b"x")
    assert open_checkpoint(copy).tokenizer_file == copy / "tokenizer.model"


def test_grok_1_without_config(tmp_path):
    """770 files of the official sizes (holes, no data) are Grok-1, config.json or not."""
    (tmp_path / "ckpt-0").mkdir()
    for key in tensor_keys(GROK_1):
        scales = None if key.scales_shape is None else (key.scales_shape, _BFLOAT16)
        with open(tmp_path / "ckpt-0" / key.file_name, "wb") as file:
            for piece in layout((key.shape, key.dtype), scales):
                if isinstance(piece, bytes):
                    file.write(piece)
                else:
                    file.truncate(file.tell() + piece.nbytes)
                    file.seek(0, 2)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == GROK_1
    assert checkpoint.nbytes == 318_239_886_140
    assert "770 files, 318,239,886,140 bytes, 31" in repr(checkpoint)


_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def test_not_a_checkpoint(tmp_path, copy):
    refused(tmp_path / "nowhere", "found: nothing", "give the directory that holds ckpt-0/")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "found: an empty directory", '--include "ckpt-0/*"')
    refused(copy.parent, f"what to do: give {copy} instead")
    refused(copy / "config.json", "found: a file")
    converted = tmp_path / "converted"
    converted.mkdir()
    (converted / "grok-1.gguf").write_bytes(b"")
    refused(converted, "grok-1.gguf", "this looks like a conversion")


def test_no_config_and_not_770_files(copy):
    (copy / "config.json").unlink()
    refused(
        copy,
        "the 770 files of Grok-1, or a config.json beside ckpt-0/",
        "found: 146 files and no config.json",
        '--include "ckpt-0/*"',
    )
    assert len(open_checkpoint(copy, _tiny_config())) == 146


def _tiny_config() -> GrokConfig:
    return GrokConfig.from_json(Path(__file__).parent.parent / "golden" / "tiny" / "config.json")


def test_missing_files(copy):
    (copy / "ckpt-0" / "tensor00005_000").unlink()
    text = refused(copy, "the 146 files tensor00000_000 to tensor00145_000", "12 layers")
    assert "found: tensor00005_000 missing" in text and "besides" not in text
    for i in range(50, 60):
        (copy / "ckpt-0" / f"tensor{i:05d}_000").unlink()
    refused(copy, "found: tensor00005_000, tensor00050_000, tensor00051_000 and 8 more missing")


def test_extra_files(copy):
    folder = copy / "ckpt-0"
    shutil.copy(folder / "tensor00001_000", folder / "tensor00146_000")
    refused(copy, "found: tensor00146_000 besides", "correct config.json if the model is larger")
    (folder / "tensor00146_000").rename(folder / "README.txt")
    refused(copy, "found: README.txt besides")


@pytest.mark.parametrize("name", ["tensor00005_001", "tensor5_000", "tensor00005_000.bin"])
def test_misnumbered_files(copy, name):
    (copy / "ckpt-0" / "tensor00005_000").rename(copy / "ckpt-0" / name)
    refused(
        copy,
        f"found: tensor00005_000 missing, and {name} instead",
        "give the files their official names back",
    )


def test_a_shift_of_all_numbers_is_found(copy):
    folder = copy / "ckpt-0"
    for i in reversed(range(146)):
        (folder / f"tensor{i:05d}_000").rename(folder / f"tensor{i + 1:05d}_000")
    refused(copy, "tensor00000_000 missing, and tensor00146_000 instead")


def test_swapped_files(copy):
    folder = copy / "ckpt-0"
    (folder / "tensor00002_000").rename(folder / "x")
    (folder / "tensor00003_000").rename(folder / "tensor00002_000")
    (folder / "x").rename(folder / "tensor00003_000")
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(copy)
    assert str(e.value) == (
        f"{folder / 'tensor00002_000'}\n"
        f"  expected: transformer/decoder_layer_0/moe/linear/w (blocks.moe.gate of layer 0): "
        f"int8[8, 64, 88] * bfloat16[8, 1, 88]\n"
        f"  found: int8[8, 88, 64] * bfloat16[8, 8, 64]\n"
        f"  what to do: check that config.json describes this checkpoint, and that no file was "
        f"renamed: the layers are numbered 0, 1, 10, 11, ..., 2, 20, ..."
    )


@pytest.mark.parametrize(
    ("number", "arrays", "found"),
    [
        (0, [np.zeros((256, 63), np.float32)], "found: float32[256, 63]"),
        (0, [np.zeros((64, 256), np.float32)], "found: float32[64, 256]"),
        (0, [np.zeros((256, 64), _BFLOAT16)], "found: bfloat16[256, 64]"),
        (1, [np.zeros((64, 1), np.float32)], "found: float32[64, 1]"),
        (5, [np.zeros((64, 64), np.int8)], "found: int8[64, 64]"),
        (5, [np.zeros((64, 64), np.float32)], "found: float32[64, 64]"),
        (5, [np.zeros((64, 64), np.int8), np.zeros((8, 64), _BFLOAT16)],
         "found: int8[64, 64] * bfloat16[8, 64]"),
        (6, [np.zeros((128, 64), np.int8), np.zeros((1, 64), _BFLOAT16)],
         "(blocks.attention.out of layer 0): int8[128, 64] * bfloat16[8, 64]\n  found: "),
        (13, [np.zeros((64, 8), np.int8), np.zeros((1, 8), _BFLOAT16)],
         "found: int8[64, 8] * bfloat16[1, 8]"),
    ],
)  # fmt: skip
def test_wrong_shape_dtype_or_grouping(copy, number, arrays, found):
    path = copy / "ckpt-0" / f"tensor{number:05d}_000"
    before = read_tensor(path)
    write_tensor(path, *arrays)
    assert read_tensor(path) != before
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(copy)
    assert str(e.value).startswith(f"{path}\n  expected: ")
    assert found in str(e.value)


def test_scales_of_another_dtype(copy):
    """Float32 scales, as the writer refuses to make: spliced from two streams."""
    path = copy / "ckpt-0" / "tensor00005_000"
    whole = path.read_bytes()
    bfloat16 = b"\x8c\x09ml_dtypes\x94\x8c\x08bfloat16\x94\x93\x94"
    assert bfloat16 in whole
    spliced = whole.replace(bfloat16, b"\x8c\x02f4\x94")
    spliced = spliced.replace(b"\x01<\x94NNNK\x02K\x02K\x40", b"\x01<\x94NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00")  # fmt: skip
    start = spliced.index(b"C\x80")
    spliced = spliced[:start] + b"B\x00\x01\x00\x00" + bytes(256) + spliced[start + 130 :]
    spliced = b"\x80\x04" + spliced[11:]  # frames are optional
    path.write_bytes(spliced)
    assert str(read_tensor(path)) == "int8[64, 64] * float32[1, 64]"
    with pytest.raises(CheckpointError, match=r"found: int8\[64, 64\] \* float32\[1, 64\]"):
        open_checkpoint(copy)


def test_a_config_of_another_model(copy):
    config = json.loads((copy / "config.json").read_text())
    config["model"]["num_layers"] = 13
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "158 files", "13 layers", "tensor00146_000, tensor00147_000")
    config["model"]["num_layers"] = 12
    config["vocab_size"] = 257
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"float32\[257, 64\]\n  found: float32\[256, 64\]"):
        open_checkpoint(copy)
    config["model"]["num_layers"] = 10**12
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="n_layers"):
        open_checkpoint(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json"):
        open_checkpoint(copy)


def test_an_explicit_config_wins(golden):
    other = dataclasses.replace(_tiny_config(), n_layers=11)
    refused(golden, "tensor00134_000, tensor00135_000, tensor00136_000 and 9 more", config=other)


@pytest.mark.parametrize("suffix", [".incomplete", ".part", ".aria2", ".crdownload"])
@pytest.mark.parametrize("config", [True, False])
def test_unfinished_downloads(copy, suffix, config):
    path = copy / "ckpt-0" / "tensor00005_000"
    path.rename(path.with_name(path.name + suffix))
    if not config:
        (copy / "config.json").unlink()
    refused(
        copy,
        "expected: a finished download",
        f"unfinished files: tensor00005_000{suffix}",
        "start the download again with the same command",
    )


def test_unfinished_download_in_the_hub_cache(copy):
    cache = copy / ".cache" / "huggingface" / "download" / "ckpt-0"
    cache.mkdir(parents=True)
    (cache / "abc.def.incomplete").write_bytes(b"x")
    assert len(open_checkpoint(copy)) == 146  # a leftover of a download that was finished later
    (copy / "ckpt-0" / "tensor00005_000").unlink()
    refused(copy, "unfinished files: abc.def.incomplete")


def test_pointers_instead_of_files(copy):
    for path in (copy / "ckpt-0").iterdir():
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"tensor00000_000\n.*\n.*git-LFS pointer.*\n.*pull"):
        open_checkpoint(copy)
