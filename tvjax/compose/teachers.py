"""Learning from a teacher: a fine-tuned model's scores of the same classes, on examples that need no labels.

The teacher and the student may differ in everything, tokenizer and resolution included: only their scores meet.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tvjax.compose.edited import outputs as outputs_at
from tvjax.compose.objectives import Augment, Objective, Scores, Term, task_scores
from tvjax.finite import check_finite
from tvjax.stages import Batch, ModelLike, check_model

PyTree = Any
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


def class_scores(
    model: ModelLike, batches: Batch | Iterable[Batch], scores: Scores = task_scores
) -> Float[np.ndarray, "examples classes"]:
    """The scores of the classes on some examples, before the softmax: what a teacher says, to be kept.

    Args:
      model: the teacher, with its own task's head.
      batches: the examples as the teacher sees them, in the order in which the student will; no labels are read.
      scores: ``(model, outputs) -> [batch, classes]``.

    Raises:
      ValueError: no examples, a model of no classes, or scores that are not finite.

    >>> from tvjax.stages import single_stage
    >>> model = single_stage(lambda p, x: {"logits": x @ p["w"]}, {"w": jnp.eye(2)})
    >>> class_scores(model, Batch(jnp.ones((3, 2)))).shape
    (3, 2)
    """
    check_model("teacher", model, ModelLike)
    found = [
        np.asarray(_scores(scores, model, batch.inputs), np.float32)
        for batch in ([batches] if isinstance(batches, Batch) else batches)
    ]
    if not found:
        raise ValueError("there are no examples for the teacher to score: give at least one batch")
    together = np.concatenate(found)
    check_finite({"scores": together}, "what the teacher says")
    return together


def distillation(
    model: ModelLike,
    inputs: PyTree,
    teacher_scores: Float[Array | np.ndarray, "examples classes"],
    *,
    temperature: float = 1.0,
    match: Match = "probabilities",
    scores: Scores = task_scores,
    augment: Augment | None = None,
) -> Objective:
    """The distance to a teacher's scores (`distillation_losses`), which needs no labels.

    For coefficients (`learn`), for leaves and coefficients (`tune`), and, with `few_shot` added to it, for both labels
    and teacher.

    Args:
      model: the student, with the task's head; its parameters are not read.
      inputs: of all examples, as the student sees them, the example axis first.
      teacher_scores: of the same examples, before the softmax, from `class_scores`.
      temperature: of soft labels.
      match: ``"probabilities"``: cross-entropy to the soft labels; ``"logits"``: mean squared error of centred scores.
      scores: ``(model, outputs) -> [batch, classes]`` of the student.
      augment: ``(key, inputs) -> inputs``, drawn anew at every step; the teacher's scores stay those of the examples.

    Returns:
      The objective.

    Raises:
      ValueError: settings out of range, or scores of other examples.

    >>> from tvjax.compose import learn
    >>> from tvjax.stages import single_stage
    >>> model = single_stage(lambda p, x: {"logits": x @ p["w"]}, {"w": jnp.zeros((2, 2))})
    >>> teacher = jnp.array([[3.0, 0.0], [0.0, 3.0]])
    >>> goal = distillation(model, jnp.eye(2), teacher, match="logits")
    >>> found = learn(model.params, [{"w": jnp.eye(2)}], goal, key=jax.random.key(0), epochs=50, batch_size=2)
    >>> round(float(found.trainable.values[0, 0, 0]))
    3
    """
    check_model("model", model, ModelLike)
    check_distillation(temperature, match)
    count = jax.tree.leaves(inputs)[0].shape[0]
    if jnp.ndim(teacher_scores) != 2 or len(teacher_scores) != count:
        raise ValueError(
            f"the teacher's scores have shape {list(jnp.shape(teacher_scores))}, expected [examples, classes] of "
            f"{count} examples, in their order"
        )
    loss = _Distilled(scores, temperature, match, augment)
    return (Term(loss, model.replace(params=None), Batch(inputs, jnp.asarray(teacher_scores, jnp.float32))),)


@dataclasses.dataclass(frozen=True)
class _Distilled:
    scores: Scores
    temperature: float
    match: Match
    augment: Augment | None

    def __call__(self, model: Any, params: PyTree, batch: Batch, key: Array) -> Float[Array, " batch"]:
        inputs = batch.inputs if self.augment is None else self.augment(key, batch.inputs)
        found = self.scores(model, outputs_at(model, params, inputs))
        return distillation_losses(found, batch.labels, self.temperature, self.match)


@partial(jax.jit, static_argnums=0)
def _scores(scores: Scores, model: Any, inputs: PyTree) -> Array:
    return scores(model, model(inputs))
