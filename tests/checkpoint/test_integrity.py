import ml_dtypes
import numpy as np
import pytest

from grokkit.checkpoint import (
    check_finite,
    integrity,
    open_checkpoint,
    read_tensor,
    write_tensor,
)
from grokkit.errors import CheckpointError


def poison(path, which: int, index: tuple[int, ...], value: float) -> None:
    file = read_tensor(path)
    arrays = [np.array(file.open(span)) for span in file.spans]
    arrays[which][index] = value
    write_tensor(path, *arrays)


def test_golden_is_finite(golden, capsys):
    check_finite(open_checkpoint(golden))
    assert "checking tiny" in capsys.readouterr().err
    check_finite(open_checkpoint(golden), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_each_kind_is_found(copy, monkeypatch, chunk):
    monkeypatch.setattr(integrity, "_CHUNK", chunk)
    folder = copy / "ckpt-0"
    poison(folder / "tensor00000_000", 0, (200, 7), np.nan)
    poison(folder / "tensor00000_000", 0, (3, 9), np.inf)
    poison(folder / "tensor00001_000", 0, (63,), -np.inf)
    poison(folder / "tensor00026_000", 1, (5, 0, 80), float("nan"))
    with pytest.raises(CheckpointError) as e:
        check_finite(open_checkpoint(copy), progress=False)
    assert str(e.value) == (
        f"{copy}\n  expected: finite weights and scales\n"
        "  found: NaN or infinity in 3 arrays:\n"
        "    tensor00000_000 (language_model/in_out_embed/embeddings): 2 in its weight, "
        "the first at [3, 9]\n"
        "    tensor00001_000 (language_model/rms_norm/scale): 1 in its weight, "
        "the first at [63]\n"
        "    tensor00026_000 (transformer/decoder_layer_10/moe/linear/w): 1 in its scales, "
        "the first at [5, 0, 80]\n"
        "  what to do: download these files again; if you wrote them, look at the training run"
    )


def test_largest_finite_scale_is_finite(copy):
    poison(copy / "ckpt-0" / "tensor00005_000", 1, (0, 0), ml_dtypes.finfo("bfloat16").max)
    check_finite(open_checkpoint(copy), progress=False)


def test_a_long_list_is_cut(copy):
    for i in range(2, 32, 2):
        path = copy / "ckpt-0" / f"tensor{i:05d}_000"
        which = 0 if read_tensor(path).scales is None else 1
        poison(path, which, (0,), np.nan)
    with pytest.raises(
        CheckpointError, match=r"in 15 arrays:(\n    .*){10}\n    and 5 more arrays"
    ):
        check_finite(open_checkpoint(copy), progress=False)
