"""The ViT classifier."""

from tvjax.models.vit.config import ViTConfig
from tvjax.models.vit.modeling import ViT, init, vit

__all__ = ["ViT", "ViTConfig", "init", "vit"]
