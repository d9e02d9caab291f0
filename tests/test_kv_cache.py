import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forward, random_model

import grokkit
from grokkit.errors import PromptError
from grokkit.kv_cache import KVCache, mark_visible, read, rounded, write
from grokkit.sharding import partition_spec

CONFIG = grokkit.GrokConfig(
    vocab_size=16, d_model=16, n_layers=3, n_heads=4, n_kv_heads=4, d_head=2, d_ff=16
)
KEYS = ("batch", "kv_head", "position", "d_head")


@pytest.fixture(scope="module")
def mesh():
    return grokkit.make_mesh(2, 4)


def test_empty_cache_shows_no_key_and_is_laid_out_over_the_mesh(mesh):
    cache = KVCache.empty(CONFIG, 4, 10, jnp.dtype(jnp.bfloat16), mesh)
    assert cache.capacity == 10
    assert cache.keys.shape == cache.values.shape == (3, 4, 4, 10, 2)
    assert cache.keys.dtype == cache.values.dtype == jnp.uint16  # the bits of a bfloat16
    exact = KVCache.empty(CONFIG, 4, 10, jnp.dtype(jnp.float32), mesh)
    assert exact.keys.dtype == exact.values.dtype == jnp.float32
    assert cache.keys.sharding.shard_shape(cache.keys.shape) == (3, 2, 1, 10, 2)
    assert not np.asarray(cache.visible).any() and cache.visible.shape == (4, 10)
    assert cache.length.tolist() == [0] * 4


def test_each_row_is_written_at_its_own_place_and_nowhere_else(mesh):
    random = np.random.default_rng(0)
    before = random.normal(size=(3, 4, 4, 10, 2)).astype(np.float32)
    new = random.normal(size=(4, 4, 3, 2)).astype(np.float32)
    start = np.array([0, 7, 2, 5], np.int32)
    expected = before.copy()
    for row in range(4):
        expected[1, row, :, start[row] : start[row] + 3] = new[row]
    on = {axes: jax.NamedSharding(mesh, partition_spec(axes)) for axes in [KEYS, ("layer", *KEYS)]}
    with jax.set_mesh(mesh):
        found = write(
            jax.device_put(before, on["layer", *KEYS]),
            jax.device_put(new, on[KEYS]),
            1,
            jax.device_put(start, jax.NamedSharding(mesh, partition_spec(["batch"]))),
        )
        one = read(found, 1)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(one, expected[1])
    assert found.sharding.spec == partition_spec(("layer", *KEYS))
    assert one.sharding.spec == partition_spec(KEYS)


def test_what_is_written_is_rounded_to_the_caches_dtype(mesh):
    new = np.full((2, 4, 1, 2), 1.001, np.float32)
    cache = KVCache.empty(CONFIG, 2, 4, jnp.dtype(jnp.bfloat16), mesh)
    with jax.set_mesh(mesh):
        rows = jax.device_put(new, jax.NamedSharding(mesh, partition_spec(KEYS)))
        found = read(write(cache.keys, rows, 0, cache.length), 0)[None]
    assert found.dtype == jnp.bfloat16
    assert (np.asarray(found, np.float32)[0, :, :, 0] == 1.0).all()
    for dtype in (jnp.bfloat16, jnp.float32):
        keys = KVCache.empty(CONFIG, 2, 4, jnp.dtype(dtype), mesh).keys
        np.testing.assert_array_equal(rounded(keys, rows), new.astype(jnp.dtype(dtype)))


def test_visibility_of_new_tokens_replaces_that_of_their_slots(mesh):
    visible = np.zeros((2, 6), bool)
    visible[:, :3] = True
    new = np.array([[True, False], [False, True]])
    start = np.array([2, 4], np.int32)
    with jax.set_mesh(mesh):
        on = jax.NamedSharding(mesh, partition_spec(("batch", "position")))
        found = mark_visible(
            jax.device_put(visible, on),
            jax.device_put(new, on),
            jax.device_put(start, jax.NamedSharding(mesh, partition_spec(["batch"]))),
        )
    expected = [[1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1]]
    np.testing.assert_array_equal(found, np.array(expected, bool))


def test_more_tokens_than_there_is_room_for_are_refused():
    mesh = grokkit.make_mesh(1, 1)
    model = random_model(CONFIG, 0, mesh)
    cache = KVCache.empty(CONFIG, 1, 6, jnp.dtype(jnp.float32), mesh)
    with pytest.raises(PromptError, match="room for 7 more tokens, found 6 of 6 places free"):
        forward(model, mesh, [[1] * 7], cache=cache)  # known when it is compiled
    cache = forward(model, mesh, [[1] * 4], cache=cache).cache
    with jax.set_mesh(mesh), pytest.raises(PromptError, match="3 more tokens, found 2 of 6"):
        model(jnp.ones((1, 3), jnp.int32), cache=cache)
