"""Merges of matrices: the same walk over the leaves for every rule, and what happens to leaves that are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax.merge.base import PyTree, Vectors, by_shape, matrix_paths, run_matrices, weighted_sum, wide
from tvjax.merge.leaf_report import Report, tell
from tvjax.merge.settings import Settings, resolve_each

Others = Literal["average", "weighted_average", "zero"]

BATCH_BYTES = 2**26  # of the float32 matrices that are on the device at once


def merge_matrices(
    rule: Callable[..., Float[Array, "inputs outputs"]],
    taus: Sequence[PyTree],
    *,
    weights: Settings,
    matrices: str | Sequence[str] | None,
    others: Others,
    batch_bytes: int,
    report: Report | None,
) -> PyTree:
    """A rule for matrices on the leaves that are matrices, the mean on the others.

    Args:
      rule: ``[vectors, inputs, outputs] -> [inputs, outputs]`` on one matrix, its task vectors multiplied by their
        weights; hashable, and equal for equal options, so that XLA compiles once.
      taus: task vectors of one base.
      weights: the task vectors are multiplied by these.
      matrices: path patterns of the leaves that are matrices; None: those of two axes or more.
      others: what the other leaves are: ``"average"``, ``1/T sum_i w_i tau_i``, linear in the vectors and the weights
        as the matrices are; ``"weighted_average"``, ``sum_i w_i tau_i / sum_i w_i``, as published code with weights has
        it, for which their sum must be positive; or ``"zero"``. Without weights the first two are one.
      batch_bytes: matrices of one shape go to the device in batches of this size in float32. It changes no result.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit, an unknown option, or patterns that match no matrix.
    """
    if others not in get_args(Others):
        raise ValueError(f"others must be one of {get_args(Others)}, found {others!r}")
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    chosen = [path for path in matrix_paths(vectors, matrices) if 0 not in vectors.shape(path)]
    merged: dict[str, Array] = {}
    for paths in by_shape(vectors, chosen, batch_bytes):
        leaves = run_matrices(
            _Weighted(rule), [vectors.leaves(path) for path in paths], np.stack([numbers[path] for path in paths])
        )
        merged.update(zip(paths, jax.block_until_ready(leaves), strict=True))  # before the next batch takes memory
        for path in paths:
            rows, columns = int(np.prod(vectors.shape(path)[:-1])), vectors.shape(path)[-1]
            tell(report, path, vectors.shape(path), f"matrix [{rows}, {columns}]")
    share = np.float32(1 / len(vectors) if others == "average" else 0)
    for path in vectors.paths:
        if path not in merged:
            merged[path] = weighted(vectors.leaves(path), share * numbers[path])
            tell(report, path, vectors.shape(path), "averaged" if others == "average" else "zeroed by rule")
    return vectors.tree(merged)


@jax.jit
def weighted(leaves: Sequence[Any], factors: Float[Array, " vectors"]) -> Float[Array, "*shape"]:
    """``sum_i f_i tau_i`` of one leaf as stored, float32.

    >>> weighted([jnp.ones(2, jnp.bfloat16), jnp.ones(2)], jnp.array([1.0, 2.0])).tolist()
    [3.0, 3.0]
    """
    return weighted_sum(wide(leaves), factors)


def total(parts: Iterable[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    """The sum of arrays (of an array over its first axis), one after another.

    XLA sums over a leading axis of a few elements an order of magnitude slower than it adds arrays.

    >>> total(jnp.ones((3, 2))).tolist()
    [3.0, 3.0]
    """
    return reduce(jnp.add, parts)


@dataclasses.dataclass(frozen=True)
class _Weighted:
    """A rule on the weighted matrices."""

    rule: Callable[..., Float[Array, "inputs outputs"]]

    def __call__(
        self, matrices: Float[Array, "vectors inputs outputs"], weights: Float[Array, " vectors"]
    ) -> Float[Array, "inputs outputs"]:
        return self.rule(matrices * weights[:, None, None])
