"""Recipes: configs of jobs as YAML, read strictly.

command: transport
source: openai/clip-vit-base-patch32
...
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tvjax.jobs import configs
from tvjax.jobs.schema import Config
from tvjax.kinds import kind_of

LARGEST = 2**20  # bytes of a recipe
COMMAND = "command"  # the key that says which job a recipe is for
PRINTING = ("quiet", "json", "by_class", "leaves")  # what a recipe says to the command line alone
JOBS: dict[str, type[Config]] = {
    "apply": configs.ApplyConfig,
    "compose": configs.ComposeConfig,
    "convert": configs.ConvertConfig,
    "evaluate": configs.EvaluateConfig,
    "extract": configs.ExtractConfig,
    "inspect": configs.InspectConfig,
    "merge": configs.MergeConfig,
    "plan": configs.PlanConfig,
    "transport": configs.TransportConfig,
}


def read_recipe(file: str | os.PathLike[str]) -> Config:
    """The config that a recipe holds, such as ``tvjax.yaml`` beside a result.

    Args:
      file: a YAML file whose key ``command`` names the job.

    Returns:
      The config of that job.

    Raises:
      ValueError: what is no recipe, a key twice, one that the job does not have, or a value of another type; one line.
    """
    recipe = load(Path(file))
    name = recipe.pop(COMMAND, None)
    if not isinstance(name, str) or name not in JOBS:
        raise ValueError(f"{os.fspath(file)!r}: the command is {short(name)}, expected one of {sorted(JOBS)}")
    given = {str(key).replace("-", "_"): value for key, value in recipe.items() if value is not None}
    try:
        return JOBS[name].read({key: value for key, value in given.items() if key not in PRINTING})
    except ValueError as error:
        raise ValueError(f"{os.fspath(file)!r}: {error}") from error


def recipe_of(config: Config) -> dict[str, Any]:
    """The keys and values that `read_recipe` makes the same config of.

    >>> recipe_of(configs.ApplyConfig(task_vectors="t", model="m", output="o"))["task_vectors"]
    ['t']
    """
    command = next(name for name, kind in JOBS.items() if isinstance(config, kind))
    return {COMMAND: command, **config.model_dump(mode="json")}


def write_recipe(recipe: Mapping[str, Any], output: Path) -> None:
    """Writes what makes a result again beside it: into its folder, or beside its file."""
    from tvjax.checkpoints.atomic import write_text

    target = output / "tvjax.yaml" if output.is_dir() else output.with_name(output.name + ".yaml")
    write_text(target, yaml.dump(dict(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True))


def load(file: Path) -> dict[str, Any]:
    """The keys and values of a recipe."""
    if not file.is_file():
        raise ValueError(f"there is no recipe {str(file)!r}")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"{str(file)!r} has {file.stat().st_size:,} bytes, too many for a recipe")
    try:
        recipe = read_yaml(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{str(file)!r} holds {kind_of(recipe)}, expected keys with values")
    return recipe


def short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class _Loader(yaml.SafeLoader):
    """Plain YAML: no tags and no aliases, no key twice; ``1e-3`` is a number, and a date is text."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            found = f"*{event.anchor}" if isinstance(event, yaml.AliasEvent) else event.tag
            raise yaml.composer.ComposerError(None, None, f"{found}: aliases and tags are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, Hashable) and name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen |= {name} if isinstance(name, Hashable) else set()  # the other kind is refused below
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""

    def ignore_aliases(self, data: Any) -> bool:
        """Whether a value is written out where it stands twice: always."""
        return True


_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
for _side in (_Loader, Dumper):
    _side.yaml_implicit_resolvers = {
        letter: [(tag, rule) for tag, rule in rules if not tag.endswith((":timestamp", ":float", ":merge"))]
        for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The value of a text; what is no plain YAML is a ValueError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def dump(value: Any) -> str:
    """A value on one line, as `_Loader` reads it again."""
    return yaml.dump([value], Dumper=Dumper, default_flow_style=True, width=math.inf, allow_unicode=True).strip()[1:-1]
