"""Biases of attention scores by the distance of key and query (T5, Raffel et al. 2020, section 2.1), in buckets."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def position_bias(
    table: Float[Array, "buckets heads"], tokens: int, max_distance: int, both_sides: bool
) -> Float[Array, "heads tokens tokens"]:
    """What is added to the score of each query (second last axis) and key, by how far the key is away.

    >>> table = jnp.arange(8.0)[:, None]
    >>> position_bias(table, 4, 20, True)[0].astype(int).tolist()
    [[0, 5, 6, 6], [1, 0, 5, 6], [2, 1, 0, 5], [2, 2, 1, 0]]
    >>> position_bias(table, 4, 20, False)[0].astype(int).tolist()
    [[0, 0, 0, 0], [1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 0]]
    >>> table = jnp.arange(32.0)[:, None]
    >>> position_bias(table, 200, 128, True)[0, 0, jnp.array([0, 1, 7, 8, 127, 199])].tolist()
    [0.0, 17.0, 23.0, 24.0, 31.0, 31.0]
    """
    buckets = jnp.asarray(position_buckets(table.shape[0], max_distance, both_sides), jnp.int32)
    places = jnp.arange(tokens)
    away = jnp.clip(places[None, :] - places[:, None], -max_distance, max_distance)
    return jnp.moveaxis(jnp.take(table, buckets[away + max_distance], axis=0), -1, 0)


def position_buckets(buckets: int, max_distance: int, both_sides: bool) -> Int[np.ndarray, " distances"]:
    """The bucket of each distance of a key from a query, ``-max_distance .. max_distance``, both included.

    The near distances have one each, the far ones share them on a logarithmic scale. In the encoder half of them are
    for keys to the right; in the decoder those are not seen.

    >>> position_buckets(8, 6, False).tolist()
    [7, 6, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0]
    """
    right = buckets // 2 if both_sides else 0
    count = buckets - right
    near = count // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(near))
    far = near + (ratio / np.float32(math.log(max_distance / near)) * np.float32(count - near)).astype(np.int64)
    found = np.where(distance < near, distance, np.minimum(far, count - 1))
    return np.concatenate([found[:0:-1], [0], found[1:] + right if both_sides else np.zeros_like(found[1:])])
