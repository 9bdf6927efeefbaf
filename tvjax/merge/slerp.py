"""SLERP: from one task vector to another along the sphere (Shoemake, SIGGRAPH 1985)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax.merge.base import PyTree, Scope, Vectors, over_meshes
from tvjax.merge.inner_products import merge_by_products
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Setting, require, resolve

_STRAIGHT = 1e-3  # sine of the angle below which the arc is a line


@over_meshes
def slerp(
    taus: Sequence[PyTree],
    *,
    t: Setting = 0.5,
    scope: Scope = "leaf",
    base: PyTree = None,
    report: Report | None = None,
) -> PyTree:
    """The direction turned from the first to the second by the share t of their angle, the norm interpolated.

    With ``u = a / |a|``, ``v = b / |b|`` and ``theta`` the angle between them it is
    ``((1 - t)|a| + t |b|) (sin((1 - t) theta) u + sin(t theta) v) / sin(theta)``. Where there is no arc (a vector is
    zero, or the two are parallel or opposite) it is ``(1 - t) a + t b``.

    Args:
      taus: the two task vectors a and b.
      t: in [0, 1]; 0 gives a, 1 gives b; a number, by path pattern or by depth.
      scope: angle and norms of each ``"leaf"``, or of the whole ``"vector"``.
      base: parameters theta_0; with them the models ``theta_0 + tau`` are interpolated instead, and the result is that
        model minus theta_0.
      report: called for each merged leaf, with the angle in degrees.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: not two vectors that fit together, or an option out of range.

    Deviation: much-used code turns the vectors as they are, which shortens or lengthens the result when their norms
    differ; with equal norms it is the same.

    >>> one, other = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 3.0])}
    >>> [round(x, 4) for x in slerp([one, other])["w"].tolist()]
    [1.4142, 1.4142]
    """
    vectors = Vectors(taus, least=2)
    if len(vectors) > 2:
        raise ValueError(f"slerp takes two task vectors, found {len(vectors)}; tvjax.merge.karcher_mean takes several")
    numbers = resolve(t, vectors.paths)
    require(numbers, "t", lambda share: (share >= 0) & (share <= 1), "in [0, 1]")
    parameters = {path: {"t": np.float32(share)} for path, share in numbers.items()}
    return merge_by_products(vectors, "slerp", _coefficients, parameters, scope=scope, base=base, report=report)


def _coefficients(
    products: Float[Array, "2 2"], parameters: dict[str, Array]
) -> tuple[Float[Array, " 2"], dict[str, Array]]:
    norms = jnp.sqrt(jnp.diagonal(products))
    shares = jnp.stack([1 - parameters["t"], parameters["t"]])
    divisors = jnp.where(norms > 0, norms, 1)
    angle = jnp.arccos(jnp.clip(products[0, 1] / (divisors[0] * divisors[1]), -1, 1))
    arc = (jnp.min(norms) > 0) & (jnp.sin(angle) > _STRAIGHT)
    turned = jnp.sin(shares * angle) / jnp.where(arc, jnp.sin(angle), 1) * jnp.sum(shares * norms) / divisors
    return jnp.where(arc, turned, shares), {"angle": jnp.degrees(angle)}
