"""Task arithmetic: the weighted sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float

from tvjax.merge.base import PyTree, Vectors, merge_leaves, over_meshes, weighted_sum, wide
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Settings, resolve_each


@over_meshes
def task_arithmetic(taus: Sequence[PyTree], *, weights: Settings = 1.0, report: Report | None = None) -> PyTree:
    """``sum_i w_i tau_i``.

    Args:
      taus: task vectors of one base.
      weights: a number, by path pattern or by depth, or a list of these; a negative one forgets the task.
      report: called for each merged leaf.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or weights that are no finite numbers.

    Source: Ilharco et al., ICLR 2023, arXiv 2212.04089.

    >>> import jax.numpy as jnp
    >>> task_arithmetic([{"w": jnp.array([1.0])}, {"w": jnp.array([5.0])}], weights=[1.0, -0.5])["w"].tolist()
    [-1.5]
    """
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    return merge_leaves(vectors, "added", _sum, numbers, report=report)


def _sum(leaves: list[Any], weights: Float[Array, " vectors"]) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    return weighted_sum(wide(leaves), weights), {"weights": weights}
