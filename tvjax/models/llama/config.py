"""The shape of a Llama or a relative of it, read from a Hugging Face ``config.json`` and written back to one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tvjax.models.llama.rope import Rope
from tvjax.models.settings import NoCode, Settings, architecture, fields
from tvjax.models.transformer import ACTIVATIONS

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# What a relative's ``config.json`` that leaves a field out means by it, where that differs from Llama's.
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {**_QWEN, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {**_QWEN, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder with rotary positions, RMS norms and gated MLPs; the names are those of Hugging Face.

    Attributes:
      vocab_size: number of tokens of the vocabulary.
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of the queries of each block.
      num_key_value_heads: heads of the keys and values; divides `num_attention_heads`.
      head_dim: width of one head.
      hidden_act: activation of the MLPs' gates.
      rms_norm_eps: epsilon of every norm.
      max_position_embeddings: the greatest length that the model is said to be good for; where `rope` is
        ``dynamic``, the greatest that is computed.
      tie_word_embeddings: whether the token embeddings are the head's kernel too.
      attention_bias: whether queries, keys and values have biases.
      output_bias: whether the attention's output projection has one.
      mlp_bias: whether the layers of the MLPs have biases.
      qk_norm: whether the queries and keys of each head are normalised (Qwen3).
      sliding_window: how many tokens back a token sees in the sliding blocks; None for all.
      max_window_layers: index of the first sliding block.
      rope: the rotary positions.
      model_type: the family's name in ``config.json``.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    rope: Rope = Rope()
    model_type: str = "llama"

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported: use one of {sorted(ACTIVATIONS)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number: positions rotate pairs of units")
        for name in ("short_factor", "long_factor"):
            number = len(getattr(self.rope, name))
            if self.rope.kind == "longrope" and number != self.head_dim // 2:
                raise ValueError(
                    f"{name} of the rotary positions has {number} numbers, expected {self.head_dim // 2}: one for each "
                    "pair of units of a head"
                )

    def window(self, block: int) -> int | None:
        """How many tokens back a token sees in a block, itself counted; None for all."""
        return self.sliding_window if block >= self.max_window_layers else None

    def rotary_frequencies(self, block: int) -> np.ndarray:
        """By how much a position turns each pair of units of a head of a block."""
        return self.rope.frequencies(self.head_dim)

    @property
    def longest(self) -> int | None:
        """The greatest length of texts that the rotary positions are computed for; None where there is no end."""
        return self.rope.longest(self.max_position_embeddings)

    @classmethod
    def from_dict(cls, settings: Settings) -> LlamaConfig:
        """The config that a ``config.json`` describes; what it leaves out has the default of transformers.

        >>> settings = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        >>> config = LlamaConfig.from_dict(settings)
        >>> config.head_dim, config.attention_bias, config.output_bias, config.sliding_window
        (16, True, False, None)
        """
        model_type = settings["model_type"]
        name = architecture(settings, _ARCHITECTURES)
        if name != _ARCHITECTURES[model_type]:
            raise NoCode(f"architecture {name!r} is not supported, only {_ARCHITECTURES[model_type]}")
        found = {**_DEFAULTS[model_type], **settings}
        bias = found.get("attention_bias") or False
        found |= {"attention_bias": model_type == "qwen2" or bias, "output_bias": model_type != "qwen2" and bias}
        found["qk_norm"] = model_type == "qwen3"
        if model_type.startswith("qwen") and not found.get("use_sliding_window"):
            found["sliding_window"] = None
        if found.get("layer_types"):
            found |= _windows(found["layer_types"], found.get("sliding_window"))
        shape = fields(cls, found)
        heads = shape.setdefault("num_attention_heads", cls.num_attention_heads)
        shape.setdefault("num_key_value_heads", heads)
        shape.setdefault("head_dim", shape.get("hidden_size", cls.hidden_size) // heads)
        if shape.get("sliding_window") is None:
            shape["max_window_layers"] = 0
        longest = shape.get("max_position_embeddings", cls.max_position_embeddings)
        return cls(**shape, rope=Rope.from_settings(found, longest))

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and `from_dict` read this config from."""
        values = dataclasses.asdict(self)
        values.pop("rope")
        first = values.pop("max_window_layers")
        qwen = self.model_type.startswith("qwen")
        scaling = self.rope.to_settings()
        for name in ("output_bias", "qk_norm"):
            values.pop(name)
        if self.model_type not in ("llama", "qwen3"):
            values.pop("attention_bias")
        if self.model_type != "llama":
            values.pop("mlp_bias")
        if self.model_type == "llama":
            values.pop("sliding_window")
        if qwen:
            values |= {"use_sliding_window": self.sliding_window is not None, "max_window_layers": first}
        return {
            "architectures": [_ARCHITECTURES[self.model_type]],
            **values,
            "rope_parameters": {**scaling, "rope_theta": self.rope.theta},  # transformers 5
            "rope_theta": self.rope.theta,  # transformers 4
            "rope_scaling": None if self.rope.kind == "default" else scaling,
        }


def _windows(kinds: Any, window: int | None) -> dict[str, Any]:
    """``layer_types`` as the index of the first sliding block."""
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(kinds, list) or not all(kind in known for kind in kinds):
        raise ValueError(f"layer_types is {kinds!r}, expected a list of {' and '.join(known)}")
    sliding = [known[kind] for kind in kinds]
    if sliding != sorted(sliding):
        raise NoCode("layer_types has full attention after sliding attention: only the first blocks may be full")
    return {"max_window_layers": sliding.count(False), "sliding_window": window if any(sliding) else None}
