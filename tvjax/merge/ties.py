"""TIES: trim, elect the sign, average those that agree (Yadav et al., NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from tvjax.merge.base import PyTree, Scope, Vectors, check_scope, merge_leaves, over_meshes, wide
from tvjax.merge.combine import Elect, Over, elected_mean, mass
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Settings, check_votes, require, resolve_each
from tvjax.merge.threshold import kept, kth_largest, kth_largest_of_all, magnitudes, patterns


@over_meshes
def ties(
    taus: Sequence[PyTree],
    *,
    weights: Settings = 1.0,
    density: Settings = 0.2,
    scope: Scope = "vector",
    elect: Elect = "weighted",
    over: Over = "weights",
    report: Report | None = None,
) -> PyTree:
    """Keeps the largest entries of each vector, elects a sign for each entry, and averages those that have it.

    1. Trim: of each vector the ``density`` share of its entries that is largest in magnitude stays, counted over the
       whole vector or over each leaf; so do entries that are equal to the smallest of these. The others become 0.
    2. Elect: the sign of an entry is that of its mass ``sum_i w_i tau_i``.
    3. Merge: ``sum_i w_i tau_i / sum_i w_i`` over the vectors whose entry has that sign; one that was trimmed, or is
       zero, does not count. Where the mass is zero, so is the result.

    So a weight counts twice, as that many equal votes and that many equal members of the mean; multiplying all weights
    by a number changes nothing, and a vector of weight 0 takes no part. With equal weights this is the published
    method with its disjoint mean. Its disjoint sum is ``over="none"``; ``elect="sum", over="count"`` is what PEFT's
    adapters merge by (``elect="count"``: its ``frequency``), mergekit without `normalize` ``over="none"``.

    Args:
      taus: task vectors of one base.
      weights: not negative, of positive sum; a number, by path pattern or by depth, or a list of these.
      density: in (0, 1]; a number, or a list with one for each vector. By path pattern or depth with ``scope="leaf"``.
      scope: ``"vector"``, as published, or ``"leaf"``. A threshold over the whole vector is found in some four passes
        over the leaves, on the host, so ``"vector"`` does not work inside `jit`.
      elect: the sign of an entry is that of ``sum_i w_i tau_i`` (``"weighted"``), of ``sum_i tau_i`` (``"sum"``), or
        the one that more vectors have (``"count"``; none where as many have the other).
      over: what ``sum_i w_i tau_i`` is divided by: the ``"weights"`` of the vectors that agree, their ``"count"``, the
        number of all ``"vectors"``, or ``"none"``.
      report: called for each merged leaf, with the thresholds.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    Deviation: where a mass is exactly zero the published code takes the sign that most entries of the model have, and
    PEFT plus.

    >>> one, other = {"w": jnp.array([4.0, 0.1, 2.0])}, {"w": jnp.array([2.0, -3.0, -0.2])}
    >>> ties([one, other], density=2 / 3)["w"].tolist()
    [3.0, -3.0, 2.0]
    """
    check_scope(scope)
    for name, found, allowed in (("elect", elect, get_args(Elect)), ("over", over, get_args(Over))):
        if found not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, found {found!r}")
    options = (("elect", elect), ("over", over))
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    check_votes(numbers)
    densities = resolve_each(density, vectors.paths, len(vectors), "density", np.float64)
    require(densities, "density", lambda d: (d > 0) & (d <= 1), "in (0, 1]")
    kind = "elected sum" if over == "none" else "elected mean"
    if scope == "leaf":
        ranks = {
            path: np.array([kept(each, math.prod(vectors.shape(path))) for each in densities[path]], np.uint32)
            for path in vectors.paths
        }
        name = f"trimmed by leaf, {kind}"
        return merge_leaves(vectors, name, _by_leaf, numbers, ranks, options=options, report=report)
    levels = dict.fromkeys(vectors.paths, _levels(vectors, densities))
    return merge_leaves(vectors, f"trimmed, {kind}", _trimmed, numbers, levels, options=options, report=report)


def _levels(vectors: Vectors, densities: dict[str, np.ndarray]) -> UInt32[np.ndarray, " vectors"]:
    first = densities[vectors.paths[0]]
    require(densities, "density", lambda d: d == first, "the same for all leaves when scope is 'vector'")
    if (first == 1).all():
        return np.zeros(len(vectors), np.uint32)
    entries = sum(math.prod(vectors.shape(path)) for path in vectors.paths)
    return kth_largest_of_all(vectors, [kept(float(each), entries) for each in first])


def _by_leaf(
    leaves: list[Any], weights: Float[Array, " vectors"], ranks: UInt32[Array, " vectors"], elect: Elect, over: Over
) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    return _trimmed(leaves, weights, kth_largest(leaves, ranks[:, None])[:, 0], elect, over)


def _trimmed(
    leaves: list[Any], weights: Float[Array, " vectors"], levels: UInt32[Array, " vectors"], elect: Elect, over: Over
) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    kept = [jnp.where(patterns(leaf) >= levels[i], leaf, 0) for i, leaf in enumerate(wide(leaves))]
    merged = elected_mean(kept, weights, mass(kept, weights, elect), over)
    return merged, {"threshold": magnitudes(levels)}
