"""Eight virtual CPU devices for every test, and for the notebooks' kernels, which inherit them.

With GROKKIT_TEST_PLATFORM=cuda the tests run on an accelerator; those that ask for more devices
than there are, or for the CPU's own products, are skipped.
"""

import os

DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"

flags = os.environ.get("XLA_FLAGS", "")
if DEVICE_COUNT_FLAG not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {DEVICE_COUNT_FLAG}=8".strip()
os.environ["JAX_PLATFORMS"] = os.environ.get("GROKKIT_TEST_PLATFORM", "cpu")
os.environ["GROKKIT_COMPILATION_CACHE"] = "off"  # leave the user's cache folder alone

import jax
import pytest

# An accidental float32 + bfloat16 is an error here; set on this process alone, so that a notebook
# behaves as it does for its reader.
jax.config.update("jax_numpy_dtype_promotion", "strict")


OTHERWHERE = ("devices, found", "No FFI handler registered for grokkit_few_rows")


def _skip_what_an_accelerator_lacks():
    try:
        return (yield)
    except Exception as e:
        if jax.default_backend() != "cpu" and any(reason in str(e) for reason in OTHERWHERE):
            pytest.skip(str(e).splitlines()[0])
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _skip_what_an_accelerator_lacks())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skip_what_an_accelerator_lacks())
