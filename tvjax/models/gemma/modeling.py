"""Gemma 2 and 3 as stages, and as one NNX module (Gemma team 2024, https://arxiv.org/abs/2408.00118; 2025, 2503.19786).

A Llama whose norms multiply by ``1 + scale`` and stand behind attention and MLPs too, whose embeddings are multiplied
by the square root of the width, and whose scores may be capped.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tvjax.models.chunked_loss import capped, token_scores
from tvjax.models.gemma.config import GemmaConfig
from tvjax.models.gemma.table import TABLE
from tvjax.models.layer_table import describe
from tvjax.models.llama import modeling as llama
from tvjax.models.llama.rope import Rope
from tvjax.models.transformer import linear, parameters, stage_function
from tvjax.stages import Model, PyTree, Stage, Stream

_STD = 0.02  # of every initial kernel
_REPLACED = ("hidden", "mask", "positions")  # by the head


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + epsilon) * (1 + scale)``, in float32 whatever the dtype of what it normalises."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises each token by itself."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class BlockConfig(llama.BlockConfig):
    """The shape of one block; blocks of equal configs share one stage function."""

    query_pre_attn_scalar: int = 256
    attn_logit_softcapping: float | None = None


def block_config(config: GemmaConfig, block: int) -> BlockConfig:
    """The shape of a block of a model."""
    rope: Rope = config.rope_of(block)
    return BlockConfig(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_activation,
        config.rms_norm_eps,
        attention_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=False,
        qk_norm=config.qk_norm,
        rope=rope,
        longest=rope.longest(config.max_position_embeddings),
        window=config.window(block),
        query_pre_attn_scalar=config.query_pre_attn_scalar,
        attn_logit_softcapping=config.attn_logit_softcapping,
    )


class Attention(llama.Attention):
    """A Llama's attention, its scores of another scale and capped."""

    norm = RMSNorm
    config: BlockConfig

    def scaled(self, products: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """What the products of queries and keys are to the softmax."""
        return capped(products * self.config.query_pre_attn_scalar**-0.5, self.config.attn_logit_softcapping)


class Block(nnx.Module):
    """A block on ``carry["hidden"]`` with norms around attention and MLP; reads ``mask`` and ``positions``."""

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.norm1, self.attention_norm, self.norm2, self.mlp_norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs) for _ in range(4)
        )
        self.attention = Attention(config, dtype, rngs=rngs)
        self.mlp = llama.MLP(config, dtype, rngs=rngs)
        self.config = config

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Adds what attention, then the MLP, makes to the residual stream."""
        hidden = carry["hidden"]
        hidden = hidden + self.attention_norm(self.attention(self.norm1(hidden), *llama.seen(carry, self.config)))
        hidden = hidden + self.mlp_norm(self.mlp(self.norm2(hidden)))
        return {**carry, "hidden": hidden}


class Embeddings(llama.Embeddings):
    """First stage: ``tokens`` to ``hidden``."""

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``tokens``; a missing ``mask`` becomes one without padding."""
        carry = super().__call__(carry)
        width = carry["hidden"].shape[-1]
        return {**carry, "hidden": carry["hidden"] * jnp.asarray(width**0.5, self.dtype)}


class Head(nnx.Module):
    """Last stage: ``hidden`` to what `token_scores` makes of it, by a kernel of its own or by the token embeddings."""

    def __init__(self, config: GemmaConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        if config.tie_word_embeddings:
            self.tokens = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), jnp.float32))
        else:
            self.head = _head(config, dtype, rngs)
        self.cap = config.final_logit_softcapping

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden``, ``mask``, ``positions`` and ``wanted``."""
        kernel = self.tokens[...].T if hasattr(self, "tokens") else self.head.kernel[...]
        return token_scores(carry, self.final_norm(carry["hidden"]), kernel, _REPLACED, self.cap)


class Gemma(nnx.Module):
    """Gemma as one module; its parameters are those of the stages.

    >>> config = GemmaConfig(16, 8, 12, 2, 2, 1, head_dim=4, layer_types=("sliding_attention", "full_attention"))
    >>> Gemma(config, rngs=nnx.Rngs(0))({"tokens": jnp.zeros((3, 5), int)})["logits"].shape
    (3, 5, 16)
    """

    def __init__(self, config: GemmaConfig, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        dtype, depth = jnp.dtype(dtype), config.num_hidden_layers
        self.embeddings = Embeddings(config, dtype, rngs=rngs)  # type: ignore[arg-type]  # it reads the same fields
        self.blocks = nnx.List([Block(block_config(config, i), dtype, rngs=rngs) for i in range(depth)])
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        if not config.tie_word_embeddings:
            self.head = _head(config, dtype, rngs)
        self.cap = config.final_logit_softcapping

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Takes and returns what the stages of `gemma` do."""
        carry = self.embeddings(inputs)
        for block in self.blocks:
            carry = block(carry)
        kernel = self.head.kernel[...] if hasattr(self, "head") else self.embeddings.tokens[...].T
        return token_scores(carry, self.final_norm(carry["hidden"]), kernel, _REPLACED, self.cap)


def init(config: GemmaConfig, key: Array) -> PyTree:
    """Random float32 parameters.

    Args:
      config: shape of the model.
      key: a random key.

    Returns:
      Nested dicts with string keys.
    """
    return parameters(Gemma(config, rngs=nnx.Rngs(key)))


def gemma(config: GemmaConfig, params: PyTree, dtype: DTypeLike = jnp.float32) -> Model:
    """The stages of a Gemma and its parameters; inputs and outputs are those of `tvjax.models.llama.llama`.

    Args:
      config: shape of the model.
      params: parameters as nested dicts, in any floating dtype.
      dtype: dtype that activations are computed in.

    Returns:
      The model.

    >>> config = GemmaConfig(16, 8, 12, 2, 2, 1, head_dim=4, layer_types=("sliding_attention", "full_attention"))
    >>> model = gemma(config, init(config, jax.random.key(0)))
    >>> [stage.name for stage in model.stages]
    ['embeddings', 'blocks/0', 'blocks/1', 'head']
    """
    dtype, stream = jnp.dtype(dtype), Stream(mask="mask")
    head = ("tokens", "embeddings/tokens") if config.tie_word_embeddings else ("head", "head")
    final = (("final_norm", "final_norm"), head)
    blocks = [
        Stage(
            f"blocks/{i}",
            stage_function(Block, block_config(config, i), dtype),
            (("", f"blocks/{i}"),),
            group="blocks",
            streams=stream,
        )
        for i in range(config.num_hidden_layers)
    ]
    stages = [
        Stage("embeddings", stage_function(Embeddings, config, dtype), (("", "embeddings"),), streams=stream),
        *blocks,
        Stage("head", stage_function(Head, config, dtype), final, streams=stream),
    ]
    return Model(params, describe(TABLE, config, stages))


def _head(config: GemmaConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(config.hidden_size, config.vocab_size, dtype, rngs, _STD, use_bias=False)
