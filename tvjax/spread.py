"""How arrays are spread over the devices of a mesh: what is fitted, and what is on its way to the target's leaves.

What is said here is said to the compiler, under automatic axes: `tvjax.placement` brings arrays with explicit axes to
these and back.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvjax.factors import LowRank, is_low_rank
from tvjax.placement import automatic_mesh

PyTree = Any


def sharding_of(leaf: Any) -> NamedSharding | None:
    """How an array or shape (or how it is said) lies over a mesh of several devices; None where it does not.

    Under `jit` with automatic axes it cannot be seen, and is None.

    >>> sharding_of(jax.numpy.ones(2)) is None
    True
    """
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", leaf)
    seen = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1
    return sharding if seen else None


def mesh_of(*trees: PyTree) -> Mesh | None:
    """The mesh of the first array that lies over one of several devices, its axes automatic; None where none does.

    >>> mesh_of({"a": jax.numpy.ones(2)}) is None
    True
    """
    found = (sharding_of(leaf) for leaf in jax.tree.leaves(trees))
    return next((automatic_mesh(sharding.mesh) for sharding in found if sharding is not None), None)


@cache
def spread(mesh: Mesh, shape: tuple[int, ...], axis: int = 0) -> NamedSharding:
    """One axis of an array over all devices of a mesh, or over as many as divide it.

    Args:
      mesh: the mesh.
      shape: of the array.
      axis: the one that is taken where several are divided as far.

    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> tuple(spread(mesh, (3, 4), axis=-1).spec)
    (None, 'data')
    """
    most, place, over = 0, 0, tuple[str, ...]()
    subsets = [
        names
        for count in range(1, 1 + len(mesh.axis_names))
        for names in itertools.combinations(mesh.axis_names, count)
    ]
    order = sorted(range(len(shape)), key=lambda i: i != axis % len(shape))
    for i, names in itertools.product(order, subsets):
        devices = math.prod(mesh.shape[name] for name in names)
        if shape[i] and shape[i] % devices == 0 and devices > most:
            most, place, over = devices, i, names
    spec: list[Any] = [None] * len(shape)
    if most:
        spec[place] = over if len(over) > 1 else over[0]
    return NamedSharding(automatic_mesh(mesh), PartitionSpec(*spec))


def laid(array: Any, sharding: NamedSharding | None) -> Any:
    """An array that lies as it is said, under automatic axes; unchanged where nothing is said."""
    if sharding is None:
        return array
    sharding = NamedSharding(automatic_mesh(sharding.mesh), sharding.spec)
    if isinstance(array, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(array, sharding)
    return jax.device_put(array, sharding)


def spread_out(mesh: Mesh | None, tree: PyTree, axis: int = 0) -> PyTree:
    """A tree whose arrays are each spread over a mesh; unchanged where there is none."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda leaf: laid(leaf, spread(mesh, tuple(leaf.shape), axis)), tree)


def lies_elsewhere(tree: PyTree, mesh: Mesh) -> bool:
    """Whether arrays of a tree are bound to other devices than those of a mesh, or to these in another order."""
    return any(_lies_elsewhere(leaf, mesh) for leaf in jax.tree.leaves(tree))


def brought(tree: PyTree, mesh: Mesh) -> PyTree:
    """A tree whose arrays on other devices are spread over a mesh."""

    def bring(leaf: Any) -> Any:
        return laid(leaf, spread(mesh, tuple(leaf.shape))) if _lies_elsewhere(leaf, mesh) else leaf

    return jax.tree.map(bring, tree)


def _lies_elsewhere(leaf: Any, mesh: Mesh) -> bool:
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not leaf.committed:
        return False
    sharding = sharding_of(leaf)
    return sharding is None or list(sharding.mesh.devices.flat) != list(mesh.devices.flat)


def like_leaf(leaf: Any, sharding: NamedSharding | None) -> Any:
    """A leaf that lies as it is said, its factors where it is of low rank, each with its own side of the leaf.

    >>> like_leaf(jax.numpy.ones(2), None).tolist()
    [1.0, 1.0]
    """
    if sharding is None:
        return leaf
    if not is_low_rank(leaf):
        return laid(leaf, sharding)
    spec = (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec)))
    first, last = spec[-2:] if leaf.ndim == leaf.layers + 2 else (None, None)
    left, right = PartitionSpec(*spec[: leaf.layers], first), PartitionSpec(*spec[: leaf.layers], None, last)
    first, last = (NamedSharding(sharding.mesh, side) for side in (left, right))
    return LowRank(laid(leaf.left, first), laid(leaf.right, last), leaf.shape)
