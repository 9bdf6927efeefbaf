"""Configs: the one schema of Python, recipes and the command line."""

import pytest
from pydantic import ValidationError
from typer.main import get_command

from tvjax import jobs
from tvjax.cli.main import app

CONFIGS = {name.removesuffix("Config").lower(): getattr(jobs, name) for name in jobs.__all__ if name.endswith("Config")}
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
        with pytest.raises(ValidationError):
            jobs.TransportConfig(**{**GIVEN, **change})
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
