"""Llama, and the decoders that differ from it by a switch: Mistral, Qwen2, Qwen3."""

from tvjax.models.llama.config import LlamaConfig, Rope
from tvjax.models.llama.modeling import Llama, init, llama

__all__ = ["Llama", "LlamaConfig", "Rope", "init", "llama"]
