"""What carries: which candidate counts in a column, which methods stand in it, and how differences are paired."""

import numpy as np
import pytest

import compare_carry
from compare_carry import Candidate, Cell

TRUE = {"zero-shot": 0.4, "few-shot fine-tuning": 0.7, "distillation": 0.6, "BiCo, then distillation": 0.75}


def record(accuracy):
    """Two candidates: the second has the less loss, the first the greater validation accuracy."""
    return {
        "candidates": [Candidate([1.0], 2.0, 0.9, accuracy), Candidate(compare_carry.DEFAULT, 1.0, 0.8, accuracy - 0.1)]
    }


@pytest.fixture
def records():
    return {
        Cell(target, task, 50, method): record(accuracy + 0.1 * (target == "W"))
        for target in ("B", "W")
        for task in ("thick", "ruled", "framed")
        for method, accuracy in TRUE.items()
        if (target, method) != ("W", "few-shot fine-tuning")
    }


def test_without_labels_the_least_loss_counts_and_with_labels_validation(records):
    candidates = record(0.5)["candidates"]
    assert compare_carry.chosen(candidates, 0).setting == compare_carry.DEFAULT
    assert compare_carry.chosen(candidates, 5).setting == [1.0]
    tie = [Candidate([1.0], 1.0, 0.5, 0.1), Candidate([2.0], 1.0, 0.5, 0.2)]
    assert {compare_carry.chosen(tie, labels).setting[0] for labels in (0, 5)} == {1.0}


def test_what_reads_labels_stands_in_no_column_without(records):
    rows = compare_carry.summary(records)
    without = {row["method"] for row in rows if row["labels"] == 0}
    assert without == {"zero-shot", "distillation"}
    assert {row["method"] for row in rows if row["labels"] == 5} == set(TRUE)
    assert {row["images"] for row in rows} == {50}


def test_what_was_tuned_on_is_left_out_of_the_other_tasks(records):
    pairs = {(row["scope"], row["pairs"]) for row in compare_carry.summary(records) if row["method"] == "zero-shot"}
    assert pairs == {("other tasks", 4), ("all tasks", 6)}


def test_differences_pair_what_both_have(records):
    (row,) = [
        row
        for row in compare_carry.summary(records)
        if (row["scope"], row["labels"], row["method"]) == ("other tasks", 5, "BiCo, then distillation")
    ]
    gap = row["minus few-shot fine-tuning"]  # measured on B alone
    assert (gap["over_pairs"]["pairs"], gap["over_tasks"]["pairs"]) == (2, 2)
    np.testing.assert_allclose(gap["over_pairs"]["mean"], 0.05, atol=1e-9)
    start = row["minus its start from zero"]
    assert (start["over_pairs"]["pairs"], start["over_tasks"]["pairs"]) == (4, 2)
    np.testing.assert_allclose(start["over_pairs"]["mean"], 0.15, atol=1e-9)
    default = row["at the default rate"]["minus its start from zero"]["over_pairs"]
    np.testing.assert_allclose(default["mean"], 0.15, atol=1e-9)
    assert "BiCo, then distillation" in compare_carry.table([row], "other tasks")


def test_every_cell_is_wanted_once_and_fewer_images_come_first():
    cells = compare_carry.wanted(["B", "W"], ["thick"], [550, 50], list(compare_carry.METHODS))
    assert len(set(cells)) == len(cells) and [c.images for c in cells] == sorted(c.images for c in cells)
    assert not [c for c in cells if c.target == "W" and c.method in ("copy", "GradFix")]
    assert not [c for c in cells if c.images == 550 and c.method in ("BiCo", "few-shot fine-tuning", "zero-shot")]


def test_records_come_back_and_other_settings_are_refused(records, tmp_path, monkeypatch):
    path = tmp_path / "carry.json"
    compare_carry.write(path, records)
    found = compare_carry.read(path)
    assert compare_carry.summary(found) == compare_carry.summary(records)
    monkeypatch.setitem(compare_carry.SETTINGS, "epochs", 1)
    with pytest.raises(SystemExit, match="other settings"):
        compare_carry.read(path)
