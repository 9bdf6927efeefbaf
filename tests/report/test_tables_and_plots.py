import io
import itertools

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tvjax.evaluate.accuracy import Accuracy, Predictions
from tvjax.report import records
from tvjax.report.measurements import Comparison, Difference, Measurement, compare
from tvjax.report.plots import Curve, plot_methods, plot_scale_curve, plot_scales
from tvjax.report.tables import (
    accuracy_table,
    agreement_table,
    arithmetic_table,
    class_table,
    curve_table,
    evaluation_table,
    pairs_table,
)

TITLES = {"B": "same shape", "W": "wider"}


@pytest.fixture
def measurements():
    methods = {
        "B": ("zero_shot", "naive", "bico+gradfix", "fine_tuned"),
        "W": ("zero_shot", "bico+gradfix", "fine_tuned"),
    }
    rng = np.random.default_rng(0)
    return [
        Measurement(task, target, method, 5 if "bico" in method else 0, draw, 1.0, float(rng.uniform(0.3, 0.9)))
        for target in TITLES
        for task, draw in itertools.product(("mirrored", "upside_down"), range(2))
        for method in methods[target]
    ]


def text(table):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_accuracy_table(measurements):
    comparisons = [compare(measurements, "B", "bico+gradfix", "naive")]
    lines = text(accuracy_table(measurements, comparisons, "B", "A to B")).splitlines()
    assert lines[0].strip() == "A to B" and "upside down" in lines[2] and "- naive" in lines[2]
    row = next(line for line in lines if "bico+gradfix" in line)
    own = [m.accuracy for m in measurements if (m.target, m.task, m.method) == ("B", "mirrored", "bico+gradfix")]
    assert f"{100 * np.mean(own):.1f} ± {100 * np.std(own, ddof=1):.1f}" in row
    difference = comparisons[0].over_pairs
    assert row.rstrip().endswith(f"{100 * difference.mean:+.1f} ± {100 * difference.half_width:.1f}")
    assert "naive" not in text(accuracy_table(measurements, comparisons, "W", "A to W"))


def test_other_tables():
    row = {
        "operation": "negation",
        "edit": "- thick",
        "measured_on": "base",
        "alpha": 0.5,
        "before": 0.9,
        "after": 0.88,
    }
    (line,) = [
        line for line in text(arithmetic_table([{**row, "normalised": None}], "")).splitlines() if "thick" in line
    ]
    assert line.split() == ["negation", "-", "thick", "base", "0.50", "90.0", "88.0"]


def test_evaluation_tables():
    labels = np.array([0] * 60 + [1] * 40)
    names = ("cat", "dog")
    one, two = (Predictions(np.where(np.arange(100) < right, labels, 1 - labels), labels) for right in (50, 88))
    reference = Accuracy(96, 100)
    rows = [{"model": name, **records.of_model(own, names, reference)} for name, own in (("one", one), ("two", two))]
    pair = {"model": "two", "baseline": "one", **records.of_pair(two, one)}
    last = {"model": "ft", **records.of_accuracy(reference)}
    found = [
        text(table).splitlines()
        for table in (
            evaluation_table(rows, "", last),
            pairs_table([pair], ""),
            class_table(rows, ""),
            curve_table(records.of_curve([0.0, 0.5], [one, two], one), ""),
            agreement_table([pair], ""),
        )
    ]
    lines = [[line.split() for line in lines if line.strip()][-2:] for lines in found]
    assert lines[0] == [
        ["two", "88.0", "80.2", "to", "93.0", "88", "of", "100", "91.7"],
        ["ft", "96.0", "90.2", "to", "98.4", "96", "of", "100", "100.0"],
    ]
    assert lines[1][-1][:3] == ["two", "one", "+38.0"] and lines[4][-1] == ["two", "one", "62.0", "12.0", "100.0"]
    assert lines[2] == [["cat", "60", "83.3", "100.0"], ["dog", "40", "0.0", "70.0"]]
    assert lines[3][1][:2] == ["0.5", "88.0"] and "+38.0" in lines[3][1]


def test_plots_are_images(measurements, tmp_path):
    plot_methods(measurements, tmp_path / "accuracy.png", TITLES)
    curves = [Curve("t", target, "theseus", 0, (0.0, 1.0, 2.0), (0.1, 0.5, 0.3)) for target in TITLES]
    plot_scales(curves, tmp_path / "scales.png", TITLES)
    found = [Accuracy(right, 50) for right in (20, 31, 40, 28)]
    plot_scale_curve([0.0, 0.25, 0.5, 1.0], found, tmp_path / "curve.png", "model", reference=0.9)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["accuracy.png", "curve.png", "scales.png"]
    for file in tmp_path.iterdir():
        with Image.open(file) as image:
            assert image.format == "PNG" and image.size[0] > 700 and np.asarray(image.convert("L")).std() > 5


def test_no_number_of_a_narrow_table_is_cut_and_two_pairs_have_no_interval():
    rows = [
        Measurement(task, "B", method, 0, 0, 1.0, accuracy)
        for method, found in (("zero_shot", (0.383, 0.488)), ("orthogonal_shift", (0.598, 0.593)))
        for task, accuracy in zip(("topics", "reviews"), found, strict=True)
    ]
    pairs = Difference(0.16, 0.715, 2)
    table = accuracy_table(rows, [Comparison("B", "orthogonal_shift", "zero_shot", pairs, pairs)], "B", "B")
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "…" not in text and "±" not in text
    assert all(number in text for number in ("38.3", "48.8", "59.8", "59.3", "+16.0"))
    three = accuracy_table(
        rows, [Comparison("B", "orthogonal_shift", "zero_shot", pairs._replace(pairs=3), pairs)], "B", ""
    )
    console.print(three)
    assert "71.5" in console.export_text()


def test_one_draw_has_the_interval_over_test_examples():
    rows = [Measurement("t", "B", method, 0, 0, 1.0, 0.5) for method in ("zero_shot", "bico")]
    pairs, examples = Difference(0.16, None, 1), Difference(0.16, 0.031, 994)
    shown = text(accuracy_table(rows, [Comparison("B", "bico", "zero_shot", pairs, pairs, examples)], "B", "B"))
    assert "+16.0 ± 3.1" in shown
