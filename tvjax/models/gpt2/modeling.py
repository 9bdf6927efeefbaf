"""GPT-2 as stages, and as one NNX module (Radford et al. 2019, Language Models are Unsupervised Multitask Learners)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from tvjax.models.chunked_loss import token_scores
from tvjax.models.gpt2.config import GPT2Config
from tvjax.models.gpt2.table import TABLE
from tvjax.models.layer_table import describe
from tvjax.models.transformer import Block, LayerNorm, linear, parameters, stage_function
from tvjax.stages import Model, PyTree, Stage, Stream

_STD = 0.02  # of every initial table


class Embeddings(nnx.Module):
    """First stage: ``tokens``, and where there are such ``positions``, to ``hidden``."""

    def __init__(self, config: GPT2Config, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        normal, width = nnx.initializers.normal(_STD), config.hidden_size
        self.tokens = nnx.Param(normal(rngs.params(), (config.vocab_size, width), jnp.float32))
        self.positions = nnx.Param(normal(rngs.params(), (config.max_position_embeddings, width), jnp.float32))
        self.dtype = dtype

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``tokens`` and ``positions``; a missing ``mask`` becomes one without padding."""
        carry = dict(carry)
        tokens = carry.pop("tokens")
        length, longest = tokens.shape[1], self.positions.shape[0]
        if length > longest:
            raise ValueError(f"texts of {length} tokens, at most {longest} have positions: truncate them")
        positions = carry.pop("positions", jnp.arange(length)[None])
        # A token outside the vocabulary, or a position outside the table, is NaN.
        embedded, placed = (
            jnp.take(table[...], rows, axis=0, mode="fill").astype(self.dtype)
            for table, rows in ((self.tokens, tokens), (self.positions, positions))
        )
        mask = carry.get("mask", jnp.ones(tokens.shape, bool)).astype(bool)
        return {**carry, "hidden": embedded + placed, "mask": mask}


class Head(nnx.Module):
    """Last stage: ``hidden`` to what `token_scores` makes of it, by a kernel of its own or the embeddings."""

    def __init__(self, config: GPT2Config, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        if config.tie_word_embeddings:
            self.tokens = nnx.Param(jnp.zeros((config.vocab_size, config.hidden_size), jnp.float32))
        else:
            self.head = _head(config, dtype, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden``, ``mask`` and ``wanted``."""
        kernel = self.tokens[...].T if hasattr(self, "tokens") else self.head.kernel[...]
        return token_scores(carry, self.final_norm(carry["hidden"]), kernel, ("hidden", "mask"))


class GPT2(nnx.Module):
    """GPT-2 as one module; its parameters are those of the stages.

    >>> config = GPT2Config(16, 8, 12, 2, 2, max_position_embeddings=6)
    >>> GPT2(config, rngs=nnx.Rngs(0))({"tokens": jnp.zeros((3, 5), int)})["logits"].shape
    (3, 5, 16)
    """

    def __init__(self, config: GPT2Config, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        dtype, depth = jnp.dtype(dtype), config.num_hidden_layers
        self.embeddings = Embeddings(config, dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config.block, dtype, depth, rngs=rngs) for _ in range(depth)])
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        if not config.tie_word_embeddings:
            self.head = _head(config, dtype, rngs)

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Takes and returns what the stages of `gpt2` do."""
        carry = self.embeddings(inputs)
        for block in self.blocks:
            carry = block(carry)
        kernel = self.head.kernel[...] if hasattr(self, "head") else self.embeddings.tokens[...].T
        return token_scores(carry, self.final_norm(carry["hidden"]), kernel, ("hidden", "mask"))


def init(config: GPT2Config, key: Array) -> PyTree:
    """Random float32 parameters.

    Args:
      config: shape of the model.
      key: a random key.

    Returns:
      Nested dicts with string keys.
    """
    return parameters(GPT2(config, rngs=nnx.Rngs(key)))


def gpt2(config: GPT2Config, params: PyTree, dtype: DTypeLike = jnp.float32) -> Model:
    """The stages of a GPT-2 and its parameters.

    The inputs are ``{"tokens": [texts, length], "mask": [texts, length], "positions": [texts, length]}``; a missing
    mask means no padding, missing positions 0, 1, 2, ... The outputs are ``{"logits": [texts, length, vocabulary]}``,
    float32: of the token that follows each. Where the inputs also name the tokens that are ``wanted`` there, ``[texts,
    length]``, the outputs are ``losses``, ``predicted`` and ``finite`` in the place of the logits, which are never held
    as a whole (`tvjax.models.chunked_loss`).

    Args:
      config: shape of the model.
      params: parameters as nested dicts, in any floating dtype.
      dtype: dtype that activations are computed in.

    Returns:
      The model.

    >>> config = GPT2Config(16, 8, 12, 2, 2, max_position_embeddings=6)
    >>> model = gpt2(config, init(config, jax.random.key(0)))
    >>> [stage.name for stage in model.stages]
    ['embeddings', 'blocks/0', 'blocks/1', 'head']
    >>> model({"tokens": jnp.zeros((3, 5), int)})["logits"].shape
    (3, 5, 16)
    """
    dtype, stream = jnp.dtype(dtype), Stream(mask="mask")
    head = ("tokens", "embeddings/tokens") if config.tie_word_embeddings else ("head", "head")
    block = stage_function(Block, config.block, dtype)
    names = [f"blocks/{i}" for i in range(config.num_hidden_layers)]
    stages = [
        Stage("embeddings", stage_function(Embeddings, config, dtype), (("", "embeddings"),), streams=stream),
        *(Stage(name, block, (("", name),), group="blocks", streams=stream) for name in names),
        Stage("head", stage_function(Head, config, dtype), (("final_norm", "final_norm"), head), streams=stream),
    ]
    return Model(params, describe(TABLE, config, stages))


def inputs(config: GPT2Config, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the model takes: so many texts of the greatest length."""
    shape = (examples, config.max_position_embeddings)
    return {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32), "mask": jax.ShapeDtypeStruct(shape, bool)}


def _head(config: GPT2Config, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(config.hidden_size, config.vocab_size, dtype, rngs, _STD, use_bias=False)
