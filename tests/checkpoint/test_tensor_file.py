"""One tensor file: the golden bytes, CPython's own pickler, and damage."""

import io
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokkit.checkpoint import encoded_size, read_tensor, write_tensor
from grokkit.checkpoint.pickle_objects import Global, Payload
from grokkit.checkpoint.tensor_writer import layout, layout_size
from grokkit.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random_array(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)
    return raw.view(dtype).reshape(shape)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit, NaNs included."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_golden_files_come_back_byte_for_byte(golden_files, tmp_path):
    for path in golden_files:
        file = read_tensor(path)
        write_tensor(tmp_path / path.name, *(file.open(span)[:] for span in file.spans))
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
        scales_shape = None if file.scales is None else file.scales.shape
        size = encoded_size(file.weight.shape, file.weight.dtype, scales_shape)
        assert size == path.stat().st_size


def test_golden_description(golden_files):
    file = read_tensor(golden_files[3])
    assert str(file) == "int8[8, 88, 64] * bfloat16[8, 8, 64]"
    assert file.weight.offset == 199 and file.weight.nbytes == 8 * 88 * 64
    assert str(read_tensor(golden_files[0])) == "float32[256, 64]"


def test_header_of_a_large_array():
    """151 bytes before the official embedding's payload."""
    header, slot, tail = layout(((131072, 6144), np.dtype("float32")))
    assert isinstance(header, bytes) and len(header) == 151
    assert slot == Payload(131072 * 6144 * 4)
    assert isinstance(tail, bytes) and len(tail) == 14


def test_reading_touches_no_payload(tmp_path):
    """A gigabyte of payload, a hole in the file, is described with a few kilobytes."""
    shape = (1 << 28,)
    path = tmp_path / "large"
    with open(path, "wb") as file:
        for piece in layout((shape, np.dtype("float32"))):
            if isinstance(piece, Payload):
                file.seek(piece.nbytes, os.SEEK_CUR)
            else:
                file.write(piece)
    tracemalloc.start()
    description = read_tensor(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert description.weight.shape == shape
    assert peak < 100_000
    assert path.stat().st_blocks * 512 < 1_000_000  # still a hole


def test_payloads_beyond_four_gigabytes(tmp_path):
    """Above a u32 length the pickler takes another instruction; the reader knows it."""
    path = tmp_path / "huge"
    with open(path, "wb") as file:
        for piece in layout(((5, 1 << 30), np.dtype("int8"))):
            if isinstance(piece, Payload):
                file.seek(piece.nbytes, os.SEEK_CUR)
            else:
                file.write(piece)
    assert read_tensor(path).weight.nbytes == 5 << 30


# CPython's pickler as the judge of the writer. numpy 2 calls its function by another name.
NUMPY_2 = Global("numpy._core.multiarray", "_reconstruct")
AROUND_A_FRAME = [1, 127, 128, 255, 256, 32000, 65300, 65341, 65342, 65343, 65380, 65535, 65536,
                  65537, 70000, 200000]  # fmt: skip


def fill(pieces: list, arrays: list[np.ndarray]) -> bytes:
    rest = iter(arrays)
    return b"".join(next(rest).tobytes() if isinstance(p, Payload) else p for p in pieces)


def pickled(value: object) -> bytes:
    stream = io.BytesIO()
    pickle.dump(value, stream, protocol=4)
    return stream.getvalue()


class QuantizedWeight8bit:
    """Stands in for the original's class, under its name."""

    def __init__(self, weight: np.ndarray, scales: np.ndarray):
        self.weight = weight
        self.scales = scales


@pytest.fixture
def official_class(monkeypatch):
    monkeypatch.setattr(QuantizedWeight8bit, "__module__", "__main__")
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "QuantizedWeight8bit", QuantizedWeight8bit, raising=False)
    return QuantizedWeight8bit


@pytest.mark.parametrize("n", AROUND_A_FRAME)
@pytest.mark.parametrize("dtype", [np.dtype("int8"), np.dtype("float32"), BFLOAT16], ids=str)
def test_plain_arrays_as_cpython_pickles_them(n, dtype):
    array = random_array((n,), dtype)
    assert fill(layout((array.shape, dtype), reconstruct=NUMPY_2), [array]) == pickled(array)


@given(shape=st.lists(st.integers(1, 300), min_size=0, max_size=3).filter(
    lambda shape: np.prod(shape, dtype=int) < 500_000
).map(tuple))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_shape_as_cpython_pickles_it(shape):
    array = random_array(shape, np.dtype("int8"))
    assert fill(layout((shape, array.dtype), reconstruct=NUMPY_2), [array]) == pickled(array)


