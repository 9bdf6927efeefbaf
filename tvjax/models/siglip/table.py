"""The layers of a SigLIP: here, in a Hugging Face checkpoint, and over what their axes run.

The embedding that two towers share has a meaning of its own, and so have pixels, positions and tokens. What the pooling
head asks with (its probe) is a space of its own, which only its query kernel reads. A checkpoint has the head's
queries, keys and values in one kernel, ``in_proj``; each is a layer of its own here.
"""

from __future__ import annotations

from tvjax.models.layer_table import Heads, LayerTable, Part, Row

_V, _T, _R, _P = "vision/residual", "text/residual", "{tower}/residual", "vision/head/probe"
_H, _HH = "{tower}/blocks/{i}/hidden", "vision/head/hidden"
_QK, _VO = (Heads("{tower}/blocks/{i}/heads", units, "num_attention_heads") for units in ("query_key", "value_out"))
_HQK, _HVO = (Heads("vision/head/heads", units, "num_attention_heads") for units in ("query_key", "value_out"))
_B, _K = "{tower}/blocks/{i}", "{tower}_model.encoder.layers.{i}"
_E, _HEAD = "vision/head", "vision_model.head"

# fmt: off
TABLE = LayerTable(
    rows=(
        Row("logit_scale",                 "logit_scale",                                "scalar"),
        Row("logit_bias",                  "logit_bias",                                 "scalar"),
        Row("vision/embeddings/patch",     "vision_model.embeddings.patch_embedding",    "conv",          (None, _V)),
        Row("vision/embeddings/positions", "vision_model.embeddings.position_embedding", "embedding",     (None, _V)),
        Row("vision/post_norm",            "vision_model.post_layernorm",                "norm",          (_V,)),
        Row(f"{_E}/probe",                 f"{_HEAD}.probe",                             "batched token", (_P,)),
        Row(f"{_E}/attention/query",       f"{_HEAD}.attention.in_proj", "in_proj", (_P, _HQK), part=Part(0, 3)),
        Row(f"{_E}/attention/key",         f"{_HEAD}.attention.in_proj", "in_proj", (_V, _HQK), part=Part(1, 3)),
        Row(f"{_E}/attention/value",       f"{_HEAD}.attention.in_proj", "in_proj", (_V, _HVO), part=Part(2, 3)),
        Row(f"{_E}/attention/out",         f"{_HEAD}.attention.out_proj",                "linear",        (_HVO, None)),
        Row(f"{_E}/norm",                  f"{_HEAD}.layernorm",                         "norm",          (None,)),
        Row(f"{_E}/mlp/up",                f"{_HEAD}.mlp.fc1",                           "linear",        (None, _HH)),
        Row(f"{_E}/mlp/down",              f"{_HEAD}.mlp.fc2",                           "linear",        (_HH, None)),
        Row("text/embeddings/tokens",      "text_model.embeddings.token_embedding",      "embedding",     (None, _T)),
        Row("text/embeddings/positions",   "text_model.embeddings.position_embedding",   "embedding",     (None, _T)),
        Row("text/final_norm",             "text_model.final_layer_norm",                "norm",          (_T,)),
        Row("text/projection",             "text_model.head",                            "linear",        (_T, None)),
        Row(f"{_B}/norm1",                 f"{_K}.layer_norm1",                          "norm",          (_R,)),
        Row(f"{_B}/attention/query",       f"{_K}.self_attn.q_proj",                     "linear",        (_R, _QK)),
        Row(f"{_B}/attention/key",         f"{_K}.self_attn.k_proj",                     "linear",        (_R, _QK)),
        Row(f"{_B}/attention/value",       f"{_K}.self_attn.v_proj",                     "linear",        (_R, _VO)),
        Row(f"{_B}/attention/out",         f"{_K}.self_attn.out_proj",                   "linear",        (_VO, _R)),
        Row(f"{_B}/norm2",                 f"{_K}.layer_norm2",                          "norm",          (_R,)),
        Row(f"{_B}/mlp/up",                f"{_K}.mlp.fc1",                              "linear",        (_R, _H)),
        Row(f"{_B}/mlp/down",              f"{_K}.mlp.fc2",                              "linear",        (_H, _R)),
    ),
    unused=("{tower}_model.embeddings.position_ids",),  # 0, 1, 2, ...: a buffer that older versions saved
    wrappers=("vision_model.", "text_model."),  # a tower saved alone has keys with or without
    wrapper_of={"SiglipVisionModel": "vision_model.", "SiglipTextModel": "text_model."},
)
