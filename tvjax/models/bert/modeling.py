"""BERT as stages, and as one NNX module (Devlin et al. 2019, https://arxiv.org/abs/1810.04805)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tvjax.models import transformer
from tvjax.models.bert import table
from tvjax.models.bert.config import BertConfig, MPNetConfig, RobertaConfig
from tvjax.models.layer_table import LayerTable, describe
from tvjax.models.relative_positions import position_bias
from tvjax.models.transformer import MLP, Attention, LayerNorm, linear, parameters, stage_function
from tvjax.stages import Model, PyTree, Stage, Stream

_STD = 0.02  # of every initial table and of the head's kernels
_FARTHEST = 128  # distance from which on all are one bucket
TABLES: dict[type[BertConfig], LayerTable] = {
    BertConfig: table.BERT,
    RobertaConfig: table.ROBERTA,
    MPNetConfig: table.MPNET,
}


@dataclasses.dataclass(frozen=True)
class BlockConfig(transformer.BlockConfig):
    """The shape of one block; `buckets` are those of the position bias, 0 for none."""

    buckets: int = 0


def block_config(config: BertConfig) -> BlockConfig:
    """The shape of the blocks of a model."""
    return BlockConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        buckets=config.relative_attention_num_buckets,
    )


class Embeddings(nnx.Module):
    """First stage: ``tokens``, and ``types`` where there are such, to ``hidden``."""

    def __init__(self, config: BertConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.tokens = _embedding(config.vocab_size, width, rngs)
        self.positions = _embedding(config.max_position_embeddings, width, rngs)
        if config.type_vocab_size:
            self.types = _embedding(config.type_vocab_size, width, rngs)
        self.norm = LayerNorm(width, config.layer_norm_eps, rngs=rngs)
        self.config, self.dtype = config, dtype

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``tokens`` and ``types``; a missing ``mask`` becomes one without padding."""
        carry = dict(carry)
        tokens = carry.pop("tokens")
        types = carry.pop("types", jnp.zeros_like(tokens))
        if tokens.shape[1] > self.config.positions:
            raise ValueError(
                f"texts of {tokens.shape[1]} tokens, at most {self.config.positions} have positions: truncate them"
            )
        mask = carry.get("mask", jnp.ones(tokens.shape, bool)).astype(bool)
        embedded = _rows(self.tokens, tokens) + _rows(self.positions, self.places(tokens, mask))
        if hasattr(self, "types"):
            embedded = embedded + _rows(self.types, types)
        return {**carry, "hidden": self.norm(embedded).astype(self.dtype), "mask": mask}

    def places(self, tokens: Int[Array, "batch tokens"], mask: Bool[Array, "batch tokens"]) -> Array:
        """The position of each token.

        RoBERTa counts the tokens that are not padding, from the padding's id on; what looks like padding within a text
        has the padding's position too.
        """
        if not self.config.positions_after_padding:
            return jnp.arange(tokens.shape[1])[None]
        real = (mask & (tokens != self.config.pad_token_id)).astype(jnp.int32)
        return jnp.cumsum(real, axis=1) * real + self.config.pad_token_id


class Block(nnx.Module):
    """A post-norm block on ``carry["hidden"]``, which reads ``mask``; attention sees all real tokens.

    With buckets it also takes the ``relative_bias`` that the blocks of a model share.
    """

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.attention = Attention(config, dtype, 1, rngs=rngs)
        self.norm1 = LayerNorm(width, eps, rngs=rngs)
        self.mlp = MLP(config, dtype, 1, rngs=rngs)
        self.norm2 = LayerNorm(width, eps, rngs=rngs)
        if config.buckets:
            self.relative_bias = _embedding(config.buckets, config.num_attention_heads, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Normalises what attention, then the MLP, add to the residual stream."""
        table = self.relative_bias[...] if hasattr(self, "relative_bias") else None
        return self.run(carry, table)

    def run(self, carry: dict[str, Array], table: Float[Array, "buckets heads"] | None) -> dict[str, Array]:
        """The same with a position bias of somebody else's."""
        hidden = carry["hidden"]
        bias = None if table is None else position_bias(table, hidden.shape[1], _FARTHEST, True)
        hidden = self.norm1(hidden + self.attention(hidden, carry["mask"][:, None, None, :], bias))
        return {**carry, "hidden": self.norm2(hidden + self.mlp(hidden))}


class Pooling(nnx.Module):
    """Last stage of a sentence encoder: ``hidden`` to ``text``."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.of_first = config.pooling == "cls"
        self.normalise = config.normalise is not False

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden`` and ``mask``."""
        carry = dict(carry)
        hidden, real = carry.pop("hidden").astype(jnp.float32), carry.pop("mask").astype(jnp.float32)[..., None]
        pooled = hidden[:, 0] if self.of_first else (hidden * real).sum(1) / jnp.maximum(real.sum(1), 1e-9)
        if self.normalise:
            pooled = pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=-1, keepdims=True), 1e-12)
        return {**carry, "text": pooled}


