"""SVC: shrinks the singular values that several tasks count, after any merge (Li et al., 2026, arXiv 2602.05536)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax import tree
from tvjax.align.decompositions import svd
from tvjax.align.procrustes import default_rank_tolerance
from tvjax.align.products import product
from tvjax.merge.base import PyTree, Vectors, over_meshes
from tvjax.merge.knots import Merge
from tvjax.merge.leaf_report import MergedLeaf, Report
from tvjax.merge.matrices import BATCH_BYTES, merge_matrices, total
from tvjax.merge.spectral import one_by_one
from tvjax.merge.task_arithmetic import task_arithmetic
from tvjax.merge.views import Matrices, leaf_axes


@over_meshes
def svc(
    taus: Sequence[PyTree],
    merge: Merge = task_arithmetic,
    *,
    floor: float | None = None,
    matrices: Matrices = None,
    batch_bytes: int = BATCH_BYTES,
    report: Report | None = None,
) -> PyTree:
    """What a merge made of the matrices, each singular value times ``T / sum_i max(floor, s_i)``.

    Tasks that share a direction add up in it, and outweigh what each has alone. With the merged matrix ``M = U S V^T``
    and a direction v of its outputs, task i answers ``a_i = tau_i v`` and the merged matrix ``M v``;
    ``s_i = <M v, a_i> / |a_i|^2`` is how many times over task i finds itself there. The factor is
    the harmonic mean of the scales ``1 / s_i`` at which each would find itself once. Directions stay as they are, and
    so do leaves that are no matrices. A factor of the merged vector changes nothing above the floor.

    Args:
      taus: T task vectors of one base.
      merge: any merge of task vectors, such as ``partial(ties, density=0.2)``.
      floor: the paper's alpha, in (0, 1]; None: ``1 / T``, its default without data. 1 never enlarges a singular value
        (its choice after TSV-M).
      matrices: how leaves are matrices: the letters of their axes by path pattern, ``{"**/kernel": "lio"}``, as by
        `tvjax.merge.matrix_views`; or path patterns of the matrices; None: all of two axes (`tvjax.merge.views`).
      batch_bytes: as in `tvjax.merge.matrices.merge_matrices`.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32.

    Raises:
      ValueError: as the merge, or an option out of range.

    Source: the formula is that of the released code's later version; the first had the mean of the s_i where all are
    positive, and 1 elsewhere. Where singular values are equal (after `iso_c`: all of them), the directions are some of
    many, and the result depends on which. Deviation: a task whose answer is rounding beside its norm counts as s_i = 0;
    released, it is divided by at least 1e-12.

    >>> one, two = {"kernel": jnp.diag(jnp.array([4.0, 3.0, 0.0]))}, {"kernel": jnp.diag(jnp.array([4.0, 0.0, 2.0]))}
    >>> jnp.diagonal(svc([one, two], floor=1.0)["kernel"]).round(4).tolist()
    [4.0, 3.0, 2.0]
    """
    if floor is not None and not 0 < floor <= 1:
        raise ValueError(f"floor must lie in (0, 1], found {floor}")
    vectors = Vectors(taus)
    shapes = {path: vectors.shape(path) for path in vectors.paths}
    axes = leaf_axes(shapes, matrices)
    kernels = {path for path in vectors.paths if "i" in axes[path] and 0 not in shapes[path]}
    merged = merge(taus)

    def told(row: MergedLeaf) -> None:
        if report is not None:
            report(row._replace(rule=f"{row.rule}, calibrated" if row.path in kernels else "merged as it is"))

    calibrated = merge_matrices(
        _Calibrated(1 / len(vectors) if floor is None else floor),
        [*taus, merged],
        weights=1.0,
        matrices=matrices,
        others="zero",
        batch_bytes=batch_bytes,
        report=told,
    )
    found, before = tree.flatten(calibrated), tree.flatten(merged)
    return vectors.tree({path: (found if path in kernels else before)[path] for path in vectors.paths})


@dataclasses.dataclass(frozen=True)
class _Calibrated:
    """Of the matrices of the tasks and, last, the merged one."""

    floor: float

    def __call__(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        return one_by_one(self._calibrate)(matrices)

    def _calibrate(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        largest = jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True)  # squares of tiny entries would underflow
        matrices = matrices / jnp.where(largest > 0, largest, 1)
        tasks, merged = matrices[:-1], matrices[-1]
        _, _, directions = svd(merged)
        answer, answers = product(merged, directions.T), product(tasks, directions.T)
        squares = jnp.sum(answers**2, axis=1)
        rounding = default_rank_tolerance() * jnp.linalg.norm(tasks, axis=(1, 2))
        sound = squares > rounding[:, None] ** 2
        ratios = largest[-1] / jnp.where(largest[:-1, 0] > 0, largest[:-1, 0], 1)
        times = ratios * jnp.sum(answers * answer, axis=1) / jnp.where(sound, squares, 1)
        counted = total(jnp.maximum(jnp.where(sound, times, 0), self.floor))
        return largest[-1] * product(answer * (len(tasks) / counted), directions)
