"""What coefficients are trained for: weighted sums of terms, each a loss over examples of its own.

An objective is a tuple of `Term`; two are joined by ``+``. Its parameters are given to it, so one objective serves
coefficients, fine-tuning, and the linearised model alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tvjax.compose.edited import computed
from tvjax.compose.edited import outputs as outputs_at
from tvjax.kinds import kind_of
from tvjax.stages import Batch, ModelLike, check_model

PyTree = Any
Scores = Callable[[Any, PyTree], Float[Array, "batch classes"]]
Augment = Callable[[Array, PyTree], PyTree]


@partial(jax.tree_util.register_dataclass, data_fields=("context", "examples"), meta_fields=("loss", "weight", "share"))
@dataclasses.dataclass(frozen=True)
class Term:
    """One term of an objective: ``weight * mean(loss(context, params, batch, key))``; a pytree.

    Attributes:
      loss: ``(context, params, batch, key) -> [batch]``; equal objects compile once.
      context: arrays that the loss reads (a model without its parameters, with its head).
      examples: all examples, a pytree of arrays whose first axis is theirs; a batch is some of them.
      weight: of the term.
      share: examples of this term in a batch, as a share of the batch size.
    """

    loss: Callable[[PyTree, PyTree, PyTree, Array], Float[Array, " batch"]]
    context: PyTree
    examples: PyTree
    weight: float = 1.0
    share: float = 1.0

    @property
    def count(self) -> int:
        """Number of examples."""
        return jax.tree.leaves(self.examples)[0].shape[0]


Objective = tuple[Term, ...]


def check_objective(objective: Any) -> None:
    """Raises a ValueError unless this is an objective, of one term at least.

    >>> check_objective(())
    Traceback (most recent call last):
    ...
    ValueError: objective: found no terms, expected one at least
    """
    if not isinstance(objective, tuple | list) or not all(isinstance(term, Term) for term in objective):
        raise ValueError(
            f"the objective is {kind_of(objective)}, expected what tvjax.compose.few_shot, entropy and the like give"
        )
    if not objective:
        raise ValueError("objective: found no terms, expected one at least")


def value(objective: Objective, params: PyTree, batches: Sequence[PyTree], key: Array) -> Float[Array, ""]:
    """The objective on one batch for each of its terms.

    Args:
      objective: the terms.
      params: parameters of the model, or an `Edited`.
      batches: of examples, one for each term.
      key: a random key, for augmentation.

    Returns:
      The weighted sum of the means.
    """
    keys = jax.random.split(key, len(objective))
    return sum(
        (
            term.weight * jnp.mean(term.loss(term.context, params, batch, term_key))
            for term, batch, term_key in zip(objective, batches, keys, strict=True)
        ),
        start=jnp.float32(0),
    )


def scaled(objective: Objective, factor: float) -> Objective:
    """The objective times a number."""
    return tuple(dataclasses.replace(term, weight=term.weight * factor) for term in objective)


def few_shot(model: ModelLike, examples: Batch, augment: Augment | None = None) -> Objective:
    """The model's own loss on labelled examples: cross-entropy, for a classifier.

    Args:
      model: has a loss; its parameters are not read.
      examples: all examples, with labels.
      augment: ``(key, inputs) -> inputs``, drawn anew at every step; None: none. Equal objects compile once.

    Returns:
      The objective.

    Raises:
      ValueError: examples without labels, or a model without a loss.

    >>> import optax
    >>> from tvjax.stages import single_stage
    >>> model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, loss=lambda _, logits, labels:
    ...     optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    >>> examples = Batch(jnp.eye(2), jnp.arange(2))
    >>> round(float(value(few_shot(model, examples), model.params, [examples], jax.random.key(0))), 3)
    0.313
    """
    check_model("model", model, ModelLike)
    if not model.has_loss:
        raise ValueError("the model has no loss: give one with Model.with_loss(loss, loss_params)")
    if examples.labels is None:
        raise ValueError("examples: found no labels, which the loss needs; entropy and fix_match need none")
    return (Term(_Labelled(augment), _without_params(model), Batch(*examples)),)


def of_loss(loss: Callable[[PyTree, PyTree], Array], examples: PyTree) -> Objective:
    """Any loss function of parameters.

    Args:
      loss: ``(params, batch) -> [batch]``, or a scalar that is a mean over the batch.
      examples: all examples, a pytree of arrays whose first axis is theirs.

    Returns:
      The objective.
    """
    return (Term(_Plain(loss), None, examples),)


def addition(tasks: Sequence[tuple[ModelLike, Batch]], augment: Augment | None = None) -> Objective:
    """The mean loss over tasks that share parameters: one batch of every task at each step.

    Args:
      tasks: for each task the model with that task's head as its loss, and its labelled examples.
      augment: as for `few_shot`.

    Returns:
      The objective.

    Raises:
      ValueError: no task, examples without labels, or a model without a loss.
    """
    return average([few_shot(model, examples, augment) for model, examples in tasks])


def average(objectives: Sequence[Objective]) -> Objective:
    """The mean of several objectives of the same parameters.

    Raises:
      ValueError: there are none.
    """
    if not objectives:
        raise ValueError("the mean of no objectives: give one task at least")
    return tuple(term for objective in objectives for term in scaled(objective, 1 / len(objectives)))


def negation(
    target: tuple[ModelLike, Batch], control: tuple[ModelLike, Batch], augment: Augment | None = None
) -> Objective:
    """Forgets a task and keeps another: minus the loss on the target plus the loss on the control.

    Args:
      target: model with the head of the task to forget, and its labelled examples.
      control: the same of the task to keep.
      augment: as for `few_shot`.

    Returns:
      The objective.

    Raises:
      ValueError: examples without labels, or a model without a loss.
    """
    return scaled(few_shot(*target, augment), -1.0) + few_shot(*control, augment)


def task_scores(model: ModelLike, outputs: PyTree) -> Float[Array, "batch classes"]:
    """The scores of the classes in what a classifier returned: those of its loss, or else ``outputs["logits"]``.

    Raises:
      ValueError: the outputs hold none, or those of tokens.
    """
    if hasattr(model.loss, "scores"):  # the losses of `tvjax.tasks`
        return model.loss.scores(model.loss_params, outputs)
    if not isinstance(outputs, dict) or "logits" not in outputs:
        found = sorted(outputs) if isinstance(outputs, dict) else kind_of(outputs)
        raise ValueError(
            f"the model returns {found}, expected 'logits' among them: give it a task of classes (tvjax.tasks), or "
            "scores=(model, outputs) -> [batch, classes]"
        )
    if jnp.ndim(outputs["logits"]) != 2:
        raise ValueError(
            f"the model returns logits of shape {list(jnp.shape(outputs['logits']))}, expected [batch, classes]: a "
            "model that scores every token is asked for classes with tvjax.tasks.label_words"
        )
    return outputs["logits"]


def entropy(
    model: ModelLike, inputs: PyTree, scores: Scores = task_scores, augment: Augment | None = None
) -> Objective:
    """The entropy of the predictions, which needs no labels (AdaMerging, Yang et al., ICLR 2024, arXiv 2310.02575).

    Args:
      model: with the task's head; its parameters are not read.
      inputs: of all examples, the example axis first.
      scores: ``(model, outputs) -> [batch, classes]``, before the softmax.
      augment: as for `few_shot`.

    Returns:
      The objective; for several tasks take the `average`.
    """
    check_model("model", model, ModelLike)
    return (Term(_Entropy(scores, augment), _without_params(model), inputs),)


class Trusted(NamedTuple):
    """Examples whose prediction is taken for their label.

    Attributes:
      indices: of the examples; one that is trusted for several classes stands here once for each.
      labels: the class that each is trusted for.
    """

    indices: Int[Array, " trusted"]
    labels: Int[Array, " trusted"]


def trusted_examples(probabilities: Float[Array, "examples classes"], per_class: int | None = None) -> Trusted:
    """For each class the k examples with the greatest probability of that class.

    Args:
      probabilities: of the zero-shot model.
      per_class: k; ``min(examples // (10 classes), 100)`` and 1 at least by default.

    Returns:
      ``classes * k`` examples, class after class, the most probable first.

    Raises:
      ValueError: fewer examples than k, or a k below 1.

    >>> probabilities = jnp.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]])
    >>> found = trusted_examples(probabilities)
    >>> found.indices.tolist(), found.labels.tolist()
    ([0, 1], [0, 1])
    """
    examples, classes = probabilities.shape
    count = max(1, min(examples // (10 * classes), 100)) if per_class is None else per_class
    if not 1 <= count <= examples:
        raise ValueError(f"per_class: found {count} of {examples} examples, expected 1 to {examples}")
    _, indices = jax.lax.top_k(probabilities.T, count)
    return Trusted(indices.reshape(-1), jnp.repeat(jnp.arange(classes, dtype=jnp.int32), count))


@jax.jit
def _rows(tree: PyTree, indices: Int[Array, " rows"]) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[indices], tree)


def sharpen(probabilities: Float[Array, "*n classes"], temperature: float) -> Float[Array, "*n classes"]:
    """``p^(1/T) / sum p^(1/T)``.

    >>> [round(float(p), 3) for p in sharpen(jnp.array([0.8, 0.2]), 0.5)]
    [0.941, 0.059]
    """
    return jax.nn.softmax(jnp.log(jnp.maximum(probabilities, jnp.finfo(probabilities.dtype).tiny)) / temperature)


def fix_match(
    model: ModelLike,
    inputs: PyTree,
    *,
    weak: Augment,
    strong: Augment,
    scores: Scores = task_scores,
    threshold: float = 0.99,
    temperature: float = 0.5,
    trusted_share: float = 0.25,
    per_class: int | None = None,
    prediction_batch: int = 128,
) -> Objective:
    """Unsupervised FixMatch: test-time adaptation without labels (Zhang et al. 2024, arXiv 2407.02880, section 5.3).

    The examples that the model, as it is given, is surest of (`trusted_examples`) keep that class as their label and
    make up a share of every batch. The others count where the prediction on their weak view, sharpened with the
    temperature, passes the threshold; it is then their label. The loss is the cross-entropy on the strong view.
    (The published code's sharpening does nothing, and its mask trusts every example; this is what the paper describes.)

    Args:
      model: with the task's head, and the parameters theta_0 that the zero-shot predictions are made with.
      inputs: of all examples, the example axis first.
      weak: ``(key, inputs) -> inputs``, the view that labels are predicted on; equal objects compile once.
      strong: the view that is learned from. For images both are in `tvjax.data.augment`.
      scores: ``(model, outputs) -> [batch, classes]``, before the softmax.
      threshold: of the confidence.
      temperature: T of the sharpening.
      trusted_share: of every batch.
      per_class: trusted examples of each class, see `trusted_examples`.
      prediction_batch: examples predicted at once.

    Returns:
      The objective, of two terms: the trusted examples, and the others.

    Raises:
      ValueError: a share, threshold or temperature out of range, or no example left that is not trusted.
    """
    check_model("model", model, ModelLike)
    if not (0 < trusted_share < 1 and 0 <= threshold <= 1 and temperature > 0):
        raise ValueError(
            f"found trusted_share {trusted_share}, threshold {threshold} and temperature {temperature}, expected a "
            "share between 0 and 1, a threshold from 0 to 1, and a temperature above 0"
        )
    found = trusted_examples(_probabilities(model, inputs, scores, prediction_batch), per_class)
    examples = jax.tree.leaves(inputs)[0].shape[0]
    others = np.setdiff1d(np.arange(examples), found.indices)
    if not others.size:
        raise ValueError(
            f"all {examples} examples are trusted, none is left to learn from: give more examples, or a per_class "
            "below " + str(found.indices.size // np.unique(found.labels).size)
        )
    context = _without_params(model)
    sure, rest = Batch(_rows(inputs, found.indices), found.labels), _rows(inputs, others)
    return (
        Term(_Trusted(scores, strong), context, sure, trusted_share, trusted_share),
        Term(
            _PseudoLabelled(scores, weak, strong, threshold, temperature),
            context,
            rest,
            1 - trusted_share,
            1 - trusted_share,
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Labelled:
    augment: Augment | None

    def __call__(self, model: Any, params: PyTree, batch: Batch, key: Array) -> Float[Array, " batch"]:
        outputs = outputs_at(model, params, _view(self.augment, key, batch.inputs))
        return model.loss(model.loss_params, outputs, batch.labels)


@dataclasses.dataclass(frozen=True)
class _Plain:
    function: Callable[[PyTree, PyTree], Array]

    def __call__(self, context: None, params: PyTree, batch: PyTree, key: Array) -> Float[Array, " batch"]:
        return self.function(computed(params), batch)


@dataclasses.dataclass(frozen=True)
class _Entropy:
    scores: Scores
    augment: Augment | None

    def __call__(self, model: Any, params: PyTree, inputs: PyTree, key: Array) -> Float[Array, " batch"]:
        log_probabilities = _log_probabilities(self.scores, model, params, _view(self.augment, key, inputs))
        return -jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1)


@dataclasses.dataclass(frozen=True)
class _Trusted:
    scores: Scores
    strong: Augment

    def __call__(self, model: Any, params: PyTree, batch: Batch, key: Array) -> Float[Array, " batch"]:
        log_probabilities = _log_probabilities(self.scores, model, params, self.strong(key, batch.inputs))
        return -_at(log_probabilities, batch.labels)


@dataclasses.dataclass(frozen=True)
class _PseudoLabelled:
    scores: Scores
    weak: Augment
    strong: Augment
    threshold: float
    temperature: float

    def __call__(self, model: Any, params: PyTree, inputs: PyTree, key: Array) -> Float[Array, " batch"]:
        weak_key, strong_key = jax.random.split(key)
        predicted = _log_probabilities(self.scores, model, jax.lax.stop_gradient(params), self.weak(weak_key, inputs))
        confidence = jnp.max(sharpen(jnp.exp(predicted), self.temperature), axis=-1)
        log_probabilities = _log_probabilities(self.scores, model, params, self.strong(strong_key, inputs))
        loss = -_at(log_probabilities, jnp.argmax(predicted, axis=-1))
        return jnp.where(confidence >= self.threshold, loss, 0)


def _without_params(model: ModelLike) -> Any:
    return model.replace(params=None)


def _view(augment: Augment | None, key: Array, inputs: PyTree) -> PyTree:
    return inputs if augment is None else augment(key, inputs)


def _log_probabilities(scores: Scores, model: Any, params: PyTree, inputs: PyTree) -> Float[Array, "batch classes"]:
    found = scores(model, outputs_at(model, params, inputs))
    return jax.nn.log_softmax(found.astype(jnp.float32))


def _at(values: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _probabilities(model: Any, inputs: PyTree, scores: Scores, size: int) -> Float[Array, "examples classes"]:
    examples = jax.tree.leaves(inputs)[0].shape[0]
    parts = [
        _predict(scores, model, jax.tree.map(lambda leaf, at=start: leaf[at : at + size], inputs))
        for start in range(0, examples, size)
    ]
    return jnp.exp(jnp.concatenate(parts))


@partial(jax.jit, static_argnums=0)
def _predict(scores: Scores, model: Any, inputs: PyTree) -> Float[Array, "batch classes"]:
    return _log_probabilities(scores, model, model.params, inputs)
