"""The official Grok-1 checkpoint layout: reading it safely, loading it onto a mesh, writing it.

A checkpoint is data: nothing in it is ever unpickled, imported or executed.
"""

from grokkit.checkpoint.saving import save_params
from grokkit.checkpoint.tensor_file import ArraySpan, TensorFile, read_tensor
from grokkit.checkpoint.tensor_writer import encoded_size, write_tensor

__all__ = [
    "ArraySpan",
    "TensorFile",
    "encoded_size",
    "read_tensor",
    "save_params",
    "write_tensor",
]
