"""The shape of a GPT-2, read from a Hugging Face ``config.json`` and written back to one."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvjax.models.settings import NoCode, Settings, architecture, fields
from tvjax.models.transformer import BlockConfig

_ARCHITECTURE = "GPT2LMHeadModel"
_NAMES = {  # of GPT-2's own for what other families call otherwise
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
}
# Switches that change what is computed, and the value that the modelling code stands for. `reorder_and_upcast_attn` is
# none of them: scores are float32 here whatever it says.
_SWITCHES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """A decoder with learned positions and pre-norm blocks; the names are those of the other families.

    Attributes:
      vocab_size: number of tokens of the vocabulary.
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of each block.
      max_position_embeddings: greatest length of a text in tokens.
      hidden_act: activation of the MLPs.
      layer_norm_eps: epsilon of every norm.
      tie_word_embeddings: whether the token embeddings are the head's kernel too.
    """

    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    @property
    def block(self) -> BlockConfig:
        """The shape of one block."""
        return BlockConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            hidden_act=self.hidden_act,
            layer_norm_eps=self.layer_norm_eps,
            causal=True,
        )

    @classmethod
    def from_dict(cls, settings: Settings) -> GPT2Config:
        """The config that a ``config.json`` describes; what it leaves out has the default of transformers.

        >>> GPT2Config.from_dict({"model_type": "gpt2", "n_embd": 64, "n_head": 4}).intermediate_size
        256
        """
        name = architecture(settings, {"gpt2": _ARCHITECTURE})
        if name != _ARCHITECTURE:
            raise NoCode(f"architecture {name!r} is not supported, only {_ARCHITECTURE}")
        for switch, value in _SWITCHES.items():
            if settings.get(switch, value) not in (value, None):
                raise NoCode(f"{switch} is {settings[switch]!r}, and only {value} is supported")
        found = {**settings, **{ours: settings.get(theirs, settings.get(ours)) for ours, theirs in _NAMES.items()}}
        shape = fields(cls, found)
        shape.setdefault("intermediate_size", 4 * shape.get("hidden_size", cls.hidden_size))
        return cls(**shape)

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and `from_dict` read this config from."""
        values = {_NAMES.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        return {"architectures": [_ARCHITECTURE], "model_type": "gpt2", **values}
