"""Layouts follow from logical axes, and what does not fit is refused with a reason."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import grokkit
from grokkit.axes import AXES
from grokkit.errors import ConfigError
from grokkit.sharding import (
    MESH_AXIS,
    ParamSpec,
    abstract,
    describe_layout,
    make_mesh,
    partition_spec,
    shardings,
)


def spec(shape, axes):
    return ParamSpec(shape, jnp.int8, axes)


def test_partition_spec_looks_every_axis_up():
    assert partition_spec(("batch", "position", "head", "d_head")) == P("data", None, "model", None)
    assert partition_spec(("layer", None, "d_ff")) == P(None, None, "model")
    assert partition_spec(()) == P()


def test_axis_without_a_rule_is_refused():
    with pytest.raises(ConfigError, match=r"no sharding rule for axis 'd_mode'; rules: .*d_model"):
        partition_spec(("d_mode",))


def test_two_array_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ConfigError, match=r"\('head', 'd_ff'\) put two array axes on one mesh"):
        partition_spec(("head", "d_ff"))


def test_every_logical_axis_is_in_the_glossary_and_on_the_mesh():
    for axis, mesh_axis in MESH_AXIS.items():
        assert axis.removesuffix("_split") in AXES
        assert mesh_axis in (None, "data", "model")


def test_param_spec_knows_its_bytes_layout_and_abstract_form():
    found = ParamSpec((4, 16), jnp.bfloat16, ("d_model", "d_ff"))
    mesh = make_mesh(1, 8)
    assert found.nbytes == 4 * 16 * 2
    assert found.sharding(mesh) == jax.NamedSharding(mesh, P(None, "model"))
    tree = {"a": found, "b": [spec((8,), ("heads",))]}
    assert shardings(tree, mesh)["b"][0] == jax.NamedSharding(mesh, P("model"))
    assert abstract(tree)["a"] == jax.ShapeDtypeStruct((4, 16), jnp.bfloat16)
    assert abstract(tree, mesh)["a"].sharding.shard_shape((4, 16)) == (4, 2)


def test_param_spec_with_an_axis_too_few_is_refused():
    with pytest.raises(ConfigError, match=r"shape \(4, 16\) does not match axes \('d_ff',\)"):
        spec((4, 16), ("d_ff",))


def test_shape_that_does_not_divide_is_refused():
    message = r"axis 'd_ff' of size 12 .* 8 'model' devices; choose a mesh .* divides 12"
    with pytest.raises(ConfigError, match=message):
        spec((12,), ("d_ff",)).sharding(make_mesh(1, 8))


def test_param_spec_initialises_by_its_scale():
    values = ParamSpec((100, 100), jnp.float32, ("d_model", "d_ff"), 0.2).initialise(
        jax.random.key(0)
    )
    assert values.dtype == jnp.float32
    assert float(values.std()) == pytest.approx(0.2, rel=0.05)
    ones = ParamSpec((3,), jnp.float32, ("d_model",)).initialise(jax.random.key(0))
    assert ones.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "data, model, shape", [(1, None, (1, 8)), (2, None, (2, 4)), (3, None, (3, 2)), (1, 4, (1, 4))]
)
def test_mesh_has_explicit_axes_and_takes_the_devices_there_are(data, model, shape):
    mesh = make_mesh(data, model)
    assert tuple(mesh.shape.items()) == (("data", shape[0]), ("model", shape[1]))
    assert mesh.axis_types == (AxisType.Explicit, AxisType.Explicit)
    assert list(mesh.devices.flat) == jax.devices()[: shape[0] * shape[1]]


def test_mesh_of_chosen_devices():
    devices = jax.devices()[5:7]
    assert list(make_mesh(devices=devices).devices.flat) == devices


@pytest.mark.parametrize("data, model, needed", [(1, 9, 9), (3, 3, 9), (16, None, 16)])
def test_mesh_that_needs_more_devices_than_there_are_is_refused(data, model, needed):
    message = rf"needs {needed} devices, found 8; on a CPU, grokkit.virtual_devices\({needed}\)"
    with pytest.raises(ConfigError, match=message):
        make_mesh(data, model)


@pytest.mark.parametrize("data, model", [(0, 1), (1, 0), (-1, None)])
def test_mesh_axes_below_one_are_refused(data, model):
    with pytest.raises(ConfigError, match=rf"at least 1, found data={data}, model={model}"):
        make_mesh(data, model)


def test_describe_layout_says_what_a_device_holds():
    mesh = make_mesh(1, 8)
    assert describe_layout(P(None, "model"), (6, 16), mesh) == "6 x 16, 6 x 2 on each device"
    assert describe_layout(P(), (6, 16), mesh) == "6 x 16, a full copy on each device"


# Virtual devices are chosen before JAX starts, so each case is a process of its own.

COUNT = "print(len(jax.devices()), [d.platform for d in jax.devices()][:1])"


def python(code, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return subprocess.run(
        [sys.executable, "-c", f"import grokkit, jax\n{code}"],
        env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_virtual_devices_in_a_fresh_process():
    done = python(f"grokkit.virtual_devices(8)\n{COUNT}")
    assert done.stdout.strip() == "8 ['cpu']", done.stderr


def test_virtual_devices_where_a_flag_has_asked_for_them_already():
    """As in a notebook that the tests run, which inherits XLA_FLAGS."""
    flag = "--xla_force_host_platform_device_count=8"
    done = python(f"grokkit.virtual_devices(8)\n{COUNT}", XLA_FLAGS=flag)
    assert done.stdout.strip() == "8 ['cpu']", done.stderr


def test_virtual_devices_after_jax_has_started():
    grokkit.virtual_devices(8)  # nothing to do: there are eight
    message = r"already started, with 8 device\(s\).* Restart the kernel .*virtual_devices\(4\)"
    with pytest.raises(ConfigError, match=message):
        grokkit.virtual_devices(4)


def test_no_virtual_devices_are_refused():
    with pytest.raises(ConfigError, match="at least 1 virtual device, found 0"):
        grokkit.virtual_devices(0)
