"""Streaming cross-moments of row-aligned activations, in float32, with the sums that centre them exactly afterwards.

Features whose mean is larger than their deviation are shifted by the mean of the first batch before they are
multiplied, so a large mean costs no precision, and the moments of the rows as they are, or about their mean, follow
from the sums: with shift s, ``sum w (a - s_a)(b - s_b)^T`` and ``sum w (a - s_a)``. Others are left as they are: where
most rows are zero (output gradients of a block that only the class token leaves), a shift would make all of them one
small row whose products round alike, each time in the same direction (measured: noise of 13 eps in the place of 2).
Every row weighs the same whatever the batch sizes; padding rows have weight 0.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from tvjax.align.procrustes import OrthogonalMap
from tvjax.align.products import product, wide


class Moments(NamedTuple):
    """Sums over weighted rows ``a [n, d_a]`` and ``b [n, d_b]``, the rows shifted where their mean is large.

    Attributes:
      count: scalar, the total weight of the rows.
      shift_a: ``[d_a]``, the mean of A's first batch in the features where it is larger than the deviation, else 0.
      shift_b: ``[d_b]``, the same of B.
      sum_a: ``[d_a]``, the sum of A's shifted rows.
      sum_b: ``[d_b]``, the sum of B's shifted rows.
      square_a: scalar, the sum of squares of A's shifted rows.
      square_b: scalar, the sum of squares of B's shifted rows.
      cross: ``[d_a, d_b]``, the cross-moment of the shifted rows.
      gram_a: ``[d_a, d_a]``, the Gram matrix of A's shifted rows, or None.
      gram_b: ``[d_b, d_b]``, the Gram matrix of B's shifted rows, or None.
    """

    count: Array  # type: ignore[assignment]
    shift_a: Array
    shift_b: Array
    sum_a: Array
    sum_b: Array
    square_a: Array
    square_b: Array
    cross: Array
    gram_a: Array | None = None
    gram_b: Array | None = None


def init(d_a: int, d_b: int, *, gram: bool = False, dtype: jnp.dtype = jnp.float32) -> Moments:
    """The moments of no rows.

    Args:
      d_a: features of A.
      d_b: features of B.
      gram: also keep the Gram matrices, for whitening and for the exact residual.
      dtype: float32, or float64 where the caller enabled it.

    Returns:
      Moments, all zero.

    Raises:
      ValueError: float64 is asked for but not enabled.

    >>> init(2, 3).cross.shape
    (2, 3)
    """
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(f"dtype {jnp.dtype(dtype).name} is not enabled: set jax_enable_x64, or use float32")

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, dtype)

    return Moments(
        count=zeros(),
        shift_a=zeros(d_a),
        shift_b=zeros(d_b),
        sum_a=zeros(d_a),
        sum_b=zeros(d_b),
        square_a=zeros(),
        square_b=zeros(),
        cross=zeros(d_a, d_b),
        gram_a=zeros(d_a, d_a) if gram else None,
        gram_b=zeros(d_b, d_b) if gram else None,
    )


@jax.jit
def update(moments: Moments, a: Array, b: Array, weights: Array | None = None) -> Moments:
    """The moments with more rows.

    Args:
      moments: of the rows so far.
      a: ``[n, d_a]`` (or ``[..., d_a]``, the leading axes are flattened), any floating dtype.
      b: ``[n, d_b]``, its rows aligned with those of `a`.
      weights: ``[n]``, 0 at padding rows; None: 1 everywhere. A row of weight 0 may hold anything, NaN included.

    Returns:
      The new moments.

    Raises:
      ValueError: rows that are not aligned or have other features than the moments.

    >>> import jax.numpy as jnp
    >>> rows = jnp.array([[1.0, 0.0], [3.0, 2.0]])
    >>> cross(update(init(2, 2), rows, rows)).tolist()
    [[10.0, 6.0], [6.0, 4.0]]
    """
    rows_a, rows_b = a.shape[:-1], b.shape[:-1]
    if rows_a != rows_b or (weights is not None and weights.shape != rows_a):
        raise ValueError(
            f"the rows of A and B must be aligned one to one, found a {a.shape}, b {b.shape}, "
            f"weights {None if weights is None else weights.shape}: align the tokens first (tvjax.align.tokens)"
        )
    if (a.shape[-1], b.shape[-1]) != moments.cross.shape:
        raise ValueError(f"moments of {moments.cross.shape} features do not take rows a {a.shape} and b {b.shape}")
    dtype = moments.cross.dtype
    a, b = (x.reshape(-1, x.shape[-1]).astype(dtype) for x in (a, b))
    weights = jnp.ones(a.shape[0], dtype) if weights is None else weights.reshape(-1).astype(dtype)
    a, b = (jnp.where(weights[:, None] > 0, x, 0) for x in (a, b))

    batch = jnp.sum(weights)
    first = moments.count == 0
    shift_a, shift_b = (
        jnp.where(first, _large_means(x, weights, batch), shift)
        for x, shift in ((a, moments.shift_a), (b, moments.shift_b))
    )
    a, b = a - shift_a, b - shift_b
    weighted_a, weighted_b = weights[:, None] * a, weights[:, None] * b
    return Moments(
        count=moments.count + batch,
        shift_a=shift_a,
        shift_b=shift_b,
        sum_a=moments.sum_a + jnp.sum(weighted_a, axis=0),
        sum_b=moments.sum_b + jnp.sum(weighted_b, axis=0),
        square_a=moments.square_a + jnp.sum(weighted_a * a),
        square_b=moments.square_b + jnp.sum(weighted_b * b),
        cross=moments.cross + product(weighted_a.T, b),
        gram_a=None if moments.gram_a is None else moments.gram_a + product(weighted_a.T, a),
        gram_b=None if moments.gram_b is None else moments.gram_b + product(weighted_b.T, b),
    )


def means(moments: Moments) -> tuple[Array, Array]:
    """The mean row of A, ``[d_a]``, and of B, ``[d_b]``; zeros where there are no rows.

    >>> import jax.numpy as jnp
    >>> rows = jnp.array([[1.0, 0.0], [3.0, 2.0]])
    >>> means(update(init(2, 2), rows, rows))[0].tolist()
    [2.0, 1.0]
    """
    count = jnp.where(moments.count > 0, moments.count, 1)
    return moments.shift_a + moments.sum_a / count, moments.shift_b + moments.sum_b / count


@partial(jax.jit, static_argnames=("center",))
def cross(moments: Moments, center: bool = False) -> Array:
    """The cross-moment ``sum w a b^T``, ``[d_a, d_b]``; about the means if `center`.

    >>> import jax.numpy as jnp
    >>> rows = jnp.array([[1.0, 0.0], [3.0, 2.0]])
    >>> cross(update(init(2, 2), rows, rows), center=True).tolist()
    [[2.0, 2.0], [2.0, 2.0]]
    """
    m = moments
    return _unshift(m.cross, m.count, m.sum_a, m.sum_b, m.shift_a, m.shift_b, center)


@partial(jax.jit, static_argnames=("center",))
def grams(moments: Moments, center: bool = False) -> tuple[Array, Array]:
    """The Gram matrices ``sum w a a^T`` and ``sum w b b^T``; about the means if `center`.

    Raises:
      ValueError: the moments were made without them.

    >>> import jax.numpy as jnp
    >>> rows = jnp.array([[1.0], [3.0]])
    >>> [g.tolist() for g in grams(update(init(1, 1, gram=True), rows, 2 * rows))]
    [[[10.0]], [[40.0]]]
    """
    m = moments
    if m.gram_a is None or m.gram_b is None:
        raise ValueError("these moments keep no Gram matrices: make them with init(..., gram=True)")
    return (
        _unshift(m.gram_a, m.count, m.sum_a, m.sum_a, m.shift_a, m.shift_a, center),
        _unshift(m.gram_b, m.count, m.sum_b, m.sum_b, m.shift_b, m.shift_b, center),
    )


@partial(jax.jit, static_argnames=("center",))
def energies(moments: Moments, center: bool = False) -> tuple[Array, Array]:
    """The squared Frobenius norms ``sum w |a|^2`` and ``sum w |b|^2``; about the means if `center`.

    >>> import jax.numpy as jnp
    >>> rows = jnp.array([[1.0], [3.0]])
    >>> [float(e) for e in energies(update(init(1, 1), rows, 2 * rows), center=True)]
    [2.0, 8.0]
    """
    m = moments

    def energy(square: Array, total: Array, shift: Array) -> Array:
        if center:
            return jnp.maximum(square - jnp.sum(total**2) / jnp.where(m.count > 0, m.count, 1), 0)
        return square + 2 * jnp.sum(shift * total) + m.count * jnp.sum(shift**2)

    return energy(m.square_a, m.sum_a, m.shift_a), energy(m.square_b, m.sum_b, m.shift_b)


@partial(jax.jit, static_argnames=("center",))
def augmented(moments: Moments, center: bool = False) -> Array:
    """The cross-moment of ``[a, 1]`` and ``[b, 1]``, ``[d_a + 1, d_b + 1]``.

    With ``y = [x, 1] [K; b]`` the moment of a linear layer's outputs is ``[K_A; b_A]^T M [K_B; b_B]``, M this matrix:
    the core of `tvjax.align.procrustes.polar_of_product`, between two `output_factor`. About the means a bias has no
    part in the outputs, so the last row and column are zero.

    >>> import jax.numpy as jnp
    >>> rows = jnp.array([[1.0], [3.0]])
    >>> augmented(update(init(1, 1), rows, rows)).tolist()
    [[10.0, 4.0], [4.0, 2.0]]
    """
    mean_a, mean_b = means(moments)
    return _border(cross(moments, center), moments.count, mean_a, mean_b, center)


def augmented_grams(moments: Moments, center: bool = False) -> tuple[Array, Array]:
    """The Gram matrices of ``[a, 1]`` and of ``[b, 1]``, as `augmented` is their cross-moment.

    Raises:
      ValueError: the moments were made without Gram matrices.

    >>> import jax.numpy as jnp
    >>> rows = jnp.array([[1.0], [3.0]])
    >>> augmented_grams(update(init(1, 1, gram=True), rows, rows))[0].tolist()
    [[10.0, 4.0], [4.0, 2.0]]
    """
    gram_a, gram_b = grams(moments, center)
    mean_a, mean_b = means(moments)
    return (
        _border(gram_a, moments.count, mean_a, mean_a, center),
        _border(gram_b, moments.count, mean_b, mean_b, center),
    )


def output_factor(kernel: Array, bias: Array | None = None) -> Array:
    """``F = [K; b]^T``, ``[d_out, d_in + 1]``, so that the outputs of a linear layer are ``[x, 1] F^T``.

    Args:
      kernel: K, ``[d_in, d_out]``.
      bias: b, ``[d_out]``; None: zero.

    >>> import jax.numpy as jnp
    >>> output_factor(jnp.array([[1.0, 2.0]]), jnp.array([3.0, 4.0])).tolist()
    [[1.0, 3.0], [2.0, 4.0]]
    """
    bias = jnp.zeros(kernel.shape[1], kernel.dtype) if bias is None else bias.astype(kernel.dtype)
    return jnp.concatenate([kernel.T, bias[:, None]], axis=1)


@partial(jax.jit, static_argnames=("center",))
def residual(
    moments: Moments,
    rotation: OrthogonalMap,
    center: bool = False,
    *,
    output_a: Array | None = None,
    output_b: Array | None = None,
) -> Array:
    """The relative residual ``||H_A R - H_B||_F / ||H_B||_F`` of a map, from the moments alone.

    ``||H_A R - H_B||^2 = ||H_A R||^2 - 2 tr(R^T C) + ||H_B||^2``. Without Gram matrices ``||H_A R||`` is taken as
    ``||H_A||``: an upper bound, and exact where R loses nothing of H_A (full rank with ``d_a <= d_b``; the same model).

    Args:
      moments: of the rows ``H_A`` and ``H_B``.
      rotation: R, ``[d_a, d_b]``.
      center: the rows are taken about their means.
      output_a: `output_factor` of a linear layer of A: the residual is then that of the two layers' outputs, and R maps
        these. Needs the Gram matrices of the inputs.
      output_b: the same of B; both or neither.

    Returns:
      A scalar, 0 where there are no rows; as accurate as a difference of squares, some ``sqrt(eps)``.

    Raises:
      ValueError: outputs without Gram matrices.

    >>> import jax.numpy as jnp
    >>> from tvjax.align.procrustes import polar
    >>> rows = jnp.array([[1.0, 0.0], [3.0, 2.0]])
    >>> m = update(init(2, 2), rows, rows[:, ::-1])
    >>> round(float(residual(m, polar(cross(m)))), 2)
    0.0
    """
    overlap, energy_a, energy_b = _overlap(moments, rotation, center, output_a, output_b, mapped=True)
    rest = jnp.maximum(energy_a - 2 * overlap + energy_b, 0)
    return jnp.sqrt(rest / jnp.where(energy_b > 0, energy_b, 1))


@partial(jax.jit, static_argnames=("center",))
def similarity(
    moments: Moments,
    rotation: OrthogonalMap,
    center: bool = False,
    *,
    output_a: Array | None = None,
    output_b: Array | None = None,
) -> Array:
    """The Procrustes similarity ``tr(R^T C) / (||H_A||_F ||H_B||_F)``, in [-1, 1].

    1 says that R turns H_A into H_B up to one scale; it does not see the models' scales, needs no Gram matrix (unless
    for outputs), and counts what a truncated map leaves out (Williams et al., NeurIPS 2021, arXiv 2110.14739).

    Args:
      moments: as in `residual`.
      rotation: as in `residual`.
      center: as in `residual`.
      output_a: as in `residual`.
      output_b: as in `residual`.

    Returns:
      A scalar, 0 where there are no rows.

    Raises:
      ValueError: outputs without Gram matrices.

    >>> import jax.numpy as jnp
    >>> from tvjax.align.procrustes import polar
    >>> rows = jnp.array([[1.0, 0.0], [3.0, 2.0]])
    >>> m = update(init(2, 2), rows, 5 * rows)
    >>> round(float(similarity(m, polar(cross(m)))), 3)
    1.0
    """
    overlap, energy_a, energy_b = _overlap(moments, rotation, center, output_a, output_b, mapped=False)
    norms = jnp.sqrt(energy_a) * jnp.sqrt(energy_b)
    return jnp.where(norms > 0, overlap / jnp.where(norms > 0, norms, 1), 0)


def _overlap(
    moments: Moments,
    rotation: OrthogonalMap,
    center: bool,
    output_a: Array | None,
    output_b: Array | None,
    mapped: bool,
) -> tuple[Array, Array, Array]:
    """``tr(R^T C)``, ``||H_A R||^2`` (`mapped`) or ``||H_A||^2``, and ``||H_B||^2``."""
    if (output_a is None) != (output_b is None):
        raise ValueError("output_a and output_b go together: give both layers' output_factor, or neither")
    left, right = wide(rotation.left.T), wide(rotation.right)
    if output_a is None or output_b is None:
        overlap = jnp.sum(product(left, cross(moments, center)) * right)
        energy_a, energy_b = energies(moments, center)
        if mapped and moments.gram_a is not None:
            energy_a = _quadratic(left, grams(moments, center)[0])
        return overlap, energy_a, energy_b
    gram_a, gram_b = augmented_grams(moments, center)
    left_a = product(left, output_a)
    overlap = jnp.sum(product(left_a, augmented(moments, center)) * product(right, output_b))
    return overlap, _quadratic(left_a if mapped else output_a, gram_a), _quadratic(output_b, gram_b)


def _quadratic(rows: Array, gram: Array) -> Array:
    """``tr(X G X^T)``."""
    return jnp.sum(product(rows, gram) * rows.astype(gram.dtype))


def _large_means(rows: Array, weights: Array, count: Array) -> Array:
    """The means of the features whose mean is larger than their deviation, 0 of the others."""
    count = jnp.where(count > 0, count, 1)
    mean = weights @ rows / count
    variance = weights @ jnp.square(rows - mean) / count
    return jnp.where(jnp.square(mean) > variance, mean, 0)


def _unshift(
    moment: Array, count: Array, sum_a: Array, sum_b: Array, shift_a: Array, shift_b: Array, center: bool
) -> Array:
    if center:
        return moment - jnp.outer(sum_a, sum_b) / jnp.where(count > 0, count, 1)
    return moment + jnp.outer(shift_a, sum_b + count * shift_b) + jnp.outer(sum_a, shift_b)


def _border(moment: Array, count: Array, mean_a: Array, mean_b: Array, center: bool) -> Array:
    if center:
        return jnp.pad(moment, ((0, 1), (0, 1)))
    return jnp.block([[moment, count * mean_a[:, None]], [count * mean_b[None], count[None, None]]])
