"""CLIP: both towers, or one."""

from tvjax.models.clip.config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.clip.modeling import CLIP, clip, init, text_model, vision_model

__all__ = ["CLIP", "CLIPConfig", "CLIPTextConfig", "CLIPVisionConfig", "clip", "init", "text_model", "vision_model"]
