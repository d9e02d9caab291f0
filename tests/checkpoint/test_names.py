import dataclasses

import jax
import numpy as np
import pytest

from grokkit.checkpoint import tensor_keys
from grokkit.config import GROK_1, GrokConfig
from grokkit.errors import ConfigError
from grokkit.model import param_specs
from grokkit.sharding import is_spec


def test_names_in_official_order(golden, golden_names):
    keys = tensor_keys(GrokConfig.from_json(golden / "config.json"))
    assert [key.name for key in keys] == golden_names
    assert [key.index for key in keys] == list(range(len(golden_names)))
    assert keys[26].layer == 10 and keys[26].file_name == "tensor00026_000"


def test_official_sizes_to_the_byte():
    """What public listings of the official release show."""
    keys = tensor_keys(GROK_1)
    sizes = [key.nbytes for key in keys]
    assert len(keys) == 770
    assert sum(sizes) == 318_239_886_140
    assert {size: sizes.count(size) for size in sizes} == {
        3_221_225_637: 1,
        24_727: 257,
        196_770: 64,
        1_611_137_347: 128,
        1_611_399_491: 64,
        6_293_814: 128,
        37_761_334: 64,
        37_847_359: 64,
    }
    # The first layer's files, whose sizes tell the kinds apart.
    assert sizes[:2] == [3_221_225_637, 24_727]
    assert [key.path for key in keys[2:14]] == [
        "blocks.moe.gate",
        "blocks.moe.out",
        "blocks.moe.value",
        "blocks.attention.key",
        "blocks.attention.out",
        "blocks.attention.query",
        "blocks.attention.value",
        "blocks.attn_norm.scale",
        "blocks.attn_out_norm.scale",
        "blocks.moe_norm.scale",
        "blocks.moe_out_norm.scale",
        "blocks.moe.router",
    ]


def test_every_parameter_of_the_model_once():
    """The model's declarations and the files agree leaf by leaf, in shape and dtype."""
    files: dict[str, list] = {}
    for key in tensor_keys(GROK_1):
        lead = () if key.layer is None else (GROK_1.n_layers,)
        if key.scales_shape is None:
            expected = {key.path: ((*lead, *key.shape), key.dtype)}
        else:
            *experts, k, n = key.shape  # in the file; the model holds [n, k]
            expected = {
                f"{key.path}.weight": ((*lead, *experts, n, k), key.dtype),
                f"{key.path}.scales": ((*lead, *key.scales_shape), np.dtype("bfloat16")),
            }
        for path, value in expected.items():
            files.setdefault(path, []).append((value, key.layer))
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_specs(GROK_1), is_leaf=is_spec)
    specs = {jax.tree_util.keystr(p, simple=True, separator="."): spec for p, spec in leaves}
    assert set(specs) == set(files)
    for path, spec in specs.items():
        layers = sorted(layer for _, layer in files[path] if layer is not None)
        assert layers in ([], list(range(GROK_1.n_layers)))
        assert {value for value, _ in files[path]} == {(spec.shape, np.dtype(spec.dtype))}


def test_sizes_that_the_layout_cannot_hold():
    with pytest.raises(ConfigError, match=r"n_layers: file names have 5 digits.*found 1000000000"):
        tensor_keys(dataclasses.replace(GROK_1, n_layers=10**9))
    with pytest.raises(ConfigError, match=r"blocks.attention.out.*8 scale groups.*found 4"):
        tensor_keys(dataclasses.replace(GROK_1, n_heads=1, n_kv_heads=1, d_head=4))
