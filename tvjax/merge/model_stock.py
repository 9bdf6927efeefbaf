"""Model stock: how far to go to the average (Jang et al., ECCV 2024, arXiv 2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax.merge.base import PyTree, Scope, Vectors, over_meshes
from tvjax.merge.inner_products import merge_by_products
from tvjax.merge.leaf_report import Report


@over_meshes
def model_stock(taus: Sequence[PyTree], *, scope: Scope = "leaf", report: Report | None = None) -> PyTree:
    """``t`` times the mean, with ``t = k cos / (1 + (k - 1) cos)`` of the mean cosine between k task vectors.

    t is 1 where they are equal and 0 where they are orthogonal. Where the mean cosine is negative t is 0, so that
    nothing is kept: the formula would turn the mean around. The cosine with a zero vector counts as 0.

    Args:
      taus: two or more task vectors of one base.
      scope: the cosines of each ``"leaf"``, as published, or of the whole ``"vector"``.
      report: called for each merged leaf, with the mean cosine and t.

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: fewer than two vectors, or vectors that do not fit together.

    Source: equation 5, with the pre-trained weights as the origin. It was made for several fine-tunings on ONE task;
    vectors of different tasks are almost orthogonal, and little is left of them.

    >>> taus = [{"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([1.0, 3.0**0.5])}]
    >>> [round(x, 4) for x in model_stock(taus)["w"].tolist()]
    [1.0, 0.5774]
    """
    vectors = Vectors(taus, least=2)
    parameters: dict[str, dict[str, Array]] = dict.fromkeys(vectors.paths, {})
    return merge_by_products(vectors, "model stock", _coefficients, parameters, scope=scope, report=report)


def _coefficients(
    products: Float[Array, "vectors vectors"], parameters: dict[str, Array]
) -> tuple[Float[Array, " vectors"], dict[str, Array]]:
    count = products.shape[0]
    norms = jnp.sqrt(jnp.diagonal(products))
    divisors = jnp.where(norms > 0, norms, 1)
    cosines = jnp.where(jnp.eye(count, dtype=bool), 0, products / (divisors * divisors[:, None]))
    cosine = jnp.sum(cosines) / (count * (count - 1))
    positive = jnp.clip(cosine, 0, 1)
    t = count * positive / (1 + (count - 1) * positive)
    return jnp.broadcast_to(t / count, (count,)), {"cosine": cosine, "t": t}
