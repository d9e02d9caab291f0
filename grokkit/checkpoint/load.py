"""From a checkpoint's files straight onto the devices of a mesh.

Each device's slice of each layer goes from the file into that device's part of the stacked array.
There is no host copy of the model, nor of a layer: on accelerators the memory beyond the weights is
one slice on its way (on the host and on the device); on CPU devices, a few slabs of some rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, PyTree
from tqdm.auto import tqdm

from grokkit.checkpoint.official import Checkpoint, Entry
from grokkit.checkpoint.read import Request, Target, fill, pages
from grokkit.checkpoint.refusal import refusal
from grokkit.checkpoint.tensor_file import StoredArray
from grokkit.errors import ConfigError
from grokkit.quant import QuantizedArray
from grokkit.sharding import ParamSpec, is_spec


def load_params(checkpoint: Checkpoint, specs: PyTree, mesh: Mesh, progress: bool = True) -> PyTree:
    """Load a checkpoint's weights in the layout that `specs` declares.

    **Arguments:**

    - `checkpoint`: from `open_checkpoint`.
    - `specs`: a tree with `ParamSpec` leaves, as from `grokkit.model.param_specs`.
    - `mesh`: the devices. With several processes, each reads only its own devices' slices.
    - `progress`: show a progress bar, in bytes of the checkpoint.

    **Returns:** the same tree with jax arrays in place of the specs.

    **Raises:** before anything is allocated, `CheckpointError` if tree and checkpoint do not match
    leaf by leaf, and `ConfigError` if a shape does not divide over the mesh.
    """
    return load_planned(plan_params(checkpoint, specs, mesh), checkpoint.directory.name, progress)


def plan_params(checkpoint: Checkpoint, specs: PyTree, mesh: Mesh) -> PyTree:
    """Where each leaf comes from and where it goes, checked; nothing is read or allocated.

    **Arguments:** and **Raises:** as `load_params`.

    **Returns:** the same tree with `LeafPlan`s in place of the specs.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)
    named = [(jax.tree_util.keystr(path, simple=True, separator="."), s) for path, s in leaves]
    return jax.tree.unflatten(treedef, _plan(checkpoint, named, mesh))


def load_planned(plans: PyTree, name: str, progress: bool = True) -> PyTree:
    """The arrays of a tree of `LeafPlan`s; `name` is shown before the progress bar."""
    with tqdm(
        total=sum(plan.nbytes for plan in jax.tree.leaves(plans)),
        unit="B",
        unit_scale=True,
        desc=f"loading {name}",
        disable=not progress,
    ) as bar:
        leaves, treedef = jax.tree.flatten(plans)
        arrays = read_leaves(leaves, [new_parts(plan) for plan in leaves], bar.update)
        return jax.tree.unflatten(treedef, arrays)


def stored_specs(checkpoint: Checkpoint, specs: PyTree) -> PyTree:
    """Declare a model's matrices as a checkpoint stores them.

    **Arguments:**

    - `checkpoint`: from `open_checkpoint`.
    - `specs`: a tree of declarations of 8-bit matrices, as from `grokkit.model.param_specs`.

    **Returns:** the same tree, with floats in place of the matrices that the checkpoint has as
    floats, and with as many scale groups as the checkpoint has.
    """
    stored = {entry.key.path: entry.file for entry in checkpoint}

    def declare(path: Any, spec: Any) -> Any:
        if not isinstance(spec, QuantizedArray):
            return spec
        file = stored.get(jax.tree_util.keystr(path, simple=True, separator="."))
        if file is None:
            return spec
        weight: Any = spec.weight
        scales: Any = spec.scales
        if file.scales is None:
            *axes, n, k = weight.axes
            return ParamSpec(spec.shape, file.weight.dtype, (*axes, k, n), weight.init_scale)
        *lead, _, n = scales.shape
        shape = (*lead, file.scales.shape[-2], n)
        return QuantizedArray(weight, dataclasses.replace(scales, shape=shape))

    return jax.tree_util.tree_map_with_path(
        declare, specs, is_leaf=lambda x: isinstance(x, QuantizedArray | ParamSpec)
    )


