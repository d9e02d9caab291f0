"""Kernels for the products that decoding and prefill wait for on a CPU.

They are written in LLVM's intermediate representation (`skinny`, `sums`, `gemm`; `code` is what they
are written with), compiled for the processor in about a second and kept (`machine`), and called by
XLA (`handler`), which lends its threads (`sharing`). `product` is what the rest of grokkit uses.
"""

import os
from types import ModuleType

import jax

WORTH_IT = 2**12
"""Entries of a matrix from which a kernel is worth having."""


def kernels(entries: int) -> ModuleType | None:
    """`grokkit.kernels.cpu.product`, where matrices of so many entries gain by it.

    It is loaded when it is first asked for. Kernels are for the devices of the mesh that is set, or
    else of JAX's default platform.

    **Returns:** the module; `None` if the devices are no CPUs, the system lacks what threads wait
    with, or the matrices are small.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    platform = jax.default_backend() if device is None else device.platform
    if platform != "cpu" or os.name != "posix" or entries < WORTH_IT:
        return None
    from grokkit.kernels.cpu import product

    return product
