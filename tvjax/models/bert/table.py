"""The layers of a BERT and its relatives: here, in a Hugging Face checkpoint, and over what their axes run.

The residual stream of a sentence encoder ends in what the model returns, and is free all the same: embeddings are
compared with embeddings of the same model alone, so that the order of their features means nothing. MPNet's blocks
share one position bias by head, so that their heads are exchanged together.
"""

from __future__ import annotations

from tvjax.models.layer_table import Heads, LayerTable, Row

_R, _H, _B = "residual", "blocks/{i}/hidden", "blocks/{i}"
_NUMBER = "num_attention_heads"


def _table(
    wrapper: str,
    classes: tuple[str, ...],
    attention: tuple[str, str, str, str],
    norm1: str,
    head: tuple[str, str],
    shared_heads: bool = False,
) -> LayerTable:
    """The table of one family of keys.

    Args:
      wrapper: what the keys of a model within another begin with.
      classes: of transformers, whose modules' names leave the wrapper out.
      attention: the keys of query, key, value and output in a block.
      norm1: the key of the norm after the attention.
      head: the keys of the classifier's two layers.
      shared_heads: whether the blocks share a position bias; then there are no token types.
    """
    k, e = f"{wrapper}encoder.layer.{{i}}", f"{wrapper}embeddings"
    query, key, value, out = attention
    if shared_heads:
        qk, vo = (Heads("heads", f"blocks/{{i}}/{units}", _NUMBER) for units in ("query_key", "value_out"))
    else:
        qk, vo = (Heads("blocks/{i}/heads", units, _NUMBER) for units in ("query_key", "value_out"))
    # fmt: off
    rows = (
        Row("embeddings/tokens",      f"{e}.word_embeddings",         "embedding", (None, _R)),
        Row("embeddings/positions",   f"{e}.position_embeddings",     "embedding", (None, _R)),
        Row("embeddings/types",       f"{e}.token_type_embeddings",   "embedding", (None, _R)),
        Row("embeddings/norm",        f"{e}.LayerNorm",               "norm",      (_R,)),
        Row("relative_bias",          f"{wrapper}encoder.relative_attention_bias", "embedding",
            (None, Heads("heads", "bias", _NUMBER))),
        Row(f"{_B}/attention/query",  f"{k}.attention.{query}",       "linear",    (_R, qk)),
        Row(f"{_B}/attention/key",    f"{k}.attention.{key}",         "linear",    (_R, qk)),
        Row(f"{_B}/attention/value",  f"{k}.attention.{value}",       "linear",    (_R, vo)),
        Row(f"{_B}/attention/out",    f"{k}.attention.{out}",         "linear",    (vo, _R)),
        Row(f"{_B}/norm1",            f"{k}.attention.{norm1}",       "norm",      (_R,)),
        Row(f"{_B}/mlp/up",           f"{k}.intermediate.dense",      "linear",    (_R, _H)),
        Row(f"{_B}/mlp/down",         f"{k}.output.dense",            "linear",    (_H, _R)),
        Row(f"{_B}/norm2",            f"{k}.output.LayerNorm",        "norm",      (_R,)),
        Row("head/dense",             head[0],                        "linear",    (_R, "head/hidden")),
        Row("head/out",               head[1],                        "linear",    ("head/hidden", None), fixed=True),
    )
    # fmt: on
    return LayerTable(
        rows=tuple(row for row in rows if row.path != ("embeddings/types" if shared_heads else "relative_bias")),
        unused=(
            *(f"{wrapper}pooler.dense.weight", f"{wrapper}pooler.dense.bias"),
            *(f"{wrapper}embeddings.position_ids", f"{wrapper}embeddings.token_type_ids"),  # buffers of older versions
            *("cls.{path}", "lm_head.{path}"),  # of pre-training
        ),
        wrappers=(wrapper,),
        wrapper_of=dict.fromkeys(classes, wrapper),
        spellings=((".gamma", ".weight"), (".beta", ".bias")),  # of norms, in checkpoints made of TensorFlow's
    )


_OF_BERT = ("self.query", "self.key", "self.value", "output.dense")
BERT = _table("bert.", ("BertModel",), _OF_BERT, "output.LayerNorm", ("bert.pooler.dense", "classifier"))
ROBERTA = _table(
    "roberta.",
    ("RobertaModel", "XLMRobertaModel"),
    _OF_BERT,
    "output.LayerNorm",
    ("classifier.dense", "classifier.out_proj"),
)
MPNET = _table(
    "mpnet.",
    ("MPNetModel",),
    ("attn.q", "attn.k", "attn.v", "attn.o"),
    "LayerNorm",
    ("classifier.dense", "classifier.out_proj"),
    shared_heads=True,
)
