"""Eight virtual CPU devices for every test, and for the notebooks' kernels, which inherit them.

With GROKKIT_TEST_PLATFORM=cuda the tests run on an accelerator; those that ask for more devices
than there are, or for the CPU's own products, are skipped.

The tests compile thousands of small programs and run each for a moment, so that XLA is told not to
optimise them: half the time goes. With GROKKIT_TEST_OPTIMISED=1, as `make test-slow` runs, programs
are compiled as they are for a user.
"""

import os
from importlib.metadata import version

flags = os.environ.get("XLA_FLAGS", "").split()


def _set_flag(name, value):
    if not any(flag.startswith(f"{name}=") for flag in flags):
        flags.append(f"{name}={value}")


platform = os.environ.get("GROKKIT_TEST_PLATFORM", "cpu")
_set_flag("--xla_force_host_platform_device_count", 8)
if platform == "cpu" and os.environ.get("GROKKIT_TEST_OPTIMISED", "0") == "0":
    _set_flag("--xla_backend_optimization_level", 0)
    if version("jax").startswith("0.10."):  # newer ones stop at a flag that they no longer know
        _set_flag("--xla_cpu_use_fusion_emitters", "false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["JAX_PLATFORMS"] = platform
os.environ["GROKKIT_COMPILATION_CACHE"] = "off"  # leave the user's cache folder alone

import jax
import pytest

# An accidental float32 + bfloat16 is an error here; set on this process alone, so that a notebook
# behaves as it does for its reader.
jax.config.update("jax_numpy_dtype_promotion", "strict")


LACKING = ("devices, found", "No FFI handler registered for grokkit_product")


def _skip_what_an_accelerator_lacks():
    try:
        return (yield)
    except Exception as e:
        if jax.default_backend() != "cpu" and any(reason in str(e) for reason in LACKING):
            pytest.skip(str(e).splitlines()[0])
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _skip_what_an_accelerator_lacks())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skip_what_an_accelerator_lacks())
