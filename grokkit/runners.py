"""The interface of the original's `run.py`, on grokkit's parts.

```python
from grokkit.runners import LanguageModelConfig, TransformerConfig, QuantizedWeight8bit as QW8Bit
from grokkit.runners import InferenceRunner, ModelRunner, sample_from_model
```

in place of its two lines of imports, and the rest of the script runs as it stands. Arguments and
defaults are the original's; one that cannot be honoured raises a `ConfigError`. What differs, and
why, is told in docs/coming-from-the-original.md.
"""

import dataclasses
import logging
import math
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from grokkit import compilation_cache
from grokkit.batch_request import Generation
from grokkit.batching import ContinuousBatch
from grokkit.checkpoint import Checkpoint, load_params, open_checkpoint, stored_specs
from grokkit.checkpoint.hugging_face import read_config
from grokkit.checkpoint.official import CONFIG_FILE
from grokkit.config import GrokConfig
from grokkit.errors import ConfigError
from grokkit.language_model import LanguageModel
from grokkit.loading import load_facts
from grokkit.model import check_mesh, param_specs
from grokkit.processes import agree, is_first, spans_processes
from grokkit.sharding import make_mesh
from grokkit.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class QuantizedWeight8bit:
    """An 8-bit matrix as the original's files hold it: [..., k, n], and its scales.

    grokkit's own, `grokkit.quant.QuantizedArray`, holds the matrix transposed.
    """

    weight: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape."""
        return self.weight.shape


jax.tree_util.register_dataclass(QuantizedWeight8bit, ["weight", "scales"], [])


@dataclasses.dataclass
class TransformerConfig:
    """The original's sizes of the decoder stack."""

    emb_size: int
    key_size: int
    num_q_heads: int
    num_kv_heads: int
    num_layers: int
    vocab_size: int = 128 * 1024
    widening_factor: float | int = 4.0
    attn_output_multiplier: float | int = 1.0
    name: str | None = None
    num_experts: int = -1
    capacity_factor: float | int = 1.0
    num_selected_experts: int = 1
    init_scale: float = 1.0
    shard_activations: bool = False
    data_axis: str | Sequence[str] = "data"
    model_axis: str | Sequence[str] = "model"


@dataclasses.dataclass
class LanguageModelConfig:
    """The original's description of a model."""

    model: TransformerConfig | None
    vocab_size: int
    pad_token: int
    eos_token: int
    sequence_len: int
    model_size: int = 0
    embedding_init_scale: float = 1.0
    embedding_multiplier_scale: float | int = 1.0
    output_multiplier_scale: float | int = 1.0
    name: str | None = None
    fprop_dtype: Any = jnp.bfloat16
    model_type: str | None = None
    init_scale_override: float | None = None
    shard_embeddings: bool = True

    def to_config(self) -> GrokConfig:
        """The same model in grokkit's terms.

        **Raises:** `ConfigError` for an option that cannot be honoured.
        """
        inner = self.model
        if inner is None:
            raise ConfigError("model: expected a TransformerConfig, found None")
        _only("num_experts", inner.num_experts > 1, inner.num_experts, "2 or more: the layers here "
              "are mixtures of experts")  # fmt: skip
        _only("vocab_size of the TransformerConfig", inner.vocab_size in (128 * 1024, self.vocab_size),
              inner.vocab_size, f"{self.vocab_size}, as the LanguageModelConfig's")  # fmt: skip
        _only("capacity_factor", inner.capacity_factor == 1, inner.capacity_factor, "1.0: every "
              "token always gets all its experts")  # fmt: skip
        _only("data_axis", _axis(inner.data_axis) == "data", inner.data_axis, "'data', the mesh's")
        _only("model_axis", _axis(inner.model_axis) == "model", inner.model_axis, "'model', the "
              "mesh's")  # fmt: skip
        _only("model_size", self.model_size in (0, inner.emb_size), self.model_size,
              f"0 or emb_size, {inner.emb_size}")  # fmt: skip
        _only("model_type", self.model_type is None, self.model_type, "None: there is one type")
        _only("init_scale_override", self.init_scale_override is None, self.init_scale_override,
              "None: weights are loaded, not initialised")  # fmt: skip
        _only("shard_embeddings", self.shard_embeddings is True, self.shard_embeddings, "True: the "
              "embedding is always cut over the 'model' axis")  # fmt: skip
        dtype = jnp.dtype(self.fprop_dtype)
        _only(
            "fprop_dtype", dtype in (jnp.float32, jnp.bfloat16), dtype.name, "float32 or bfloat16"
        )
        outer = {f: getattr(self, f) for f in ("vocab_size", "pad_token", "eos_token",
                 "sequence_len", "embedding_multiplier_scale", "output_multiplier_scale")}  # fmt: skip
        model = {f: getattr(inner, f) for f in ("emb_size", "key_size", "num_q_heads",
                 "num_kv_heads", "num_layers", "widening_factor", "attn_output_multiplier",
                 "num_experts", "num_selected_experts")}  # fmt: skip
        return GrokConfig.from_dict(outer | {"model": model}, "LanguageModelConfig")


