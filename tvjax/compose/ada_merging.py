"""AdaMerging: merging coefficients that minimise the entropy of the predictions, without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax
from jaxtyping import Array

from tvjax.compose.coefficients import Blocks, init
from tvjax.compose.objectives import Scores, average, entropy, task_scores
from tvjax.compose.train import Schedule, Trained, constant, learn
from tvjax.stages import ModelLike

PyTree = Any


def ada_merging(
    params: PyTree,
    taus: Sequence[PyTree],
    tasks: Sequence[tuple[ModelLike, PyTree]],
    *,
    key: Array,
    scores: Scores = task_scores,
    blocks: Blocks = "leaf",
    start: float = 0.3,
    stacks: str | Sequence[str] = (),
    axis: int = 0,
    **options: Any,
) -> Trained:
    """Merges task vectors with the coefficients of least entropy (Yang et al., ICLR 2024, arXiv 2310.02575).

    Layer-wise with ``blocks="leaf"``, task-wise with ``"vector"``. As published: Adam, learning rate 1e-3, constant, 16
    examples of every task at each step, 500 steps, coefficients that start at 0.3.

    Args:
      params: theta_0, that of all tasks.
      taus: their task vectors.
      tasks: for each task the model with that task's head, and unlabelled inputs, the example axis first.
      key: a random key.
      scores: ``(model, outputs) -> [batch, classes]``, before the softmax.
      blocks: as for `init`.
      start: of every coefficient.
      stacks: subtrees of leaves that are stacked over layers, as for `init`: layer-wise then means their layers.
      axis: the layer axis of these.
      **options: those of `train`.

    Returns:
      The `Coefficients` and how they were found; `combine` gives the merged parameters.

    Raises:
      ValueError: as `learn`.

    >>> import jax, jax.numpy as jnp
    >>> from tvjax.stages import single_stage
    >>> model = single_stage(lambda params, x: {"logits": x @ params["w"]}, {"w": jnp.zeros((2, 2))})
    >>> taus = [{"w": jnp.array([[1.0, 0.0], [0.0, 0.0]])}, {"w": jnp.array([[0.0, 0.0], [0.0, 1.0]])}]
    >>> found = ada_merging(model.params, taus, [(model, jnp.eye(2))], key=jax.random.key(0), blocks="vector")
    >>> bool((found.trainable.values > 0.3).all())
    True
    """
    published: dict[str, Any] = {
        "learning_rates": (1e-3,), "schedule": constant, "optimiser": _adam, "epochs": 10, "batch_size": 16,
        "batches_per_epoch": 50,
    }  # fmt: skip
    objective = average([entropy(model, inputs, scores) for model, inputs in tasks])
    coefficients = init(taus, blocks=blocks, stacks=stacks, axis=axis, value=start)
    return learn(params, taus, objective, key=key, coefficients=coefficients, **{**published, **options})


def _adam(learning_rate: Schedule) -> optax.GradientTransformation:
    return optax.adam(learning_rate)
