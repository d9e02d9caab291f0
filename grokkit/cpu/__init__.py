"""Products on a CPU: loops of our own, which XLA calls; and turning 8-bit matrices round."""

from grokkit.cpu.product import (
    Strides,
    cores,
    float_products,
    float_sums,
    grouped_product,
    in_large_pages,
    is_fit_for_floats,
    is_there,
)
from grokkit.cpu.turning import turn

__all__ = [
    "Strides",
    "cores",
    "float_products",
    "float_sums",
    "grouped_product",
    "in_large_pages",
    "is_fit_for_floats",
    "is_there",
    "turn",
]
