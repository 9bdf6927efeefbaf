"""Random parts of the leaves, each with a coefficient of its own: aTLAS x K."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def partition_ids(shape: Sequence[int], partitions: int, seed: Int[Array, " words"]) -> Int[Array, "*shape"]:
    """The part of every entry of a leaf, from 0 to K - 1: a hash of the entry's number, so that nothing is stored.

    Args:
      shape: of the leaf.
      partitions: K.
      seed: words of 32 bits, uint32.

    Returns:
      int32 of that shape; computed entry by entry, so the same on any number of devices.

    >>> ids = partition_ids((1000,), 4, jnp.array([1, 2], jnp.uint32))
    >>> int(ids.min()), int(ids.max()), bool((jnp.bincount(ids) > 200).all())
    (0, 3, True)
    """
    number = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        number += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    for word in range(seed.shape[0]):
        number = _mixed(number ^ seed[word])
    return (number % jnp.uint32(partitions)).astype(jnp.int32)


def _mixed(x: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """A bijection of 32 bits in which every bit of the input flips every bit of the output with probability a half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
