"""How arrays are laid out over devices.

A parameter's shape, dtype and logical axes stand together in a `ParamSpec`. One table,
`MESH_AXIS`, sends each logical axis to a mesh axis; shardings, abstract trees and
initialisation all follow from the two.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray, PyTree

from grokkit.axes import AXES
from grokkit.errors import ConfigError

MESH_AXIS: dict[str, str | None] = {
    "batch": "data",
    "position": None,
    "layer": None,
    "expert": None,
    "choice": None,
    "d_head": None,
    "vocab": None,
    "d_model": None,
    "d_model_split": "model",
    "head": "model",
    "kv_head": "model",
    "heads": "model",
    "kv_heads": "model",
    "d_ff": "model",
    "group": None,
    "group_split": "model",
}
"""Logical axis -> mesh axis, `None` for replicated. An axis that is not here raises.

`d_model_split` is d_model where the embedding table is cut along it, and `group_split` the
scale groups of a matrix whose contracting axis is cut: scales follow their weight.
"""


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The `PartitionSpec` of an array with these logical axes.

    **Raises:** `ConfigError` for an axis without a rule, or two axes on one mesh axis.
    """
    unknown = [a for a in axes if a is not None and a not in MESH_AXIS]
    if unknown:
        raise ConfigError(f"no sharding rule for axis {unknown[0]!r}; rules: {sorted(MESH_AXIS)}")
    mesh_axes = [None if a is None else MESH_AXIS[a] for a in axes]
    used = [m for m in mesh_axes if m is not None]
    if len(used) != len(set(used)):
        raise ConfigError(f"axes {tuple(axes)} put two array axes on one mesh axis: {mesh_axes}")
    return PartitionSpec(*mesh_axes)


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Shape, dtype and logical axes of one parameter, declared together."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str, ...]
    init_scale: float | None = None
    """Standard deviation at random initialisation; `None` initialises to ones."""

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ConfigError(f"shape {self.shape} does not match axes {self.axes}")

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def partition_spec(self) -> PartitionSpec:
        """Where each axis goes; see `MESH_AXIS`."""
        return partition_spec(self.axes)

    def sharding(self, mesh: Mesh) -> NamedSharding:
        """The layout on `mesh`. **Raises:** `ConfigError` if the shape does not divide."""
        spec = self.partition_spec()
        for size, axis, mesh_axis in zip(self.shape, self.axes, spec, strict=True):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise ConfigError(
                    f"axis {axis!r} of size {size} does not divide over the mesh's "
                    f"{mesh.shape[mesh_axis]} {mesh_axis!r} devices; choose a mesh whose "
                    f"{mesh_axis!r} axis divides {size}"
                )
        return NamedSharding(mesh, spec)

    def abstract(self, mesh: Mesh | None = None) -> jax.ShapeDtypeStruct:
        """Shape and dtype without data, with the layout on `mesh` if one is given."""
        sharding = None if mesh is None else self.sharding(mesh)
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=sharding)

    def initialise(self, key: PRNGKeyArray) -> Array:
        """Random values: normal with `init_scale`, ones without."""
        if self.init_scale is None:
            return jnp.ones(self.shape, self.dtype)
        return (jax.random.normal(key, self.shape) * self.init_scale).astype(self.dtype)


if TYPE_CHECKING:
    Declaration = Any
else:
    Declaration = ParamSpec
"""What a field of a module may hold instead of its array, in a tree of declarations. To a type
checker it is anything, since code that runs the module always meets the array."""


def is_spec(x: Any) -> bool:
    """Whether `x` is a `ParamSpec`: the leaf test for trees of them."""
    return isinstance(x, ParamSpec)


def shardings(specs: PyTree, mesh: Mesh) -> PyTree:
    """The layout of every parameter of a tree of `ParamSpec`s."""
    return jax.tree.map(lambda s: s.sharding(mesh), specs, is_leaf=is_spec)


def abstract(specs: PyTree, mesh: Mesh | None = None) -> PyTree:
    """Shapes and dtypes of a tree of `ParamSpec`s, without data."""
    return jax.tree.map(lambda s: s.abstract(mesh), specs, is_leaf=is_spec)


def make_mesh(
    data: int = 1, model: int | None = None, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with axes `data` (batch) and `model` (heads and hidden units).

    **Arguments:**

    - `data`: devices along the batch.
    - `model`: devices that share each layer's weights; by default all that remain.
    - `devices`: which devices; by default the first `data * model` of `jax.devices()`.

    **Returns:** a mesh whose axes are of type `Explicit`, so that layouts are part of array types.

    **Raises:** `ConfigError` if there are too few devices.
    """
    available = list(jax.devices() if devices is None else devices)
    if data < 1 or (model is not None and model < 1):
        raise ConfigError(f"mesh axes must be at least 1, found data={data}, model={model}")
    if model is None:
        model = max(len(available) // data, 1)
    if data * model > len(available):
        raise ConfigError(
            f"a mesh of data={data} x model={model} needs {data * model} devices, found "
            f"{len(available)}; on a CPU, grokkit.virtual_devices({data * model}) before the "
            f"first use of JAX makes as many"
        )
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Explicit, AxisType.Explicit),
        devices=available[: data * model],
    )


def virtual_devices(count: int = 8) -> None:
    """Split this machine's CPU into `count` JAX devices. Call it before JAX is first used.

    **Raises:** `ConfigError` if JAX has already started with another number of devices.
    """
    if count < 1:
        raise ConfigError(f"expected at least 1 virtual device, found {count}")
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as e:
        found = len(jax.devices())
        if found == count:
            return
        raise ConfigError(
            f"JAX has already started, with {found} device(s), so it cannot be split into "
            f"{count} any more. Restart the kernel and call grokkit.virtual_devices({count}) in "
            f"the first cell, before any array is made."
        ) from e


def release(tree: PyTree) -> PyTree:
    """The same arrays on a mesh with automatic axes, without a copy.

    Inside the model, layouts are part of the types and an ambiguous one is an error; in a
    notebook `logits[0, -1]` should just work.
    """

    def release(a: Array) -> Array:
        if not isinstance(a.sharding, NamedSharding):
            return a
        mesh = a.sharding.mesh
        return jax.device_put(
            a, NamedSharding(Mesh(np.asarray(mesh.devices), mesh.axis_names), a.sharding.spec)
        )

    return jax.tree.map(release, tree)


def describe_layout(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh) -> str:
    """One line: which axis is cut in how many parts, and a device's share."""
    local = NamedSharding(mesh, spec).shard_shape(tuple(shape))
    whole = " x ".join(map(str, shape)) or "scalar"
    if local == tuple(shape):
        return f"{whole}, a full copy on each device"
    return f"{whole}, {' x '.join(map(str, local))} on each device"


assert set(MESH_AXIS) - {"d_model_split", "group_split"} <= set(AXES)
