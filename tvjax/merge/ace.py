"""ACE-Merging: RegMean whose covariances are read off the task vectors (Xu et al., CVPR 2026, arXiv 2603.02945)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tvjax.align.products import product
from tvjax.merge.base import PyTree, over_meshes
from tvjax.merge.leaf_report import Report
from tvjax.merge.matrices import BATCH_BYTES, Others, merge_matrices, total
from tvjax.merge.settings import Settings
from tvjax.merge.spectral import leading, one_by_one, solve
from tvjax.merge.views import Matrices

_UNLIKE = 0.3  # the published threshold of gamma
_TINY = np.float32(1e-12)


@over_meshes
def ace(
    taus: Sequence[PyTree],
    *,
    epsilon: float = 1e-5,
    share: float = 0.3,
    balance: bool | None = None,
    weights: Settings = 1.0,
    matrices: Matrices = None,
    others: Others = "average",
    batch_bytes: int = BATCH_BYTES,
    report: Report | None = None,
) -> PyTree:
    """``(sum_i G_i + c 1^T)^-1 sum_i G_i X_i``, with ``G_i = X_i X_i^T + epsilon I``: in closed form, without data.

    The outputs' columns of an update are draws of its inputs, so their covariance stands for that of the task's
    inputs. X_i is tau_i less its mean over the outputs, and c the mean row of ``sum_i X_i X_i^T``, which is added to
    every row of the sum: the prior that the tasks share.

    Where the sizes of the tasks are unlike, by ``gamma = var_i(log |tau_i|^2) / mean_i(log |tau_i|^2)^2 > 0.3``, the
    G_i are divided by ``tr X_i X_i^T`` and c by the mean of the ``|tau_i|^2``, and the spectrum is refined: with ``F =
    W + sum_i (C_i - mean_j G_j) X_i`` of the solution W, C_i being G_i without its ridge, the leading directions of F
    are added at their mean singular value, ``W + mean(S_k) U_k V_k^T``.

    Args:
      taus: task vectors of one base.
      epsilon: the ridge, in units of squared entries, as published: 1e-5 for CLIP, 2e-4 for RoBERTa-base, 4e-2 for
        GPT-2. A large one gives the average.
      share: k as a fraction of ``min(in, out)``.
      balance: whether the sizes are taken for unlike; None: by gamma, matrix by matrix. Gamma, too, depends on the unit
        of the entries.
      weights: a task vector is multiplied by its weight; a number, by path pattern or by depth, or a list of these.
      matrices: how leaves are matrices: the letters of their axes by path pattern, ``{"**/kernel": "lio"}``, as by
        `tvjax.merge.matrix_views`; or path patterns of the matrices; None: all of two axes (`tvjax.merge.views`).
      others: of the other leaves, ``"average"`` (``1/T sum_i w_i tau_i``), ``"weighted_average"`` (``sum_i w_i tau_i /
        sum_i w_i``) or ``"zero"``.
      batch_bytes: as in `tvjax.merge.matrices.merge_matrices`.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32, on the scale of an average. The prior shrinks it, most where all inputs move
      together: one task vector, or several equal ones, are not returned as they are.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    Source: the released code (its `epsilon` there: 1e-2), whose formula is tested; the paper itself could not be
    compared. By accounts of it, its W_i are not centred and its c is not divided. As in the code, the mean over the
    outputs is lost. Deviation: where the sum is singular, directions that it lacks are zero.

    >>> one, two = ({"kernel": jnp.array(x)} for x in ([[3.0, -3.0], [0.0, 0.0]], [[0.0, 0.0], [2.0, -2.0]]))
    >>> print(np.asarray(ace([one, two], epsilon=0.0)["kernel"]).round(3))
    [[ 1.75 -1.75]
     [ 0.75 -0.75]]
    """
    if not epsilon >= 0 or not 0 <= share <= 1:
        raise ValueError(f"epsilon must be 0 or more and share in [0, 1], found {epsilon} and {share}")
    return merge_matrices(
        _Estimated(epsilon, share, balance),
        taus,
        weights=weights,
        matrices=matrices,
        others=others,
        batch_bytes=batch_bytes,
        report=report,
    )


@dataclasses.dataclass(frozen=True)
class _Estimated:
    epsilon: float
    share: float
    balance: bool | None

    def __call__(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        return one_by_one(self._merge)(matrices)

    def _merge(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        energies = jnp.sum(matrices**2, axis=(1, 2))
        unlike = _unlike(energies) if self.balance is None else jnp.asarray(self.balance)
        centred = matrices - jnp.mean(matrices, axis=2, keepdims=True)
        sizes = jnp.where(unlike, jnp.sum(centred**2, axis=(1, 2)) + _TINY, 1)[:, None, None]
        covariances = product(centred, centred.mT) / sizes
        ridges = self.epsilon / sizes * jnp.eye(matrices.shape[1])
        seen = total(covariances + ridges)
        prior = jnp.mean(total(covariances), axis=0) / jnp.where(unlike, jnp.mean(energies) + _TINY, 1)
        # (S + c 1^T)^-1 by the inverse of S, which is symmetric
        pull = total(product(covariances + ridges, centred))
        columns = solve(seen, jnp.concatenate([pull, prior[:, None]], axis=1))
        found, shift = columns[:, :-1], columns[:, -1]
        found = found - shift[:, None] * (jnp.sum(found, axis=0) / (1 + jnp.sum(shift)))
        count = int(min(matrices.shape[1:]) * self.share)
        if count == 0 or self.balance is False:
            return found

        def refined() -> Array:
            rest = total(product(covariances - seen / len(matrices), centred))
            left, right = leading(found + rest, count)
            values = jnp.sum(product(left.T, found + rest) * right)
            return found + values / count * product(left, right)

        return jax.lax.cond(unlike, refined, lambda: found)


def _unlike(energies: Float[Array, " vectors"]) -> Bool[Array, ""]:
    if len(energies) < 2:
        return jnp.asarray(False)
    logs = jnp.log(energies + _TINY)
    return jnp.var(logs, ddof=1) > _UNLIKE * (jnp.mean(logs) ** 2 + _TINY)
