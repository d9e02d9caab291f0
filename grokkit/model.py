"""Grok-1: embedding, a stack of decoder layers, and the tied unembedding."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from grokkit.config import GrokConfig
from grokkit.errors import ConfigError, PromptError
from grokkit.kv_cache import KVCache, mark_visible
from grokkit.layers.attention import Attention
from grokkit.layers.embedding import Embedding
from grokkit.layers.moe import MoE
from grokkit.layers.rms_norm import RMSNorm
from grokkit.quant import QuantizedArray, Slot, index, quantize
from grokkit.sharding import ParamSpec, is_spec, release, shardings
from grokkit.taps import Capture, Change, Tap


class Output(eqx.Module):
    """What a forward pass returns."""

    logits: Float[Array, "batch position vocab"]
    """Next-token logits, float32."""
    cache: KVCache | None
    """Keys and values with the new tokens', if a cache was given."""
    captured: dict[str, Any]
    """What the captures kept, by their key; from layers, with a leading layer axis."""


class Resume(NamedTuple):
    """The middle of a forward pass: for cases that differ from one layer on only."""

    layer: Int[Array, ""]
    """The first layer to run; one program serves all."""
    resid_pre: Float[Array, "batch position d_model"]
    """The residual stream that enters it."""


class Block(eqx.Module):
    """A decoder layer: attention and experts, each between two norms."""

    attn_norm: RMSNorm
    attention: Attention
    attn_out_norm: RMSNorm
    moe_norm: RMSNorm
    moe: MoE
    moe_out_norm: RMSNorm

    @staticmethod
    def specs(config: GrokConfig) -> "Block":
        """Declare one layer's parameters."""
        norm = RMSNorm.specs(config)
        return Block(norm, Attention.specs(config), norm, norm, MoE.specs(config), norm)

    def __call__(
        self,
        x: Float[Array, "batch position d_model"],
        positions: Int[Array, "batch position"],
        visible: Bool[Array, "batch key"],
        cache: KVCache | None,
        layer: Int[Array, ""],
        dtype: Any,
        tap: Tap,
    ) -> tuple[Float[Array, "batch position d_model"], KVCache | None]:
        """Pass the stream through the layer; arguments as in `Attention.__call__`."""
        x = tap("resid_pre", x)
        attn_in = tap("attn_in", self.attn_norm(x))
        attn_out, cache = self.attention(attn_in, positions, visible, cache, layer, dtype, tap)
        x = tap("resid_mid", x + tap("attn_out", self.attn_out_norm(attn_out)))
        moe_in = tap("moe_in", self.moe_norm(x))
        moe_out = self.moe(moe_in, dtype, tap)
        return tap("resid_post", x + tap("moe_out", self.moe_out_norm(moe_out))), cache


class Rows(eqx.Module):
    """What the layers need to know of the tokens of a pass."""

    positions: Int[Array, "batch position"]
    """Absolute position of each token."""
    visible: Bool[Array, "batch key"]
    """Which keys may be attended to, by absolute position."""
    start: Int[Array, " batch"]
    """Tokens before these, in the cache."""
    counts: Int[Array, " batch"]
    """How many of each row's tokens are real."""


