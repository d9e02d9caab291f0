import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import float64, relative_error
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit.kernels import cpu
from grokkit.layers.linear import column_parallel, row_parallel
from grokkit.quant import QuantizedArray, layout

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


@pytest.mark.parametrize(
    "function, groups, cut, x_spec",
    [(column_parallel, 2, "n", P("data")), (row_parallel, 8, "k", P("data", None, "model"))],
    ids=["column_parallel", "row_parallel"],
)
@pytest.mark.parametrize("rows", [3, 40])
def test_on_each_device_kernels_multiply_its_part_and_have_gradients(
    function, groups, cut, x_spec, rows, monkeypatch
):
    monkeypatch.setattr(cpu, "WORTH_IT", 1)
    mesh, k, n = grokkit.make_mesh(2, 4), 512, 768
    w = make(mesh, k, n, groups, cut)
    random = np.random.default_rng(0)
    x, dy = (random.normal(size=(2, rows, m)).astype(np.float32) for m in (k, n))

    def weighted(x, w, dy):
        found = function(x, w, FLOAT32)
        return jnp.sum(found * dy), found

    run = jax.jit(jax.value_and_grad(weighted, has_aux=True))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, x_spec))
        assert "grokkit_product" in run.lower(placed, w, dy).as_text()
        (_, found), gradient = run(placed, w, dy)
        assert relative_error(found, x.astype(np.float64) @ float64(w)) < 1e-6
        assert relative_error(gradient, dy.astype(np.float64) @ float64(w).T) < 1e-6
        assert gradient.sharding.is_equivalent_to(placed.sharding, 3)
