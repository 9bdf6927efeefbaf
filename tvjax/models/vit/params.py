"""Where the parameters of a ViT classifier lie in a Hugging Face checkpoint."""

from __future__ import annotations

from tvjax.models.key_table import KeyTable, Row

# fmt: off
KEYS = KeyTable(
    rows=(
        Row("vision/embeddings/class_token",     "vit.embeddings.cls_token",                        "batched token"),
        Row("vision/embeddings/patch",           "vit.embeddings.patch_embeddings.projection",      "conv"),
        Row("vision/embeddings/positions",       "vit.embeddings.position_embeddings",              "batched array"),
        Row("vision/post_norm",                  "vit.layernorm",                                   "norm"),
        Row("vision/blocks/{i}/norm1",           "vit.encoder.layer.{i}.layernorm_before",          "norm"),
        Row("vision/blocks/{i}/attention/query", "vit.encoder.layer.{i}.attention.attention.query", "linear"),
        Row("vision/blocks/{i}/attention/key",   "vit.encoder.layer.{i}.attention.attention.key",   "linear"),
        Row("vision/blocks/{i}/attention/value", "vit.encoder.layer.{i}.attention.attention.value", "linear"),
        Row("vision/blocks/{i}/attention/out",   "vit.encoder.layer.{i}.attention.output.dense",    "linear"),
        Row("vision/blocks/{i}/norm2",           "vit.encoder.layer.{i}.layernorm_after",           "norm"),
        Row("vision/blocks/{i}/mlp/up",          "vit.encoder.layer.{i}.intermediate.dense",        "linear"),
        Row("vision/blocks/{i}/mlp/down",        "vit.encoder.layer.{i}.output.dense",              "linear"),
        Row("head",                              "classifier",                                      "linear"),
    ),
    unused=("vit.pooler.dense.weight", "vit.pooler.dense.bias"),  # the classifier reads the class token itself
    wrappers=("vit.",),
    wrapper_of={"ViTModel": "vit."},
    renamed=(
        ("vit.layers.{i}.attention.q_proj", "vit.encoder.layer.{i}.attention.attention.query"),
        ("vit.layers.{i}.attention.k_proj", "vit.encoder.layer.{i}.attention.attention.key"),
        ("vit.layers.{i}.attention.v_proj", "vit.encoder.layer.{i}.attention.attention.value"),
        ("vit.layers.{i}.attention.o_proj", "vit.encoder.layer.{i}.attention.output.dense"),
        ("vit.layers.{i}.mlp.fc1",          "vit.encoder.layer.{i}.intermediate.dense"),
        ("vit.layers.{i}.mlp.fc2",          "vit.encoder.layer.{i}.output.dense"),
    ),
)
