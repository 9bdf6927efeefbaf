"""The layers of a Gemma: a Llama's, with norms behind the attention and the MLP as well."""

from __future__ import annotations

from tvjax.models.layer_table import LayerTable, Row
from tvjax.models.llama.table import TABLE as LLAMA

_B, _L, _R = "blocks/{i}", "model.layers.{i}", "residual"
_NORMS = {f"{_B}/norm2"}  # what follows the attention in a Llama's checkpoint is the norm before its MLP

# fmt: off
TABLE = LayerTable(
    rows=(
        *(row for row in LLAMA.rows if row.path not in _NORMS),
        Row(f"{_B}/attention_norm",       f"{_L}.post_attention_layernorm",   "scale",     (_R,)),
        Row(f"{_B}/norm2",                f"{_L}.pre_feedforward_layernorm",  "scale",     (_R,)),
        Row(f"{_B}/mlp_norm",             f"{_L}.post_feedforward_layernorm", "scale",     (_R,)),
    ),
    unused=LLAMA.unused,
)
