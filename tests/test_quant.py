"""8-bit weights against their definition in float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import PartitionSpec as P

from grokkit.errors import GrokkitError
from grokkit.quant import QuantizedArray, dequantize, index, layout, quantize

FEW = settings(max_examples=25, deadline=None)


def make(seed, *shape, groups=1):
    """Random int8 values and scales, of a few shapes so that little is compiled."""
    random = np.random.default_rng(seed)
    *lead, k, n = shape
    weight = random.integers(-128, 128, (*lead, n, k)).astype(np.int8)
    scales = random.uniform(0.001, 0.1, (*lead, groups, n)).astype(ml_dtypes.bfloat16)
    return QuantizedArray(jnp.asarray(weight), jnp.asarray(scales))


def exact(q):
    weight = np.swapaxes(np.asarray(q.weight), -1, -2)
    return reference.dequantize(weight, np.asarray(q.scales))


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


def test_index_names_one_matrix_of_a_stack():
    q = make(0, 3, 2, 4, 5, groups=2)
    for i, j in np.ndindex(3, 2):
        row = index(q, jnp.int32(i))
        assert row.shape == (2, 4, 5) and index(row, j).shape == (4, 5)
        for found, expected in ((row.read(), (i,)), (index(row, j).read(), (i, j))):
            np.testing.assert_array_equal(found.weight, q.weight[expected])
            np.testing.assert_array_equal(found.scales, q.scales[expected])
        np.testing.assert_array_equal(index(q.weight, i), q.weight[i])


@pytest.mark.parametrize(
    "cut, weight, scales",
    [
        ("k", P(None, None, "model"), P(None, "model", None)),
        ("n", P(None, "model", None), P(None, None, "model")),
    ],
)
def test_layout_cuts_scales_with_their_weights(cut, weight, scales):
    q = make(0, 3, 8, 4, groups=2)
    assert (layout(q, cut).weight, layout(q, cut).scales) == (weight, scales)
    slot = layout(index(q, 0), cut)
    assert (slot.stack.weight, slot.stack.scales, slot.at) == (weight, scales, (P(),))
    floats = P(None, "model", None) if cut == "k" else P(None, None, "model")
    assert layout(dequantize(q), cut) == floats
