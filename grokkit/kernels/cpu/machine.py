"""From kernels to machine code for this processor: compiled once, kept for the next process."""

import contextlib
import ctypes
import functools
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import llvmlite.binding as llvm
from llvmlite import ir

from grokkit import compilation_cache
from grokkit.kernels.cpu import handler
from grokkit.runtime import compiling, files

_DIGEST_BYTES = 32


class Target(NamedTuple):
    """A processor, as LLVM calls it."""

    name: str
    features: str

    @property
    def lanes(self) -> int:
        """Floats in the vectors that kernels are written with."""
        return 16 if self._has("avx512f") else 8

    @property
    def has_pairs(self) -> bool:
        """Whether it multiplies bfloat16 numbers in pairs, in vectors of 512 bits."""
        return self._has("avx512f") and self._has("avx512bf16")

    def _has(self, feature: str) -> bool:
        return f"+{feature}" in self.features.split(",")


@functools.cache
def target() -> Target:
    """The processor to compile for: this one, unless the environment names another, by the variables
    that Numba has for it: `NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=` is one without AVX-512."""
    host = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    name = os.environ.get("NUMBA_CPU_NAME") or host[0]
    usual = host[1] if name == host[0] else ""
    return Target(name, os.environ.get("NUMBA_CPU_FEATURES", usual))


@functools.cache
def register() -> None:
    """Make the kernels known to XLA, once."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code()))
    engine.finalize_object()
    address = engine.get_function_address(handler.NAME)
    engine.detach()  # never freed: at the end a thread may still be on its way out
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype = ctypes.py_object
    capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    call = capsule(address, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target(handler.NAME, call, platform="cpu", api_version=1)


def machine_code() -> bytes:
    """The kernels' object file: compiled in about a second, or found where it was kept."""
    path = _kept_at()
    if path is not None:
        with contextlib.suppress(OSError):
            kept = path.read_bytes()
            digest, code = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
            if digest == hashlib.sha256(code).digest():  # and no part of it is missing
                return code
    with compiling.notice("compiling kernels", kept=path is not None):
        code = compile_kernels()
    if path is not None:
        with contextlib.suppress(OSError):
            files.write(path, hashlib.sha256(code).digest() + code)
    return code


def compile_kernels() -> bytes:
    """An object file of all kernels."""
    module = ir.Module("grokkit")
    module.triple = llvm.get_default_triple()
    handler.write(module, target().lanes, target().has_pairs)
    parsed, machine = llvm.parse_assembly(str(module)), _target_machine()
    # The kernels are written in vectors: the passes that look for some would only take time.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_object(parsed)


def _target_machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()  # for an instruction that is written by its name
    name, features = target()
    host = llvm.Target.from_default_triple()
    return host.create_target_machine(cpu=name, features=features, opt=3, jit=True)


def _kept_at() -> Path | None:
    """A name of its own for what these sources give on this processor; none if nothing is kept."""
    folder = compilation_cache.folder()
    if folder is None:
        return None
    sources = sorted(Path(__file__).parent.glob("*.py"))
    parts = [source.read_bytes() for source in sources]
    parts += [repr((llvm.llvm_version_info, *target())).encode()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
    return folder / f"kernels-{digest.hexdigest()[:16]}.o"