@pytest.mark.parametrize("k", AROUND_A_FRAME)
@pytest.mark.parametrize("n", [1, 2, 70000])
def test_quantised_weights_as_cpython_pickles_them(k, n, official_class):
    if k * n > 1 << 20:
        k = (1 << 20) // n
    weight = random_array((k, n), np.dtype("int8"))
    scales = random_array((1, n), BFLOAT16)
    pieces = layout((weight.shape, weight.dtype), (scales.shape, scales.dtype), NUMPY_2)
    assert fill(pieces, [weight, scales]) == pickled(official_class(weight, scales))
    assert layout_size(pieces) == len(fill(pieces, [weight, scales]))


@pytest.mark.parametrize("scale_bytes", [60000, 65000, 65200, 65340, 65400, 65534, 65536])
def test_frames_that_fill_up_on_the_scales(scale_bytes, official_class):
    n = scale_bytes // 2
    weight, scales = random_array((1, n), np.dtype("int8")), random_array((1, n), BFLOAT16)
    pieces = layout((weight.shape, weight.dtype), (scales.shape, scales.dtype), NUMPY_2)
    assert fill(pieces, [weight, scales]) == pickled(official_class(weight, scales))


def test_numpy_2_files_are_read(official_class, tmp_path):
    weight, scales = random_array((6, 4), np.dtype("int8")), random_array((2, 4), BFLOAT16)
    (tmp_path / "tensor").write_bytes(pickled(official_class(weight, scales)))
    file = read_tensor(tmp_path / "tensor")
    assert file.scales is not None
    assert same(file.open(file.weight)[:], weight) and same(file.open(file.scales)[:], scales)


