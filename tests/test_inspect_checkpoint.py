import json

import jax
import pytest

import grokkit
from grokkit.checkpoint import open_checkpoint
from grokkit.inspect_checkpoint import checkpoint_layout


@pytest.fixture(scope="module")
def golden(golden_dir):
    return open_checkpoint(golden_dir)


def test_every_tensor_is_listed_once_with_its_bytes(golden, golden_dir):
    rows = checkpoint_layout(golden, 1, 8).rows
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    official = json.loads((golden_dir / "names.json").read_text())
    assert [n for n in names if not n.endswith(".scales")] == official
    # What is in the files beside the arrays is their headers, of a few hundred bytes each.
    on_disk = sum(path.stat().st_size for path in (golden_dir / "ckpt-0").iterdir())
    assert 0 < on_disk - sum(row.nbytes for row in rows) < 400 * len(golden)


@pytest.mark.parametrize("data, model", [(1, 1), (1, 8), (2, 4)])
def test_layout_is_what_loading_makes(golden, golden_dir, data, model):
    layout = checkpoint_layout(golden, data, model)
    lm = grokkit.load(golden_dir, mesh=grokkit.make_mesh(data, model), progress=False)
    leaves = jax.tree.leaves(lm.model)
    assert layout.nbytes == sum(a.nbytes for a in leaves)
    for device in lm.mesh.devices.flat:
        held = [s.data.nbytes for a in leaves for s in a.addressable_shards if s.device == device]
        assert layout.bytes_per_device == sum(held)

    query = lm.model.blocks.attention.query
    rows = {row.name: row for row in layout.rows}
    name = "transformer/decoder_layer_3/multi_head_attention/query/w"
    n, k = query.weight.addressable_shards[0].data.shape[1:]
    assert rows[name].local_shape == (k, n)  # as in the file; the model holds it [n, k]
    assert rows[f"{name}.scales"].local_shape == query.scales.addressable_shards[0].data.shape[1:]


def test_no_device_is_needed(golden):
    here, elsewhere = checkpoint_layout(golden, 1, 8), checkpoint_layout(golden, 1000, 8)
    assert elsewhere.rows == here.rows  # weights are copied along `data`
    assert "on each of 8000 devices" in repr(elsewhere)


def test_table(golden):
    layout = checkpoint_layout(golden, 1, 8)
    shown = repr(layout)
    lines = shown.splitlines()
    assert "mesh of data=1 x model=8" in shown
    assert lines[4].split() == ["name", "shape", "dtype", "bytes", "on", "each", "device"]
    assert len({line.index("float32") for line in lines if "float32" in line}) == 1
    assert all(f"{row.nbytes:,}" in shown and row.name in shown for row in layout.rows)


@pytest.mark.parametrize("data, model", [(1, 3), (1, 16), (0, 1), (1, 0)])
def test_a_mesh_that_does_not_fit(golden, data, model):
    with pytest.raises(grokkit.GrokkitError, match="'model' axis divides 8|at least 1"):
        checkpoint_layout(golden, data, model)
