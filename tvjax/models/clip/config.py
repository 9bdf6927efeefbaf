"""The shape of a CLIP, read from a Hugging Face ``config.json`` and written back to one."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvjax.models.settings import Settings, architecture, fields, part
from tvjax.models.transformer import BlockConfig

LEGACY_END_TOKEN = 2  # in OpenAI's first configs, where it is no token's right id: the end is the greatest id of a text

# What each architecture of transformers consists of: (vision, text, projection).
_ARCHITECTURES = {
    "CLIPModel": (True, True, True),
    "CLIPVisionModel": (True, False, False),
    "CLIPVisionModelWithProjection": (True, False, True),
    "CLIPTextModel": (False, True, False),
    "CLIPTextModelWithProjection": (False, True, True),
}
_DEFAULT_ARCHITECTURE = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "clip_text_model": "CLIPTextModel",
}


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The vision tower; the names are those of Hugging Face.

    Attributes:
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of each block.
      image_size: height and width of the image in pixels.
      patch_size: height and width of a patch in pixels.
      hidden_act: activation of the MLPs.
      layer_norm_eps: epsilon of every norm.
      projection_dim: width of the shared embedding space; None where the tower ends with its norm.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = 512

    @property
    def block(self) -> BlockConfig:
        """The shape of one block."""
        return _block(self, causal=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of patches."""
        return (self.image_size // self.patch_size,) * 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The text tower; the names are those of Hugging Face.

    Attributes:
      vocab_size: number of tokens of the vocabulary.
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of each block.
      max_position_embeddings: greatest length of a text in tokens.
      hidden_act: activation of the MLPs.
      layer_norm_eps: epsilon of every norm.
      eos_token_id: the text's embedding is read at the first such token; 2, which OpenAI's first configs say wrongly,
        means the token of the greatest id.
      projection_dim: width of the shared embedding space; None where the tower ends with its norm.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = 512

    @property
    def block(self) -> BlockConfig:
        """The shape of one block."""
        return _block(self, causal=True)


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """One or both towers; a checkpoint of one tower is a CLIP without the other.

    Attributes:
      vision: the vision tower, or None.
      text: the text tower, or None.
      logit_scale_init_value: logarithm of the initial factor of the cosines; only a CLIP with both towers has one.
    """

    vision: CLIPVisionConfig | None = CLIPVisionConfig()
    text: CLIPTextConfig | None = CLIPTextConfig()
    logit_scale_init_value: float = 2.6592

    def __post_init__(self) -> None:
        if self.vision is None and self.text is None:
            raise ValueError("a CLIP without vision and without text: give at least one tower's config")
        if self.vision and self.text:
            dims = (self.vision.projection_dim, self.text.projection_dim)
            if dims[0] is None or dims[0] != dims[1]:
                raise ValueError(
                    f"projection_dim is {dims[0]} for vision and {dims[1]} for text: both towers project to one shared "
                    "space, so give the same number to both"
                )

    @classmethod
    def from_dict(cls, settings: Settings) -> CLIPConfig:
        """The config that a ``config.json`` describes; what it leaves out has the default of transformers.

        >>> settings = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], "hidden_size": 1024}
        >>> config = CLIPConfig.from_dict(settings)
        >>> config.vision.hidden_size, config.vision.projection_dim, config.text
        (1024, None, None)
        """
        name = architecture(settings, _DEFAULT_ARCHITECTURE)
        if name not in _ARCHITECTURES:
            raise ValueError(f"architecture {name!r} is not supported, only {sorted(_ARCHITECTURES)}")
        with_vision, with_text, with_projection = _ARCHITECTURES[name]
        vision = _tower_settings(settings, "vision_config") if with_vision else None
        text = _tower_settings(settings, "text_config") if with_text else None
        if vision and text:  # the towers of a full model project to the space of the model
            shared = settings.get("projection_dim", 512)
            vision, text = {**vision, "projection_dim": shared}, {**text, "projection_dim": shared}
        scale = settings.get("logit_scale_init_value")
        return cls(
            _tower_config(CLIPVisionConfig, vision, with_projection),
            _tower_config(CLIPTextConfig, text, with_projection),
            cls.logit_scale_init_value if scale is None else scale,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and `from_dict` read this config from."""
        vision, text = (
            None
            if tower is None
            else {"model_type": model_type}
            | {name: value for name, value in dataclasses.asdict(tower).items() if value is not None}
            for tower, model_type in ((self.vision, "clip_vision_model"), (self.text, "clip_text_model"))
        )
        towers = [tower for tower in (self.vision, self.text) if tower]
        parts = (vision is not None, text is not None, towers[0].projection_dim is not None)
        (name,) = [name for name, value in _ARCHITECTURES.items() if value == parts]
        if vision and text:
            return {
                "architectures": [name],
                "model_type": "clip",
                "projection_dim": towers[0].projection_dim,
                "logit_scale_init_value": self.logit_scale_init_value,
                "vision_config": vision,
                "text_config": text,
            }
        return {"architectures": [name], **(vision or text or {})}


def _tower_settings(settings: Settings, key: str) -> Settings:
    """A tower's settings: its part of a full model's, under the older key ``<key>_dict`` where a folder has both."""
    if settings["model_type"] != "clip":
        return settings
    return part(settings, key if settings.get(f"{key}_dict") is None else f"{key}_dict")


def _tower_config(config_class: type, settings: Settings | None, with_projection: bool) -> Any:
    if settings is None:
        return None
    values = fields(config_class, settings)
    return config_class(**values) if with_projection else config_class(**{**values, "projection_dim": None})


def _block(config: CLIPVisionConfig | CLIPTextConfig, causal: bool) -> BlockConfig:
    return BlockConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        causal=causal,
    )
