"""The experiment on real models: its records, its comparisons, and its protocol on two tiny encoders."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import real_models
import tvjax as tv
from real import experiment, methods, protocol, texts
from real_models import Cell
from tvjax import Batch
from tvjax.models.bert import BertConfig, bert, init
from tvjax.tasks.zero_shot import with_head

RIGHT = {"zero-shot": [1, 0, 0, 0], "few-shot": [1, 1, 0, 0], "BiCo": [1, 1, 1, 0]}


def record(right):
    bits = np.array(right, bool)
    return {"accuracy": float(bits.mean()), "test_texts": bits.size, "right": real_models.packed(bits)}


@pytest.fixture
def records():
    return {
        Cell("L3-L6", "nouns", draw, method): record(right)
        for draw in (0, 1)
        for method, right in RIGHT.items()
        if (draw, method) != (1, "BiCo")  # a grid that is not complete
    }


def test_bits_come_back():
    bits = np.random.default_rng(0).random(1012) < 0.5
    np.testing.assert_array_equal(real_models.unpacked(real_models.packed(bits), bits.size), bits)


def test_differences_are_paired_by_draw_and_by_text(records):
    rows = {row["method"]: row for row in real_models.comparisons(records)}
    few = rows["few-shot"]["minus zero-shot"]
    assert rows["few-shot"]["draws"] == [0, 1] and few["draws"] == [0, 1]
    assert few["over_draws"]["mean"] == few["over_texts"]["mean"] == 0.25
    assert few["over_draws"]["half_width"] == 0 and few["over_texts"]["half_width"] > 0
    assert few["over_texts"]["pairs"] == 4


def test_a_grid_that_is_not_complete_says_so(records):
    rows = real_models.comparisons(records)
    (bico,) = (row for row in rows if row["method"] == "BiCo")
    assert bico["draws"] == [0] == bico["minus few-shot"]["draws"]
    assert bico["minus few-shot"]["over_draws"]["half_width"] is None
    lines = real_models.table(rows).splitlines()
    assert "| BiCo | 75.0 (1 draw) | +25.0 (-, 79.6) |" in lines and "| few-shot | 50.0 |  |" in lines


def test_a_run_goes_on_with_what_is_missing(tmp_path, records):
    path = tmp_path / "results.json"
    real_models.write(path, records)
    assert real_models.read(path) == records
    content = json.loads(path.read_text())
    content["settings"]["rates"] = [1.0]
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="made with other settings"):
        real_models.read(path)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A random pair of encoders, two layers onto three, on texts of 4 tokens in two classes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2, dtype=np.int32), 20)
    tokens = np.where(labels[:, None], 3, 7) + rng.integers(0, 4, (40, 4))
    readers = []

    def inputs(chosen):
        return {"tokens": jax.numpy.asarray(tokens[chosen]), "mask": np.ones((len(chosen), 4), bool)}

    for name, width, depth in (("small", 8, 2), ("large", 12, 3)):
        config = BertConfig(16, width, 2 * width, depth, 2, max_position_embeddings=8)
        model = bert(config, init(config, jax.random.key(depth)))
        head = np.linalg.qr(rng.normal(size=(width, 2)))[0].astype(np.float32)
        readers.append(experiment.Reader(name, with_head(model, head, 1.0), inputs, labels))
    for name in ("FEW", "MANY", "TEACHER"):
        monkeypatch.setattr(protocol, name, protocol.Steps(3, 4))
    counts = texts.Counts(test=4, source=6, few=2, validation=3, unlabelled=6)
    return experiment.Bench(*readers, texts.split(labels, counts, 0), 0, tmp_path / "tuned")


def test_methods_choose_by_validation_and_count_test_texts(bench):
    for method in ("zero-shot", "BiCo, centred", "distillation"):
        found = methods.run(bench, method)
        assert found.right.shape == (8,)
        assert (found.validation is None) == (method == "zero-shot")
        curve = found.setting.get("curve")
        assert curve is None or (len(curve) == len(protocol.SCALES) and max(curve) == found.validation)


NEW = [name for name in methods.METHODS if "Ariadne" in name or "correction" in name or "no labels" in name]


@pytest.mark.parametrize("method", NEW)
def test_what_reads_no_labels_does_not_depend_on_them(bench, method):
    """Others in the place of the labels change nothing, where no validation chooses and BiCo is no start."""
    tau = bench.with_many_labels(bench.source)
    found = methods.run(bench, method)
    assert found.right.shape == (8,)
    has_choice = "no labels" not in method and "correction" not in method
    assert (found.validation is not None) == has_choice
    if has_choice or "BiCo" in method:
        return
    turned = dataclasses.replace(bench.target, labels=1 - bench.target.labels)
    other = experiment.Bench(bench.source, turned, bench.parts, 0, bench.kept)
    again = methods.run(other, method)
    assert again.setting == found.setting and tau.steps == other.with_many_labels(other.source).steps
    np.testing.assert_array_equal(again.right, ~found.right)


def test_without_labels_the_teachers_least_loss_chooses(bench):
    texts = bench.taught
    for method, moved in (("Ariadne, no labels", texts.ariadne), ("distillation, no labels", None)):
        found = methods.METHODS[method](bench)
        if moved is not None:
            losses = [texts.loss(bench.started(tv.scale(moved, scale)).params) for scale in protocol.SCALES]
            np.testing.assert_allclose(found.setting["losses"], losses, rtol=1e-5)
            assert found.setting["scale"] == protocol.SCALES[int(np.argmin(losses))]
        else:
            assert found.setting["loss"] == texts.from_zero.by_loss.loss <= texts.from_zero.by_validation.loss
            assert found.setting["loss"] < texts.loss(bench.target.model.params)


def test_one_training_serves_both_choices(bench):
    """By validation it is what `fine_tune` chooses by itself."""
    chosen = bench.taught.from_zero.by_validation
    seen = Batch(bench.target.inputs(bench.parts.unlabelled), jax.numpy.asarray(bench.taught.said))
    tuned = bench.tuned(bench.target, bench.taught.student, seen, protocol.TEACHER)
    assert tuned[1:4] == (chosen.learning_rate, chosen.steps, chosen.validation)
    jax.tree.map(np.testing.assert_array_equal, tuned.params, chosen.params)


def test_a_start_is_compared_with_zero(records):
    records |= {Cell("L3-L6", "nouns", 0, "BiCo, centred, then few-shot"): record([1, 1, 1, 0])}
    rows = real_models.comparisons(records)
    (row,) = (row for row in rows if "minus its start from zero" in row)
    assert row["minus its start from zero"]["over_draws"]["mean"] == 0.25
    line = "- BiCo, centred, then few-shot, minus its start from zero (L3-L6, nouns, draws 0): +25.0 (-, 79.6)"
    assert line in real_models.table(rows).splitlines()


def test_ariadne_is_compared_with_theseus_by_the_same_choice(records):
    records |= {
        Cell("L3-L6", "nouns", 0, "Theseus"): record([0, 0, 0, 0]),
        Cell("L3-L6", "nouns", 0, "Theseus, no labels"): record([1, 1, 0, 0]),
        Cell("L3-L6", "nouns", 0, "Ariadne, few texts"): record([1, 1, 1, 0]),
        Cell("L3-L6", "nouns", 0, "Ariadne, few texts, no labels"): record([1, 1, 1, 0]),
    }
    rows = {row["method"]: row for row in real_models.comparisons(records)}
    minus = [rows[f"Ariadne, few texts{choice}"]["minus Theseus"] for choice in ("", ", no labels")]
    assert [gap["over_draws"]["mean"] for gap in minus] == [0.75, 0.25]


def test_what_was_tuned_with_many_labels_is_read_again(bench, monkeypatch):
    first = bench.with_many_labels(bench.source)
    monkeypatch.setattr(experiment, "fine_tune", None)  # nothing is trained
    again = bench.with_many_labels(bench.source)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert again[1:4] == first[1:4]


def test_what_reads_nothing_of_the_source_is_measured_once_for_a_target():
    found = Cell("L6-MPNet", "nouns", 0, "few-shot"), Cell("L6-MPNet", "nouns", 0, "BiCo")
    records = {cell: record(RIGHT["few-shot"]) for cell in found}
    others = [cell._replace(pair="L3-MPNet") for cell in found]
    assert real_models.same_of_target(others[0], records) == records[found[0]]
    assert real_models.same_of_target(others[1], records) is None
    assert real_models.same_of_target(found[0]._replace(pair="L3-L6"), records) is None
    assert list(real_models.measure(others[:1], records)) == others[:1]  # without a model
    assert records[others[0]] == records[found[0]]


def test_batches_have_one_size(bench):
    own = dataclasses.replace(bench.target, inputs=lambda chosen: chosen)
    assert [len(batch.labels) for batch in own.batches(np.arange(22), 8)] == [2] * 11
    assert [len(batch.labels) for batch in own.batches(np.arange(24), 8)] == [8] * 3
