"""The shape of a T5 or a relative of it, read from a Hugging Face ``config.json`` and written back to one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tvjax.models.key_table import Tensor
from tvjax.models.settings import NoCode, Settings, architecture, fields
from tvjax.models.transformer import ACTIVATIONS

_ARCHITECTURES = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}
# What a relative's ``config.json`` that leaves a field out means by it, where that differs from T5's.
_MULTILINGUAL = {
    **{"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "feed_forward_proj": "gated-gelu",
}
_DEFAULTS: dict[str, dict[str, Any]] = {"t5": {}, "mt5": _MULTILINGUAL, "umt5": _MULTILINGUAL}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """An encoder and a decoder with relative positions and RMS norms; the names are those of Hugging Face.

    Attributes:
      vocab_size: number of tokens of the vocabulary.
      d_model: width of the residual streams.
      d_kv: width of one head.
      d_ff: width inside the MLPs.
      num_layers: number of blocks of the encoder.
      num_decoder_layers: number of blocks of the decoder.
      num_heads: heads of each attention layer.
      relative_attention_num_buckets: distances that have a bias of their own.
      relative_attention_max_distance: the distance from which on all have the same.
      dense_act_fn: activation of the MLPs.
      is_gated_act: whether the activation is a gate, multiplied with a second linear layer.
      layer_norm_epsilon: epsilon of every norm.
      tie_word_embeddings: whether the token embeddings are the head's kernel too.
      scale_decoder_outputs: whether what the head reads is divided by the root of the width.
      decoder_start_token_id: the token that the decoder begins with.
      model_type: the family's name in ``config.json``.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dense_act_fn: str = "relu"
    is_gated_act: bool = False
    layer_norm_epsilon: float = 1e-6
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    decoder_start_token_id: int = 0
    model_type: str = "t5"

    def __post_init__(self) -> None:
        if self.dense_act_fn not in ACTIVATIONS:
            raise ValueError(f"dense_act_fn {self.dense_act_fn!r} is not supported: use one of {sorted(ACTIVATIONS)}")
        # In the encoder one half of the buckets is for tokens to the right; half of each side's are single distances.
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_num_buckets is {buckets}, and relative_attention_max_distance {distance}, "
                "expected a multiple of 4, and more than half of it"
            )
        if self.decoder_start_token_id >= self.vocab_size:
            raise ValueError(
                f"decoder_start_token_id is {self.decoder_start_token_id}, expected one of {self.vocab_size} tokens"
            )

    @property
    def bias_in_each_block(self) -> bool:
        """Whether each block has its own table of position biases, and not all of a tower the same."""
        return self.model_type == "umt5"

    @classmethod
    def from_dict(cls, settings: Settings) -> T5Config:
        """The config that a ``config.json`` describes; what it leaves out has the default of transformers.

        >>> flan = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
        >>> config = T5Config.from_dict(flan)
        >>> config.dense_act_fn, config.is_gated_act, config.scale_decoder_outputs
        ('gelu_new', True, False)
        """
        model_type = settings["model_type"]
        name = architecture(settings, _ARCHITECTURES)
        if name != _ARCHITECTURES[model_type]:
            raise NoCode(f"architecture {name!r} is not supported, only {_ARCHITECTURES[model_type]}")
        for switch, expected in (("is_encoder_decoder", True), ("is_decoder", False)):
            if settings.get(switch, expected) is not expected:
                raise NoCode(f"{switch} is {settings[switch]!r}: only an encoder with a decoder is supported")
        found = {**_DEFAULTS[model_type], **settings}
        activation, gated = _activation(found.get("feed_forward_proj", "relu"))
        tied = found.get("tie_word_embeddings")
        defaults = {
            "dense_act_fn": activation,
            "is_gated_act": gated,
            "scale_decoder_outputs": tied is not False,
            "decoder_start_token_id": found.get("pad_token_id"),
            "num_decoder_layers": found.get("num_layers"),
        }
        found |= {name: value for name, value in defaults.items() if found.get(name) is None}
        if model_type == "mt5":
            found["scale_decoder_outputs"] = False
        return cls(**fields(cls, found))

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and `from_dict` read this config from."""
        values = dataclasses.asdict(self)
        activation = "gelu" if self.is_gated_act and self.dense_act_fn == "gelu_new" else self.dense_act_fn
        return {
            "architectures": [_ARCHITECTURES[self.model_type]],
            **values,
            "feed_forward_proj": f"gated-{activation}" if self.is_gated_act else activation,
            "is_encoder_decoder": True,
        }


@dataclasses.dataclass(frozen=True)
class UMT5Config(T5Config):
    """umT5: a T5 with a table of position biases in each block; its layers are those of another table."""

    model_type: str = "umt5"


def with_head(config: T5Config, tensors: Mapping[str, Tensor]) -> T5Config:
    """The config with the head that a checkpoint has.

    ``tie_word_embeddings`` once said of T5 that its outputs are scaled, and is no longer written; a head of its own is
    one that the file has.

    >>> with_head(T5Config(), {"lm_head.weight": Tensor("F32", (32128, 512))}).tie_word_embeddings
    False
    """
    return dataclasses.replace(config, tie_word_embeddings="lm_head.weight" not in tensors)


def _activation(projection: Any) -> tuple[str, bool]:
    """The activation that a ``feed_forward_proj`` names, and whether it is a gate.

    >>> _activation("gated-gelu"), _activation("relu")
    (('gelu_new', True), ('relu', False))
    """
    parts = projection.split("-") if isinstance(projection, str) else []
    if not parts or parts[:-1] not in ([], ["gated"]):
        raise ValueError(f"feed_forward_proj is {projection!r}, expected an activation, or gated- and an activation")
    return ("gelu_new" if projection == "gated-gelu" else parts[-1]), len(parts) == 2
