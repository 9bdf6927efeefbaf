"""Multi-SLERP: the normalised mean of directions, at the mean of the norms (Goddard, mergekit, 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax.merge.base import PyTree, Scope, Vectors, over_meshes
from tvjax.merge.inner_products import merge_by_products
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Settings, check_votes, resolve_each

# Of the mean direction; it comes as the square root of a sum of inner products, whose rounding is that of float32.
_CANCELS = 1e-3


@over_meshes
def multi_slerp(
    taus: Sequence[PyTree],
    *,
    weights: Settings = 1.0,
    normalize: bool = True,
    scope: Scope = "leaf",
    base: PyTree = None,
    report: Report | None = None,
) -> PyTree:
    """``sum_i w_i |tau_i|`` times the direction of ``sum_i w_i u_i``, with ``u_i = tau_i / |tau_i|``.

    The published steps (https://goddard.blog/posts/multislerp-wow-what-a-cool-idea) project the u_i onto the tangent
    space at the direction m of their weighted mean, take the weighted mean there, and go back to the sphere. That mean
    is ``sum_i w_i (u_i - <u_i, m> m) = 0`` for any weights, since m is the direction of ``sum_i w_i u_i`` itself: what
    is left is m. It is where `tvjax.merge.karcher_mean` starts; the mean of least angles is that one.

    Where the directions cancel the result is ``sum_i w_i tau_i``. A zero vector has no direction, but counts in the
    norm.

    Args:
      taus: task vectors of one base.
      weights: not negative, of positive sum; a number, by path pattern or by depth, or a list of these.
      normalize: divide the weights by their sum; else the norm is that of the weights as they are.
      scope: directions and norms of each ``"leaf"``, as published, or of the whole ``"vector"``.
      base: parameters theta_0; with them the models ``theta_0 + tau_i`` are merged instead (mergekit without
        `base_model`), and the result is that model minus theta_0.
      report: called for each merged leaf, with the norm of the mean direction.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    Deviation: mergekit refuses three vectors or more whose directions cancel.

    >>> one, other = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 3.0])}
    >>> [round(x, 4) for x in multi_slerp([one, other])["w"].tolist()]
    [1.4142, 1.4142]
    """
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    check_votes(numbers)
    shares = {path: each / each.sum() if normalize else each for path, each in numbers.items()}
    parameters = {path: {"weights": np.asarray(each, np.float32)} for path, each in shares.items()}
    return merge_by_products(vectors, "multi-SLERP", _coefficients, parameters, scope=scope, base=base, report=report)


def _coefficients(
    products: Float[Array, "vectors vectors"], parameters: dict[str, Array]
) -> tuple[Float[Array, " vectors"], dict[str, Array]]:
    weights, norms = parameters["weights"], jnp.sqrt(jnp.diagonal(products))
    divisors = jnp.where(norms > 0, norms, 1)
    along = jnp.where(norms > 0, weights / divisors, 0)
    size = jnp.sqrt(jnp.maximum(jnp.sum(along * jnp.sum(products * along, axis=1)), 0))
    determined = size > _CANCELS * jnp.sum(weights)
    found = along * jnp.sum(weights * norms) / jnp.where(determined, size, 1)
    return jnp.where(determined, found, weights), {"mean": size}
