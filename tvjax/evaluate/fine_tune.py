"""Fine-tuning: the baseline that transport is compared with, and the source of task vectors."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tvjax import processes, tree
from tvjax.evaluate.accuracy import accuracy
from tvjax.stages import Batch, Model, PyTree, check_model

Optimiser = Callable[[Array], optax.GradientTransformation]
Score = Callable[[PyTree], float]


class FineTuned(NamedTuple):
    """What fine-tuning arrived at.

    Attributes:
      params: the parameters; trained leaves are float32.
      learning_rate: the learning rate that was kept.
      steps: after how many steps.
      accuracy: its accuracy on the validation data, from 0 to 1, or its score; None without either.
      losses: mean loss of each of those steps.
    """

    params: PyTree
    learning_rate: float
    steps: int
    accuracy: float | None
    losses: np.ndarray


def fine_tune(
    model: Model,
    examples: Batch,
    *,
    steps: int,
    key: Array,
    learning_rates: Sequence[float] = (1e-3,),
    optimiser: Optimiser = optax.adam,
    batch_size: int | None = None,
    trainable: Sequence[str] = ("*",),
    validation: Batch | Sequence[Batch] = (),
    checkpoints: int = 1,
    score: Score | None = None,
) -> FineTuned:
    """Trains the chosen leaves on labelled examples with the model's loss.

    The learning rate and the number of steps are those of the greatest validation accuracy, or score; ties go to the
    smaller learning rate, then to fewer steps. The steps between two checkpoints are one compiled scan over examples
    that stay on the device, so that another learning rate compiles nothing.

    Args:
      model: has a loss.
      examples: all training examples, with labels.
      steps: number of steps, a multiple of `checkpoints`.
      key: a random key, for the order of the examples.
      learning_rates: those to try.
      optimiser: learning rate to optax transformation; the same function object compiles once.
      batch_size: examples of each step, drawn with replacement; None: all examples at every step.
      trainable: path patterns (`fnmatch`) of the leaves to train; the others stay as they are.
      validation: labelled batches to choose by; may be empty where there is one candidate only.
      checkpoints: how many numbers of steps to choose from, evenly spaced up to `steps`.
      score: of parameters, the greater the better, in the place of the accuracy on validation data: such as minus a
        teacher's loss, where no label says what is right. Asked at every checkpoint of a learning rate, in their order.

    Returns:
      The parameters and how they were found.

    Raises:
      ValueError: for examples without labels, patterns that match no leaf, no steps, several candidates without
        validation data or a score, or both of these.

    >>> from tvjax.stages import Stage
    >>> head = Stage("head", lambda params, x: {"logits": x @ params["kernel"]})
    >>> model = Model({"kernel": jnp.zeros((2, 2))}, (head,))
    >>> def cross_entropy(_, outputs, labels):
    ...     return optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], labels)
    >>> examples = Batch(jnp.eye(2), jnp.arange(2))
    >>> tuned = fine_tune(model.with_loss(cross_entropy), examples, steps=20, key=jax.random.key(0))
    >>> bool(tuned.losses[-1] < tuned.losses[0])
    True
    """
    check_model("model", model)
    if examples.labels is None:
        raise ValueError("examples: found no labels, which the loss needs")
    if steps < 1 or checkpoints < 1 or steps % checkpoints:
        raise ValueError(f"steps: found {steps}, expected a positive multiple of checkpoints ({checkpoints})")
    validation = [validation] if isinstance(validation, Batch) else list(validation)
    if validation and score is not None:
        raise ValueError("found validation data and a score, expected one of them to choose by")
    if validation:
        score = partial(_accuracy, model, validation)
    if not learning_rates or (len(learning_rates) * checkpoints > 1 and score is None):
        raise ValueError(
            f"found {len(learning_rates)} learning rates and {checkpoints} checkpoints, expected validation data or a "
            "score to choose among several, and at least one of each"
        )
    leaves = tree.flatten(model.params)
    trained = {
        path: jnp.asarray(leaf, jnp.float32)
        for path, leaf in leaves.items()
        if jnp.issubdtype(leaf.dtype, jnp.floating) and any(fnmatch.fnmatchcase(path, pattern) for pattern in trainable)
    }
    if not trained:
        raise ValueError(f"trainable: no floating leaf matches {list(trainable)}; leaves are {list(leaves)[:8]}, ...")

    best: FineTuned | None = None
    for learning_rate in sorted(learning_rates):
        rate = jnp.float32(learning_rate)
        params, state, losses = trained, optimiser(rate).init(trained), np.zeros(0)
        for checkpoint, checkpoint_key in enumerate(jax.random.split(key, checkpoints), start=1):
            params, state, part = _train(
                optimiser, steps // checkpoints, batch_size, model, params, state, rate, examples, checkpoint_key
            )
            losses = np.concatenate([losses, processes.fetch(part)])
            merged = tree.replace(model.params, params)
            found = None if score is None else score(merged)
            if best is None or (found is not None and best.accuracy is not None and found > best.accuracy):
                best = FineTuned(merged, float(learning_rate), checkpoint * (steps // checkpoints), found, losses)
    assert best is not None
    return best


def _accuracy(model: Model, validation: Sequence[Batch], params: PyTree) -> float:
    return accuracy(model.replace(params=params), validation).fraction


@partial(jax.jit, static_argnums=(0, 1, 2))
def _train(
    optimiser: Optimiser,
    steps: int,
    batch_size: int | None,
    model: Model,
    trained: dict[str, Array],
    state: optax.OptState,
    learning_rate: Float[Array, ""],
    examples: Batch,
    key: Array,
) -> tuple[dict[str, Array], optax.OptState, Float[Array, " steps"]]:
    transformation = optimiser(learning_rate)
    count = jax.tree.leaves(examples.labels)[0].shape[0]

    def loss(trained: dict[str, Array], batch: Batch) -> Float[Array, ""]:
        outputs = model.replace(params=tree.replace(model.params, trained))(batch.inputs)
        return model.loss(model.loss_params, outputs, batch.labels).mean()

    def step(carry: PyTree, step_key: Array) -> tuple[PyTree, Float[Array, ""]]:
        trained, state = carry
        batch = examples
        if batch_size is not None:
            chosen = jax.random.randint(step_key, (batch_size,), 0, count)
            batch = jax.tree.map(lambda leaf: leaf[chosen], examples)
        value, gradient = jax.value_and_grad(loss)(trained, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its integer count of steps
            updates, state = transformation.update(gradient, state, trained)
        return (optax.apply_updates(trained, updates), state), value

    (trained, state), losses = jax.lax.scan(step, (trained, state), jax.random.split(key, steps))
    return trained, state, losses
