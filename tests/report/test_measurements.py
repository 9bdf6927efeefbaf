import numpy as np
import pytest
from scipy import stats

from tvjax.report.measurements import Measurement, accuracies, compare, difference_over_examples, paired_difference


def measured(method, values, target="B"):
    return [
        Measurement(f"task {task}", target, method, 0, draw, 1.0, value)
        for (task, draw), value in np.ndenumerate(np.array(values))
    ]


def test_the_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 0.1, 12), rng.normal(0.4, 0.1, 12)
    found = paired_difference(a - b)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width], [low, high], rtol=1e-12)
    assert found.pairs == 12 and found.is_clear == (low > 0 or high < 0)


def test_one_pair_has_no_interval():
    found = paired_difference([0.2])
    assert found.half_width is None and not found.is_clear


@pytest.mark.parametrize("differences", [[], [[0.1]]])
def test_what_is_no_list_of_pairs_is_refused(differences):
    with pytest.raises(ValueError, match="one number for each pair"):
        paired_difference(differences)


def test_comparison_pairs_by_task_and_draw():
    values = np.array([[0.5, 0.7], [0.2, 0.3], [0.9, 0.4]])
    shifts = np.array([[0.1, 0.2], [0.0, 0.1], [0.3, -0.1]])
    base, better = measured("base", values), measured("better", values + shifts)
    found = compare([*reversed(base), *better, *measured("base", values + 1, target="W")], "B", "better", "base")
    low, high = stats.ttest_1samp(shifts.ravel(), 0).confidence_interval(0.95)
    np.testing.assert_allclose(found.over_pairs.mean, shifts.mean(), rtol=1e-12)
    np.testing.assert_allclose(2 * found.over_pairs.half_width, high - low, rtol=1e-9)
    low, high = stats.ttest_1samp(shifts.mean(1), 0).confidence_interval(0.95)
    np.testing.assert_allclose(2 * found.over_tasks.half_width, high - low, rtol=1e-9)
    assert (found.over_pairs.pairs, found.over_tasks.pairs) == (6, 3)


def test_unpaired_methods_are_not_compared():
    found = [*measured("a", [[0.1, 0.2]]), *measured("b", [[0.1]])]
    with pytest.raises(ValueError, match="a and b on B cannot be paired: 2 and 1"):
        compare(found, "B", "a", "b")


def test_accuracies_by_task():
    found = accuracies(measured("a", [[0.1, 0.2], [0.3, 0.4]]), "B", "a")
    np.testing.assert_array_equal(found["task 0"], [0.1, 0.2])
    np.testing.assert_array_equal(found["task 1"], [0.3, 0.4])


def test_equal_differences_have_an_interval_of_no_width():
    assert paired_difference([0.25, 0.25, 0.25]).half_width == 0.0


def test_the_interval_over_examples_is_that_of_a_paired_bootstrap_within_tasks():
    rng = np.random.default_rng(0)
    base = [rng.uniform(size=n) < 0.4 for n in (400, 900)]
    better = [one | (rng.uniform(size=one.size) < 0.3) for one in base]
    found = difference_over_examples(better, base)
    gaps = [one.astype(float) - other for one, other in zip(better, base, strict=True)]
    drawn = [np.mean([rng.choice(gap, gap.size).mean() for gap in gaps]) for _ in range(4000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    np.testing.assert_allclose([found.mean - found.half_width, found.mean + found.half_width], [low, high], atol=2e-3)
    assert found.pairs == 1300 and found.is_clear
    with pytest.raises(ValueError, match="found tasks of .400. and .900. examples"):
        difference_over_examples(better[:1], base[1:])
