"""The methods, on one draw of one task on one pair of models.

Where a name says nothing else, a setting is chosen by the validation texts; Theseus and BiCo are fitted on the few
labelled texts, and a teacher, the fine-tuned source, and Ariadne read the unlabelled ones. "few texts": they read the
few instead, without their labels. "no labels": scale, rate and number of steps are those of the teacher's least loss on
the texts that are read. A start from Ariadne always has such a scale, and the closed form has nothing to choose.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import tvjax as tv
from real import protocol
from real.experiment import Bench, Reader
from real.taught import Student, Taught
from tvjax import tree
from tvjax.compose import constant
from tvjax.evaluate.accuracy import accuracy, predictions
from tvjax.evaluate.fine_tune import FineTuned
from tvjax.evaluate.scale import ChosenScale
from tvjax.stages import Model, PyTree


class Result(NamedTuple):
    """What a method arrived at.

    Attributes:
      right: ``[test texts]``, whether each is classified rightly.
      validation: the accuracy by which its setting was chosen; None where there is nothing to choose.
      setting: what was chosen.
      seconds: that it took.
    """

    right: np.ndarray
    validation: float | None
    setting: dict[str, float]
    seconds: float


class Found(NamedTuple):
    """What a method arrives at.

    Attributes:
      reader: the model that it edits.
      params: its parameters.
      validation: the accuracy by which the setting was chosen; None where there is nothing to choose.
      setting: what was chosen.
    """

    reader: Reader
    params: PyTree
    validation: float | None = None
    setting: dict[str, Any] = {}


Method = Callable[[Bench], Found]


def _at(bench: Bench, moved: PyTree, chosen: ChosenScale) -> Found:
    """A transported task vector at one scale."""
    params = tv.apply(bench.target.model.params, moved, chosen.scale)
    return Found(bench.target, params, chosen.accuracy, {"scale": chosen.scale, "curve": chosen.curve.tolist()})


def _transported(transport: Callable[[], tv.Transport], shuffled: bool = False) -> Method:
    def method(bench: Bench) -> Found:
        moved = bench.moved(transport(), bench.shuffled if shuffled else bench.pairs)
        return _at(bench, moved, bench.scale_of(moved))

    return method


def _of(reader: Reader, tuned: FineTuned) -> Found:
    setting = {"learning_rate": tuned.learning_rate, "steps": tuned.steps}
    return Found(reader, tuned.params, tuned.accuracy, setting)


def _few_shot(bench: Bench, start: Model) -> Found:
    return _of(bench.target, bench.tuned(bench.target, start, bench.few, protocol.FEW))


def _corrected(bench: Bench, texts: Taught, start: PyTree = None) -> Found:
    return Found(bench.target, texts.corrected(start))


def _of_student(bench: Bench, one: Student, labels: bool) -> Found:
    setting = {"learning_rate": one.learning_rate, "steps": one.steps}
    return Found(bench.target, one.params, one.validation if labels else None, setting | {"loss": one.loss})


def _least_loss(bench: Bench, texts: Taught, moved: PyTree) -> Found:
    """A transported task vector at the scale of the teacher's least loss."""
    chosen = texts.scale_of(moved)
    params = bench.started(tv.scale(moved, chosen.scale)).params
    return Found(bench.target, params, None, {"scale": chosen.scale, "losses": chosen.curve.tolist()})


def _by_ariadne_and_teacher(suffix: str, of: Callable[[Bench], Taught]) -> dict[str, Method]:
    """The methods that read texts without their labels; of those with a choice, by validation and without labels."""
    return {
        f"Ariadne{suffix}": lambda b: _at(b, of(b).ariadne, b.scale_of(of(b).ariadne)),
        f"Ariadne{suffix}, no labels": lambda b: _least_loss(b, of(b), of(b).ariadne),
        f"logit correction{suffix}": lambda b: _corrected(b, of(b)),
        f"BiCo, centred, then logit correction{suffix}": lambda b: _corrected(b, of(b), b.start),
        f"Ariadne, then logit correction{suffix}": lambda b: _corrected(b, of(b), of(b).start),
        f"distillation{suffix}": lambda b: _of_student(b, of(b).from_zero.by_validation, True),
        f"distillation{suffix}, no labels": lambda b: _of_student(b, of(b).from_zero.by_loss, False),
        f"BiCo, centred, then distillation{suffix}": lambda b: _of_student(b, of(b).from_bico.by_validation, True),
        f"Ariadne, then distillation{suffix}": lambda b: _of_student(b, of(b).from_ariadne.by_validation, True),
        f"Ariadne, then distillation{suffix}, no labels": lambda b: _of_student(b, of(b).from_ariadne.by_loss, False),
    }


