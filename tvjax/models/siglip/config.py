"""The shape of a SigLIP, read from a Hugging Face ``config.json`` and written back to one."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvjax.models.settings import NoCode, Settings, architecture, fields, part
from tvjax.models.transformer import BlockConfig

# What each architecture of transformers consists of: (vision, text).
_ARCHITECTURES = {"SiglipModel": (True, True), "SiglipVisionModel": (True, False), "SiglipTextModel": (False, True)}
_DEFAULT_ARCHITECTURE = {
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip_text_model": "SiglipTextModel",
}


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig:
    """The vision tower, which ends with attention pooling; the names are those of Hugging Face.

    Attributes:
      hidden_size: width of the residual stream, and of the shared embedding space.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of each block, and of the pooling.
      image_size: height and width of the image in pixels.
      patch_size: height and width of a patch in pixels.
      hidden_act: activation of the MLPs.
      layer_norm_eps: epsilon of every norm.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    @property
    def block(self) -> BlockConfig:
        """The shape of one block."""
        return _block(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of patches."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def projection_dim(self) -> int:
        """Width of the shared embedding space."""
        return self.hidden_size


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig:
    """The text tower; the names are those of Hugging Face.

    Attributes:
      vocab_size: number of tokens of the vocabulary.
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of each block.
      max_position_embeddings: length that every text is padded to, in tokens.
      hidden_act: activation of the MLPs.
      layer_norm_eps: epsilon of every norm.
      projection_size: width of the shared embedding space.
    """

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    projection_size: int = 768

    @property
    def block(self) -> BlockConfig:
        """The shape of one block."""
        return _block(self)

    @property
    def reads_padding(self) -> bool:
        """Padding is read as any other token: the text's embedding is that of the last one, which is mostly padding."""
        return True


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """One or both towers; a checkpoint of one tower is a SigLIP without the other.

    Attributes:
      vision: the vision tower, or None.
      text: the text tower, or None.
    """

    vision: SiglipVisionConfig | None = SiglipVisionConfig()
    text: SiglipTextConfig | None = SiglipTextConfig()

    def __post_init__(self) -> None:
        if self.vision is None and self.text is None:
            raise ValueError("a SigLIP without vision and without text: give at least one tower's config")
        if self.vision and self.text and self.vision.hidden_size != self.text.projection_size:
            raise ValueError(
                f"projection_size is {self.text.projection_size} for text and hidden_size {self.vision.hidden_size} "
                "for vision: both towers end in one shared space, so give the same number to both"
            )

    @classmethod
    def from_dict(cls, settings: Settings) -> SiglipConfig:
        """The config that a ``config.json`` describes; what it leaves out has the default of transformers.

        >>> config = SiglipConfig.from_dict({"model_type": "siglip_vision_model", "hidden_size": 1152})
        >>> config.vision.hidden_size, config.vision.projection_dim, config.text
        (1152, 1152, None)
        """
        name = architecture(settings, _DEFAULT_ARCHITECTURE)
        if name not in _ARCHITECTURES:
            raise NoCode(f"architecture {name!r} is not supported, only {sorted(_ARCHITECTURES)}")
        with_vision, with_text = _ARCHITECTURES[name]
        whole = settings["model_type"] == "siglip"
        vision = text = None
        if with_vision:
            found = part(settings, "vision_config") if whole else settings
            if found.get("vision_use_head") is False:
                raise NoCode("vision_use_head is False: a vision tower without its pooling head embeds no image")
            vision = SiglipVisionConfig(**fields(SiglipVisionConfig, found))
        if with_text:
            shape = fields(SiglipTextConfig, part(settings, "text_config") if whole else settings)
            shape.setdefault("projection_size", shape.get("hidden_size", SiglipTextConfig.hidden_size))
            text = SiglipTextConfig(**shape)
        return cls(vision, text)

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and `from_dict` read this config from."""
        towers = {"vision": self.vision, "text": self.text}
        parts = {
            name: {"model_type": f"siglip_{name}_model", **dataclasses.asdict(tower)}
            for name, tower in towers.items()
            if tower is not None
        }
        (name,) = [name for name, value in _ARCHITECTURES.items() if value == ("vision" in parts, "text" in parts)]
        if len(parts) == 2:
            whole = {f"{tower}_config": values for tower, values in parts.items()}
            return {"architectures": [name], "model_type": "siglip", **whole}
        return {"architectures": [name], **next(iter(parts.values()))}


def _block(config: SiglipVisionConfig | SiglipTextConfig) -> BlockConfig:
    return BlockConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
    )
