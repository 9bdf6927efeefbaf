"""Losses that can also say what a model predicts, and the one over scores of classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tvjax.stages import PyTree

Scores = Callable[[PyTree, PyTree], Float[Array, "batch classes"]]


class Judged(NamedTuple):
    """What a model makes of examples whose answers are known, each one class or one token.

    Attributes:
      predicted: the greatest score's class or token, ``[batch]`` or ``[batch, tokens]``.
      labels: what is right, of the same shape.
      counted: whether each counts, of the same shape; all but padding and prompts.
      losses: minus the logarithm of the probability of what is right, of the same shape; 0 where it does not count.
      finite: whether the scores are numbers, of the same shape.
    """

    predicted: Array
    labels: Array
    counted: Array
    losses: Array
    finite: Array


class Loss(Protocol):
    """A loss that can also say what a model predicts: the tasks' losses are such, and `Model.loss` may be any."""

    @property
    def task(self) -> str:
        """What it is the loss of, for messages."""

    def __call__(self, loss_params: PyTree, outputs: PyTree, labels: PyTree) -> Float[Array, " batch"]:
        """The loss of each example."""

    def judge(self, loss_params: PyTree, outputs: PyTree, labels: PyTree) -> Judged:
        """What the outputs predict, beside what is right."""


def cannot_score(task: str, outputs: PyTree, expected: str) -> ValueError:
    """The error for a model that returns what a task cannot score, naming both."""
    if isinstance(outputs, dict):
        found = ", ".join(f"{name} {list(jnp.shape(leaf))}" for name, leaf in sorted(outputs.items()))
    else:
        found = f"a {type(outputs).__name__} of shape {list(jnp.shape(outputs))}"
    return ValueError(f"the model returns {found}, which the task {task!r} cannot score: it expects {expected}")


