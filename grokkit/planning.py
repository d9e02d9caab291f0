"""What running a model would take, from the compiled programs of a model without weights."""

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from grokkit.checkpoint import Checkpoint, stored_specs
from grokkit.config import GROK_1, GrokConfig
from grokkit.errors import ConfigError, PromptError
from grokkit.generate import PREFILL_PART, State, decode, prefill
from grokkit.hlo import Collective, collectives
from grokkit.inspection import Captures, as_captures, bill
from grokkit.kv_cache import KVCache
from grokkit.model import check_mesh, param_specs
from grokkit.sampling import Sampling
from grokkit.sharding import abstract, is_spec, make_mesh

GB = 1_000_000_000
MACHINES = ((8, 80 * GB), (8, 40 * GB), (4, 141 * GB))
"""Devices and bytes of each: what Grok-1 is commonly run on."""
_CAPTURE, _TEMPORARIES = "capture ", "temporaries"
_QUICK = {"xla_backend_optimization_level": 0}  # machine code that will not run; memory is the same


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether a mesh fits on a machine."""

    n_devices: int
    device_memory: int
    mesh: tuple[int, int]
    """Devices along the batch, and devices that share each layer's weights."""
    parts: tuple[tuple[str, int], ...]
    """What takes memory, and bytes of it on the fullest device; where `whole` is false, weights and
    cache alone."""
    whole: bool
    """Whether captures and programs count too. They are not compiled where the weights and the
    cache alone do not fit."""

    @property
    def needed(self) -> int:
        """Bytes on the fullest device, of what counts."""
        return sum(n for _, n in self.parts)

    @property
    def machine(self) -> str:
        """What it is called."""
        return f"{self.n_devices} x {self.device_memory / GB:g} GB"

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.needed <= self.device_memory

    def __str__(self) -> str:
        on = f"{self.machine}, mesh {self.mesh[0]},{self.mesh[1]}"
        if self.fits:
            return f"{on}: fits, {_gb(self.device_memory - self.needed)} a device to spare"
        what = "it takes" if self.whole else "weights and cache alone take"
        return f"{on}: does NOT fit, {what} {_gb(self.needed)} a device"


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What a model takes on one mesh; made by `plan`. Prints as a table."""

    config: GrokConfig
    mesh: tuple[int, int]
    context: int
    batch: int
    dtype: str
    device_memory: int
    rows: tuple[tuple[str, str, int, int], ...]
    """What takes memory: name, what it is, bytes in all, bytes on the fullest device. Of the
    temporaries of two programs that do not run at once the larger one counts."""
    collectives: tuple[Collective, ...]
    """Exchanges between devices that one token costs."""
    read_per_token: int
    """Bytes that a device reads for one token of each sequence, with a full context."""
    verdicts: tuple[Verdict, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return _sum((row[0], row[2]) for row in self.rows)

    @property
    def bytes_per_device(self) -> int:
        """Bytes on the fullest device."""
        return _sum((row[0], row[3]) for row in self.rows)

    @property
    def fits(self) -> bool:
        """Whether a device has as much."""
        return self.bytes_per_device <= self.device_memory

    def figure(self) -> Any:
        """A matplotlib figure: bars of what a device needs on each machine, beside what it has."""
        from grokkit.plots import device_memory  # late: matplotlib is slow to import

        names = [f"{v.machine}\nmesh {v.mesh[0]},{v.mesh[1]}" for v in self.verdicts]
        kinds = dict.fromkeys(kind for v in self.verdicts for kind, _ in v.parts)
        parts = {kind: [dict(v.parts).get(kind, 0) for v in self.verdicts] for kind in kinds}
        title = f"What a device needs for {self.batch} x {self.context:,} tokens, and has"
        return device_memory(names, parts, [v.device_memory for v in self.verdicts], title)

    def _lines(self) -> list[str]:
        lines = []
        for c in self.collectives:
            lines.append(f"{c.count:,} x {c.kind} a token, {_gb(c.nbytes)} in all")
        if not self.collectives:
            lines.append("no exchange between devices")
        lines.append(f"{_gb(self.read_per_token)} read a token on each device")
        return [*lines, *map(str, self.verdicts)]

    def __repr__(self) -> str:
        c, (data, model) = self.config, self.mesh
        head = (
            f"Plan of {c.n_params:,} parameters in {c.n_layers} layers\n"
            f"  on a mesh of data={data} x model={model}: {self.batch} sequence(s) of "
            f"{self.context:,} tokens, {self.dtype}"
        )
        titles = ("", "", "bytes in all", "bytes a device")
        sums = ("total", "", f"{self.nbytes:,}", f"{self.bytes_per_device:,}")
        cells = [(n, what, f"{t:,}", f"{d:,}") for n, what, t, d in self.rows]
        widths = [max(len(r[i]) for r in (titles, *cells, sums)) for i in range(4)]
        table = [
            f"  {a:{widths[0]}}  {b:{widths[1]}}  {t:>{widths[2]}}  {d:>{widths[3]}}"
            for a, b, t, d in (titles, *cells, sums)
        ]
        verdict = "fits in" if self.fits else "does NOT fit in"
        last = f"  {verdict} {_gb(self.device_memory)} a device"
        return "\n".join([head, *table, last, *(f"  {line}" for line in self._lines())])

    def _repr_html_(self) -> str:
        total = ("total", "", self.nbytes, self.bytes_per_device)
        body = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(what)}</td>"
            f"<td style='text-align:right'>{all_:,}</td>"
            f"<td style='text-align:right'>{device:,}</td></tr>"
            for name, what, all_, device in (*self.rows, total)
        )
        verdict = "fits in" if self.fits else "does <b>not</b> fit in"
        head = "<tr><th></th><th></th><th>bytes in all</th><th>bytes a device</th></tr>"
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self._lines())
        return (
            f"<table><caption>mesh {self.mesh[0]},{self.mesh[1]}: {verdict} "
            f"{_gb(self.device_memory)} a device</caption><thead>{head}</thead>"
            f"<tbody>{body}</tbody></table><ul>{lines}</ul>"
        )


def plan(
    config: GrokConfig | Checkpoint = GROK_1,
    mesh: tuple[int, int] = (1, 8),
    context: int | None = None,
    batch: int = 1,
    captures: Captures | tuple[()] = (),
    dtype: Any = "bfloat16",
    device_memory: int = 80 * GB,
    machines: Sequence[tuple[int, int]] = MACHINES,
) -> Plan:
    """Compile prefill and decode of a model without weights, and add up what they take.

    Nothing of the model's size is allocated; it takes seconds. The programs are those that
    `generate` runs, and, with captures, `generate_with_cache`. They are compiled for the devices
    that JAX has, or for those of the CPU if there are too few: weights and cache are to the byte
    what any device holds, temporaries and exchanges are this platform's.

    **Arguments:**

    - `config`: the model's sizes, or an opened checkpoint, whose matrices count as it has them.
    - `mesh`: devices along the batch, and devices that share each layer's weights.
    - `context`: tokens of each sequence, prompt and continuation; the model's longest by default.
    - `batch`: sequences at once.
    - `captures`: what is kept of a prompt that fills the context: sites or `Capture`s; `None` for
        every site. Nothing by default.
    - `dtype`: what matrix products round to, and the cache holds.
    - `device_memory`: bytes that a device has.
    - `machines`: number of devices and bytes of each, to say which meshes fit on.

    **Returns:** a `Plan`.

    **Raises:** `ConfigError` for a mesh that does not divide the model, or is larger than the
    number of devices; `PromptError` for a batch or context that cannot be run; `SiteError` for
    captures that do not exist.
    """
    checkpoint = config if isinstance(config, Checkpoint) else None
    sizes = config.config if isinstance(config, Checkpoint) else config
    context = sizes.context_length if context is None else context
    if not 1 <= context <= sizes.context_length:
        raise PromptError(f"context must be from 1 to the model's {sizes.context_length}, found "
                          f"{context}")  # fmt: skip
    if batch < 1 or batch % mesh[0]:
        raise PromptError(f"batch must be a positive multiple of the mesh's {mesh[0]} 'data' "
                          f"devices, found {batch}")  # fmt: skip
    wanted = () if captures == () else as_captures(captures, sizes, context)  # type: ignore[arg-type]
    specs = param_specs(sizes, jnp.dtype(dtype))
    if checkpoint is not None:
        specs = stored_specs(checkpoint, specs)
    case = _Case(specs, sizes, context, batch, wanted, jnp.dtype(dtype))
    found = case.measure(mesh)
    measured, verdicts = {mesh: found}, []
    for n_devices, memory in machines:
        for on in _meshes(case, n_devices):
            verdicts.append(_verdict(case, on, memory, measured))
    return Plan(
        sizes, mesh, context, batch, jnp.dtype(dtype).name, device_memory, found.rows,
        found.collectives, case.read_per_token(mesh), tuple(verdicts),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Measured:
    rows: tuple[tuple[str, str, int, int], ...]
    collectives: tuple[Collective, ...]

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Bytes on the fullest device of what is there at once, captures together."""
        sizes = {name: n for name, _, _, n in self.rows}
        captures = sum(n for name, n in sizes.items() if name.startswith(_CAPTURE))
        kept = [(name, sizes[name]) for name in ("weights", "KV cache")]
        temporaries = max(n for name, n in sizes.items() if name.endswith(_TEMPORARIES))
        rest = [("captures", captures)] if captures else []
        return (*kept, ("temporaries", temporaries), *rest)


