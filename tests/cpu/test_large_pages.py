"""Working memory in large pages."""

import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grokkit.cpu import in_large_pages, is_there

pytestmark = pytest.mark.skipif(not is_there(), reason="this system has no loops of our own")

N = 1 << 24  # entries of what the program works with: 64 MB
CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def program(n_bytes):
    @jax.jit
    def run(x):
        x = in_large_pages(x, n_bytes)
        long = jnp.sin(jnp.resize(x, N))
        return jnp.cumsum(long)[:: N // 4] + jnp.max(long) + x[:4]

    return run


def pages_touched(run):
    x = jnp.arange(64.0)
    run(x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.parametrize("n_bytes", [0, 1000, 3 * 4 * N])
def test_a_program_gives_the_same(n_bytes):
    x = jnp.arange(64.0)
    np.testing.assert_array_equal(program(n_bytes)(x), program(0)(x))
    np.testing.assert_array_equal(x, np.arange(64.0))


def test_a_program_touches_fewer_pages():
    if not sys.platform.startswith("linux") or "[madvise]" not in CHOICE.read_text():
        pytest.skip("this system does not give large pages to those who ask alone")
    plain = pages_touched(program(0))
    assert plain > 4 * N // 4096  # or XLA kept the memory
    assert pages_touched(program(3 * 4 * N)) < plain / 4


def test_what_is_small_is_left_alone():
    assert (
        "custom_call" not in jax.jit(lambda x: in_large_pages(x, 1000)).lower(jnp.ones(4)).as_text()
    )
