"""What carries: which candidate counts in a column, which methods stand in it, how differences pair, and order."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import compare_carry
import compare_few_shot
from carry import columns, methods
from carry.columns import Cell
from carry.methods import METHODS, Bench, Candidate
from carry.models import SETS, models_of
from tvjax import tree
from tvjax.data.batches import take
from tvjax.demo.base import Embedded, Sets
from tvjax.evaluate.accuracy import accuracy
from tvjax.stages import Batch

CLIP, LANGUAGE = SETS["clip"], SETS["language"]

TRUE = {"zero-shot": 0.4, "few-shot fine-tuning": 0.7, "distillation": 0.6, "BiCo, then distillation": 0.75}


def record(accuracy):
    """Two candidates: the second has the less loss, the first the greater validation accuracy."""
    return {
        "candidates": [Candidate([1.0], 2.0, 0.9, accuracy), Candidate(methods.DEFAULTS[0], 1.0, 0.8, accuracy - 0.1)]
    }


@pytest.fixture
def records():
    return {
        Cell(target, task, draw, 5 * METHODS[method].labels, 50, method): record(accuracy + 0.1 * (target == "W"))
        for target in ("B", "W")
        for task in ("thick", "ruled", "framed")
        for draw in (0, 1)
        for method, accuracy in TRUE.items()
        if (target, method) != ("W", "few-shot fine-tuning")
    }


def row_of(records, scope, labels, method):
    (row,) = [
        r for r in columns.summary(records, CLIP) if (r["scope"], r["labels"], r["method"]) == (scope, labels, method)
    ]
    return row


def test_without_labels_the_least_loss_counts_and_with_labels_validation():
    candidates = record(0.5)["candidates"]
    assert methods.chosen(candidates, 0).setting == methods.DEFAULTS[0]
    assert methods.chosen(candidates, 5).setting == [1.0]
    tie = [Candidate([1.0], 1.0, 0.5, 0.1), Candidate([2.0], 1.0, 0.5, 0.2)]
    assert {methods.chosen(tie, labels).setting[0] for labels in (0, 5)} == {1.0}


def test_test_images_are_looked_at_for_what_a_column_chooses():
    class Known(Bench):
        def __init__(self):
            self.sets, self.seen = type("Sets", (), {"test": "test images"}), []

        def accuracy(self, params, batch):
            assert batch == "test images"
            self.seen.append(params)
            return 0.5

    settings = [[1.0], [2.0], methods.DEFAULTS[0], [3.0]]
    losses, validation = [3.0, 1.0, 2.0, 2.0], [0.1, 0.2, 0.1, 0.3]
    tried = [(i, Candidate(settings[i], losses[i], validation[i], None)) for i in range(4)]
    bench = Known()
    assert [one.test for one in bench.tested(tried)] == [None, 0.5, 0.5, 0.5]  # of least loss, default, best
    assert bench.seen == [1, 2, 3]


def test_what_reads_labels_stands_in_no_column_without(records):
    rows = columns.summary(records, CLIP)
    assert {row["method"] for row in rows if row["labels"] == 0} == {"zero-shot", "distillation"}
    assert {row["method"] for row in rows if row["labels"] == 5} == set(TRUE)
    assert {row["labels"] for row in rows} == {0, 5}  # what no method read makes no column
    assert {row["unlabelled"] for row in rows} == {50}


def test_what_was_tuned_on_is_left_out_of_the_other_tasks(records):
    pairs = {(row["scope"], row["pairs"]) for row in columns.summary(records, CLIP) if row["method"] == "zero-shot"}
    assert pairs == {("other tasks", 4), ("all tasks", 6)}


def test_where_nothing_was_tuned_on_the_tasks_they_stand_once():
    records = {Cell("t5-B", task, 0, 0, 230, "zero-shot"): record(0.5) for task in LANGUAGE.tasks}
    rows = columns.summary(records, LANGUAGE)
    assert [(row["scope"], row["pairs"]) for row in rows] == [("all tasks", 3)]
    assert "0 labels, 230 texts" in columns.table(rows, "all tasks", LANGUAGE.kind)


def test_differences_pair_what_both_have(records):
    row = row_of(records, "other tasks", 5, "BiCo, then distillation")
    gap = row["minus few-shot fine-tuning"]  # measured on B alone
    assert (gap["over_pairs"]["pairs"], gap["over_tasks"]["pairs"], gap["draws"]) == (2, 2, 2)
    np.testing.assert_allclose(gap["over_pairs"]["mean"], 0.05, atol=1e-9)
    start = row["minus its start from zero"]
    assert (start["over_pairs"]["pairs"], start["over_tasks"]["pairs"]) == (4, 2)
    np.testing.assert_allclose(start["over_pairs"]["mean"], 0.15, atol=1e-9)
    default = row["at the default rate"]["minus its start from zero"]["over_pairs"]
    np.testing.assert_allclose(default["mean"], 0.15, atol=1e-9)
    assert "BiCo, then distillation" in columns.table([row], "other tasks", "images")


def test_a_column_of_other_labels_is_compared_with_fine_tuning_on_as_many(records):
    method = "few-shot fine-tuning"
    more = {Cell("B", "ruled", 0, 1, 50, name): record(value) for name, value in ((method, 0.5), ("BiCo", 0.45))}
    gap = row_of(records | more, "other tasks", 1, "BiCo")[f"minus {method}"]
    np.testing.assert_allclose(gap["over_pairs"]["mean"], -0.05, atol=1e-9)


def test_the_draws_of_a_pair_are_averaged_before_anything_else():
    one = {("ruled", "B", 0): 0.5, ("ruled", "B", 1): 0.7, ("framed", "B", 0): 0.9}
    gap = columns.difference(one, dict.fromkeys(one, 0.5) | {("blurred", "B", 0): 0.1})
    assert gap["over_pairs"]["pairs"] == 2  # not three
    assert gap["by_target"] == {"B": gap["over_pairs"]}
    np.testing.assert_allclose(gap["over_pairs"]["mean"], (0.1 + 0.4) / 2)
    np.testing.assert_allclose(gap["spread_over_draws"], np.std([0, 0.2], ddof=1))
    np.testing.assert_allclose(columns.average(one), (0.6 + 0.9) / 2)
    alone = columns.difference({("framed", "B", 0): 0.9}, {("framed", "B", 0): 0.5})
    assert alone["spread_over_draws"] is None and alone["over_pairs"]["half_width"] is None


@pytest.fixture
def cells():
    return compare_carry.wanted(["B", "W"], ["ruled", "thick"], [0, 1], [550, 50], list(METHODS))


def test_every_cell_is_wanted_once(cells):
    assert len(set(cells)) == len(cells)
    assert not [c for c in cells if c.target == "W" and c.method in ("copy", "GradFix")]
    assert not [c for c in cells if c.unlabelled == 550 and (c.method in ("BiCo", "zero-shot") or c.draw)]
    assert {c.labels for c in cells if c.method == "BiCo"} == {1, 5, 10}
    assert {c.labels for c in cells if c.method == "Ariadne"} == {0}
    assert all((c.labels > 0) == METHODS[c.method].labels for c in cells)


def test_what_is_read_most_comes_first_on_all_pairs(cells):
    stages = list(dict.fromkeys(map(compare_carry.order, cells)))
    assert stages == sorted(stages)
    assert [(c.draw, c.unlabelled) for c in cells if c.method == "distillation"] == (
        4 * [(0, 50)] + 4 * [(0, 550)] + 4 * [(1, 50)]
    )
    assert cells[-1].draw == 1 and METHODS[cells[-1].method].late


def test_groups_are_of_one_pair_and_examples_of_a_bench_stand_together(cells):
    groups = compare_carry.groups_of(cells)
    assert sorted(cell for group in groups for cell in group) == sorted(cells)
    for group in groups:
        assert len({(cell.task, cell.target, cell.draw, cell.unlabelled) for cell in group}) == 1
        assert [cell.labels for cell in group] == sorted(cell.labels for cell in group)
    first = compare_carry.taken(groups, "W")  # compiled for it already
    assert first[0].target == "W" and compare_carry.order(first[0]) == compare_carry.order(groups[0][0])
    assert compare_carry.taken(groups, "")[0].target == "B"


WORKERS = """
import os
import time

