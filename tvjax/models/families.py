"""The families of models by the ``model_type`` of a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tvjax.kinds import kind_of
from tvjax.models import generic
from tvjax.models.bert import config as bert_config
from tvjax.models.bert import modeling as bert_modeling
from tvjax.models.clip import config as clip_config
from tvjax.models.clip import modeling as clip_modeling
from tvjax.models.clip import table as clip_table
from tvjax.models.dinov2 import config as dinov2_config
from tvjax.models.dinov2 import modeling as dinov2_modeling
from tvjax.models.dinov2 import table as dinov2_table
from tvjax.models.gemma import config as gemma_config
from tvjax.models.gemma import modeling as gemma_modeling
from tvjax.models.gemma import table as gemma_table
from tvjax.models.gpt2 import config as gpt2_config
from tvjax.models.gpt2 import modeling as gpt2_modeling
from tvjax.models.gpt2 import table as gpt2_table
from tvjax.models.key_table import Tensor
from tvjax.models.layer_table import LayerTable
from tvjax.models.llama import config as llama_config
from tvjax.models.llama import modeling as llama_modeling
from tvjax.models.llama import table as llama_table
from tvjax.models.settings import Settings
from tvjax.models.siglip import config as siglip_config
from tvjax.models.siglip import modeling as siglip_modeling
from tvjax.models.siglip import table as siglip_table
from tvjax.models.t5 import config as t5_config
from tvjax.models.t5 import modeling as t5_modeling
from tvjax.models.t5 import table as t5_table
from tvjax.models.transformer import parameter_shapes, two_tower_inputs
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
      part: the part that a task vector covers where nobody says it, "" for all.
      asked: how jobs ask its models (`tvjax.jobs.asking`): by their ``own_head``, by a ``zero_shot`` head, or in
        ``language``; or a function of the config to one of these; "" where there is no modelling code.
      completed: ``(config, tensors) -> config``, with what only the tensors of a checkpoint tell; None: nothing.
    """

    config: type[Any]
    init: Callable[[Any, Any], PyTree]
    build: Callable[..., Model]
    table: LayerTable
    inputs: Callable[[Any, int], PyTree]
    part: str = ""
    asked: str | Callable[[Any], str] = ""
    completed: Callable[[Any, Mapping[str, Tensor]], Any] | None = None


CLIP = Family(
    clip_config.CLIPConfig,
    clip_modeling.init,
    clip_modeling.clip,
    clip_table.TABLE,
    two_tower_inputs,
    part="vision",
    asked="zero_shot",
)
VIT = Family(
    vit_config.ViTConfig,
    vit_modeling.init,
    vit_modeling.vit,
    vit_table.TABLE,
    vit_modeling.inputs,
    part="vision",
    asked="own_head",
)
DINOV2 = Family(
    dinov2_config.Dinov2Config,
    dinov2_modeling.init,
    dinov2_modeling.dinov2,
    dinov2_table.TABLE,
    dinov2_modeling.inputs,
    part="vision",
    asked="own_head",
)
DINOV2_WITH_REGISTERS = DINOV2._replace(
    config=dinov2_config.Dinov2WithRegistersConfig, table=dinov2_table.TABLE_WITH_REGISTERS
)
GEMMA = Family(
    gemma_config.GemmaConfig,
    gemma_modeling.init,
    gemma_modeling.gemma,
    gemma_table.TABLE,
    llama_modeling.inputs,
    asked="language",
)
GPT2 = Family(
    gpt2_config.GPT2Config,
    gpt2_modeling.init,
    gpt2_modeling.gpt2,
    gpt2_table.TABLE,
    gpt2_modeling.inputs,
    asked="language",
)
LLAMA = Family(
    llama_config.LlamaConfig,
    llama_modeling.init,
    llama_modeling.llama,
    llama_table.TABLE,
    llama_modeling.inputs,
    asked="language",
)
SIGLIP = Family(
    siglip_config.SiglipConfig,
    siglip_modeling.init,
    siglip_modeling.siglip,
    siglip_table.TABLE,
    two_tower_inputs,
    part="vision",
    asked="zero_shot",
)
BERT, ROBERTA, MPNET = (
    Family(
        config,
        bert_modeling.init,
        bert_modeling.bert,
        bert_modeling.TABLES[config],
        bert_modeling.inputs,
        asked=lambda config: "sentences" if config.num_labels is None else "own_head_of_texts",
    )
    for config in (bert_config.BertConfig, bert_config.RobertaConfig, bert_config.MPNetConfig)
)
T5 = Family(
    t5_config.T5Config,
    t5_modeling.init,
    t5_modeling.t5,
    t5_table.TABLE,
    t5_modeling.inputs,
    asked="language",
    completed=t5_config.with_head,
)
UMT5 = T5._replace(config=t5_config.UMT5Config, table=t5_table.UMT5_TABLE)
GENERIC = Family(
    generic.GenericConfig,
    generic.init,
    generic.build,
    generic.TABLE,
    generic.inputs,
    completed=generic.with_shapes,
)
FAMILIES = {
    **dict.fromkeys(("clip", "clip_vision_model", "clip_text_model"), CLIP),
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "gpt2": GPT2,
    **dict.fromkeys(("siglip", "siglip_vision_model", "siglip_text_model"), SIGLIP),
    "vit": VIT,
    "bert": BERT,
    **dict.fromkeys(("roberta", "xlm-roberta"), ROBERTA),
    "mpnet": MPNET,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    **dict.fromkeys(("t5", "mt5"), T5),
    "umt5": UMT5,
}


def family_of_settings(settings: Settings) -> Family:
    """The family that a ``config.json`` names; the generic one where there is no modelling code for it.

    Raises:
      ValueError: for a ``model_type`` that is no name.

    >>> family_of_settings({"model_type": "clip"}).config.__name__
    'CLIPConfig'
    """
    model_type = settings.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ValueError(f"model_type {model_type!r} is not supported: expected a name, such as {sorted(FAMILIES)}")
    return FAMILIES.get(model_type, GENERIC) if model_type else GENERIC


def family_of_config(config: Any) -> Family:
    """The family that a config is of.

    Raises:
      ValueError: for an object that is no family's config.

    >>> family_of_config(vit_config.ViTConfig()).build.__name__
    'vit'
    """
    known = (*FAMILIES.values(), GENERIC)
    for family in known:
        if type(config) is family.config:  # configs may derive from one another
            return family
    names = sorted({family.config.__name__ for family in known})
    raise ValueError(f"no family has configs like {kind_of(config)}: expected one of {names}")


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of a config's model, by path."""
    if isinstance(config, generic.GenericConfig):
        return dict(config.shapes)
    return parameter_shapes(family_of_config(config).build(config, {}).stages)
