"""From a checkpoint's files straight onto the devices of a mesh.

Each device's slice of each layer goes from the file into that device's part of the stacked array.
There is no host copy of the model, nor of a layer: on accelerators the memory beyond the weights is
one slice on its way (on the host and on the device); on CPU devices, a few slabs of some rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, PyTree, Shaped
from tqdm.auto import tqdm

from grokkit.checkpoint.official import Checkpoint, Entry
from grokkit.checkpoint.read import ArraySpan, Request, fill, pages
from grokkit.checkpoint.refusal import refusal
from grokkit.checkpoint.tensor_file import StackedTensors, TensorFile
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

    file: TensorFile | StackedTensors
    span: ArraySpan
    layer: int | None
    transposed: bool
    """Whether the leaf holds it with its last two axes exchanged, as 8-bit matrices of the official
    layout are."""

    @property
    def dtype(self) -> np.dtype:
        """What its entries are when they have been read."""
        return self.file.open(self.span).dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As the leaf holds it."""
        return self._exchanged(self.span.shape)

    def requests(
        self, targets: Iterable[tuple[tuple[slice, ...], Shaped[np.ndarray, "..."]]]
    ) -> list[Request]:
        """What to read for slices of it, each with the memory it goes to; both as the leaf has them."""
        return self.file.requests(
            self.span,
            [
                (self._exchanged(index), memory.swapaxes(-1, -2) if self.transposed else memory)
                for index, memory in targets
            ],
        )

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
        """A slice of it, in the file's order of axes."""
        in_file = self._exchanged(index)
        shape = [len(range(n)[s]) for s, n in zip(in_file, self.span.shape, strict=True)]
        found = np.empty(shape, dtype)
        fill(self.file.requests(self.span, [(in_file, found)]))
        return found

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
        return sum(source.span.nbytes for source in self.sources)

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
    if file.scales is None:
        return [(key.path, _Source(file, file.weight, key.layer, transposed=file.k_last))]
    return [
        (f"{key.path}.weight", _Source(file, file.weight, key.layer, transposed=not file.k_last)),
        (f"{key.path}.scales", _Source(file, file.scales, key.layer, transposed=False)),
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
    first = parts[0]
    if first.layer is None:
        shape = first.shape
    else:
        shape = (len(parts), *first.shape)
    # Ports keep embedding, norms and router in fewer bits than the model does: nothing is lost.
    same = np.dtype(spec.dtype) == first.dtype or (
        np.dtype(spec.dtype) == np.float32 and first.dtype in (jnp.bfloat16, np.float16)
    )
    if spec.shape != shape or not same:
        raise refusal(
            checkpoint.directory,
            f"{np.dtype(spec.dtype).name} of shape {spec.shape} for {path}",
            f"{first.dtype.name} of shape {shape}",
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
        for source, slices in _slices(plan):
            memories = {}
            for device, place, index in slices:
                part = its_parts[device]
                if isinstance(part, HostPart):
                    memories[part.memory.ctypes.data] = index, part.memory[place]
                else:  # one device after the other, while the file is in the page cache
                    part.read(source, index, place)
            if memories:
                requests += source.requests(memories.values())
            else:
                report(source.span.nbytes)
    fill(requests, report, direct)
    return [
        jax.make_array_from_single_device_arrays(
            plan.shape, plan.sharding, [part.finish() for part in its_parts.values()]
        )
        for plan, its_parts in zip(plans, parts, strict=True)
    ]


def _slices(
    plan: LeafPlan,
) -> Iterator[tuple[_Source, list[tuple[Any, Any, tuple[slice, ...]]]]]:
    """Each source of a leaf, with the devices that want a slice of it: device, place, slice."""
    places = plan.sharding.addressable_devices_indices_map(plan.shape)
    for source in plan.sources:
        slices = []
        for device, index in places.items():
            assert index is not None
            if source.layer is None:
                slices.append((device, ..., index))
            elif source.layer in (layers := range(plan.shape[0])[index[0]]):
                slices.append((device, source.layer - layers.start, index[1:]))
        yield source, slices


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

    def read(self, source: _Source, index: tuple[slice, ...], place: Any) -> None:
        """Read a slice of `source` and put it at index `place` of the part (`...` for all of it).

        It comes in the file's order of axes: the device transposes faster.
        """
        # Waiting each time keeps it to one slice under way: transfers would otherwise queue up.
        values, transposed = source.read(index, self.dtype), source.transposed
        piece = jax.device_put(values, self.device, may_alias=False).block_until_ready()
        del values
        if place is ...:
            self.array = _exchange(piece).block_until_ready() if transposed else piece
            return
        array = self.zeros() if self.array is None else self.array
        array = _overwrite(array, piece, jnp.int32(place), transposed)
        self.array = array.block_until_ready()

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


@jax.jit
def _exchange(piece: Array) -> Array:
    return jnp.swapaxes(piece, -1, -2)


@functools.partial(jax.jit, static_argnames="transposed", donate_argnums=0)
def _overwrite(array: Array, piece: Array, place: Array, transposed: bool) -> Array:
    piece = jnp.swapaxes(piece, -1, -2) if transposed else piece
    return jax.lax.dynamic_update_index_in_dim(array, piece, place, 0)


def new_part(device: Any, shape: tuple[int, ...], dtype: np.dtype) -> HostPart | DevicePart:
    """The kind of part that suits the device."""
    return (HostPart if device.platform == "cpu" else DevicePart)(device, shape, dtype)
