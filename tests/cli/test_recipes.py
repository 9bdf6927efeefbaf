"""Recipes: read strictly, overridden, written beside the result, and the ones in configs/ all sound."""

import re
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from tvjax.cli import config
from tvjax.cli.main import app, run

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def parse(arguments):
    """The parameters of the command that the arguments call; nothing runs."""
    words, defaults = config.read(app, arguments)
    name, *rest = words
    command = get_command(app).commands[name]
    return command.make_context(name, rest, default_map=defaults.get(name)).params


@pytest.fixture
def recipe(tmp_path):
    def write(**keys):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(keys))
        return str(file)

    return write


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipes_that_ship_are_sound(file):
    from tvjax.jobs.configs import MERGES
    from tvjax.jobs.merges import find_merge
    from tvjax.transport import make_transport

    command = yaml.safe_load(file.read_text())["command"]
    found = parse([command, "--config", str(file)])
    options = config.parse_options(found.get("options") or ())
    if command == "transport":
        make_transport(found["method"], options)
    elif command == "merge":
        assert found["method"] in MERGES
        find_merge(found["method"], options, seed=0)
    assert str(found.get("output", "")) or command == "evaluate"


def test_recipes_exist():
    assert len(RECIPES) >= 10


def test_a_recipe_gives_the_options_and_flags_and_words_override_it(recipe):
    file = recipe(command="apply", task_vectors=["a.safetensors", "b.safetensors"], model="m", output="o", scale=0.5)
    found = parse(["--config", file])
    assert [str(path) for path in found["task_vectors"]] == ["a.safetensors", "b.safetensors"]
    assert (found["model"], found["scale"]) == ("m", 0.5)
    assert parse(["apply", f"--config={file}", "scale=0.25", "model=n"])["scale"] == 0.25
    assert parse(["apply", "--config", file, "--scale", "2", "scale=0.25"])["scale"] == 2.0


def test_hyperparameters_are_a_mapping_in_a_recipe(recipe):
    file = recipe(command="merge", task_vectors=["a"], method="ties", options={"density": 0.2}, output="o.safetensors")
    found = parse(["--config", file, "options.density=0.4", "options.weights=[1, {'**': 2}]"])
    assert config.parse_options(found["options"]) == {"density": 0.4, "weights": [1, {"**": 2}]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config"], "needs a file"),
        (["--config", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
        (["apply", "--config", "{file}", "scael=1"], "no option 'scael'; the nearest is 'scale'"),
        (["merge", "--config", "{file}"], "is a recipe for 'apply', not for 'merge'"),
        (["--config", "{file}", "scale=[1"], "is no YAML"),
        (["--config", "{file}", "command=aply"], "the command is 'aply', expected one of"),
        (["--config", "{file}", "scale=much"], "'--scale'.*a valid number"),
        (["--config", "{file}", "scale=true"], "scale: found True, expected a number or text"),
        (["--config", "{file}", "scale=[1]"], r"scale: found the list \[1\], expected one value"),
        (["--config", "{file}", "model={a: 1}"], "model: found the keys"),
        (["--config", "{file}", "quiet=1"], "quiet: found 1, expected true or false"),
        (["--config", "{file}", "scale=!!float 1"], "aliases and tags are not read"),
        (["--config", "{file}", "command=[apply]"], "the command is"),
        (["--config", "{file}", "model.name=x"], "'model' holds 'm', which has no keys"),
    ],
)
def test_bad_recipes_are_one_line(recipe, capsys, arguments, message):
    file = recipe(command="apply", task_vectors=["a"], model="m", output="o")
    assert run([word.replace("{file}", file) for word in arguments]) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1 and re.search(message, line), line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", "holds a list"),
        (b"a: [", "is no YAML"),
        (b"just words", "holds a str"),
        (b"", "holds None"),
        (b"scale: 1\nscale: 2", "the key 'scale' stands twice"),
        (b"a: &a [1]\nb: *a", "aliases and tags are not read"),
        (b"a: !!python/object/apply:os.getcwd []", "aliases and tags are not read"),
        (b"[" * 10000, "nested too deeply"),
        (b"\x89PNG\r\n\x1a\n\xff", "is no YAML"),
        (b"#" * 2**21, "too many for a recipe"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, capsys, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    assert run(["apply", "--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "recipe.yaml" in line and message in line
    assert run(["apply", "--config", str(tmp_path)]) == 2
    assert "there is no recipe" in capsys.readouterr().err


def test_numbers_are_read_as_they_are_typed(recipe):
    file = recipe(command="merge", task_vectors=["a"], method="ties", options={"t": "1e-3"}, output="o")
    found = parse(["--config", file, "scale=1e-3", "options.density=1e-1", "options.date=2020-01-01"])
    assert found["scale"] == 1e-3
    assert config.parse_options(found["options"]) == {"t": 0.001, "density": 0.1, "date": "2020-01-01"}
