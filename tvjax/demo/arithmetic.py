"""Arithmetic on real images: task vectors added, one negated under a control, and an analogy."""

from __future__ import annotations

from tvjax.arithmetic import analogy, scale
from tvjax.demo.base import Embedded, Sets
from tvjax.demo.setup import BASE, Settings, combined, photographs, style_of
from tvjax.evaluate import protocols
from tvjax.evaluate.protocols import Benchmark, Edit


def addition(source: Embedded, images: dict[str, Sets], settings: Settings) -> list[Edit]:
    """Each of the first two tasks alone, and both added, on both."""
    names = settings.tasks[:2]
    tasks = {name: _task(source, images[name]) for name in names}
    own = {name: source.taus[name] for name in names}
    edits = []
    for name in names:
        alone = protocols.addition(tasks, own, settings.unit_scales, merge=_only(names.index(name)), name=name)
        edits += alone
    return [*edits, *protocols.addition(tasks, own, settings.unit_scales)]


def negation(source: Embedded, images: dict[str, Sets], settings: Settings) -> list[Edit]:
    """The first task negated: forgotten, while the control, the style of the pre-training, is kept."""
    name = settings.tasks[0]
    task, control = (_task(source, images[style]) for style in (name, BASE))
    grid = settings.unit_scales
    return protocols.negation(name, task, (BASE, control), source.taus[name], grid, keep=settings.control)


def analogies(source: Embedded, settings: Settings) -> list[Edit]:
    """Sets of two styles at once, never trained on: plain is to the second task as the first task is to both.

    The model is fine-tuned on plain photographs from the start, so their task vector is zero.
    """
    first, second = settings.tasks[:2]
    name = f"{first} and {second}"
    images = photographs(name, combined(style_of(first), style_of(second)), settings)
    tau_c, tau_b = source.taus[first], source.taus[second]
    edits = {first: tau_c, second: tau_b, f"{first} + ({second} - {BASE})": analogy(scale(tau_b, 0.0), tau_b, tau_c)}
    return protocols.analogy(name, _task(source, images), edits, settings.unit_scales)


def _task(source: Embedded, images: Sets) -> Benchmark:
    return Benchmark(source.model, images.validation, images.test)


def _only(number: int) -> protocols.Merge:
    return lambda taus: taus[number]
