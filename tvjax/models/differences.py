"""In what two configs differ though the weights of their models have the same shapes.

An activation, a number of heads or an epsilon leaves no trace in the shapes. The difference of the weights of two
models that differ so is no task vector, and the sum of one's weights and the other's task vector no model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tvjax.models.generic import GenericConfig
from tvjax.models.transformer import ACTIVATIONS

_IN_THE_SHAPES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "patch_size", "qkv_bias", "projection_dim"),
    *("vocab_size", "type_vocab_size", "max_position_embeddings", "relative_attention_num_buckets", "num_labels"),
    *("d_model", "d_ff", "num_layers", "num_decoder_layers"),
)
_OF_NO_EFFECT = ("logit_scale_init_value", "model_type", "max_seq_length")

Values = Mapping[str, Any]


def function_values(config: Any, part: str = "") -> dict[str, Any]:
    """What a config says of the function that its model computes and the weights' shapes do not, by name of the field.

    Args:
      config: of a family's model.
      part: the tower to look at, such as ``vision``; "" for all, and so is it where a model has no towers.

    >>> from tvjax.models.clip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
    >>> config = CLIPConfig(CLIPVisionConfig(hidden_act="gelu_python"), CLIPTextConfig(eos_token_id=2))
    >>> values = function_values(config)
    >>> values["vision.hidden_act"], values["vision.num_attention_heads"], values["text.eos_token_id"]
    ('gelu', 12, 49407)
    """
    if isinstance(config, GenericConfig):
        values = config.function_values()
        return {name: value for name, value in values.items() if name.rpartition(".")[2] not in _IN_THE_SHAPES}
    values = {field.name: _value(config, field.name) for field in dataclasses.fields(config)}
    towers = [name for name, value in values.items() if dataclasses.is_dataclass(value)]
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in towers:
            if part in ("", name) or part not in towers:
                found |= {f"{name}.{field}": item for field, item in function_values(value).items()}
        elif name not in (*_IN_THE_SHAPES, *_OF_NO_EFFECT) and value is not None:
            found[name] = list(value) if isinstance(value, tuple) else value  # as JSON gives it back
    return found


def differences(first: Values, second: Values) -> list[str]:
    """The fields that both have, with other values, each with both.

    >>> differences({"hidden_act": "gelu", "layers": 2}, {"hidden_act": "relu", "layers": 2, "heads": 4})
    ["hidden_act ('gelu' and 'relu')"]
    """
    return [
        f"{name} ({first[name]!r} and {second[name]!r})"
        for name in sorted(first.keys() & second.keys())
        if first[name] != second[name]
    ]


def to_text(values: Values) -> str:
    """The values as the metadata of a file carry them."""
    return json.dumps(values, sort_keys=True)


def from_text(text: str, origin: str) -> dict[str, Any]:
    """The values that `to_text` wrote.

    Args:
      text: what it wrote.
      origin: name of the file, for the error.

    Raises:
      ValueError: something else stands there.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}: base_config is {text[:80]!r}, expected JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{origin}: base_config is {text[:80]!r}, expected an object")
    return found


def _value(config: Any, name: str) -> Any:
    """A field's value, one spelling for each function."""
    value = getattr(config, name)
    if name in ("hidden_act", "dense_act_fn"):
        return next((known for known, call in ACTIVATIONS.items() if call is ACTIVATIONS.get(value)), value)
    if name == "eos_token_id" and value == 2:  # OpenAI's first configs: the text is read at the greatest token
        return config.vocab_size - 1
    return value
