"""Where the parameters of a CLIP lie in a Hugging Face checkpoint."""

from __future__ import annotations

from tvjax.models.key_table import KeyTable, Row

# fmt: off
KEYS = KeyTable(
    rows=(
        Row("logit_scale",                        "logit_scale",                                         "array"),
        Row("vision/embeddings/class_token",      "vision_model.embeddings.class_embedding",             "array"),
        Row("vision/embeddings/patch",            "vision_model.embeddings.patch_embedding",             "conv"),
        Row("vision/embeddings/positions",        "vision_model.embeddings.position_embedding",          "embedding"),
        Row("vision/pre_norm",                    "vision_model.pre_layrnorm",                           "norm"),
        Row("vision/post_norm",                   "vision_model.post_layernorm",                         "norm"),
        Row("vision/projection",                  "visual_projection",                                   "linear"),
        Row("text/embeddings/tokens",             "text_model.embeddings.token_embedding",               "embedding"),
        Row("text/embeddings/positions",          "text_model.embeddings.position_embedding",            "embedding"),
        Row("text/final_norm",                    "text_model.final_layer_norm",                         "norm"),
        Row("text/projection",                    "text_projection",                                     "linear"),
        Row("{tower}/blocks/{i}/norm1",           "{tower}_model.encoder.layers.{i}.layer_norm1",        "norm"),
        Row("{tower}/blocks/{i}/attention/query", "{tower}_model.encoder.layers.{i}.self_attn.q_proj",   "linear"),
        Row("{tower}/blocks/{i}/attention/key",   "{tower}_model.encoder.layers.{i}.self_attn.k_proj",   "linear"),
        Row("{tower}/blocks/{i}/attention/value", "{tower}_model.encoder.layers.{i}.self_attn.v_proj",   "linear"),
        Row("{tower}/blocks/{i}/attention/out",   "{tower}_model.encoder.layers.{i}.self_attn.out_proj", "linear"),
        Row("{tower}/blocks/{i}/norm2",           "{tower}_model.encoder.layers.{i}.layer_norm2",        "norm"),
        Row("{tower}/blocks/{i}/mlp/up",          "{tower}_model.encoder.layers.{i}.mlp.fc1",            "linear"),
        Row("{tower}/blocks/{i}/mlp/down",        "{tower}_model.encoder.layers.{i}.mlp.fc2",            "linear"),
    ),
    unused=("{tower}_model.embeddings.position_ids",),  # 0, 1, 2, ...: a buffer that older versions saved
    wrappers=("vision_model.", "text_model."),  # a tower saved alone has keys with or without
    wrapper_of={"CLIPVisionModel": "vision_model.", "CLIPTextModel": "text_model."},
)