def _with_coefficients(bench: Bench) -> Found:
    """Coefficients of the leaves of BiCo's vector and the leaves of the target, trained at once."""
    model, taus = bench.target.model, [bench.bico]
    paths = list(tree.flatten(model.params))
    trained = tv.compose.tune(
        model.params,
        taus,
        tv.compose.few_shot(model, bench.few),
        key=bench.key,
        coefficients=tv.compose.init(taus, value=bench.bico_chosen.scale),
        leaves=[path for pattern in protocol.TRAINED for path in tree.match(paths, pattern)],
        share=protocol.SHARE,
        learning_rates=[rate / protocol.SHARE for rate in protocol.RATES],
        epochs=protocol.CHECKPOINTS,
        batch_size=protocol.FEW.size,
        batches_per_epoch=protocol.FEW.steps // protocol.CHECKPOINTS,
        schedule=constant,
        score=lambda params: accuracy(model.replace(params=params), bench.validation).fraction,
    )
    setting = {
        "learning_rate": protocol.SHARE * trained.learning_rate,
        "steps": trained.epochs * protocol.FEW.steps // protocol.CHECKPOINTS,
    }
    return Found(bench.target, trained.trainable.combine(model.params, taus), trained.score, setting)


METHODS: dict[str, Method] = {
    "source, zero-shot": lambda bench: Found(bench.source, bench.source.model.params),
    "source, fine-tuned": lambda bench: _of(bench.source, bench.with_many_labels(bench.source)),
    "zero-shot": lambda bench: Found(bench.target, bench.target.model.params),
    "Theseus": _transported(tv.theseus),
    "Theseus, no labels": lambda b: _least_loss(b, b.few_taught, b.moved(tv.theseus(), b.pairs)),
    "Theseus, centred": _transported(partial(tv.theseus, center=True)),
    "BiCo": _transported(tv.bico),
    "BiCo, centred": lambda bench: _at(bench, bench.bico, bench.bico_chosen),
    "BiCo, centred, then GradFix": _transported(lambda: tv.chain(tv.bico(center=True), tv.gradfix())),
    "BiCo, centred, texts shuffled": _transported(partial(tv.bico, center=True), shuffled=True),
    "few-shot": lambda bench: _few_shot(bench, bench.target.model),
    "BiCo, centred, then few-shot": lambda bench: _few_shot(bench, bench.started(bench.start)),
    "BiCo, centred, coefficients and few-shot": _with_coefficients,
    **_by_ariadne_and_teacher(", few texts", lambda bench: bench.few_taught),
    **_by_ariadne_and_teacher("", lambda bench: bench.taught),
    "own fine-tuning": lambda bench: _of(bench.target, bench.with_many_labels(bench.target)),
}


def zero_of(method: str) -> str | None:
    """The method with the same budget that starts from the target as it is.

    >>> zero_of("Ariadne, then distillation, few texts"), zero_of("few-shot")
    ('distillation, few texts', None)
    """
    found = method.partition(", then ")[2]
    return found if found in METHODS else None


def run(bench: Bench, method: str) -> Result:
    """Measures one method of `METHODS` on the test texts."""
    began = time.perf_counter()
    found = METHODS[method](bench)
    model = found.reader.model.replace(params=found.params)
    right = predictions(model, found.reader.batches(bench.parts.test, protocol.EVALUATION)).right
    return Result(right, found.validation, found.setting, time.perf_counter() - began)
