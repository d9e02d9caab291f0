"""What a model takes, said without it."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grokkit
from grokkit import cli
from grokkit.checkpoint import open_checkpoint
from grokkit.checkpoint.names import tensor_keys
from grokkit.cli_arguments import n_bytes
from grokkit.errors import ConfigError, PromptError
from grokkit.hlo import collectives
from grokkit.planning import plan

OFFICIAL_FILES = 318_239_886_140  # bytes, headers included


@pytest.fixture(scope="module")
def grok_1():
    return plan(machines=[(8, 40 * 10**9), (4, 10**9)])


def test_weights_are_the_official_files_less_their_headers(grok_1):
    keys = tensor_keys(grokkit.GROK_1)
    headers = 0
    for key in keys:
        payload = math.prod(key.shape) * key.dtype.itemsize
        payload += 0 if key.scales_shape is None else 2 * math.prod(key.scales_shape)
        headers += key.nbytes - payload
    assert sum(key.nbytes for key in keys) == OFFICIAL_FILES and 100 < headers / len(keys) < 400
    (weights,) = (row for row in grok_1.rows if row[0] == "weights")
    assert weights[2] == OFFICIAL_FILES - headers
    assert weights[2] / 8 < weights[3] < weights[2] / 8 * 1.001


def test_cache_exchanges_and_reading(grok_1):
    (cache,) = (row for row in grok_1.rows if row[0] == "KV cache")
    assert cache[2] == pytest.approx(2 * 2**30, rel=1e-4) and cache[3] < 1.001 * 2**28
    reduces = {c.kind: c for c in grok_1.collectives}["all-reduce"]
    assert reduces.count == 2 * 64  # after attention and after the experts
    assert reduces.nbytes == 2 * 64 * 6144 * 4
    # Two of eight experts, all else, the embedding as unembedding, the cache.
    experts = 64 * 8 * 3 * 6144 * 32768
    rest = OFFICIAL_FILES - experts + cache[2]
    assert grok_1.read_per_token == pytest.approx((experts / 4 + rest) / 8, rel=1e-2)


def test_what_fits_is_said(grok_1):
    temporaries = [row[3] for row in grok_1.rows if "temporaries" in row[0]]
    kept = [row[3] for row in grok_1.rows if "temporaries" not in row[0]]
    assert 0 < min(temporaries) < max(temporaries) < 2e9
    assert grok_1.bytes_per_device == sum(kept) + max(temporaries) and grok_1.fits
    forty, one = grok_1.verdicts
    assert forty.mesh == (1, 8) and forty.whole and not forty.fits
    assert one.mesh == (1, 4) and not one.whole and not one.fits
    assert one.needed == pytest.approx(2 * sum(kept), rel=0.02)
    for text in (repr(grok_1), grok_1._repr_html_()):
        assert f"{grok_1.bytes_per_device:,}" in text and "128 x all-reduce a token" in text
        takes = f"{forty.needed / 1e9:.1f}"  # what a program holds differs between processors
        assert f"8 x 40 GB, mesh 1,8: does NOT fit, it takes {takes} GB a device" in text
        assert "4 x 1 GB, mesh 1,4: does NOT fit, weights and cache alone take" in text


def test_the_figure_shows_what_the_table_says(grok_1):
    axes = grok_1.figure().axes[0]
    words = [text.get_text().strip() for text in axes.texts]
    assert words == [f"{v.needed / 1e9:.3g} GB: does not fit" for v in grok_1.verdicts]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "8 x 40 GB\nmesh 1,8", "4 x 1 GB\nmesh 1,4"
    ]  # fmt: skip
    kinds = dict(grok_1.verdicts[0].parts)
    assert kinds["temporaries"] == max(r[3] for r in grok_1.rows if "temporaries" in r[0])
    assert sum(kinds.values()) == grok_1.bytes_per_device
    bars = np.array([bar.get_width() for bar in axes.patches]).reshape(3, 2)
    np.testing.assert_allclose(bars[:, 0] * 1e9, list(kinds.values()))
    assert bars[2, 1] == 0  # of what does not fit anyhow, nothing was compiled


def test_captures_count(tiny_config):
    found = plan(tiny_config, (1, 2), 32, captures=("resid_post", "pattern"), machines=[])
    rows = {row[0]: row for row in found.rows}
    assert rows["capture resid_post"][2] == 2 * 32 * 32 * 4
    assert rows["capture pattern"][2:] == (2 * 8 * 32 * 32 * 4, 2 * 4 * 32 * 32 * 4)


def test_exchanges_in_loops_count_as_often_as_they_turn():
    mesh = grokkit.make_mesh(1, 2)

    def body(x, _):
        return jax.lax.psum(x, "model") * 0.5, None

    def run(x):
        return jax.lax.scan(lambda c, _: jax.lax.scan(body, c, length=3), x, length=5)[0]

    spec = jax.sharding.PartitionSpec()
    f = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = f.lower(jax.ShapeDtypeStruct((7, 3), jnp.float32)).compile().as_text()
    assert [(c.kind, c.count, c.nbytes) for c in collectives(text)] == [
        ("all-reduce", 15, 15 * 7 * 3 * 4)
    ]


def test_refused(tiny_config):
    with pytest.raises(PromptError, match="multiple of the mesh's 2 'data' devices, found 3"):
        plan(tiny_config, (2, 2), batch=3)
    with pytest.raises(PromptError, match="from 1 to the model's 96, found 97"):
        plan(tiny_config, (1, 2), context=97)
    with pytest.raises(ConfigError, match="needs 16 devices, found 8"):
        plan(tiny_config, (2, 8), batch=2)
    assert [n_bytes(t) for t in ("80GB", "40 GiB", "7")] == [80 * 10**9, 40 * 2**30, 7]
    with pytest.raises(SystemExit):
        cli.main(["plan", "--device-memory", "80 apples"])


def test_the_command(tmp_path, tiny_config):
    """In a process of its own: it tells JAX which devices there are."""
    tiny_config.to_json(tmp_path / "config.json")
    command = [sys.executable, "-m", "grokkit.cli", "plan", "--context=32", "--mesh=1,2"]
    own = [f"--config={tmp_path / 'config.json'}", "--capture=resid_post, pattern", "--capture=z",
           "--device-memory=100kB"]  # fmt: skip
    run = subprocess.run([*command, *own], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    expected = plan(tiny_config, (1, 2), 32, captures=("resid_post", "pattern", "z"),
                    device_memory=10**5)  # fmt: skip
    assert run.stdout.splitlines() == repr(expected).splitlines()
    assert "does NOT fit in 100 kB a device" in run.stdout
    assert "8 x 80 GB, mesh 1,8: fits" in run.stdout
    run = subprocess.run([*command, "--config=grok-2"], capture_output=True, text=True, check=False)
    assert run.returncode == cli.BAD_INPUT and "Traceback" not in run.stderr
    assert "expected grok-1, nano or a config.json, found no file 'grok-2'" in run.stderr


def test_a_checkpoint_counts_as_it_is_held(golden_dir, tmp_path):
    """Floats as floats; experts in 4 bits on disk are 8 bits in memory, with more scales."""
    grokkit.convert(golden_dir, tmp_path / "floats", dtype="bfloat16", progress=False)
    grokkit.convert(golden_dir, tmp_path / "int4", experts="int4", group_size=8, progress=False)
    for source in (golden_dir, tmp_path / "floats", tmp_path / "int4"):
        found = plan(open_checkpoint(source), (1, 1), 32, machines=[])
        lm = grokkit.load(source, grokkit.make_mesh(1, 1), progress=False)
        (weights,) = (row for row in found.rows if row[0] == "weights")
        assert weights[2] == weights[3] == sum(a.nbytes for a in jax.tree.leaves(lm.model))
