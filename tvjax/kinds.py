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
        if not os.fspath(value):  # as of a shell variable that is not set; not the folder that one is in
            raise ValueError(f"found an empty name, expected {expected}")
        return Path(value)
    raise ValueError(f"found {kind_of(value)}, expected {expected}")


def as_bytes(value: int | str) -> int:
    """The bytes of a size.

    Raises:
      ValueError: it is none.

    >>> as_bytes("5GB"), as_bytes("1.5 kB"), as_bytes("12"), as_bytes(3)
    (5000000000, 1500, 12, 3)
    >>> as_bytes("-5GB")
    Traceback (most recent call last):
    ...
    ValueError: the size of a shard is '-5GB', expected 1 byte or more: a number of bytes, or a size such as 5GB
    """
    parsed = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)B?\s*", str(value), re.IGNORECASE)
    size = int(float(parsed[1]) * 1000 ** " KMGT".index(parsed[2].upper() or " ")) if parsed else 0
    if size < 1:
        raise ValueError(
            f"the size of a shard is {value!r}, expected 1 byte or more: a number of bytes, or a size such as 5GB"
        )
    return size
