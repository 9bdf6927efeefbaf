"""What a config of a job is: a strict pydantic model, and how one of its fields is typed on a command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Self = TypeVar("Self", bound="Config")
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Typed:
    """How a field is typed on a command line; its name, help and bounds are those of the field.

    Attributes:
      metavar: what stands for the value in the help.
      argument: whether it is given by its place, without a name.
    """

    metavar: str | None = None
    argument: bool = False

    @property
    def names(self) -> bool:
        """Whether the value names a file, a folder, a model or data."""
        return (self.metavar or "").rstrip(".") in ("MODEL", "FILE", "FOLDER", "DATA", "PATH")


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str | Path | int | float) else value


File = Annotated[Path, Field(strict=False)]
Several = Annotated[tuple[Item, ...], BeforeValidator(_several), Field(strict=False)]
"""One, or several in a list or tuple."""


class Config(BaseModel):
    """What a job is to do: the one schema of Python, recipes and the command line.

    Values are not converted (``"1"`` is no number), numbers are finite, and a key that the job does not have is an
    error that names the nearest.

    >>> class Scaled(Config):
    ...     scale: float = 1.0
    >>> Scaled(scale=2).scale
    2.0
    >>> Scaled.read({"scael": 2})
    Traceback (most recent call last):
    ValueError: there is no option 'scael'; the nearest is 'scale'
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def __init__(self, **values: Any):
        """The config of these values; a ValueError of one line where they are none."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError("; ".join(map(_line, error.errors()))) from error

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        keys = cls.keys()
        for key, value in values.items() if isinstance(values, Mapping) else ():
            check_key(str(key), keys)
            several = value if isinstance(value, list | tuple) else [value]
            if typed(cls, keys[str(key)]).names and any(isinstance(one, str) and not one for one in several):
                raise ValueError(f"{key} is empty, expected a name: is a variable of the shell not set?")
        return values

    @classmethod
    def keys(cls) -> dict[str, str]:
        """The field of each name that it may be given by: its own, and others that it has had."""
        return {given: name for name in cls.model_fields for given in names_of(cls, name)}

    @classmethod
    def read(cls: type[Self], values: Mapping[str, Any]) -> Self:
        """The config of these values.

        Raises:
          ValueError: of one line, for a key that is not known, a value of another type, and values that do not go
            together.
        """
        return cls(**values)


def typed(config: type[Config], name: str) -> Typed:
    """How a field is typed on a command line."""
    return next((item for item in config.model_fields[name].metadata if isinstance(item, Typed)), Typed())


def names_of(config: type[Config], name: str) -> list[str]:
    """The names that a field may be given by, its own first."""
    alias = config.model_fields[name].validation_alias
    return [str(given) for given in alias.choices] if isinstance(alias, AliasChoices) else [name]


def check_key(key: str, known: Mapping[str, str], whose: str = "there is") -> None:
    """Raises a ValueError for a key that is none of those known, with the nearest."""
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
        shown = repr(key) if len(key) <= 80 else f"{key[:80]!r}..."
        raise ValueError(f"{whose} no option {shown}; the nearest is {near!r}")


def _line(error: Any) -> str:
    """One of pydantic's errors as a line of ours."""
    place, found = ".".join(map(str, error["loc"])), repr(error.get("input"))
    found = found if len(found) <= 80 else f"{found[:80]}..."
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{place} is missing"
    if error["type"] == "finite_number":
        return f"{place}: {error['input']} is no finite number"
    return f"{place}: found {found}; {error['msg'][0].lower()}{error['msg'][1:]}"
