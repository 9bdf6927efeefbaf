"""Reading the fields of a model's config from the ``config.json`` of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]
_MAY_BE_0 = (
    *("eos_token_id", "pad_token_id", "decoder_start_token_id", "projection_dim", "max_window_layers"),
    *("type_vocab_size", "relative_attention_num_buckets"),
)


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
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"architectures is {names!r}, expected a list of names")
    return names[0] if names else defaults[settings["model_type"]]


def fields(config_class: type, settings: Settings) -> dict[str, Any]:
    """The values of a config class's fields that the settings give, checked for what every family supports.

    Absent and null entries are left to the class's defaults, which are those of transformers.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"the settings of {config_class.__name__} are {settings!r}, expected an object")
    kinds = _kinds(config_class)
    values = {name: settings[name] for name in kinds if settings.get(name) is not None}
    for name in ("image_size", "patch_size"):
        if name in values:
            values[name] = _square(name, values[name])
    for field in dataclasses.fields(config_class):
        kind, optional = kinds.get(field.name, (None, True))
        value = values.get(field.name, field.default)
        if kind is None or (value is None and optional):
            continue
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{field.name} is {value!r}, expected {kind.__name__}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_range(field.name, value)
    if values.get("patch_size", 0) > values.get("image_size", math.inf):
        raise ValueError(f"patch_size {values['patch_size']} is greater than image_size {values['image_size']}")
    channels = settings.get("num_channels", 3)
    if channels != 3:
        raise ValueError(f"num_channels is {channels}, expected 3: images of other channels are not supported")
    return values


def part(settings: Settings, key: str) -> Settings:
    """The object that stands in settings under a key; empty where there is none.

    Raises:
      ValueError: something else stands there.
    """
    found = settings.get(key)
    if found is not None and not isinstance(found, dict):
        raise ValueError(f"{key} is {found!r}, expected an object")
    return found or {}


def _kinds(config_class: type) -> dict[str, tuple[type, bool]]:
    """The type of each field that is a number, a text or a truth value, and whether it may be None."""
    found, hints = {}, typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        options = () if typing.get_origin(hint) is tuple else typing.get_args(hint) or (hint,)
        plain = [option for option in options if option in (int, float, bool, str)]
        if plain:
            found[field.name] = plain[0], type(None) in options
    return found


def _check_range(name: str, value: int | float) -> None:
    """Numbers that no model has are refused here: sizes would be multiplied, and blocks counted, before any weight."""
    greatest = 10_000 if name in ("num_hidden_layers", "num_layers", "num_decoder_layers") else 2**24
    least = 0 if isinstance(value, float) or name in _MAY_BE_0 else 1
    if not name.endswith("init_value") and not least <= value <= greatest:
        raise ValueError(f"{name} is {value!r}, expected a number from {least} to {greatest}")


def _square(name: str, size: int | list[int]) -> int:
    if not (isinstance(size, int) or (isinstance(size, list) and all(isinstance(side, int) for side in size))):
        raise ValueError(f"{name} is {size!r}, expected a number or two")
    sides = [size] if isinstance(size, int) else size
    if len(set(sides)) != 1:
        raise ValueError(f"{name} is {size}, expected a square: images and patches of unequal sides are not supported")
    return sides[0]


class NoCode(ValueError):
    """A config of a known family that asks for what its modelling code does not compute."""


def check_not_quantised(settings: Settings) -> None:
    """Raises a ValueError of quantised weights, whose integers take no arithmetic."""
    quantised = settings.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise ValueError(
            f"the weights are quantised ({method}), which takes no arithmetic: load the model with transformers, "
            "call dequantize(), and save it"
        )
