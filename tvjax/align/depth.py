"""Which source layer each target layer is paired with, where the two models differ in depth."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tvjax.align.products import product, wide


def pair_layers(depth_a: int, depth_b: int, rule: str | Sequence[int] = "uniform") -> tuple[int, ...]:
    """The source layer of each target layer: ``round(j (D_A - 1) / (D_B - 1))``, halves to even.

    Args:
      depth_a: D_A, layers of the source.
      depth_b: D_B, layers of the target; a target of one layer pairs with source layer 0.
      rule: ``"uniform"``, or a source layer for every target layer.

    Returns:
      D_B source layers. (BiCo, arXiv 2605.28444, section 4.)

    Raises:
      ValueError: an unknown rule, a list of another length, or a layer that the source does not have.

    >>> pair_layers(12, 24)[:6], pair_layers(12, 24)[-4:]
    ((0, 0, 1, 1, 2, 2), (10, 10, 11, 11))
    >>> pair_layers(3, 2, rule=[0, 1])
    (0, 1)
    """
    if depth_a < 1 or depth_b < 1:
        raise ValueError(f"both models need at least one layer, found {depth_a} and {depth_b}")
    if isinstance(rule, str):
        if rule != "uniform":
            raise ValueError(f'the rule must be "uniform" or one source layer per target layer, found {rule!r}')
        return tuple(round(Fraction(j * (depth_a - 1), max(depth_b - 1, 1))) for j in range(depth_b))
    pairs = tuple(int(i) for i in rule)
    if len(pairs) != depth_b:
        raise ValueError(
            f"the rule lists {len(pairs)} source layers, the target has {depth_b} layers: list one for each"
        )
    outside = sorted({i for i in pairs if not 0 <= i < depth_a})
    if outside:
        raise ValueError(f"the rule names source layers {outside}, the source has layers 0 to {depth_a - 1}")
    return pairs


@jax.jit
def linear_cka(a: Array, b: Array) -> Array:
    """Linear centred kernel alignment ``||H_A^T H_B||^2 / (||H_A^T H_A|| ||H_B^T H_B||)`` of centred rows.

    Args:
      a: H_A, ``[n, d_a]``.
      b: H_B, ``[n, d_b]``, its rows aligned with those of `a`.

    Returns:
      A scalar in [0, 1]; 0 where one side is constant. It does not see rotations nor one common scale (Kornblith et
      al., ICML 2019, arXiv 1905.00414, equation 4).

    Raises:
      ValueError: different numbers of rows.

    >>> import jax.numpy as jnp
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
    >>> round(float(linear_cka(rows, 3 * rows[:, ::-1])), 5)
    1.0
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(f"rows must be aligned, [n, d_a] and [n, d_b], found {a.shape} and {b.shape}")

    def normalised(rows: Array) -> Array:
        rows = wide(rows)
        rows = rows - jnp.mean(rows, axis=0)
        norm = jnp.linalg.norm(rows)
        return rows / jnp.where(norm > 0, norm, 1)

    a, b = normalised(a), normalised(b)
    if a.shape[0] < max(a.shape[1], b.shape[1]):
        gram_a, gram_b = product(a, a.T), product(b, b.T)
        overlap = jnp.sum(gram_a * gram_b)
    else:
        gram_a, gram_b = product(a.T, a), product(b.T, b)
        overlap = jnp.sum(product(a.T, b) ** 2)
    norms = jnp.linalg.norm(gram_a) * jnp.linalg.norm(gram_b)
    return overlap / jnp.where(norms > 0, norms, 1)


def monotone_pairing(similarity: np.ndarray | Array) -> tuple[int, ...]:
    """The non-decreasing pairing of layers that has the largest total similarity, by dynamic programming on the host.

    Args:
      similarity: ``[D_A, D_B]``, such as `linear_cka` of every pair of layers.

    Returns:
      The source layer of each target layer, D_B of them; ties go to the earlier source layer.

    Raises:
      ValueError: no matrix, or entries that are not finite.

    >>> monotone_pairing([[0.9, 0.1, 0.0], [0.2, 0.8, 0.7]])
    (0, 1, 1)
    """
    scores = np.asarray(similarity, np.float64)
    if scores.ndim != 2 or 0 in scores.shape or not np.isfinite(scores).all():
        raise ValueError(f"similarity must be a finite matrix [depth_a, depth_b], found shape {scores.shape}")
    best = scores[:, 0]
    origins = []
    for column in scores.T[1:]:
        reachable = np.maximum.accumulate(best)
        origins.append(np.array([int(np.argmax(best[: i + 1])) for i in range(len(best))]))
        best = column + reachable
    pairs = [int(np.argmax(best))]
    for origin in reversed(origins):
        pairs.append(int(origin[pairs[-1]]))
    return tuple(reversed(pairs))
