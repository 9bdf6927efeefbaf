"""The layers of a GPT-2: here, in a Hugging Face checkpoint, and over what their axes run.

A checkpoint has the queries, keys and values of a block in one kernel, ``c_attn``; each is a layer of its own here.
"""

from __future__ import annotations

from tvjax.models.layer_table import Heads, LayerTable, Part, Row

_R, _H = "residual", "blocks/{i}/hidden"
_QK, _VO = (Heads("blocks/{i}/heads", units, "num_attention_heads") for units in ("query_key", "value_out"))
_B, _L = "blocks/{i}", "transformer.h.{i}"

# fmt: off
TABLE = LayerTable(
    rows=(
        Row("embeddings/tokens",     "transformer.wte",    "embedding", (None, _R)),
        Row("embeddings/positions",  "transformer.wpe",    "embedding", (None, _R)),
        Row(f"{_B}/norm1",           f"{_L}.ln_1",         "norm",      (_R,)),
        Row(f"{_B}/attention/query", f"{_L}.attn.c_attn",  "conv1d",    (_R, _QK), part=Part(0, 3)),
        Row(f"{_B}/attention/key",   f"{_L}.attn.c_attn",  "conv1d",    (_R, _QK), part=Part(1, 3)),
        Row(f"{_B}/attention/value", f"{_L}.attn.c_attn",  "conv1d",    (_R, _VO), part=Part(2, 3)),
        Row(f"{_B}/attention/out",   f"{_L}.attn.c_proj",  "conv1d",    (_VO, _R)),
        Row(f"{_B}/norm2",           f"{_L}.ln_2",         "norm",      (_R,)),
        Row(f"{_B}/mlp/up",          f"{_L}.mlp.c_fc",     "conv1d",    (_R, _H)),
        Row(f"{_B}/mlp/down",        f"{_L}.mlp.c_proj",   "conv1d",    (_H, _R)),
        Row("final_norm",            "transformer.ln_f",   "norm",      (_R,)),
        Row("head",                  "lm_head",            "kernel",    (_R, None),
            fixed=True, tied="embeddings/tokens"),
    ),
    unused=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),  # the causal mask, as a buffer
    wrappers=("transformer.",),  # the first checkpoints have keys without
    wrapper_of={"GPT2Model": "transformer."},
)
