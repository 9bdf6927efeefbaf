"""Few-shot fine-tuning that leans on task vectors: their coefficients and the leaves themselves, trained at once.

``theta = theta_0 + delta + sum_i Lambda_i tau_i``: a coefficient moves a whole block along what an earlier fine-tuning
learned, delta is free. From the best vector it did best, over one and two labels a class, of what was compared on the
embedded models (scripts/compare_few_shot.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tvjax import processes, tree
from tvjax.arithmetic import apply
from tvjax.compose.coefficients import Coefficients, combine, init
from tvjax.compose.edited import Edited
from tvjax.compose.objectives import Objective, check_objective, value
from tvjax.compose.train import Optimiser, Schedule, Trained, clipped_adamw, train
from tvjax.placement import automatic
from tvjax.progress import Progress, counted

PyTree = Any
SCALES = tuple(np.linspace(0, 5, 21).round(2).tolist())


class Tuned(NamedTuple):
    """What `tune` trains; a pytree.

    Attributes:
      coefficients: of the task vectors.
      leaves: by path, the leaves of theta_0 as they are trained, float32.
    """

    coefficients: Coefficients
    leaves: dict[str, Array]

    @automatic(lambda self, params, taus: params)
    def combine(self, params: PyTree, taus: Sequence[PyTree]) -> PyTree:
        """The parameters ``theta_0 + delta + sum_i Lambda_i tau_i`` in the stored dtypes of the parameters."""

        def stored(leaf: Array, new: Array) -> Array:
            return leaf if new is leaf else jnp.asarray(new).astype(jnp.asarray(leaf).dtype)

        return jax.tree.map(stored, params, combine(tree.replace(params, self.leaves), taus, self.coefficients))


@automatic(lambda *_, **__: ())
def tune(
    params: PyTree,
    taus: Sequence[PyTree],
    objective: Objective,
    *,
    key: Array,
    coefficients: Coefficients | None = None,
    leaves: Sequence[str] | None = None,
    share: float = 0.01,
    **options: Any,
) -> Trained:
    """Trains coefficients of task vectors and leaves of the model together.

    Coefficients as in `learn` (AdamW, weight decay 0.1, gradients clipped at 1); the leaves with Adam at `share` times
    the learning rate, so that the usual 0.1 of the one is 1e-3 for the other.

    Args:
      params: theta_0.
      taus: task vectors, in any floating dtype.
      objective: as for `learn`.
      key: a random key, for the order of the examples and for augmentation.
      coefficients: where to start, such as `best_start`; one for each leaf of each vector, all 0, by default.
      leaves: path patterns of the leaves to train; None: those that a task vector moves (an entry is not zero).
      share: learning rate of the leaves over that of the coefficients.
      **options: those of `train` but for the optimiser.

    Returns:
      The `Tuned` and how it was found; ``found.trainable.combine(params, taus)`` gives the parameters.

    Raises:
      ValueError: patterns that match nothing, leaves that are not floating, a share that is not positive, task vectors
        that do not fit, or as `train`.

    >>> from tvjax.compose import few_shot
    >>> from tvjax.stages import Batch, single_stage
    >>> model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.zeros((2, 2))}, loss=lambda _, logits, labels:
    ...     optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    >>> objective = few_shot(model, Batch(jnp.eye(2), jnp.arange(2)))
    >>> taus = [{"w": jnp.eye(2)}]
    >>> tuned = tune(model.params, taus, objective, key=jax.random.key(0), batch_size=2).trainable
    >>> bool(tuned.coefficients.values[0, 0, 0] > 0.5), bool(jnp.any(tuned.leaves["w"] != 0))
    (True, True)
    """
    tree.check_whole(params)
    processes.check_same("tune", {"parameters": params, "task vectors": taus, "leaves": leaves})
    if not share > 0:
        raise ValueError(f"share: found {share}, expected a positive number; `learn` trains coefficients alone")
    start = init(taus) if coefficients is None else coefficients
    jax.eval_shape(combine, params, list(taus), start)  # they fit, or it says what does not
    flat = tree.flatten(params)
    if leaves is None:
        chosen = sorted({path for tau in taus for path, leaf in tree.flatten(tau).items() if _moves(leaf)})
    else:
        chosen = sorted({path for pattern in leaves for path in tree.match(list(flat), pattern)})
    wrong = [path for path in chosen if path in flat and not jnp.issubdtype(flat[path].dtype, jnp.floating)]
    if wrong:
        raise ValueError(f"leaves: only floating-point leaves can be trained, found\n{tree.list_some(wrong)}")
    tuned = Tuned(start, {path: jnp.asarray(flat[path], jnp.float32) for path in chosen})
    return train(_assemble, (params, list(taus)), tuned, objective, key=key, optimiser=_optimiser(share), **options)


@automatic(lambda *_, **__: ())
def best_start(
    params: PyTree,
    taus: Sequence[PyTree],
    objective: Objective,
    *,
    key: Array,
    scales: Sequence[float] = SCALES,
    coefficients: Coefficients | None = None,
    progress: Progress | None = None,
) -> Coefficients:
    """Coefficients with ONE task vector at one scale, the pair of the least objective on all examples at once.

    Needs nothing but the training examples. Of ties the first vector and the smallest scale count.

    Args:
      params: theta_0.
      taus: task vectors.
      objective: what is to be small.
      key: a random key, for augmentation.
      scales: the grid.
      coefficients: whose layout is kept; `init` of the vectors by default.
      progress: called with (task vectors done, task vectors in all, ``"start"``).

    Returns:
      The coefficients of that vector at that scale, all others 0.

    Raises:
      ValueError: an empty grid, or task vectors that do not fit.

    >>> from tvjax.compose import of_loss
    >>> objective = of_loss(lambda params, batch: jnp.abs(params["w"] - batch), jnp.array([2.0]))
    >>> taus = [{"w": jnp.float32(-1)}, {"w": jnp.float32(1)}]
    >>> best_start({"w": jnp.float32(0)}, taus, objective, key=jax.random.key(0)).values.ravel().tolist()
    [0.0, 2.0]
    """
    tree.check_whole(params)
    check_objective(objective)
    facts = {"parameters": params, "task vectors": taus, "objective": objective, "key": key}
    processes.check_same("find the best start of", {**facts, "scales": scales})
    grid = sorted(float(scale) for scale in scales)
    if not grid:
        raise ValueError("scales: found none, expected one number at least")
    start = init(taus) if coefficients is None else coefficients
    jax.eval_shape(combine, params, list(taus), start)
    tried = counted(list(taus), progress, "start")
    found = np.array([[float(_objective_at(objective, params, tau, scale, key)) for scale in grid] for tau in tried])
    if np.isnan(found).all():
        raise ValueError("the objective is NaN at every scale: are the examples and the parameters finite?")
    vector, scale = np.unravel_index(np.nanargmin(found), found.shape)
    return dataclasses.replace(start, values=jnp.zeros_like(start.values).at[vector].set(grid[scale]))


@jax.jit
def _objective_at(
    objective: Objective, params: PyTree, tau: PyTree, scale: Float[Array, ""], key: Array
) -> Float[Array, ""]:
    return value(objective, apply(params, tau, scale), [term.examples for term in objective], key)


def _moves(leaf: Any) -> bool:
    return bool(jnp.any(leaf) if isinstance(leaf, jax.Array) else np.any(leaf))


def _assemble(fixed: tuple[PyTree, list[PyTree]], tuned: Tuned) -> Edited:
    params, taus = fixed
    return Edited(tree.replace(params, tuned.leaves), taus, tuned.coefficients)


@cache  # one object for each share, so that nothing is compiled twice
def _optimiser(share: float) -> Optimiser:
    return partial(_both, share)


def _both(share: float, learning_rate: Schedule) -> optax.GradientTransformation:
    parts = {"coefficients": clipped_adamw(learning_rate), "leaves": optax.adam(lambda n: share * learning_rate(n))}
    return optax.partition(parts, Tuned._make(parts))
