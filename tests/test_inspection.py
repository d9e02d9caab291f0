"""Caches and bills: finding, cutting, saving and adding up activations."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import grokkit
from grokkit import ActivationCache, Capture
from grokkit.errors import SiteError
from grokkit.inspection import entropy

TEXT = "The quick brown fox"


@pytest.fixture(scope="module")
def cache(tiny_lm) -> ActivationCache:
    return tiny_lm.run_with_cache(TEXT)[1]


def test_three_ways_to_name_an_activation(cache):
    pattern = np.asarray(cache["pattern"])
    assert pattern.ndim == 5
    np.testing.assert_array_equal(cache["pattern", 1], pattern[1])
    np.testing.assert_array_equal(cache["pattern", -1], pattern[1])
    np.testing.assert_array_equal(cache["blocks.1.attn.hook_pattern"], pattern[1])
    np.testing.assert_array_equal(cache["hook_embed"], cache["embed"])


def test_every_site_is_there_with_its_axes(cache, tiny_lm):
    assert list(cache) == list(grokkit.SITES)
    n = len(tiny_lm.tokenizer.encode(TEXT))
    sizes = {"layer": 2, "batch": 1, "position": n, "query": n, "key": n, "d_model": 32,
             "head": 8, "kv_head": 8, "d_head": 4, "expert": 8, "choice": 2,
             "vocab": tiny_lm.config.vocab_size}  # fmt: skip
    for name, entry in cache.entries.items():
        assert entry.value.shape == tuple(sizes[axis] for axis in entry.axes), name


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("nothing", "has no 'nothing'; it has embed"),
        (("pattern", 2), r"captured in layers \[0, 1\], not 2"),
        (("embed", 0), "not in a layer"),
    ],
)
def test_missing_activations(cache, key, message):
    with pytest.raises(SiteError, match=message):
        cache[key]


def test_captured_layers_keep_their_numbers(tiny_lm):
    _, cache = tiny_lm.run_with_cache(TEXT, [Capture("z", layers=[1])])
    assert cache["z"].shape[0] == 1
    np.testing.assert_array_equal(cache["z", 1], cache["z"][0])
    with pytest.raises(SiteError, match="not 0"):
        cache["z", 0]


def test_a_reduction_runs_inside(tiny_lm, cache):
    wanted = Capture("pattern", layers=[1], positions=-1, reduce=entropy, name="last entropy")
    _, reduced = tiny_lm.run_with_cache(TEXT, wanted)
    p = np.asarray(cache["pattern"], np.float64)[1:, :, :, -1]
    expected = -np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)
    np.testing.assert_allclose(reduced["last entropy"], expected, rtol=1e-5)


def test_a_reduction_may_return_a_tree(tiny_lm, cache):
    def extremes(x):
        return {"largest": jnp.max(x), "smallest": jnp.min(x)}

    _, reduced = tiny_lm.run_with_cache(TEXT, Capture("resid_post", reduce=extremes))
    largest = np.asarray(cache["resid_post"]).max(axis=(1, 2, 3))
    np.testing.assert_allclose(reduced["resid_post"]["largest"], largest, rtol=1e-5)


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (1, 1)])
def test_bill_equals_the_arrays(tiny_lm, mesh):
    from grokkit.model import place

    on = grokkit.make_mesh(*mesh)
    lm = grokkit.LanguageModel(place(tiny_lm.model, on), on, tiny_lm.tokenizer)
    captures = ["pattern", "router_probs", "logits", Capture("z", layers=[0], positions=[1, 2])]
    captures[3] = Capture("z", layers=[0], positions=[1, 2])
    texts = [TEXT, TEXT]
    bill = lm.bill(texts, captures)
    _, cache = lm.run_with_cache(texts, captures)
    assert bill.nbytes == cache.nbytes
    for name, _, total, local in bill.rows:
        array = cache[name]
        assert total == array.nbytes
        assert local == max(s.data.nbytes for s in array.addressable_shards)
    assert bill.bytes_per_device == sum(row[3] for row in bill.rows)
    assert "total" in repr(bill)
    assert f"{bill.nbytes:,}" in bill._repr_html_()


def test_the_bill_computes_nothing(tiny_lm, monkeypatch):
    """Also of a model whose arrays are only shapes."""
    import jax

    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tiny_lm.model
    )
    abstract = grokkit.LanguageModel(shapes, tiny_lm.mesh, tiny_lm.tokenizer)
    assert abstract.bill(TEXT, "pattern").rows == tiny_lm.bill(TEXT, "pattern").rows


def test_slices(cache):
    cut = cache.slice("layer", [1]).slice("batch", 0).slice("position", slice(1, 3))
    assert cut["z"].shape[:2] == (1, 2)
    np.testing.assert_array_equal(cut["z", 1], np.asarray(cache["z"])[1, 0, 1:3])
    np.testing.assert_array_equal(cut["pattern", 1], np.asarray(cache["pattern"])[1, 0, :, 1:3])
    assert cut.entries["pattern"].axes == ("layer", "head", "query", "key")
    head = cache.slice("head", 3)
    np.testing.assert_array_equal(head["q"], np.asarray(cache["q"])[:, :, :, 3])
    np.testing.assert_array_equal(head["k"], cache["k"])  # has no such axis
    with pytest.raises(SiteError, match="no activation in this cache has an axis 'colour'"):
        cache.slice("colour", 0)
    with pytest.raises(SiteError, match="no layer 7"):
        cache.slice("layer", 7)


def test_saved_and_loaded(cache, tmp_path):
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    again = ActivationCache.load(path)
    assert list(again) == list(cache)
    for name, entry in cache.entries.items():
        np.testing.assert_array_equal(again[name], entry.value)
        assert again.entries[name].axes == entry.axes
        assert again.entries[name].layers == entry.layers
    assert repr(again) == repr(cache)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(SiteError, match="other.safetensors"):
        ActivationCache.load(path)
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(SiteError, match="expected a safetensors file that ActivationCache.save"):
        ActivationCache.load(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(SiteError, match="other.safetensors"):
        ActivationCache.load(path)


def test_trees_cannot_be_saved(tiny_lm, tmp_path):
    _, cache = tiny_lm.run_with_cache(TEXT, Capture("embed", reduce=lambda x: (x, x)))
    with pytest.raises(SiteError, match="only single arrays"):
        cache.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_cache_shows_itself(cache):
    assert f"{cache.nbytes:,} bytes" in repr(cache)
    page = cache._repr_html_()
    assert "<code>router_probs</code>" in page
    assert "layer batch position expert" in page


def test_on_the_host(cache):
    assert all(isinstance(a, np.ndarray) for _, a in cache.to_host().items())


@pytest.mark.parametrize(
    ("captures", "message"),
    [
        ([], "at least one capture"),
        (["z", Capture("z", layers=[0])], "two captures are called 'z'"),
        (["resid"], "no activation site 'resid'"),
        ([Capture("z", layers=[2])], "there is no layer 2"),
        ([Capture("z", positions=[99])], "there is no position 99"),
    ],
)
def test_bad_captures(tiny_lm, captures, message):
    with pytest.raises(SiteError, match=message):
        tiny_lm.run_with_cache(TEXT, captures)
