"""T5 as stages, and as one NNX module (Raffel et al. 2020, https://arxiv.org/abs/1910.10683)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from tvjax.models.chunked_loss import token_scores
from tvjax.models.layer_table import describe
from tvjax.models.relative_positions import position_bias
from tvjax.models.t5.config import T5Config
from tvjax.models.t5.table import TABLE, UMT5_TABLE
from tvjax.models.transformer import ACTIVATIONS, RMSNorm, causal_mask, linear, parameters, stage_function
from tvjax.stages import Model, PyTree, Stage, Stream

_ENCODER, _DECODER = Stream(mask="mask"), Stream(mask="decoder_mask")
STREAMS = {"tokens": _ENCODER, "encoder_hidden": _ENCODER, "decoder_tokens": _DECODER, "decoder_hidden": _DECODER}
_REPLACED = ("encoder_hidden", "decoder_hidden", "mask", "decoder_mask")  # by the head
_LENGTH = 512  # of the texts that T5 was trained on; positions are relative, so it takes any


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The shape of one block; blocks of equal configs share one stage function. The names are `T5Config`'s."""

    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    dense_act_fn: str
    is_gated_act: bool
    layer_norm_epsilon: float


def block_config(config: T5Config) -> BlockConfig:
    """The shape of the blocks of a model."""
    return BlockConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(BlockConfig)})


class Attention(nnx.Module):
    """Multi-head attention without a scale of the scores, which the initial kernels have instead."""

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width, units = config.d_model, config.num_heads * config.d_kv
        self.query = linear(width, units, dtype, rngs, (width * config.d_kv) ** -0.5, use_bias=False)
        self.key, self.value = (linear(width, units, dtype, rngs, width**-0.5, use_bias=False) for _ in range(2))
        self.out = linear(units, width, dtype, rngs, units**-0.5, use_bias=False)
        self.size = config.d_kv

    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        read: Float[Array, "batch keys width"],
        mask: Bool[Array, "batch 1 #queries keys"],
        bias: Float[Array, "heads queries keys"] | None = None,
    ) -> Float[Array, "batch queries width"]:
        """Mixes what the tokens of `read` hold into those of `x`; `mask` is True where a query may see a key."""
        query, key, value = (
            layer(tokens).reshape(*tokens.shape[:-1], -1, self.size)
            for layer, tokens in ((self.query, x), (self.key, read), (self.value, read))
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        if bias is not None:
            scores = scores + bias.astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min)).astype(value.dtype)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape[:-1], -1))


