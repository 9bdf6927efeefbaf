"""Merges that are a linear combination whose coefficients depend on the inner products of the task vectors.

SLERP, the Karcher mean and model stock never leave the span of the vectors, so all that they have to see of the
entries is the matrix of inner products: one pass over the leaves for it, one for the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax import tree
from tvjax.merge.base import Leaf, PyTree, Scope, Vectors, check_scope, merge_leaves, over_leaves, weighted_sum, wide
from tvjax.merge.entries import sum_entries
from tvjax.merge.leaf_report import Report

Coefficients = Callable[
    [Float[Array, "vectors vectors"], dict[str, Array]], tuple[Float[Array, " vectors"], dict[str, Array]]
]


def merge_by_products(
    vectors: Vectors,
    name: str,
    coefficients: Coefficients,
    parameters: Mapping[str, dict[str, Any]],
    *,
    scope: Scope,
    base: PyTree = None,
    report: Report | None = None,
) -> PyTree:
    """``sum_i c_i x_i`` with coefficients that are a function of the inner products ``<x_i, x_j>``.

    Args:
      vectors: the task vectors.
      name: of the rule, for the report.
      coefficients: ``(products, parameters of the leaf) -> (c, numbers for the report)``; a module-level function.
      parameters: by path.
      scope: the products are those of the whole vectors, or of each leaf.
      base: parameters theta_0; with them x_i is ``theta_0 + tau_i``, and the result is the combination minus theta_0.
      report: called for each merged leaf.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: an unknown scope, or a base that does not fit.
    """
    check_scope(scope)
    origin = origin_leaves(vectors, base)
    products: dict[str, Array | None] = dict.fromkeys(vectors.paths)
    if scope == "vector":
        total = sum(found for _, found in over_leaves(vectors, _products, origin))
        products = dict.fromkeys(vectors.paths, total)
    options = (("coefficients", coefficients),)
    return merge_leaves(vectors, name, _merge, origin, products, parameters, options=options, report=report)


def origin_leaves(vectors: Vectors, base: PyTree) -> dict[str, Leaf | None]:
    """The leaves of the base that the vectors cover, None without a base.

    Raises:
      ValueError: a base that does not fit.
    """
    if base is None:
        return dict.fromkeys(vectors.paths)
    params = tree.flatten(base)
    problems = [
        f"{path}: {vectors.shape(path)}, the base has {jnp.shape(params[path]) if path in params else 'no such leaf'}"
        for path in vectors.paths
        if path not in params or tuple(jnp.shape(params[path])) != vectors.shape(path)
    ]
    if problems:
        raise ValueError(
            f"base must be the parameters that the task vectors were made from, found\n{tree.list_some(problems)}\n"
            "for task vectors of a subtree give that subtree"
        )
    return {path: params[path] for path in vectors.paths}


def _products(leaves: list[Leaf], origin: Leaf | None) -> Float[Array, "points points"]:
    """Of the task vectors and, last, the base: as small differences of points they are not drowned by it."""

    def pairs(*stretches: Array) -> Array:
        rows = jnp.stack(wide(stretches))
        return rows[:, None] * rows

    return sum_entries(pairs, leaves if origin is None else [*leaves, origin])


def _merge(
    leaves: list[Leaf],
    origin: Leaf | None,
    products: Float[Array, "points points"] | None,
    parameters: dict[str, Array],
    coefficients: Coefficients,
) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    products = _products(leaves, origin) if products is None else products
    if origin is None:
        factors, measures = coefficients(products, parameters)
        return weighted_sum(wide(leaves), factors), measures
    shift = products[:-1, -1]
    factors, measures = coefficients(products[:-1, :-1] + shift + shift[:, None] + products[-1, -1], parameters)
    moved = weighted_sum(wide(leaves), factors)
    return moved + (jnp.sum(factors) - 1) * wide([origin])[0], measures
