"""Grok-1: embedding, a stack of decoder layers, and the tied unembedding."""

import functools
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from grokkit.abstract_model import PREFILL_PART, Group, Model, Read, Resume, Step
from grokkit.config import GrokConfig
from grokkit.errors import ConfigError
from grokkit.kv_cache import KVCache
from grokkit.layers.block import Block, Rows
from grokkit.layers.embedding import Embedding
from grokkit.layers.rms_norm import RMSNorm
from grokkit.processes import to_host
from grokkit.quant import QuantizedArray, Slot, index, quantize
from grokkit.sharding import ParamSpec, is_spec, release, shardings
from grokkit.taps import Capture, Change


class Grok(Model, eqx.Module):
    """The whole model in memory, a pytree. Every leaf of `blocks` has a leading layer axis."""

    shares_passes: ClassVar[bool] = False
    runs_ahead: ClassVar[bool] = True

    embedding: Embedding
    blocks: Block
    final_norm: RMSNorm
    config: GrokConfig = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def block(self, layer: Int[Array, ""]) -> Block:
        """One layer, its 8-bit matrices left where they lie in the stacks."""
        return jax.tree.map(lambda w: index(w, layer), self.blocks, is_leaf=_is_quantised)

    def run(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return program(self, *args, **kwargs)

    def repeat(self, step: Step, carry: Any, n: int) -> tuple[Any, PyTree]:
        return jax.lax.scan(lambda carry, _: step(carry), carry, length=n)

    def layers(
        self, start: int = 0, stop: int | None = None, backwards: bool = False
    ) -> Generator[Block]:
        order = range(self.config.n_layers)[start:stop]
        for layer in order[::-1] if backwards else order:
            yield self.block(jnp.int32(layer))

    def part(self, layer: int, choose: Callable[[Block], PyTree]) -> PyTree:
        return _entry(choose(self.blocks), jnp.int32(layer))

    def read_logits(self, groups: Sequence[Group], read: Read, mesh: Mesh) -> Iterator[np.ndarray]:
        for tokens, numbers, lengths in groups:
            pieces, (batch, n) = [], tokens.shape
            cache = KVCache.empty(self.config, batch, n, self.dtype, mesh)
            for start in range(0, n, PREFILL_PART):
                part = slice(start, start + PREFILL_PART)
                counts = np.clip(lengths - start, 0, PREFILL_PART).astype(np.int32)
                arrays = jax.device_put((tokens[:, part], numbers[:, part], counts), P("data"))
                cache, piece = _read_part(self, cache, *arrays, read)
                pieces.append(piece)
            yield np.concatenate(to_host(pieces), axis=1)

    def shapes(self) -> "Grok":
        return self

    def digest(self) -> str:
        sums = np.stack(to_host(jax.tree.leaves(_sums(self))))
        return f"in memory, {hashlib.sha256(sums.tobytes()).hexdigest()[:32]}"

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        """Show the arrays on a mesh that treescope can summarise them on."""
        layout = getattr(self.embedding.weight, "sharding", None)
        if not isinstance(layout, NamedSharding) or layout.mesh.are_all_axes_auto:
            return NotImplemented
        return subtree_renderer(release(self), path=path)

    def _run_layers(
        self,
        x: Array,
        rows: Rows,
        cache: KVCache | None,
        captures: tuple[Capture, ...],
        edits: tuple[Change, ...],
        resume: Resume | None,
    ) -> tuple[Array, KVCache | None, dict[str, Any]]:
        """Scan over the layers; captures of some layers only are written to buffers as they come."""
        if resume is not None:
            return self._run_from(resume, rows, edits), None, {}
        stacks, rest = eqx.partition(self.blocks, _is_quantised, is_leaf=_is_quantised)

        def run(carry, xs):
            x, cache = carry
            rest, layer = xs
            slots = jax.tree.map(lambda q: index(q, layer), stacks, is_leaf=_is_quantised)
            block = eqx.combine(slots, rest, is_leaf=_is_slot)
            x, cache, captured = block(x, rows, cache, layer, self.dtype, captures, edits)
            return (x, cache), captured

        def run_and_store(carry, xs):
            carry, buffers = carry
            carry, captured = run(carry, xs)
            buffers = {
                key: _store(buffers[key], captured.pop(key), wanted, xs[1])
                for key, wanted in some.items()
            }
            return (carry, buffers), captured

        xs = (rest, jnp.arange(self.config.n_layers))
        some = {c.key: c.layer_numbers for c in captures if c.layer_numbers is not None}
        buffers = {}
        if some:
            shapes = jax.eval_shape(run, (x, cache), jax.tree.map(lambda a: a[0], xs))[1]
            buffers = {key: _zeros(len(wanted), shapes[key]) for key, wanted in some.items()}
        carry = ((x, cache), buffers)
        ((x, cache), buffers), captured = jax.lax.scan(run_and_store, carry, xs)
        return x, cache, captured | buffers

    def _run_from(self, resume: Resume, rows: Rows, edits: tuple[Change, ...]) -> Array:
        """The layers from one on, in a loop of as many turns as there are."""

        def run(layer: Array, x: Array) -> Array:
            return self.block(layer)(x, rows, None, layer, self.dtype, (), edits)[0]

        x = jax.reshard(resume.resid_pre, P("data", None, None))
        return jax.lax.fori_loop(resume.layer, self.config.n_layers, run, x)


@functools.partial(jax.jit, static_argnames=("read",), donate_argnames=("cache",))
def _read_part(
    model: Grok,
    cache: KVCache,
    tokens: Int[Array, "batch position"],
    numbers: Int[Array, "batch position"],
    counts: Int[Array, " batch"],
    read: Read,
) -> tuple[KVCache, Array]:
    """Feed `tokens`, of which so many are real; what `read` makes of their logits."""
    out = model(tokens, cache=cache, lengths=counts)
    assert out.cache is not None
    return out.cache, read(out.logits, numbers)


@jax.jit
def _entry(stacks: PyTree, layer: Array) -> PyTree:
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False), stacks)