class MLP(nnx.Module):
    """``down(activation(up(x)))``, or with a gate ``down(activation(gate(x)) * gated(x))``."""

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width, hidden = config.d_model, config.d_ff
        if config.is_gated_act:
            self.gate, self.gated = (linear(width, hidden, dtype, rngs, width**-0.5, use_bias=False) for _ in range(2))
        else:
            self.up = linear(width, hidden, dtype, rngs, width**-0.5, use_bias=False)
        self.down = linear(hidden, width, dtype, rngs, hidden**-0.5, use_bias=False)
        self.activation = ACTIVATIONS[config.dense_act_fn]
        self.has_gate = config.is_gated_act

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Maps each token by itself."""
        if self.has_gate:
            return self.down(self.activation(self.gate(x)) * self.gated(x))
        return self.down(self.activation(self.up(x)))


class EncoderBlock(nnx.Module):
    """A pre-norm block on ``encoder_hidden``, all of whose real tokens see each other.

    `own_bias` says whether the table of position biases is a parameter of the block; else it is given to each call.
    """

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, own_bias: bool = True, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (RMSNorm(config.d_model, config.layer_norm_epsilon, rngs=rngs) for _ in range(2))
        self.attention = Attention(config, dtype, rngs=rngs)
        self.mlp = MLP(config, dtype, rngs=rngs)
        if own_bias:
            self.position_bias = _bias_table(config, rngs)
        self.config = config

    def __call__(self, carry: dict[str, Array], table: Array | None = None) -> dict[str, Array]:
        """Adds attention, then the MLP, to the residual stream."""
        hidden = carry["encoder_hidden"]
        table = self.position_bias[...] if table is None else table
        bias = position_bias(table, hidden.shape[1], self.config.relative_attention_max_distance, True)
        normed = self.norm1(hidden)
        hidden = hidden + self.attention(normed, normed, carry["mask"][:, None, None], bias)
        hidden = hidden + self.mlp(self.norm2(hidden))
        return {**carry, "encoder_hidden": hidden}


class DecoderBlock(nnx.Module):
    """A pre-norm block on ``decoder_hidden``: a token sees those before it, and all of ``encoder_hidden``."""

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, own_bias: bool = True, *, rngs: nnx.Rngs):
        width, epsilon = config.d_model, config.layer_norm_epsilon
        self.norm1, self.cross_norm, self.norm2 = (RMSNorm(width, epsilon, rngs=rngs) for _ in range(3))
        self.attention, self.cross_attention = (Attention(config, dtype, rngs=rngs) for _ in range(2))
        self.mlp = MLP(config, dtype, rngs=rngs)
        if own_bias:
            self.position_bias = _bias_table(config, rngs)
        self.config = config

    def __call__(self, carry: dict[str, Array], table: Array | None = None) -> dict[str, Array]:
        """Adds both attentions, then the MLP, to the residual stream."""
        hidden = carry["decoder_hidden"]
        table = self.position_bias[...] if table is None else table
        bias = position_bias(table, hidden.shape[1], self.config.relative_attention_max_distance, False)
        normed = self.norm1(hidden)
        hidden = hidden + self.attention(normed, normed, causal_mask(carry["decoder_mask"]), bias)
        seen = carry["mask"][:, None, None]
        hidden = hidden + self.cross_attention(self.cross_norm(hidden), carry["encoder_hidden"], seen)
        hidden = hidden + self.mlp(self.norm2(hidden))
        return {**carry, "decoder_hidden": hidden}


class Embeddings(nnx.Module):
    """First stage: the tokens of both towers to their residual streams."""

    def __init__(self, config: T5Config, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.d_model)
        self.tokens = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), shape, jnp.float32))
        self.dtype = dtype

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``tokens`` and ``decoder_tokens``; a missing mask becomes one without padding."""
        carry = dict(carry)
        if "decoder_tokens" not in carry:
            raise ValueError(
                f"the inputs are {sorted(carry)}, expected 'decoder_tokens' among them: the tokens of the answer, "
                "moved by one place behind the start token, as tvjax.tasks.sequence_to_sequence makes them"
            )
        for before in ("", "decoder_"):
            tokens = carry.pop(f"{before}tokens")
            embedded = jnp.take(self.tokens[...], tokens, axis=0, mode="fill")  # outside the vocabulary is NaN
            carry[f"{before or 'encoder_'}hidden"] = embedded.astype(self.dtype)
            carry[f"{before}mask"] = carry.get(f"{before}mask", jnp.ones(tokens.shape, bool)).astype(bool)
        return carry


class EncoderNorm(nnx.Module):
    """The norm of what the encoder's last block returns."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.final_norm = RMSNorm(width, epsilon, rngs=rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``encoder_hidden``."""
        return {**carry, "encoder_hidden": self.final_norm(carry["encoder_hidden"])}


class Head(nnx.Module):
    """Last stage: ``decoder_hidden`` to what `token_scores` makes of it, by a kernel or by the token embeddings."""

    def __init__(self, config: T5Config, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, rngs=rngs)
        if config.tie_word_embeddings:
            self.tokens = nnx.Param(jnp.zeros((config.vocab_size, config.d_model), jnp.float32))
        else:
            self.head = _head(config, dtype, rngs)
        self.scale = _scale(config)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces the residual streams, their masks, and ``wanted``."""
        kernel = self.tokens[...].T if hasattr(self, "tokens") else self.head.kernel[...]
        return token_scores(carry, self.final_norm(carry["decoder_hidden"]) * self.scale, kernel, _REPLACED)


class Tower(nnx.Module):
    """The blocks of the encoder or the decoder, and the norm of what the last returns."""

    def __init__(self, config: T5Config, block: type[nnx.Module], depth: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        shape, own = block_config(config), config.bias_in_each_block
        self.blocks = nnx.List([block(shape, dtype, own, rngs=rngs) for _ in range(depth)])  # type: ignore[call-arg]
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon, rngs=rngs)
        if not own:
            self.position_bias = _bias_table(shape, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Runs the blocks, and leaves the norm to the caller."""
        table = self.position_bias[...] if hasattr(self, "position_bias") else None
        for block in self.blocks:
            carry = block(carry, table)
        return carry


