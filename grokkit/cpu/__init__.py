"""Products with 8-bit matrices on a CPU: loops of our own, which XLA calls.

XLA's own products cannot read one matrix of a stack where it lies: they copy it first, and write
its floats out before they multiply them.
"""

from grokkit.cpu.product import grouped_product, is_there

__all__ = ["grouped_product", "is_there"]
