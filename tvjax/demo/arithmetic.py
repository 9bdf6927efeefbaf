"""Arithmetic on real images: two task vectors added, one negated under a control, and an analogy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tvjax.arithmetic import add, analogy, apply, negate, scale
from tvjax.demo.setup import BASE, Embedded, Photographs, Settings, combined, photographs, style_of
from tvjax.evaluate.accuracy import accuracy
from tvjax.evaluate.scale import choose_scale
from tvjax.stages import Model, PyTree


class Edit(NamedTuple):
    """One edited model on the test images of one style.

    Attributes:
      operation: ``addition``, ``negation`` or ``analogy``.
      edit: which task vectors.
      measured_on: the style; ``mean of tasks`` for a mean.
      alpha: the scale, chosen on validation images.
      before: accuracy of the pre-trained model.
      after: accuracy of the edited one.
      normalised: `after` divided by the accuracy of the style's own fine-tuned model; None where there is none.
    """

    operation: str
    edit: str
    measured_on: str
    alpha: float
    before: float
    after: float
    normalised: float | None = None


def addition(source: Embedded, images: dict[str, Photographs], settings: Settings) -> list[Edit]:
    """Each of the first two tasks alone, and both added, on both: absolute and normalised accuracy.

    The scale is that of the greatest mean validation accuracy (Ilharco et al. 2023, section 4).
    """
    tasks = settings.tasks[:2]
    taus = {task: source.taus[task] for task in tasks}
    taus[" + ".join(tasks)] = add(*taus.values())
    before, own = (
        {task: _test(_edited(source.model, tau), images[task]) for task, tau in edits.items()}
        for edits in (dict.fromkeys(tasks), {task: source.taus[task] for task in tasks})
    )
    edits = []
    for name, tau in taus.items():
        curves = [choose_scale(source.model, tau, settings.unit_scales, images[task].validation) for task in tasks]
        alpha = float(curves[0].scales[np.mean([c.curve for c in curves], axis=0).argmax()])
        after = {task: _test(_edited(source.model, tau, alpha), images[task]) for task in tasks}
        rows = [Edit("addition", name, t, alpha, before[t], after[t], after[t] / own[t]) for t in tasks]
        means = (float(np.mean([getattr(r, field) for r in rows])) for field in ("before", "after", "normalised"))
        edits += [*rows, Edit("addition", name, "mean of tasks", alpha, *means)]
    return edits


def negation(source: Embedded, images: dict[str, Photographs], settings: Settings) -> list[Edit]:
    """The first task negated: forgotten, while the control, the style of the pre-training, is kept.

    Among the scales at which the control keeps its share (0.95) of its pre-trained validation accuracy, the one of the
    least validation accuracy on the task (Ilharco et al. 2023, section 3).
    """
    task = settings.tasks[0]
    tau = negate(source.taus[task])
    curves = {
        name: choose_scale(source.model, tau, settings.unit_scales, images[name].validation) for name in (BASE, task)
    }
    control = curves[BASE].curve
    kept = control >= settings.control * control[0]
    alpha = float(curves[BASE].scales[np.where(kept, curves[task].curve, np.inf).argmin()])
    edited = _edited(source.model, tau, alpha)
    return [
        Edit("negation", f"- {task}", name, alpha, _test(source.model, images[name]), _test(edited, images[name]))
        for name in (task, BASE)
    ]


def analogies(source: Embedded, settings: Settings) -> list[Edit]:
    """Photographs of two styles at once, never trained on: plain is to the second task as the first task is to both.

    The model is fine-tuned on plain photographs from the start, so their task vector is zero.
    """
    first, second = settings.tasks[:2]
    name = f"{first} and {second}"
    images = photographs(name, combined(style_of(first), style_of(second)), settings)
    tau_c, tau_b = source.taus[first], source.taus[second]
    edits = {first: tau_c, second: tau_b, f"{first} + ({second} - {BASE})": analogy(scale(tau_b, 0.0), tau_b, tau_c)}
    before = _test(source.model, images)
    rows = []
    for edit, tau in edits.items():
        alpha = choose_scale(source.model, tau, settings.unit_scales, images.validation).scale
        rows.append(Edit("analogy", edit, name, alpha, before, _test(_edited(source.model, tau, alpha), images)))
    return rows


def _edited(model: Model, tau: PyTree, alpha: float = 1.0) -> Model:
    return model.replace(params=apply(model.params, tau, alpha))


def _test(model: Model, images: Photographs) -> float:
    return accuracy(model, images.test).fraction
