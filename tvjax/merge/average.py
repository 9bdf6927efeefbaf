"""The weighted average of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from jaxtyping import Array, Float

from tvjax.merge.base import PyTree, Vectors, merge_leaves, over_meshes, weighted_sum, wide
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Settings, require, resolve_each

Over = Literal["weights", "vectors"]


@over_meshes
def average(
    taus: Sequence[PyTree], *, weights: Settings = 1.0, over: Over = "weights", report: Report | None = None
) -> PyTree:
    """``sum_i w_i tau_i / sum_i w_i``: the weight average of the fine-tuned models, as a task vector.

    Args:
      taus: task vectors of one base.
      weights: of positive sum; a number, by path pattern or by depth, or a list of these.
      over: what the sum is divided by: the sum of the ``"weights"``, or the number of ``"vectors"``, ``1/T sum_i w_i
        tau_i``, for which weights may be any numbers.
      report: called for each merged leaf.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, weights whose sum is not positive, or an unknown option.

    Source: model soups (Wortsman et al., ICML 2022, arXiv 2203.05482).

    >>> import jax.numpy as jnp
    >>> average([{"w": jnp.array([1.0])}, {"w": jnp.array([5.0])}], weights=[3.0, 1.0])["w"].tolist()
    [2.0]
    """
    if over not in get_args(Over):
        raise ValueError(f"over must be one of {get_args(Over)}, found {over!r}")
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    if over == "weights":
        require(numbers, "weights", lambda w: w.sum() > 0, "of positive sum")
    shares = {path: each / (each.sum() if over == "weights" else len(vectors)) for path, each in numbers.items()}
    return merge_leaves(vectors, "averaged", _sum, shares, report=report)


def _sum(leaves: list[Any], weights: Float[Array, " vectors"]) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    return weighted_sum(wide(leaves), weights), {"weights": weights}
