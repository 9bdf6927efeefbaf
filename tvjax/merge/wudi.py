"""WUDI: merging without data or hyperparameters (Cheng et al., ICML 2025, arXiv 2503.08099)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tvjax.align.products import product
from tvjax.merge.base import PyTree, over_meshes
from tvjax.merge.leaf_report import Report
from tvjax.merge.matrices import BATCH_BYTES, Others, merge_matrices, total
from tvjax.merge.settings import Settings
from tvjax.merge.spectral import one_by_one, solve
from tvjax.merge.views import Matrices

Solver = Literal["closed", "adam"]


@over_meshes
def wudi(
    taus: Sequence[PyTree],
    *,
    solver: Solver = "closed",
    ridge: float = 1e-5,
    steps: int = 300,
    learning_rate: float = 1e-5,
    weights: Settings = 1.0,
    matrices: Matrices = None,
    others: Others = "average",
    batch_bytes: int = BATCH_BYTES,
    report: Report | None = None,
) -> PyTree:
    """The update that differs from each task vector least where that task's inputs lie.

    A task vector's columns span the inputs that made it, so ``L(tau) = sum_i ||tau_i^T (tau - tau_i)||^2 /
    ||tau_i||^2`` stands for the interference on the data (equation 9, in Flax orientation). With ``H = sum_i tau_i
    tau_i^T / ||tau_i||^2`` and the sum ``S = sum_i tau_i``,

    - ``"closed"``: ``tau = S + (H + ridge ||H|| I)^-1 sum_i tau_i tau_i^T (tau_i - S) / ||tau_i||^2``, the minimiser of
      ``L(tau) + ridge ||H|| ||tau - S||^2``; without a ridge ``H^-1 sum_i tau_i tau_i^T tau_i / ||tau_i||^2``. It is
      solved in the smaller of the input space and the columns of all tasks.
    - ``"adam"``: Adam on L from S, as published.

    Args:
      taus: task vectors of one base.
      solver: ``"closed"`` or ``"adam"``.
      ridge: relative to the Frobenius norm of H; pulls towards S, where the published Adam starts.
      steps: of Adam.
      learning_rate: of Adam; absolute, for task vectors of CLIP's size.
      weights: a task vector is multiplied by its weight; a number, by path pattern or by depth, or a list of these.
      matrices: how leaves are matrices: the letters of their axes by path pattern, ``{"**/kernel": "lio"}``, as by
        `tvjax.merge.matrix_views`; or path patterns of the matrices; None: all of two axes (`tvjax.merge.views`).
      others: of the other leaves, ``"average"`` (``1/T sum_i w_i tau_i``), ``"weighted_average"`` (``sum_i w_i tau_i /
        sum_i w_i``) or ``"zero"``.
      batch_bytes: as in `tvjax.merge.matrices.merge_matrices`.
      report: called for each leaf (`tvjax.merge.leaf_report.MergedLeaf`).

    Returns:
      The merged task vector, float32, on the scale of a sum.

    Raises:
      ValueError: vectors that do not fit together, or an option out of range.

    >>> one, two = {"kernel": jnp.array([[2.0], [0.0]])}, {"kernel": jnp.array([[0.0], [3.0]])}
    >>> import numpy as np
    >>> print(np.asarray(wudi([one, two])["kernel"]).round(3).T)
    [[2. 3.]]
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {get_args(Solver)}, found {solver!r}")
    if ridge < 0 or steps < 0 or learning_rate <= 0:
        raise ValueError(
            f"ridge and steps must be 0 or more and learning_rate positive, found {ridge}, {steps}, {learning_rate}"
        )
    rule = _Closed(ridge) if solver == "closed" else _Adam(steps, learning_rate)
    return merge_matrices(
        rule, taus, weights=weights, matrices=matrices, others=others, batch_bytes=batch_bytes, report=report
    )


@dataclasses.dataclass(frozen=True)
class _Closed:
    ridge: float

    def __call__(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        return one_by_one(self._solve)(matrices)

    def _solve(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        tasks, inputs, outputs = matrices.shape
        start, units = total(matrices), _units(matrices)
        pulls = product(units.mT, matrices - start)
        columns = jnp.concatenate(list(units), axis=1)
        if inputs <= tasks * outputs:
            space = product(columns, columns.T)
            return start + solve(self._ridged(space), total(product(units, pulls)))
        # (A A^T + c I)^-1 A = A (A^T A + c I)^-1
        space = product(columns.T, columns)
        return start + product(columns, solve(self._ridged(space), pulls.reshape(tasks * outputs, outputs)))

    def _ridged(self, space: Float[Array, "n n"]) -> Float[Array, "n n"]:
        return space + self.ridge * jnp.linalg.norm(space) * jnp.eye(space.shape[0])


@dataclasses.dataclass(frozen=True)
class _Adam:
    steps: int
    learning_rate: float

    def __call__(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        return one_by_one(self._descend)(matrices)

    def _descend(self, matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "inputs outputs"]:
        units = _units(matrices)
        targets = product(units.mT, matrices)
        optimiser = optax.adam(self.learning_rate)
        start = total(matrices)

        def step(_: Array, carry: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
            merged, state = carry
            gradient = 2 * total(product(units, product(units.mT, merged) - targets))
            with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its integer count of steps
                change, state = optimiser.update(gradient, state)
            return merged + change, state

        return jax.lax.fori_loop(0, self.steps, step, (start, optimiser.init(start)))[0]


def _units(matrices: Float[Array, "vectors inputs outputs"]) -> Float[Array, "vectors inputs outputs"]:
    """The matrices at a Frobenius norm of one; zeros stay zero."""
    largest = jnp.max(jnp.abs(matrices), axis=(1, 2), keepdims=True, initial=0.0)
    matrices = matrices / jnp.where(largest > 0, largest, 1)
    norms = jnp.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    return matrices / jnp.where(norms > 0, norms, 1)
