"""NuSLERP: spherical interpolation by weights, of whole leaves or unit by unit (Goddard, mergekit, 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax.merge.base import PyTree, Vectors, merge_leaves, over_meshes, wide
from tvjax.merge.inner_products import merge_by_products, origin_leaves
from tvjax.merge.leaf_report import Report
from tvjax.merge.settings import Settings, check_votes, resolve_each
from tvjax.merge.views import Axes, Matrices, leaf_axes

Along = Literal["leaf", "inputs", "outputs"]


@over_meshes
def nuslerp(
    taus: Sequence[PyTree],
    *,
    weights: Settings = 1.0,
    along: Along = "leaf",
    base: PyTree = None,
    straight: float = 1e-3,
    matrices: Matrices = None,
    report: Report | None = None,
) -> PyTree:
    """``(sin((1 - t) theta) a + sin(t theta) b) / sin(theta)``, theta the angle between a and b.

    With ``t = w_b / (w_a + w_b)``. Unlike `tvjax.merge.slerp` it turns the vectors as long as they are: where their
    norms differ, that of the result is not between them. Where there is no arc it is ``(1 - t) a + t b``.

    Args:
      taus: the two task vectors a and b.
      weights: of the two, not negative, of positive sum; a number, by path pattern or by depth, or a list of these.
      along: the angle is that of the two whole ``"leaf"`` s (mergekit's `nuslerp_flatten`), of the ``"inputs"`` of each
        output (without it), or of the ``"outputs"`` of each input (`nuslerp_row_wise`). Vectors are whole.
      base: parameters theta_0; with them the models ``theta_0 + tau`` are interpolated instead (mergekit without
        `base_model`, and its `slerp`), and the result is that model minus theta_0.
      straight: sine of the angle up to which the arc is a line. mergekit's `nuslerp` has 1e-8, which is below what
        float32 resolves; its `slerp` 0.0316 (a cosine of 0.9995), so that two fine-tunings of one model, which are
        nearer to each other than that, are averaged.
      matrices: how leaves are matrices, the letters of their axes by path pattern; None: by the rule
        (`tvjax.merge.views`). ``"leaf"`` does without.
      report: called for each merged leaf, with the angle in degrees (the mean, of several).

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: not two vectors that fit together, or an option out of range.

    >>> one, other = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 3.0])}
    >>> [round(x, 4) for x in nuslerp([one, other])["w"].tolist()]
    [0.7071, 2.1213]
    """
    if along not in get_args(Along):
        raise ValueError(f"along must be one of {get_args(Along)}, found {along!r}")
    if not 0 <= straight <= 1:
        raise ValueError(f"straight is the sine of an angle, in [0, 1], found {straight}")
    vectors = Vectors(taus, least=2)
    if len(vectors) > 2:
        raise ValueError(f"nuslerp takes two task vectors, found {len(vectors)}; tvjax.merge.multi_slerp takes several")
    numbers = resolve_each(weights, vectors.paths, 2, "weights")
    check_votes(numbers)
    parameters = {
        path: {"t": np.float32(each[1] / each.sum()), "straight": np.float32(straight)}
        for path, each in numbers.items()
    }
    if along == "leaf":
        return merge_by_products(vectors, "nuslerp", _coefficients, parameters, scope="leaf", base=base, report=report)
    letters = leaf_axes({path: vectors.shape(path) for path in vectors.paths}, matrices)
    return merge_leaves(
        vectors,
        f"nuslerp along {along}",
        _by_unit,
        origin_leaves(vectors, base),
        parameters,
        {path: Axes(each) for path, each in letters.items()},
        options=(("together", "iv" if along == "inputs" else "ov"),),
        report=report,
    )


def _coefficients(
    products: Float[Array, "2 2"], parameters: dict[str, Array]
) -> tuple[Float[Array, " 2"], dict[str, Array]]:
    first, second, angle = _arc(products[0, 0], products[0, 1], products[1, 1], parameters)
    return jnp.stack([first, second]), {"angle": jnp.degrees(angle)}


def _by_unit(
    leaves: list[Any], origin: Any, parameters: dict[str, Array], axes: Axes, together: str
) -> tuple[Float[Array, "*shape"], dict[str, Array]]:
    over = tuple(axis for axis, letter in enumerate(axes.letters) if letter in together)
    one, other = wide(leaves)
    start = jnp.zeros_like(one) if origin is None else wide([origin])[0]

    def summed(x: Array, y: Array) -> Array:
        return jnp.sum(x * y, axis=over, keepdims=True)

    # As small differences of points they are not drowned by the base.
    whole, a, b = summed(start, start), summed(one, start), summed(other, start)
    aa, ab, bb = summed(one, one) + 2 * a, summed(one, other) + a + b, summed(other, other) + 2 * b
    first, second, angle = _arc(aa + whole, ab + whole, bb + whole, parameters)
    merged = first * one + second * other + (first + second - 1) * start
    return merged, {"angle": jnp.degrees(jnp.sum(angle) / max(1, math.prod(angle.shape)))}


def _arc(
    aa: Float[Array, "*units"], ab: Float[Array, "*units"], bb: Float[Array, "*units"], parameters: dict[str, Array]
) -> tuple[Float[Array, "*units"], Float[Array, "*units"], Float[Array, "*units"]]:
    """The factors of the two vectors, and the angle between them, from their inner products."""
    t, sizes = parameters["t"], jnp.sqrt(jnp.maximum(aa, 0)) * jnp.sqrt(jnp.maximum(bb, 0))
    cosine = jnp.clip(ab / jnp.where(sizes > 0, sizes, 1), -1, 1)
    angle = jnp.arccos(cosine)
    arc = (sizes > 0) & (jnp.sin(angle) > parameters["straight"])
    sine = jnp.where(arc, jnp.sin(angle), 1)
    turned = (jnp.sin((1 - t) * angle) / sine, jnp.sin(t * angle) / sine)
    return jnp.where(arc, turned[0], 1 - t), jnp.where(arc, turned[1], t), angle
