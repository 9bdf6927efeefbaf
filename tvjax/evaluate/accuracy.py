"""Predictions, accuracy, and how sure an accuracy is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tvjax.evaluate.zero_shot import zero_shot_scores
from tvjax.stages import Batch, Model, PyTree


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

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval, 95 % by default.

        >>> [round(bound, 3) for bound in Accuracy(90, 100).interval()]
        [0.826, 0.945]
        """
        share, n = self.fraction, self.total
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        return max(0.0, centre - half), min(1.0, centre + half)


def class_scores(model: Model, outputs: PyTree) -> Float[Array, "batch classes"]:
    """The scores of the classes in what a model returned: its logits, or those of its zero-shot head.

    Raises:
      ValueError: for a model that has neither.
    """
    if "logits" in outputs:
        return outputs["logits"]
    if "image" in outputs and isinstance(model.loss_params, dict) and "classifier" in model.loss_params:
        return zero_shot_scores(model.loss_params, outputs)
    raise ValueError(
        f"the model returns {sorted(outputs)} and has no zero-shot head: give it one with tvjax.evaluate.zero_shot"
    )


def predict(model: Model, inputs: PyTree) -> Int[Array, " batch"]:
    """The class of the greatest score, for each example."""
    return jnp.argmax(class_scores(model, model(inputs)), axis=-1)


class Predictions(NamedTuple):
    """What a model predicts for labelled examples.

    Attributes:
      predicted: ``[n]`` classes.
      labels: ``[n]`` true classes.
    """

    predicted: np.ndarray
    labels: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """``[n]``, whether each prediction is its label."""
        return self.predicted == self.labels

    @property
    def accuracy(self) -> Accuracy:
        """The accuracy."""
        return Accuracy(int(self.right.sum()), self.right.size)

    def by_class(self, classes: int) -> list[Accuracy | None]:
        """The accuracy on the examples of each class; None for a class without examples.

        >>> Predictions(np.array([0, 1, 1]), np.array([0, 1, 0])).by_class(3)
        [Accuracy(correct=1, total=2), Accuracy(correct=1, total=1), None]
        """
        total = np.bincount(self.labels, minlength=classes)
        correct = np.bincount(self.labels[self.right], minlength=classes)
        return [Accuracy(int(c), int(t)) if t else None for c, t in zip(correct, total, strict=True)]


def predictions(model: Model, batches: Batch | Iterable[Batch]) -> Predictions:
    """Predictions for labelled batches; every stage is compiled once per batch shape.

    Args:
      model: returns logits, or has a zero-shot head.
      batches: one batch or several, with labels.

    Raises:
      ValueError: for no batches, or one without labels.
    """
    return joined(
        Predictions(np.asarray(predict(model, batch.inputs)), labels_of(batch))
        for batch in ([batches] if isinstance(batches, Batch) else batches)
    )


def labels_of(batch: Batch) -> np.ndarray:
    """The labels of a batch.

    Raises:
      ValueError: where it has none.
    """
    if batch.labels is None:
        raise ValueError("a batch has no labels: accuracy needs them")
    return np.asarray(batch.labels)


def joined(parts: Iterable[Predictions]) -> Predictions:
    """The predictions for all batches as one.

    Raises:
      ValueError: where there are none.
    """
    found = list(parts)
    if not sum(part.labels.size for part in found):
        raise ValueError("there are no examples to evaluate on: give at least one batch")
    return Predictions(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def accuracy(model: Model, batches: Batch | Iterable[Batch]) -> Accuracy:
    """Accuracy over labelled batches, as `predictions` takes them.

    >>> from tvjax.stages import Stage
    >>> model = Model({}, (Stage("head", lambda params, carry: {"logits": carry}),))
    >>> accuracy(model, Batch(jnp.array([[2.0, 1.0], [3.0, 0.0]]), jnp.array([0, 1]))).fraction
    0.5
    """
    return predictions(model, batches).accuracy
