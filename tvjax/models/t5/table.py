"""The layers of a T5 and its relatives: here, in a Hugging Face checkpoint, and over what their axes run."""

from __future__ import annotations

from tvjax.models.layer_table import Heads, LayerTable, Row

_R = "residual"  # of both towers, which share the embeddings
_EB, _EL = "encoder/blocks/{i}", "encoder.block.{i}.layer"
_DB, _DL = "decoder/blocks/{i}", "decoder.block.{i}.layer"
_EH, _DH = f"{_EB}/hidden", f"{_DB}/hidden"
_CQ, _CV = (Heads(f"{_DB}/cross_heads", units, "num_heads") for units in ("query_key", "value_out"))


def _table(bias_in_each_block: bool) -> LayerTable:
    """The layers, with a table of position biases in each block, or one for a tower, which ties its heads together."""

    def heads(tower: str, units: str) -> Heads:
        if bias_in_each_block:
            return Heads(f"{tower}/blocks/{{i}}/heads", units, "num_heads")
        return Heads(f"{tower}/heads", units if units == "bias" else f"{{i}}/{units}", "num_heads")

    def bias(tower: str) -> Row:
        path, number = (f"{tower}/blocks/{{i}}", "{i}") if bias_in_each_block else (tower, "0")
        key = f"{tower}.block.{number}.layer.0.SelfAttention.relative_attention_bias"
        return Row(f"{path}/position_bias", key, "embedding", (None, heads(tower, "bias")))

    eq, ev = heads("encoder", "query_key"), heads("encoder", "value_out")
    dq, dv = heads("decoder", "query_key"), heads("decoder", "value_out")
    # fmt: off
    return LayerTable(
        rows=(
            Row("embeddings/tokens",           "shared",                           "embedding", (None, _R)),
            Row("encoder/embeddings",          "encoder.embed_tokens",             "embedding", (None, _R),
                tied="embeddings/tokens"),
            Row("decoder/embeddings",          "decoder.embed_tokens",             "embedding", (None, _R),
                tied="embeddings/tokens"),
            bias("encoder"),
            Row(f"{_EB}/norm1",                f"{_EL}.0.layer_norm",              "scale",     (_R,)),
            Row(f"{_EB}/attention/query",      f"{_EL}.0.SelfAttention.q",         "kernel",    (_R, eq)),
            Row(f"{_EB}/attention/key",        f"{_EL}.0.SelfAttention.k",         "kernel",    (_R, eq)),
            Row(f"{_EB}/attention/value",      f"{_EL}.0.SelfAttention.v",         "kernel",    (_R, ev)),
            Row(f"{_EB}/attention/out",        f"{_EL}.0.SelfAttention.o",         "kernel",    (ev, _R)),
            Row(f"{_EB}/norm2",                f"{_EL}.1.layer_norm",              "scale",     (_R,)),
            Row(f"{_EB}/mlp/up",               f"{_EL}.1.DenseReluDense.wi",       "kernel",    (_R, _EH)),
            Row(f"{_EB}/mlp/gate",             f"{_EL}.1.DenseReluDense.wi_0",     "kernel",    (_R, _EH)),
            Row(f"{_EB}/mlp/gated",            f"{_EL}.1.DenseReluDense.wi_1",     "kernel",    (_R, _EH)),
            Row(f"{_EB}/mlp/down",             f"{_EL}.1.DenseReluDense.wo",       "kernel",    (_EH, _R)),
            Row("encoder/final_norm",          "encoder.final_layer_norm",         "scale",     (_R,)),
            bias("decoder"),
            Row(f"{_DB}/norm1",                f"{_DL}.0.layer_norm",              "scale",     (_R,)),
            Row(f"{_DB}/attention/query",      f"{_DL}.0.SelfAttention.q",         "kernel",    (_R, dq)),
            Row(f"{_DB}/attention/key",        f"{_DL}.0.SelfAttention.k",         "kernel",    (_R, dq)),
            Row(f"{_DB}/attention/value",      f"{_DL}.0.SelfAttention.v",         "kernel",    (_R, dv)),
            Row(f"{_DB}/attention/out",        f"{_DL}.0.SelfAttention.o",         "kernel",    (dv, _R)),
            Row(f"{_DB}/cross_norm",           f"{_DL}.1.layer_norm",              "scale",     (_R,)),
            Row(f"{_DB}/cross_attention/query", f"{_DL}.1.EncDecAttention.q",      "kernel",    (_R, _CQ)),
            Row(f"{_DB}/cross_attention/key",  f"{_DL}.1.EncDecAttention.k",       "kernel",    (_R, _CQ)),
            Row(f"{_DB}/cross_attention/value", f"{_DL}.1.EncDecAttention.v",      "kernel",    (_R, _CV)),
            Row(f"{_DB}/cross_attention/out",  f"{_DL}.1.EncDecAttention.o",       "kernel",    (_CV, _R)),
            Row(f"{_DB}/norm2",                f"{_DL}.2.layer_norm",              "scale",     (_R,)),
            Row(f"{_DB}/mlp/up",               f"{_DL}.2.DenseReluDense.wi",       "kernel",    (_R, _DH)),
            Row(f"{_DB}/mlp/gate",             f"{_DL}.2.DenseReluDense.wi_0",     "kernel",    (_R, _DH)),
            Row(f"{_DB}/mlp/gated",            f"{_DL}.2.DenseReluDense.wi_1",     "kernel",    (_R, _DH)),
            Row(f"{_DB}/mlp/down",             f"{_DL}.2.DenseReluDense.wo",       "kernel",    (_DH, _R)),
            Row("decoder/final_norm",          "decoder.final_layer_norm",         "scale",     (_R,)),
            Row("head",                        "lm_head",                          "kernel",    (_R, None),
                fixed=True, tied="embeddings/tokens"),
        ),
        unused=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),  # of older versions
    )
    # fmt: on


TABLE, UMT5_TABLE = _table(bias_in_each_block=False), _table(bias_in_each_block=True)