class Ends(eqx.Module):
    """What lies before and after the layers."""

    embedding: Embedding
    final_norm: RMSNorm
    config: GrokConfig = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def enter(
        self,
        tokens: Int[Array, "batch position"],
        cache: KVCache | None,
        lengths: Int[Array, " batch"] | None,
        captures: tuple[Capture, ...],
        edits: tuple[Change, ...],
    ) -> tuple[Float[Array, "batch position d_model"], Rows, dict[str, Any]]:
        """Embed tokens. **Returns:** the stream, what layers need besides, and what was kept."""
        batch, n = tokens.shape
        tokens = jax.reshard(tokens, P("data", None))
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
        start = jax.reshard(start, P("data"))
        counts = jnp.full(batch, n, jnp.int32) if lengths is None else lengths
        counts = jax.reshard(counts, P("data"))
        positions = start[:, None] + jnp.arange(n, dtype=jnp.int32)
        real = jnp.arange(n) < counts[:, None]
        visible = real & (tokens != self.config.pad_token)
        if cache is not None:
            visible = mark_visible(cache.visible, visible, start)
        tap = Tap(captures, edits, None, positions)
        x = tap("embed", self.embedding.embed(tokens) * self.config.embedding_multiplier)
        return x, Rows(positions, visible, start, counts), tap.captured

    def leave(
        self,
        x: Float[Array, "batch position d_model"],
        rows: Rows,
        last_only: bool,
        captures: tuple[Capture, ...],
        edits: tuple[Change, ...],
    ) -> tuple[Float[Array, "batch shown vocab"], dict[str, Any]]:
        """Unembed the stream. **Returns:** logits, and what was kept."""
        positions = rows.positions
        if last_only:
            x = jnp.take_along_axis(x, (rows.counts - 1)[:, None, None], axis=1)
            positions = (rows.start + rows.counts - 1)[:, None]
        tap = Tap(captures, edits, None, positions)
        logits = self.embedding.unembed(tap("final_norm", self.final_norm(x)), self.dtype)
        logits = tap("logits", logits * self.config.output_multiplier)
        return logits, tap.captured


def run_block(
    block: Block,
    x: Float[Array, "batch position d_model"],
    rows: Rows,
    cache: KVCache | None,
    layer: Int[Array, ""],
    dtype: Any,
    captures: tuple[Capture, ...],
    edits: tuple[Change, ...],
) -> tuple[Float[Array, "batch position d_model"], KVCache | None, dict[str, Any]]:
    """One layer under its own tap. **Returns:** the stream, the cache, and what was kept."""
    tap = Tap(captures, edits, layer, rows.positions)
    x, cache = block(x, rows.positions, rows.visible, cache, layer, dtype, tap)
    return x, cache, tap.captured


def with_tokens(cache: KVCache | None, rows: Rows) -> KVCache | None:
    """The cache with a pass's tokens counted, once all layers have written theirs."""
    if cache is None:
        return None
    length = rows.start + rows.counts
    return dataclasses.replace(cache, visible=rows.visible, length=length, is_new=False)