def _axis(name: str | Sequence[str]) -> Any:
    return name if isinstance(name, str) else name[0] if len(name) == 1 else tuple(name)


def _only(name: str, honoured: bool, found: Any, expected: str) -> None:
    if not honoured:
        raise ConfigError(f"{name}: expected {expected}; found {found!r}")


@dataclasses.dataclass
class ModelRunner:
    """The model, where its weights are, and how many sequences run at once."""

    model: LanguageModelConfig
    bs_per_device: float | int = 2.0
    load_rename_rules: Sequence[tuple[str, str]] | None = None
    load_exclude_rules: Sequence[str] | None = None
    rng_seed: int = 42
    transform_forward: bool = False
    checkpoint_path: str = ""

    def n_slots(self, mesh: Mesh) -> int:
        """`bs_per_device` times the mesh's devices, as a whole number."""
        devices = mesh.devices.size
        slots = int(self.bs_per_device * devices)
        if slots < 1 or slots % mesh.shape["data"]:
            raise ConfigError(
                f"bs_per_device {self.bs_per_device} on {devices} devices makes {slots} sequences; "
                f"expected at least 1, and a multiple of the mesh's {mesh.shape['data']} 'data' "
                f"devices"
            )
        return slots

    def load(self, mesh: Mesh, tokenizer_path: str, name: str) -> LanguageModel:
        """Check everything, then load the weights onto `mesh`."""
        for option in ("load_rename_rules", "load_exclude_rules"):
            value = getattr(self, option)
            _only(option, not value, value, "None: a checkpoint is read whole, by its own names")
        if not self.checkpoint_path:
            raise ConfigError(
                "checkpoint_path: expected the directory that holds ckpt-0/, found nothing; "
                "weights of 0, which the original makes then, are of no use"
            )
        together = spans_processes(mesh)
        checkpoint, specs, tokenizer = agree(
            lambda: self._prepare(mesh, tokenizer_path, together), together
        )
        compilation_cache.enable()
        model = load_params(checkpoint, specs, mesh, progress=is_first())
        lm = LanguageModel(model, mesh, tokenizer, name)
        lm.checkpoint = checkpoint
        return lm

    def _prepare(
        self, mesh: Mesh, tokenizer_path: str, together: bool
    ) -> tuple[tuple[Checkpoint, Any, Tokenizer], dict[str, str]]:
        """What is checked, and what must be the same in all processes."""
        config = self.model.to_config()
        checkpoint = open_checkpoint(self.checkpoint_path, config)
        _same_as_file(config, checkpoint)
        dtype = self.model.fprop_dtype
        specs = stored_specs(checkpoint, param_specs(config, dtype))
        check_mesh(config, mesh, specs)
        path = Path(tokenizer_path)
        tokenizer = Tokenizer.from_file(path, config.vocab_size)
        facts = load_facts(checkpoint, mesh, dtype, path) if together else {}
        facts["sequences at once"] = str(self.n_slots(mesh))
        return (checkpoint, specs, tokenizer), facts


def _same_as_file(config: GrokConfig, checkpoint: Checkpoint) -> None:
    """Refuse a script whose model is not the one that the checkpoint says it is."""
    path = checkpoint.directory / CONFIG_FILE
    if not path.is_file():
        return
    is_port = checkpoint.layout == "hugging face"
    theirs = read_config(path) if is_port else GrokConfig.from_json(path)
    for field in dataclasses.fields(GrokConfig):
        ours, found = getattr(config, field.name), getattr(theirs, field.name)
        if ours != found:
            raise ConfigError(
                f"LanguageModelConfig: {field.name} is {ours}, and {path} says {found}; the "
                f"weights beside it need the latter"
            )


def _without_effect(runner: ModelRunner) -> Iterator[str]:
    """What was asked for and changes nothing, here as in the original."""
    loaded = "weights are loaded"
    parts = (
        ("ModelRunner", runner, "rng_seed", loaded),
        ("ModelRunner", runner, "transform_forward", "the InferenceRunner decides"),
        ("LanguageModelConfig", runner.model, "embedding_init_scale", loaded),
        ("TransformerConfig", runner.model.model, "init_scale", loaded),
        ("TransformerConfig", runner.model.model, "shard_activations",
         "activations lie over the mesh in one way, which changes no result"),
    )  # fmt: skip
    for name, part, option, why in parts:
        value = getattr(part, option)
        if value != getattr(type(part), option):  # where a dataclass keeps its defaults
            yield f"{name}: {option}={value!r} has no effect: {why}"


@dataclasses.dataclass
class Request:
    """One text to continue."""

    prompt: str
    temperature: float | int
    nucleus_p: float | int
    rng_seed: int
    max_len: int


