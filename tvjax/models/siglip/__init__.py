"""SigLIP and SigLIP 2 of fixed resolution: both towers, or one."""

from tvjax.models.siglip.config import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from tvjax.models.siglip.modeling import Siglip, init, siglip

__all__ = ["Siglip", "SiglipConfig", "SiglipTextConfig", "SiglipVisionConfig", "init", "siglip"]
