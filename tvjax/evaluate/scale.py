"""The scale of a task vector, chosen on validation data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from tvjax.arithmetic import apply
from tvjax.evaluate.accuracy import accuracy
from tvjax.stages import Batch, Model, PyTree


class ChosenScale(NamedTuple):
    """The best scale of a grid.

    Attributes:
      scale: the scale of the greatest accuracy, the smallest of those that tie.
      accuracy: its accuracy, from 0 to 1.
      scales: the grid, sorted.
      curve: accuracy at every scale of the grid.
    """

    scale: float
    accuracy: float
    scales: np.ndarray
    curve: np.ndarray


def choose_scale(model: Model, tau: PyTree, scales: Sequence[float], batches: Batch | Iterable[Batch]) -> ChosenScale:
    """The scale at which ``theta + scale * tau`` is most accurate; ties go to the smallest.

    Nothing is compiled anew from one scale to the next, only one edited model is alive at a time, and the batches are
    passed through once, so that they may come from a loader.

    Args:
      model: returns logits, or has a zero-shot head.
      tau: a task vector of its parameters.
      scales: the grid, such as 0 to 1 by 0.05.
      batches: labelled validation data.

    Returns:
      The scale, its accuracy and the whole curve.

    Raises:
      ValueError: for an empty grid, or values that are not finite.

    >>> import jax.numpy as jnp
    >>> from tvjax.stages import Stage
    >>> model = Model({"kernel": -jnp.eye(2)}, (Stage("head", lambda params, x: {"logits": x @ params["kernel"]}),))
    >>> chosen = choose_scale(model, {"kernel": jnp.eye(2)}, (0, 1, 2, 3), Batch(jnp.eye(2), jnp.arange(2)))
    >>> chosen.scale, chosen.curve.tolist()
    (2.0, [0.0, 0.5, 1.0, 1.0])
    """
    grid = np.unique(np.asarray(scales, np.float64))
    if not grid.size or not np.isfinite(grid).all():
        raise ValueError(f"scales: found {list(scales)}, expected at least one finite number")
    correct, total = np.zeros(len(grid), np.int64), 0
    for batch in [batches] if isinstance(batches, Batch) else batches:
        found = [accuracy(_edited(model, tau, float(scale)), batch) for scale in grid]
        correct += [one.correct for one in found]
        total += found[0].total
    if not total:
        raise ValueError("there are no examples to choose the scale on: give at least one batch")
    curve = correct / total
    best = int(curve.argmax())
    return ChosenScale(float(grid[best]), float(curve[best]), grid, curve)


@jax.jit
def _edited(model: Model, tau: PyTree, scale: float) -> Model:
    return model.replace(params=apply(model.params, tau, scale))