class Grok(eqx.Module):
    """The whole model. Every leaf of `blocks` has a leading layer axis.

    Run it under `jax.set_mesh(mesh)` with the mesh its arrays lie on.
    """

    is_streamed: ClassVar[bool] = False
    """Whether layers are read from disk as they are needed; see `StreamedGrok`."""

    embedding: Embedding
    blocks: Block
    final_norm: RMSNorm
    config: GrokConfig = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    """What matrix products round their operands to (see `einsum32`), float32 or bfloat16.
    Activations themselves are float32 in both."""

    @property
    def ends(self) -> Ends:
        """The parts before and after the layers."""
        return Ends(self.embedding, self.final_norm, self.config, self.dtype)

    def block(self, layer: Int[Array, ""]) -> Block:
        """One layer, its 8-bit matrices left where they lie in the stacks."""
        return jax.tree.map(lambda w: index(w, layer), self.blocks, is_leaf=_is_quantised)

    def __call__(
        self,
        tokens: Int[Array, "batch position"],
        *,
        cache: KVCache | None = None,
        lengths: Int[Array, " batch"] | None = None,
        last_only: bool = False,
        captures: tuple[Capture, ...] = (),
        edits: tuple[Change, ...] = (),
        resume: Resume | None = None,
    ) -> Output:
        """Next-token logits of every position.

        **Arguments:**

        - `tokens`: token ids. Pad tokens are never attended to.
        - `cache`: the tokens before these; the returned cache holds both. Inside a compiled function
            its lengths are not known: see there that it has room for `tokens`, pads included.
        - `lengths`: how many of each row's tokens are real when rows are padded on the right; all
            by default. The cache's lengths grow by this much.
        - `last_only`: give the logits of each row's last real token only, as one position.
        - `captures`, `edits`: what to keep and what to change; resolved against this model.
        - `resume`: begin at a layer, without captures or cache. Edits below it are not made.

        **Returns:** an `Output`.

        **Raises:** `PromptError` if the cache is known to have no room for `tokens`.
        """
        if cache is not None:
            check_room(cache, tokens.shape[1])
        x, rows, before = self.ends.enter(tokens, cache, lengths, captures, edits)
        if resume is None:
            x, cache, within = self._run_blocks(x, rows, cache, captures, edits)
        else:
            assert cache is None and not captures, "resume goes with neither cache nor captures"
            x, within = self._run_from(resume, rows, edits), {}
        logits, after = self.ends.leave(x, rows, last_only, captures, edits)
        return Output(logits, with_tokens(cache, rows), within | before | after)

    def __treescope_repr__(self, path: Any, subtree_renderer: Any) -> Any:
        """Show the arrays on a mesh that treescope can summarise them on."""
        layout = getattr(self.embedding.weight, "sharding", None)
        if not isinstance(layout, NamedSharding) or layout.mesh.are_all_axes_auto:
            return NotImplemented
        return subtree_renderer(release(self), path=path)

    def _run_blocks(
        self,
        x: Array,
        rows: Rows,
        cache: KVCache | None,
        captures: tuple[Capture, ...],
        edits: tuple[Change, ...],
    ) -> tuple[Array, KVCache | None, dict[str, Any]]:
        """Scan over the layers; captures of some layers only are written to buffers as they come."""

        stacks, rest = eqx.partition(self.blocks, _is_quantised, is_leaf=_is_quantised)

        def run(carry, xs):
            x, cache = carry
            rest, layer = xs
            slots = jax.tree.map(lambda q: index(q, layer), stacks, is_leaf=_is_quantised)
            block = eqx.combine(slots, rest, is_leaf=_is_slot)
            x, cache, captured = run_block(
                block, x, rows, cache, layer, self.dtype, captures, edits
            )
            return (x, cache), captured

        layers = jnp.arange(self.config.n_layers)
        some = {c.key: c.layer_numbers for c in captures if c.layer_numbers is not None}
        xs = (rest, layers)
        if not some:
            (x, cache), captured = jax.lax.scan(run, (x, cache), xs)
            return x, cache, captured

        def run_some(carry, xs):
            carry, buffers = carry
            carry, captured = run(carry, xs)
            buffers = {
                key: _store(buffers[key], captured[key], wanted, xs[1])
                for key, wanted in some.items()
            }
            rest = {key: value for key, value in captured.items() if key not in some}
            return (carry, buffers), rest

        first = jax.tree.map(lambda a: a[0], xs)
        shapes = jax.eval_shape(run, (x, cache), first)[1]
        buffers = {key: _zeros(len(wanted), shapes[key]) for key, wanted in some.items()}
        ((x, cache), buffers), captured = jax.lax.scan(run_some, ((x, cache), buffers), xs)
        return x, cache, captured | buffers

    def _run_from(self, resume: Resume, rows: Rows, edits: tuple[Change, ...]) -> Array:
        """The layers from one on, in a loop of as many turns as there are."""

        def run(layer: Array, x: Array) -> Array:
            return run_block(self.block(layer), x, rows, None, layer, self.dtype, (), edits)[0]

        x = jax.reshard(resume.resid_pre, P("data", None, None))
        return jax.lax.fori_loop(resume.layer, self.config.n_layers, run, x)


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


def check_room(cache: KVCache, n: int) -> None:
    """Refuse tokens that would be written over others: writing beyond the end moves back.

    **Raises:** `PromptError` if the cache is known to have no room for `n` more.
    """
    known = isinstance(cache.length, jax.Array) and not isinstance(cache.length, Tracer)
    held = int(cache.length.max()) if known else 0
    if held + n > cache.capacity:
        raise PromptError(
            f"cache: expected room for {n} more tokens, found {cache.capacity - held} of "
            f"{cache.capacity} places free; make a cache of a larger capacity"
        )


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