@dataclasses.dataclass(frozen=True)
class ClassLoss:
    """Cross-entropy of each example under the scores of the classes.

    Losses of the same scores are equal, so that a program is compiled once.

    Attributes:
      task: what it is the loss of.
      function: ``(loss_params, outputs) -> [batch, classes]``, the scores.

    >>> OWN_HEAD(None, {"logits": jnp.zeros((1, 4))}, jnp.array([0])).tolist()
    [1.3862943649291992]
    """

    task: str
    function: Scores

    def __call__(self, loss_params: PyTree, outputs: PyTree, labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
        """The loss of each example."""
        return _losses(self.scores(loss_params, outputs), labels)

    def judge(self, loss_params: PyTree, outputs: PyTree, labels: Int[Array, " batch"]) -> Judged:
        """The class of the greatest score, of equal scores the first."""
        scores = self.scores(loss_params, outputs)
        if jnp.shape(labels) != scores.shape[:1]:
            raise ValueError(
                f"a batch has labels of shape {list(jnp.shape(labels))} for {len(scores)} predictions: the task "
                f"{self.task!r} needs one class for each example"
            )
        return Judged(*_judged(scores, jnp.asarray(labels)))

    def scores(self, loss_params: PyTree, outputs: PyTree) -> Float[Array, "batch classes"]:
        """The scores of the classes.

        Raises:
          ValueError: for outputs that have none.
        """
        scores = self.function(loss_params, outputs)
        if jnp.ndim(scores) != 2:
            raise cannot_score(
                self.task,
                outputs,
                "scores [batch, classes]; a model that scores every token (a causal language model) is no classifier: "
                "return as logits those of the one place that answers, or ask it with tasks.label_words",
            )
        return scores


@jax.jit
def _losses(scores: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    log_probabilities = jax.nn.log_softmax(scores.astype(jnp.float32))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]


@jax.jit
def _judged(scores: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> tuple[Array, ...]:
    """The parts of a judgement; NaN is the greatest of all."""
    counted, finite = jnp.ones(labels.shape, bool), jnp.isfinite(jnp.max(scores, axis=-1))
    return jnp.argmax(scores, axis=-1), labels, counted, _losses(scores, labels), finite


Match = Literal["probabilities", "logits"]


def check_distillation(temperature: float, match: str) -> None:
    """Raises a ValueError for settings of `distillation_losses` that are out of range."""
    if match not in get_args(Match):
        raise ValueError(f"match must be one of {get_args(Match)}, found {match!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
    if match == "logits" and temperature != 1:
        raise ValueError(f"temperature is {temperature}, and match='logits' compares scores as they are: leave it at 1")


def distillation_losses(
    scores: Float[Array, "batch classes"],
    teacher: Float[Array, "batch classes"],
    temperature: float = 1.0,
    match: Match = "probabilities",
) -> Float[Array, " batch"]:
    """How far scores are from a teacher's, for each example.

    ``"probabilities"``: the cross-entropy to the teacher's soft labels, ``-T^2 sum softmax(t / T) log softmax(s / T)``
    (Hinton et al. 2015; the factor keeps the size of the gradient). ``"logits"``: the mean over the classes of the
    squared difference of the scores, each centred, for only differences of scores mean something.

    Args:
      scores: s, before the softmax.
      teacher: t, of the same classes.
      temperature: T.
      match: what is compared.

    Raises:
      ValueError: scores of other classes.

    >>> scores = jnp.array([[2.0, 0.0]])
    >>> distillation_losses(scores, scores + 5, match="logits").tolist()
    [0.0]
    >>> round(float(distillation_losses(scores, 100 * scores)[0]), 4)  # a teacher that is sure is a label
    0.1269
    """
    if jnp.shape(scores) != jnp.shape(teacher):
        raise ValueError(
            f"the scores are {list(jnp.shape(scores))} and the teacher's {list(jnp.shape(teacher))}: both are of the "
            "same examples and classes, [batch, classes]"
        )
    scores, teacher = (jnp.asarray(x, jnp.float32) for x in (scores, teacher))
    if match == "logits":
        centred = [x - jnp.mean(x, -1, keepdims=True) for x in (scores, teacher)]
        return jnp.mean(jnp.square(centred[0] - centred[1]), -1)
    wanted = jax.nn.softmax(teacher / temperature)
    return -(temperature**2) * jnp.sum(wanted * jax.nn.log_softmax(scores / temperature), -1)


@dataclasses.dataclass(frozen=True)
class Distillation(ClassLoss):
    """A teacher's scores in the place of labels (`distillation_losses`); judged by labels, as any other.

    Attributes:
      temperature: of soft labels.
      match: ``"probabilities"`` or ``"logits"``.

    >>> loss = distilled(OWN_HEAD, match="logits")
    >>> loss(None, {"logits": jnp.eye(2)}, jnp.eye(2)).tolist()
    [0.0, 0.0]
    """

    temperature: float = 1.0
    match: Match = "probabilities"

    def __call__(self, loss_params: PyTree, outputs: PyTree, labels: Array) -> Float[Array, " batch"]:
        """The loss of each example; `labels` are the teacher's scores, ``[batch, classes]``."""
        return distillation_losses(self.scores(loss_params, outputs), labels, self.temperature, self.match)


def distilled(loss: ClassLoss, temperature: float = 1.0, match: Match = "probabilities") -> Distillation:
    """The loss of the same scores that learns from a teacher's: ``model.replace(loss=distilled(model.loss))``.

    Raises:
      ValueError: settings out of range.
    """
    check_distillation(temperature, match)
    return Distillation("distillation", loss.function, temperature, match)


def logits_of(loss_params: PyTree, outputs: PyTree) -> Float[Array, "batch classes"]:
    """``outputs["logits"]``."""
    if not isinstance(outputs, dict) or "logits" not in outputs:
        expected = "logits, or a head to be given (tvjax.tasks.zero_shot)"
        raise cannot_score("classification with the model's own head", outputs, expected)
    return outputs["logits"]


OWN_HEAD = ClassLoss("classification with the model's own head", logits_of)
