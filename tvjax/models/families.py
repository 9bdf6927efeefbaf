"""The families of models by the ``model_type`` of a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tvjax.models.clip import config as clip_config
from tvjax.models.clip import modeling as clip_modeling
from tvjax.models.clip import table as clip_table
from tvjax.models.layer_table import LayerTable
from tvjax.models.llama import config as llama_config
from tvjax.models.llama import modeling as llama_modeling
from tvjax.models.llama import table as llama_table
from tvjax.models.settings import Settings
from tvjax.models.vit import config as vit_config
from tvjax.models.vit import modeling as vit_modeling
from tvjax.models.vit import table as vit_table
from tvjax.stages import Model, PyTree


class Family(NamedTuple):
    """What a family of models consists of.

    Attributes:
      config: its config class, with ``from_dict`` and ``to_dict``.
      init: ``(config, key) -> params``.
      build: ``(config, params, dtype) -> Model``.
      table: its layers.
      inputs: ``(config, examples) -> inputs``, the shapes of what the model takes, so many examples of each kind.
    """

    config: type[Any]
    init: Callable[[Any, Any], PyTree]
    build: Callable[..., Model]
    table: LayerTable
    inputs: Callable[[Any, int], PyTree]


CLIP = Family(clip_config.CLIPConfig, clip_modeling.init, clip_modeling.clip, clip_table.TABLE, clip_modeling.inputs)
VIT = Family(vit_config.ViTConfig, vit_modeling.init, vit_modeling.vit, vit_table.TABLE, vit_modeling.inputs)
LLAMA = Family(
    llama_config.LlamaConfig, llama_modeling.init, llama_modeling.llama, llama_table.TABLE, llama_modeling.inputs
)
FAMILIES = {
    **dict.fromkeys(("clip", "clip_vision_model", "clip_text_model"), CLIP),
    "vit": VIT,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
}


def family_of_settings(settings: Settings) -> Family:
    """The family that a ``config.json`` names.

    Raises:
      ValueError: for a ``model_type`` that is missing or not supported.

    >>> family_of_settings({"model_type": "clip"}).config.__name__
    'CLIPConfig'
    """
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported, only {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def family_of_config(config: Any) -> Family:
    """The family that a config is of.

    Raises:
      ValueError: for an object that is no family's config.

    >>> family_of_config(vit_config.ViTConfig()).build.__name__
    'vit'
    """
    for family in FAMILIES.values():
        if isinstance(config, family.config):
            return family
    names = sorted({family.config.__name__ for family in FAMILIES.values()})
    raise ValueError(f"no family has configs of type {type(config).__name__}: expected one of {names}")
