"""Layers read one after the other: in any layout those that loading gives, two in memory at most."""

import itertools
import os
import shutil
import threading
import weakref

import jax
import numpy as np
import pytest

from grokkit.checkpoint import convert, load, load_params, open_checkpoint, stored_specs, stream
from grokkit.checkpoint.load import plan_params
from grokkit.checkpoint.stream import LayerReader
from grokkit.errors import CheckpointError
from grokkit.model import param_specs
from grokkit.sharding import make_mesh


@pytest.fixture(scope="module")
def layouts(golden, tmp_path_factory):
    """The golden checkpoint as it is and as it can be converted."""
    folder = tmp_path_factory.mktemp("layouts")
    convert(golden, folder / "converted", progress=False)
    convert(golden, folder / "int4", experts="int4", group_size=8, progress=False)
    return {"official": golden} | {name: folder / name for name in ("converted", "int4")}


def specs_of(checkpoint):
    return stored_specs(checkpoint, param_specs(checkpoint.config))


def reader_of(directory, n_devices=1):
    checkpoint = open_checkpoint(directory)
    plans = plan_params(checkpoint, specs_of(checkpoint), make_mesh(1, n_devices))
    return LayerReader(plans.blocks)


@pytest.mark.parametrize(
    ("layout", "n_devices", "direct"),
    [
        ("official", 1, False),
        ("official", 2, True),
        ("official", 8, False),
        ("converted", 1, True),
        ("converted", 4, False),
        ("int4", 1, True),
    ],
)
def test_layers_are_those_that_loading_gives(layouts, layout, n_devices, direct):
    checkpoint = open_checkpoint(layouts[layout])
    mesh = make_mesh(1, n_devices)
    expected = load_params(checkpoint, specs_of(checkpoint), mesh, progress=False).blocks
    reader = reader_of(layouts[layout], n_devices)
    reader.past_cache = direct

    def check(layer, i):
        def check_leaf(found, whole, like):
            np.testing.assert_array_equal(found, whole[i])
            assert (found.shape, found.dtype, found.sharding) == (
                like.shape, like.dtype, like.sharding,
            )  # fmt: skip

        jax.tree.map(check_leaf, layer, expected, reader.abstract())

    for order in (range(12), range(12)[::-1], range(3, 5)):
        start, stop = min(order), max(order) + 1
        layers = reader.layers(start, stop, backwards=order.step < 0)
        for i, layer in zip(order, layers, strict=True):
            check(layer, i)
    part = reader.part(5, lambda layer: (layer.moe.router, layer.attention.query))
    whole = expected.moe.router, expected.attention.query
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[5]), part, whole)


@pytest.mark.parametrize("part", [load.HostPart, load.DevicePart])
def test_two_layers_in_memory_at_most(golden, part, monkeypatch):
    """Of twelve; while one is used the next is being read."""
    monkeypatch.setattr(load, "new_part", part)
    made, alive, places = [], [], set()

    def watch(*what, **how):
        arrays = load.read_leaves(*what, **how)
        made.extend(weakref.ref(a) for a in arrays)
        alive.append(sum(ref() is not None for ref in made) / len(arrays))
        places.update(s.data.unsafe_buffer_pointer() for a in arrays for s in a.addressable_shards)
        return arrays

    monkeypatch.setattr(stream, "read_leaves", watch)
    reader = reader_of(golden, 2)
    for block in reader.layers():
        jax.block_until_ready(block)
        del block
    assert len(alive) == 12 and max(alive) <= 2
    if part is load.HostPart:  # the same memory, over and over; one where both devices have all
        layer = reader.abstract()
        slices = [
            len({str(i) for i in a.sharding.devices_indices_map(a.shape).values()})
            for a in jax.tree.leaves(layer)
        ]
        assert 1 in slices and len(places) == 2 * sum(slices)


class _Ended:
    """As an array of which JAX is asked whether it is there."""

    def __init__(self, waited, gate=None):
        self.waited, self.gate = waited, gate

    def block_until_ready(self):
        if self.gate:
            assert self.gate.wait(10)
        self.waited.append(self)
        return self


@pytest.mark.parametrize("n_devices", [1, 2])
def test_memory_is_not_read_into_until_its_layer_is_used_no_more(golden, n_devices):
    """Although the next layer has been asked for, and given."""
    reader = reader_of(golden, n_devices)
    expected = [jax.tree.map(np.array, layer) for layer in reader.layers()]
    waited, gate, layers = [], threading.Event(), reader.layers()
    first, given = next(layers), [_Ended(waited, gate)]
    reader.is_used_until(given[0])
    second = next(layers)
    given.append(_Ended(waited))
    reader.is_used_until({"of the second": given[1]})
    for found, layer in ((first, expected[0]), (second, expected[1])):
        jax.tree.map(np.testing.assert_array_equal, found, layer)
    assert not waited
    gate.set()
    third = next(layers)
    assert waited == given[:1] or waited == given  # one of which the thread comes to by itself
    given.append(_Ended(waited))
    reader.is_used_until(given[2])
    jax.tree.map(np.testing.assert_array_equal, third, expected[2])
    layers.close()
    assert given[2] in waited
    # What a pass said does not hold another up.
    del waited[:]
    for found, layer in zip(reader.layers(), expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, layer)
    assert not waited


def test_layers_that_memory_would_not_keep_are_read_past_the_page_cache(golden, monkeypatch):
    direct = []

    def watch(*what, **how):
        direct.append(how["direct"])
        return load.read_leaves(*what, **how)

    monkeypatch.setattr(stream, "read_leaves", watch)
    nbytes = reader_of(golden).nbytes
    for memory, is_past in ((2 * nbytes, False), (nbytes, True)):
        direct.clear()
        values = {"SC_PHYS_PAGES": memory, "SC_PAGE_SIZE": 1}
        with monkeypatch.context() as patch:
            patch.setattr(os, "sysconf", values.get)
            reader = reader_of(golden)
        assert sum(1 for _ in reader.layers()) == 12
        assert direct == [is_past] * 12


def test_the_rate_of_reading(golden, monkeypatch):
    reader, clock = reader_of(golden), itertools.count(step=2)
    monkeypatch.setattr(stream.time, "perf_counter", lambda: float(next(clock)))
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(reader.abstract()))
    assert reader.rate() == largest / 2  # one array is read to see
    for _ in reader.layers():
        pass
    assert reader.rate() == reader.nbytes / (12 * 2)


@pytest.mark.parametrize("damage", ["gone", "shorter", "longer"])
def test_a_file_that_changes_during_a_pass_is_named(copy, damage):
    reader = reader_of(copy)
    layers, path = reader.layers(), copy / "ckpt-0" / "tensor00026_000"  # of layer 2
    next(layers)
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-5000] if damage == "shorter" else content + b"more")
    with pytest.raises(CheckpointError, match=r"tensor00026_000\n.*was there when the checkpoint"):
        for _ in layers:
            pass
    assert not any("reading" in thread.name for thread in threading.enumerate())
    path.write_bytes(content)
    assert sum(1 for _ in reader.layers()) == 12
    shutil.rmtree(copy / "ckpt-0")
    with pytest.raises(CheckpointError, match="No such file"):
        reader.part(0, lambda layer: layer.moe.router)
