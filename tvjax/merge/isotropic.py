"""Isotropic merging, Iso-C and Iso-CTS (Marczak et al., ICML 2025, arXiv 2502.04959)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax.align.procrustes import default_rank_tolerance
from tvjax.align.products import product
from tvjax.merge.base import PyTree, over_meshes
from tvjax.merge.leaf_report import Report
from tvjax.merge.matrices import BATCH_BYTES, Others, merge_matrices, total
from tvjax.merge.settings import Settings
from tvjax.merge.spectral import check_method, leading, one_by_one, polar
from tvjax.merge.views import Matrices

Method = Literal["gram", "svd"]
Side = Literal["input", "output"]


@over_meshes
def iso_c(
    taus: Sequence[PyTree],
    *,
    weights: Settings = 1.0,
    matrices: Matrices = None,
    others: Others = "average",
    method: Method = "gram",
    batch_bytes: int = BATCH_BYTES,
    report: Report | None = None,
) -> PyTree:
    """The sum of the task vectors with a flat spectrum: ``mean(S) U V^T`` of ``sum_i w_i tau_i = U S V^T``.

    It acts on the SUM, as published (section 4.1), so the result is on the scale of a sum.

    Args:
      taus: task vectors of one base.
      weights: of the sum; a number, by path pattern or by depth, or a list of these.
      matrices: how leaves are matrices: the letters of their axes by path pattern, ``{"**/kernel": "lio"}``, as by
        `tvjax.merge.matrix_views`; or path patterns of the matrices; None: all of two axes (`tvjax.merge.views`).
      others: of the other leaves, ``"average"`` (``1/T sum_i w_i tau_i``), ``"weighted_average"`` (``sum_i w_i tau_i /
        sum_i w_i``, as published) or ``"zero"``. Without weights the first two are one.
      method: ``"gram"`` or ``"svd"`` (`tvjax.merge.spectral`); all directions take part, so none is randomised.
      batch_bytes: as in `tvjax.merge.matrices.merge_matrices`.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: vectors that do not fit together, or an unknown option.

    Deviation: the published code gives the mean singular value also to directions that the sum does not have (their
    singular vectors are rounding); here those stay zero, and the mean is over the others.

    >>> tau = {"kernel": jnp.diag(jnp.array([3.0, -1.0]))}
    >>> iso_c([tau, tau])["kernel"].round(4).tolist()
    [[4.0, 0.0], [0.0, -4.0]]
    """
    check_method(method, get_args(Method))
    return merge_matrices(
        _Flat(method), taus, weights=weights, matrices=matrices, others=others, batch_bytes=batch_bytes, report=report
    )


@over_meshes
def iso_cts(
    taus: Sequence[PyTree],
    *,
    common: float = 0.8,
    side: Side = "output",
    weights: Settings = 1.0,
    matrices: Matrices = None,
    others: Others = "average",
    method: Method = "gram",
    batch_bytes: int = BATCH_BYTES,
    report: Report | None = None,
) -> PyTree:
    """A flat spectrum over the common directions of the sum and the own directions of each task.

    ``U_0 S_0 V_0^T`` are the leading triplets of the sum, a fraction `common` of ``min(in, out)``; the rest of the rank
    is shared out among the tasks, each with the leading triplets ``U_i S_i V_i^T`` of what its task vector has outside
    the common subspace, ``tau_i (I - V_0 V_0^T)``. A matrix becomes ``mean(S) polar([U_1 .. U_T, U_0])
    polar([V_1 .. V_T, V_0])^T`` (section 4.2; S all the singular values that were taken).

    Args:
      taus: T task vectors of one base.
      common: fraction of the rank for the common subspace, in (0, 1]; raised so that the rest divides by T.
      side: the side of the common subspace that is projected out. ``"output"``: as published, where a kernel is
        ``[out, in]`` and U lives in its outputs. ``"input"``: ``(I - U_0 U_0^T) tau_i``.
      weights: a task vector is multiplied by its weight; as in `iso_c`.
      matrices: as in `iso_c`.
      others: as in `iso_c`.
      method: as in `iso_c`.
      batch_bytes: as in `tvjax.merge.matrices.merge_matrices`.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32, on the scale of a sum.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    Deviation: directions that nothing determines stay zero, as in `iso_c`.

    >>> one, other = ({"kernel": jnp.diag(jnp.array(d))} for d in ([5.0, 0.0, 1.0, 0.0], [5.0, 0.0, 0.0, 3.0]))
    >>> import numpy as np
    >>> print(np.diagonal(iso_cts([one, other], common=0.5)["kernel"]).round(3))
    [4.667 0.    4.667 4.667]
    """
    check_method(method, get_args(Method))
    if not 0 < common <= 1:
        raise ValueError(f"common must lie in (0, 1], found {common}: the fraction of the rank that the tasks share")
    if side not in get_args(Side):
        raise ValueError(f"side must be one of {get_args(Side)}, found {side!r}")
    return merge_matrices(
        _CommonAndOwn(common, side, method),
        taus,
        weights=weights,
        matrices=matrices,
        others=others,
        batch_bytes=batch_bytes,
        report=report,
    )


@dataclasses.dataclass(frozen=True)
class _Flat:
    method: Method

    def __call__(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        added = total(matrices)
        return _flattened(added, polar(added, self.method))


@dataclasses.dataclass(frozen=True)
class _CommonAndOwn:
    common: float
    side: Side
    method: Method

    def __call__(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        tasks, limit = matrices.shape[0], min(matrices.shape[1:])
        own = round((limit - int(limit * self.common)) / tasks)
        added = total(matrices)
        if own * tasks >= limit:  # small matrices of many tasks: something common must remain
            own = (limit - 1) // tasks
        if own == 0:
            return _Flat(self.method)(matrices)
        largest = jnp.max(jnp.abs(matrices))
        size = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)  # squares of tiny entries would underflow
        matrices, added = matrices / size, added / size
        common = leading(added, limit - own * tasks, self.method)
        rest = _outside(self.side)(matrices, *common)
        bases = jax.vmap(lambda matrix: leading(matrix, own, self.method))(rest)
        value, left, right = _side_by_side(added, common, rest, _above_rounding(matrices, rest, *bases))
        return size * _scaled(value, polar(left, self.method), polar(right, self.method))


@one_by_one
def _flattened(matrix: Float[Array, "m n"], factor: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """A polar factor, times the mean singular value of its matrix."""
    return _mean(jnp.sum(factor * matrix), jnp.sum(factor**2)) * factor


@cache
def _outside(side: Side) -> Callable[..., Float[Array, "vectors m n"]]:
    """What of each matrix lies outside a common subspace on one side."""

    @one_by_one
    def rest(matrices: Array, left: Array, right: Array) -> Array:
        if side == "output":
            return matrices - product(product(matrices, right.T), right)
        return matrices - product(left, product(left.T, matrices))

    return rest


@one_by_one
def _above_rounding(
    matrices: Float[Array, "vectors m n"],
    rest: Float[Array, "vectors m n"],
    lefts: Float[Array, "vectors m j"],
    rights: Float[Array, "vectors j n"],
) -> tuple[Float[Array, "vectors m j"], Float[Array, "vectors j n"]]:
    """Bases without the directions in which what is left of a matrix is the rounding of the whole."""
    sizes = jnp.linalg.norm(product(lefts.mT, rest), axis=2)
    wholes = jnp.linalg.norm(matrices, axis=(1, 2))
    real = sizes > default_rank_tolerance() * wholes[:, None]
    return jnp.where(real[:, None, :], lefts, 0), jnp.where(real[:, :, None], rights, 0)


@one_by_one
def _side_by_side(
    added: Float[Array, "m n"],
    common: tuple[Float[Array, "m k"], Float[Array, "k n"]],
    rest: Float[Array, "vectors m n"],
    own: tuple[Float[Array, "vectors m j"], Float[Array, "vectors j n"]],
) -> tuple[Float[Array, ""], Float[Array, "m r"], Float[Array, "r n"]]:
    """The mean of the singular values over all bases, all left bases, and all right bases."""
    values = _trace(common[0], added, common[1]) + jnp.sum(jax.vmap(_trace)(own[0], rest, own[1]))
    mean = _mean(values, jnp.sum(common[0] ** 2) + jnp.sum(own[0] ** 2))
    return mean, jnp.concatenate([*own[0], common[0]], axis=1), jnp.concatenate([*own[1], common[1]], axis=0)


@one_by_one
def _scaled(value: Float[Array, ""], left: Float[Array, "m r"], right: Float[Array, "r n"]) -> Float[Array, "m n"]:
    return value * product(left, right)


def _trace(left: Float[Array, "m k"], matrix: Float[Array, "m n"], right: Float[Array, "k n"]) -> Float[Array, ""]:
    """The sum of the singular values over aligned leading directions."""
    return jnp.sum(product(left.T, matrix) * right)


def _mean(total: Float[Array, ""], count: Float[Array, ""]) -> Float[Array, ""]:
    """Of singular values, their number being a squared norm: a whole number up to rounding; 0 of none."""
    count = jnp.round(count)
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1), 0)
