"""The experiments of task arithmetic: addition, negation under a control, analogy, all pairs (Ilharco et al., 2023).

Scales are chosen on validation data, accuracies are measured on test data. Every function takes task vectors of ONE
pre-trained model; a benchmark is that model with the head of a task, and the
task's examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tvjax import arithmetic
from tvjax.evaluate.accuracy import accuracy
from tvjax.evaluate.scale import choose_scale, edited
from tvjax.stages import Batch, Model, PyTree

MEAN = "mean of tasks"
Merge = Callable[[Sequence[PyTree]], PyTree]


class Benchmark(NamedTuple):
    """A task, as the pre-trained model sees it.

    Attributes:
      model: the pre-trained parameters, with the head of the task.
      validation: labelled batches by which scales are chosen.
      test: labelled batches on which accuracies are measured.
    """

    model: Model
    validation: Batch | Sequence[Batch]
    test: Batch | Sequence[Batch]


class Edit(NamedTuple):
    """One edited model on one task.

    Attributes:
      operation: ``addition``, ``negation`` or ``analogy``.
      edit: which task vectors.
      measured_on: name of the task; ``mean of tasks`` for a mean.
      alpha: the scale, chosen on validation data; the mean of them where each task vector has its own.
      before: accuracy of the pre-trained model.
      after: accuracy of the edited one.
      normalised: `after` divided by the accuracy of the task's own fine-tuned model; None where there is none.
    """

    operation: str
    edit: str
    measured_on: str
    alpha: float
    before: float
    after: float
    normalised: float | None = None


def edited_accuracy(task: Benchmark, tau: PyTree | None = None, alpha: float = 1.0) -> float:
    """Accuracy of ``theta_0 + alpha tau`` on the test data of a task; of the pre-trained model without tau."""
    return accuracy(task.model if tau is None else edited(task.model, tau, alpha), task.test).fraction


def addition(
    tasks: Mapping[str, Benchmark],
    taus: Mapping[str, PyTree],
    scales: Sequence[float],
    *,
    merge: Merge | None = None,
    each: bool = False,
    name: str = "",
) -> list[Edit]:
    """One model for several tasks: absolute accuracy, and normalised by each task's own fine-tuned model.

    One scale for all task vectors is the one of the greatest mean validation accuracy. One for each is found from
    there by coordinate ascent on the same grid, until a round over the task vectors gains nothing.

    Args:
      tasks: on which the model is measured.
      taus: their own task vectors, by the same names.
      scales: the grid, such as 0 to 1 by 0.05.
      merge: list of task vectors to one; `tvjax.arithmetic.add` by default.
      each: a scale for each task vector.
      name: of the edit; the tasks joined by ``+`` by default.

    Returns:
      An edit for each task, and their mean.

    Raises:
      ValueError: tasks and task vectors of different names, or an empty grid.

    Source: Ilharco et al. 2023, arXiv 2212.04089, section 4; normalised accuracy as in its figure 3.
    """
    if set(tasks) != set(taus) or not tasks:
        raise ValueError(f"tasks {sorted(tasks)} and task vectors {sorted(taus)} must have the same names, one or more")
    merged = merge or (lambda vectors: arithmetic.add(*vectors))
    grid = [float(scale) for scale in sorted(set(scales))]
    vectors = list(taus.values())

    def validation(factors: Sequence[float]) -> float:
        tau = merged([arithmetic.scale(tau, factor) for tau, factor in zip(vectors, factors, strict=True)])
        found = [accuracy(edited(task.model, tau), task.validation).fraction for task in tasks.values()]
        return float(np.mean(found))

    together = merged(vectors)
    curves = [choose_scale(task.model, together, grid, task.validation).curve for task in tasks.values()]
    alpha = grid[int(np.mean(curves, axis=0).argmax())]
    factors = [alpha] * len(vectors)
    if each:
        factors = _ascend(validation, grid, factors)
        together, applied = merged([arithmetic.scale(t, f) for t, f in zip(vectors, factors, strict=True)]), 1.0
    else:
        applied = alpha
    rows = []
    for task_name, task in tasks.items():
        after, own = edited_accuracy(task, together, applied), edited_accuracy(task, taus[task_name])
        normalised = after / own if own else None
        before = edited_accuracy(task)
        edit = name or " + ".join(tasks)
        rows.append(Edit("addition", edit, task_name, float(np.mean(factors)), before, after, normalised))
    return [*rows, _mean(rows)]


def all_pairs(
    tasks: Mapping[str, Benchmark], taus: Mapping[str, PyTree], scales: Sequence[float], *, merge: Merge | None = None
) -> list[Edit]:
    """`addition` of every pair of tasks: the mean normalised accuracies, a row for each pair.

    Args:
      tasks: two or more.
      taus: their own task vectors, by the same names.
      scales: the grid.
      merge: as for `addition`.

    Returns:
      The mean of each pair, named ``first + second``.

    Raises:
      ValueError: fewer than two tasks, or as in `addition`.
    """
    if len(tasks) < 2:
        raise ValueError(f"pairs need two tasks or more, found {sorted(tasks)}")
    rows = []
    for pair in itertools.combinations(tasks, 2):
        both, own = {name: tasks[name] for name in pair}, {name: taus[name] for name in pair}
        rows.append(addition(both, own, scales, merge=merge)[-1])
    return rows


def negation(
    name: str,
    task: Benchmark,
    control: tuple[str, Benchmark],
    tau: PyTree,
    scales: Sequence[float],
    *,
    keep: float = 0.95,
) -> list[Edit]:
    """Forgets a task: among the scales of ``-tau`` at which the control stays, the one of the least task accuracy.

    Args:
      name: of the task.
      task: to be forgotten.
      control: name and task that must stay.
      tau: task vector of the task; it is negated here.
      scales: the grid; it must hold 0, where the control stays for sure.
      keep: share of its pre-trained validation accuracy that the control keeps at least.

    Returns:
      The edit on the task and on the control.

    Raises:
      ValueError: a share out of [0, 1], or a grid without 0.

    Source: Ilharco et al. 2023, arXiv 2212.04089, section 3.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: found {keep}, expected a share from 0 to 1")
    if 0 not in scales:
        raise ValueError(f"scales: found {list(scales)}, expected 0 among them, where the control keeps its accuracy")
    minus = arithmetic.negate(tau)
    forgotten, kept = (choose_scale(t.model, minus, scales, t.validation) for t in (task, control[1]))
    at_zero = kept.curve[int(np.argmin(np.abs(kept.scales)))]
    allowed = kept.curve >= keep * at_zero
    alpha = float(kept.scales[np.where(allowed, forgotten.curve, np.inf).argmin()])
    return [
        Edit("negation", f"- {name}", where, alpha, edited_accuracy(t), edited_accuracy(t, minus, alpha))
        for where, t in ((name, task), control)
    ]


