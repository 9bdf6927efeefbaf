"""Llama as stages, and as one NNX module (Touvron et al. 2023, https://arxiv.org/abs/2302.13971)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tvjax.models.chunked_loss import token_scores
from tvjax.models.layer_table import describe
from tvjax.models.llama.config import LlamaConfig
from tvjax.models.llama.rope import Rope
from tvjax.models.llama.table import TABLE
from tvjax.models.transformer import ACTIVATIONS, RMSNorm, causal_mask, linear, parameters, stage_function
from tvjax.stages import Model, PyTree, Stage, Stream

_STD = 0.02  # of every initial kernel
_REPLACED = ("hidden", "mask", "positions")  # by the head


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The shape of one block; blocks of equal configs share one stage function. The names are `LlamaConfig`'s."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: Rope
    longest: int | None
    window: int | None


def block_config(config: LlamaConfig, block: int) -> BlockConfig:
    """The shape of a block of a model."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(BlockConfig)[:-1]}
    return BlockConfig(**shared, window=config.window(block))


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, each head of the keys and values shared by some of the queries."""

    norm: type[nnx.Module] = RMSNorm  # of queries and keys

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.query, self.key, self.value = (
            linear(width, units, dtype, rngs, _STD, config.attention_bias) for units in (queries, shared, shared)
        )
        self.out = linear(queries, width, dtype, rngs, _STD, config.output_bias)
        if config.qk_norm:
            self.query_norm = self.norm(config.head_dim, config.rms_norm_eps, rngs=rngs)  # type: ignore[call-arg]
            self.key_norm = self.norm(config.head_dim, config.rms_norm_eps, rngs=rngs)  # type: ignore[call-arg]
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Bool[Array, "batch 1 tokens tokens"],
        positions: Int[Array, "#batch tokens"],
    ) -> Float[Array, "batch tokens width"]:
        """Mixes the tokens; `mask` is True where a query (second last axis) may see a key."""
        size, heads = self.config.head_dim, self.config.num_key_value_heads
        query, key, value = (layer(x).reshape(*x.shape[:-1], -1, size) for layer in (self.query, self.key, self.value))
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        angles = rotary_angles(positions, size, self.config.rope)
        if self.config.longest is not None:  # a position that has no frequencies is NaN
            angles = jnp.where(positions[..., None] < self.config.longest, angles, jnp.nan)
        query, key = (rotate(units, angles, self.config.rope.scale) for units in (query, key))
        query = query.reshape(*x.shape[:-1], heads, -1, size)  # query head h g + j reads key head h
        scores = self.scaled(jnp.einsum("bqhgd,bkhd->bhgqk", query, key, preferred_element_type=jnp.float32))
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(value.dtype)
        return self.out(jnp.einsum("bhgqk,bkhd->bqhgd", weights, value).reshape(*x.shape[:-1], -1))

    def scaled(self, products: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """What the products of queries and keys are to the softmax."""
        return products * self.config.head_dim**-0.5


class MLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))``."""

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate, self.up = (linear(width, hidden, dtype, rngs, _STD, config.mlp_bias) for _ in range(2))
        self.down = linear(hidden, width, dtype, rngs, _STD, config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Maps each token by itself."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """A pre-norm block on ``carry["hidden"]``, which reads ``mask`` and, where there are such, ``positions``."""

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs) for _ in range(2))
        self.attention = Attention(config, dtype, rngs=rngs)
        self.mlp = MLP(config, dtype, rngs=rngs)
        self.config = config

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Adds attention, then the MLP, to the residual stream."""
        hidden = carry["hidden"]
        hidden = hidden + self.attention(self.norm1(hidden), *seen(carry, self.config))
        hidden = hidden + self.mlp(self.norm2(hidden))
        return {**carry, "hidden": hidden}


def seen(
    carry: dict[str, Array], config: BlockConfig
) -> tuple[Bool[Array, "batch 1 tokens tokens"], Int[Array, "#batch tokens"]]:
    """Which keys each query of a block may see, and the positions of the tokens.

    Raises:
      ValueError: for longer texts than the rotary positions are computed for.
    """
    mask = causal_mask(carry["mask"])
    tokens, longest = jnp.arange(mask.shape[-1]), config.longest
    if longest is not None and len(tokens) > longest:
        raise ValueError(
            f"texts of {len(tokens)} tokens, expected at most {longest}: above it rope_type {config.rope.kind!r} has "
            "frequencies that depend on the batch, which is not supported: cut the texts"
        )
    if config.window is not None:
        mask = mask & (tokens[:, None] - tokens[None, :] < config.window)
    return mask, carry.get("positions", tokens[None])


class Embeddings(nnx.Module):
    """First stage: ``tokens`` to ``hidden``."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.tokens = nnx.Param(nnx.initializers.normal(_STD)(rngs.params(), shape, jnp.float32))
        self.dtype = dtype

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``tokens``; a missing ``mask`` becomes one without padding."""
        carry = dict(carry)
        tokens = carry.pop("tokens")
        embedded = jnp.take(self.tokens[...], tokens, axis=0, mode="fill")  # a token outside the vocabulary is NaN
        mask = carry.get("mask", jnp.ones(tokens.shape, bool)).astype(bool)
        return {**carry, "hidden": embedded.astype(self.dtype), "mask": mask}


class Head(nnx.Module):
    """Last stage: ``hidden`` to what `token_scores` makes of it, by a kernel of its own or by the token embeddings."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        if config.tie_word_embeddings:
            self.tokens = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), jnp.float32))
        else:
            self.head = _head(config, dtype, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden``, ``mask``, ``positions`` and ``wanted``."""
        kernel = self.tokens[...].T if hasattr(self, "tokens") else self.head.kernel[...]
        return token_scores(carry, self.final_norm(carry["hidden"]), kernel, _REPLACED)


class Llama(nnx.Module):
    """Llama as one module; its parameters are those of the stages.

    >>> config = LlamaConfig(16, 8, 12, 2, 2, 1, head_dim=4)
    >>> Llama(config, rngs=nnx.Rngs(0))({"tokens": jnp.zeros((3, 5), int)})["logits"].shape
    (3, 5, 16)
    """

    def __init__(self, config: LlamaConfig, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        dtype, depth = jnp.dtype(dtype), config.num_hidden_layers
        self.embeddings = Embeddings(config, dtype, rngs=rngs)
        self.blocks = nnx.List([Block(block_config(config, i), dtype, rngs=rngs) for i in range(depth)])
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        if not config.tie_word_embeddings:
            self.head = _head(config, dtype, rngs)

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Takes and returns what the stages of `llama` do."""
        carry = self.embeddings(inputs)
        for block in self.blocks:
            carry = block(carry)
        kernel = self.head.kernel[...] if hasattr(self, "head") else self.embeddings.tokens[...].T
        return token_scores(carry, self.final_norm(carry["hidden"]), kernel, _REPLACED)


def init(config: LlamaConfig, key: Array) -> PyTree:
    """Random float32 parameters.

    Args:
      config: shape of the model.
      key: a random key.

    Returns:
      Nested dicts with string keys.
    """
    return parameters(Llama(config, rngs=nnx.Rngs(key)))


def llama(config: LlamaConfig, params: PyTree, dtype: DTypeLike = jnp.float32) -> Model:
    """The stages of a Llama and its parameters.

    The inputs are ``{"tokens": [texts, length], "mask": [texts, length], "positions": [texts, length]}``; a missing
    mask means no padding, missing positions 0, 1, 2, ... The outputs are ``{"logits": [texts, length, vocabulary]}``,
    float32: of the token that follows each. Where the inputs also name the tokens that are ``wanted``
    there, ``[texts, length]``, the outputs are ``losses``, ``predicted`` and ``finite`` in the place of the logits,
    which are never held as a whole (`tvjax.models.chunked_loss`).

    Args:
      config: shape of the model.
      params: parameters as nested dicts, in any floating dtype.
      dtype: dtype that activations are computed in.

    Returns:
      The model.

    >>> config = LlamaConfig(16, 8, 12, 2, 2, 1, head_dim=4)
    >>> model = llama(config, init(config, jax.random.key(0)))
    >>> [stage.name for stage in model.stages]
    ['embeddings', 'blocks/0', 'blocks/1', 'head']
    >>> model({"tokens": jnp.zeros((3, 5), int)})["logits"].shape
    (3, 5, 16)
    """
    dtype, stream = jnp.dtype(dtype), Stream(mask="mask")
    head = ("tokens", "embeddings/tokens") if config.tie_word_embeddings else ("head", "head")
    stages = [
        Stage("embeddings", stage_function(Embeddings, config, dtype), (("", "embeddings"),), streams=stream),
        *(
            Stage(
                f"blocks/{i}",
                stage_function(Block, block_config(config, i), dtype),
                (("", f"blocks/{i}"),),
                group="blocks",
                streams=stream,
            )
            for i in range(config.num_hidden_layers)
        ),
        Stage("head", stage_function(Head, config, dtype), (("final_norm", "final_norm"), head), streams=stream),
    ]
    return Model(params, describe(TABLE, config, stages))


def inputs(config: LlamaConfig, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the model takes: so many texts of the greatest length."""
    shape = (examples, min(config.max_position_embeddings, config.longest or config.max_position_embeddings))
    return {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), "mask": jax.ShapeDtypeStruct(shape, bool)}


def rotary_angles(positions: Int[Array, "#batch tokens"], size: int, rope: Rope) -> Float[Array, "#batch tokens half"]:
    """The angle by which each pair of units of a head of `size` units is rotated at each position."""
    return positions[..., None].astype(jnp.float32) * rope.frequencies(size)


def rotate(
    x: Float[Array, "batch tokens heads size"], angles: Float[Array, "#batch tokens half"], scale: float = 1.0
) -> Float[Array, "batch tokens heads size"]:
    """Rotates the pairs of units (j, j + size / 2) of each head, and multiplies them by `scale`.

    >>> rotate(jnp.array([[[[1.0, 0.0]]]]), jnp.array([[[jnp.pi / 2]]])).round(3).tolist()
    [[[[-0.0, 1.0]]]]
    """
    cosine, sine = ((f(angles) * scale)[:, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def _head(config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(config.hidden_size, config.vocab_size, dtype, rngs, _STD, use_bias=False)
