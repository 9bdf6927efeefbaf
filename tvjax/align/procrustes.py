"""Orthogonal Procrustes: the partial isometry that turns one activation space into another.

Stream ``H_A [n, d_a]`` and ``H_B [n, d_b]`` see the same tokens. With the cross-moment ``C = H_A^T H_B = U S V^T`` the
map is the polar factor ``R = U V^T [d_a, d_b]``: it maximises ``tr(R^T C)`` among partial isometries, and minimises
``||H_A R - H_B||_F`` when it is full rank and ``d_a <= d_b`` (Schoenemann, Psychometrika 1966; section 3 of Theseus,
arXiv 2602.12952).

Where C has a rank below ``min(d_a, d_b)``, and that is the normal case, the data determine R only between the row and
the column space of C. A thin SVD completes R there with rounding noise. Here the map is zero outside what the data
determine unless another completion is asked for, and it never leaves its factored form.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from functools import partial, reduce
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from tvjax.align.decompositions import eigh, qr, range_basis, singular_values, svd
from tvjax.align.polar_iteration import polar_factor
from tvjax.align.products import product, wide

Completion = Literal["zero", "thin", "eye"]
Method = Literal["svd", "polar", "randomised"]

_OVERSAMPLING = 16
_POWER_ITERATIONS = 1


class OrthogonalMap(NamedTuple):
    """A partial isometry ``R = left @ right`` in factored form.

    Attributes:
      left: ``[d_a, k]``; its columns are orthogonal, of length 1, or 0 where they were masked, or between the two at
        the edge of what is determined (`default_rank_tolerance`). Under ``method="polar"`` R itself, or the identity.
      right: ``[k, d_b]``; its rows are orthonormal, or zero where they were masked; the identity, or R.
      rank: int32 scalar, the directions that the moment determines: its singular values above the tolerance, k at most.
    """

    left: Array
    right: Array
    rank: Array


def matrix(rotation: OrthogonalMap) -> Array:
    """The dense map ``R = left @ right``, ``[d_a, d_b]``.

    >>> import jax.numpy as jnp
    >>> matrix(polar(jnp.diag(jnp.array([-3.0, 2.0])))).tolist()
    [[-1.0, 0.0], [0.0, 1.0]]
    """
    return product(rotation.left, rotation.right)


@partial(jax.jit, inline=True)
def apply_left(rotation: OrthogonalMap, kernel: Array) -> Array:
    """``R^T K`` for ``K [d_a, ...]``: the input side of a kernel, moved to the target's coordinates.

    Args:
      rotation: the map, ``[d_a, d_b]``.
      kernel: ``[d_a]`` or ``[d_a, d_out]``.

    Returns:
      ``[d_b]`` or ``[d_b, d_out]``, float32 or wider.

    >>> import jax.numpy as jnp
    >>> apply_left(polar(jnp.array([[0.0, 2.0], [2.0, 0.0]])), jnp.array([5.0, 7.0])).tolist()
    [7.0, 5.0]
    """
    return product(rotation.right.T, product(rotation.left.T, kernel))


@partial(jax.jit, inline=True)
def apply_right(kernel: Array, rotation: OrthogonalMap) -> Array:
    """``K R`` for ``K [..., d_a]``: the output side of a kernel, or a bias, moved to the target's coordinates.

    Args:
      kernel: ``[..., d_a]``.
      rotation: the map, ``[d_a, d_b]``.

    Returns:
      ``[..., d_b]``, float32 or wider.

    >>> import jax.numpy as jnp
    >>> apply_right(jnp.array([5.0, 7.0]), polar(jnp.array([[0.0, 2.0], [2.0, 0.0]]))).tolist()
    [7.0, 5.0]
    """
    return product(product(kernel, rotation.left), rotation.right)


def default_rank_tolerance(dtype: jnp.dtype = jnp.float32) -> float:
    """The ratio to the largest singular value under which a singular value is not told from rounding: ``16 eps``.

    What rounding makes of a singular value that is zero does not grow with the size: 1 to 2 eps times the largest by
    the decomposition (48 to 1024 dimensions), 0.3 to 2 by the sums of moments of activations and gradients, 5 where
    100 000 rows are summed in one product. A direction is turned by about (noise / its singular value): from 8 eps on
    some 2 % of it is noise (at most 10 % of any on the embedded models), far less inside. A tolerance that grows with
    the dimensions (``max(d_a, d_b) eps`` is customary) drops real directions of uncentred activations, whose first
    singular value is that of the mean.

    No spectrum has a gap just there, so the cut is soft (`polar`): rounding shifts a direction at the edge by its own
    size, and cannot switch it on or off. On the embedded models another order of the examples moves task vectors by
    0.1 % of their norm as a rule (1 % at most), and by less than 0.1 % with ``method="polar"``.

    >>> f"{default_rank_tolerance():.1e}"
    '1.9e-06'
    """
    return 16 * float(jnp.finfo(dtype).eps)


@partial(jax.jit, static_argnames=("complete", "rank", "method"))
def polar(
    moment: Array,
    *,
    complete: Completion = "zero",
    rank_tolerance: float | None = None,
    rank: int | float | None = None,
    method: Method = "svd",
    key: Array | None = None,
) -> OrthogonalMap:
    """The polar factor ``R = U_k V_k^T`` of a cross-moment ``C = U S V^T``.

    Args:
      moment: C, ``[d_a, d_b]``. Decomposed in float32, or in float64 if it comes so.
      complete: what R is where C does not determine it. ``"zero"``: zero. Directions whose singular value is above
        ``rank_tolerance * s_max`` take part, those below half of that do not, those between in proportion.
        ``"thin"``: whatever the decomposition returns, all of it (the published behaviour; rounding noise decides).
        ``"eye"``: the polar factor of ``C + rank_tolerance * s_max * I``, so that coordinate i goes to coordinate i.
      rank_tolerance: relative to the largest singular value; None: `default_rank_tolerance`, eight times it for
        ``"eye"``, where the identity must outweigh the rounding and not only be told from it.
      rank: keep only this many leading directions (int), or this fraction of ``min(d_a, d_b)`` (float in (0, 1]).
      method: ``"svd"``: exact. ``"polar"``: as exact, with less rounding in small directions beside large ones, by some
        45 products and no decomposition (`tvjax.align.polar_iteration`): for devices on which products are fast; two
        to three times as slow on a CPU. It knows the whole map alone: ``complete="zero"``, no `rank`.
        ``"randomised"``: randomised SVD with one power iteration (Halko et al. 2011, algorithm 4.4, with LU in
        between); needs `rank`, accurate where the spectrum decays; exact where `rank` is nearly all.
      key: of the randomised sketch; None: ``jax.random.key(0)``.

    Returns:
      The rotation, ``k = rank`` or ``min(d_a, d_b)``. A moment of zeros gives rank 0 and, with ``"zero"``, the zero
      map.

    Raises:
      ValueError: an unknown option, a moment that is no matrix, a rank out of range.

    >>> import jax.numpy as jnp
    >>> rotation = polar(jnp.array([[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]))
    >>> int(rotation.rank), abs(matrix(rotation)).tolist()
    (1, [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    """
    check_options(complete, method, rank)
    if moment.ndim != 2:
        raise ValueError(f"the moment must be a matrix [d_a, d_b], found shape {moment.shape}: sum over the rows first")
    moment = wide(moment)
    k = _directions(rank, min(moment.shape))
    if rank_tolerance is None:
        rank_tolerance = (8 if complete == "eye" else 1) * default_rank_tolerance(moment.dtype)
    if method == "polar":
        return _iterated(moment, rank_tolerance)
    if complete == "eye":
        values = singular_values(moment)
        shifted = moment + rank_tolerance * values[0] * jnp.eye(moment.shape[0], moment.shape[1], dtype=moment.dtype)
        left, _, right = decompose(shifted, k, method, key)
        values = values[:k]
    else:
        left, values, right = decompose(moment, k, method, key)
    edge = rank_tolerance * jnp.max(values)
    return (
        _determined(left, values, right, edge)
        if complete == "zero"
        else OrthogonalMap(left, right, _count(values, edge))
    )


def _iterated(moment: Array, rank_tolerance: float | Array) -> OrthogonalMap:
    """The rotation without a decomposition; its cut is in the middle of the soft edge of `_determined`."""
    edge = jnp.maximum(jnp.asarray(rank_tolerance, moment.dtype), jnp.finfo(moment.dtype).eps)
    whole = polar_factor(moment, 0.75 * edge)
    rank = jnp.round(jnp.sum(jnp.square(whole))).astype(jnp.int32)
    if moment.shape[0] < moment.shape[1]:
        return OrthogonalMap(jnp.eye(moment.shape[0], dtype=whole.dtype), whole, rank)
    return OrthogonalMap(whole, jnp.eye(moment.shape[1], dtype=whole.dtype), rank)


def _determined(left: Array, values: Array, right: Array, edge: Array) -> OrthogonalMap:
    """The rotation of those singular directions that are determined: all above the edge, none below half of it."""
    above = jnp.where(edge > 0, 2 * values / jnp.where(edge > 0, edge, 1) - 1, jnp.sign(values))
    shares = jnp.clip(above, 0, 1)
    return OrthogonalMap(left * shares, jnp.where(shares[:, None] > 0, right, 0), _count(values, edge))


def _count(values: Array, edge: Array) -> Array:
    return jnp.sum(values > edge, dtype=jnp.int32)


@partial(jax.jit, static_argnames=("complete", "rank", "method"))
def polar_of_product(
    p: Array,
    core: Array | None,
    q: Array,
    *,
    complete: Completion = "zero",
    rank_tolerance: float | None = None,
    rank: int | float | None = None,
    method: Method = "svd",
    key: Array | None = None,
) -> OrthogonalMap:
    """`polar` of ``C = P M Q^T`` without forming C: a QR of each tall side and the decomposition of the small core.

    ``P = Q_P R_P`` and ``Q = Q_Q R_Q`` give ``C = Q_P (R_P M R_Q^T) Q_Q^T``, so the polar factor of the bracket,
    between the two bases, is that of C, exactly. Two uses: fewer rows than dimensions (``P = H_A^T``, ``Q = H_B^T``,
    no core), and the outputs of linear layers, ``y = [x, 1] [K; b]``, whose moment is ``[K_A; b_A]^T M [K_B; b_B]``
    with M the moment of ``[x, 1]`` (`tvjax.align.moments.augmented`, `tvjax.align.moments.output_factor`).

    A side that is not tall is left as it is; a randomised decomposition multiplies its sketch with one factor after
    another; and ``"thin"`` and ``"eye"``, which speak of directions outside the product, form C.

    Args:
      p: ``[d_a, a]``.
      core: M, ``[a, b]``; None: the identity, ``a = b``.
      q: ``[d_b, b]``.
      complete: as in `polar`.
      rank_tolerance: as in `polar`.
      rank: as in `polar`; a fraction is one of ``min(d_a, d_b)``.
      method: as in `polar`, for the core.
      key: as in `polar`.

    Returns:
      The rotation ``[d_a, d_b]`` with ``k <= min(d_a, d_b, a, b)`` directions under ``"zero"``.

    Raises:
      ValueError: shapes that do not chain, or as in `polar`.

    >>> import jax.numpy as jnp
    >>> h_a, h_b = jnp.array([[2.0, 0.0, 0.0]]), jnp.array([[0.0, 3.0]])
    >>> abs(matrix(polar_of_product(h_a.T, None, h_b.T))).tolist()
    [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    """
    check_options(complete, method, rank)
    inner = (p.shape[1], q.shape[1]) if p.ndim == q.ndim == 2 else None
    if inner is None or (core.shape != inner if core is not None else inner[0] != inner[1]):
        raise ValueError(
            f"p [d_a, a], core [a, b] and q [d_b, b] must chain, found p {p.shape}, "
            f"core {None if core is None else core.shape}, q {q.shape}"
        )
    tall_p, tall_q = p.shape[0] > p.shape[1], q.shape[0] > q.shape[1]
    if complete != "zero":
        tall_p = tall_q = False
    p, q = wide(p), wide(q)
    k = _directions(rank, min(p.shape[0], q.shape[0]))
    if complete == "zero" and _is_sketched(method, k, *p.shape, *q.shape):
        left, values, right = _randomised_svd([p, q.T] if core is None else [p, core, q.T], k, key)
        tolerance = default_rank_tolerance(values.dtype) if rank_tolerance is None else rank_tolerance
        return _determined(left, values, right, tolerance * jnp.max(values))
    basis_p, p = qr(p) if tall_p else (None, p)
    basis_q, q = qr(q) if tall_q else (None, q)
    small = product(p if core is None else product(p, core), q.T)
    rank = None if rank is None else min(k, *small.shape)
    rotation = polar(small, complete=complete, rank_tolerance=rank_tolerance, rank=rank, method=method, key=key)
    return OrthogonalMap(
        rotation.left if basis_p is None else product(basis_p, rotation.left),
        rotation.right if basis_q is None else product(rotation.right, basis_q.T),
        rotation.rank,
    )


@partial(jax.jit, static_argnames=("power",))
def whiten(moment: Array, gram_a: Array, gram_b: Array, power: float, floor: float = 1e-4) -> Array:
    """``G_A^-w C G_B^-w``, the moment of partly whitened rows; w = 0 changes nothing, w = 1/2 whitens.

    Eigenvalues are raised to `floor` times the largest. Those that are zero up to rounding (`default_rank_tolerance`)
    are directions in which the rows do not move: their part of C is noise, and it is dropped, not amplified.

    Args:
      moment: C, ``[d_a, d_b]``.
      gram_a: ``H_A^T H_A``, ``[d_a, d_a]``, centred if and only if the moment is.
      gram_b: ``H_B^T H_B``, ``[d_b, d_b]``.
      power: w in [0, 0.5].
      floor: relative to the largest eigenvalue of each Gram matrix.

    Returns:
      ``[d_a, d_b]``.

    Raises:
      ValueError: a power out of range, or shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> whiten(jnp.diag(jnp.array([8.0, 1.0])), jnp.diag(jnp.array([16.0, 1.0])), jnp.eye(2), 0.5).tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    if not 0 <= power <= 0.5:
        raise ValueError(f"power must lie in [0, 0.5], found {power}: 0 is no whitening, 0.5 the whole")
    if (gram_a.shape, gram_b.shape) != ((moment.shape[0],) * 2, (moment.shape[1],) * 2):
        raise ValueError(
            f"a moment {moment.shape} needs Gram matrices {(moment.shape[0],) * 2} and {(moment.shape[1],) * 2}, "
            f"found {gram_a.shape} and {gram_b.shape}"
        )
    if power == 0:
        return wide(moment)
    return product(product(_inverse_power(gram_a, power, floor), moment), _inverse_power(gram_b, power, floor))


def _inverse_power(gram: Array, power: float, floor: float) -> Array:
    values, vectors = eigh(wide(gram))
    largest = values[-1]
    moves = values > default_rank_tolerance(values.dtype) * largest
    raised = jnp.where(moves, jnp.maximum(values, floor * largest), 1)
    return product(vectors * jnp.where(moves, raised**-power, 0), vectors.T)


def decompose(moment: Array, k: int, method: Method, key: Array | None) -> tuple[Array, Array, Array]:
    """The k leading singular triplets: ``[d_a, k]``, ``[k]`` descending, ``[k, d_b]``."""
    if _is_sketched(method, k, *moment.shape):
        left, values, right = _randomised_svd([moment], k, key)
    else:
        left, values, right = svd(moment)
    return left[:, :k], values[:k], right[:k]


def _randomised_svd(factors: Sequence[Array], k: int, key: Array | None) -> tuple[Array, Array, Array]:
    """The k leading singular triplets of the product of the factors, which is never formed."""
    key = jax.random.key(0) if key is None else key
    transposed = [factor.T for factor in reversed(factors)]
    sketch = jax.random.normal(key, (factors[-1].shape[1], k + _OVERSAMPLING), factors[0].dtype)
    basis = _product(*factors, sketch)
    for _ in range(_POWER_ITERATIONS):
        basis = _product(*transposed, range_basis(basis))
        basis = _product(*factors, range_basis(basis))
    basis = qr(basis)[0]
    right, triangle = qr(_product(*transposed, basis))
    left, values, core = svd(triangle.T)
    return product(basis, left[:, :k]), values[:k], product(core[:k], right.T)


def _product(*factors: Array) -> Array:
    """The product of matrices, from the right."""
    return reduce(lambda right, left: product(left, right), reversed(factors))


def _is_sketched(method: Method, k: int, *dimensions: int) -> bool:
    """Whether a sketch of k directions is smaller than the matrix; else an exact decomposition is no dearer."""
    return method == "randomised" and k + _OVERSAMPLING < min(dimensions)


def _directions(rank: int | float | None, limit: int) -> int:
    if rank is None:
        return limit
    return min(limit, int(rank)) if isinstance(rank, numbers.Integral) else max(1, round(rank * limit))


def check_options(complete: Completion, method: Method, rank: int | float | None) -> None:
    """Raises a ValueError for an option of `polar` that does not exist or is out of range."""
    if str(method) == "gram":
        raise ValueError(
            'method="gram" is withdrawn: it lost up to half of the directions of moments whose spectrum decays; '
            'use "svd", "polar" (by products alone), or "randomised" with a rank'
        )
    for name, value, options in (("complete", complete, get_args(Completion)), ("method", method, get_args(Method))):
        if value not in options:
            raise ValueError(f"{name} must be one of {options}, found {value!r}")
    if method == "polar" and (complete != "zero" or rank is not None):
        raise ValueError(
            f'method="polar" finds the whole map without its directions: it takes complete="zero" and no rank, '
            f'found complete={complete!r}, rank={rank}; use method="svd"'
        )
    if rank is None:
        if method == "randomised":
            raise ValueError('method="randomised" needs rank: a number of directions, or a fraction such as 0.25')
    elif isinstance(rank, int) and rank < 1 or isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"rank must be a number of directions (int, 1 or more) or a fraction in (0, 1], found {rank}")