@dataclasses.dataclass(frozen=True)
class _Case:
    """What is planned, but for the mesh."""

    specs: Any
    config: GrokConfig
    context: int
    batch: int
    captures: tuple[Any, ...]
    dtype: Any

    def kept(self, mesh: tuple[int, int]) -> list[tuple[str, str, int, int]]:
        """Rows of what stays in memory, from shapes alone."""
        return [
            ("weights", f"{self.config.n_params:,} parameters", *_bytes(self.specs, mesh)),
            ("KV cache", f"{self.batch} x {self.context:,} tokens", *_bytes(self.cache, mesh)),
        ]

    @property
    def cache(self) -> KVCache:
        return KVCache.specs(self.config, self.batch, self.context, self.dtype)

    def measure(self, shape: tuple[int, int]) -> _Measured:
        """Compile both programs for a mesh."""
        mesh = _mesh(shape)
        check_mesh(self.config, mesh, self.specs)
        model, cache = abstract((self.specs, self.cache), mesh)

        def along_batch(a: Any) -> Any:
            layout = NamedSharding(mesh, P("data"))
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout)

        settings = jax.tree.map(along_batch, Sampling().rows(self.batch, self.config.vocab_size))
        part = self.context if self.captures else min(PREFILL_PART, self.context)
        tokens = along_batch(np.empty((self.batch, part), np.int32))
        one: Any = along_batch(np.empty(self.batch, np.int32))
        with jax.set_mesh(mesh):
            prompt: Any = prefill.lower(model, tokens, one, cache, settings, self.captures, ())
            step: Any = decode.lower(model, State(cache, one, None), settings, 1)
            kept = {}
            if self.captures:
                out = jax.eval_shape(
                    lambda *a: prefill(*a, captures=self.captures, edits=()),
                    model, tokens, one, cache, settings,
                )  # fmt: skip
                kept = {c.key: out[2][c.key] for c in self.captures}
            prompt, step = (p.compile(compiler_options=_QUICK) for p in (prompt, step))
        n = mesh.size
        rows = self.kept(shape)
        rows += [
            (f"{_CAPTURE}{name}", s, total, local) for name, s, total, local in bill(kept).rows
        ]
        temporaries = [p.memory_analysis().temp_size_in_bytes for p in (prompt, step)]
        rows += [
            (
                f"prefill {_TEMPORARIES}",
                f"{part:,} tokens at once",
                n * temporaries[0],
                temporaries[0],
            ),
            (f"decode {_TEMPORARIES}", "one token", n * temporaries[1], temporaries[1]),
        ]
        return _Measured(tuple(rows), collectives(step.as_text()))

    def read_per_token(self, mesh: tuple[int, int]) -> int:
        """Bytes of weights and cache that a device reads in a decode step.

        Of the experts only those chosen; those of several sequences as if chosen at random.
        """
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.specs, is_leaf=is_spec)
        rows = self.batch // mesh[0]
        c = self.config
        share = 1 - (1 - c.n_experts_per_token / c.n_experts) ** rows
        total = float(_bytes(self.cache, mesh)[1])
        for path, spec in leaves:
            is_expert = "expert" in spec.axes[:-1] and "router" not in jax.tree_util.keystr(path)
            total += _bytes(spec, mesh)[1] * (share if is_expert else 1)
        return round(total)