class Head(nnx.Module):
    """Last stage of a classifier: ``hidden`` of the first token to ``logits``."""

    def __init__(self, config: BertConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        assert config.num_labels is not None
        self.dense = linear(config.hidden_size, config.hidden_size, dtype, rngs, _STD)
        self.out = linear(config.hidden_size, config.num_labels, dtype, rngs, _STD)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden`` and ``mask``."""
        carry = dict(carry)
        hidden, _ = carry.pop("hidden"), carry.pop("mask")
        return {**carry, "logits": self.out(jnp.tanh(self.dense(hidden[:, 0]))).astype(jnp.float32)}


class Bert(nnx.Module):
    """BERT as one module; its parameters are those of the stages.

    >>> config = BertConfig(16, 8, 12, 2, 2, max_position_embeddings=6)
    >>> Bert(config, rngs=nnx.Rngs(0))({"tokens": jnp.zeros((3, 5), int)})["text"].shape
    (3, 8)
    """

    def __init__(self, config: BertConfig, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        dtype, block = jnp.dtype(dtype), dataclasses.replace(block_config(config), buckets=0)
        self.embeddings = Embeddings(config, dtype, rngs=rngs)
        self.blocks = nnx.List([Block(block, dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
        if config.relative_attention_num_buckets:
            buckets, heads = config.relative_attention_num_buckets, config.num_attention_heads
            self.relative_bias = _embedding(buckets, heads, rngs)
        self.head = Pooling(config, rngs=rngs) if config.num_labels is None else Head(config, dtype, rngs=rngs)

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Takes and returns what the stages of `bert` do."""
        carry = self.embeddings(inputs)
        table = self.relative_bias[...] if hasattr(self, "relative_bias") else None
        for block in self.blocks:
            carry = block.run(carry, table)
        return self.head(carry)


def init(config: BertConfig, key: Array) -> PyTree:
    """Random float32 parameters.

    Args:
      config: shape of the model.
      key: a random key.

    Returns:
      Nested dicts with string keys.
    """
    return parameters(Bert(config, rngs=nnx.Rngs(key)))


def bert(config: BertConfig, params: PyTree, dtype: DTypeLike = jnp.float32) -> Model:
    """The stages of a BERT and its parameters.

    The inputs are ``{"tokens": [texts, length], "mask": [texts, length], "types": [texts, length]}``; a missing mask
    means no padding, missing types that all are of the first text. The outputs are ``{"text": [texts, width]}``, the
    embedding of each text, or ``{"logits": [texts, classes]}`` of a classifier, float32.

    Args:
      config: shape of the model.
      params: parameters as nested dicts, in any floating dtype.
      dtype: dtype that activations are computed in.

    Returns:
      The model.

    >>> config = BertConfig(16, 8, 12, 2, 2, max_position_embeddings=6, num_labels=3)
    >>> model = bert(config, init(config, jax.random.key(0)))
    >>> [stage.name for stage in model.stages]
    ['embeddings', 'blocks/0', 'blocks/1', 'head']
    >>> model({"tokens": jnp.zeros((4, 5), int)})["logits"].shape
    (4, 3)
    """
    dtype, stream = jnp.dtype(dtype), Stream(mask="mask")
    function = stage_function(Block, block_config(config), dtype)
    shared = (("relative_bias", "relative_bias"),) if config.relative_attention_num_buckets else ()

    def block(name: str) -> Stage:
        own = tuple((layer, f"{name}/{layer}") for layer in ("attention", "norm1", "mlp", "norm2"))
        return Stage(name, function, (*own, *shared), group="blocks", streams=stream)

    blocks = [block(f"blocks/{i}") for i in range(config.num_hidden_layers)]
    first = Stage("embeddings", stage_function(Embeddings, config, dtype), (("", "embeddings"),), streams=stream)
    if config.num_labels is None:
        last = Stage("pooling", stage_function(Pooling, config), (), streams=stream)
    else:
        last = Stage("head", stage_function(Head, config, dtype), (("", "head"),), streams=stream)
    return Model(params, describe(TABLES[type(config)], config, (first, *blocks, last)))


def inputs(config: BertConfig, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the model takes: so many texts of the greatest length."""
    shape = (examples, config.length)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)
    types = {"types": ids} if config.type_vocab_size > 1 else {}
    return {"tokens": ids, "mask": jax.ShapeDtypeStruct(shape, bool), **types}


def _embedding(rows: int, width: int, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param(nnx.initializers.normal(_STD)(rngs.params(), (rows, width), jnp.float32))


def _rows(table: nnx.Param, ids: Int[Array, "#batch tokens"]) -> Float[Array, "#batch tokens width"]:
    """Rows of a table in float32; a row that is not there is NaN."""
    return jnp.take(table[...], ids, axis=0, mode="fill").astype(jnp.float32)
