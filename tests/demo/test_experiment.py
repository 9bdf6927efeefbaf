import dataclasses
import itertools
import json

import numpy as np
import pytest

from tvjax.demo import base, experiment, setup
from tvjax.demo.arithmetic import Edit
from tvjax.demo.transports import EQUAL_SHAPES, methods
from tvjax.report.measurements import Measurement
from tvjax.report.plots import Curve


@pytest.fixture
def findings():
    rng = np.random.default_rng(0)
    settings = dataclasses.replace(setup.QUICK, draws=2)
    measurements = [
        Measurement(task, target, method, 5, draw, 1.0, float(rng.uniform()))
        for target, task, draw in itertools.product(setup.TARGETS, settings.tasks, range(2))
        for method in methods(settings)
        if target == "B" or method not in EQUAL_SHAPES
    ]
    curves = [Curve(settings.tasks[0], target, "bico", 0, (0.0, 1.0), (0.1, 0.2)) for target in setup.TARGETS]
    edits = [Edit("negation", "- a", "base", 0.5, 0.9, 0.88)]
    counts = {task: {"calibration": 50, "validation": 200, "test": 994} for task in settings.tasks}
    compared = experiment.comparisons(measurements)
    reports = {"A to B": "link"}
    return experiment.Findings(
        settings, setup.TITLES, "photographs", counts, measurements, compared, curves, edits, reports, 1.5
    )


def test_files(findings, tmp_path):
    files = experiment.write(findings, tmp_path / "results" / "demo")
    assert sorted(file.name for file in files) == sorted(file.name for file in files[0].parent.iterdir())
    content = json.loads((tmp_path / "results" / "demo" / "results.json").read_text())
    assert {
        "records",
        "settings",
        "versions",
        "seconds",
        "peak_memory_gib",
        "comparisons",
        "arithmetic",
        "curves",
    } <= set(content)
    keys = ["task", "target", "method", "labels_per_class", "draw", "alpha", "accuracy"]
    assert all(list(record) == keys and 0 <= record["accuracy"] <= 1 for record in content["records"])
    assert content["seconds"] == 1.5 and content["settings"]["photographs"]["thick"]["validation"] == 200
    assert "jax" in content["versions"] and content["arithmetic"][0]["normalised"] is None


def test_methods_are_compared_with_zero_shot_and_at_equal_shapes_with_naive_addition(findings):
    compared = {(c.target, c.method, c.baseline) for c in findings.comparisons}
    assert {("B", "bico", "naive"), ("B", "naive", "zero_shot"), ("W", "bico", "zero_shot")} <= compared
    assert not any(target != "B" and baseline == "naive" for target, _, baseline in compared)
    assert all(c.over_pairs.pairs == 4 and c.over_tasks.pairs == 2 for c in findings.comparisons)


def test_one_draw_has_intervals_over_test_examples_and_several_have_them_over_draws(findings):
    assert all(c.over_examples is None for c in findings.comparisons)
    assert "standard deviation over draws" in experiment.footnotes(findings)[-1]
    once = [m for m in findings.measurements if m.draw == 0]
    right = {(m.target, m.method, m.task): np.arange(200) < round(200 * m.accuracy) for m in once}
    compared = experiment.comparisons(once, right)
    assert all(c.over_examples.half_width > 0 and c.over_examples.pairs == 400 for c in compared)
    one = findings._replace(
        settings=dataclasses.replace(findings.settings, draws=1), comparisons=compared, measurements=once, repeats=2
    )
    last = experiment.footnotes(one)[-1]
    assert "over test photographs" in last and "± 4.4 (Wilson)" in last  # of 497 digits, photographed twice
    assert experiment.results(one)["comparisons"][0]["over_examples"]["pairs"] == 400


@pytest.mark.parametrize("change", [{"tasks": setup.QUICK.tasks[:1]}, {"draws": 0}])
def test_too_little_to_measure(change):
    with pytest.raises(ValueError, match="expected two and one at least"):
        experiment.run(dataclasses.replace(setup.QUICK, **change))


def test_photographs_and_draws_are_fixed_by_their_names():
    settings = dataclasses.replace(setup.QUICK, test_repeats=1)
    images, again = (setup.photographs("base", setup.style_of("base"), settings) for _ in range(2))
    assert [len(batch.labels) for batch in images[:3]] == [550, 200, 497]
    np.testing.assert_array_equal(images.test.inputs["pixels"], again.test.inputs["pixels"])
    draws = [base.draw_examples(images.pool, "base", draw, settings) for draw in (0, 0, 1)]
    assert np.bincount(draws[0].labels).tolist() == [settings.labels_per_class] * 10
    np.testing.assert_array_equal(draws[0].inputs["pixels"], draws[1].inputs["pixels"])
    assert not np.array_equal(draws[0].inputs["pixels"], draws[2].inputs["pixels"])
