"""Llama, and the decoders that differ from it by a switch: Mistral, Qwen2, Qwen3."""

from tvjax.models.llama.config import LlamaConfig
from tvjax.models.llama.modeling import Llama, init, llama
from tvjax.models.llama.rope import Rope

__all__ = ["Llama", "LlamaConfig", "Rope", "init", "llama"]
