"""A transport and what the fine-tuned source teaches from there on, in one command that opens each model once."""

import json

import jax
import numpy as np
import pytest

import tvjax as tv
from tvjax import tree
from tvjax.checkpoints import from_pretrained, load_processor, load_tree
from tvjax.cli.main import run
from tvjax.compose import class_scores
from tvjax.data.folders import read_folder
from tvjax.jobs import opened
from tvjax.jobs.recipes import read_recipe
from tvjax.tasks.zero_shot import TEMPLATES, zero_shot_model


def words(models, images, output, *more):
    pair = ("--source", models["source"], "--finetuned", models["finetuned"], "--target", models["wider"])
    data = () if images is None else ("--data", images)
    return [*map(str, ("transport", *pair, *data, "--output", output, *more))]


@pytest.fixture
def unlabelled(images, tmp_path):
    (tmp_path / "names.txt").write_text("cat\npolar bear\n")
    return images / "cat", "--classes", tmp_path / "names.txt", "--method", "theseus"


@pytest.mark.parametrize("how", ["correction", "distillation"])
def test_what_the_teacher_says_is_learned_without_labels(models, unlabelled, tmp_path, capsys, how, monkeypatch):
    seen, read = [], opened.from_pretrained
    monkeypatch.setattr(opened, "from_pretrained", lambda at, **how: (seen.append(at.folder.name), read(at, **how))[1])
    data, *more = unlabelled
    assert run(words(models, data, tmp_path / "out", *more, "--refine", how, "--json")) == 0
    assert sorted(seen) == ["finetuned", "source", "wider"]  # each once
    found = json.loads(capsys.readouterr().out)["refined"]
    assert found["loss"] < found["loss_of_start"] and found["accuracy"] is None
    assert (found["by"], found["examples"]) == (how, 3)
    report = json.loads((tmp_path / "out" / "leaf_report.json").read_text())
    assert report["refined"] == found and read_recipe(tmp_path / "out" / "tvjax.yaml").refine == how
    before, after = (from_pretrained(name).params for name in (models["wider"], tmp_path / "out"))
    for path, leaf in tree.flatten(after["text"]).items():
        np.testing.assert_array_equal(leaf, tree.flatten(before["text"])[path])  # the head of classes is the target's
    assert how in (tmp_path / "out" / "README.md").read_text()


def test_the_closed_form_is_the_librarys_from_the_moved_vector(models, unlabelled, tmp_path, capsys):
    """The same numbers as the parts give one by one."""
    data, *more = unlabelled
    vector = tmp_path / "tau.safetensors"
    given = words(
        models, data, tmp_path / "out", *more, "--refine", "correction", "--save-task-vector", vector, "--json"
    )
    assert run(given) == 0
    scale = json.loads(capsys.readouterr().out)["scale"]

    def headed(name):
        pretrained = from_pretrained(name)
        return zero_shot_model(pretrained.model, load_processor(name).tokens, ["cat", "polar bear"], TEMPLATES)

    source, target = headed(models["source"]), headed(models["wider"])
    tuned = from_pretrained(models["finetuned"]).params["vision"]
    teacher = source.replace(params={**source.params, "vision": tuned})
    pixels = load_processor(models["wider"]).pixels
    found = read_folder(data)
    batch = tv.Batch({"pixels": pixels([found[i] for i in range(len(found))])})
    change = tv.logit_correction(
        target, class_scores(teacher, batch), batch, start=tv.scale(load_tree(vector)[0], scale)
    )
    expected = tv.apply(from_pretrained(models["wider"]).params, change)
    got = from_pretrained(tmp_path / "out").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_validation_chooses_the_rate_and_says_the_accuracy(models, images, tmp_path, capsys):
    given = words(models, images, tmp_path / "out", "--refine", "distillation", "--validation", images)
    assert run([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["refined"]["accuracy"] <= 1 and found["refined"]["learning_rate"] in (0.03, 0.1, 0.3)
    assert found["method"] == "bico"  # by the labels of --data


@pytest.mark.parametrize("command", ["transport", "plan"])
@pytest.mark.parametrize(
    "more, expected",
    [
        (["--stream"], "leave --stream or --refine out"),
        (["--scale", "2"], "leave --scale 2 out"),
        (["--refine", "magic"], "'magic' is not one of 'correction', 'distillation'"),
        (["--source", "{finetuned}"], "has no text tower to make a zero-shot head from: give the full model"),
    ],
)
def test_what_cannot_be_refined_is_one_line(models, unlabelled, tmp_path, capsys, command, more, expected):
    data, *given = unlabelled
    line = words(models, data, tmp_path / "out", *given, "--refine", "correction")
    assert run([command, *line[1:], *(word.format(**models) for word in more)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line and not (tmp_path / "out").exists()


def test_a_scale_is_given_or_chosen(models, images, tmp_path, capsys):
    given = words(models, images, tmp_path / "out", "--scale", "0.5", "--validation", images)
    assert run(given) == 2
    assert "--validation chooses the scale: leave --scale 0.5 or --validation out" in capsys.readouterr().err


def test_a_task_vector_teaches_nothing_and_no_examples_are_none(models, tmp_path, capsys):
    pair = ["transport", "--source", models["source"], "--target", models["same"], "--output", str(tmp_path / "out")]
    assert run([*pair, "--task-vector", "tau.safetensors", "--refine", "correction"]) == 2
    assert "give --finetuned in the place of --task-vector" in capsys.readouterr().err
    assert run([*pair, "--finetuned", models["finetuned"], "--refine", "correction"]) == 2
    assert "give --data" in capsys.readouterr().err and not (tmp_path / "out").exists()