import compare_carry
from carry.columns import Cell


def echo(connection, cores):
    while group := connection.recv():
        for cell in group:
            if cell.task == "framed":
                os._exit(1)
            time.sleep(600 if cell.task == "blurred" else 0)
            connection.send((cell, {}))
        connection.send(None)


if __name__ == "__main__":
    compare_carry.work = echo
    groups = [[Cell("B", task, draw, 0, 50, "Ariadne") for draw in (0, 1)] for task in ("ruled", "framed", "thick")]
    print(sorted({cell.task for cell, _ in compare_carry.measured(groups, 2, float("inf"))}))
    groups = [[Cell("B", "blurred", 0, 0, 50, "Ariadne")]]
    print(list(compare_carry.measured(groups, 1, time.monotonic() + 1)))
"""


def test_a_worker_that_dies_does_not_stop_the_others_and_the_clock_stops_all(tmp_path):
    (tmp_path / "workers.py").write_text(WORKERS)
    folder = Path(compare_carry.__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)])}
    command = [sys.executable, str(tmp_path / "workers.py")]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    died, measured, stopped = found.stdout.splitlines()
    assert died.startswith("a worker died on B") and (measured, stopped) == ("['ruled', 'thick']", "[]"), found.stderr


def test_records_come_back_and_other_settings_are_refused(records, tmp_path):
    path = tmp_path / "carry.json"
    compare_carry.write(path, records, CLIP)
    found = compare_carry.read(path, CLIP)
    assert columns.summary(found, CLIP) == columns.summary(records, CLIP)
    with pytest.raises(SystemExit, match="other settings"):
        compare_carry.read(path, LANGUAGE)


@pytest.mark.parametrize("models", SETS.values(), ids=SETS)
def test_the_results_that_ship_can_be_gone_on_with(models):
    path = Path(compare_carry.__file__).parent.parent / "results" / models.results
    wanted = compare_carry.wanted([*models.sources], models.tasks, [0, 1, 2], [50, models.pool], list(METHODS))
    found = compare_carry.read(path, models)
    assert found and found.keys() <= set(wanted)
    assert all(models_of(cell.target) is models for cell in found)


def numbered(models, count, classes):
    """A set whose examples are numbers, and whose models are none."""
    sets = Sets(Batch(np.arange(count), np.arange(count) % classes), [], [], 0)
    return models._replace(load=lambda name, task: Embedded(None, {task: None}), examples=lambda target, task: sets)


def test_unlabelled_examples_are_those_with_labels_then_others_or_all():
    """As many as there are labels are those alone, as the images always were."""
    clip = numbered(CLIP, 550, 10)
    bench = Bench(clip, "W", "ruled", 1, 5, 50)
    np.testing.assert_array_equal(bench.inputs, bench.few.inputs)
    np.testing.assert_array_equal(Bench(clip, "W", "ruled", 0, 0, 550).inputs, np.arange(550))
    language = numbered(LANGUAGE, 71, 2)
    draws = [Bench(language, "t5-B", "reviews", draw, 0, 50) for draw in (0, 1)]
    for bench in draws:
        assert len(set(bench.inputs.tolist())) == len(bench.inputs) == 50
        np.testing.assert_array_equal(bench.inputs[:10], bench.few.inputs)
    assert set(draws[0].inputs.tolist()) != set(draws[1].inputs.tolist())
    np.testing.assert_array_equal(Bench(language, "t5-B", "reviews", 0, 0, LANGUAGE.pool).inputs, np.arange(71))


@pytest.mark.parametrize("target", LANGUAGE.sources)
def test_trainings_of_language_models_change_what_their_task_vectors_cover(target):
    model, taus = LANGUAGE.load(target, "reviews")
    leaves = compare_few_shot.leaves_of(model.params, LANGUAGE.settings)
    assert leaves.keys() == tree.flatten(taus["reviews"]).keys()


def test_a_cell_of_language_models_is_measured_on_texts_of_all_lengths():
    """A copy of a vector onto a further training of its base, on eight short and eight long texts."""

    def few(target, task):
        sets = LANGUAGE.examples(target, task)
        assert len(sets.pool.labels) == 71  # as the file of results says
        some = [take(batch, slice(8)) for batch in sets.test]
        assert [batch.inputs["tokens"].shape for batch in some] == [(8, 32), (8, 64)]
        return sets._replace(validation=some, test=some)

    settings = dataclasses.replace(LANGUAGE.settings, unit_scales=(0.0, 1.0))
    models = LANGUAGE._replace(examples=few, settings=settings)
    bench = Bench(models, "llama-C", "reviews", 0, 0, 50)
    assert [len(batch.inputs["tokens"]) for batch in bench.unlabelled] == [50] and bench.teacher.shape == (50, 2)
    zero, copy = METHODS["copy"].run(bench)
    assert zero.test == zero.validation == accuracy(bench.model, bench.sets.test).fraction
    assert zero.loss > copy.loss > 0  # nearer to the teacher, whose base it was trained from
