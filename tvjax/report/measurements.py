"""Measurements of methods, and how sure a difference between two methods is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Measurement(NamedTuple):
    """One accuracy on test images.

    Attributes:
      task: name of the task.
      target: name of the model that was edited.
      method: name of the method.
      labels_per_class: labelled training examples of each class that the method read; 0 for none.
      draw: number of the draw of these examples.
      alpha: scale of the task vector.
      accuracy: fraction of the test images.
    """

    task: str
    target: str
    method: str
    labels_per_class: int
    draw: int
    alpha: float
    accuracy: float


class Difference(NamedTuple):
    """The mean of paired differences with its interval.

    Attributes:
      mean: of the differences.
      half_width: of the interval; None where there is one difference only.
      pairs: how many differences.
    """

    mean: float
    half_width: float | None
    pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


class Comparison(NamedTuple):
    """One method against another on one target.

    Attributes:
      target: name of the model that was edited.
      method: the one.
      baseline: the other.
      over_pairs: method minus baseline over pairs of one task and one draw.
      over_tasks: the same over tasks, the draws of a task averaged first.
    """

    target: str
    method: str
    baseline: str
    over_pairs: Difference
    over_tasks: Difference


def paired_difference(differences: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Difference:
    """The mean of paired differences and Student's t interval around it, ``mean +- t s / sqrt(n)``.

    Args:
      differences: one for each pair.
      confidence: of the interval.

    Raises:
      ValueError: for no differences.

    >>> difference = paired_difference([0.1, 0.2, 0.3])
    >>> round(difference.mean, 3), round(difference.half_width, 3), difference.is_clear
    (0.2, 0.248, False)
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(
            f"differences: found shape {values.shape}, expected one number for each pair, and a pair at least"
        )
    if values.size == 1:
        return Difference(float(values[0]), None, 1)
    half_width = stats.t.interval(confidence, values.size - 1)[1] * stats.sem(values)  # which may be 0
    return Difference(float(values.mean()), float(half_width), values.size)


def compare(measurements: Iterable[Measurement], target: str, method: str, baseline: str) -> Comparison:
    """Method minus baseline on one target, paired by task and draw.

    Pairs of one task share its test images and its model, so an interval over pairs of tasks and draws speaks of these
    tasks; the one over tasks, wider where tasks are few, of tasks like them.

    Raises:
      ValueError: where the two were not measured on the same tasks and draws.

    >>> found = [Measurement("t", "B", method, 0, 0, 1.0, value) for method, value in (("a", 0.5), ("b", 0.75))]
    >>> compare(found, "B", "b", "a").over_pairs
    Difference(mean=0.25, half_width=None, pairs=1)
    """
    found: dict[str, dict[tuple[str, int], float]] = {method: {}, baseline: {}}
    for m in measurements:
        if m.target == target and m.method in found:
            found[m.method][m.task, m.draw] = m.accuracy
    if not found[method] or found[method].keys() != found[baseline].keys():
        raise ValueError(
            f"{method} and {baseline} on {target} cannot be paired: {len(found[method])} and {len(found[baseline])} "
            "measurements; both need the same tasks and draws"
        )
    by_task: dict[str, list[float]] = {}
    for pair, value in found[method].items():
        by_task.setdefault(pair[0], []).append(value - found[baseline][pair])
    return Comparison(
        target,
        method,
        baseline,
        paired_difference([value for values in by_task.values() for value in values]),
        paired_difference([float(np.mean(values)) for values in by_task.values()]),
    )


def in_order(values: Iterable[str]) -> tuple[str, ...]:
    """Distinct names in the order of their first appearance.

    >>> in_order("abac")
    ('a', 'b', 'c')
    """
    return tuple(dict.fromkeys(values))


def accuracies(measurements: Iterable[Measurement], target: str, method: str) -> dict[str, np.ndarray]:
    """For each task the accuracies of a method on a target, by draw."""
    found: dict[str, list[float]] = {}
    for m in measurements:
        if (m.target, m.method) == (target, method):
            found.setdefault(m.task, []).append(m.accuracy)
    return {task: np.array(values) for task, values in found.items()}
