"""What a value is, as a message says it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any


def with_article(noun: str) -> str:
    """A noun after the article that it is spoken with; letters that are spelled out sound by their names.

    >>> with_article("int"), with_article("dict"), with_article("MPNetConfig"), with_article("ViTConfig")
    ('an int', 'a dict', 'an MPNetConfig', 'a ViTConfig')
    """
    return f"{'an' if re.match('[aeiouAEIO]|[FHLMNRSX][A-Z]', noun) else 'a'} {noun}"


def kind_of(value: Any) -> str:
    """The type of a value, after its article; None is itself.

    >>> kind_of(3), kind_of({}), kind_of(None)
    ('an int', 'a dict', 'None')
    """
    return "None" if value is None else with_article(type(value).__name__)


def as_path(value: Any, expected: str = "the path of a file") -> Path:
    """The path that a value is.

    Raises:
      ValueError: it is none, such as a number, or the tree that was to be written there.

    >>> as_path("tau.safetensors").suffix
    '.safetensors'
    >>> as_path(None)
    Traceback (most recent call last):
    ...
    ValueError: found None, expected the path of a file
    """
    if isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str):
        return Path(value)
    raise ValueError(f"found {kind_of(value)}, expected {expected}")
