import numpy as np
import pytest
from scipy import stats

from tvjax.evaluate.accuracy import Predictions
from tvjax.evaluate.pairs import agreement, paired_difference


def of_counts(both, first, second, neither):
    """Predictions with this many examples right for both, only the first, only the second, neither."""
    n = both + first + second + neither
    labels = np.zeros(n, np.int32)
    right = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], [both, first, second, neither], axis=0).T.astype(bool)
    return [Predictions(np.where(own, 0, 1), labels) for own in right]


def test_difference_counts_and_mcnemar():
    found = paired_difference(*of_counts(50, 9, 2, 39))
    assert found.difference == pytest.approx(0.07) and (found.only_first, found.only_second) == (9, 2)
    assert found.p_value == pytest.approx(2 * stats.binom.cdf(2, 11, 0.5))
    low, high = found.interval
    assert low < 0.07 < high
    reverse = paired_difference(*reversed(of_counts(50, 9, 2, 39)))
    assert reverse.difference == -found.difference and reverse.p_value == found.p_value
    np.testing.assert_allclose(reverse.interval, (-high, -low))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    shares, n, runs = np.array([0.55, 0.15, 0.08, 0.22]), 60, 1500
    inside = 0
    for counts in rng.multinomial(n, shares, runs):
        low, high = paired_difference(*of_counts(*counts)).interval
        inside += low <= shares[1] - shares[2] <= high
    assert 0.93 < inside / runs < 0.98


def test_pairing_is_surer_than_two_intervals():
    first, second = of_counts(700, 30, 10, 260)
    low, high = paired_difference(first, second).interval
    (a, b), (c, d) = first.accuracy.interval(), second.accuracy.interval()
    assert low > 0 and b > c and a < d and high - low < (b - a)


@pytest.mark.parametrize("counts", [(5, 0, 0, 5), (0, 6, 0, 0), (0, 0, 6, 0), (1, 0, 0, 0)])
def test_extremes(counts):
    found = paired_difference(*of_counts(*counts))
    low, high = found.interval
    assert -1 <= low <= found.difference <= high <= 1 and low < high and 0 < found.p_value <= 1


def test_agreement():
    labels = np.array([0, 1, 2, 3, 0, 1])
    first = Predictions(np.array([0, 1, 0, 1, 0, 2]), labels)
    second = Predictions(np.array([0, 0, 0, 2, 1, 1]), labels)
    found = agreement(first, second)
    assert found.same == pytest.approx(2 / 6) and found.both_wrong == pytest.approx(2 / 6)
    assert found.same_when_both_wrong == 0.5
    assert agreement(first, first)._replace(both_wrong=0) == (1.0, 0, 1.0)
    perfect = Predictions(labels, labels)
    assert agreement(perfect, perfect) == (1.0, 0.0, None)


def test_other_examples_are_refused():
    first, second = of_counts(3, 1, 1, 1)
    for other in (
        Predictions(second.predicted, second.labels + 1),
        Predictions(second.predicted[:5], second.labels[:5]),
    ):
        for compare in (paired_difference, agreement):
            with pytest.raises(ValueError, match="are for different examples"):
                compare(first, other)