@dataclasses.dataclass(frozen=True)
class _Source:
    """One array of a file, and its place on the leaf's layer axis if there is one."""

    array: StoredArray
    layer: int | None
    transposed: bool
    """Whether the leaf holds it with its last two axes exchanged, as 8-bit matrices of the official
    layout are."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the leaf holds it."""
        return self._exchanged(self.array.shape)

    def place(
        self, index: tuple[slice, ...], n_layers: int
    ) -> tuple[Any, tuple[slice, ...]] | None:
        """Where in a device's part of the leaf, `index`, some of it belongs; and what, in the file's
        order of axes."""
        if self.layer is None:
            return ..., self._exchanged(index)
        layers = range(n_layers)[index[0]]
        if self.layer not in layers:
            return None
        return self.layer - layers.start, self._exchanged(index[1:])

    def _exchanged(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*axes[:-2], axes[-1], axes[-2]) if self.transposed else axes


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one leaf of the tree is put together."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    sources: tuple[_Source, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(source.array.span.nbytes for source in self.sources)

    def layer(self, i: int) -> "LeafPlan":
        """The plan of one layer's array alone, without the layer axis."""
        source = dataclasses.replace(self.sources[i], layer=None)
        sharding = NamedSharding(self.sharding.mesh, PartitionSpec(*self.sharding.spec[1:]))
        return LeafPlan(self.shape[1:], self.dtype, sharding, (source,))


def _plan(checkpoint: Checkpoint, specs: list[tuple[str, Any]], mesh: Mesh) -> list[LeafPlan]:
    """Match leaves and files, each exactly once."""
    sources: dict[str, list[_Source]] = {}
    for entry in checkpoint:
        for path, source in _sources(entry):
            sources.setdefault(path, []).append(source)
    _check_paths(checkpoint, {path for path, _ in specs}, set(sources))
    plans = []
    for path, spec in specs:
        if not is_spec(spec):
            raise refusal(path, "a ParamSpec", type(spec).__name__, "pass model.param_specs(...)")
        # Files come in lexicographic order of the layers' names, the stack in numeric order.
        parts = sorted(sources[path], key=lambda s: -1 if s.layer is None else s.layer)
        _check_leaf(checkpoint, path, spec, parts)
        try:
            sharding = spec.sharding(mesh)
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}") from None
        plans.append(LeafPlan(spec.shape, np.dtype(spec.dtype), sharding, tuple(parts)))
    return plans


def _sources(entry: Entry) -> Iterable[tuple[str, _Source]]:
    """Each array of a file, with its leaf's path."""
    key, file = entry.key, entry.file
    weight = file.open(file.weight)
    if file.scales is None:
        return [(key.path, _Source(weight, key.layer, transposed=file.k_last))]
    return [
        (f"{key.path}.weight", _Source(weight, key.layer, transposed=not file.k_last)),
        (f"{key.path}.scales", _Source(file.open(file.scales), key.layer, transposed=False)),
    ]


def _check_paths(checkpoint: Checkpoint, wanted: set[str], available: set[str]) -> None:
    if wanted == available:
        return
    differences = []
    if wanted - available:
        differences.append(f"nothing for {', '.join(sorted(wanted - available)[:4])}")
    if available - wanted:
        differences.append(f"no leaf for {', '.join(sorted(available - wanted)[:4])}")
    raise refusal(
        checkpoint.directory,
        "one leaf of the parameter tree for each array of the checkpoint",
        "; ".join(differences),
        "pass grokkit.model.param_specs(checkpoint.config)",
    )


def _check_leaf(checkpoint: Checkpoint, path: str, spec: ParamSpec, parts: list[_Source]) -> None:
    first, wanted = parts[0], np.dtype(spec.dtype)
    shape, dtype = first.shape, first.array.dtype
    if first.layer is not None:
        shape = (len(parts), *shape)
    # Ports keep embedding, norms and router in fewer bits than the model does: nothing is lost.
    is_wider = wanted == np.float32 and dtype in (jnp.bfloat16, np.float16)
    if spec.shape != shape or not (wanted == dtype or is_wider):
        raise refusal(
            checkpoint.directory,
            f"{wanted.name} of shape {spec.shape} for {path}",
            f"{dtype.name} of shape {shape}",
            "pass stored_specs(checkpoint, grokkit.model.param_specs(checkpoint.config))",
        )


Parts = dict[Any, "HostPart | DevicePart"]
"""A leaf's part on each device of this process."""


def new_parts(plan: LeafPlan, are_shared: bool = False) -> Parts:
    """Room for each of this process's devices' part of a leaf.

    **Arguments:**

    - `plan`: of the leaf.
    - `are_shared`: CPU devices that have the same of the leaf have one memory for it, which no
        program may then write over.
    """
    shape = plan.sharding.shard_shape(plan.shape)
    devices = plan.sharding.addressable_devices_indices_map(plan.shape)
    parts: Parts = {}
    shared: dict[Any, np.ndarray] = {}
    for device, index in devices.items():
        part = parts[device] = new_part(device, shape, plan.dtype)
        if are_shared and isinstance(part, HostPart):
            part.memory = shared.setdefault(str(index), part.memory)
    return parts


