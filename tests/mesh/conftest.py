"""Meshes of both kinds of axes, and rules that spread parameters and examples over them.

What is computed over a mesh must have the numbers of one device, and lie like what it was made from.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tvjax import tree

AXES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "three": {"data": 2, "fsdp": 2, "tensor": 2},
}
KINDS = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}


class Spread(NamedTuple):
    """A mesh, and how users lay trees over it.

    Attributes:
      mesh: of all eight devices.
      in_context: whether it is the mesh of the context, as after `jax.set_mesh`.
    """

    mesh: jax.sharding.Mesh
    in_context: bool = False

    def params(self, params):
        """Each leaf with its largest axis over ``fsdp`` and the next over ``tensor``, as far as they can be divided."""

        def place(leaf):
            spec = [None] * np.ndim(leaf)
            for name in ("fsdp", "tensor"):
                size = self.mesh.shape.get(name, 0)
                free = [i for i, n in enumerate(np.shape(leaf)) if spec[i] is None and size and n % size == 0]
                if free:
                    spec[max(free, key=lambda i: leaf.shape[i])] = name
            return self._put(leaf, spec)

        return jax.tree.map(place, params)

    def rows(self, batch):
        """Each leaf with its first axis, the examples', over ``data`` and ``fsdp``."""
        names = tuple(name for name in ("data", "fsdp") if name in self.mesh.shape)
        return jax.tree.map(lambda leaf: self._put(leaf, [names]), batch)

    def everywhere(self, batch):
        """Each leaf on every device."""
        return jax.tree.map(lambda leaf: self._put(leaf, []), batch)

    def context(self):
        """The context of the user's calls."""
        return jax.set_mesh(self.mesh) if self.in_context else nullcontext()

    def _put(self, leaf, spec):
        leaf = leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else np.asarray(leaf)  # cut on the host
        return jax.device_put(leaf, NamedSharding(self.mesh, PartitionSpec(*spec)))


def mesh_of(axes, kind):
    sizes = AXES[axes]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(KINDS[kind],) * len(sizes))


@pytest.fixture
def spread_of():
    """``(name of the axes, kind) -> Spread``, in no context."""
    return lambda axes, kind: Spread(mesh_of(axes, kind))


@pytest.fixture(
    params=[(axes, kind, False) for axes in AXES for kind in KINDS] + [("three", "explicit", True)],
    ids=lambda p: f"{p[0]}-{p[1]}" + ("-context" if p[2] else ""),
)
def spread(request):
    """One of the meshes; the last is entered with `jax.set_mesh`."""
    axes, kind, in_context = request.param
    spread = Spread(mesh_of(axes, kind), in_context)
    with spread.context():
        yield spread


@pytest.fixture(
    params=[("automatic", False), ("explicit", False), ("explicit", True)],
    ids=("automatic", "explicit", "explicit-context"),
)
def three(request):
    """The mesh of three axes, with axes of both kinds, and in the context of `jax.set_mesh`: for what is slow."""
    kind, in_context = request.param
    spread = Spread(mesh_of("three", kind), in_context)
    with spread.context():
        yield spread


@pytest.fixture
def alike():
    """Asserts that arrays have the expected numbers, and lie like those of another tree."""

    def compare(found, expected, like=None, tolerance=1e-5):
        found, expected = tree.flatten(found), tree.flatten(expected)
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            size = np.max(np.abs(leaf), initial=1e-30)
            np.testing.assert_allclose(found[path], leaf, rtol=0, atol=max(tolerance * size, 1e-12), err_msg=path)
        places = {} if like is None else tree.flatten(like)
        for path, leaf in found.items():
            if path in places:
                wanted = places[path].sharding
                assert leaf.sharding.mesh.axis_types == wanted.mesh.axis_types, path
                assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), f"{path}: {leaf.sharding}, not {wanted}"

    return compare


@pytest.fixture
def bytes_per_device():
    """The most bytes that the arrays of a tree take on one device."""

    def count(*trees):
        taken = {}
        for leaf in jax.tree.leaves(trees):
            for shard in leaf.addressable_shards:
                size = math.prod(shard.data.shape) * leaf.dtype.itemsize
                taken[shard.device] = taken.get(shard.device, 0) + size
        return max(taken.values())

    return count
