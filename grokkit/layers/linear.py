"""Matrices cut over the mesh's model axis, multiplied on each device's own part."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from grokkit.quant import QuantizedArray, Slot, layout
from grokkit.quantised_matmul import matmul

_ROWS = P("data", None, None)
_CUT_ROWS = P("data", None, "model")


def column_parallel(
    x: Float[Array, "batch position k"], w: QuantizedArray | Slot | Float[Array, "k n"], dtype: Any
) -> Float[Array, "batch position n"]:
    """`x @ w` for a matrix cut along its output columns; the result stays cut the same way."""
    return jax.shard_map(
        lambda x, w: matmul(x, w, dtype), in_specs=(_ROWS, layout(w, "n")), out_specs=_CUT_ROWS
    )(jax.reshard(x, _ROWS), w)


def row_parallel(
    x: Float[Array, "batch position k"], w: QuantizedArray | Slot | Float[Array, "k n"], dtype: Any
) -> Float[Array, "batch position n"]:
    """`x @ w` for both cut along the contracting axis; every device gets the whole sum.

    The scale groups are cut with the axis, so that each device multiplies with its own.
    """
    return jax.shard_map(
        lambda x, w: jax.lax.psum(matmul(x, w, dtype), "model"),
        in_specs=(_CUT_ROWS, layout(w, "k")),
        out_specs=_ROWS,
    )(jax.reshard(x, _CUT_ROWS), w)
