"""An output folder appears when all that belongs into it is there, reports and recipe too; else there is none."""

import json

import pytest

from tvjax.checkpoints.atomic import becomes, new_folder
from tvjax.cli.main import run
from tvjax.jobs import _compose, _extract, _merge, _transport


@pytest.fixture
def tau(models, tmp_path):
    file = tmp_path / "given" / "tau.safetensors"
    file.parent.mkdir()
    words = ["--pretrained", models["source"], "--finetuned", models["finetuned"], "--output", str(file)]
    assert run(["extract", *words, "--quiet"]) == 0
    return file


def command(name, models, images, tau, output):
    pair = ["--source", models["source"], "--finetuned", models["finetuned"], "--target", models["wider"]]
    words = {
        "transport": [*pair, "--method", "theseus", "--data", images],
        "stream": [*pair, "--method", "theseus", "--data", images, "--stream"],
        "compose": [tau, "--model", models["source"], "--data", images, "--epochs", "1", "--objective", "entropy"],
        "merge": [tau, "--method", "average", "--model", models["source"]],
        "extract": ["--pretrained", models["source"], "--finetuned", models["finetuned"], "--rank", "2"],
    }[name]
    name = "transport" if name == "stream" else name
    return [name, *map(str, words), "--output", str(output), "--json"]


@pytest.mark.parametrize("name", ["transport", "stream", "compose", "merge", "extract"])
def test_what_fails_last_leaves_nothing_and_what_ends_leaves_all(
    name, models, images, tau, tmp_path, monkeypatch, capsys
):
    """The recipe is what is written last: a run that is killed before has made no folder."""
    words, output = command(name, models, images, tau, tmp_path / "outputs" / "made"), tmp_path / "outputs" / "made"
    output.parent.mkdir()

    def killed(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        for job in (_transport, _compose, _merge, _extract):
            patched.setattr(job, "write_recipe", killed)
        assert run(words) == 2
    assert "no space left" in capsys.readouterr().err and not list(output.parent.iterdir())
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.get("output", str(output)) == str(output)
    reports = {"compose": "coefficients.safetensors"}.get(name, "leaf_report.json")
    assert {"README.md", "tvjax.yaml", reports} <= {file.name for file in output.iterdir()}
    assert [file.name for file in output.parent.iterdir()] == ["made"]
    assert "# made\n" in (output / "README.md").read_text() and ".partial" not in (output / "README.md").read_text()
    assert str(output) in (output / "tvjax.yaml").read_text()


def test_a_folder_in_the_making_is_filled_in_place(tmp_path):
    with new_folder(tmp_path / "out") as outer:
        (outer / "a").write_text("a")
        with new_folder(outer) as inner:
            (inner / "b").write_text("b")
        assert inner == outer and becomes(outer) == tmp_path / "out" and not (tmp_path / "out").exists()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"a", "b"}
