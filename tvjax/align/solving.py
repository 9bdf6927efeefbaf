"""Problems that end in a decomposition, solved one after another on one device, side by side on the devices of a mesh.

A decomposition is no work that a matrix spread over devices gains from. So where arrays lie on a mesh, problems of
one kind and shape are stacked, every device is given one (an exchange of all with all), each solves its own in a
program without any communication, and what it found is spread over the mesh again. No device holds more than one
problem at a time. (A program that communicates and decomposes can wait for ever where devices share a CPU: XLA's
threads wait for each other inside the one, and are missing in the other.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvjax.align.procrustes import OrthogonalMap
from tvjax.spread import laid, spread, spread_out

PyTree = Any

_AXES = (-2, -1, 0)  # along which the fields of a map are spread: the source's units, the target's


class Problem(NamedTuple):
    """``function(*options, *arrays)``.

    Attributes:
      function: a function of a module: problems are of one kind where it is the same object.
      options: what does not change from array to array.
      arrays: pytrees of arrays.
    """

    function: Callable[..., Any]
    options: tuple[Hashable, ...]
    arrays: tuple[PyTree, ...]


def solve(problems: Sequence[Problem], mesh: Mesh | None = None) -> list[Any]:
    """What the functions of problems return, in their order.

    Args:
      problems: their functions must be jittable.
      mesh: on whose devices they are solved; None: where their arrays lie.

    Returns:
      On a mesh spread over it: a map's left factor by the source's units, its right one by the target's.

    >>> solve([Problem(jnp.add, (), (jnp.float32(1), jnp.float32(2)))])[0].tolist()
    3.0
    """
    if mesh is None:
        return [problem.function(*problem.options, *problem.arrays) for problem in problems]
    alike: dict[Any, list[int]] = {}
    for place, problem in enumerate(problems):
        leaves, structure = jax.tree.flatten(problem.arrays)
        shapes = tuple((tuple(jnp.shape(leaf)), jnp.result_type(leaf)) for leaf in leaves)
        alike.setdefault((problem.function, problem.options, structure, shapes), []).append(place)
    found: dict[int, Any] = {}
    for (function, options, _, _), places in alike.items():
        for start in range(0, len(places), mesh.size):
            chunk = places[start : start + mesh.size]
            stacked = _one_each(mesh, [problems[place].arrays for place in chunk])
            solved = _solve_own(function, options, mesh, stacked)
            found |= dict(zip(chunk, _spread_again(len(chunk), mesh, solved), strict=True))
    return [found[place] for place in range(len(problems))]


def spread_map(mesh: Mesh, found: PyTree) -> PyTree:
    """A map, or other arrays that were fitted, spread over a mesh as `solve` spreads them."""
    if isinstance(found, OrthogonalMap):
        return OrthogonalMap(*(spread_out(mesh, field, axis) for field, axis in zip(found, _AXES, strict=True)))
    return spread_out(mesh, found)


@partial(jax.jit, static_argnums=0)
def _one_each(mesh: Mesh, problems: list[PyTree]) -> PyTree:
    """Each device the arrays of one problem; zeros to those for which there is none."""

    def stack(*arrays: Any) -> jax.Array:
        arrays = tuple(map(jnp.asarray, arrays))
        rest = [jnp.zeros_like(arrays[0])] * (mesh.size - len(arrays))
        return _exchanged(jnp.stack([*arrays, *rest]), mesh)

    return jax.tree.map(stack, *problems)


def _exchanged(stacked: jax.Array, mesh: Mesh) -> jax.Array:
    """From a part of every problem on each device to one problem on each."""
    stacked = laid(stacked, _parts_of_all(mesh, stacked.shape, 0))
    return laid(stacked, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve_own(function: Callable[..., Any], options: tuple[Hashable, ...], mesh: Mesh, stacked: PyTree) -> PyTree:
    def own(stacked: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x[None], function(*options, *jax.tree.map(lambda x: x[0], stacked)))

    along = PartitionSpec(mesh.axis_names)
    return jax.shard_map(own, mesh=mesh, in_specs=along, out_specs=along, check_vma=False)(stacked)


@partial(jax.jit, static_argnums=(0, 1))
def _spread_again(count: int, mesh: Mesh, solved: PyTree) -> list[PyTree]:
    """What each of the problems gave, from one on each device to a part of every one on each."""

    def parts(stacked: jax.Array, axis: int = 0) -> list[jax.Array]:
        stacked = laid(stacked, _parts_of_all(mesh, stacked.shape, axis))
        return [spread_out(mesh, stacked[place], axis) for place in range(count)]

    if isinstance(solved, OrthogonalMap):
        return [OrthogonalMap(*own) for own in zip(*map(parts, solved, _AXES), strict=True)]
    leaves, structure = jax.tree.flatten(solved)
    return [jax.tree.unflatten(structure, own) for own in zip(*map(parts, leaves), strict=True)]


def _parts_of_all(mesh: Mesh, shape: tuple[int, ...], axis: int) -> NamedSharding:
    """Of stacked arrays ``[problems, ...]`` a part of each on every device."""
    return NamedSharding(mesh, PartitionSpec(None, *spread(mesh, tuple(shape[1:]), axis).spec))
