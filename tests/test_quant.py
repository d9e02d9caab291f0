"""8-bit weights against their definition in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grokkit.errors import GrokkitError
from grokkit.quant import QuantizedArray, dequantize, index, matmul, quantize

FEW = settings(max_examples=25, deadline=None)


def make(seed, *shape, groups=1):
    """Random int8 values and scales, of a few shapes so that little is compiled."""
    random = np.random.default_rng(seed)
    *lead, _, n = shape
    weight = random.integers(-128, 128, shape).astype(np.int8)
    scales = random.uniform(0.001, 0.1, (*lead, groups, n)).astype(ml_dtypes.bfloat16)
    return QuantizedArray(jnp.asarray(weight), jnp.asarray(scales))


def exact(q):
    return reference.dequantize(np.asarray(q.weight), np.asarray(q.scales))


matrices = st.sampled_from([((12, 3), 1), ((12, 3), 4), ((2, 12, 3), 3)]).flatmap(
    lambda shape_groups: st.tuples(
        hnp.arrays(
            np.float32,
            shape_groups[0],
            elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False),
        ),
        st.just(shape_groups[1]),
    )
)


@given(matrices)
@FEW
def test_quantised_entries_are_the_nearest_multiples_of_their_groups_scale(matrix):
    w, groups = matrix
    q = quantize(jnp.asarray(w), groups)
    assert (q.weight.dtype, q.scales.dtype) == (jnp.int8, jnp.bfloat16)
    assert q.shape == w.shape and q.groups == groups
    *lead, k, n = w.shape
    grouped = w.astype(np.float64).reshape(*lead, groups, k // groups, n)
    largest = np.abs(grouped).max(axis=-2)
    scales = np.asarray(q.scales, np.float64)
    # The scale is a bfloat16, of 8 significant bits, of the largest entry over 127.
    np.testing.assert_allclose(scales, largest / 127, rtol=2**-8, atol=1e-38)
    error = np.abs(exact(q).reshape(grouped.shape) - grouped)
    # Half a step; at the top also what rounding the scale down cut off.
    bound = np.maximum(0.5 * scales, largest - 127 * scales)[..., None, :]
    assert (error <= bound * (1 + 1e-6) + 1e-38).all()


@given(matrices)
@FEW
def test_quantising_again_changes_nothing(matrix):
    w, groups = matrix
    once = dequantize(quantize(jnp.asarray(w), groups))
    twice = dequantize(quantize(once, groups))
    # The largest entry need not be 127 scales any more, so the scale may move by its rounding.
    largest = np.abs(np.asarray(once)).max(initial=0)
    np.testing.assert_allclose(twice, once, atol=float(largest) * 2**-7)


def test_groups_are_consecutive_rows_with_scales_of_their_own():
    w = np.ones((8, 2), np.float32)
    w[4:] *= 1000  # the second of two groups
    w[:, 1] *= 10
    q = quantize(jnp.asarray(w), 2)
    assert (np.asarray(q.weight) == 127).all()
    np.testing.assert_allclose(
        np.asarray(q.scales, np.float32), np.array([[1, 10], [1000, 10000]]) / 127, rtol=2**-8
    )


def test_nothing_but_zeros_stays_zeros():
    q = quantize(jnp.zeros((4, 3)), 2)
    assert (np.asarray(q.weight) == 0).all() and (np.asarray(q.scales) == 0).all()
    assert (np.asarray(dequantize(q)) == 0).all()


@pytest.mark.parametrize("groups", [0, -1, 5, 9])
def test_groups_that_do_not_divide_are_refused(groups):
    message = rf"groups must divide the contracting axis of 8, found {groups}"
    with pytest.raises(GrokkitError, match=message):
        quantize(jnp.zeros((8, 3)), groups)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8]))
@FEW
def test_dequantise_is_the_definition_to_rounding(seed, groups):
    q = make(seed, 3, 16, 5, groups=groups)
    found = dequantize(q)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact(q), rtol=1e-6)
    rounded = np.asarray(dequantize(q, jnp.dtype(jnp.bfloat16)), np.float64)
    np.testing.assert_allclose(rounded, exact(q), rtol=2**-8)


def products(x, q):
    """x @ w in float64, and how large the terms summed are: what rounding is measured against."""
    return x.astype(np.float64) @ exact(q), np.abs(x).astype(np.float64) @ np.abs(exact(q))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 8]), st.sampled_from([(), (3,), (2, 3)]))
@FEW
def test_matmul_is_the_product_with_the_dequantised_matrix(seed, groups, rows):
    q = make(seed, 16, 5, groups=groups)
    x = np.random.default_rng(seed).normal(size=(*rows, 16)).astype(np.float32)
    expected, size = products(x, q)
    found = jax.jit(matmul, static_argnums=2)(jnp.asarray(x), q, jnp.dtype(jnp.float32))
    assert found.dtype == jnp.float32 and found.shape == (*rows, 5)
    assert (np.abs(np.asarray(found, np.float64) - expected) <= 1e-6 * size).all()


@pytest.mark.parametrize("groups", [1, 8])
def test_bfloat16_matmul_sums_in_float32(groups):
    q = make(0, 4096, 5, groups=groups)
    x = np.random.default_rng(0).normal(size=(3, 4096)).astype(ml_dtypes.bfloat16)
    expected, size = products(x, q)
    found = matmul(jnp.asarray(x), q, jnp.dtype(jnp.bfloat16))
    assert found.dtype == jnp.float32
    # A sum in bfloat16 would be off by more than 2**-9 of its terms' size after a few of them.
    assert (np.abs(np.asarray(found, np.float64) - expected) <= 1e-5 * size).all()


def test_matmul_takes_a_matrix_of_floats():
    random = np.random.default_rng(0)
    x, w = random.normal(size=(3, 4)), random.normal(size=(4, 5))
    found = matmul(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.dtype("float32"))
    np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-6)


def test_index_takes_one_matrix_of_a_stack():
    q = make(0, 3, 4, 5, groups=2)
    for i in range(3):
        one = index(q, jnp.int32(i))
        np.testing.assert_array_equal(one.weight, q.weight[i])
        np.testing.assert_array_equal(one.scales, q.scales[i])
        np.testing.assert_array_equal(index(q.weight, i), q.weight[i])
