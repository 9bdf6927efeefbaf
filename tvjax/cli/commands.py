"""A command of a job: its options are the fields of the job's config, so that there is one schema of both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import GenericAlias, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from tvjax.cli import config as recipes
from tvjax.jobs.schema import Config, names_of, typed

Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object, and nothing else.")]


def command(config: type[Config]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a function of a config and of options of its own a signature for typer.

    Args:
      config: the config; each of its fields becomes an option or an argument.

    Returns:
      A decorator of a function whose first parameter is the config.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @functools.wraps(function)
        def called(**values: Any) -> None:
            others = {parameter.name: values.pop(parameter.name) for parameter in own}
            if "options" in config.model_fields:
                values["options"] = recipes.parse_options(values["options"] or ())
            given = {name: value for name, value in values.items() if value is not None}
            function(config.read(given), **others)

        fields = [_parameter(config, name, field) for name, field in config.model_fields.items()]
        fields.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)  # required ones first
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*fields, *own)]
        called.__dict__["__signature__"] = inspect.Signature(parameters)
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def _parameter(config: type[Config], name: str, field: FieldInfo) -> inspect.Parameter:
    shown = typed(config, name)
    about: dict[str, Any] = {"metavar": shown.metavar, "help": field.description}
    for item in field.metadata:
        about |= {"min": item.ge} if isinstance(item, Ge) else {"max": item.le} if isinstance(item, Le) else {}
    default = None if field.default_factory else field.default
    if shown.argument:
        option: Any = typer.Argument(**about)
    else:
        flags = [f"--{flag.replace('_', '-')}" for flag in names_of(config, name)]
        if field.annotation is not bool or default:
            flags = [flag if _plain(field.annotation) is not bool else f"{flag}/--no-{flag[2:]}" for flag in flags]
        option = typer.Option(*flags, **about)
    if default in ((), {}):
        default = None
    annotation: Any = Annotated[_shown(field.annotation, default), option]
    empty = inspect.Parameter.empty if field.is_required() else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=annotation)


def _shown(annotation: Any, default: Any) -> Any:
    """The type of a field as typer has it: several are a list, and keys with values words."""
    plain = _plain(annotation)
    if get_origin(plain) in (tuple, dict):
        item = str if get_origin(plain) is dict else _plain(get_args(plain)[0])
        plain = GenericAlias(list, (_as_typed(item),))
    plain = _as_typed(plain)
    return plain | None if default is None or _optional(annotation) else plain


def _as_typed(plain: Any) -> Any:
    return str if plain is Path else plain  # the path of an empty word would be the folder that one is in


def _plain(annotation: Any) -> Any:
    """A type without what pydantic knows of it, and without None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if _optional(annotation):
        return _plain(next(part for part in get_args(annotation) if part is not type(None)))
    assert annotation in (str, int, float, bool, Path) or get_origin(annotation) in (tuple, dict, Literal), annotation
    return annotation


def _optional(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)
