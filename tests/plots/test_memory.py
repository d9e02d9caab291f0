"""Figures of memory hold the bytes and the parts they were given, and are fit to show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from figures import assert_fit_to_show
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.patches import Rectangle

from grokkit import make_mesh, plots


@pytest.mark.parametrize("n", [1, 8, 64])
def test_memory_bill(n):
    total = [2**20 * (i + 1) for i in range(n)]
    figure = plots.memory_bill([f"capture_{i}" for i in range(n)], total, [t // 8 for t in total])
    assert_fit_to_show(figure)
    axes = figure.axes[0]
    widths = np.array([bar.get_width() for bar in axes.patches]).reshape(2, n)
    np.testing.assert_allclose(widths[0], np.arange(1, n + 1))  # MiB
    np.testing.assert_allclose(widths[1], np.arange(1, n + 1) / 8)
    assert "MiB" in axes.get_xlabel()
    legend = figure.legends[0].get_window_extent()
    assert not any(bar.get_window_extent().overlaps(legend) for bar in axes.patches)
    assert f"{sum(total) / 2 ** (30 if n == 64 else 20):.3g}" in axes.get_title()


def test_memory_bill_of_a_large_model_without_devices():
    figure = plots.memory_bill(["experts", "attention"], [300 * 2**30, 5 * 2**30])
    assert_fit_to_show(figure)
    assert "305 GiB in all" in figure.axes[0].get_title()


@pytest.mark.parametrize("n", [1, 3, 12])
def test_device_memory(n):
    sizes = {
        "weights": [40e9] * n, "KV cache": [10e9] * n, "temporaries": [2e9 * i for i in range(n)]
    }  # fmt: skip
    figure = plots.device_memory([f"machine {i}\nmesh 1,{i}" for i in range(n)], sizes, [52e9] * n)
    assert_fit_to_show(figure)
    axes = figure.axes[0]
    bars = np.array([(b.get_x(), b.get_width()) for b in axes.patches]).reshape(3, n, 2)
    np.testing.assert_allclose(bars[..., 0], np.repeat([[0], [40], [50]], n, axis=1))
    np.testing.assert_allclose(bars[..., 1] * 1e9, list(sizes.values()))
    verdicts = [text.get_text().split(": ")[1] for text in axes.texts]
    assert verdicts == ["fits", "fits", *["does not fit"] * n][:n]


def parts(axes) -> dict[str, tuple[float, float, float, float]]:
    """What stands in each part, and where: left, top, width, height in shares of the whole."""
    boxes = [p.get_bbox() for p in axes.patches if isinstance(p, Rectangle)]
    words = [t.get_text() for t in axes.texts]
    return {w: (b.x0, b.y0, b.width, b.height) for w, b in zip(words, boxes, strict=True)}


def laid_out(shape, data, model, *axes) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(make_mesh(data, model), PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.int8, sharding=sharding)


def test_weight_layout():
    figure = plots.weight_layout({
        "columns": laid_out((64, 6144, 1024), 1, 8, None, None, "model"),
        "rows": laid_out((16, 32), 1, 8, "model", None),
        "copies": laid_out((16,), 1, 8),
        "both": laid_out((2, 4, 3, 8), 2, 4, "data", "model"),
        "pairs": laid_out((8, 8), 2, 4, None, "model"),
    })  # fmt: skip
    assert_fit_to_show(figure)
    columns, rows, copies, both, pairs = (parts(axes) for axes in figure.axes[:5])
    assert columns == {str(i): (i / 8, 0, 1 / 8, 1) for i in range(8)}
    assert rows == {str(i): (0, i / 8, 1, 1 / 8) for i in range(8)}
    assert copies == {"each of 8\ndevices": (0, 0, 1, 1)}
    assert both == {str(i): (i % 4 / 4, i // 4 / 2, 1 / 4, 1 / 2) for i in range(8)}
    assert pairs == {f"{i}, {i + 4}": (i / 4, 0, 1 / 4, 1) for i in range(4)}
    assert figure.axes[0].get_title() == "columns\n64 × 6144 × 1024\n64 × 6144 × 128 a device"


def test_weight_layout_of_real_arrays():
    mesh = make_mesh(1, 8)
    array = jax.device_put(np.ones((4, 16)), NamedSharding(mesh, PartitionSpec(None, "model")))
    figure = plots.weight_layout({"weight": array})
    assert_fit_to_show(figure)
    assert len(parts(figure.axes[0])) == 8


class ManyDevices:
    """The layout of 64 devices, which the tests have not, a column each."""

    def devices_indices_map(self, shape):
        class Device:
            def __init__(self, i):
                self.id = i

        width = shape[1] // 64
        return {Device(i): (slice(None), slice(i * width, (i + 1) * width)) for i in range(64)}


class Laid:
    shape, sharding = (6144, 6144), ManyDevices()


def test_weight_layout_over_64_devices():
    figure = plots.weight_layout({f"matrix {i}": Laid() for i in range(8)})
    assert_fit_to_show(figure)
    assert len(parts(figure.axes[0])) == 64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.memory_bill(["a"], [1, 2]), "total: expected a size for each of 1 names"),
        (lambda: plots.memory_bill(["a"], [1], [-1]), "per_device: expected sizes in bytes"),
        (lambda: plots.memory_bill([], []), "none of them empty"),
        (
            lambda: plots.device_memory(["a"], {"w": [1, 2]}, [1]),
            "w: expected a size for each of 1",
        ),
        (lambda: plots.device_memory(["a"], {"w": [1]}, [-1]), "limits: expected sizes in bytes"),
        (lambda: plots.weight_layout({}), "at least one"),
        (lambda: plots.weight_layout({"x": np.ones(2)}), "x: expected an array with a sharding"),
    ],
)
def test_what_does_not_fit_is_refused(unchecked, call, message):
    with pytest.raises(ValueError, match=message):
        call()