@jax.jit
def _sums(model: Grok) -> PyTree:
    """Two numbers of each array, which hardly any other array has."""

    def sums(a: Array) -> Array:
        if jnp.issubdtype(a.dtype, jnp.floating):
            kind = {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
            a = jax.lax.bitcast_convert_type(a, kind)
        a = a.astype(jnp.uint32)
        return jnp.stack([jnp.sum(a), jnp.sum(a * a)])

    return jax.tree.map(sums, model)


def _is_quantised(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def _is_slot(x: Any) -> bool:
    return x is None or isinstance(x, Slot)


def _zeros(n: int, like: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """Room for `n` layers of what one layer's capture gives."""

    def zeros(s: jax.ShapeDtypeStruct) -> Array:
        return jax.reshard(jnp.zeros((n, *s.shape), s.dtype), P(None, *s.sharding.spec))

    return jax.tree.map(zeros, like)


def _store(
    buffer: PyTree[Array], value: PyTree[Array], wanted: tuple[int, ...], layer: Int[Array, ""]
) -> PyTree[Array]:
    """Put one layer's capture into its slot, if it has one; in place in the compiled loop."""
    hits = jnp.asarray(wanted) == layer
    slot = jnp.argmax(hits)

    def store(b: Array, v: Array) -> Array:
        new = jnp.where(jnp.any(hits), v, jax.lax.dynamic_index_in_dim(b, slot, keepdims=False))
        return jax.lax.dynamic_update_index_in_dim(b, new, slot, 0)

    return jax.tree.map(store, buffer, value)


def param_specs(config: GrokConfig, dtype: Any = jnp.bfloat16) -> Grok:
    """The whole model with a `ParamSpec` in place of every array."""

    def stacked(s: ParamSpec) -> ParamSpec:
        return ParamSpec((config.n_layers, *s.shape), s.dtype, ("layer", *s.axes), s.init_scale)

    return Grok(
        embedding=Embedding.specs(config),
        blocks=jax.tree.map(stacked, Block.specs(config), is_leaf=is_spec),
        final_norm=RMSNorm.specs(config),
        config=config,
        dtype=jnp.dtype(dtype),
    )


def check_mesh(config: GrokConfig, mesh: Mesh, specs: PyTree | None = None) -> None:
    """Check that a model can lie on a mesh.

    **Arguments:**

    - `config`, `mesh`: the model's sizes, and the devices.
    - `specs`: the parameters' declarations, if they are not those of `param_specs`.

    **Raises:** `ConfigError` if a parameter or head of the model does not divide over `mesh`.
    """
    for axis in ("data", "model"):
        if axis not in mesh.shape:
            raise ConfigError(
                f"expected a mesh with axes 'data' and 'model', found {tuple(mesh.axis_names)}; "
                f"make it with grokkit.make_mesh"
            )
    if config.n_kv_heads % mesh.shape["model"]:
        raise ConfigError(
            f"{config.n_kv_heads} key/value heads do not divide over the mesh's "
            f"{mesh.shape['model']} 'model' devices; choose a mesh whose 'model' axis divides "
            f"{config.n_kv_heads}"
        )
    shardings(param_specs(config) if specs is None else specs, mesh)


def initialise(config: GrokConfig, key: PRNGKeyArray, dtype: Any = jnp.float32) -> Grok:
    """A model with random weights, quantised as a checkpoint's are, on one device."""

    def one(spec: ParamSpec | QuantizedArray, key: PRNGKeyArray) -> Any:
        if isinstance(spec, ParamSpec):
            return spec.initialise(key)
        weight: Any = spec.weight
        floats = jax.random.normal(key, spec.shape) * weight.init_scale
        return quantize(floats, spec.scales.shape[-2])

    specs = param_specs(config, dtype)
    leaves, treedef = jax.tree.flatten(
        specs, is_leaf=lambda x: isinstance(x, ParamSpec | QuantizedArray)
    )
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [one(s, k) for s, k in zip(leaves, keys, strict=True)])


def place(model: Grok, mesh: Mesh) -> Grok:
    """Lay a model's arrays out over `mesh` as their declarations say."""
    specs = param_specs(model.config, model.dtype)
    return jax.tree.map(
        lambda s, a: jax.device_put(a, s.sharding(mesh)), specs, model, is_leaf=is_spec
    )
