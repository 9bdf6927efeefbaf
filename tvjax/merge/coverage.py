"""Task vectors that do not cover the same leaves, such as those of adapters with different target modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tvjax import tree
from tvjax.factors import LowRank, is_low_rank
from tvjax.kinds import kind_of

PyTree = Any


def cover(taus: Sequence[PyTree]) -> tuple[list[PyTree], dict[str, list[int]]]:
    """The task vectors on the leaves that one or more of them cover: zero where a vector has none.

    A merge takes vectors of the same leaves, so that a misspelt path is no zero in silence; this says so instead. The
    zeros take no memory until their leaf is merged.

    Args:
      taus: nested dicts of arrays.

    Returns:
      The vectors, in dicts of the same paths, sorted; and for each leaf that some lack, the numbers of those that
      have it. Vectors that cover the same leaves are returned as they are.

    Raises:
      ValueError: a vector that is no nested dict.

    >>> import jax.numpy as jnp
    >>> filled, partly = cover([{"query": jnp.ones(2)}, {"query": jnp.ones(2), "value": jnp.ones(1)}])
    >>> filled[0]["value"].tolist(), partly
    ([0.0], {'value': [1]})
    """
    if not all(isinstance(tau, Mapping) for tau in taus):
        raise ValueError(f"expected nested dicts of arrays, found {', '.join(map(kind_of, taus))}")
    flat = [tree.flatten(tau) for tau in taus]
    paths = sorted({path for leaves in flat for path in leaves})
    having = {path: [number for number, leaves in enumerate(flat) if path in leaves] for path in paths}
    partly = {path: numbers for path, numbers in having.items() if len(numbers) < len(flat)}
    if not partly:
        return list(taus), {}
    zeros = {path: _zeros(flat[numbers[0]][path]) for path, numbers in partly.items()}
    return [tree.nest({path: leaves.get(path, zeros.get(path)) for path in having}) for leaves in flat], partly


def _zeros(leaf: Any) -> Any:
    """Zeros of a leaf's shape; of one of low rank as no factors at all."""
    if is_low_rank(leaf):
        return LowRank(leaf.left[..., :0], leaf.right[..., :0, :], leaf.shape)
    return np.broadcast_to(np.float32(0), np.shape(leaf))
