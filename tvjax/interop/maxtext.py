"""The parameter trees of MaxText (https://github.com/AI-Hypercomputer/maxtext): Llama, Mistral, Qwen2, Qwen3.

Its layers are scanned, with the layer axis second. Its Llama and Mistral multiply no scores: their query kernels hold
1 / sqrt(size of a head). Its Llama 3.1 rotates the units (2 j, 2 j + 1) of a head, all its other models, like those of
Hugging Face, (j, j + size / 2). Kernels keep an axis of heads. Norms are stored as they are multiplied.
"""

from __future__ import annotations

from typing import Any

from tvjax.interop.table import PyTree, TreeRow, TreeTable, Variant, from_tree, names, to_tree

SCAN_AXIS = 1  # MaxText's param_scan_axis
_O, _T = "blocks/{i}", "decoder/layers/{i}"
_QWEN2, _QWEN3 = ("qwen2",), ("qwen3",)

# fmt: off
TABLE = TreeTable(
    code="MaxText",
    rows=(
        TreeRow("embeddings/tokens",                 "token_embedder/embedding"),
        TreeRow(f"{_O}/norm1/scale",                 f"{_T}/pre_self_attention_layer_norm/scale"),
        TreeRow(f"{_O}/attention/query/kernel",      f"{_T}/self_attention/query/kernel",      "query"),
        TreeRow(f"{_O}/attention/query/bias",        f"{_T}/self_attention/query/bias",        "query", _QWEN2),
        TreeRow(f"{_O}/attention/key/kernel",        f"{_T}/self_attention/key/kernel",        "rotary"),
        TreeRow(f"{_O}/attention/key/bias",          f"{_T}/self_attention/key/bias",          "rotary", _QWEN2),
        TreeRow(f"{_O}/attention/value/kernel",      f"{_T}/self_attention/value/kernel",      "heads"),
        TreeRow(f"{_O}/attention/value/bias",        f"{_T}/self_attention/value/bias",        "heads", _QWEN2),
        TreeRow(f"{_O}/attention/out/kernel",        f"{_T}/self_attention/out/kernel",        "heads"),
        TreeRow(f"{_O}/attention/query_norm/scale",  f"{_T}/self_attention/query_norm/scale",  "rotary", _QWEN3),
        TreeRow(f"{_O}/attention/key_norm/scale",    f"{_T}/self_attention/key_norm/scale",    "rotary", _QWEN3),
        TreeRow(f"{_O}/norm2/scale",                 f"{_T}/post_self_attention_layer_norm/scale"),
        TreeRow(f"{_O}/mlp/gate/kernel",             f"{_T}/mlp/wi_0/kernel"),
        TreeRow(f"{_O}/mlp/up/kernel",               f"{_T}/mlp/wi_1/kernel"),
        TreeRow(f"{_O}/mlp/down/kernel",             f"{_T}/mlp/wo/kernel"),
        TreeRow("final_norm/scale",                  "decoder/decoder_norm/scale"),
        TreeRow("head/kernel",                       "decoder/logits_dense/kernel"),
    ),
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    stack="decoder/layers",
    unrolled="decoder/layers_{i}",
)
# fmt: on


def to_maxtext(
    params: PyTree,
    config: Any,
    *,
    scan_axis: int | None = SCAN_AXIS,
    interleaved: bool | None = None,
    partial: bool = False,
    like: PyTree = None,
) -> PyTree:
    """Parameters, or a task vector, as MaxText's tree (what it has under ``params/params``).

    Args:
      params: of a model of `tvjax.models.llama` (so of a Hugging Face folder), NumPy or JAX arrays; None leaves are
        passed over. A task vector is converted like the parameters, as every conversion is linear.
      config: its `LlamaConfig`.
      scan_axis: the layer axis (MaxText's ``param_scan_axis``); None for ``scan_layers=False``.
      interleaved: whether the pairs that positions rotate lie side by side; None: where MaxText has them so, with
        the rotary positions of Llama 3.1.
      partial: whether leaves may be missing, as from a task vector that covers a part of a model.
      like: a tree of MaxText, what wraps it too: the result has its structure, and lies where its arrays lie.

    Returns:
      Nested dicts, or the structure of `like`.

    Raises:
      ValueError: naming every leaf that is missing, surplus, of another shape, or has no place (biases that MaxText
        has not, a head where the config ties it); rotary positions whose layout in MaxText is not known.

    >>> import jax
    >>> from tvjax.models.llama import LlamaConfig, init
    >>> config = LlamaConfig(16, 8, 12, 3, 2, 1, head_dim=4)
    >>> params = to_maxtext(init(config, jax.random.key(0)), config)
    >>> params["decoder"]["layers"]["self_attention"]["query"]["kernel"].shape  # inputs, layers, heads, units
    (8, 3, 2, 4)
    """
    return to_tree(TABLE, params, config, _variant(config, scan_axis, interleaved), partial=partial, like=like)


def from_maxtext(
    params: PyTree,
    config: Any,
    *,
    scan_axis: int = SCAN_AXIS,
    interleaved: bool | None = None,
    partial: bool = False,
) -> PyTree:
    """A tree of MaxText as parameters here, the inverse of `to_maxtext`.

    Whether its layers are stacked is told by their names. All but the queries of Llama and Mistral come back bit by
    bit; these are rounded where sqrt(size of a head) is no power of two.

    Args:
      params: the tree, with or without what wraps it (``params/params``), or an ``nnx.State``.
      config: the `LlamaConfig` of the model.
      scan_axis: the layer axis, where layers are stacked.
      interleaved: as in `to_maxtext`.
      partial: whether leaves may be missing.

    Returns:
      Nested dicts.

    Raises:
      ValueError: as in `to_maxtext`.
    """
    return from_tree(TABLE, params, config, _variant(config, scan_axis, interleaved), partial=partial)


def maxtext_names(config: Any, *, scan_axis: int | None = SCAN_AXIS) -> dict[str, str]:
    """The path in MaxText's tree for each key of a Hugging Face checkpoint; stacked layers share one path.

    >>> from tvjax.models.llama import LlamaConfig
    >>> maxtext_names(LlamaConfig(num_hidden_layers=2))["model.layers.1.self_attn.q_proj.weight"]
    'decoder/layers/self_attention/query/kernel'
    """
    return names(TABLE, config, Variant(scan_axis))


def _variant(config: Any, scan_axis: int | None, interleaved: bool | None) -> Variant:
    kind = getattr(getattr(config, "rope", None), "kind", "default")
    if interleaved is None and kind in ("yarn", "longrope"):
        raise ValueError(
            f"how MaxText lays out the rotary positions of rope_type {kind!r} is a setting of its own "
            "(rope_interleave): say interleaved=True or interleaved=False (--interleaved, --no-interleaved)"
        )
    folded = getattr(config, "model_type", "") in ("llama", "mistral")
    return Variant(scan_axis, kind == "llama3" if interleaved is None else interleaved, folded)
