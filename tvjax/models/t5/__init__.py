"""T5, and what differs from it by a switch or a table: T5 v1.1, Flan-T5, mT5, umT5."""

from tvjax.models.t5.config import T5Config, UMT5Config
from tvjax.models.t5.modeling import T5, init, t5

__all__ = ["T5", "T5Config", "UMT5Config", "init", "t5"]
