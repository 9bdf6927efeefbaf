"""The methods, each with all candidates of its settings, on one task and target of a set of embedded models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import tvjax as tv
from carry.models import Models
from compare_few_shot import RATES as TUNE_RATES
from compare_few_shot import SHARE, adam, edited, leaves_of
from tvjax import tree
from tvjax.compose import Trained, best_start, class_scores, distillation, few_shot, learn, train, tune
from tvjax.compose.objectives import Objective
from tvjax.compose.teachers import distillation_losses
from tvjax.data.batches import take
from tvjax.demo.base import draw_examples, named_key
from tvjax.evaluate.accuracy import predict
from tvjax.stages import Batch, PyTree

RATES, EPOCHS, STEPS, BATCH = (3e-4, 1e-3, 3e-3), 5, 20, 50
DEFAULTS = ([1e-3, float(EPOCHS)], [0.1, float(EPOCHS)])  # rate and epoch, of leaves and coefficients, unless chosen
FACTORS = (5.0, 10.0, 20.0)  # of one-hot labels, in the place of a teacher's logits


class Candidate(NamedTuple):
    """One setting of a method, measured.

    Attributes:
      setting: scale, or rate and epoch, or factor; empty where there is nothing to set.
      loss: the teacher's cross-entropy on the unlabelled examples.
      validation: accuracy.
      test: accuracy; None where no column chooses the candidate.
    """

    setting: list[float]
    loss: float
    validation: float
    test: float | None


def chosen(candidates: list[Candidate], labels: int) -> Candidate:
    """The candidate that counts in a column of so many labels."""
    by = [one.validation for one in candidates] if labels else [-one.loss for one in candidates]
    return candidates[int(np.argmax(by))]


def as_given(candidates: list[Candidate], labels: int = 0) -> Candidate:
    """The candidate that the commands take where nothing chooses, of `DEFAULTS`."""
    return next(one for one in candidates if one.setting in DEFAULTS)


class Bench:
    """One task on one target with so many examples and labels of a draw; what several methods need is made once."""

    def __init__(self, models: Models, target: str, task: str, draw: int, labels: int, unlabelled: int):
        self.source, self.target = models.load(models.sources[target], task), models.load(target, task)
        self.task, self.sets, self.settings = task, models.examples(target, task), models.settings
        self.model, self.tau = self.target.model, self.source.taus[task]
        self.few = self._drawn(draw, labels or self.settings.labels_per_class)  # the more hold the fewer
        self.inputs = self._some(draw, unlabelled)
        self.key = named_key(self.settings.seed + draw, f"carry {task}")

    def _indices(self, draw: int, labels: int) -> np.ndarray:
        numbered = Batch(np.arange(len(self.sets.pool.labels)), self.sets.pool.labels)
        settings = dataclasses.replace(self.settings, labels_per_class=labels)
        return np.asarray(draw_examples(numbered, self.task, draw, settings).inputs)

    def _drawn(self, draw: int, labels: int) -> Batch:
        few = take(self.sets.pool, self._indices(draw, labels))
        return Batch(jax.tree.map(jnp.asarray, few.inputs), jnp.asarray(few.labels))

    def _some(self, draw: int, count: int) -> PyTree:
        """So many examples of the pool, those that have labels and then others; all where there are no more."""
        pool = self.sets.pool
        if count < len(pool.labels):
            labelled = self._indices(draw, self.settings.labels_per_class)
            others = np.setdiff1d(np.arange(len(pool.labels)), labelled)
            key = named_key(self.settings.seed + draw, f"unlabelled {self.task}")
            drawn = np.asarray(jax.random.permutation(key, others))[: count - len(labelled)]
            pool = take(pool, np.concatenate([labelled, drawn]))
        return jax.tree.map(jnp.asarray, pool.inputs)

    @cached_property
    def unlabelled(self) -> list[Batch]:
        """The examples, 50 at once."""
        count = jax.tree.leaves(self.inputs)[0].shape[0]
        starts = range(0, count, BATCH)
        return [Batch(jax.tree.map(lambda leaf: leaf[at : at + BATCH], self.inputs), None) for at in starts]  # noqa: B023

    @cached_property
    def teacher(self) -> np.ndarray:
        """The scores of the fine-tuned source."""
        model = self.source.model
        return class_scores(model.replace(params=tv.apply(model.params, self.tau)), self.unlabelled)

    # -- measuring: the test is looked at for what a column chooses, and for nothing else --------------------------

    def accuracy(self, params: PyTree, batches: Batch | Sequence[Batch]) -> float:
        """The accuracy of edited parameters."""
        model, several = self.model.replace(params=params), [batches] if isinstance(batches, Batch) else batches
        return float(np.concatenate([np.asarray(predict(model, one.inputs)) == one.labels for one in several]).mean())

    def tried(self, params: PyTree, *setting: float) -> Candidate:
        """Edited parameters, all but the test."""
        loss = distillation_losses(class_scores(self.model.replace(params=params), self.unlabelled), self.teacher)
        validation = self.accuracy(params, self.sets.validation)
        return Candidate([*map(float, setting)], float(loss.mean()), validation, None)

    def tested(self, tried: Iterable[tuple[PyTree, Candidate]]) -> list[Candidate]:
        """The candidates, with the test of those that a column chooses."""
        everything = list(tried)
        candidates = [candidate for _, candidate in everything]
        kept = [chosen(candidates, labels).setting for labels in (0, 1)] + [*DEFAULTS]
        return [
            candidate._replace(test=self.accuracy(params, self.sets.test)) if candidate.setting in kept else candidate
            for params, candidate in everything
        ]

    def measured(self, params: PyTree, *setting: float) -> list[Candidate]:
        """Edited parameters, and nothing to choose."""
        return self.tested([(params, self.tried(params, *setting))])

    def scaled(self, tau: PyTree, grid: tuple[float, ...] = ()) -> list[Candidate]:
        """A task vector at every scale, of the grid for what is rotated unless another is given."""
        grid = grid or self.settings.rotation_scales
        scales = [(edited(self.model.params, tau, scale), scale) for scale in grid]
        return self.tested((params, self.tried(params, scale)) for params, scale in scales)

    # -- transports --------------------------------------------------------------------------------------------------

    def moved(self, transport: tv.Transport, batches: list[Batch]) -> PyTree:
        """The task vector, as a transport moves it that is fitted on batches."""
        given = {"tau": self.tau} if transport.needs_task_vector else {}
        return transport.apply(tv.fit(transport, self.source.model, self.model, batches, **given), self.tau)

    @cached_property
    def bico(self) -> PyTree:
        """BiCo's vector, of the labelled examples, with centred rows as `tvjax transport` takes it."""
        return self.moved(tv.bico(center=True), [self.few])

    @cached_property
    def theseus(self) -> PyTree:
        """The vector of Theseus, of the unlabelled examples."""
        return self.moved(tv.theseus(), self.unlabelled)

    @cached_property
    def ariadne(self) -> PyTree:
        """Ariadne's vector, of the unlabelled examples."""
        return self.moved(tv.ariadne(), self.unlabelled)

    def start(self, tau: PyTree) -> PyTree:
        """A task vector times the scale of its least distillation loss."""
        grid = self.settings.rotation_scales
        scaled = [self.model.replace(params=edited(self.model.params, tau, scale)) for scale in grid]
        losses = [distillation_losses(class_scores(m, self.unlabelled), self.teacher).mean() for m in scaled]
        return tv.scale(tau, grid[int(np.argmin(losses))])

    # -- what a training is for --------------------------------------------------------------------------------------

    @cached_property
    def labels(self) -> Objective:
        """The labels of the few."""
        return few_shot(self.model, self.few)

    @cached_property
    def told(self) -> Objective:
        """The teacher's scores of the unlabelled examples."""
        return distillation(self.model, self.inputs, self.teacher)

    def every(
        self, training: Callable[..., Trained], objective: Objective, rates: tuple[float, ...]
    ) -> list[Candidate]:
        """Every rate and epoch of a training."""
        found: list[tuple[PyTree, Candidate]] = []

        def score(params: PyTree) -> float:
            rate, epoch = divmod(len(found), EPOCHS)
            found.append((params, self.tried(params, rates[rate], epoch + 1)))
            return found[-1][1].validation

        training(
            objective=objective, key=self.key, learning_rates=rates, epochs=EPOCHS, batches_per_epoch=STEPS,
            batch_size=min(BATCH, max(term.count for term in objective)), score=score,
        )  # fmt: skip
        return self.tested(found)

    def trained(self, objective: Objective, tau: PyTree = None) -> list[Candidate]:
        """Adam on what the task vectors cover, from the target or from a start."""
        params = self.model.params if tau is None else tv.apply(self.model.params, tau)
        leaves = leaves_of(params, self.settings)
        return self.every(partial(train, tree.replace, params, leaves, optimiser=adam), objective, RATES)

    def composed(self, training: Callable[..., Trained], objective: Objective, taus: list[PyTree]) -> list[Candidate]:
        """Coefficients of transports, and leaves too by `tune`, from the best one at its best scale."""
        params = self.model.params
        options = {} if training is learn else {"leaves": self.settings.trainable, "share": SHARE}
        begin = best_start(params, taus, objective, key=self.key)
        rates = TUNE_RATES["coefficients" if training is learn else "both"]
        return self.every(partial(training, params, taus, coefficients=begin, **options), objective, rates)

    # -- closed forms ------------------------------------------------------------------------------------------------

    def corrected(self, tau: PyTree = None) -> list[Candidate]:
        """The closed form from the teacher's logits, from the target or from a start."""
        change = tv.logit_correction(self.model, self.teacher, self.unlabelled, start=tau)
        return self.measured(tv.apply(self.model.params, change))

    def corrected_by_labels(self) -> list[Candidate]:
        """The closed form with labels alone."""
        found = []
        for factor in FACTORS:
            wanted = factor * jax.nn.one_hot(self.few.labels, self.teacher.shape[1])
            params = tv.apply(self.model.params, tv.logit_correction(self.model, wanted, self.few))
            found.append((params, self.tried(params, factor)))
        return self.tested(found)


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
      run: its candidates.
      labels: whether it reads labels.
      more: whether it reads unlabelled examples, so that more of them change it.
      one_shape: whether it needs a target of the source's shape.
      few: whether it is measured with 1 and 10 labels a class too.
      late: whether it is measured after the others of a draw.
      is_training: whether its candidates are rates and epochs, `DEFAULTS` among them.
      zero: what starts from a transport: the method with the same budget that starts from the target as it is.
    """

    run: Callable[[Bench], list[Candidate]]
    labels: bool = False
    more: bool = False
    one_shape: bool = False
    few: bool = False
    late: bool = False
    is_training: bool = False
    zero: str | None = None


_FEW_SHOT, _CORRECTION, _DISTILLATION = "few-shot fine-tuning", "logit correction, teacher", "distillation"
_BOTH = "few-shot and distillation at once"
BASELINES = ("zero-shot", _FEW_SHOT)
METHODS: dict[str, Method] = {
    "zero-shot": Method(lambda b: b.measured(b.model.params)),
    "copy": Method(lambda b: b.scaled(b.tau, b.settings.unit_scales), one_shape=True),
    "GradFix": Method(
        lambda b: b.scaled(b.moved(tv.gradfix(), [b.few]), b.settings.unit_scales), labels=True, one_shape=True
    ),
    "Theseus": Method(lambda b: b.scaled(b.theseus), more=True),
    "BiCo": Method(lambda b: b.scaled(b.bico), labels=True, few=True),
    "BiCo and GradFix": Method(
        lambda b: b.scaled(b.moved(tv.chain(tv.bico(center=True), tv.gradfix()), [b.few])), labels=True
    ),
    "Ariadne": Method(lambda b: b.scaled(b.ariadne), more=True),
    _FEW_SHOT: Method(lambda b: b.trained(b.labels), labels=True, few=True, is_training=True),
    "logit correction, labels alone": Method(lambda b: b.corrected_by_labels(), labels=True, few=True),
    _CORRECTION: Method(lambda b: b.corrected(), more=True),
    "BiCo, then logit correction, teacher": Method(
        lambda b: b.corrected(b.start(b.bico)), labels=True, more=True, few=True, zero=_CORRECTION
    ),
    "Ariadne, then logit correction, teacher": Method(
        lambda b: b.corrected(b.start(b.ariadne)), more=True, zero=_CORRECTION
    ),
    _DISTILLATION: Method(lambda b: b.trained(b.told), more=True, is_training=True),
    "BiCo, then distillation": Method(
        lambda b: b.trained(b.told, b.start(b.bico)), labels=True, more=True, zero=_DISTILLATION, is_training=True
    ),
    "Ariadne, then distillation": Method(
        lambda b: b.trained(b.told, b.start(b.ariadne)), more=True, zero=_DISTILLATION, is_training=True
    ),
    "coefficients, labels": Method(
        lambda b: b.composed(learn, b.labels, [b.bico, b.theseus, b.ariadne]),
        labels=True,
        few=True,
        late=True,
        is_training=True,
    ),
    "coefficients, teacher": Method(
        lambda b: b.composed(learn, b.told, [b.theseus, b.ariadne]), late=True, is_training=True
    ),
    "coefficients, labels and teacher": Method(
        lambda b: b.composed(learn, b.labels + b.told, [b.bico, b.theseus, b.ariadne]),
        labels=True,
        late=True,
        is_training=True,
    ),
    _BOTH: Method(lambda b: b.trained(b.labels + b.told), labels=True, late=True, is_training=True),
    "coefficients and leaves, labels": Method(
        lambda b: b.composed(tune, b.labels, [b.bico, b.theseus, b.ariadne]),
        labels=True,
        late=True,
        zero=_FEW_SHOT,
        is_training=True,
    ),
    "coefficients and leaves, teacher": Method(
        lambda b: b.composed(tune, b.told, [b.theseus, b.ariadne]), late=True, zero=_DISTILLATION, is_training=True
    ),
    "coefficients and leaves, labels and teacher": Method(
        lambda b: b.composed(tune, b.labels + b.told, [b.bico, b.theseus, b.ariadne]),
        labels=True,
        late=True,
        zero=_BOTH,
        is_training=True,
    ),
    "own fine-tuning": Method(lambda b: b.measured(tv.apply(b.model.params, b.target.taus[b.task]))),
}
