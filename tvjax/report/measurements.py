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
      over_examples: the same over the test examples of these tasks, which one draw can support; None of several draws.
    """

    target: str
    method: str
    baseline: str
    over_pairs: Difference
    over_tasks: Difference
    over_examples: Difference | None = None


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


def difference_over_examples(
    right: Sequence[np.ndarray], baseline: Sequence[np.ndarray], confidence: float = 0.95
) -> Difference:
    """The mean over tasks of the paired difference of two accuracies, and its interval over test examples.

    The tasks are given, their examples are drawn: ``mean_t mean(d_t) +- z sqrt(sum_t var(d_t) / n_t) / T``, d the
    difference of one example. It says nothing of other tasks or other draws of the calibration examples.

    Args:
      right: for each task ``[n_t]``, whether the method has each example right, or in what share of its repeats.
      baseline: the same of the baseline, on the same examples.
      confidence: of the interval.

    Raises:
      ValueError: for no task, or other examples of the two.

    >>> right = np.array([True] * 80 + [False] * 20)
    >>> found = difference_over_examples([right], [~right])
    >>> round(found.mean, 2), round(found.half_width, 3), found.pairs
    (0.6, 0.158, 100)
    """
    if not right or [len(one) for one in right] != [len(one) for one in baseline]:
        raise ValueError(
            f"found tasks of {[len(one) for one in right]} and {[len(one) for one in baseline]} examples, expected the "
            "same examples of one task at least"
        )
    gaps = [np.asarray(one, np.float64) - other for one, other in zip(right, baseline, strict=True)]
    error = np.sqrt(sum(gap.var(ddof=1) / gap.size for gap in gaps)) / len(gaps)
    mean = np.mean([gap.mean() for gap in gaps])
    half_width = stats.norm.ppf((1 + confidence) / 2) * error
    return Difference(float(mean), float(half_width), sum(gap.size for gap in gaps))


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
