"""Accuracy by the scale of a task vector, and the scale chosen on validation data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from tvjax.arithmetic import apply
from tvjax.evaluate.accuracy import Predictions, joined, of_batch
from tvjax.progress import Progress, counted
from tvjax.stages import Batch, Model, ModelLike, PyTree, check_model


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


def choose_scale(
    model: Model,
    tau: PyTree,
    scales: Sequence[float],
    batches: Batch | Iterable[Batch],
    progress: Progress | None = None,
) -> ChosenScale:
    """The scale at which ``theta + scale * tau`` is most accurate; ties go to the smallest.

    Args:
      model: of a task (`tvjax.tasks`), or one that returns logits of classes.
      tau: a task vector of its parameters.
      scales: the grid, such as 0 to 1 by 0.05.
      batches: labelled validation data.
      progress: called with (batches done, batches in all, ``"batch"``).

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
    return choose_scales(model, [(tau, scales)], batches, progress)[0]


def choose_scales(
    model: Model,
    edits: Sequence[tuple[PyTree, Sequence[float]]],
    batches: Batch | Iterable[Batch],
    progress: Progress | None = None,
) -> list[ChosenScale]:
    """`choose_scale` for each of several task vectors with its grid, in one pass through the batches.

    Raises:
      ValueError: as `choose_scale` does.
    """
    grids = [np.unique(np.asarray(scales, np.float64)) for _, scales in edits]
    taus = [tau for tau, _ in edits]
    chosen = []
    curves = _curves(model, taus, [grid.tolist() for grid in grids], batches, progress)
    for grid, found in zip(grids, curves, strict=True):
        curve = np.array([at.accuracy.fraction for at in found])
        best = int(curve.argmax())
        chosen.append(ChosenScale(float(grid[best]), float(curve[best]), grid, curve))
    return chosen


def scale_curve(
    model: Model,
    tau: PyTree,
    scales: Sequence[float],
    batches: Batch | Iterable[Batch],
    progress: Progress | None = None,
) -> list[Predictions]:
    """What ``theta + scale * tau`` predicts, for each scale.

    Nothing is compiled anew from one scale to the next, only one edited model is alive at a time, and the batches are
    passed through once, so that they may come from a loader.

    Args:
      model: of a task (`tvjax.tasks`), or one that returns logits of classes.
      tau: a task vector of its parameters.
      scales: finite numbers.
      batches: labelled data.
      progress: called with (batches done, batches in all, ``"batch"``).

    Returns:
      Predictions of each scale, all for the same examples.

    Raises:
      ValueError: for no scales, values or scores that are not finite, no batches, or one without labels.
    """
    return _curves(model, [tau], [scales], batches, progress)[0]


def _curves(
    model: Model,
    taus: Sequence[PyTree],
    grids: Sequence[Sequence[float]],
    batches: Batch | Iterable[Batch],
    progress: Progress | None,
) -> list[list[Predictions]]:
    """`scale_curve` for each of several task vectors, in one pass through the batches."""
    check_model("model", model, ModelLike)
    for scales in grids:
        _check_scales(scales)
    parts: list[list[list[Predictions]]] = [[[] for _ in scales] for scales in grids]
    several = [batches] if isinstance(batches, Batch) else batches
    for batch in counted(several, progress, "batch"):
        for tau, scales, own in zip(taus, grids, parts, strict=True):
            for scale, part in zip(scales, own, strict=True):
                part.append(of_batch(edited(model, tau, scale), batch))
    return [[joined(part) for part in own] for own in parts]


class LeastLoss(NamedTuple):
    """The scale of a grid that loses least.

    Attributes:
      scale: of the least mean loss, the smallest of those that tie.
      loss: at this scale.
      scales: the grid, sorted.
      curve: mean loss at every scale of the grid.
    """

    scale: float
    loss: float
    scales: np.ndarray
    curve: np.ndarray


def scale_of_least_loss(
    model: Model,
    tau: PyTree,
    scales: Sequence[float],
    batches: Batch | Iterable[Batch],
    progress: Progress | None = None,
) -> LeastLoss:
    """The scale at which the model's own loss is least: `choose_scale` where no label says what is right.

    With a teacher's scores in the place of labels, and the loss to learn from them
    (`tvjax.tasks.losses.distilled`), it is the rule for a transport without labels.

    Args:
      model: with a loss.
      tau: a task vector of its parameters.
      scales: the grid.
      batches: examples, with what the loss reads as their labels; passed through once.
      progress: called with (batches done, batches in all, ``"batch"``).

    Returns:
      The scale, its mean loss over the examples, and the whole curve.

    Raises:
      ValueError: for an empty grid, no examples, or losses that are not finite at any scale.

    >>> import jax.numpy as jnp
    >>> from tvjax.stages import Stage
    >>> from tvjax.tasks.losses import OWN_HEAD, distilled
    >>> stage = Stage("head", lambda params, x: {"logits": x @ params["kernel"]})
    >>> model = Model({"kernel": jnp.zeros((2, 2))}, (stage,), distilled(OWN_HEAD, match="logits"))
    >>> scale_of_least_loss(model, {"kernel": jnp.eye(2)}, (0, 1, 2, 3), Batch(jnp.eye(2), 2 * jnp.eye(2))).scale
    2.0
    """
    check_model("model", model, ModelLike)
    _check_scales(scales)
    grid = np.unique(np.asarray(scales, np.float64))
    total, count = np.zeros(len(grid)), 0
    for batch in counted([batches] if isinstance(batches, Batch) else batches, progress, "batch"):
        losses = [np.asarray(_loss_at(model, tau, float(scale), batch), np.float64) for scale in grid]
        total, count = total + [one.sum() for one in losses], count + losses[0].size
    if not count or np.isnan(total).all():
        raise ValueError("there are no examples, or none with a finite loss at any scale, to choose a scale by")
    curve = total / count
    best = int(np.nanargmin(curve))
    return LeastLoss(float(grid[best]), float(curve[best]), grid, curve)


def _check_scales(scales: Sequence[float]) -> None:
    if not len(scales) or not np.isfinite(np.asarray(scales, np.float64)).all():
        raise ValueError(f"scales: found {list(scales)}, expected at least one finite number")


@jax.jit
def _loss_at(model: Model, tau: PyTree, scale: float, batch: Batch) -> jax.Array:
    return model.loss(model.loss_params, _edited(model, tau, scale)(batch.inputs), batch.labels)


def edited(model: Model, tau: PyTree, scale: float = 1.0) -> Model:
    """The model at ``theta + scale * tau``, by one program for all scales, whole numbers too."""
    return _edited(model, tau, float(scale))


@jax.jit
def _edited(model: Model, tau: PyTree, scale: float) -> Model:
    return model.replace(params=apply(model.params, tau, scale))
