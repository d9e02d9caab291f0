"""Functions of a model that serve one in memory and one that is streamed from disk alike."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


class Compiled:
    """A function whose first argument is a model: compiled whole, if the model is in memory.

    A streamed model is no input of a compiled function, since its layers come one by one; with
    one the function runs step by step, and the model's parts are compiled.
    """

    def __init__(
        self, f: Callable[..., Any], jit: Callable[..., Any] = jax.jit, **options: Any
    ) -> None:
        """Serve `f`; `options` are those of `jit`, JAX's or Equinox's."""
        functools.update_wrapper(self, f)
        self._plain = f
        self.jitted = jit(f, **options)

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the function."""
        if not model.is_streamed:
            return self.jitted(model, *args, **kwargs)
        args, kwargs = jax.tree.map(_as_input, (args, kwargs))
        return self._plain(model, *args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As `jax.jit(f).lower`; for a model in memory, or an abstract one."""
        return self.jitted.lower(*args, **kwargs)

    def _cache_size(self) -> int:
        return self.jitted._cache_size()


def _as_input(leaf: Any) -> Any:
    """What a compiled function would see in an argument's place."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Compiled]:
    """Decorate a function of a model as `Compiled` with these options."""
    return lambda f: Compiled(f, **options)


def repeat(
    model: Any, step: Callable[[Any], tuple[Any, PyTree]], carry: Any, n: int
) -> tuple[Any, PyTree]:
    """`step` done `n` times, which calls `model`: a scan, or a loop where the model is streamed.

    **Arguments:**

    - `step`: takes the carry; returns the next and what to keep.

    **Returns:** the last carry, and what was kept, stacked.
    """
    if not model.is_streamed:
        return jax.lax.scan(lambda carry, _: step(carry), carry, length=n)
    kept = []
    for _ in range(n):
        carry, out = step(carry)
        kept.append(out)
    return carry, jax.tree.map(lambda *values: jnp.stack(values), *kept)
