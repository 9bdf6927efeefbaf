"""Recipes: the options of a command as YAML, read strictly, overridden by ``key=value``, and written beside the result.

The schema is the command itself: a key is the name of one of its options or arguments.

    tvjax transport --config configs/bico.yaml scale=1.5 --output edited
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.main import get_command

COMMAND = "command"  # the key that says which command a recipe is for


def read(app: typer.Typer, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes ``--config FILE`` and its overrides out of the arguments.

    Args:
      app: the command line.
      arguments: as typed; with ``--config``, a word ``key=value`` overrides a key of the file, ``a.b=value`` one of a
        mapping in it, the value read as YAML.

    Returns:
      The other arguments, and the defaults of the commands as Click takes them (``default_map``).

    Raises:
      ValueError: no such file, no YAML, a recipe of another command, or a key that the command does not have.
    """
    rest = list(arguments)
    if not any(word == "--config" or word.startswith("--config=") for word in rest):
        return rest, {}
    at = next(i for i, word in enumerate(rest) if word == "--config" or word.startswith("--config="))
    word = rest.pop(at)
    if word == "--config":
        if at == len(rest):
            raise ValueError("--config needs a file")
        file = Path(rest.pop(at))
    else:
        file = Path(word.removeprefix("--config="))
    recipe = _load(file)
    overrides = [word for word in rest if re.fullmatch(r"[A-Za-z_][\w.-]*=.*", word, re.DOTALL)]
    rest = [word for word in rest if word not in overrides]
    for override in overrides:
        key, _, text = override.partition("=")
        _put(recipe, key, _parse(text, override))
    commands = getattr(get_command(app), "commands")  # noqa: B009 - typed as any command
    named = recipe.pop(COMMAND, None)
    called = next((word for word in rest if word in commands), None)
    planned = (named, called) == ("transport", "plan")  # a plan takes what it plans
    if named is not None and called is not None and named != called and not planned:
        raise ValueError(f"{str(file)!r} is a recipe for {named!r}, not for {called!r}")
    name = called or named
    if name not in commands:
        raise ValueError(f"{str(file)!r}: the command is {name!r}, expected one of {sorted(commands)}")
    if called is None:
        rest.insert(0, name)
    names = _names(commands[name])
    values = {}
    for key, value in recipe.items():
        plain = str(key).replace("-", "_")
        if plain not in names:
            near = difflib.get_close_matches(plain, names, n=1, cutoff=0.0)
            raise ValueError(f"{str(file)!r}: tvjax {name} has no option {key!r}; the nearest is {near[0]!r}")
        values[names[plain]] = _words(value) if isinstance(value, dict) else value
    return rest, {name: values}


def resolved(context: typer.Context) -> str:
    """The command that is running, as a recipe that runs it again."""
    names = {parameter: key for key, parameter in _names(context.command).items()}
    values = {names[name]: _plain(value) for name, value in context.params.items() if name in names}
    if values.get("options"):
        values["options"] = parse_options(values["options"])
    return yaml.safe_dump({COMMAND: context.info_name, **values}, sort_keys=False, allow_unicode=True)


def write(context: typer.Context, output: Path) -> None:
    """Writes the recipe of the running command beside its result: into its folder, or beside its file."""
    from tvjax.checkpoints.atomic import replacing

    target = output / "tvjax.yaml" if output.is_dir() else output.with_name(output.name + ".yaml")
    with replacing(target) as temporary:
        temporary.write_text(resolved(context), encoding="utf-8")


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """The hyperparameters of ``--options name=value`` words, the values read as YAML.

    Raises:
      ValueError: a word without ``=``, a value that is no YAML, or a name given twice.

    >>> parse_options(["density=0.2", "weights=[1, 0.5]"])
    {'density': 0.2, 'weights': [1, 0.5]}
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise ValueError(f"the option {word!r} is not of the form name=value")
        if name in options:
            raise ValueError(f"the option {name!r} is given twice: {options[name]!r} and {text}")
        options[name] = _parse(text, word)
    return options


def _words(options: dict[str, Any]) -> list[str]:
    return [f"{name}={json.dumps(value)}" for name, value in options.items()]  # JSON is YAML


def _names(command: Any) -> dict[str, str]:
    """The names of a command's parameters by the keys of a recipe: ``--per-class`` is ``per_class``."""
    names = {}
    for parameter in command.params:
        long = [option for option in parameter.opts if option.startswith("--")]
        key = long[0].removeprefix("--").replace("-", "_") if long else parameter.name
        if key not in ("help", "install_completion", "show_completion"):
            names[key] = parameter.name
    return names


def _load(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"there is no recipe {str(file)!r}")
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} is no YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{str(file)!r} holds a {type(recipe).__name__}, expected keys with values")
    return recipe


def _parse(text: str, override: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of {override!r} is no YAML: {error}") from error


def _put(recipe: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = recipe
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ValueError(f"{key!r}: {name!r} holds {node!r}, which has no keys")
    node[last] = value


def _plain(value: Any) -> Any:
    """A value as YAML writes it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
