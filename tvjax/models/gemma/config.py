"""The shape of a Gemma 2 or 3, read from a Hugging Face ``config.json`` and written back to one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tvjax.models.llama.rope import Rope
from tvjax.models.settings import NoCode, Settings, architecture, fields, part
from tvjax.models.transformer import ACTIVATIONS

SLIDING, FULL = "sliding_attention", "full_attention"
_ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# What a ``config.json`` that leaves a field out means by it, where that differs from Gemma 2's; every n-th is full.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"sliding_window_pattern": 6, "vocab_size": 262208, "max_position_embeddings": 131072},
}
_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}  # of Gemma 3


def _kinds(depth: int, pattern: int) -> list[str]:
    """The kinds of the blocks, every n-th of them full."""
    return [SLIDING if (block + 1) % pattern else FULL for block in range(depth)]


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """A decoder with norms before and behind attention and MLPs; the names are those of Hugging Face.

    Attributes:
      vocab_size: number of tokens of the vocabulary.
      hidden_size: width of the residual stream; embeddings are multiplied by its square root.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of the queries of each block.
      num_key_value_heads: heads of the keys and values; divides `num_attention_heads`.
      head_dim: width of one head.
      hidden_activation: activation of the MLPs' gates.
      rms_norm_eps: epsilon of every norm.
      max_position_embeddings: the greatest length that the model is said to be good for.
      tie_word_embeddings: whether the token embeddings are the head's kernel too.
      attention_bias: whether the layers of the attention have biases.
      query_pre_attn_scalar: products of queries and keys are divided by its square root.
      sliding_window: how many tokens back a token sees in the sliding blocks; None for all.
      attn_logit_softcapping: what products of queries and keys cannot grow above; None for any.
      final_logit_softcapping: what logits cannot grow above; None for any.
      layer_types: of each block, ``sliding_attention`` or ``full_attention``; () takes every second one of Gemma 2, and
        every sixth of Gemma 3, as full.
      rope: the rotary positions of full blocks.
      local_rope: those of sliding blocks.
      model_type: the family's name in ``config.json``.
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    layer_types: tuple[str, ...] = ()
    rope: Rope = Rope()
    local_rope: Rope = Rope()
    model_type: str = "gemma2"

    def __post_init__(self) -> None:
        if not self.layer_types and self.model_type in _DEFAULTS:
            every = _DEFAULTS[self.model_type]["sliding_window_pattern"]
            object.__setattr__(self, "layer_types", tuple(_kinds(self.num_hidden_layers, every)))
        if self.hidden_activation not in ACTIVATIONS:
            raise ValueError(
                f"hidden_activation {self.hidden_activation!r} is not supported: use one of {sorted(ACTIVATIONS)}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        for name in _CAPS:
            cap = getattr(self, name)
            if cap is not None and not cap > 0:
                raise ValueError(f"{name} is {cap}, expected a positive number, or null for none")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number: positions rotate pairs of units")
        if not set(self.layer_types) <= {SLIDING, FULL} or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types is {list(self.layer_types)}, expected {SLIDING!r} or {FULL!r} for each of the "
                f"{self.num_hidden_layers} layers"
            )

    @property
    def qk_norm(self) -> bool:
        """Whether the queries and keys of each head are normalised."""
        return self.model_type == "gemma3_text"

    @property
    def longest(self) -> int | None:
        """The greatest length of texts that the rotary positions are computed for; None where there is no end."""
        return self.rope.longest(self.max_position_embeddings)

    def window(self, block: int) -> int | None:
        """How many tokens back a token sees in a block, itself counted; None for all."""
        return self.sliding_window if self.layer_types[block] == SLIDING else None

    def rope_of(self, block: int) -> Rope:
        """The rotary positions of a block."""
        return self.local_rope if self.layer_types[block] == SLIDING else self.rope

    def rotary_frequencies(self, block: int) -> np.ndarray:
        """By how much a position turns each pair of units of a head of a block."""
        return self.rope_of(block).frequencies(self.head_dim)

    @classmethod
    def from_dict(cls, settings: Settings) -> GemmaConfig:
        """The config that a ``config.json`` describes; what it leaves out has the default of transformers.

        >>> config = GemmaConfig.from_dict({"model_type": "gemma3_text", "num_hidden_layers": 7})
        >>> [config.window(block) for block in (0, 5, 6)], config.rope.theta, config.local_rope.theta
        ([4096, None, 4096], 1000000.0, 10000.0)
        """
        model_type = settings["model_type"]
        name = architecture(settings, _ARCHITECTURES)
        if name != _ARCHITECTURES[model_type]:
            raise NoCode(f"architecture {name!r} is not supported, only {_ARCHITECTURES[model_type]}")
        if settings.get("use_bidirectional_attention"):
            raise NoCode("use_bidirectional_attention is not supported: tokens see those before them only")
        found = {**_DEFAULTS[model_type], **settings}
        shape = fields(cls, found)
        for name in (*_CAPS, "sliding_window"):
            if name in found:  # null stands for none, and not for the default
                shape[name] = found[name]
        depth = shape.get("num_hidden_layers", cls.num_hidden_layers)
        kinds = found.get("layer_types")
        if kinds is None:
            pattern = found["sliding_window_pattern"]
            if not isinstance(pattern, int) or pattern < 1:
                raise ValueError(f"sliding_window_pattern is {pattern!r}, expected a number of layers")
            kinds = _kinds(depth, pattern)
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f"layer_types is {kinds!r}, expected a list of {SLIDING!r} and {FULL!r}")
        longest = shape.get("max_position_embeddings", cls.max_position_embeddings)
        ropes = [Rope.from_settings(given, longest) for given in _positions(found)]
        return cls(**shape, layer_types=tuple(kinds), rope=ropes[0], local_rope=ropes[1])

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and `from_dict` read this config from."""
        values = {**dataclasses.asdict(self), "layer_types": list(self.layer_types)}
        for name in ("rope", "local_rope"):
            values.pop(name)
        full, local = ({**rope.to_settings(), "rope_theta": rope.theta} for rope in (self.rope, self.local_rope))
        values["rope_theta"] = self.rope.theta  # transformers 4
        values["rope_scaling"] = None if self.rope.kind == "default" else self.rope.to_settings()
        values["rope_parameters"] = full  # transformers 5
        if self.model_type == "gemma3_text":
            values |= {"rope_local_base_freq": self.local_rope.theta, "rope_parameters": {FULL: full, SLIDING: local}}
        return {"architectures": [_ARCHITECTURES[self.model_type]], **values}


def _positions(settings: Settings) -> tuple[Settings, Settings]:
    """The settings of the rotary positions of full and of sliding blocks, each as a model of one kind has them."""
    if settings["model_type"] == "gemma2":
        return settings, settings
    given = part(settings, "rope_parameters")
    full, local = (dict(part(given, kind)) for kind in (FULL, SLIDING))
    full |= part(settings, "rope_scaling")
    full.setdefault("rope_theta", settings.get("rope_theta", _THETA[FULL]))
    local.setdefault("rope_theta", settings.get("rope_local_base_freq", _THETA[SLIDING]))
    return {"rope_parameters": full}, {"rope_parameters": local}
