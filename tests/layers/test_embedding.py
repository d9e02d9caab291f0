import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit.layers.embedding import Embedding

FLOAT32 = jnp.dtype(jnp.float32)


def make(vocab, d_model, mesh):
    weight = np.random.default_rng(vocab).normal(size=(vocab, d_model)).astype(np.float32)
    sharding = jax.NamedSharding(mesh, P(None, "model"))
    return weight, Embedding(jax.device_put(jnp.asarray(weight), sharding))


@pytest.mark.parametrize("vocab", [24, 23], ids=["vocab divides", "vocab does not divide"])
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (1, 1)], ids=str)
def test_tokens_read_their_rows_and_logits_are_products_with_all_of_them(vocab, shape):
    mesh = grokkit.make_mesh(*shape)
    weight, embedding = make(vocab, 16, mesh)
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocab, (2, 5)).astype(np.int32)
    x = random.normal(size=(2, 5, 16)).astype(np.float32)
    with jax.set_mesh(mesh):
        rows = jax.reshard(jnp.asarray(tokens), P("data", None))
        found = embedding.embed(rows)
        logits = embedding.unembed(jax.reshard(jnp.asarray(x), P("data", None, None)), FLOAT32)
    np.testing.assert_array_equal(found, weight[tokens])
    assert found.sharding.spec == P("data", None, None)
    assert relative_error(logits, x.astype(np.float64) @ weight.T.astype(np.float64)) < 1e-6
    divides = vocab % mesh.shape["model"] == 0
    assert logits.sharding.spec == P("data", None, "model" if divides else None)
