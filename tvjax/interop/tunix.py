"""The parameter trees of Tunix (https://github.com/google/tunix): Llama 3, Qwen2, Qwen3.

NNX models that are not scanned: a list of layers. Kernels of the attention keep an axis of heads, biases do not;
nothing is permuted or scaled, so every conversion is exact. Norms are stored as they are multiplied.
"""

from __future__ import annotations

from typing import Any

from tvjax.interop.table import PyTree, TreeRow, TreeTable, Variant, from_tree, names, to_tree

_O, _T = "blocks/{i}", "layers/{i}"
_QWEN2, _QWEN3 = ("qwen2",), ("qwen3",)

# fmt: off
TABLE = TreeTable(
    code="Tunix",
    rows=(
        TreeRow("embeddings/tokens",                 "embedder/input_embedding"),
        TreeRow(f"{_O}/norm1/scale",                 f"{_T}/input_layernorm/w"),
        TreeRow(f"{_O}/attention/query/kernel",      f"{_T}/attn/q_proj/w",    "heads"),
        TreeRow(f"{_O}/attention/query/bias",        f"{_T}/attn/q_bias",      "same", _QWEN2),
        TreeRow(f"{_O}/attention/key/kernel",        f"{_T}/attn/k_proj/w",    "heads"),
        TreeRow(f"{_O}/attention/key/bias",          f"{_T}/attn/k_bias",      "same", _QWEN2),
        TreeRow(f"{_O}/attention/value/kernel",      f"{_T}/attn/v_proj/w",    "heads"),
        TreeRow(f"{_O}/attention/value/bias",        f"{_T}/attn/v_bias",      "same", _QWEN2),
        TreeRow(f"{_O}/attention/out/kernel",        f"{_T}/attn/o_proj/w",    "heads"),
        TreeRow(f"{_O}/attention/query_norm/scale",  f"{_T}/attn/q_norm/w",    "same", _QWEN3),
        TreeRow(f"{_O}/attention/key_norm/scale",    f"{_T}/attn/k_norm/w",    "same", _QWEN3),
        TreeRow(f"{_O}/norm2/scale",                 f"{_T}/post_attention_layernorm/w"),
        TreeRow(f"{_O}/mlp/gate/kernel",             f"{_T}/mlp/gate_proj/kernel"),
        TreeRow(f"{_O}/mlp/up/kernel",               f"{_T}/mlp/up_proj/kernel"),
        TreeRow(f"{_O}/mlp/down/kernel",             f"{_T}/mlp/down_proj/kernel"),
        TreeRow("final_norm/scale",                  "final_norm/w"),
        TreeRow("head/kernel",                       "lm_head/w"),
    ),
    model_types=("llama", "qwen2", "qwen3"),
    stack="layers",
    unrolled="layers/{i}",
)
# fmt: on


def to_tunix(params: PyTree, config: Any, *, partial: bool = False, like: PyTree = None) -> PyTree:
    """Parameters, or a task vector, as Tunix's tree, bit by bit.

    ``nnx.update(model, to_tunix(params, config, like=nnx.state(model)))`` puts them into one of its models.

    Args:
      params: of a model of `tvjax.models.llama` (so of a Hugging Face folder); None leaves are passed over.
      config: its `LlamaConfig`.
      partial: whether leaves may be missing, as from a task vector that covers a part of a model.
      like: a tree of Tunix, such as ``nnx.state(model)``: the result has its structure, and lies where its arrays lie.

    Returns:
      Nested dicts, or the structure of `like`.

    Raises:
      ValueError: naming every leaf that is missing, surplus, of another shape, or has no place.

    >>> import jax
    >>> from tvjax.models.llama import LlamaConfig, init
    >>> config = LlamaConfig(16, 8, 12, 3, 2, 1, head_dim=4)
    >>> params = to_tunix(init(config, jax.random.key(0)), config)
    >>> params["layers"]["2"]["attn"]["q_proj"]["w"].shape  # inputs, heads, units
    (8, 2, 4)
    """
    return to_tree(TABLE, params, config, Variant(), partial=partial, like=like)


def from_tunix(params: PyTree, config: Any, *, partial: bool = False) -> PyTree:
    """A tree of Tunix (an ``nnx.State``, a model, dicts) as parameters here, the inverse of `to_tunix`, bit by bit.

    Raises:
      ValueError: as in `to_tunix`.
    """
    return from_tree(TABLE, params, config, Variant(), partial=partial)


def tunix_names(config: Any) -> dict[str, str]:
    """The path in Tunix's tree for each key of a Hugging Face checkpoint.

    >>> from tvjax.models.llama import LlamaConfig
    >>> tunix_names(LlamaConfig(num_hidden_layers=2))["model.layers.1.self_attn.q_proj.weight"]
    'layers/1/attn/q_proj/w'
    """
    return names(TABLE, config, Variant())
