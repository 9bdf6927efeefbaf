"""Random bits by entry: cheap, and the same on any device count and sharding.

Threefry costs some sixty integer operations a draw, too many for hundreds of millions of them. Here the bits of an
entry are a hash of its number in the leaf, ``mix(mix(i + a) ^ b)``: `a` comes from the key and the leaf's path, `b`
also from the number of the vector, both by threefry. An entry's bits depend on nothing else, so a mask needs no
communication, and is what it is however the leaf is split.

`mix` is a bijection of 32 bits with two multiplications, found by Wellons' search for the least avalanche bias
(hash-prospector, 2018, "lowbias32"): flip any bit that goes in, and every bit that comes out flips in almost exactly
half of the cases. The second round matters: with one, the streams of two leaves would be one stream, shifted. The
tests look at single bits and bytes, and at correlations between neighbours, vectors, leaves and keys. That is what
masks need; it is no generator for cryptography, and a leaf repeats itself after 2^32 entries.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Key, UInt32

from tvjax import processes


def words(key: Key[Array, ""], paths: Sequence[str], vectors: int) -> dict[str, UInt32[Array, " words"]]:
    """The words that key the bits of each leaf: one of the leaf, then one for each vector.

    Args:
      key: from `jax.random.key` (or of the old kind).
      paths: of the leaves; each counts by its CRC-32.
      vectors: how many task vectors there are; the words of the first ones do not depend on it.

    >>> found = words(jax.random.key(0), ["up/kernel", "up/bias"], 2)
    >>> found["up/kernel"].shape, len({*found["up/kernel"].tolist(), *found["up/bias"].tolist()})
    ((3,), 6)
    """
    numbers = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    found = _words(key, numbers, vectors)
    if not isinstance(found, jax.core.Tracer):  # wherever the key lies, it goes with leaves that lie elsewhere
        found = processes.fetch(found)
    return dict(zip(paths, found, strict=True))


@partial(jax.jit, static_argnums=2)
def _words(key: Key[Array, ""], numbers: UInt32[Array, " leaves"], vectors: int) -> UInt32[Array, "leaves words"]:
    def word(leaf: Array, number: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, leaf), number), (), jnp.uint32)

    return jax.vmap(jax.vmap(word, (None, 0)), (0, None))(numbers, jnp.arange(vectors + 1, dtype=jnp.uint32))


def entry_bits(shape: Sequence[int], keyed: UInt32[Array, " words"]) -> list[UInt32[Array, "*shape"]]:
    """Uniform 32 bits for every entry of a leaf, for each vector; call it inside `jit`.

    Args:
      shape: of the leaf.
      keyed: the leaf's `words`.

    >>> first, second = entry_bits((2, 3), jnp.array([1, 2, 3], jnp.uint32))
    >>> first.shape, bool((first == second).any())
    ((2, 3), False)
    """
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    leaf = _mix(index + keyed[0])
    return [_mix(leaf ^ keyed[number]) for number in range(1, keyed.shape[0])]


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