def read_leaves(
    plans: Sequence[LeafPlan],
    parts: Sequence[Parts],
    report: Callable[[int], object] = lambda n_bytes: None,
    direct: bool = False,
) -> list[Array]:
    """Read leaves' files into their `parts` and make an array of each.

    What goes to CPU devices is read without a pause between one array and the next.

    **Arguments:**

    - `plans`, `parts`: of each leaf.
    - `report`: told how many bytes are done with.
    - `direct`: see `grokkit.checkpoint.read.fill`.
    """
    requests: list[Request] = []
    for plan, its_parts in zip(plans, parts, strict=True):
        indices: Any = plan.sharding.addressable_devices_indices_map(plan.shape)
        for source in plan.sources:
            targets: dict[int, Target] = {}  # by address: some devices have one memory
            for device, part in its_parts.items():
                if not (found := source.place(indices[device], plan.shape[0])):
                    continue
                if isinstance(part, DevicePart):  # while the file is in the page cache
                    part.read(source, *found)
                    continue
                memory = part.memory[found[0]]
                memory = memory.swapaxes(-1, -2) if source.transposed else memory
                targets[memory.ctypes.data] = found[1], memory
            if targets:
                requests += source.array.requests(list(targets.values()))
            else:
                report(source.array.span.nbytes)
    fill(requests, report, direct)
    return [
        jax.make_array_from_single_device_arrays(
            plan.shape, plan.sharding, [part.finish() for part in its_parts.values()]
        )
        for plan, its_parts in zip(plans, parts, strict=True)
    ]


class HostPart:
    """Memory that a CPU device can use as it is, so that finishing copies nothing."""

    def __init__(self, device: Any, shape: tuple[int, ...], dtype: np.dtype):
        self.device = device
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        self.memory = pages(n_bytes)[:n_bytes].view(dtype).reshape(shape)
        self._array: Array | None = None

    def finish(self) -> Array:
        """The complete part, on its device. Writing its memory again writes over it."""
        if self._array is not None:
            return self._array
        array = jax.device_put(self.memory, self.device)
        if array.unsafe_buffer_pointer() == self.memory.ctypes.data:  # and no copy
            self._array = array
        return array


class DevicePart:
    """An array on an accelerator, overwritten in place one slice at a time."""

    def __init__(self, device: Any, shape: tuple[int, ...], dtype: np.dtype):
        self.device, self.dtype = device, dtype
        self.zeros = _zeros_program(shape, dtype, device)
        self.array: Array | None = None

    def read(self, source: _Source, place: Any, index: tuple[slice, ...]) -> None:
        """Read a slice, `index` in the file's order of axes, and put it at `place` of the part (`...`
        for all of it). The device transposes it."""
        values = source.array.read(index, self.dtype)
        # Waiting each time keeps it to one slice under way: transfers would otherwise queue up.
        piece = jax.device_put(values, self.device, may_alias=False).block_until_ready()
        del values
        if place is ...:
            array = place = None
        else:
            array = self.zeros() if self.array is None else self.array
            place = jnp.int32(place)
        self.array = _put(array, piece, place, source.transposed).block_until_ready()

    def finish(self) -> Array:
        """See `HostPart.finish`. The part keeps nothing, and may be written again."""
        array, self.array = self.array, None
        assert array is not None
        return array


@functools.cache
def _zeros_program(shape: tuple[int, ...], dtype: np.dtype, device: Any) -> Any:
    # jnp.zeros(..., device=device) may make the array twice, here and there.
    sharding = SingleDeviceSharding(device)
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, static_argnames="transposed", donate_argnums=0)
def _put(array: Array | None, piece: Array, place: Array | None, transposed: bool) -> Array:
    piece = jnp.swapaxes(piece, -1, -2) if transposed else piece
    return piece if array is None else jax.lax.dynamic_update_index_in_dim(array, piece, place, 0)


def new_part(device: Any, shape: tuple[int, ...], dtype: np.dtype) -> HostPart | DevicePart:
    """The kind of part that suits the device."""
    return (HostPart if device.platform == "cpu" else DevicePart)(device, shape, dtype)