def analogy(name: str, task: Benchmark, edits: Mapping[str, PyTree], scales: Sequence[float]) -> list[Edit]:
    """Task vectors of other tasks on a task that has none: each at the scale of its best validation accuracy.

    Args:
      name: of the task.
      task: that has no task vector of its own.
      edits: by name, such as ``tvjax.analogy(a, b, c)`` and its parts to compare with.
      scales: the grid.

    Returns:
      One edit each.

    Source: Ilharco et al. 2023, arXiv 2212.04089, section 5.
    """
    rows = []
    for edit, tau in edits.items():
        alpha = choose_scale(task.model, tau, scales, task.validation).scale
        rows.append(Edit("analogy", edit, name, alpha, edited_accuracy(task), edited_accuracy(task, tau, alpha)))
    return rows


def _ascend(score: Callable[[Sequence[float]], float], grid: Sequence[float], factors: list[float]) -> list[float]:
    best = score(factors)
    while True:
        start = best
        for number in range(len(factors)):
            for value in grid:
                trial = [*factors[:number], value, *factors[number + 1 :]]
                found = score(trial)
                if found > best:
                    best, factors = found, trial
        if best == start:
            return factors


def _mean(rows: Sequence[Edit]) -> Edit:
    normalised = [row.normalised for row in rows if row.normalised is not None]
    before, after = (float(np.mean([getattr(row, field) for row in rows])) for field in ("before", "after"))
    mean = float(np.mean(normalised)) if len(normalised) == len(rows) else None
    return rows[0]._replace(measured_on=MEAN, before=before, after=after, normalised=mean)
