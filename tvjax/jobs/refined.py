"""What follows a transport: the fine-tuned source teaches the target, from the moved task vector on, without labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvjax import compose
from tvjax.arithmetic import apply, scale
from tvjax.evaluate.scale import scale_of_least_loss
from tvjax.jobs import _compose
from tvjax.jobs.asking import asking, with_task
from tvjax.jobs.configs import ComposeConfig, Drawn, PlanConfig, TransportConfig
from tvjax.jobs.opened import Models, Opened
from tvjax.progress import Progress, begin
from tvjax.stages import Batch, Model, PyTree
from tvjax.tasks.base import loss_of
from tvjax.tasks.losses import ClassLoss, distilled


class Refinement(NamedTuple):
    """What refining needs, before any weight is read.

    Attributes:
      how: ``correction``, the closed form, or ``distillation``, as `tvjax compose --teacher` trains.
      config: how `tvjax compose` would teach the target.
      data: the examples, and the teacher.
    """

    how: str
    config: ComposeConfig
    data: _compose.Data


def prepare_refinement(config: TransportConfig | PlanConfig, models: Models) -> Refinement:
    """Checks the teacher and the examples as `tvjax compose --teacher` does.

    A teacher without a head of its own has that of the source.

    Raises:
      ValueError: what cannot be, naming it.
    """
    assert config.finetuned is not None and config.refine is not None
    tuned = models[config.finetuned]
    taught = ComposeConfig(
        **{name: getattr(config, name) for name in Drawn.model_fields},
        task_vectors=(models[config.target].checkpoint.folder,),  # a name
        model=config.target,
        output=config.output or models[config.target].checkpoint.folder,
        teacher=config.finetuned,
        teacher_base=None if asking(tuned).labels(tuned) is not None else config.source,
        validation=config.validation,
        batch_size=config.batch_size,
    )
    return Refinement(config.refine, taught, _compose.read(taught, models[config.target], models))


def refine(
    ready: Refinement, target: Opened, moved: PyTree, scales: tuple[float, ...], progress: Progress | None
) -> tuple[PyTree, dict[str, Any]]:
    """Teaches the target, from the moved task vector at the scale of its least distillation loss.

    Args:
      ready: of `prepare_refinement`.
      target: the target.
      moved: the moved task vector.
      scales: the grid.
      progress: called when a part begins, and after every epoch of a training.

    Returns:
      The parameters of the target; and for a report the scale of the start, and what was done.
    """
    config, data = ready.config, ready.data
    assert data.teacher is not None
    task = asking(target).task(target, data.found, data.prompts)
    head, batches = with_task(target, task), list(task.batches(data.found, config.batch_size))
    begin(progress, "asking the teacher")
    said = data.teacher.scores(data.found, data.prompts, config.batch_size)
    start = scale_of_least_loss(_learning(head), moved, scales, _told(batches, said))
    about = {"by": ready.how, "teacher": config.teacher, "examples": len(data.found), "loss_of_start": start.loss}
    score = _compose.score_on(config, task, head, data.held_out)
    begin(progress, ready.how)
    if ready.how == "correction":
        edit = partial(_added, compose.logit_correction(head, said, batches, start=scale(moved, start.scale)))
    else:
        seen = task.batches(data.found, config.batch_size).whole()
        first = compose.init([moved], names=[config.model])
        at_start = dataclasses.replace(first, values=jnp.full_like(first.values, start.scale))
        goal = compose.distillation(head, seen.inputs, said)
        trained = compose.tune(
            head.params, [moved], goal, key=jax.random.key(config.seed), coefficients=at_start, score=score,
            learning_rates=config.rates, epochs=config.epochs, batch_size=config.batch_size, progress=progress,
        )  # fmt: skip
        about |= {"learning_rate": trained.learning_rate, "epochs": trained.epochs}
        edit = partial(_combined, trained.trainable, moved)
    begin(progress, "asking the taught model")
    taught = edit(head.params)
    scores = compose.class_scores(head.replace(params=taught), batches)
    losses = compose.distillation_losses(jnp.asarray(scores), jnp.asarray(said))
    about |= {"loss": float(losses.mean()), "accuracy": None if score is None else score(taught)}
    return edit(target.pretrained.params), {"scale": start.scale, "refined": about}


def _added(change: PyTree, params: PyTree) -> PyTree:
    return apply(params, change)


@jax.jit
def _combined(tuned: compose.Tuned, moved: PyTree, params: PyTree) -> PyTree:
    return tuned.combine(params, [moved])


def _learning(head: Model) -> Model:
    """The target with the loss that learns from a teacher's scores."""
    loss = loss_of(head)
    assert isinstance(loss, ClassLoss)  # what can be taught has classes
    return head.replace(loss=distilled(loss))


def _told(batches: Iterable[Batch], said: np.ndarray) -> list[Batch]:
    """The batches with what the teacher says of them as their labels."""
    sizes = [jax.tree.leaves(batch.inputs)[0].shape[0] for batch in batches]
    parts = np.split(said, np.cumsum(sizes)[:-1])
    return [Batch(batch.inputs, part) for batch, part in zip(batches, parts, strict=True)]
