"""Predictions, accuracy, and how sure an accuracy is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from tvjax import tree
from tvjax.placement import automatic
from tvjax.progress import Progress, counted
from tvjax.stages import Batch, Model, PyTree
from tvjax.tasks.base import check_judged, judge_whole, loss_of
from tvjax.tasks.losses import ClassLoss


class Accuracy(NamedTuple):
    """Share of examples whose predicted class is theirs.

    Attributes:
      correct: number of such examples.
      total: number of examples.
    """

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """The accuracy, from 0 to 1."""
        return self.correct / self.total

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval.

        >>> [round(bound, 3) for bound in Accuracy(90, 100).interval()]
        [0.826, 0.945]
        """
        from scipy import stats  # slow to import

        found = stats.binomtest(self.correct, self.total).proportion_ci(confidence, method="wilson")
        return float(found.low), float(found.high)


@automatic(lambda model, inputs: inputs)
def predict(model: Model, inputs: PyTree) -> Int[Array, " batch"]:
    """The class of the greatest score, for each example; of equal scores the first.

    Raises:
      ValueError: for a model whose outputs its task cannot score, or that answers with more than a class; for scores
        that are NaN or infinite (inside `jit` there are none to look at).
    """
    loss = loss_of(model)
    if not isinstance(loss, ClassLoss):
        raise ValueError(f"the task {loss.task!r} has no one class for each example: take predictions of its batches")
    outputs = model(inputs)
    scores = jax.eval_shape(loss.scores, model.loss_params, outputs)
    labels = jax.device_put(np.zeros(scores.shape[0], np.int32))  # none are known
    judged = loss.judge(model.loss_params, outputs, labels)
    if not tree.is_traced(judged.finite):
        check_judged(judged)
    return judged.predicted


class Predictions(NamedTuple):
    """What a model predicts for labelled examples: a class for each, or the next token at every place of a text.

    Attributes:
      predicted: ``[n]`` classes or tokens.
      labels: ``[n]`` true ones.
      losses: ``[n]``, minus the logarithm of the probability of each true one; None where they are not known.
    """

    predicted: np.ndarray
    labels: np.ndarray
    losses: np.ndarray | None = None

    @property
    def right(self) -> np.ndarray:
        """``[n]``, whether each prediction is its label."""
        return self.predicted == self.labels

    @property
    def accuracy(self) -> Accuracy:
        """The accuracy."""
        return Accuracy(int(self.right.sum()), self.right.size)

    @property
    def perplexity(self) -> float | None:
        """``exp`` of the mean loss; None where losses are not known.

        >>> Predictions(np.array([3]), np.array([3]), np.array([0.0])).perplexity
        1.0
        """
        return None if self.losses is None else math.exp(self.losses.mean(dtype=np.float64))

    def by_class(self, classes: int) -> list[Accuracy | None]:
        """The accuracy on the examples of each class; None for a class without examples.

        >>> Predictions(np.array([0, 1, 1]), np.array([0, 1, 0])).by_class(3)
        [Accuracy(correct=1, total=2), Accuracy(correct=1, total=1), None]
        """
        total = np.bincount(self.labels, minlength=classes)
        correct = np.bincount(self.labels[self.right], minlength=classes)
        return [Accuracy(int(c), int(t)) if t else None for c, t in zip(correct, total, strict=True)]


def predictions(model: Model, batches: Batch | Iterable[Batch], progress: Progress | None = None) -> Predictions:
    """Predictions for labelled batches; every stage is compiled once per batch shape.

    Args:
      model: of a task (`tvjax.tasks`), or one that returns logits of classes.
      batches: one batch or several, with labels.
      progress: called with (batches done, batches in all, ``"batch"``).

    Raises:
      ValueError: for no batches, one without a label for each example, scores that are NaN, or a model whose outputs
        its task cannot score.
    """
    several = [batches] if isinstance(batches, Batch) else batches
    return joined(of_batch(model, batch) for batch in counted(several, progress, "batch"))


def of_batch(model: Model, batch: Batch) -> Predictions:
    """The predictions for one batch.

    Raises:
      ValueError: as `predictions` does.
    """
    predicted, labels, counted, losses = (np.asarray(part) for part in judge_whole(model, batch)[:4])
    return Predictions(predicted[counted], labels[counted], losses[counted])


def joined(parts: Iterable[Predictions]) -> Predictions:
    """The predictions for all batches as one.

    Raises:
      ValueError: where there are none.
    """
    found = list(parts)
    if not sum(part.labels.size for part in found):
        raise ValueError("there are no examples to evaluate on: give at least one batch")
    predicted, labels = (np.concatenate(arrays) for arrays in zip(*(part[:2] for part in found), strict=True))
    losses = [part.losses for part in found if part.losses is not None]
    return Predictions(predicted, labels, np.concatenate(losses) if len(losses) == len(found) else None)


def accuracy(model: Model, batches: Batch | Iterable[Batch]) -> Accuracy:
    """Accuracy over labelled batches, as `predictions` takes them: of classes, or of tokens.

    >>> import jax.numpy as jnp
    >>> from tvjax.stages import Stage
    >>> model = Model({}, (Stage("head", lambda params, carry: {"logits": carry}),))
    >>> accuracy(model, Batch(jnp.array([[2.0, 1.0], [3.0, 0.0]]), jnp.array([0, 1]))).fraction
    0.5
    """
    return predictions(model, batches).accuracy
