"""The layers of a DINOv2: here, in a Hugging Face checkpoint, and over what their axes run.

The classifier reads the class token and the mean of the patches side by side: here each has a kernel of its own, which
runs over the residual stream. Nothing reads the mask token; it is kept because checkpoints have it.
"""

from __future__ import annotations

from tvjax.models.layer_table import Heads, LayerTable, Part, Row

_R, _H = "vision/residual", "vision/blocks/{i}/hidden"
_QK, _VO = (Heads("vision/blocks/{i}/heads", units, "num_attention_heads") for units in ("query_key", "value_out"))
_B, _E = "vision/blocks/{i}", "vision/embeddings"


def _table(name: str, backbone: str) -> LayerTable:
    layer = f"{name}.encoder.layer.{{i}}"
    # fmt: off
    return LayerTable(
        rows=(
            Row(f"{_E}/class_token",     f"{name}.embeddings.cls_token",                   "batched token", (_R,)),
            Row(f"{_E}/mask_token",      f"{name}.embeddings.mask_token",                  "batched array", (_R,)),
            Row(f"{_E}/patch",           f"{name}.embeddings.patch_embeddings.projection", "conv",          (None, _R)),
            Row(f"{_E}/positions",       f"{name}.embeddings.position_embeddings",         "batched array", (None, _R)),
            Row("vision/post_norm",      f"{name}.layernorm",                              "norm",          (_R,)),
            Row(f"{_B}/norm1",           f"{layer}.norm1",                                 "norm",          (_R,)),
            Row(f"{_B}/attention/query", f"{layer}.attention.attention.query",             "linear",        (_R, _QK)),
            Row(f"{_B}/attention/key",   f"{layer}.attention.attention.key",               "linear",        (_R, _QK)),
            Row(f"{_B}/attention/value", f"{layer}.attention.attention.value",             "linear",        (_R, _VO)),
            Row(f"{_B}/attention/out",   f"{layer}.attention.output.dense",                "linear",        (_VO, _R)),
            Row(f"{_B}/layer_scale1",    f"{layer}.layer_scale1",                          "layer scale",   (_R,)),
            Row(f"{_B}/norm2",           f"{layer}.norm2",                                 "norm",          (_R,)),
            Row(f"{_B}/mlp/up",          f"{layer}.mlp.fc1",                               "linear",        (_R, _H)),
            Row(f"{_B}/mlp/down",        f"{layer}.mlp.fc2",                               "linear",        (_H, _R)),
            Row(f"{_B}/gated_mlp/gate",  f"{layer}.mlp.weights_in",                        "linear",        (_R, _H),
                part=Part(0, 2)),
            Row(f"{_B}/gated_mlp/up",    f"{layer}.mlp.weights_in",                        "linear",        (_R, _H),
                part=Part(1, 2)),
            Row(f"{_B}/gated_mlp/down",  f"{layer}.mlp.weights_out",                       "linear",        (_H, _R)),
            Row(f"{_B}/layer_scale2",    f"{layer}.layer_scale2",                          "layer scale",   (_R,)),
            Row("head/class_token",      "classifier", "kernel", (_R, None), fixed=True, part=Part(0, 2, axis=0)),
            Row("head/patches",          "classifier", "kernel", (_R, None), fixed=True, part=Part(1, 2, axis=0)),
            Row("head/bias",             "classifier.bias", "array", (None,), fixed=True),
        ),
        outputs={_R: "num_labels"},  # a backbone returns it
        wrappers=(f"{name}.",),
        wrapper_of={backbone: f"{name}."},
        renamed=tuple(
            (f"{layer}.{ours}", f"{layer}.{theirs}")
            for ours, theirs in (
                ("attention.q_proj", "attention.attention.query"),
                ("attention.k_proj", "attention.attention.key"),
                ("attention.v_proj", "attention.attention.value"),
                ("attention.o_proj", "attention.output.dense"),
                ("mlp.down_proj",    "mlp.weights_out"),
            )
        ),
    )
    # fmt: on


TABLE = _table("dinov2", "Dinov2Model")
_REGISTERS = Row(f"{_E}/registers", "dinov2_with_registers.embeddings.register_tokens", "batched array", (None, _R))
TABLE_WITH_REGISTERS = _table("dinov2_with_registers", "Dinov2WithRegistersModel")
TABLE_WITH_REGISTERS = TABLE_WITH_REGISTERS._replace(rows=(_REGISTERS, *TABLE_WITH_REGISTERS.rows))
