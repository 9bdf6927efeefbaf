"""What a fit over a mesh would hold on each of its devices, from shapes and shardings alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tvjax import tree
from tvjax.align.procrustes import OrthogonalMap
from tvjax.spread import mesh_of, sharding_of, spread
from tvjax.stages import Model
from tvjax.transport.base import MapInfo, State

PyTree = Any


def memory_by_device(
    source: Model,
    target: Model,
    batches: Sequence[Any],
    streams: int,
    stages: Sequence[tuple[int, Sequence[MapInfo]]],
    state: State,
) -> dict[str, int]:
    """Bytes on the device that holds most, by what they hold.

    Args:
      source: its arrays or shapes with shardings.
      target: the same.
      batches: of the fit; residual streams and activations are split as far as their rows are.
      streams: bytes of the residual streams in all.
      stages: of each the bytes of its activations and moments in all, and its maps.
      state: the shapes of what is fitted.

    Returns:
      ``parameters``, ``residual streams``, ``activations`` and ``moments`` of the stages that have most, ``maps``,
      ``task vectors``, and ``decomposition``: the largest moment, whole, with its map, the one matrix that is gathered.
      {} where neither model lies over a mesh.
    """
    mesh = mesh_of(target.params, source.params)
    if mesh is None:
        return {}
    rows = _bytes_on_device(batches) / max(tree.nbytes(batches), 1)
    activations = max((size - sum(map(moment_bytes, own)) for size, own in stages), default=0)
    moments = max((sum(_moment_on_device(mesh, one) for one in own) for _, own in stages), default=0)
    largest = max((one.moment for _, own in stages for one in own), key=math.prod, default=(0, 0))
    tau = [jax.tree.map(_float32, model.params) for model in (source, target)]
    return {
        "parameters": _bytes_on_device((source.params, target.params)),
        "residual streams": math.ceil(rows * streams),
        "activations": math.ceil(rows * activations),
        "moments": moments,
        "maps": sum(_fitted(mesh, name, array, target) for part in state.parts for name, array in part.arrays.items()),
        "task vectors": _bytes_on_device(tau),
        "decomposition": 8 * math.prod(largest) + 4 * min(largest) ** 2,
    }


def _float32(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.float32, sharding=sharding_of(leaf))


def _bytes_on_device(arrays: PyTree) -> int:
    """Of arrays as they lie; those that do not lie over a mesh are whole on one."""
    return sum(_part(leaf, sharding_of(leaf)) for leaf in jax.tree.leaves(arrays))


def _part(leaf: Any, sharding: Any) -> int:
    shape = tuple(jnp.shape(leaf))
    own: Iterable[int] = shape if sharding is None else sharding.shard_shape(shape)
    return math.prod(own) * jnp.result_type(leaf).itemsize


def moment_bytes(found: MapInfo) -> int:
    """Of the cross-moment of a map, or of the rows while they are fewer than it has entries."""
    return 4 * min(math.prod(found.moment), found.rows * sum(found.moment))


def _moment_on_device(mesh: Mesh, found: MapInfo) -> int:
    kept = [found.moment, *((found.rows, size) for size in found.moment)]
    parts = [4 * math.prod(spread(mesh, shape).shard_shape(shape)) for shape in kept]
    return min(parts[0], parts[1] + parts[2])


def _fitted(mesh: Mesh, name: str, array: Any, target: Model) -> int:
    leaves = tree.flatten(target.params)
    if name in leaves and getattr(array, "shape", None) == tuple(jnp.shape(leaves[name])):
        return _part(array, sharding_of(leaves[name]))
    axes = (-2, -1, 0) if isinstance(array, OrthogonalMap) else (0,) * len(jax.tree.leaves(array))
    parts = zip(jax.tree.leaves(array), axes, strict=True)
    return sum(_part(leaf, spread(mesh, tuple(leaf.shape), axis)) for leaf, axis in parts)
