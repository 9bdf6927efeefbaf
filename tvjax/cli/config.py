"""Recipes: the options of a command as YAML, read strictly, and overridden by ``key=value``.

The schema is the config of the command's job (`tvjax.jobs`): a key is the name of one of its fields.

    tvjax transport --config configs/transport_bico.yaml per_class=16 --output edited

A recipe of mergekit is read too (`tvjax.jobs.mergekit`): ``tvjax merge --config FILE --output FOLDER``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

from tvjax.jobs.mergekit import is_mergekit, translate
from tvjax.jobs.recipes import COMMAND, dump, load, read_yaml, short
from tvjax.jobs.schema import check_key


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
    recipe = load(file)
    if is_mergekit(recipe):
        keys, notes = translate(recipe, str(file))
        recipe = {COMMAND: "merge", **keys}
        if "--quiet" not in rest:
            print(*(f"note: {note}" for note in notes), sep="\n", end="\n" if notes else "", file=sys.stderr)
    overrides = [word for word in rest if re.fullmatch(r"[A-Za-z_][\w.-]*=.*", word, re.DOTALL)]
    rest = [word for word in rest if word not in overrides]
    overridden = set()
    for override in overrides:
        key, _, text = override.partition("=")
        _put(recipe, key, _parse(text, override))
        overridden.add(key.partition(".")[0].replace("-", "_"))
    commands = getattr(get_command(app), "commands")  # noqa: B009 - typed as any command
    named = recipe.pop(COMMAND, None)
    if not isinstance(named, str | None):
        raise ValueError(f"{str(file)!r}: the command is {short(named)}, expected one of {sorted(commands)}")
    called = next((word for word in rest if word in commands), None)
    planned = (named, called) == ("transport", "plan")  # a plan takes what it plans
    if named is not None and called is not None and named != called and not planned:
        raise ValueError(f"{str(file)!r} is a recipe for {named!r}, not for {called!r}")
    name = called or named or ""
    if name not in commands:
        raise ValueError(f"{str(file)!r}: the command is {name!r}, expected one of {sorted(commands)}")
    if called is None:
        rest.insert(0, name)
    names = _names(commands[name])
    parameters = {parameter.name: parameter for parameter in commands[name].params}
    values = {}
    for key, value in recipe.items():
        plain = str(key).replace("-", "_")
        check_key(plain, names, f"{str(file)!r}: tvjax {name} has")
        if names[plain] in values and plain not in overridden:
            raise ValueError(f"{str(file)!r}: {plain} is {names[plain]} by another name, which is given too")
        if value is not None:  # else the default
            try:
                values[names[plain]] = _words(plain, parameters[names[plain]], value)
            except ValueError as error:
                raise ValueError(f"{str(file)!r}: {plain}: {error}") from error
    return rest, {name: values}


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


def _words(key: str, parameter: Any, value: Any) -> Any:
    """A value of a recipe as it would be typed, so that both are read alike: 1.5 is no whole number."""
    many = getattr(parameter, "multiple", False) or parameter.nargs != 1
    if isinstance(value, dict):
        if key != "options":
            raise ValueError(f"found the keys {short(list(value))}, expected {'values' if many else 'a value'}")
        return [f"{name}={dump(item)}" for name, item in value.items()]
    if isinstance(value, list):
        if not many:
            raise ValueError(f"found the list {short(value)}, expected one value")
        return [_word(item) for item in value]
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ValueError(f"found {short(value)}, expected true or false")
        return value
    return [_word(value)] if many else _word(value)


def _word(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"found {short(value)}, expected a number or text; quote a word such as 'yes' or 'null'")
    return str(value)


def _names(command: Any) -> dict[str, str]:
    """The names of a command's parameters by the keys of a recipe, aliases too: ``--per-class`` is ``per_class``."""
    names: dict[str, str] = {}
    for parameter in command.params:
        flags = [option.removeprefix("--").replace("-", "_") for option in parameter.opts if option.startswith("--")]
        names |= dict.fromkeys((parameter.name, *flags), parameter.name)
    return {key: name for key, name in names.items() if name not in ("help", "install_completion", "show_completion")}


def _parse(text: str, override: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError as error:
        raise ValueError(f"the value of {short(override)} is no YAML: {error}") from error


def _put(recipe: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = recipe
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ValueError(f"{key!r}: {name!r} holds {node!r}, which has no keys")
    node[last] = value
