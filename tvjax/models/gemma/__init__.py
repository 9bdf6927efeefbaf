"""Gemma 2 and the text models of Gemma 3."""

from tvjax.models.gemma.config import GemmaConfig
from tvjax.models.gemma.modeling import Gemma, gemma, init

__all__ = ["Gemma", "GemmaConfig", "gemma", "init"]
