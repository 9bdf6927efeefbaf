"""Polar factors, leading singular directions and solves of matrices: the decompositions that merges share.

Nothing here depends on the signs of singular vectors, nor on how equal singular values are told apart. Directions that
a matrix does not determine (its singular values are rounding) are zero, never completed with noise.

Three ways to decompose:

- ``"gram"``: eigenvectors of the smaller Gram matrix, corrected to first order for the accuracy that squaring costs.
  The size of the correction bounds what is left; where that is more than `_ACCURACY` the matrix is decomposed again by
  ``"svd"``, as small matrices are in the first place. Two to four times as fast on spectra that fall by less than some
  three decades, slower than ``"svd"`` by a third on others, and within 1e-4 of it on all.
- ``"svd"``: the singular value decomposition.
- ``"randomised"``: randomised SVD (`tvjax.align.procrustes.polar`), for a few directions of a large matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tvjax.align import procrustes
from tvjax.align.decompositions import eigh
from tvjax.align.products import product

Method = Literal["gram", "svd", "randomised"]

_ACCURACY = 1e-4  # relative error, in the Frobenius norm, above which "gram" falls back on "svd"
_SMALL = 128  # below, an SVD takes no longer
_EPS = float(jnp.finfo(jnp.float32).eps)
_EDGE = 8  # directions on either side of a cut that are looked at


# A function of one matrix that `vmap` runs on one matrix after another: a branch is taken only where it must be, and
# the bytes do not depend on the batch.
one_by_one = jax.custom_batching.sequential_vmap


def check_method(method: str, allowed: Sequence[str] = get_args(Method)) -> None:
    """Raises a ValueError unless a decomposition is one of those allowed.

    >>> check_method("gram")
    """
    if method not in allowed:
        raise ValueError(f"method must be one of {tuple(allowed)}, found {method!r}")


def polar(matrix: Float[Array, "m n"], method: Method = "gram") -> Float[Array, "m n"]:
    """The polar factor ``U V^T`` of ``U S V^T``, over the singular values that are not rounding.

    Args:
      matrix: float32.
      method: ``"gram"`` or ``"svd"``.

    Returns:
      A partial isometry; its squared Frobenius norm is the rank.

    >>> polar(jnp.array([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    check_method(method, ("gram", "svd"))
    matrix, sound = _unit(matrix)
    if method == "svd" or min(matrix.shape) < _SMALL:
        return _between(*_leading_svd(matrix, min(matrix.shape), "svd")) * sound
    return _polar_by_eigenvectors(matrix, *eigh(_gram(matrix))) * sound


def leading(
    matrix: Float[Array, "m n"], count: int, method: Method = "gram"
) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
    """Bases of the `count` leading left and right singular directions, each a rotation of the singular vectors.

    The two are aligned: ``left @ right`` is the polar factor of the matrix's best approximation of that rank, and
    ``left^T matrix right^T`` is symmetric and positive, its trace the sum of the singular values.

    Args:
      matrix: float32.
      count: k, at most ``min(m, n)``.
      method: of decomposition.

    Returns:
      Orthonormal columns and orthonormal rows, zero where the matrix has fewer directions.

    >>> left, right = leading(jnp.diag(jnp.array([1.0, 5.0, 2.0])), 2)
    >>> (left @ right).tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    check_method(method)
    matrix, sound = _unit(matrix)
    if method != "gram" or min(matrix.shape) < _SMALL:
        left, right = _leading_svd(matrix, count, "svd" if method == "gram" else method)
    else:
        left, right = _leading_by_eigenvectors(count)(matrix, *eigh(_gram(matrix)))
    return left * sound, right * sound


@one_by_one
def solve(matrix: Float[Array, "n n"], right: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """``matrix^-1 right`` for a symmetric positive matrix: Cholesky, or the pseudo-inverse where it breaks down.

    The matrix is scaled to a unit diagonal first. Directions that it does not determine are zero in the result.

    >>> solve(jnp.diag(jnp.array([4.0, 0.0])), jnp.array([[2.0], [5.0]])).round(3).tolist()
    [[0.5], [0.0]]
    """
    diagonal = jnp.diagonal(matrix)
    present = diagonal > 0
    root = jnp.where(present, jax.lax.rsqrt(jnp.where(present, diagonal, 1)), 0)
    scaled = matrix * root[:, None] * root + jnp.diag(jnp.where(present, 0.0, 1.0).astype(matrix.dtype))
    factor = jnp.linalg.cholesky(scaled)
    target = root[:, None] * right
    pivots = jnp.diagonal(factor)
    # A pivot of the size of its rounding: the factor says nothing of that direction.
    sound = jnp.min(pivots, initial=1.0) ** 2 > 8 * _EPS * matrix.shape[0] ** 0.5

    def by_factor() -> Float[Array, "n k"]:
        return jax.scipy.linalg.cho_solve((factor, True), target)

    def by_eigenvectors() -> Float[Array, "n k"]:
        values, vectors = eigh(scaled)
        kept = values > 8 * _EPS * matrix.shape[0] ** 0.5 * values[-1]
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        return product(vectors * inverse, product(vectors.T, target))

    return root[:, None] * jax.lax.cond(sound, by_factor, by_eigenvectors)


def _unit(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m n"], Float[Array, ""]]:
    """Scaled to a largest entry of one (squares of small ones would underflow); and 1, or NaN if one is not finite."""
    # What follows takes directions of NaN for undetermined: they must be seen in the result.
    largest = jnp.max(jnp.abs(matrix), initial=0.0)
    return matrix / jnp.where(largest > 0, largest, 1), jnp.where(jnp.isfinite(largest), 1, jnp.nan)


@one_by_one
def _gram(matrix: Float[Array, "m n"]) -> Float[Array, "r r"]:
    """The smaller of the two Gram matrices."""
    return product(matrix.T, matrix) if matrix.shape[0] > matrix.shape[1] else product(matrix, matrix.T)


@one_by_one
def _between(left: Float[Array, "m k"], right: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return product(left, right)


@one_by_one
def _polar_by_eigenvectors(
    matrix: Float[Array, "m n"], values: Float[Array, " r"], basis: Float[Array, "r r"]
) -> Float[Array, "m n"]:
    tall = matrix.shape[0] > matrix.shape[1]
    inverse = jax.lax.rsqrt(jnp.maximum(values, _EPS * values[-1]))
    lost = _EPS * values[-1] * jnp.sqrt(jnp.mean(inverse**4))

    def directly() -> Float[Array, "m n"]:
        root = product(basis * inverse, basis.T)
        return product(matrix, root) if tall else product(root, matrix)

    def corrected() -> Float[Array, "m n"]:
        wide = matrix.T if tall else matrix
        sharp, images = _sharpened(basis, product(basis.T, wide))
        coefficients, rows, accurate = _orthonormal_rows(images)
        found = jax.lax.cond(
            accurate,
            lambda: product(product(sharp, coefficients), rows),
            lambda: product(*_leading_svd(wide, wide.shape[0], "svd")),
        )
        return found.T if tall else found

    return jax.lax.cond(lost <= _ACCURACY / 10, directly, corrected)


@cache
def _leading_by_eigenvectors(count: int) -> Callable[..., tuple[Array, Array]]:
    @one_by_one
    def find(
        matrix: Float[Array, "m n"], values: Float[Array, " r"], basis: Float[Array, "r r"]
    ) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
        tall = matrix.shape[0] > matrix.shape[1]
        values, vectors = values[::-1], basis[:, ::-1][:, : count + _EDGE]
        images = product(matrix, vectors).T if tall else product(vectors.T, matrix)
        coefficients, rows, accurate = _orthonormal_rows(images[:count])
        determined = jnp.any(rows != 0, axis=1)
        if count < len(values):
            accurate &= _is_separated(values, images, count, jnp.linalg.norm(matrix)) | ~determined[-1]

        def found() -> tuple[Array, Array]:
            own = jnp.where(determined, vectors[:, :count], 0)
            other = jnp.where(determined[:, None], product(coefficients, rows), 0)
            return (other.T, own.T) if tall else (own, other)

        return jax.lax.cond(accurate, found, lambda: _leading_svd(matrix, count, "svd"))

    return find


def _leading_svd(
    matrix: Float[Array, "m n"], count: int, method: Method
) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
    found = procrustes.polar(matrix, rank=count, method=method)
    return found.left, found.right


def _sharpened(
    basis: Float[Array, "m m"], images: Float[Array, "m n"]
) -> tuple[Float[Array, "m m"], Float[Array, "m n"]]:
    """Eigenvectors of a Gram matrix, smallest first, and their images ``basis^T matrix``, the small ones made better.

    The small ones are known to ``eps s_max^2`` only. Among themselves they are decomposed once more, in a Gram matrix
    that the large ones do not drown.
    """
    small = images.shape[0] // 3
    if small > 1:
        turn = eigh(product(images[:small], images[:small].T))[1]
        basis = basis.at[:, :small].set(product(basis[:, :small], turn))
        images = images.at[:small].set(product(turn.T, images[:small]))
    return basis, images


def _orthonormal_rows(
    images: Float[Array, "k n"],
) -> tuple[Float[Array, "k k"], Float[Array, "k n"], Bool[Array, ""]]:
    """The polar factor of rows that are almost orthogonal, ``coefficients @ rows``, and whether it is accurate.

    With rows ``y_i = s_i z_i``, ``|z_i| = 1``, and their overlaps ``T_ij = y_i z_j``, to first order
    ``polar(Y) = Z - C Z``, ``C_ij = T_ij s_j / (s_i (s_i + s_j))``: a small row is made orthogonal to a large one, not
    the other way. A row that is rounding has no z of its own, but ``T_ij / (s_i + s_j)`` of the others. What is left
    is of second order, less than ``|C|^2``.
    """
    sizes = jnp.linalg.norm(images, axis=1)
    tolerance = procrustes.default_rank_tolerance()
    determined = sizes > tolerance * jnp.max(sizes)
    divisors = jnp.where(determined, sizes, 1)
    rows = jnp.where(determined[:, None], images / divisors[:, None], 0)
    overlaps = product(images, rows.T)
    sums = sizes[:, None] + sizes
    turn = overlaps / jnp.where(sums > 0, sums, 1)
    correction = jnp.where(determined[:, None], -turn * (sizes / divisors[:, None]), turn)
    correction = correction - jnp.diag(jnp.diagonal(correction))
    rank = jnp.sum(determined, dtype=jnp.float32)
    accurate = jnp.sum(correction**2) <= _ACCURACY * jnp.sqrt(rank)
    return correction + jnp.diag(determined.astype(images.dtype)), rows, accurate


def _is_separated(
    values: Float[Array, " m"], images: Float[Array, "k n"], count: int, norm: Float[Array, ""]
) -> Bool[Array, ""]:
    """Whether rounding of the Gram matrix left the leading directions apart from those that follow.

    Two directions across the edge are turned into each other by ``y_i y_j / (s_i^2 - s_j^2)``, which moves the matrix's
    best approximation by that times s_i. It matters next to the edge only. An SVD would do better by ``2 s_i / s_1``.
    """
    first, last = max(0, count - _EDGE), images.shape[0]
    overlaps = product(images[first:count], images[count:].T)
    gaps = jnp.maximum(values[first:count, None] - values[count:last], _EPS * values[0])
    turns = jnp.linalg.norm(jnp.minimum(jnp.abs(overlaps) / jnp.where(gaps > 0, gaps, 1), 1))
    edge = jnp.maximum(values[count - 1], 0)
    return (turns * jnp.sqrt(edge) <= _ACCURACY * norm) | (edge > values[0] / 64)
