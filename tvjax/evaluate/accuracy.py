"""Predictions, accuracy, and how sure an accuracy is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tvjax import tree
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

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval.

        >>> [round(bound, 3) for bound in Accuracy(90, 100).interval()]
        [0.826, 0.945]
        """
        from scipy import stats  # slow to import

        found = stats.binomtest(self.correct, self.total).proportion_ci(confidence, method="wilson")
        return float(found.low), float(found.high)


def class_scores(model: Model, outputs: PyTree) -> Float[Array, "batch classes"]:
    """The scores of the classes in what a model returned: its logits, or those of its zero-shot head.

    Raises:
      ValueError: for a model that has neither, or whose logits are not one row for each example.
    """
    if "logits" in outputs:
        scores = outputs["logits"]
    elif "image" in outputs and isinstance(model.loss_params, dict) and "classifier" in model.loss_params:
        scores = zero_shot_scores(model.loss_params, outputs)
    else:
        raise ValueError(
            f"the model returns {sorted(outputs)} and has no zero-shot head: give it one with tvjax.evaluate.zero_shot"
        )
    if jnp.ndim(scores) != 2:
        raise ValueError(
            f"the scores have shape {list(jnp.shape(scores))}, expected [batch, classes]: a model that scores every "
            "token (a causal language model) is no classifier; return as logits those of the one place that answers"
        )
    return scores


def predict(model: Model, inputs: PyTree) -> Int[Array, " batch"]:
    """The class of the greatest score, for each example; of equal scores the first.

    Raises:
      ValueError: as `class_scores` does; for scores that are NaN or infinite (inside `jit` there are none to look at).
    """
    scores = class_scores(model, model(inputs))
    predicted, wrong = _greatest(scores)
    if not tree.is_traced(wrong) and np.any(wrong):
        examples = np.flatnonzero(wrong)
        raise ValueError(
            f"{len(examples)} of {len(wrong)} examples have scores that are NaN or infinite (first: number "
            f"{examples[0]} of its batch), which say nothing of their classes: are weights, inputs and head finite?"
        )
    return predicted


@jax.jit
def _greatest(scores: Float[Array, "batch classes"]) -> tuple[Int[Array, " batch"], Bool[Array, " batch"]]:
    """The place of the greatest score, and whether that is no number: NaN is the greatest of all."""
    return jnp.argmax(scores, axis=-1), ~jnp.isfinite(jnp.max(scores, axis=-1))


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
      ValueError: for no batches, one without a label for each example, or scores that are NaN.
    """
    return joined(of_batch(model, batch) for batch in ([batches] if isinstance(batches, Batch) else batches))


def of_batch(model: Model, batch: Batch) -> Predictions:
    """The predictions for one batch.

    Raises:
      ValueError: as `predict` does; where it has not one label for each example.
    """
    if batch.labels is None:
        raise ValueError("a batch has no labels: accuracy needs them")
    predicted, labels = np.asarray(predict(model, batch.inputs)), np.asarray(batch.labels)
    if labels.shape != predicted.shape:
        raise ValueError(
            f"a batch has labels of shape {list(labels.shape)} for {len(predicted)} predictions: accuracy needs one "
            "class for each example"
        )
    return Predictions(predicted, labels)


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
