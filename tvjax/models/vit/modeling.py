"""The ViT classifier as stages, and as one NNX module (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tvjax.models.layer_table import describe
from tvjax.models.transformer import (
    Block,
    LayerNorm,
    PatchEmbeddings,
    block_stages,
    linear,
    parameters,
    stage_function,
)
from tvjax.models.vit.config import ViTConfig
from tvjax.models.vit.table import TABLE
from tvjax.stages import Model, PyTree, Stage, Stream


class Embeddings(nnx.Module):
    """First stage: ``pixels`` to ``hidden``."""

    def __init__(self, config: ViTConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.embeddings = _patch_embeddings(config, dtype, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``pixels``."""
        carry = dict(carry)
        carry["hidden"] = self.embeddings(carry.pop("pixels"))
        return carry


class Head(nnx.Module):
    """Last stage: ``hidden`` to ``logits``."""

    def __init__(self, config: ViTConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.post_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.head = linear(config.hidden_size, config.num_labels, dtype, rngs, 0.02)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden``."""
        carry = dict(carry)
        carry["logits"] = self.head(self.post_norm(carry.pop("hidden")[:, 0])).astype(jnp.float32)
        return carry


class Tower(nnx.Module):
    """Pixels to the class token after the last norm."""

    def __init__(self, config: ViTConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        depth = config.num_hidden_layers
        self.embeddings = _patch_embeddings(config, dtype, rngs)
        self.blocks = nnx.List([Block(config.block, dtype, depth, rngs=rngs) for _ in range(depth)])
        self.post_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(self, pixels: Float[Array, "batch height width 3"]) -> Float[Array, "batch features"]:
        """Features of images."""
        carry = {"hidden": self.embeddings(pixels)}
        for block in self.blocks:
            carry = block(carry)
        return self.post_norm(carry["hidden"][:, 0])


class ViT(nnx.Module):
    """The ViT classifier as one module; its parameters are those of the stages.

    >>> module = ViT(ViTConfig(8, 16, 2, 2, image_size=8, patch_size=4, num_labels=5), rngs=nnx.Rngs(0))
    >>> module({"pixels": jnp.zeros((3, 8, 8, 3))})["logits"].shape
    (3, 5)
    """

    def __init__(self, config: ViTConfig, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        self.vision = Tower(config, dtype, rngs=rngs)
        self.head = linear(config.hidden_size, config.num_labels, dtype, rngs, 0.02)

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Takes and returns what the stages of `vit` do."""
        return {"logits": self.head(self.vision(inputs["pixels"])).astype(jnp.float32)}


def init(config: ViTConfig, key: Array) -> PyTree:
    """Random float32 parameters.

    Args:
      config: shape of the model.
      key: a random key.

    Returns:
      Nested dicts with string keys.
    """
    return parameters(ViT(config, rngs=nnx.Rngs(key)))


def vit(config: ViTConfig, params: PyTree, dtype: DTypeLike = jnp.float32) -> Model:
    """The stages of a ViT classifier and its parameters.

    The inputs are ``{"pixels": [images, height, width, 3]}``, the outputs ``{"logits": [images, classes]}``, float32.

    Args:
      config: shape of the model.
      params: parameters as nested dicts, in any floating dtype.
      dtype: dtype that activations are computed in.

    Returns:
      The model.

    >>> config = ViTConfig(8, 16, 2, 2, image_size=8, patch_size=4, num_labels=5)
    >>> model = vit(config, init(config, jax.random.key(0)))
    >>> model({"pixels": jnp.zeros((3, 8, 8, 3))})["logits"].shape
    (3, 5)
    """
    dtype = jnp.dtype(dtype)
    stream = Stream(special=1, grid=config.grid)
    first = Stage(
        "vision/embeddings",
        stage_function(Embeddings, config, dtype),
        (("embeddings", "vision/embeddings"),),
        streams=stream,
    )
    last = Stage(
        "head",
        stage_function(Head, config, dtype),
        (("post_norm", "vision/post_norm"), ("head", "head")),
    )
    blocks = block_stages("vision", config.block, config.num_hidden_layers, dtype, stream)
    return Model(params, describe(TABLE, config, (first, *blocks, last)))


def inputs(config: ViTConfig, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the model takes: so many images."""
    return {"pixels": jax.ShapeDtypeStruct((examples, config.image_size, config.image_size, 3), jnp.float32)}


def _patch_embeddings(config: ViTConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> PatchEmbeddings:
    return PatchEmbeddings(config.hidden_size, config.image_size, config.patch_size, True, dtype, rngs=rngs)