@dataclasses.dataclass
class InferenceRunner:
    """Loads a model and answers requests."""

    name: str
    runner: ModelRunner
    load: str
    tokenizer_path: str = "/tmp/xai_data/tokenizer.model"
    local_mesh_config: Sequence[int] = (1, 1)
    between_hosts_config: Sequence[int] = (1, 1)
    pad_sizes: Sequence[int] = (1024,)

    def initialize(self) -> None:
        """Load the weights onto the mesh. **Raises:** `GrokkitError` before, for what does not fit."""
        path = self.runner.checkpoint_path
        _only("load", Path(self.load) == Path(path), self.load, f"checkpoint_path, {path!r}")
        config = self.runner.model.to_config()
        sizes = tuple(self.pad_sizes)
        fits = bool(sizes) and all(1 <= size <= config.context_length for size in sizes)
        _only("pad_sizes", fits, sizes, f"lengths from 1 to sequence_len, {config.context_length}")
        self.mesh = _mesh(self.local_mesh_config, self.between_hosts_config)
        self.runner.n_slots(self.mesh)
        for option in _without_effect(self.runner):
            logger.info("%s", option)
        self.lm = self.runner.load(self.mesh, self.tokenizer_path, self.name)

    def get_pad_bucket(self, size: int) -> int:
        """The smallest of `pad_sizes` that holds `size` tokens."""
        fitting = [s for s in sorted(self.pad_sizes) if s >= size]
        if not fitting:
            raise ConfigError(
                f"{size} tokens are more than the largest of pad_sizes, {max(self.pad_sizes)}"
            )
        return fitting[0]

    def run(self) -> "Server":
        """A generator that is sent `Request`s and answers with texts; see `Server`."""
        if not hasattr(self, "lm"):
            raise ConfigError(f"InferenceRunner {self.name!r}: call initialize() before run()")
        slots = self.runner.n_slots(self.mesh)
        return Server(ContinuousBatch(self.lm, slots, pad_sizes=tuple(self.pad_sizes)))


class Server(Generator):
    """What `InferenceRunner.run` gives: `next(server)` makes ready, `send(request)` answers.

    `send` takes one `Request` and gives its text; or several, which share the batch's slots, and
    gives their texts in order. A request that cannot be run raises a `PromptError` with the reason,
    and the server goes on: unlike a generator function's, its errors do not end it.
    """

    def __init__(self, batch: ContinuousBatch):
        """Answer by means of `batch`; nothing is compiled yet."""
        self.batch = batch
        self._ready = False
        self._closed = False

    def send(self, value: "Request | Sequence[Request] | None") -> Any:
        """Continue a text, or several. `None`, which `next` sends, only compiles, once."""
        if self._closed:
            raise StopIteration
        if not self._ready:
            if value is not None:
                raise TypeError("can't send non-None value to a just-started generator")
            self.batch.compile()
            self._ready = True
        if value is None:
            return None
        generations = []
        try:
            for request in [value] if isinstance(value, Request) else value:
                generations.append(self._submit(request))
            texts = [generation.result() for generation in generations]
            return texts[0] if isinstance(value, Request) else texts
        except BaseException:
            # Nobody would be there to take the others' texts.
            for generation in generations:
                generation.cancel()
            raise

    def _submit(self, request: Request) -> Generation:
        return self.batch.submit(
            request.prompt, request.max_len, request.temperature, request.nucleus_p,
            request.rng_seed,
        )  # fmt: skip

    def throw(self, typ: Any, val: Any = None, tb: Any = None) -> Any:
        """End, as an exception thrown into a generator that does not catch it does."""
        self._closed = True
        error = typ() if isinstance(typ, type) and val is None else val or typ
        raise error.with_traceback(tb)

    def close(self) -> None:
        """End: what is sent from now on raises `StopIteration`."""
        self._closed = True


def sample_from_model(
    server: Generator[Any, Any, Any], prompt: str, max_len: int, temperature: float
) -> str:
    """Continue a text with the whole distribution (nucleus 1) and seed 42, as the original does."""
    next(server)
    return server.send(Request(prompt, temperature, 1.0, 42, max_len))


def _mesh(local: Sequence[int], between_hosts: Sequence[int]) -> Mesh:
    """The (data, model) mesh: `local` on each process, times `between_hosts` processes."""
    for name, value in (("local_mesh_config", local), ("between_hosts_config", between_hosts)):
        _only(name, len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value), value,
              "two numbers of at least 1, (data, model)")  # fmt: skip
    processes = math.prod(between_hosts)
    if processes != jax.process_count():
        raise ConfigError(
            f"between_hosts_config {tuple(between_hosts)} is for {processes} processes, and "
            f"{jax.process_count()} run(s) here"
        )
    if processes == 1:
        return make_mesh(local[0], local[1])
    n, chosen = math.prod(local), []
    for process in range(processes):
        own = [d for d in jax.devices() if d.process_index == process]
        if len(own) < n:
            raise ConfigError(
                f"local_mesh_config {tuple(local)} needs {n} devices in each process, and process "
                f"{process} has {len(own)}"
            )
        chosen += own[:n]
    devices = mesh_utils.create_hybrid_device_mesh(
        tuple(local), tuple(between_hosts), devices=chosen, process_is_granule=True
    )
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