def test_plain_python_unpickles_what_we_write(tmp_path):
    weight, scales = random_array((3, 70000), np.dtype("int8")), random_array((3, 70000), BFLOAT16)
    plain = random_array((5, 7), np.dtype("float32"))
    write_tensor(tmp_path / "quantised", weight, scales)
    write_tensor(tmp_path / "plain", plain)
    script = """
import pickle, sys
import numpy as np
class QuantizedWeight8bit:
    pass
q = pickle.load(open(sys.argv[1] + "/quantised", "rb"))
p = pickle.load(open(sys.argv[1] + "/plain", "rb"))
assert type(q) is QuantizedWeight8bit and list(vars(q)) == ["weight", "scales"]
for name, a in (("weight", q.weight), ("scales", q.scales), ("plain", p)):
    assert type(a) is np.ndarray
    print(name, a.dtype, a.shape)
    open(f"{sys.argv[1]}/{name}.raw", "wb").write(a.tobytes())
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        "weight int8 (3, 70000)",
        "scales bfloat16 (3, 70000)",
        "plain float32 (5, 7)",
    ]
    for name, array in (("weight", weight), ("scales", scales), ("plain", plain)):
        assert (tmp_path / f"{name}.raw").read_bytes() == array.tobytes()


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([np.dtype("int8"), np.dtype("float32"), BFLOAT16]),
    order=st.sampled_from(["C", "transposed", "strided"]),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_of_any_memory_order(shape, dtype, order, tmp_path_factory):
    path = tmp_path_factory.mktemp("roundtrip") / "tensor"
    if order == "transposed":
        array = random_array(shape, dtype).T
    elif order == "strided":
        array = random_array((shape[0] * 2, *shape[1:]), dtype)[::2]
    else:
        array = random_array(shape, dtype)
    write_tensor(path, array)
    file = read_tensor(path)
    assert file.scales is None
    assert same(np.asarray(file.open(file.weight)), array)


def test_writing_makes_no_second_copy(tmp_path):
    array = np.zeros((64, 1 << 20), np.int8)
    tracemalloc.start()
    write_tensor(tmp_path / "tensor", array)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("weight", "scales", "message"),
    [
        (np.zeros(3), None, r"expected: a dtype among float32, int8, bfloat16\n  found: float64"),
        (np.zeros(3, ">f4"), None, "found: >f4"),
        (np.zeros(3, object), None, "found: object"),
        (np.zeros((2, 0), np.float32), None, r"found: shape \(2, 0\)"),
        (np.zeros((1,) * 9, np.float32), None, "expected: at most 8 axes"),
        (np.zeros((4, 3), np.float32), np.zeros((1, 3), BFLOAT16), "float32 with bfloat16"),
        (np.zeros((4, 3), np.int8), np.zeros((1, 3), np.float32), "int8 with float32"),
        (np.zeros((4, 3), np.int8), np.zeros((3, 3), BFLOAT16), r"scales of shape \(3, 3\)"),
        (np.zeros((4, 3), np.int8), np.zeros((1, 4), BFLOAT16), r"scales of shape \(1, 4\)"),
        (np.zeros((2, 4, 3), np.int8), np.zeros((4, 3), BFLOAT16), r"scales of shape \(4, 3\)"),
        (np.zeros(4, np.int8), np.zeros(4, BFLOAT16), r"scales of shape \(4,\)"),
    ],
)
def test_arrays_that_the_format_does_not_hold(weight, scales, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as e:
        write_tensor(tmp_path / "tensor", weight, scales)
    assert str(e.value).startswith(f"{tmp_path / 'tensor'}\n  expected: ")
    assert "\n  what to do: " in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "tensor"
    write_tensor(path, np.ones(3, np.float32))
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "ascontiguousarray", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensor(path, np.zeros(3, np.float32))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


# Damage


def refused(path: Path, message: str) -> str:
    with pytest.raises(CheckpointError, match=message) as e:
        read_tensor(path)
    text = str(e.value)
    assert text.startswith(f"{path}\n  expected: ")
    assert "\n  found: " in text and "\n  what to do: " in text
    return text


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_every_truncation_is_refused(golden_files, number, tmp_path):
    whole = golden_files[number].read_bytes()
    path = tmp_path / "tensor"
    lengths = [*range(min(len(whole), 300)), len(whole) // 2, *range(len(whole) - 300, len(whole))]
    for length in sorted({n for n in lengths if n >= 0}):
        path.write_bytes(whole[:length])
        refused(path, "cut short|an empty file")
    path.write_bytes(whole[: len(whole) // 2])
    text = refused(path, "cut short, as by an unfinished download")
    assert f"found: a file of {len(whole) // 2:,} bytes" in text


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_bytes_after_the_end_are_refused(golden_files, number, tmp_path):
    whole = golden_files[number].read_bytes()
    path = tmp_path / "tensor"
    for extra in (b"\0", b".", whole):
        path.write_bytes(whole + extra)
        text = refused(path, "too long, as when two downloads were joined")
        assert f"{len(extra):,} bytes more" in text


def test_a_payload_of_another_length(golden_files, tmp_path):
    """The frame and the instruction say 4 bytes less than the shape: truncated on purpose."""
    whole = golden_files[1].read_bytes()
    assert whole[140:145] == b"B\x00\x01\x00\x00"  # 64 float32
    shorter = whole.replace(whole[2:11], b"\x95" + (391).to_bytes(8, "little"))
    shorter = shorter[:140] + b"B\xfc\x00\x00\x00" + shorter[145 : 145 + 252] + whole[401:]
    (tmp_path / "tensor").write_bytes(shorter)
    text = refused(tmp_path / "tensor", r"expected: 256 bytes for shape \(64,\) of float32")
    assert "found: a payload of 252 bytes at byte 145" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found: an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 24727\n",
         "a git-LFS pointer.*\n  what to do: run `git lfs pull`"),
        (b"<!DOCTYPE html><html>Not found</html>", "found: text: '<!DOCTYPE html>"),
        (b'{"error": "gated"}', "found: text: "),
        (b"PK\x03\x04" + b"\0" * 90, "found: a compressed archive"),
        (b"\0" * 5000, "zeros: space reserved by an unfinished download"),
        (pickle.dumps(np.zeros(3, np.float32), 5), "expected: a pickle of protocol 4"),
        (pickle.dumps(np.zeros(3, np.float32), 2), "expected: a pickle of protocol 4"),
        (pickle.dumps(np.zeros((2, 3), np.float32, order="F"), 4),
         "an array in C order.*\n.*Fortran order.*\n.*ascontiguousarray"),
        (pickle.dumps(np.zeros(3, ">f4"), 4), "little-endian.*\n.*big-endian"),
        (pickle.dumps(np.array([None, 1], object), 4), "dtype 'O8'"),
        (pickle.dumps(np.zeros(3, np.float64), 4), "expected: one of the dtypes.*\n.*dtype 'f8'"),
        (pickle.dumps(np.zeros(3, [("a", "f4")]), 4), "dtype 'V4'"),
        (pickle.dumps(np.zeros(3, np.uint8), 4), "dtype 'u1'"),
        (pickle.dumps(np.zeros((0, 3), np.float32), 4), r"positive integers\n  found: \(0, 3\)"),
        (pickle.dumps(np.float32(3), 4), "global 'numpy._core.multiarray.scalar'"),
        (pickle.dumps({"weight": 1}, 4), "instruction SETITEM"),
        (pickle.dumps([1, 2], 4), "instruction EMPTY_LIST"),
        (pickle.dumps("text", 4), "expected: one array or one quantised weight\n  found: 'text'"),
    ],
)  # fmt: skip
def test_other_content_is_named(content, message, tmp_path):
    (tmp_path / "tensor").write_bytes(content)
    refused(tmp_path / "tensor", message)


def test_not_a_file(tmp_path):
    refused(tmp_path, "a directory, pipe or device")
    refused(tmp_path / "none", "No such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "a directory, pipe or device")


def test_a_file_that_changes_while_in_use(golden_files, tmp_path):
    path = tmp_path / "tensor"
    path.write_bytes(golden_files[2].read_bytes())
    file = read_tensor(path)
    path.write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"the file of 46,766 bytes.*\n  found: 5 bytes"):
        file.open(file.weight)[0]
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        file.open(file.weight)[0]
