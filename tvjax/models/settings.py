"""Reading the fields of a model's config from the ``config.json`` of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
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
    """
    names = settings.get("architectures")
    return names[0] if names else defaults[settings["model_type"]]


def fields(config_class: type, settings: Settings) -> dict[str, Any]:
    """The values of a config class's fields that the settings give, checked for what every family supports.

    Absent and null entries are left to the class's defaults, which are those of transformers.
    """
    names = [field.name for field in dataclasses.fields(config_class)]
    values = {name: settings[name] for name in names if settings.get(name) is not None}
    for name in ("image_size", "patch_size"):
        if name in values:
            values[name] = _square(name, values[name])
    for field in dataclasses.fields(config_class):
        value = values.get(field.name, field.default)
        kinds = (int, float) if isinstance(field.default, float) else type(field.default)
        if not isinstance(value, kinds):
            raise ValueError(f"{field.name} is {value!r}, expected {type(field.default).__name__}")
    channels = settings.get("num_channels", 3)
    if channels != 3:
        raise ValueError(f"num_channels is {channels}, expected 3: images of other channels are not supported")
    return values


def _square(name: str, size: int | list[int]) -> int:
    sides = [size] if isinstance(size, int) else list(size)
    if len(set(sides)) != 1:
        raise ValueError(f"{name} is {size}, expected a square: images and patches of unequal sides are not supported")
    return sides[0]
