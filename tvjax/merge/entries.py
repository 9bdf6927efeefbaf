"""Sums over the entries of a leaf, as fast as memory allows on every platform; of a spread leaf shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

_LANES = 128
_ROWS = 128
_FEW = 4096
_LYING: ContextVar[NamedSharding | None] = ContextVar("lying", default=None)


def sum_entries(function: Callable[..., Array], leaves: Sequence[Any]) -> Array:
    """The sum over the entries of leaves of one shape of what a function makes of each; call it inside `jit`.

    XLA's own reduction to a scalar is one serial sum on CPU. There the entries are summed in lanes instead, which is
    some ten times as fast, and by blocks, which keeps the rounding of a float32 sum small in leaves of many millions.

    Args:
      function: elementwise; gets a stretch ``[n]`` of each leaf, returns ``[..., n]``.
      leaves: arrays of one shape, as stored.

    Returns:
      ``[...]``, of the function's dtype.

    >>> sum_entries(lambda x, y: jnp.stack([x * y, x]), [jnp.arange(60.0), jnp.ones(60)]).tolist()
    [1770.0, 1770.0]
    """
    return of_shards(lambda *shards: _whole(function, shards), leaves, jax.lax.psum, PartitionSpec())


@contextmanager
def lying(sharding: NamedSharding | None) -> Iterator[None]:
    """How the leaves of the rule that is traced inside lie: flattened as a whole they would be gathered everywhere."""
    token = _LYING.set(sharding)
    try:
        yield
    finally:
        _LYING.reset(token)


def of_shards(
    function: Callable[..., Array],
    leaves: Sequence[Any],
    finish: Callable[[Array, tuple[str, ...]], Array],
    spec: PartitionSpec,
) -> Array:
    """A function of the leaves, or of each device's part of them where they lie spread; call it inside `jit`.

    Args:
      function: of arrays of one shape.
      leaves: arrays of one shape, that of the leaf that is traced.
      finish: makes the result of all parts from that of one, given the axes of the mesh that they are spread over.
      spec: how the result lies; ``"shards"`` stands for these axes.

    >>> of_shards(jnp.sum, [jnp.ones(3)], jax.lax.psum, PartitionSpec()).tolist()
    3.0
    """
    sharding = _LYING.get()
    if sharding is None:
        return function(*map(jnp.asarray, leaves))
    axes = tuple(name for entry in sharding.spec if entry for name in (entry if isinstance(entry, tuple) else (entry,)))
    return jax.shard_map(
        lambda *shards: finish(function(*shards), axes),
        mesh=sharding.mesh,
        in_specs=(sharding.spec,) * len(leaves),
        out_specs=PartitionSpec(*(axes if entry == "shards" else entry for entry in spec)),
        check_vma=False,
    )(*map(jnp.asarray, leaves))


def _whole(function: Callable[..., Array], leaves: Sequence[Array]) -> Array:
    flat = [leaf.reshape(-1) for leaf in leaves]
    return lax.platform_dependent(
        *flat,
        cpu=lambda *flat: _in_lanes(function, flat),
        default=lambda *flat: _sum(function(*flat)),
    )


def _sum(values: Array) -> Array:
    return jnp.sum(values, axis=-1, dtype=values.dtype)


def _in_lanes(function: Callable[..., Array], flat: Sequence[Array]) -> Array:
    size = flat[0].size
    if size < _FEW:
        return _sum(function(*flat))

    def row(total: Array, stretches: Sequence[Array]) -> tuple[Array, None]:
        return total + function(*stretches), None

    def block(total: Array, stretches: Sequence[Array]) -> tuple[Array, None]:
        return total + lax.scan(row, jnp.zeros_like(total), stretches)[0], None

    shape = jax.eval_shape(function, *(jax.ShapeDtypeStruct((_LANES,), x.dtype) for x in flat))
    total = jnp.zeros(shape.shape, shape.dtype)
    rows = size // _LANES
    blocks = rows // _ROWS
    done, most = blocks * _ROWS * _LANES, rows * _LANES
    if done:
        total = lax.scan(block, total, [x[:done].reshape(blocks, _ROWS, _LANES) for x in flat])[0]
    if done < most:
        total = lax.scan(row, total, [x[done:most].reshape(-1, _LANES) for x in flat])[0]
    rest = _sum(function(*(x[most:] for x in flat))) if most < size else 0
    return _sum(total) + rest
