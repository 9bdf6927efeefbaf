"""The layers of a CLIP: here, in a Hugging Face checkpoint, and over what their axes run.

The embedding that two towers share, pixels, positions and tokens have a meaning of their own, and so has the residual
stream of a tower without projection, which ends in what the tower returns. The projections are not fixed: the embedding
spaces of two CLIPs that were trained apart have nothing in common but their rows.
"""

from __future__ import annotations

from tvjax.models.layer_table import Heads, LayerTable, Row

_V, _T, _R = "vision/residual", "text/residual", "{tower}/residual"
_H = "{tower}/blocks/{i}/hidden"
_QK, _VO = (Heads("{tower}/blocks/{i}/heads", units, "num_attention_heads") for units in ("query_key", "value_out"))
_B, _K = "{tower}/blocks/{i}", "{tower}_model.encoder.layers.{i}"

# fmt: off
TABLE = LayerTable(
    rows=(
        Row("logit_scale",                   "logit_scale",                             "array"),
        Row("vision/embeddings/class_token", "vision_model.embeddings.class_embedding", "array",       (_V,)),
        Row("vision/embeddings/patch",       "vision_model.embeddings.patch_embedding", "conv kernel", (None, _V)),
        Row("vision/embeddings/positions",   "vision_model.embeddings.position_embedding", "embedding", (None, _V)),
        Row("vision/pre_norm",               "vision_model.pre_layrnorm",               "norm",        (_V,)),
        Row("vision/post_norm",              "vision_model.post_layernorm",             "norm",        (_V,)),
        Row("vision/projection",             "visual_projection",                       "kernel",      (_V, None)),
        Row("text/embeddings/tokens",        "text_model.embeddings.token_embedding",   "embedding",   (None, _T)),
        Row("text/embeddings/positions",     "text_model.embeddings.position_embedding", "embedding",  (None, _T)),
        Row("text/final_norm",               "text_model.final_layer_norm",             "norm",        (_T,)),
        Row("text/projection",               "text_projection",                         "kernel",      (_T, None)),
        Row(f"{_B}/norm1",                   f"{_K}.layer_norm1",                       "norm",        (_R,)),
        Row(f"{_B}/attention/query",         f"{_K}.self_attn.q_proj",                  "linear",      (_R, _QK)),
        Row(f"{_B}/attention/key",           f"{_K}.self_attn.k_proj",                  "linear",      (_R, _QK)),
        Row(f"{_B}/attention/value",         f"{_K}.self_attn.v_proj",                  "linear",      (_R, _VO)),
        Row(f"{_B}/attention/out",           f"{_K}.self_attn.out_proj",                "linear",      (_VO, _R)),
        Row(f"{_B}/norm2",                   f"{_K}.layer_norm2",                       "norm",        (_R,)),
        Row(f"{_B}/mlp/up",                  f"{_K}.mlp.fc1",                           "linear",      (_R, _H)),
        Row(f"{_B}/mlp/down",                f"{_K}.mlp.fc2",                           "linear",      (_H, _R)),
    ),
    outputs={_R: "projection_dim"},
    unused=("{tower}_model.embeddings.position_ids",),  # 0, 1, 2, ...: a buffer that older versions saved
    wrappers=("vision_model.", "text_model."),  # a tower saved alone has keys with or without
    wrapper_of={"CLIPVisionModel": "vision_model.", "CLIPTextModel": "text_model."},
)
