"""Sums over the entries of a leaf, as fast as memory allows on every platform."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

_LANES = 128
_ROWS = 128
_FEW = 4096


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
    flat = [jnp.asarray(leaf).reshape(-1) for leaf in leaves]
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
