import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import float64, random_model, relative_error
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit.taps import Capture, Tap

CONFIG = grokkit.GrokConfig(
    vocab_size=16, d_model=16, n_layers=1, n_heads=4, n_kv_heads=4, d_head=4, d_ff=16,
    n_experts=6, n_experts_per_token=3,
)  # fmt: skip


@pytest.mark.parametrize("capture", [False, True], ids=["summed", "each expert kept"])
def test_is_the_definition_on_a_mesh_with_a_data_axis(capture):
    mesh = grokkit.make_mesh(2, 4)
    moe = jax.tree.map(lambda a: a[0], random_model(CONFIG, 0, mesh).blocks.moe)
    x = np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float32)

    @jax.jit
    def run(moe, x):
        tap = Tap((Capture("expert_outputs"),) if capture else ())
        out = moe(jax.reshard(x, P("data", None, None)), jnp.dtype(jnp.float32), tap)
        return out, tap.captured

    with jax.set_mesh(mesh):
        out, captured = run(moe, x)
    weights = {
        "layer/router/w": float64(moe.router),
        "layer/moe/linear/w": float64(moe.gate),
        "layer/moe/linear_v/w": float64(moe.value),
        "layer/moe/linear_1/w": float64(moe.out),
    }
    sites = {}
    expected = reference.moe(x.astype(np.float64), weights, "layer", CONFIG, sites)
    assert relative_error(out, expected) < 1e-6
    if capture:
        assert relative_error(captured["expert_outputs"], sites["expert_outputs"]) < 1e-6
