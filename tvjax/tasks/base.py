"""A task: what turns examples and a pre-trained model into a model with a loss, batches, and a score."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tvjax import processes
from tvjax.data.examples import Examples
from tvjax.data.loader import Loader
from tvjax.placement import automatic
from tvjax.stages import Batch, Model, ModelLike, check_model
from tvjax.tasks.losses import OWN_HEAD, Judged, Loss


class Score(NamedTuple):
    """How well a model does on examples: classes are one answer each, texts one a token.

    Attributes:
      examples: how many.
      exact: of how many every answer is right.
      answers: how many.
      right: how many of them.
      loss: the sum of their losses, in nats.
    """

    examples: int
    exact: int
    answers: int
    right: int
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right: of the examples, or of the tokens."""
        return self.right / self.answers

    @property
    def exact_match(self) -> float:
        """Share of the examples of which every answer is right, the ones before being given."""
        return self.exact / self.examples

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss of an answer.

        >>> round(Score(2, 1, 4, 3, 4 * math.log(5)).perplexity, 6)
        5.0
        """
        return math.exp(self.loss / self.answers)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a model is asked, and how its answers are judged.

    Attributes:
      name: for messages and records.
      model: a pre-trained model to one with the task's loss; its parameters stay as they are.
      batches: examples and how many at once to batches of that model's inputs, with labels where there are any.
    """

    name: str
    model: Callable[[Model], Model]
    batches: Callable[[Any, int], Loader]

    def score(self, model: Model, batches: Batch | Iterable[Batch]) -> Score:
        """How well a model that the task made, edited or not, does on its batches."""
        return score(model, batches)


@automatic(lambda model, batch: batch)
def judge(model: Model, batch: Batch) -> Judged:
    """What a model predicts for one batch, beside what is right; a model of no task returns logits of classes.

    Raises:
      ValueError: for a batch without labels, or a model whose outputs its task cannot score.
    """
    if batch.labels is None:
        raise ValueError("a batch has no labels: accuracy needs them")
    return loss_of(model).judge(model.loss_params, model(batch.inputs), batch.labels)


def loss_of(model: Model) -> Loss:
    """The loss of the model's task; that of its own head where it has another loss, or none."""
    check_model("model", model, ModelLike)
    loss: Any = model.loss
    return loss if hasattr(loss, "judge") else OWN_HEAD


def score(model: Model, batches: Batch | Iterable[Batch]) -> Score:
    """How well a model does on labelled batches, over all of them.

    Raises:
      ValueError: as `judge` does; for scores that are not finite, or no examples.

    >>> from tvjax.stages import Stage
    >>> import jax.numpy as jnp
    >>> model = Model({}, (Stage("head", lambda params, carry: {"logits": carry}),))
    >>> found = score(model, Batch(jnp.array([[2.0, 1.0], [3.0, 0.0]]), jnp.array([0, 1])))
    >>> found.accuracy, found.examples
    (0.5, 2)
    """
    parts = []
    for batch in [batches] if isinstance(batches, Batch) else batches:
        judged = judge_whole(model, batch)
        right, counted = judged.predicted == judged.labels, judged.counted
        whole = np.reshape(right | ~counted, (len(right), -1)).all(1)
        losses = float(judged.losses.sum(dtype=np.float64))
        parts.append((len(right), int(whole.sum()), int(counted.sum()), int((right & counted).sum()), losses))
    if not sum(part[2] for part in parts):
        raise ValueError("there are no examples to evaluate on: give at least one batch")
    examples, exact, answers, right, loss = (sum(column) for column in zip(*parts, strict=True))
    return Score(int(examples), int(exact), int(answers), int(right), float(loss))


def judge_whole(model: Model, batch: Batch) -> Judged:
    """What a model predicts for one batch, on the host of every process, and checked.

    Raises:
      ValueError: as `judge` does; for scores that are not finite, or processes that have other batches.
    """
    processes.check_same("evaluate on", {"inputs": batch.inputs, "labels": batch.labels})
    judged: Judged = processes.fetch(judge(model, batch))
    check_judged(judged)
    return judged


def check_judged(judged: Judged) -> None:
    """Raises a ValueError where scores that count are NaN or infinite, which say nothing of what is predicted."""
    counted, finite = processes.fetch((judged.counted, judged.finite))
    wrong = np.asarray(counted) & ~np.asarray(finite)
    if wrong.any():
        places = np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))
        raise ValueError(
            f"{len(places)} of {len(wrong)} examples have scores that are NaN or infinite (first: number "
            f"{places[0]} of its batch), which say nothing of their classes: are weights, inputs and head finite?"
        )


def check_examples(task: str, examples: Examples, kind: type[Examples], class_names: Sequence[str] = ()) -> None:
    """Raises a ValueError for examples of another kind, or classes other than those of the task."""
    if not isinstance(examples, kind):
        raise ValueError(f"{examples.name!r} is of {examples.kind}, and the task {task!r} takes {kind.kind}")
    if class_names and examples.labels is not None and len(examples.class_names) != len(class_names):
        raise ValueError(
            f"{examples.name!r} has {len(examples.class_names)} classes, and the task {task!r} has {len(class_names)} "
            f"({', '.join(class_names[:8])}): give the task's class names when the examples are opened"
        )
