"""Hyperparameters of merges as a recipe has them: what is of another kind ends in one line."""

import inspect

import jax
import numpy as np
import pytest

from tvjax import jobs, tree
from tvjax.checkpoints import save_tree
from tvjax.checkpoints.reader import Tensors
from tvjax.jobs.merges import GIVEN, find_merge
from tvjax.jobs.rehearsal import rehearse
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


OUT_OF_RANGE = {
    "task_arithmetic": [("weights", [1.0], "weights: 1 given for 2")],
    "slerp": [("t", 2.0, "found 2.0")],
    "nuslerp": [("weights", [-1.0, 1.0], r"found \[-1.0, 1.0\]"), ("straight", -1.0, "found -1.0")],
    "multi_slerp": [("weights", -1.0, "found -1.0")],
    "karcher_mean": [("iterations", 0, "iterations 0")],
    "ties": [("density", 2.0, r"density must be in \(0, 1\], found 2.0$"), ("weights", 0.0, "found 0.0")],
    "dare": [("density", 0.0, r"density must be in \(0, 1\], found 0.0$")],
    "della": [("epsilon", 2.0, "found density 0.3 and epsilon 2.0"), ("density", {"**/nothing": 1.0}, "matches none")],
    "breadcrumbs": [("gamma", 1.0, "found 1.0"), ("density", 0.0, "found 0.0")],
    "model_stock": [("scope", "x", "scope must be one of")],
    "sce": [("density", 2.0, "found 2.0$")],
    "tsv_m": [("share", 2.0, "found 2.0"), ("others", "x", "others must be one of")],
    "iso_c": [("method", "x", "method must be one of")],
    "iso_cts": [("common", 2.0, "found 2.0")],
    "knots": [("rank", 0, "rank must be 1 or more, found 0")],
    "wudi": [("steps", -1, "found .*-1")],
    "ace": [("share", 2.0, "found .*2.0")],
    "core_space": [("rank", 0, "rank must be 1 or more, found 0")],
    "svc": [("floor", 0.0, "found 0.0")],
}
SHAPES = {"blocks/0/kernel": (4, 6), "blocks/0/bias": (6,), "blocks/1/kernel": (4, 6), "blocks/1/bias": (6,)}


@pytest.mark.parametrize("name", registry.merges())
def test_options_are_checked_before_a_value_is_read(name):
    inner = {"merge": "ties"} if name in ("knots", "core_space") else {}
    rehearse(find_merge(name, inner, 0), [SHAPES] * 2)  # comes to where it would read
    for option, value, message in OUT_OF_RANGE.get(name, ()):
        with pytest.raises(ValueError, match=message):
            rehearse(find_merge(name, {**inner, option: value}, 0), [SHAPES] * 2)


def test_a_job_says_so_before_it_reads_its_files(vectors, tmp_path, monkeypatch):
    files = [tmp_path / f"{number}.safetensors" for number in range(2)]
    for file, tau in zip(files, vectors, strict=True):
        save_tree(file, tau)

    def reads(*_):
        raise AssertionError("a tensor was read")

    for name in ("read", "read_into", "map"):
        monkeypatch.setattr(Tensors, name, reads)
    for options in ({"density": 2.0}, {"density": 0.2, "scope": "leaf", "weights": 0.0}):  # whole vectors, leaf by leaf
        config = jobs.configs.MergeConfig(
            task_vectors=files, method="ties", options=options, output=tmp_path / "merged.safetensors"
        )
        with pytest.raises(ValueError, match="must be"):
            jobs.merge(config)
    assert len(list(tmp_path.iterdir())) == 2
