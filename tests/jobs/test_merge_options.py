"""Hyperparameters of merges as a recipe has them: what is of another kind ends in one line."""

import inspect

import jax
import numpy as np
import pytest

from tvjax import tree
from tvjax.jobs.merges import GIVEN, find_merge
from tvjax.merge import registry

WRONG = ("x", [None, 1], {}, {"by_depth": 3, "other": 1}, 10**30, True)


@pytest.fixture(scope="module")
def vectors():
    random = np.random.default_rng(0)
    shapes = {f"blocks/{layer}/{path}": size for layer in range(2) for path, size in (("kernel", (2, 3)), ("bias", 3))}
    return [tree.nest({p: jax.device_put(np.float32(random.normal(size=s))) for p, s in shapes.items()}) for _ in "ab"]


@pytest.mark.parametrize("name", registry.merges())
@pytest.mark.filterwarnings("ignore:.*(overflow|rate|smallest|largest)")
def test_values_of_another_kind_are_refused_or_mean_something(name, vectors):
    inner = {"merge": "ties"} if name == "knots" else {}
    refused = 0
    for option in (option for option in inspect.signature(registry.merges()[name]).parameters if option not in GIVEN):
        for value in WRONG:
            try:
                find_merge(name, {**inner, option: value}, 0)(vectors)
            except ValueError as error:
                assert str(error)
                refused += 1
    assert refused


def test_the_message_names_method_option_value_and_kind():
    for name, option, value, message in (
        ("lines", "alpha", "x", "lines: alpha is 'x', expected float or None"),
        ("lines", "beta", True, "lines: beta is True, expected float or None"),
        ("lines", "merge", ["ties"], r"merge: found \['ties'\], expected one of"),
        ("ties", "weights", {"by_depth": 3, "other": 1}, "by_depth is 3, expected a list of numbers"),
        ("karcher_mean", "iterations", 10**30, "iterations is 10{30}, expected a number of at most"),
    ):
        with pytest.raises(ValueError, match=message):
            find_merge(name, {option: value}, 0)
