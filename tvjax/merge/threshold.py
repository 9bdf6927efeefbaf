"""The k-th largest magnitude, exactly and without sorting.

The bit pattern of a float's magnitude, read as an integer, is ordered as the magnitudes are. So the k-th largest is
found by counting how many entries are at or above some patterns, and counting again between the two that it lies
between: integers only, the same on any device and however the arrays are sharded. Entries that are equal to it stay
on its side: more than k entries can be at or above it. Leaves may have up to 2^32 - 1 entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped, UInt32

from tvjax import processes, tree
from tvjax.merge.base import Vectors, over_leaves
from tvjax.merge.entries import of_shards, sum_entries

_INFINITY = 0x7F800000
_LEVELS = 16  # counted at once: the range to search shrinks by one more than that
_SAMPLE = 2**22
# In standard deviations of a sample's quantile: dense where the threshold is expected, and reaching far around.
_AROUND = np.array([0.5, 1, 1.5, 2, 3, 6, 50])


def patterns(x: Shaped[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """The bit patterns of the magnitudes in float32.

    >>> patterns(jnp.array([-1.0, 1.0, 0.0])).tolist()
    [1065353216, 1065353216, 0]
    """
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & np.uint32(0x7FFFFFFF)


def magnitudes(found: UInt32[Array, "*shape"] | np.ndarray) -> Float[Array, "*shape"]:
    """The magnitudes of bit patterns; the inverse of `patterns`.

    >>> magnitudes(patterns(jnp.array([-2.5]))).tolist()
    [2.5]
    """
    return lax.bitcast_convert_type(jnp.asarray(found), jnp.float32)


def count_at_least(leaves: Sequence[Any], levels: UInt32[Array, "vectors levels"]) -> UInt32[Array, "vectors levels"]:
    """How many entries of each leaf are at or above each pattern; call it inside `jit`.

    >>> count_at_least([jnp.array([-3.0, 1.0, 2.0])], patterns(jnp.array([[2.0, 4.0]]))).tolist()
    [[2, 0]]
    """

    def passed(*stretches: Array) -> Array:
        found = jnp.stack([patterns(stretch) for stretch in stretches])
        return (found[:, None] >= levels[:, :, None]).astype(jnp.uint32)

    return sum_entries(passed, leaves)


def kth_largest(leaves: Sequence[Any], ranks: UInt32[Array, "vectors ranks"]) -> UInt32[Array, "vectors ranks"]:
    """The patterns of the k-th largest magnitudes of each leaf; call it inside `jit`.

    Args:
      leaves: arrays of one shape.
      ranks: one k or several for each, from 1 to the number of entries.

    >>> magnitudes(kth_largest([jnp.array([-3.0, 1.0, 2.0])], jnp.array([[2, 1]], jnp.uint32))).tolist()
    [[2.0, 3.0]]
    """
    return _narrowed(lambda levels: count_at_least(leaves, levels), ranks)


def _narrowed(
    count: Callable[[UInt32[Array, "vectors levels"]], UInt32[Array, "vectors levels"]],
    ranks: UInt32[Array, "vectors ranks"],
) -> UInt32[Array, "vectors ranks"]:
    """The greatest patterns at or above which there are so many entries; inside `jit`."""

    def narrow(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        width = (high - low)[..., None]
        steps = jnp.arange(1, 16, dtype=jnp.uint32)
        levels = low[..., None] + width // 16 * steps + width % 16 * steps // 16
        enough = count(levels.reshape(len(ranks), -1)).reshape(levels.shape) >= ranks[..., None]
        return (
            jnp.max(jnp.where(enough, levels, low[..., None]), axis=-1),
            jnp.min(jnp.where(enough, high[..., None], levels), axis=-1),
        )

    bounds = jnp.zeros_like(ranks), jnp.full_like(ranks, 2**31)  # above all patterns, those of NaN too
    return lax.fori_loop(0, 8, narrow, bounds)[0]  # 16^8 is more than the range


def kth_largest_of_all(vectors: Vectors, ranks: Sequence[int]) -> UInt32[Array | np.ndarray, " vectors"]:
    """The pattern of the k-th largest magnitude of each whole vector, in some four passes over the leaves.

    A sample of four million entries says where to count first. Inside `jit` there are no numbers to look at, and it
    takes eight passes.

    Args:
      vectors: the task vectors.
      ranks: k for each, from 1 to the number of entries.

    Raises:
      ValueError: vectors of 2^32 entries or more inside `jit`, where they are counted in 32 bits.
    """
    if any(isinstance(leaf, jax.core.Tracer) for flat in vectors.flat for leaf in flat.values()):
        return _of_all_traced(vectors, ranks)
    # In 16 bits there are few patterns; `unit` lies between two of them.
    unit = 2 ** min(_spare_bits(leaf) for flat in vectors.flat for leaf in flat.values())
    low, high = (np.full(len(vectors), bound, np.int64) for bound in (0, _INFINITY // unit))
    levels = _first_levels(vectors, ranks) // unit
    while True:
        enough = _count(vectors, levels * unit) >= np.asarray(ranks)[:, None]
        low = np.where(enough, levels, low[:, None]).max(axis=1)
        high = np.where(enough, high[:, None], levels).min(axis=1)
        if (high - low <= 1).all():
            return (low * unit).astype(np.uint32)
        levels = low[:, None] + (high - low)[:, None] * np.arange(1, _LEVELS + 1) // (_LEVELS + 1)


def _of_all_traced(vectors: Vectors, ranks: Sequence[int]) -> UInt32[Array, " vectors"]:
    entries = sum(math.prod(vectors.shape(path)) for path in vectors.paths)
    if entries >= 2**32:
        raise ValueError(
            f"a threshold over {entries} entries cannot be counted inside jit, where at most {2**32 - 1} can: merge "
            "outside of jit, or use scope='leaf'"
        )

    def count(levels: Array) -> Array:
        return reduce(jnp.add, (count_at_least(vectors.leaves(path), levels) for path in vectors.paths))

    return _narrowed(count, jnp.array(ranks, jnp.uint32)[:, None])[:, 0]


def kept(density: float, entries: int) -> int:
    """How many of so many entries a density keeps: the nearest whole number, one at least.

    >>> kept(0.2, 10), kept(0.01, 10)
    (2, 1)
    """
    return max(1, round(density * entries))


def _spare_bits(leaf: Any) -> int:
    """How many low bits of the float32 pattern are always zero."""
    return {jnp.dtype("bfloat16"): 16, jnp.dtype("float16"): 13}.get(tree.leaf_type(leaf).dtype, 0)


def _count(vectors: Vectors, levels: np.ndarray) -> np.ndarray:
    """How many entries of each whole vector are at or above each pattern."""
    levels = levels.astype(np.uint32)
    total = np.zeros(levels.shape, np.int64)
    for _, counts in over_leaves(vectors, count_at_least, dict.fromkeys(vectors.paths, levels)):
        total += np.asarray(processes.fetch(counts), np.int64)
    return total


def _first_levels(vectors: Vectors, ranks: Sequence[int]) -> np.ndarray:
    """Patterns around the quantiles of a sample."""
    sizes = [math.prod(vectors.shape(path)) for path in vectors.paths]
    options = (("stride", max(1, sum(sizes) // _SAMPLE)),)
    found = [np.asarray(processes.fetch(sample)) for _, sample in over_leaves(vectors, _sample, options=options)]
    samples = np.sort(np.concatenate(found, axis=1), axis=1)
    count = samples.shape[1]
    share = 1 - np.asarray(ranks) / sum(sizes)
    spread = np.sqrt(share * (1 - share) / count)
    quantiles = share[:, None] + spread[:, None] * np.concatenate([-_AROUND[::-1], [0], _AROUND])
    places = np.clip(np.rint(quantiles * (count - 1)), 0, count - 1).astype(np.int64)
    return np.take_along_axis(samples, places, axis=1).astype(np.int64)


def _sample(leaves: Sequence[Any], stride: int) -> UInt32[Array, "vectors sample"]:
    def taken(*leaves: Array) -> Array:
        return jnp.stack([patterns(leaf.reshape(-1)[::stride]) for leaf in leaves])

    return of_shards(taken, leaves, lambda sample, _: sample, PartitionSpec(None, "shards"))
