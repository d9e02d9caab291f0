"""Figures of what takes memory, and where it lies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Array, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from grokkit.errors import GrokkitError
from grokkit.plots.style import EXPERT_COLOURS, MISSING, checked, ink

_PARTS = EXPERT_COLOURS[:4]  # weights, cache, temporaries, captures
_TOTAL, _DEVICE = "#BBBBBB", "#333333"


def memory_bill(
    names: Sequence[str],
    total: Int[np.ndarray | Array, " item"] | Sequence[int],
    per_device: Int[np.ndarray | Array, " item"] | Sequence[int] | None = None,
    title: str = "What takes memory",
) -> Figure:
    """Bars of bytes, in all and on the fullest device, with their sums in the title.

    **Arguments:**

    - `names`: of what takes memory.
    - `total`: bytes of each in all.
    - `per_device`: bytes of each on the fullest device.
    - `title`: over the figure.

    **Raises:** `GrokkitError` for sizes that do not match, or negative ones.

    ```python
    names, _, total, per_device = zip(*lm.bill(text).rows)
    memory_bill(names, total, per_device)
    ```
    """
    bills = {"total": checked("total", total, "item")}
    if per_device is not None:
        bills["per_device"] = checked("per_device", per_device, "item")
    for name, bytes_ in bills.items():
        if len(bytes_) != len(names):
            raise GrokkitError(f"{name}: expected a size for each of {len(names)} names, found "
                               f"{len(bytes_)}")  # fmt: skip
        if bytes_.min() < 0:
            raise GrokkitError(f"{name}: expected sizes in bytes, found {bytes_.min()}")
    # Python's integers and floats: sums of a large model's bytes pass 2**31.
    unit, unit_bytes = _unit(max(float(b.max()) for b in bills.values()))
    thick = 0.8 / len(bills)
    figure = Figure(figsize=(7.0, 0.32 * len(names) + 1.6), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(names))[::-1]
    kinds = (("total", "in all", _TOTAL), ("per_device", "on the fullest device", _DEVICE))
    parts = []
    for i, (name, words, colour) in enumerate(kinds[: len(bills)]):
        sizes = bills[name].astype(float)
        offset = (len(bills) - 1) / 2 * thick - i * thick
        bars = axes.barh(places + offset, sizes / unit_bytes, 0.92 * thick, color=colour,
                         label=words)  # fmt: skip
        axes.bar_label(bars, [_readable(b) for b in sizes], padding=3, fontsize=7)
        parts.append(f"{_readable(sizes.sum())} {words}")
    axes.set_yticks(places, list(names), fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(names) - 0.4)
    largest = max(float(b.max()) for b in bills.values()) / unit_bytes
    axes.set_xlim(0, 1.16 * largest or 1)
    axes.set_xlabel(f"size ({unit})")
    axes.set_title(f"{title}: {', '.join(parts)}", fontsize="medium", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(bills) > 1:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def device_memory(
    machines: Sequence[str],
    parts: Mapping[str, Sequence[int | float]],
    limits: Sequence[int | float],
    title: str = "What a device needs, and has",
) -> Figure:
    """A bar for each machine of what one of its devices needs, and a mark at what it has.

    **Arguments:**

    - `machines`: their names.
    - `parts`: bytes on a device, by what takes them, on each machine.
    - `limits`: bytes that a device of each machine has.
    - `title`: over the figure.

    **Raises:** `GrokkitError` for sizes that do not match, or negative ones.

    ```python
    device_memory(
        ["8 x 80 GB", "8 x 40 GB"],
        {"weights": [39.8e9, 39.8e9], "temporaries": [0.5e9, 0.5e9]},
        [80e9, 40e9],
    )
    ```
    """
    rows = {name: checked(name, sizes, "machine") for name, sizes in parts.items()}
    for name, sizes in {"limits": checked("limits", limits, "machine"), **rows}.items():
        if len(sizes) != len(machines):
            raise GrokkitError(f"{name}: expected a size for each of {len(machines)} machines, "
                               f"found {len(sizes)}")  # fmt: skip
        if sizes.min() < 0:
            raise GrokkitError(f"{name}: expected sizes in bytes, found {sizes.min()}")
    figure = Figure(figsize=(7.0, 0.5 * len(machines) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    places, ends = np.arange(len(machines))[::-1], np.zeros(len(machines))
    for (name, sizes), colour in zip(rows.items(), _PARTS, strict=False):
        axes.barh(places, sizes / 1e9, 0.55, left=ends / 1e9, color=colour, label=name)
        ends = ends + sizes
    axes.vlines([limit / 1e9 for limit in limits], places - 0.42, places + 0.42, color="black",
                linewidth=2, label="what a device has")  # fmt: skip
    for place, end, limit in zip(places, ends, limits, strict=True):
        verdict = "fits" if end <= limit else "does not fit"
        axes.text(max(end, limit) / 1e9, place, f"  {end / 1e9:.3g} GB: {verdict}", va="center",
                  fontsize=8)  # fmt: skip
    axes.set_yticks(places, list(machines), fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(machines) - 0.4)
    axes.set_xlim(0, 1.35 * max(*ends, *limits) / 1e9)
    axes.set_xlabel("bytes on a device (GB)")
    axes.set_title(title, fontsize="medium", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def weight_layout(arrays: Mapping[str, Any], title: str = "How arrays lie over devices") -> Figure:
    """Each array as a rectangle cut into the parts that devices hold; grey is a copy on all.

    The two axes drawn are those that are cut, else the last two. Rectangles are not to scale; the
    shape of the whole and of a part stand above each.

    **Arguments:**

    - `arrays`: arrays, or `jax.ShapeDtypeStruct`s with a sharding, by name: whatever has a `shape`
        and a `sharding`. Those of a model too large for this machine cost nothing to draw:
        `grokkit.sharding.abstract` makes them.
    - `title`: over the figure.

    **Raises:** `GrokkitError` for none, or one without a sharding.

    ```python
    attention = lm.model.blocks.attention
    weight_layout({"query": attention.query.weight[0], "out": attention.out.weight[0]})
    ```
    """
    if not arrays:
        raise GrokkitError("arrays: expected at least one, found none")
    for name, array in arrays.items():
        if getattr(array, "sharding", None) is None:
            raise GrokkitError(f"{name}: expected an array with a sharding, found "
                               f"{type(array).__name__}")  # fmt: skip
    columns = 2 if len(arrays) == 4 else min(3, len(arrays))
    rows = math.ceil(len(arrays) / columns)
    figure = Figure(figsize=(max(4.5, 2.9 * columns), 2.5 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(arrays) :]:
        axes.set_visible(False)
    for axes, (name, array) in zip(grid.flat, arrays.items(), strict=False):
        _draw_parts(axes, name, tuple(array.shape), array.sharding)
    figure.suptitle(title)
    return figure


def _draw_parts(axes: Axes, name: str, shape: tuple[int, ...], sharding: Any) -> None:
    """One rectangle, cut; `shape` is of the whole array."""
    held: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        part = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        held.setdefault(part, []).append(device.id)
    first = next(iter(held))
    local = [stop - start for start, stop in first]
    cut = [i for i, (whole, part) in enumerate(zip(shape, local, strict=True)) if part < whole]
    # At most two axes can be drawn; a mesh of two axes cuts no more.
    others = [i for i in reversed(range(len(shape))) if i not in cut]
    drawn = sorted([*cut, *others][:2])
    n_devices = sum(len(ids) for ids in held.values())
    colours = matplotlib.colormaps["viridis"].resampled(max(2, n_devices))
    order = {d: i for i, d in enumerate(sorted(d for ids in held.values() for d in ids))}
    size = 9 if len(held) <= 16 else 6
    for part, ids in held.items():
        # A vector is one row; the vertical axis runs down, as a matrix is written.
        box = [(part[i][0] / shape[i], part[i][1] / shape[i]) for i in drawn]
        box = [(0.0, 1.0)] * (2 - len(box)) + box
        (top, bottom), (left, right) = box
        whole = len(ids) == n_devices > 1
        colour = MISSING if whole else to_hex(colours(order[ids[0]]))
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=colour,
                                 edgecolor="white", linewidth=0.8))  # fmt: skip
        words = f"each of {n_devices}\ndevices" if whole else ", ".join(map(str, sorted(ids)))
        narrow = right - left < 0.06 * len(words) and not whole
        axes.text((left + right) / 2, (top + bottom) / 2, words, ha="center", va="center",
                  fontsize=size, color=ink(colour), rotation=90 if narrow else 0)  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    by = " × ".join(map(str, shape)) or "scalar"
    share = "" if tuple(local) == shape else f"\n{' × '.join(map(str, local))} a device"
    axes.set_title(f"{name}\n{by}{share}", fontsize=8)
    if len(drawn) == 2:
        axes.set_ylabel(f"axis {drawn[0]}", fontsize=8)
    if drawn:
        axes.set_xlabel(f"axis {drawn[-1]}, device number in each part", fontsize=8)


_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def _unit(size: float) -> tuple[str, int]:
    return next(((name, n) for name, n in _UNITS if size >= n), ("B", 1))


def _readable(size: float) -> str:
    unit, n = _unit(size)
    return f"{size / n:.3g} {unit}"
