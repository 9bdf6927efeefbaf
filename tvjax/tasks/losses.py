"""Losses that can also say what a model predicts, and the one over scores of classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tvjax.compose.teachers import Match, check_distillation, distillation_losses
from tvjax.kinds import kind_of
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
        found = f"{kind_of(outputs)} of shape {list(jnp.shape(outputs))}"
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
        return _losses(self, loss_params, outputs, labels)

    def judge(self, loss_params: PyTree, outputs: PyTree, labels: Int[Array, " batch"]) -> Judged:
        """The class of the greatest score, of equal scores the first."""
        return Judged(*_judged(self, loss_params, outputs, labels))

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


@partial(jax.jit, static_argnums=0)
def _losses(
    loss: ClassLoss, loss_params: PyTree, outputs: PyTree, labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    return _cross_entropy(loss.scores(loss_params, outputs), labels)


@partial(jax.jit, static_argnums=0)
def _judged(loss: ClassLoss, loss_params: PyTree, outputs: PyTree, labels: Int[Array, " batch"]) -> tuple[Array, ...]:
    """The parts of a judgement; NaN is the greatest of all."""
    scores = loss.scores(loss_params, outputs)
    if jnp.shape(labels) != scores.shape[:1]:
        raise ValueError(
            f"a batch has labels of shape {list(jnp.shape(labels))} for {len(scores)} predictions: the task "
            f"{loss.task!r} needs one class for each example"
        )
    labels = jnp.asarray(labels)
    counted, finite = jnp.ones(labels.shape, bool), jnp.isfinite(jnp.max(scores, axis=-1))
    return jnp.argmax(scores, axis=-1), labels, counted, _cross_entropy(scores, labels), finite


def _cross_entropy(scores: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    log_probabilities = jax.nn.log_softmax(scores.astype(jnp.float32))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class Distillation(ClassLoss):
    """A teacher's scores in the place of labels (`tvjax.compose.distillation_losses`); judged by labels, as any other.

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
