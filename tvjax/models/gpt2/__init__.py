"""GPT-2."""

from tvjax.models.gpt2.config import GPT2Config
from tvjax.models.gpt2.modeling import GPT2, gpt2, init

__all__ = ["GPT2", "GPT2Config", "gpt2", "init"]
