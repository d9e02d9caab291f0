"""The official Grok-1 checkpoint layout: reading it safely, loading it onto a mesh, writing it.

A checkpoint is data: nothing in it is ever unpickled, imported or executed.
"""

from grokkit.checkpoint.finite import NonFinite, check_finite, find_non_finite
from grokkit.checkpoint.loading import load_params
from grokkit.checkpoint.names import TensorKey, tensor_keys
from grokkit.checkpoint.official import Checkpoint, Entry, open_checkpoint
from grokkit.checkpoint.saving import save_params
from grokkit.checkpoint.tensor_file import ArraySpan, TensorFile, read_tensor
from grokkit.checkpoint.tensor_writer import encoded_size, write_tensor

__all__ = [
    "ArraySpan",
    "Checkpoint",
    "Entry",
    "NonFinite",
    "TensorFile",
    "TensorKey",
    "check_finite",
    "encoded_size",
    "find_non_finite",
    "load_params",
    "open_checkpoint",
    "read_tensor",
    "save_params",
    "tensor_keys",
    "write_tensor",
]
