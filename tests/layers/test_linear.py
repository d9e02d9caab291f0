import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import float64, in_a_file, relative_error
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit.layers import linear
from grokkit.layers.linear import column_parallel, row_parallel
from grokkit.quant import QuantizedArray, dequantize, index, layout
from grokkit.quantised_matmul import plain

FLOAT32 = jnp.dtype(jnp.float32)


def make(mesh, k, n, groups, cut):
    random = np.random.default_rng(k)
    weight = random.integers(-127, 128, (n, k)).astype(np.int8)
    scales = random.uniform(0.01, 1, (groups, n)).astype(ml_dtypes.bfloat16)
    q = QuantizedArray(jnp.asarray(weight), jnp.asarray(scales))
    return jax.tree.map(
        lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec)), q, layout(q, cut)
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 4), (1, 8)], ids=str)
@pytest.mark.parametrize(
    "function, groups, cut, x_spec, out_spec",
    [
        (column_parallel, 1, "n", P("data"), P("data", None, "model")),
        # Eight groups whatever the number of devices: each device holds its own rows' groups.
        (row_parallel, 8, "k", P("data", None, "model"), P("data", None, None)),
    ],
    ids=["column_parallel", "row_parallel"],
)
def test_is_the_product_on_any_mesh(function, groups, cut, x_spec, out_spec, shape):
    mesh = grokkit.make_mesh(*shape)
    w = make(mesh, 32, 16, groups, cut)
    x = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    with jax.set_mesh(mesh):
        found = function(jax.device_put(x, jax.NamedSharding(mesh, x_spec)), w, FLOAT32)
    assert relative_error(found, x.astype(np.float64) @ float64(w)) < 1e-6
    assert found.sharding.spec == out_spec


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("form", ["matmul", "plain"])
@pytest.mark.parametrize("k_first", [True, False], ids=["as [k, n]", "as [n, k]"])
@pytest.mark.parametrize("n", [768, 1536], ids=["parts of lines", "whole lines"])
@pytest.mark.parametrize(
    "function, groups, cut, x_spec",
    [(column_parallel, 2, "n", P("data")), (row_parallel, 16, "k", P("data", None, "model"))],
    ids=["column_parallel", "row_parallel"],
)
def test_each_device_finds_its_part_in_a_files_bytes(
    function, groups, cut, x_spec, n, k_first, form, shape, monkeypatch
):
    """Of one matrix of a stack, with few rows and with many; the same products and gradients as of
    parts that lie by themselves, but for the order of sums."""
    if form == "plain":
        monkeypatch.setattr(linear, "matmul", plain_of_rows)
    mesh, k = grokkit.make_mesh(*shape), 512
    alone = make(mesh, k, n, groups, cut)
    random = np.random.default_rng(0)
    other = QuantizedArray(jnp.full((n, k), 77, jnp.int8), jnp.ones((groups, n), jnp.bfloat16))
    host = jax.tree.map(lambda *both: jnp.asarray(np.stack(both)), other, jax.device_get(alone))
    stored = in_a_file(host, k_first)
    np.testing.assert_array_equal(dequantize(stored), dequantize(host))
    stored = jax.tree.map(
        lambda a, spec: jax.device_put(a, jax.NamedSharding(mesh, spec)),
        stored,
        layout(stored, cut),
    )

    def weighted(x, w, dy):
        found = function(x, w, FLOAT32)
        return jnp.sum(found * dy), found

    run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
    with jax.set_mesh(mesh):
        for rows in (3, 40):
            x, dy = (random.normal(size=(2, rows, m)).astype(np.float32) for m in (k, n))
            placed = jax.device_put(x, jax.NamedSharding(mesh, x_spec))
            w = index(stored, jnp.int32(1))
            (_, found), gradient = run(placed, w, dy)
            (_, expected), its_gradient = run(placed, alone, dy)
            assert relative_error(found, x.astype(np.float64) @ float64(alone)) < 1e-6
            assert relative_error(found, expected) < 1e-6
            assert relative_error(gradient, dy.astype(np.float64) @ float64(alone).T) < 1e-6
            assert relative_error(gradient, its_gradient) < 1e-6
            assert found.sharding == expected.sharding
            assert gradient.sharding.is_equivalent_to(placed.sharding, 3)


def plain_of_rows(x, w, dtype):
    """The definition, as `matmul` is called."""
    return plain(x.reshape(-1, x.shape[-1]), w, dtype).reshape(*x.shape[:-1], -1)