def _sum(rows: Iterable[tuple[str, int]]) -> int:
    """All bytes but those of the smaller temporaries: the two programs do not run at once."""
    rows = list(rows)
    return sum(n for _, n in rows) - min(n for name, n in rows if name.endswith(_TEMPORARIES))


def _verdict(
    case: _Case, mesh: tuple[int, int], memory: int, measured: dict[tuple[int, int], _Measured]
) -> Verdict:
    """Whether a mesh fits; what has to be measured for it joins `measured`."""
    kept = tuple((row[0], row[3]) for row in case.kept(mesh))
    n_devices = math.prod(mesh)
    if mesh not in measured:
        if sum(n for _, n in kept) > memory:
            return Verdict(n_devices, memory, mesh, kept, whole=False)
        measured[mesh] = case.measure(mesh)
    return Verdict(n_devices, memory, mesh, measured[mesh].parts, whole=True)


def _meshes(case: _Case, n_devices: int) -> list[tuple[int, int]]:
    """Ways to lay the model over all of a machine's devices."""
    found = []
    for data in range(1, n_devices + 1):
        model = n_devices // data
        if n_devices % data or case.batch % data or case.config.n_kv_heads % model:
            continue
        try:
            _bytes(case.specs, (data, model))
        except ConfigError:
            continue
        found.append((data, model))
    return found


