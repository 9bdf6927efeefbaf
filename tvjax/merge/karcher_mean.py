"""The Karcher mean of task vectors on the sphere (Karcher, Comm. Pure Appl. Math. 1977): SLERP of several."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from tvjax.merge.base import PyTree, Scope, Vectors, over_meshes
from tvjax.merge.inner_products import merge_by_products
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Settings, check_votes, resolve_each

_SMALL = 1e-6


@over_meshes
def karcher_mean(
    taus: Sequence[PyTree],
    *,
    weights: Settings = 1.0,
    scope: Scope = "leaf",
    base: PyTree = None,
    tolerance: float = 1e-6,
    iterations: int = 100,
    report: Report | None = None,
) -> PyTree:
    """The direction from which the angles to all vectors are least in mean square, at the mean of their norms.

    The direction x minimises ``sum_i w_i angle(x, tau_i)^2``; it is the fixed point of ``x <- exp_x(sum_i w_i
    log_x(u_i))``, ``u_i = tau_i / |tau_i|``, started at the weighted mean of the u_i (at the one of the largest weight
    where that vanishes). x stays in the span of the vectors, so the iteration is one of coefficients. The norm is
    ``sum_i w_i |tau_i|``, the weights divided by their sum. A zero vector has no direction, but counts in the norm.
    Vectors opposite to each other have no unique mean.

    Args:
      taus: task vectors of one base.
      weights: not negative, of positive sum; a number, by path pattern or by depth, or a list of these.
      scope: directions and norms of each ``"leaf"``, or of the whole ``"vector"``.
      base: parameters theta_0; with them the mean is that of the models ``theta_0 + tau_i``, minus theta_0.
      tolerance: the iteration ends when a step is shorter, in radians.
      iterations: at most.
      report: called for each merged leaf, with the number of iterations and the last step.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    >>> one, other = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 3.0])}
    >>> [round(x, 4) for x in karcher_mean([one, other])["w"].tolist()]
    [1.4142, 1.4142]
    """
    vectors = Vectors(taus)
    numbers = resolve_each(weights, vectors.paths, len(vectors), "weights")
    check_votes(numbers)
    if not tolerance >= 0 or iterations < 1:
        raise ValueError(
            f"tolerance must be 0 or more and iterations 1 or more, found tolerance {tolerance} and iterations "
            f"{iterations}"
        )
    stop = {"tolerance": np.float32(tolerance), "iterations": np.int32(min(iterations, 2**31 - 1))}
    parameters = {path: {"weights": each / each.sum(), **stop} for path, each in numbers.items()}
    return merge_by_products(vectors, "Karcher mean", _coefficients, parameters, scope=scope, base=base, report=report)


def _coefficients(
    products: Float[Array, "vectors vectors"], parameters: dict[str, Array]
) -> tuple[Float[Array, " vectors"], dict[str, Array]]:
    norms = jnp.sqrt(jnp.diagonal(products))
    divisors = jnp.where(norms > 0, norms, 1)
    cosines = products / (divisors * divisors[:, None])
    weights = jnp.where(norms > 0, parameters["weights"], 0)
    weights = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)

    def size(c: Array) -> Array:
        return jnp.sqrt(jnp.maximum(jnp.sum(c * jnp.sum(cosines * c, axis=1)), 0))

    def unit(c: Array) -> Array:
        return c / jnp.maximum(size(c), _SMALL)

    def unfinished(state: tuple[Array, Array, Array]) -> Array:
        _, step, count = state
        return (step > parameters["tolerance"]) & (count < parameters["iterations"])

    def move(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mean, _, count = state
        along = jnp.clip(jnp.sum(cosines * mean, axis=1), -1, 1)
        angles = jnp.arccos(along)
        pull = weights * jnp.where(angles > _SMALL, angles / jnp.maximum(jnp.sin(angles), _SMALL), 1)
        tangent = pull - jnp.sum(pull * along) * mean
        step = size(tangent)
        moved = jnp.cos(step) * mean + jnp.sin(step) * unit(tangent)
        return unit(jnp.where(step > 0, moved, mean)), step, count + 1

    largest = (jnp.arange(weights.size) == jnp.argmax(weights)).astype(weights.dtype)
    start = jnp.where(size(weights) > _SMALL, unit(weights), largest)
    mean, step, count = lax.while_loop(unfinished, move, (start, jnp.float32(jnp.inf), jnp.int32(0)))
    found = jnp.where(norms > 0, mean * jnp.sum(parameters["weights"] * norms) / divisors, 0)
    return found, {"iterations": count, "step": step}
