"""Two models on the same examples: the difference of their accuracies, and where they agree."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tvjax.evaluate.accuracy import Predictions


class PairedDifference(NamedTuple):
    """Accuracy of one model minus that of another on the same examples.

    Attributes:
      difference: from -1 to 1.
      interval: around it.
      p_value: of McNemar's exact test that neither is better.
      only_first: examples that only the first model has right.
      only_second: examples that only the second has right.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    only_first: int
    only_second: int


class Agreement(NamedTuple):
    """How far two models predict the same.

    Attributes:
      same: share of the examples with the same prediction, right or wrong.
      both_wrong: share of the examples that both have wrong.
      same_when_both_wrong: share of those with the same prediction; None where there are none.
    """

    same: float
    both_wrong: float
    same_when_both_wrong: float | None


def paired_difference(first: Predictions, second: Predictions, confidence: float = 0.95) -> PairedDifference:
    """The difference of two accuracies on the same examples.

    The examples that both have right, or both wrong, say nothing of the difference, so it is far surer than two
    intervals side by side suggest. The interval is Wald's after one example is added to either kind that differs
    (Bonett and Price 2012, British Journal of Mathematical and Statistical Psychology 65), which holds its level for
    few examples too.

    Args:
      first: predictions of the one model.
      second: those of the other.
      confidence: of the interval.

    Raises:
      ValueError: for predictions of different examples.

    >>> labels = np.zeros(100, int)
    >>> first, second = (Predictions((np.arange(100) >= right).astype(int), labels) for right in (90, 80))
    >>> found = paired_difference(first, second)
    >>> round(found.difference, 3), [round(bound, 3) for bound in found.interval], round(found.p_value, 4)
    (0.1, [0.034, 0.162], 0.002)
    """
    from scipy import stats  # slow to import

    _check(first, second)
    n = first.labels.size
    better, worse = (int((a.right & ~b.right).sum()) for a, b in ((first, second), (second, first)))
    p, q = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    half = float(stats.norm.ppf((1 + confidence) / 2)) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    value = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return PairedDifference(
        (better - worse) / n, (max(-1.0, p - q - half), min(1.0, p - q + half)), value, better, worse
    )


def agreement(first: Predictions, second: Predictions) -> Agreement:
    """How far two models predict the same for the same examples.

    Raises:
      ValueError: for predictions of different examples.

    >>> labels = np.array([0, 0, 0, 0])
    >>> agreement(Predictions(np.array([0, 1, 1, 2]), labels), Predictions(np.array([0, 0, 1, 1]), labels))
    Agreement(same=0.5, both_wrong=0.5, same_when_both_wrong=0.5)
    """
    _check(first, second)
    same = first.predicted == second.predicted
    wrong = ~first.right & ~second.right
    return Agreement(float(same.mean()), float(wrong.mean()), float(same[wrong].mean()) if wrong.any() else None)


def _check(first: Predictions, second: Predictions) -> None:
    if not np.array_equal(first.labels, second.labels):
        raise ValueError(
            f"the predictions are for different examples ({first.labels.size} and {second.labels.size} labels, which "
            "are not the same): evaluate both models on the same images"
        )