def _mesh(shape: tuple[int, int]) -> Mesh:
    """A mesh of the devices there are, or of the CPU's if those are too few."""
    devices = jax.devices()
    if len(devices) < math.prod(shape):
        devices = jax.devices("cpu")
    return make_mesh(*shape, devices)


def _bytes(specs: PyTree, mesh: tuple[int, int]) -> tuple[int, int]:
    """Bytes of a tree of declarations: in all, each part once, and on a device."""
    sizes = dict(zip(("data", "model"), mesh, strict=True))
    total = local = 0
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        cut = math.prod(sizes[axis] for axis in spec.partition_spec() if axis is not None)
        if any(
            axis is not None and size % sizes[axis]
            for size, axis in zip(spec.shape, spec.partition_spec(), strict=True)
        ):
            raise ConfigError(f"axes {spec.axes} of sizes {spec.shape} do not divide over a mesh "
                              f"of data={mesh[0]} x model={mesh[1]}")  # fmt: skip
        total += spec.nbytes
        local += spec.nbytes // cut
    return total, local


def _gb(n: int) -> str:
    for name, size in (("TB", 1000 * GB), ("GB", GB), ("MB", GB // 1000), ("kB", 1000)):
        if n >= size:
            return f"{n / size:.3g} {name}"
    return f"{n:.0f} B"
