"""What a checkpoint holds and how it would lie over a mesh, from its headers alone."""

import dataclasses
import math

import jax
import numpy as np

from grokkit.checkpoint import ArraySpan, Checkpoint, stored_specs
from grokkit.errors import ConfigError
from grokkit.model import param_specs
from grokkit.sharding import ParamSpec, is_spec


@dataclasses.dataclass(frozen=True)
class TensorRow:
    """One array of a checkpoint."""

    name: str
    """The original's parameter name; a quantised matrix's scales end in `.scales`."""
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    cut: str
    """Which axis is cut over which mesh axis; empty if every device holds the whole."""
    local_shape: tuple[int, ...]
    """Shape of one device's part."""
    local_nbytes: int
    """Bytes of one device's part."""

    @property
    def layout(self) -> str:
        """The device's part in words."""
        return f"{_by(self.local_shape)}, {self.cut}" if self.cut else "a full copy"


@dataclasses.dataclass(frozen=True, repr=False)
class Layout:
    """Every array of a checkpoint with its layout on a mesh. Prints as a table."""

    checkpoint: Checkpoint
    mesh_shape: dict[str, int]
    rows: tuple[TensorRow, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, each counted once."""
        return sum(row.nbytes for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Bytes that each device holds."""
        return sum(row.local_nbytes for row in self.rows)

    def __repr__(self) -> str:
        c = self.checkpoint.config
        tokenizer = self.checkpoint.tokenizer_file
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh_shape.items())
        head = (
            f"{self.checkpoint.directory}: {self.checkpoint.describe('tensor')}, "
            f"{'a' if tokenizer else 'no'} tokenizer.model\n"
            f"{c.n_params:,} parameters: {c.n_layers} layers, d_model {c.d_model}, {c.n_heads} "
            f"heads of {c.d_head} ({c.n_kv_heads} key/value), {c.n_experts} experts of {c.d_ff}, "
            f"{c.n_experts_per_token} a token; vocab {c.vocab_size}, context {c.context_length}\n"
            f"layout on a mesh of {mesh}\n"
        )
        titles = ("name", "shape", "dtype", "bytes", "on each device")
        cells = [
            (row.name, _by(row.shape), row.dtype, f"{row.nbytes:,}", row.layout)
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        lines = [
            f"{name:{widths[0]}}  {shape:{widths[1]}}  {dtype:{widths[2]}}  {n:>{widths[3]}}  {lay}"
            for name, shape, dtype, n, lay in (titles, *cells)
        ]
        n_devices = math.prod(self.mesh_shape.values())
        total = (
            f"\n{len(self.rows)} arrays, {self.nbytes:,} B; {self.bytes_per_device:,} B "
            f"({_readable(self.bytes_per_device)}) on each of {n_devices} devices"
        )
        return "\n".join([head, *lines, total])


def checkpoint_layout(checkpoint: Checkpoint, data: int, model: int) -> Layout:
    """How a checkpoint's arrays would lie over `data` x `model` devices, without having them.

    **Arguments:**

    - `checkpoint`: from `open_checkpoint`; none of its weights is read.
    - `data`, `model`: sizes of the mesh's axes, as for `make_mesh`.

    **Returns:** a `Layout`.

    **Raises:** `ConfigError` if the mesh does not divide the model's shapes.
    """
    if data < 1 or model < 1:
        raise ConfigError(f"mesh axes must be at least 1, found data={data}, model={model}")
    config = checkpoint.config
    if config.n_kv_heads % model:
        raise ConfigError(
            f"{config.n_kv_heads} key/value heads do not divide over {model} 'model' devices; "
            f"choose a mesh whose 'model' axis divides {config.n_kv_heads}"
        )
    mesh_shape = {"data": data, "model": model}
    stored = stored_specs(checkpoint, param_specs(config))
    leaves = jax.tree_util.tree_leaves_with_path(stored, is_leaf=is_spec)
    specs = {jax.tree_util.keystr(p, simple=True, separator="."): s for p, s in leaves}
    rows = []
    for entry in checkpoint:
        key, file = entry.key, entry.file
        stacked = key.layer is not None
        if file.scales is None:
            spec = specs[key.path]
            spec = _turned(spec) if file.k_last else spec
            rows.append(_row(key.name, file.weight, spec, stacked, mesh_shape))
            continue
        weight, scales = specs[f"{key.path}.weight"], specs[f"{key.path}.scales"]
        weight = weight if file.k_last else _turned(weight)
        rows.append(_row(key.name, file.weight, weight, stacked, mesh_shape))
        rows.append(_row(f"{key.name}.scales", file.scales, scales, stacked, mesh_shape))
    return Layout(checkpoint, mesh_shape, tuple(rows))


def _turned(spec: ParamSpec) -> ParamSpec:
    """A matrix that the model holds as [n, k] as [k, n], and the other way round."""

    def turn(pair: tuple) -> tuple:
        return (*pair[:-2], pair[-1], pair[-2])

    return dataclasses.replace(spec, shape=turn(spec.shape), axes=turn(spec.axes))


def _row(
    name: str, span: ArraySpan, spec: ParamSpec, stacked: bool, mesh_shape: dict[str, int]
) -> TensorRow:
    """One array; `stacked` leaves have a layer axis that the file's array has not."""
    first = 1 if stacked else 0
    local, cut = [], []
    axes = zip(span.shape, spec.axes[first:], spec.partition_spec()[first:], strict=True)
    for size, axis, mesh_axis in axes:
        parts = 1 if mesh_axis is None else mesh_shape[mesh_axis]
        if size % parts:
            raise ConfigError(
                f"{name}: axis {axis!r} of size {size} does not divide over {parts} {mesh_axis!r} "
                f"devices; choose a mesh whose {mesh_axis!r} axis divides {size}"
            )
        local.append(size // parts)
        if parts > 1:
            cut.append(f"{axis.removesuffix('_split')} cut in {parts}")
    # As the model holds it: 4-bit weights are unpacked, a port's norms widened.
    local_nbytes = math.prod(local) * np.dtype(spec.dtype).itemsize
    dtype = span.dtype.name
    return TensorRow(
        name, span.shape, dtype, span.nbytes, ", ".join(cut), tuple(local), local_nbytes
    )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _readable(n: int) -> str:
    """`1527936` as `1.5 MiB`."""
    size, unit = float(n), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}"
