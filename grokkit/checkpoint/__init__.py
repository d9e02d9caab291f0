"""Checkpoints: reading them safely, loading them onto a mesh, writing and converting them.

A checkpoint is data: nothing in it is ever unpickled, imported or executed.
"""

from grokkit.checkpoint.converting import convert
from grokkit.checkpoint.downloading import download
from grokkit.checkpoint.integrity import check_content, check_finite, fingerprint
from grokkit.checkpoint.load import load_params, stored_specs
from grokkit.checkpoint.names import TensorKey, tensor_keys
from grokkit.checkpoint.official import Checkpoint, Entry
from grokkit.checkpoint.opening import open_checkpoint
from grokkit.checkpoint.saving import save_params
from grokkit.checkpoint.tensor_file import ArraySpan, TensorFile, read_tensor
from grokkit.checkpoint.tensor_writer import encoded_size, write_tensor

__all__ = [
    "ArraySpan",
    "Checkpoint",
    "Entry",
    "TensorFile",
    "TensorKey",
    "check_content",
    "check_finite",
    "convert",
    "download",
    "encoded_size",
    "fingerprint",
    "load_params",
    "open_checkpoint",
    "read_tensor",
    "save_params",
    "stored_specs",
    "tensor_keys",
    "write_tensor",
]
