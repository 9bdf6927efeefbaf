"""The layers of a Llama and its relatives: here, in a Hugging Face checkpoint, and over what their axes run."""

from __future__ import annotations

from tvjax.models.layer_table import Heads, LayerTable, Row

_R, _H = "residual", "blocks/{i}/hidden"
_Q = Heads("blocks/{i}/heads", "query_key", "num_attention_heads", rotary=True)
_K = Heads("blocks/{i}/heads", "query_key", "num_key_value_heads", rotary=True)
_V = Heads("blocks/{i}/heads", "value_out", "num_key_value_heads")
_O = Heads("blocks/{i}/heads", "value_out", "num_attention_heads")
_QN = Heads("blocks/{i}/heads", "query_key", "num_attention_heads", rotary=True, shared=True)
_KN = Heads("blocks/{i}/heads", "query_key", "num_key_value_heads", rotary=True, shared=True)
_B, _L = "blocks/{i}", "model.layers.{i}"

# fmt: off
TABLE = LayerTable(
    rows=(
        Row("embeddings/tokens",          "model.embed_tokens",               "embedding", (None, _R)),
        Row(f"{_B}/norm1",                f"{_L}.input_layernorm",            "scale",     (_R,)),
        Row(f"{_B}/attention/query",      f"{_L}.self_attn.q_proj",           "linear",    (_R, _Q)),
        Row(f"{_B}/attention/key",        f"{_L}.self_attn.k_proj",           "linear",    (_R, _K)),
        Row(f"{_B}/attention/value",      f"{_L}.self_attn.v_proj",           "linear",    (_R, _V)),
        Row(f"{_B}/attention/out",        f"{_L}.self_attn.o_proj",           "linear",    (_O, _R)),
        Row(f"{_B}/attention/query_norm", f"{_L}.self_attn.q_norm",           "scale",     (_QN,)),
        Row(f"{_B}/attention/key_norm",   f"{_L}.self_attn.k_norm",           "scale",     (_KN,)),
        Row(f"{_B}/norm2",                f"{_L}.post_attention_layernorm",   "scale",     (_R,)),
        Row(f"{_B}/mlp/gate",             f"{_L}.mlp.gate_proj",              "linear",    (_R, _H)),
        Row(f"{_B}/mlp/up",               f"{_L}.mlp.up_proj",                "linear",    (_R, _H)),
        Row(f"{_B}/mlp/down",             f"{_L}.mlp.down_proj",              "linear",    (_H, _R)),
        Row("final_norm",                 "model.norm",                       "scale",     (_R,)),
        Row("head",                       "lm_head",                          "kernel",    (_R, None),
            fixed=True, tied="embeddings/tokens"),
    ),
    unused=("model.layers.{i}.self_attn.rotary_emb.inv_freq",),  # a buffer that older versions saved
)
