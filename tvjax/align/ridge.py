"""Ridge regression from sums: the change of a kernel that changes its outputs as wanted, as far as its inputs can.

``min ||(H K + 1 b^T) L - D||^2 + penalty ||K||^2`` with H the inputs, D the wanted change of the outputs, L a diagonal
matrix that the outputs are multiplied with afterwards (LayerScale), or the identity. With a constant, G and C are sums
about the means and b follows from them; without one they are the plain sums.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from tvjax.align.decompositions import eigh
from tvjax.align.procrustes import default_rank_tolerance
from tvjax.align.products import product


class Ridge(NamedTuple):
    """A solution.

    Attributes:
      kernel: K, ``[d_in, d_out]``.
      rank: how many directions of the inputs the rows determine.
      explained: ``||P D||^2``, the part of the wanted change that lies in the range of the inputs.
    """

    kernel: Float[Array, "d_in d_out"]
    rank: Array
    explained: Array


@jax.jit
def ridge(
    gram: Float[Array, "d_in d_in"],
    cross: Float[Array, "d_in d_out"],
    penalty: Float[Array, ""],
    scale: Float[Array, " d_out"] | None = None,
) -> Ridge:
    """``K = (G + penalty L^-2)^-1 C L^-1``, column by column; no change where the scale is 0.

    Directions of the inputs whose eigenvalue is rounding are left out, so that a penalty of 0 gives the solution of
    the least norm.

    Args:
      gram: ``G = H^T H``.
      cross: ``C = H^T D``.
      penalty: of the squared norm of K.
      scale: the diagonal of L; None: the identity.

    >>> H, D = jnp.array([[1.0, 0.0], [2.0, 0.0]]), jnp.array([[3.0], [6.0]])
    >>> found = ridge(H.T @ H, H.T @ D, jnp.float32(0))
    >>> found.kernel.round(4).tolist(), int(found.rank), float(found.explained)
    ([[3.0], [0.0]], 1, 45.0)
    """
    values, vectors = eigh(gram)
    real = values > default_rank_tolerance(values.dtype) * jnp.max(values)
    values = jnp.where(real, values, 0)[:, None]
    turned = product(vectors.T, cross)
    share = jnp.ones((1, 1), values.dtype) if scale is None else scale[None]
    below = values * share**2 + penalty
    solved = jnp.where(real[:, None] & (below > 0), share * turned / jnp.where(below > 0, below, 1), 0)
    explained = jnp.sum(jnp.where(real[:, None], turned**2 / jnp.where(values > 0, values, 1), 0))
    return Ridge(product(vectors, solved), jnp.sum(real, dtype=jnp.int32), explained)


@partial(jax.jit, static_argnames="with_constant")
def constant(
    kernel: Float[Array, "d_in d_out"],
    mean_inputs: Float[Array, " d_in"],
    mean_wanted: Float[Array, " d_out"],
    scale: Float[Array, " d_out"] | None = None,
    *,
    with_constant: bool = True,
) -> Float[Array, " d_out"]:
    """``b = L^-1 mean(D) - mean(H) K``, the constant of a solution about the means; zeros without one.

    >>> constant(jnp.ones((1, 1)), jnp.array([2.0]), jnp.array([5.0])).tolist()
    [3.0]
    """
    if not with_constant:
        return jnp.zeros_like(mean_wanted)
    if scale is not None:
        mean_wanted = jnp.where(scale != 0, mean_wanted / jnp.where(scale != 0, scale, 1), 0)
    found = mean_wanted - product(mean_inputs, kernel)
    return found if scale is None else jnp.where(scale != 0, found, 0)
