"""The layers of a ViT classifier: here, in a Hugging Face checkpoint, and over what their axes run."""

from __future__ import annotations

from tvjax.models.layer_table import Heads, LayerTable, Row

_R, _H = "vision/residual", "vision/blocks/{i}/hidden"
_QK, _VO = (Heads("vision/blocks/{i}/heads", units, "num_attention_heads") for units in ("query_key", "value_out"))
_B, _K = "vision/blocks/{i}", "vit.encoder.layer.{i}"

# fmt: off
TABLE = LayerTable(
    rows=(
        Row("vision/embeddings/class_token", "vit.embeddings.cls_token",                   "batched token", (_R,)),
        Row("vision/embeddings/patch",       "vit.embeddings.patch_embeddings.projection", "conv",          (None, _R)),
        Row("vision/embeddings/positions",   "vit.embeddings.position_embeddings",         "batched array", (None, _R)),
        Row("vision/post_norm",              "vit.layernorm",                              "norm",          (_R,)),
        Row(f"{_B}/norm1",                   f"{_K}.layernorm_before",                     "norm",          (_R,)),
        Row(f"{_B}/attention/query",         f"{_K}.attention.attention.query",            "linear",        (_R, _QK)),
        Row(f"{_B}/attention/key",           f"{_K}.attention.attention.key",              "linear",        (_R, _QK)),
        Row(f"{_B}/attention/value",         f"{_K}.attention.attention.value",            "linear",        (_R, _VO)),
        Row(f"{_B}/attention/out",           f"{_K}.attention.output.dense",               "linear",        (_VO, _R)),
        Row(f"{_B}/norm2",                   f"{_K}.layernorm_after",                      "norm",          (_R,)),
        Row(f"{_B}/mlp/up",                  f"{_K}.intermediate.dense",                   "linear",        (_R, _H)),
        Row(f"{_B}/mlp/down",                f"{_K}.output.dense",                         "linear",        (_H, _R)),
        Row("head",                          "classifier",                                 "linear",        (_R, None),
            fixed=True),
    ),
    unused=("vit.pooler.dense.weight", "vit.pooler.dense.bias"),  # the classifier reads the class token itself
    wrappers=("vit.",),
    wrapper_of={"ViTModel": "vit."},
    renamed=(
        ("vit.layers.{i}.attention.q_proj", f"{_K}.attention.attention.query"),
        ("vit.layers.{i}.attention.k_proj", f"{_K}.attention.attention.key"),
        ("vit.layers.{i}.attention.v_proj", f"{_K}.attention.attention.value"),
        ("vit.layers.{i}.attention.o_proj", f"{_K}.attention.output.dense"),
        ("vit.layers.{i}.mlp.fc1",          f"{_K}.intermediate.dense"),
        ("vit.layers.{i}.mlp.fc2",          f"{_K}.output.dense"),
    ),
)
