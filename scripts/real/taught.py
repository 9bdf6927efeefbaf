"""What follows from the fine-tuned source's scores of texts that have no labels, and from Ariadne on the same texts."""

from __future__ import annotations

from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

import tvjax as tv
from real import protocol
from tvjax.compose import class_scores, distillation_losses
from tvjax.evaluate.accuracy import accuracy
from tvjax.evaluate.scale import LeastLoss, scale_of_least_loss
from tvjax.stages import Batch, PyTree
from tvjax.tasks.losses import distilled
from tvjax.tasks.zero_shot import ZERO_SHOT

if TYPE_CHECKING:
    from real.experiment import Bench


class Student(NamedTuple):
    """One rate and number of steps of distillation.

    Attributes:
      params: of the target.
      learning_rate: of the training.
      steps: of the training.
      validation: accuracy on the validation texts.
      loss: the teacher's, on the unlabelled texts.
    """

    params: PyTree
    learning_rate: float
    steps: int
    validation: float
    loss: float


class Students(NamedTuple):
    """Those of one training: the one of the greatest accuracy in validation, and the one of the least loss."""

    by_validation: Student
    by_loss: Student


class Taught:
    """A bench with a teacher on some texts; what several methods need is made once.

    Args:
      bench: the draw.
      texts: numbers of the texts, whose labels are not read.
    """

    def __init__(self, bench: Bench, texts: np.ndarray):
        self.bench, self.texts = bench, texts
        self.student = bench.target.model.replace(loss=distilled(ZERO_SHOT))

    @cached_property
    def said(self) -> np.ndarray:
        """The fine-tuned source's scores of the classes."""
        source = self.bench.source
        teacher = source.model.replace(params=self.bench.with_many_labels(source).params)
        return class_scores(teacher, source.batches(self.texts, protocol.EVALUATION))

    @cached_property
    def batches(self) -> list[Batch]:
        """The texts as the target sees them, with those scores in the place of labels."""
        own = self.bench.target.batches(self.texts, protocol.EVALUATION)
        return [Batch(batch.inputs, scores) for batch, scores in zip(own, np.split(self.said, len(own)), strict=True)]

    @cached_property
    def ariadne(self) -> PyTree:
        """The task vector as Ariadne on these texts moves it."""
        return self.bench.moved(tv.ariadne(), self.bench.as_both_see(self.texts))

    @cached_property
    def start(self) -> PyTree:
        """Ariadne's vector at the scale of the least loss: a start that needs no label."""
        return tv.scale(self.ariadne, self.scale_of(self.ariadne).scale)

    def scale_of(self, moved: PyTree) -> LeastLoss:
        """The scale of a transported task vector that has the least loss."""
        return scale_of_least_loss(self.student, moved, protocol.SCALES, self.batches)

    def loss(self, params: PyTree) -> float:
        """The teacher's loss on the texts."""
        scores = class_scores(self.student.replace(params=params), self.batches)
        return float(distillation_losses(jnp.asarray(scores), jnp.asarray(self.said)).mean())

    @cached_property
    def from_zero(self) -> Students:
        """Distillation into the target as it is."""
        return self._distilled(self.student.params)

    @cached_property
    def from_ariadne(self) -> Students:
        """Distillation from Ariadne's vector."""
        return self._distilled(self.bench.started(self.start).params)

    @cached_property
    def from_bico(self) -> Students:
        """Distillation from BiCo's vector, of the few texts with labels."""
        return self._distilled(self.bench.started(self.bench.start).params)

    def _distilled(self, params: PyTree) -> Students:
        bench, count = self.bench, protocol.CHECKPOINTS
        steps = [(1 + part) * protocol.TEACHER.steps // count for part in range(count)]
        settings = product(protocol.RATES, steps)  # as `fine_tune` goes through them
        best: dict[str, Student] = {}

        def score(params: PyTree) -> float:
            right = accuracy(self.student.replace(params=params), bench.validation).fraction
            one = Student(params, *next(settings), right, self.loss(params))
            if not best or one.validation > best["by_validation"].validation:
                best["by_validation"] = one
            if "by_loss" not in best or one.loss < best["by_loss"].loss:
                best["by_loss"] = one
            return one.validation

        seen = Batch(bench.target.inputs(self.texts), jnp.asarray(self.said))
        bench.tuned(bench.target, self.student.replace(params=params), seen, protocol.TEACHER, score=score)
        return Students(**best)

    def corrected(self, start: PyTree = None) -> PyTree:
        """The target by the closed form, from a task vector on."""
        model, own = self.bench.target.model, self.bench.target.batches(self.texts, protocol.CALIBRATION)
        return self.bench.started(tv.logit_correction(model, self.said, own, start=start)).params
