"""A transport without a method takes the recommended one, says which and why, and its recipe names it."""

import pytest

from tvjax.cli.main import run
from tvjax.data.embedded import model_folder
from tvjax.jobs.recipes import read_recipe
from tvjax.jobs.recommended import recommended


@pytest.mark.parametrize(
    "examples, labels, apart, method, options",
    [
        (True, True, "kernel is [2] here, [3] there", "bico", {"center": True}),
        (True, True, "", "bico", {"center": True}),
        (True, False, "kernel is [2] here, [3] there", "theseus", {}),
        (True, False, "", "theseus", {}),
        (False, False, "", "naive", {}),
    ],
)
def test_what_is_at_hand_decides(examples, labels, apart, method, options):
    found = recommended(examples=examples, labels=labels, apart=apart)
    assert (found.method, found.options) == (method, options) and found.why


def test_without_examples_other_shapes_need_some():
    with pytest.raises(ValueError, match=r"kernel is \[2\] here, \[3\] there.*--data; unlabelled ones will do"):
        recommended(examples=False, labels=False, apart="kernel is [2] here, [3] there")


def pair(models, target):
    return ["--source", models["source"], "--target", models[target], "--finetuned", models["finetuned"]]


@pytest.mark.parametrize(
    "target, data, expected",
    [
        ("wider", "", "no --method is given, so it is bico --options center=true: the examples have labels"),
        ("same", "", "no --method is given, so it is bico --options center=true: the examples have labels"),
        ("wider", "cat", "no --method is given, so it is theseus: it needs no labels"),
        ("same", None, "no --method is given, so it is naive: there are no examples"),
    ],
)
def test_a_plan_says_which_and_why(models, images, capsys, target, data, expected):
    given = [] if data is None else ["--data", str(images / data)]
    assert run(["plan", *pair(models, target), *given]) == 0
    assert expected in " ".join(capsys.readouterr().out.split())


def test_labels_that_no_loss_can_read_are_not_read(models, images, capsys):
    """A vision tower alone has no head of classes."""
    words = ["--source", models["finetuned"], "--target", models["wider"], "--data", str(images)]
    assert run(["plan", *words]) == 0
    assert "so it is theseus" in " ".join(capsys.readouterr().out.split())


def test_the_transport_is_that_of_the_method_and_its_recipe_names_it(models, images, tmp_path, capsys):
    words = [*pair(models, "wider"), "--data", str(images)]
    assert run(["transport", *words, "--output", str(tmp_path / "a")]) == 0
    assert "note: no --method is given, so it is bico --options center=true" in capsys.readouterr().out
    named = ["--method", "bico", "--options", "center=true", "--output", str(tmp_path / "b")]
    assert run(["transport", *words, *named]) == 0
    assert "no --method" not in capsys.readouterr().out
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    recipe = read_recipe(tmp_path / "a" / "tvjax.yaml")
    assert (recipe.method, recipe.options) == ("bico", {"center": True})


@pytest.mark.parametrize(
    "more, expected",
    [
        ([], "Give examples with --data"),
        (["--options", "rank=0.5"], "--options are those of a method, found rank: give --method too"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(models, tmp_path, capsys, more, expected):
    assert run(["transport", *pair(models, "wider"), "--output", str(tmp_path / "out"), *more]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert expected in line and not list(tmp_path.iterdir())


def test_examples_make_no_pair_of_two_families(capsys):
    pair = ["--source", str(model_folder("A")), "--target", str(model_folder("llama-A"))]
    assert run(["plan", *pair]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "give a source and a target of one family" in line and "--data" not in line
