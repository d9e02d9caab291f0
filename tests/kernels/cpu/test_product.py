"""The kernels that XLA calls on a CPU, against definitions in float64."""

import functools
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grokkit import float_matmul
from grokkit.kernels import cpu
from grokkit.kernels.cpu import machine, product

N, K, GROUPS, MATRICES = 37, 128, 4, 5
NEEDS_PAIRS = "this processor does not multiply bfloat16 numbers in pairs (AVX-512 BF16)"


def make(seed, matrices, n, k, groups):
    random = np.random.default_rng(seed)
    weight = random.integers(-128, 128, (matrices, n, k)).astype(np.int8)
    scales = random.uniform(0.001, 0.1, (matrices, groups, n)).astype(ml_dtypes.bfloat16)
    return weight, scales


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def stack():
    return make(0, MATRICES, N, K, GROUPS)


@pytest.fixture(params=[1, 5])
def threads(request, monkeypatch):
    monkeypatch.setattr(product, "_threads", lambda rows, entries: request.param)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def skinny(x, counts, weight, scales, place):
    starts = jnp.cumulative_sum(jnp.asarray(counts), include_initial=True)
    return product.product(x, starts, weight, scales, place)


def packed(x, counts, weight, scales, place):
    """Each matrix's rows in blocks of their own, and taken out of them again."""
    if not machine.target().has_pairs:
        pytest.skip(NEEDS_PAIRS)
    blocks = [-(-count // product.BLOCK) for count in counts]
    rows = np.concatenate(
        [[], *(product.BLOCK * sum(blocks[:i]) + np.arange(n) for i, n in enumerate(counts))]
    ).astype(int)
    padded = jnp.zeros((product.BLOCK * (sum(blocks) + 1), x.shape[1])).at[rows].set(x)
    starts = jnp.cumulative_sum(jnp.array(blocks), include_initial=True)
    return product.product(product.pack(padded), starts, weight, scales, place)[rows]


@functools.partial(jax.jit, static_argnames=("form", "counts"))
def run(form, x, counts, weight, scales, place):
    return form(x, counts, weight, scales, place)


def by_definition(x, counts, weight, scales, place):
    """In float64; and the sum of the terms' sizes, which rounding is measured against."""
    matrices, n, k = weight.shape
    groups = scales.shape[1]
    entries = weight.astype(np.float64).reshape(matrices, n, groups, k // groups)
    entries = entries * scales.astype(np.float64).swapaxes(1, 2)[..., None]
    entries = entries.reshape(weight.shape)
    of_row = place + np.repeat(np.arange(len(counts)), counts)
    return tuple(
        np.stack([m[i] @ row for row, i in zip(x.astype(np.float64), of_row, strict=True)])
        for x, m in ((x, entries), (np.abs(x), np.abs(entries)))
    )


def check(form, counts, stack, place=0):
    x = normal(len(counts), sum(counts), stack[0].shape[2])
    found = run(form, x, tuple(counts), *stack, jnp.int32(place))
    if form is packed:
        x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected, size = by_definition(x, counts, *stack, place)
    assert (np.abs(found - expected) <= 1e-6 * size).all()


@pytest.mark.parametrize("form", [skinny, packed])
def test_rows_meet_their_own_matrix(form, stack, threads):
    for rows in (1, 2, 3, 4, 5, 6, 17, 64, 300):
        check(form, [rows], stack, 2)
    check(form, [3, 0, 40, 17], stack, 1)
    check(form, [0, 0, 1, 0, 1], stack)


@pytest.mark.parametrize("form", [skinny, packed])
@pytest.mark.parametrize("n", [4, 6, 7, 48, 97])
@pytest.mark.parametrize("group", [32, 64, 288, 544])
def test_any_number_of_outputs_and_groups_of_any_length(form, n, group):
    check(form, [21], make(group, 2, n, 2 * group, 2), 1)


@pytest.mark.parametrize("form", [skinny, packed])
def test_matrices_larger_than_a_cache(form):
    for rows in (1, 23, 300):
        check(form, [rows], make(rows, 1, 130, 6144, 8))


@pytest.mark.parametrize("form", [skinny, packed])
def test_a_row_is_the_same_whatever_rows_are_beside_it(form, stack, threads):
    x, rows = normal(0, 300, K), 300
    together = run(form, x, (rows,), *stack, jnp.int32(1))
    for first, n in ((0, 1), (150, 3), (299, 1), (17, 40)):
        alone = run(form, x[first : first + n], (n,), *stack, jnp.int32(1))
        np.testing.assert_array_equal(together[first : first + n], alone)


@pytest.mark.parametrize("form", [skinny, packed])
def test_what_is_no_number_stays_in_its_row(form, stack):
    x = normal(1, 12, K)
    x[6, 3], x[7, 127], x[8] = np.nan, np.inf, 0
    found = np.array(run(form, x, (12,), *stack, jnp.int32(0)))
    assert not np.isfinite(found[6:8]).any() and not found[8].any()
    assert np.isfinite(np.delete(found, [6, 7], axis=0)).all()


@pytest.mark.parametrize("form", [skinny, packed])
def test_a_matrix_that_no_row_meets_is_not_read(form, stack):
    weight, scales = stack[0], stack[1].copy()
    scales[2] = np.nan
    assert np.isfinite(run(form, normal(0, 41, K), (40, 0, 1), weight, scales, jnp.int32(1))).all()


def test_packed_rows_are_rounded_to_the_nearest_bfloat16():
    """Seen by a matrix that gives each entry back."""
    x = normal(2, 40, 32)
    x[0, :4] = np.array([0x3F808000, 0x3F818000, 0xBF808001, 0x3F807FFF], np.uint32).view(
        np.float32
    )
    weight, scales = np.eye(32, dtype=np.int8)[None], np.ones((1, 1, 32), ml_dtypes.bfloat16)
    found = run(packed, x, (40,), weight, scales, jnp.int32(0))
    np.testing.assert_array_equal(found, x.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("form", [skinny, packed])
def test_sharing_changes_no_bit_however_often_and_with_how_many_callers(form, stack, monkeypatch):
    arguments = normal(0, 43, K), *map(jnp.asarray, stack), jnp.int32(0)
    found = {}
    for n in (1, 3):
        monkeypatch.setattr(product, "_threads", lambda rows, entries, n=n: n)
        shared = jax.jit(lambda x, *arrays: form(x, (40, 0, 3), *arrays))
        found[n] = shared.lower(*arguments).compile()
    expected, wrong = np.asarray(found[1](*arguments)), []

    def often():
        wrong.extend(1 for _ in range(200) if not np.array_equal(found[3](*arguments), expected))

    callers = [threading.Thread(target=often) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_on_several_devices_each_multiplies_its_part():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    weight, scales = make(3, 1, 64, K, 1)
    x = normal(3, 5, K)

    def local(x, weight, scales):
        return product.product(x, jnp.array([0, 5]), weight, scales, jnp.int32(0))

    cut = jax.P(None, "model", None), jax.P(None, None, "model")
    with jax.set_mesh(mesh):
        part = jax.shard_map(local, in_specs=(jax.P(), *cut), out_specs=jax.P(None, "model"))
        arrays = [jax.device_put(a, p) for a, p in zip((weight, scales), cut, strict=True)]
        found = jax.jit(part)(jax.device_put(x, jax.P()), *arrays)
    expected, size = by_definition(x, [5], weight, scales, 0)
    assert (np.abs(found - expected) <= 1e-6 * size).all()


def test_cores_are_shared_between_devices(monkeypatch):
    monkeypatch.setattr(product, "cores", lambda: 16)
    large = 2**30
    assert product._threads(1, large) == 16
    assert product._threads(4, product._A_THREAD) == 1
    assert product._threads(40, product._A_THREAD) == 10
    for devices, threads in ((2, 8), (8, 2)):
        with jax.set_mesh(jax.make_mesh((devices,), ("model",))):
            assert product._threads(1, large) == threads


def test_small_matrices_and_other_devices_do_without(monkeypatch):
    assert cpu.kernels(cpu.WORTH_IT) is product
    assert cpu.kernels(cpu.WORTH_IT - 1) is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cpu.kernels(cpu.WORTH_IT) is None


# Matrices of floats

PLACE = 2
KINDS = {
    "products": (product.float_products, float_matmul.products, "mrk,mnk->mrn"),
    "sums": (product.float_sums, float_matmul.sums, "mrk,mkn->mrn"),
}


def floats(kind, rows, n, k, bfloat16=False, seed=0, matrices=3):
    """Rows, a stack of matrices, and its bits where they are what is passed on."""
    x = normal(seed, matrices, rows, k)
    weight = normal(seed + 1, PLACE + matrices, *((n, k) if kind == "products" else (k, n)))
    if not bfloat16:
        return x, weight, weight
    weight = weight.astype(ml_dtypes.bfloat16)
    return x, weight.astype(np.float32), weight.view(np.uint16)


def floats_by_definition(kind, x, reach, weight):
    some = weight[PLACE:].astype(np.float64)
    found = np.einsum(KINDS[kind][2], x.astype(np.float64), some)
    for i, n in enumerate(reach):
        if kind == "products":
            found[i, :, n:] = 0
        else:
            found[i] = x[i, :, :n].astype(np.float64) @ some[i, :n]
    return found


def run_floats(kind, x, reach, weight):
    compiled = jax.jit(KINDS[kind][0])
    return np.asarray(compiled(x, jnp.array(reach), jnp.asarray(weight), jnp.int32(PLACE)))


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 32, 32), (2, 96, 64), (5, 64, 96), (16, 160, 32)])
def test_floats_are_multiplied_as_far_as_they_reach(kind, rows, n, k, bfloat16, threads):
    x, values, weight = floats(kind, rows, n, k, bfloat16)
    whole = n if kind == "products" else k
    reach = [whole, whole // 3, whole - 1]
    found = run_floats(kind, x, reach, weight)
    expected = floats_by_definition(kind, x, reach, values)
    size = floats_by_definition(kind, abs(x), reach, abs(values))
    assert (np.abs(found - expected) <= 1e-6 * size).all()
    if kind == "products":
        assert not found[1, :, whole // 3 :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_out_of_reach_changes_nothing(kind, threads):
    x, _, weight = floats(kind, 2, 32, 32)
    reach = [5, 0, 16]
    expected = floats_by_definition(kind, x, reach, weight)
    for i, n in enumerate(reach):
        weight[PLACE + i, n:] = np.nan
        if kind == "sums":
            x[i, :, n:] = np.nan
    np.testing.assert_allclose(run_floats(kind, x, reach, weight), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_gets_what_it_would_get_alone_in_a_cache_of_any_capacity(kind, threads):
    x, _, weight = floats(kind, 16, 64, 64)
    together = run_floats(kind, x, [30] * 3, weight)
    for i, row in ((0, 0), (1, 7), (2, 15)):
        only = np.roll(weight, -i, axis=0)
        alone = run_floats(kind, x[i : i + 1, row : row + 1], [30], only)
        np.testing.assert_array_equal(together[i, row], alone[0, 0])
    if kind == "products":
        shorter = run_floats(kind, x, [30] * 3, weight[:, :30])
        np.testing.assert_array_equal(together[..., :30], shorter)
    else:
        shorter = run_floats(kind, x[..., :30], [30] * 3, weight[:, :30])
        np.testing.assert_array_equal(together, shorter)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_the_definitions(kind):
    definition = getattr(float_matmul, f"{kind}_by_definition")
    x, weight = map(jnp.asarray, floats(kind, 2, 32, 32)[:2])
    direction = tuple(map(jnp.asarray, floats(kind, 2, 32, 32, seed=5)[:2]))
    reach = jnp.array([24, 7, 0])

    def of(function):
        def loss(x, weight):
            return jnp.sum(jnp.sin(function(x, reach, weight, jnp.int32(PLACE))))

        forward = jax.jvp(loss, (x, weight), direction)
        return *jax.grad(loss, (0, 1))(x, weight), *forward

    expected = of(definition)
    assert float(jnp.abs(expected[1]).max()) > 0.1
    for a, b in zip(jax.jit(lambda: of(KINDS[kind][1]))(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_bits_of_a_cache_in_bfloat16_have_no_derivative_but_its_queries_do():
    x, values, bits = map(jnp.asarray, floats("products", 2, 24, 32, bfloat16=True))
    reach, place = jnp.array([24, 7, 3]), jnp.int32(PLACE)

    def loss(x, weight):
        return jnp.sum(jnp.sin(float_matmul.products(x, reach, weight, place)))

    found, expected = (jax.grad(functools.partial(loss, weight=w))(x) for w in (bits, values))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "k"), [(1, 64), (16, 64), (17, 64), (2, 3)])
def test_what_has_no_kernel_is_left_to_xla(rows, k):
    assert product.is_fit_for_products(rows, 70, k) == (rows <= 16 and k > 3)
    x, weight = jnp.asarray(normal(0, 1, rows, k)), jnp.asarray(normal(1, cpu.WORTH_IT // k + 1, k))
    multiply = jax.jit(float_matmul.matmul_transposed, static_argnames="dtype")
    np.testing.assert_allclose(multiply(x, weight, jnp.float32), x @ weight.T, rtol=1e-4, atol=1e-4)
