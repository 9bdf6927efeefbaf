"""The shape of a ViT classifier, read from a Hugging Face ``config.json`` and written back to one."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvjax.models.settings import Settings, architecture, fields, part
from tvjax.models.transformer import BlockConfig

_ARCHITECTURE = "ViTForImageClassification"


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A ViT with a classifier on its class token; the names are those of Hugging Face.

    Attributes:
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLPs.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of each block.
      image_size: height and width of the image in pixels.
      patch_size: height and width of a patch in pixels.
      hidden_act: activation of the MLPs.
      layer_norm_eps: epsilon of every norm.
      qkv_bias: whether queries, keys and values have biases.
      num_labels: number of classes.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    num_labels: int = 2

    @property
    def block(self) -> BlockConfig:
        """The shape of one block."""
        return BlockConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            hidden_act=self.hidden_act,
            layer_norm_eps=self.layer_norm_eps,
            qkv_bias=self.qkv_bias,
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the grid of patches."""
        return (self.image_size // self.patch_size,) * 2

    @classmethod
    def from_dict(cls, settings: Settings) -> ViTConfig:
        """The config that a ``config.json`` describes; what it leaves out has the default of transformers.

        >>> ViTConfig.from_dict({"model_type": "vit", "id2label": {"0": "cat", "1": "dog", "2": "owl"}}).num_labels
        3
        """
        name = architecture(settings, {"vit": _ARCHITECTURE})
        if name != _ARCHITECTURE:
            raise ValueError(f"architecture {name!r} is not supported, only {_ARCHITECTURE}")
        values = fields(cls, settings)
        if settings.get("id2label"):
            values["num_labels"] = len(part(settings, "id2label"))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers and `from_dict` read this config from."""
        values = dataclasses.asdict(self)
        labels = {str(i): f"LABEL_{i}" for i in range(values.pop("num_labels"))}
        label_ids = {label: int(i) for i, label in labels.items()}
        names = {"architectures": [_ARCHITECTURE], "model_type": "vit"}
        return {**names, **values, "id2label": labels, "label2id": label_ids}
