"""Reading the fields of a model's config from the ``config.json`` of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]


def architecture(settings: Settings, defaults: Mapping[str, str]) -> str:
    """The class of transformers that a folder was saved from.

    Args:
      settings: the content of ``config.json``.
      defaults: the architecture of each `model_type`, for folders that name none.

    Returns:
      The first of ``architectures``, or the default of the ``model_type``.

    Raises:
      ValueError: ``architectures`` is no list of names.
    """
    names = settings.get("architectures")
    if names and not (isinstance(names, list) and isinstance(names[0], str)):
        raise ValueError(f"architectures is {names!r}, expected a list of names")
    return names[0] if names else defaults[settings["model_type"]]


def fields(config_class: type, settings: Settings) -> dict[str, Any]:
    """The values of a config class's fields that the settings give, checked for what every family supports.

    Absent and null entries are left to the class's defaults, which are those of transformers.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"the settings of {config_class.__name__} are {settings!r}, expected an object")
    names = [field.name for field in dataclasses.fields(config_class)]
    values = {name: settings[name] for name in names if settings.get(name) is not None}
    for name in ("image_size", "patch_size"):
        if name in values:
            values[name] = _square(name, values[name])
    described: tuple[Any, ...] = dataclasses.fields(config_class)
    for field in described:
        value = values.get(field.name, field.default)
        kinds = (int, float) if isinstance(field.default, float) else type(field.default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(field.default, bool)):
            raise ValueError(f"{field.name} is {value!r}, expected {type(field.default).__name__}")
        if re.search("size|layers|heads|position|dim|labels", field.name) and value <= 0:
            raise ValueError(f"{field.name} is {value}, expected a number greater than 0")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} is {value}, expected a finite number")
    channels = settings.get("num_channels", 3)
    if channels != 3:
        raise ValueError(f"num_channels is {channels}, expected 3: images of other channels are not supported")
    return values


def _square(name: str, size: int | list[int]) -> int:
    sides = [size] if isinstance(size, int) else list(size)
    if len(set(sides)) != 1:
        raise ValueError(f"{name} is {size}, expected a square: images and patches of unequal sides are not supported")
    return sides[0]
