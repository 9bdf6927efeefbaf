"""Configs: the one schema of Python, recipes and the command line."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from typer.main import get_command

from tvjax import jobs
from tvjax.cli.main import app, run
from tvjax.data.embedded import model_folder
from tvjax.jobs.recipes import JOBS as CONFIGS

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
GIVEN = {"source": "a", "finetuned": "b", "target": "c", "method": "theseus", "output": "d"}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_command_has_the_fields_of_its_config_as_options(name):
    command = get_command(app).commands[name]
    fields = CONFIGS[name].model_fields
    own = {parameter.name: parameter for parameter in command.params if parameter.name in fields}
    assert own.keys() == fields.keys()
    others = {parameter.name for parameter in command.params} - fields.keys()
    assert others <= {"quiet", "json", "by_class", "leaves"}  # what is about printing
    for key, field in fields.items():
        assert own[key].required == field.is_required() and own[key].help.startswith(field.description[:20])


def test_unknown_keys_name_the_nearest_and_values_are_not_converted():
    for change, message in (
        ({"methd": "bico"}, "no option 'methd'; the nearest is 'method'"),
        ({"scale": "1"}, "scale: found '1'; input should be a valid number"),
        ({"scale": True}, "scale: found True"),
        ({"scale": float("nan")}, "nan is no finite number"),
        ({"seed": 1.5}, "seed: found 1.5"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"tokens": "all"}, "'interpolate', 'class_token' or 'mean'"),
        ({"batch_size": None}, "batch_size: found None"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")) as found:
            jobs.TransportConfig.read({**GIVEN, **change})
        assert "\n" not in str(found.value)
        with pytest.raises(ValueError) as made:
            jobs.TransportConfig(**{**GIVEN, **change})
        assert str(made.value) == str(found.value)
    with pytest.raises(ValueError, match="target is missing"):
        jobs.TransportConfig.read({key: value for key, value in GIVEN.items() if key != "target"})


def test_images_is_another_name_of_data():
    assert jobs.TransportConfig(**GIVEN, images="x") == jobs.TransportConfig(**GIVEN, data="x")
    with pytest.raises(ValueError, match="images"):
        jobs.TransportConfig.read({**GIVEN, "images": "x", "data": "y"})


def test_one_may_stand_for_a_list_of_one():
    given = {"model": "m", "output": "o"}
    one = jobs.ApplyConfig(task_vectors="a", **given)
    assert one == jobs.ApplyConfig(task_vectors=["a"], **given) and one.task_vectors[0].name == "a"


def test_configs_are_fixed_and_survive_json():
    config = jobs.TransportConfig(**GIVEN, options={"rank": 0.5})
    with pytest.raises(ValidationError):
        config.scale = 2.0
    assert jobs.TransportConfig.model_validate_json(config.model_dump_json()) == config


def test_every_job_has_a_config_and_a_command():
    commands = get_command(app).commands
    assert commands.keys() - {"demo"} == CONFIGS.keys() and all(callable(getattr(jobs, name)) for name in CONFIGS)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_recipes_that_ship_are_configs(file):
    assert isinstance(jobs.read_recipe(file), CONFIGS[yaml.safe_load(file.read_text())["command"]])


def test_the_recipe_beside_a_result_is_the_config_that_made_it(tmp_path):
    tau, model = tmp_path / "tau.safetensors", str(model_folder("A"))
    words = ["extract", "--pretrained", model, "--finetuned", model, "--subtree", "vision/blocks/1", "--quiet"]
    assert run([*words, "--output", str(tau)]) == 0
    config = jobs.ExtractConfig(pretrained=model, finetuned=model, part="vision/blocks/1", output=tau)
    assert jobs.read_recipe(f"{tau}.yaml") == config
    Path(f"{tau}.yaml").unlink()
    jobs.extract(config)  # from Python too
    assert jobs.read_recipe(f"{tau}.yaml") == config
    merging = jobs.MergeConfig(
        task_vectors=tau, method="ties", options={"density": {"**": 0.5}}, output=tmp_path / "merged.safetensors"
    )
    jobs.merge(merging)
    assert jobs.read_recipe(tmp_path / "merged.safetensors.yaml") == merging
    jobs.apply(jobs.ApplyConfig(task_vectors=tau, model=model, output=tmp_path / "applied"))
    assert jobs.read_recipe(tmp_path / "applied" / "tvjax.yaml").model == model


def test_options_are_what_a_recipe_can_hold():
    with pytest.raises(ValueError, match="options.density: found .*; input was not a valid JSON value"):
        jobs.MergeConfig.read({"task_vectors": "t", "method": "ties", "output": "o", "options": {"density": object()}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("command: aply", "the command is 'aply', expected one of"),
        ("command: [apply]", "the command is"),
        ("model: m", "the command is None"),
        ("command: apply\nmodel: m\nmodel: n", "the key 'model' stands twice"),
        ("command: apply\nmodell: m", "no option 'modell'; the nearest is 'model'"),
        ("command: apply\nmodel: m\ntask_vectors: t\noutput: o\nscale: much", "scale: found 'much'"),
        ("command: apply\nmodel: 1\ntask_vectors: t\noutput: o", "model: found 1"),
        ("command: apply\nmodel: m\noutput: o", "task_vectors is missing"),
    ],
)
def test_a_recipe_that_is_no_config_is_one_line(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError) as found:
        jobs.read_recipe(tmp_path / "recipe.yaml")
    assert message in str(found.value).replace("\n", " ") and "recipe.yaml" in str(found.value)


def test_a_key_by_two_names_is_refused(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("command: evaluate\nmodels: [m]\ndata: x\nimages: y\n")
    assert run(["--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "images is data by another name, which is given too" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("command: evaluate\nmodels: [/nowhere/m]\ndata: x\n")
    assert run(["--config", str(tmp_path / "recipe.yaml"), "images=y"]) == 2  # an override wins by either name
    assert "'/nowhere/m' is no folder" in capsys.readouterr().err
