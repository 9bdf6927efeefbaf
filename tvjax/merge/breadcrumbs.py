"""Breadcrumbs: neither the largest nor the smallest entries (Davari and Belilovsky, ECCV 2024, arXiv 2312.06795)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from tvjax.merge.base import PyTree, Vectors, merge_leaves, wide
from tvjax.merge.combine import Combine, check_combine, combined
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Settings, check_votes, require, resolve_each
from tvjax.merge.threshold import kth_largest, magnitudes, patterns


def breadcrumbs(
    taus: Sequence[PyTree],
    *,
    smallest: Settings = 0.85,
    largest: Settings = 0.01,
    weights: Settings = 1.0,
    combine: Combine = "linear",
    report: Report | None = None,
) -> PyTree:
    """Drops the smallest and the largest entries of each leaf in magnitude, and merges what is left.

    Of n entries the ``floor(largest n)`` largest are dropped, with those equal to them, and the ``floor(smallest n)``
    smallest, but for those equal to the smallest that stays. So a leaf of few entries keeps one at least, unless its
    entries are equal.

    Args:
      taus: task vectors of one base.
      smallest: share of the smallest entries that is dropped (the paper's beta), in [0, 1); a number, by path pattern
        or by depth, or a list of these.
      largest: share of the largest entries that is dropped (1 - gamma), in [0, 1); the two together less than 1.
      weights: a number, by path pattern or by depth, or a list of these; with ``combine="ties"`` not negative, and of
        positive sum.
      combine: ``"linear"``, the weighted sum, as published; or ``"ties"``, the election and disjoint mean of
        `tvjax.merge.ties`.
      report: called for each merged leaf, with the two thresholds.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    Source: section 3. Per leaf, as in the paper; the published code ranks each row of a matrix by itself.

    >>> tau = {"w": jnp.array([0.1, -5.0, 2.0, 1.0, 0.2])}
    >>> breadcrumbs([tau], smallest=0.4, largest=0.2)["w"].tolist()
    [0.0, 0.0, 2.0, 1.0, 0.0]
    """
    check_combine(combine)
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    if combine == "ties":
        check_votes(numbers)
    low = resolve_each(smallest, vectors.paths, len(vectors), "smallest", np.float64)
    high = resolve_each(largest, vectors.paths, len(vectors), "largest", np.float64)
    for name, shares in (("smallest", low), ("largest", high)):
        require(shares, name, lambda share: (share >= 0) & (share < 1), "in [0, 1)")
    require({path: low[path] + high[path] for path in low}, "smallest + largest", lambda s: s < 1, "less than 1")
    ranks = {path: _ranks(math.prod(vectors.shape(path)), low[path], high[path]) for path in vectors.paths}
    return merge_leaves(
        vectors,
        "smallest and largest dropped, " + ("added" if combine == "linear" else "elected mean"),
        _between,
        numbers,
        ranks,
        options=(("combine", combine),),
        report=report,
    )


def _ranks(entries: int, low: np.ndarray, high: np.ndarray) -> UInt32[np.ndarray, "vectors two"]:
    """The rank of the last entry that stays, and of the last that is dropped for its size (0: none)."""
    # 0.7 * 10 is less than 7 in binary.
    down, up = (np.floor(share * entries + 1e-6) for share in (low, high))
    return np.stack([entries - down, up], axis=1).astype(np.uint32)


def _between(
    leaves: list[Any],
    weights: Float[Array, " vectors"],
    ranks: UInt32[Array, "vectors two"],
    combine: Combine,
) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    low, largest = kth_largest(leaves, jnp.maximum(ranks, 1)).T
    drops = ranks[:, 1] > 0
    high = jnp.where(drops, largest, np.uint32(2**32 - 1))
    kept = [
        jnp.where((patterns(leaf) >= low[i]) & (patterns(leaf) < high[i]), leaf, 0)
        for i, leaf in enumerate(wide(leaves))
    ]
    below = jnp.where(drops, magnitudes(largest), jnp.inf)
    return combined(kept, weights, combine), {"from": magnitudes(low), "below": below}
