"""Products with 8-bit matrices on a CPU: loops of our own, which XLA calls; and turning them round.

XLA's own products cannot read one matrix of a stack where it lies: they copy it first, and write
its floats out before they multiply them.
"""

from grokkit.cpu.product import cores, grouped_product, is_there
from grokkit.cpu.turning import turn

__all__ = ["cores", "grouped_product", "is_there", "turn"]
