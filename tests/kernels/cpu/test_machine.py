"""Kernels are compiled once, and found again by the next process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import grokkit
from grokkit import compilation_cache
from grokkit.kernels.cpu import machine

PROGRAM = """
import sys
import jax.numpy as jnp
from grokkit.kernels import cpu
assert cpu.kernels(cpu.WORTH_IT - 1) is None and "llvmlite" not in sys.modules
product = cpu.kernels(cpu.WORTH_IT)
from grokkit.kernels.cpu import machine
compiled, compile_kernels = [], machine.compile_kernels
machine.compile_kernels = lambda: compiled.append(1) or compile_kernels()
x, weight, scales = jnp.ones((3, 32)), jnp.ones((1, 8, 32), jnp.int8), jnp.ones((1, 1, 8), jnp.bfloat16)
assert (product.product(x, jnp.array([0, 3]), weight, scales, jnp.int32(0)) == 32).all()
assert "numba" not in sys.modules
print(len(compiled))
"""


def compilations(cache, **more):
    """How often a process of its own compiles the kernels, which it then uses."""
    environment = os.environ | {compilation_cache.SWITCH: str(cache)} | more
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def kept(cache):
    return sorted(Path(cache).rglob("kernels-*.o"))


def test_the_second_process_compiles_nothing_unless_what_was_kept_is_damaged(tmp_path):
    assert [compilations(tmp_path) for _ in range(2)] == [1, 0]
    (file,) = kept(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    assert [compilations(tmp_path) for _ in range(2)] == [1, 0]
    assert kept(tmp_path) == [file]


def test_another_processor_gets_code_of_its_own(tmp_path):
    lesser = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
    assert [compilations(tmp_path, **lesser) for _ in range(2)] == [1, 0]
    if machine.target().lanes == 16:
        assert compilations(tmp_path) == 1 and len(kept(tmp_path)) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    tmp_path.chmod(0o500)
    assert compilations(tmp_path / "cache") == 1
    tmp_path.chmod(0o700)


def test_nothing_is_written_beside_the_sources_or_where_a_cache_cannot_be(tmp_path):
    before = sorted(Path(grokkit.__file__).parent.rglob("*.[on]*"))
    (tmp_path / "file").write_text("no folder")
    assert compilations(tmp_path / "file") == compilations("off") == 1
    assert sorted(Path(grokkit.__file__).parent.rglob("*.[on]*")) == before


@pytest.mark.parametrize(
    ("name", "features", "lanes", "has_pairs"),
    [
        ("haswell", "", 8, False),
        ("generic", "", 8, False),
        ("znver4", "+avx2,+avx512f", 16, False),
        ("znver4", "+avx512f,+avx512bf16", 16, True),
    ],
)
def test_a_processor_is_asked_for_what_it_is_compiled_for(
    name, features, lanes, has_pairs, monkeypatch
):
    monkeypatch.setenv("NUMBA_CPU_NAME", name)
    monkeypatch.setenv("NUMBA_CPU_FEATURES", features)
    machine.target.cache_clear()
    try:
        assert (machine.target().lanes, machine.target().has_pairs) == (lanes, has_pairs)
        assert machine.compile_kernels()
    finally:
        machine.target.cache_clear()
