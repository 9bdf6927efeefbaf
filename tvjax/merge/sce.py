"""SCE: select, calculate, erase (Wan et al., FuseChat, 2024, arXiv 2408.07990, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

from tvjax.merge.base import PyTree, Vectors, merge_leaves, over_meshes, weighted_sum, wide
from tvjax.merge.combine import elected_mean
from tvjax.merge.entries import sum_entries
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Setting, require, resolve
from tvjax.merge.threshold import kept, kth_largest, patterns


@over_meshes
def sce(taus: Sequence[PyTree], *, density: Setting = 0.1, report: Report | None = None) -> PyTree:
    """Keeps the entries on which the vectors differ most, and weighs the vectors by what is left of them.

    Leaf by leaf:

    1. Select: the `density` share of the entries whose variance over the vectors is largest (and those equal to the
       smallest of these) stays in all vectors; the others become 0.
    2. Calculate: ``eta_i = |tau_i|^2 / sum_j |tau_j|^2`` of what stays.
    3. Erase: entries whose sign is not that of ``sum_i tau_i``; of those that are left the mean
       ``sum eta_i tau_i / sum eta_i``, as in the published code. Where that sum is zero, so is the result.

    Args:
      taus: task vectors of one base.
      density: in (0, 1]; a number, by path pattern or by depth.
      report: called for each merged leaf, with eta.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or a density out of range.

    Deviation: the published code takes the share of the entries whose variance is not zero.

    >>> one, other = {"w": jnp.array([3.0, 1.0, 1.0])}, {"w": jnp.array([1.0, 1.0, -2.0])}
    >>> [round(x, 3) for x in sce([one, other], density=2 / 3)["w"].tolist()]
    [2.333, 0.0, -2.0]
    """
    vectors = Vectors(taus)
    shares = resolve(density, vectors.paths)
    require(shares, "density", lambda share: (share > 0) & (share <= 1), "in (0, 1]")
    sizes = {path: math.prod(vectors.shape(path)) for path in vectors.paths}
    ranks = {path: np.array([[kept(share, sizes[path])]], np.uint32) for path, share in shares.items()}
    return merge_leaves(vectors, "selected, elected mean", _selected, ranks, report=report)


def _selected(leaves: list[Any], rank: UInt32[Array, "1 1"]) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    every = wide(leaves)
    ones = jnp.ones(len(every), jnp.float32)
    mean = weighted_sum(every, ones / len(every))
    variance = weighted_sum([(leaf - mean) ** 2 for leaf in every], ones)
    variance = lax.optimization_barrier(variance)  # what is compared is what was counted
    stays = patterns(variance) >= kth_largest([variance], rank)[0, 0]
    chosen = [jnp.where(stays, leaf, 0) for leaf in every]
    squares = sum_entries(lambda *stretches: jnp.stack(stretches) ** 2, chosen)
    total = jnp.sum(squares)
    eta = jnp.where(total > 0, squares / jnp.where(total > 0, total, 1), 1 / len(every))
    return elected_mean(chosen, eta, weighted_sum(chosen, ones)), {"eta": eta}
