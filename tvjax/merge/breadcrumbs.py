"""Breadcrumbs: neither the largest nor the smallest entries (Davari and Belilovsky, ECCV 2024, arXiv 2312.06795)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from tvjax.merge.base import PyTree, Vectors, merge_leaves, over_meshes, wide
from tvjax.merge.combine import MANNER, Combine, check_combine, combined
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Settings, check_votes, require, resolve_each
from tvjax.merge.threshold import kth_largest, magnitudes, patterns
from tvjax.renamed import warn


@over_meshes
def breadcrumbs(
    taus: Sequence[PyTree],
    *,
    density: Settings = 0.14,
    gamma: Settings = 0.01,
    weights: Settings = 1.0,
    combine: Combine = "linear",
    smallest: Settings | None = None,
    largest: Settings | None = None,
    report: Report | None = None,
) -> PyTree:
    """Drops the smallest and the largest entries of each leaf in magnitude, and merges what is left.

    Of n entries the ``floor(gamma n)`` largest are dropped, with those equal to them, and the ``floor((1 - density -
    gamma) n)`` smallest, but for those equal to the smallest that stays. So a leaf of few entries keeps one at least,
    unless its entries are equal.

    Args:
      taus: task vectors of one base.
      density: share of the entries that stays, in (0, 1]; a number, by path pattern or by depth, or a list of these.
      gamma: share of the largest entries that is dropped (the paper's 1 - gamma), in [0, 1); the two together at most
        1. What is left, the paper's beta, are the smallest.
      weights: a number, by path pattern or by depth, or a list of these; not negative and of positive sum unless
        ``combine="linear"``.
      combine: ``"linear"``, the weighted sum, as published; or ``"ties"``, the election and disjoint mean of
        `tvjax.merge.ties`; or ``"ties_sum"``, the sum of those that agree (mergekit's `breadcrumbs_ties`).
      smallest: an old name: ``1 - density - gamma``.
      largest: the old name of gamma; either of the two takes the place of the density, and 0.85 that of the smallest.
      report: called for each merged leaf, with the two thresholds.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    Source: section 3. Per leaf, as in the paper; the published code ranks each row of a matrix by itself.

    >>> tau = {"w": jnp.array([0.1, -5.0, 2.0, 1.0, 0.2])}
    >>> breadcrumbs([tau], density=0.4, gamma=0.2)["w"].tolist()
    [0.0, 0.0, 2.0, 1.0, 0.0]
    """
    check_combine(combine)
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    if combine != "linear":
        check_votes(numbers)
    low, high = _dropped_shares(vectors, density, gamma, smallest, largest)
    ranks = {path: _ranks(math.prod(vectors.shape(path)), low[path], high[path]) for path in vectors.paths}
    return merge_leaves(
        vectors,
        "smallest and largest dropped, " + MANNER[combine],
        _between,
        numbers,
        ranks,
        options=(("combine", combine),),
        report=report,
    )


def _dropped_shares(
    vectors: Vectors, density: Settings, gamma: Settings, smallest: Settings | None, largest: Settings | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The shares of the smallest and of the largest entries that are dropped, by leaf."""

    def each(settings: Settings, name: str) -> dict[str, np.ndarray]:
        return resolve_each(settings, vectors.paths, len(vectors), name, np.float64)

    if largest is not None:
        warn("the argument largest of breadcrumbs", "gamma", 4)
    high = each(gamma, "gamma") if largest is None else each(largest, "largest")
    if smallest is None and largest is None:
        kept = each(density, "density")
    else:
        if smallest is not None:
            warn("the argument smallest of breadcrumbs", "density, which is 1 - smallest - gamma", 4)
        low = each(0.85 if smallest is None else smallest, "smallest")
        kept = {path: 1 - share - high[path] for path, share in low.items()}
    require(kept, "density", lambda share: (share > 0) & (share <= 1), "in (0, 1]")
    require(high, "gamma", lambda share: (share >= 0) & (share < 1), "in [0, 1)")
    both = {path: kept[path] + high[path] for path in kept}
    require(both, "density + gamma", lambda share: share <= 1 + 1e-9, "at most 1")
    return {path: 1 - share for path, share in both.items()}, high


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
