"""DINOv2, with registers or without, as a backbone or with a classifier."""

from tvjax.models.dinov2.config import Dinov2Config, Dinov2WithRegistersConfig
from tvjax.models.dinov2.modeling import Dinov2, dinov2, init

__all__ = ["Dinov2", "Dinov2Config", "Dinov2WithRegistersConfig", "dinov2", "init"]
