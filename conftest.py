"""Eight virtual CPU devices for every test, and for the notebooks' kernels, which inherit them."""

import os

DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"

flags = os.environ.get("XLA_FLAGS", "")
if DEVICE_COUNT_FLAG not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {DEVICE_COUNT_FLAG}=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["GROKKIT_COMPILATION_CACHE"] = "off"  # leave the user's cache folder alone

import jax

# An accidental float32 + bfloat16 is an error here; set on this process alone, so that a notebook
# behaves as it does for its reader.
jax.config.update("jax_numpy_dtype_promotion", "strict")
