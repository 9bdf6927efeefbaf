"""TSV-M: merging by task singular vectors (Gargiulo et al., CVPR 2025, arXiv 2412.00081)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax.align.products import product
from tvjax.merge.base import PyTree, over_meshes
from tvjax.merge.leaf_report import Report
from tvjax.merge.matrices import BATCH_BYTES, Others, merge_matrices
from tvjax.merge.settings import Settings
from tvjax.merge.spectral import Method, check_method, leading, one_by_one, polar
from tvjax.merge.views import Matrices


@over_meshes
def tsv_m(
    taus: Sequence[PyTree],
    *,
    weights: Settings = 1.0,
    share: float | None = None,
    matrices: Matrices = None,
    others: Others = "average",
    method: Method = "gram",
    batch_bytes: int = BATCH_BYTES,
    report: Report | None = None,
) -> PyTree:
    """Keeps the leading singular triplets of each task, made orthogonal between the tasks.

    With ``tau_i = U_i S_i V_i^T`` cut to k triplets, ``U = [U_1 .. U_T]`` and ``V = [V_1 .. V_T]``, a matrix becomes
    ``polar(U) diag(S_1 .. S_T) polar(V)^T``, ``polar(X) = A B^T`` of the thin SVD ``X = A D B^T`` (algorithm 1 of the
    paper). It commutes with orthogonal changes of basis on either side.

    Args:
      taus: T task vectors of one base.
      weights: a task vector is multiplied by its weight; a number, by path pattern or by depth, or a list of these.
      share: k as a fraction of ``min(in, out)``; None: ``1 / T``. At least one triplet is kept.
      matrices: how leaves are matrices: the letters of their axes by path pattern, ``{"**/kernel": "lio"}``, as by
        `tvjax.merge.matrix_views`; or path patterns of the matrices; None: all of two axes (`tvjax.merge.views`).
      others: of the other leaves, ``"average"``, ``"weighted_average"`` (as published) or ``"zero"``; see `others` of
        `tvjax.merge.matrices.merge_matrices`. Without weights the first two are one.
      method: ``"gram"``, ``"svd"`` or ``"randomised"`` (`tvjax.merge.spectral`) for the k triplets; the polar factors
        are by ``"gram"`` unless it is ``"svd"``.
      batch_bytes: as in `tvjax.merge.matrices.merge_matrices`.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32, on the scale of a sum.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    Deviation: a task whose rank is below k, and directions that two tasks share exactly, leave singular vectors that
    nothing determines; the published code whitens them all the same, here they are left out. So equal task vectors
    give their own truncation back.

    >>> tau = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
    >>> jnp.diagonal(tsv_m([tau, tau])["kernel"]).round(4).tolist()
    [4.0, 3.0, 0.0, 0.0]
    """
    check_method(method)
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], found {share}: the fraction of the triplets that each task keeps")
    rule = _TaskSingularVectors(share, method)
    return merge_matrices(
        rule, taus, weights=weights, matrices=matrices, others=others, batch_bytes=batch_bytes, report=report
    )


@dataclasses.dataclass(frozen=True)
class _TaskSingularVectors:
    share: float | None
    method: Method

    def __call__(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        tasks, limit = matrices.shape[0], min(matrices.shape[1:])
        count = max(1, limit // tasks if self.share is None else int(limit * self.share))
        if tasks == 1 and count == limit:
            return matrices[0]
        lefts, rights = jax.vmap(lambda matrix: leading(matrix, count, self.method))(matrices)
        left, cores, right = _side_by_side(matrices, lefts, rights)
        method: Method = "svd" if self.method == "svd" else "gram"
        return _put_together(polar(left, method), cores, polar(right, method))


@one_by_one
def _side_by_side(
    matrices: Float[Array, "vectors m n"], lefts: Float[Array, "vectors m k"], rights: Float[Array, "vectors k n"]
) -> tuple[Float[Array, "m vectors*k"], Float[Array, "vectors k k"], Float[Array, "vectors*k n"]]:
    """All left bases, each task's matrix between its bases, and all right bases."""
    cores = product(product(lefts.mT, matrices), rights.mT)
    return jnp.concatenate(list(lefts), axis=1), cores, jnp.concatenate(list(rights), axis=0)


@one_by_one
def _put_together(
    left: Float[Array, "m vectors*k"], cores: Float[Array, "vectors k k"], right: Float[Array, "vectors*k n"]
) -> Float[Array, "m n"]:
    parts = jnp.split(left, len(cores), axis=1)
    scaled = [product(part, core) for part, core in zip(parts, cores, strict=True)]
    return product(jnp.concatenate(scaled, axis=1), right)