class T5(nnx.Module):
    """T5 as one module; its parameters are those of the stages.

    >>> config = T5Config(16, 8, 4, 12, 2, 1, 2)
    >>> inputs = {"tokens": jnp.zeros((3, 5), int), "decoder_tokens": jnp.zeros((3, 2), int)}
    >>> T5(config, rngs=nnx.Rngs(0))(inputs)["logits"].shape
    (3, 2, 16)
    """

    def __init__(self, config: T5Config, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        self.embeddings = Embeddings(config, dtype, rngs=rngs)
        self.encoder = Tower(config, EncoderBlock, config.num_layers, dtype, rngs=rngs)
        self.decoder = Tower(config, DecoderBlock, config.num_decoder_layers, dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            self.head = _head(config, dtype, rngs)
        self.scale = _scale(config)

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Takes and returns what the stages of `t5` do."""
        carry = self.encoder(self.embeddings(inputs))
        carry["encoder_hidden"] = self.encoder.final_norm(carry["encoder_hidden"])
        carry = self.decoder(carry)
        kernel = self.head.kernel[...] if hasattr(self, "head") else self.embeddings.tokens[...].T
        return token_scores(carry, self.decoder.final_norm(carry["decoder_hidden"]) * self.scale, kernel, _REPLACED)


def init(config: T5Config, key: Array) -> PyTree:
    """Random float32 parameters.

    Args:
      config: shape of the model.
      key: a random key.

    Returns:
      Nested dicts with string keys.
    """
    return parameters(T5(config, rngs=nnx.Rngs(key)))


def t5(config: T5Config, params: PyTree, dtype: DTypeLike = jnp.float32) -> Model:
    """The stages of a T5 and its parameters.

    The inputs are ``{"tokens": [texts, length], "mask": [texts, length], "decoder_tokens": [texts, answer],
    "decoder_mask": [texts, answer]}``; a missing mask means no padding. The outputs are ``{"logits": [texts, answer,
    vocabulary]}``, float32: of the token of the answer that follows each. Where the inputs also name the tokens that
    are ``wanted`` there, ``[texts, answer]``, the outputs are ``losses``, ``predicted`` and ``finite`` in the place of
    the logits, which are never held as a whole (`tvjax.models.chunked_loss`).

    Args:
      config: shape of the model.
      params: parameters as nested dicts, in any floating dtype.
      dtype: dtype that activations are computed in.

    Returns:
      The model.

    >>> config = T5Config(16, 8, 4, 12, 2, 1, 2)
    >>> model = t5(config, init(config, jax.random.key(0)))
    >>> [stage.name for stage in model.stages]
    ['embeddings', 'encoder/blocks/0', 'encoder/blocks/1', 'encoder/final_norm', 'decoder/blocks/0', 'head']
    >>> model({"tokens": jnp.zeros((3, 5), int), "decoder_tokens": jnp.zeros((3, 2), int)})["logits"].shape
    (3, 2, 16)
    """
    dtype = jnp.dtype(dtype)
    norm = stage_function(EncoderNorm, config.d_model, config.layer_norm_epsilon)
    head = ("tokens", "embeddings/tokens") if config.tie_word_embeddings else ("head", "head")
    final = (("final_norm", "decoder/final_norm"), head)
    stages = [
        Stage("embeddings", stage_function(Embeddings, config, dtype), (("", "embeddings"),), streams=STREAMS),
        *_blocks("encoder", EncoderBlock, config, config.num_layers, dtype),
        Stage("encoder/final_norm", norm, (("final_norm", "encoder/final_norm"),), streams=STREAMS),
        *_blocks("decoder", DecoderBlock, config, config.num_decoder_layers, dtype),
        Stage("head", stage_function(Head, config, dtype), final, streams=STREAMS),
    ]
    return Model(params, describe(UMT5_TABLE if config.bias_in_each_block else TABLE, config, stages))


def inputs(config: T5Config, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the model takes: so many texts and answers of the length that T5 was trained on."""
    shape = (examples, _LENGTH)
    tokens, mask = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
    return {"tokens": tokens, "mask": mask, "decoder_tokens": tokens, "decoder_mask": mask}


def _blocks(tower: str, block: type[nnx.Module], config: T5Config, depth: int, dtype: jnp.dtype) -> list[Stage]:
    """The stages of a tower, which share one function; the table of position biases is each one's own, or the tower's.

    A table that all blocks read is a tied leaf, owned by the first.
    """
    function, group = stage_function(block, block_config(config), dtype), f"{tower}/blocks"
    own = [part for part in function.parameters if part != "position_bias" or config.bias_in_each_block]
    shared = () if config.bias_in_each_block else (("position_bias", f"{tower}/position_bias"),)
    return [
        Stage(f"{group}/{i}", function, (*((part, f"{group}/{i}/{part}") for part in own), *shared), group, STREAMS)
        for i in range(depth)
    ]


def _bias_table(config: BlockConfig, rngs: nnx.Rngs) -> nnx.Param:
    shape = (config.relative_attention_num_buckets, config.num_heads)
    return nnx.Param(nnx.initializers.normal(config.d_model**-0.5)(rngs.params(), shape, jnp.float32))


def _head(config: T5Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(config.d_model, config.vocab_size, dtype, rngs, config.d_model**-0.5, use_bias=False)


def _scale(config: T5Config) -> float:
    return config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
