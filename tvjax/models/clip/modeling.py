"""CLIP as stages, and as one NNX module (Radford et al. 2021, https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tvjax.models.clip.config import LEGACY_END_TOKEN, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.clip.table import TABLE
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
from tvjax.stages import Model, PyTree, Stage, Stream, tower


class TokenEmbeddings(nnx.Module):
    """Token embeddings with learned positions."""

    def __init__(self, vocabulary: int, longest: int, width: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.tokens = nnx.Param(normal(rngs.params(), (vocabulary, width), jnp.float32))
        self.positions = nnx.Param(normal(rngs.params(), (longest, width), jnp.float32))
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Embeds token ids."""
        length, longest = tokens.shape[1], self.positions.shape[0]
        if length > longest:
            raise ValueError(f"texts of {length} tokens, at most {longest} have positions: truncate them")
        embedded = jnp.take(self.tokens[...], tokens, axis=0, mode="fill")  # a token outside the vocabulary is NaN
        return embedded.astype(self.dtype) + self.positions[:length].astype(self.dtype)


class VisionEmbeddings(nnx.Module):
    """First vision stage: ``pixels`` to ``hidden``."""

    def __init__(self, config: CLIPVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.embeddings = PatchEmbeddings(width, config.image_size, config.patch_size, False, dtype, rngs=rngs)
        self.pre_norm = LayerNorm(width, config.layer_norm_eps, rngs=rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``pixels``."""
        carry = dict(carry)
        carry["hidden"] = self.pre_norm(self.embeddings(carry.pop("pixels")))
        return carry


class VisionHead(nnx.Module):
    """Last vision stage: ``hidden`` to ``image``."""

    def __init__(self, config: CLIPVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.post_norm = LayerNorm(width, config.layer_norm_eps, rngs=rngs)
        self.projection = _projection(config, dtype, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden``."""
        carry = dict(carry)
        carry["image"] = _project(self.projection, self.post_norm(carry.pop("hidden")[:, 0]))
        return carry


class TextEmbeddings(nnx.Module):
    """First text stage: ``tokens`` to ``hidden``, and ``end``, the position at which the text's embedding is read."""

    def __init__(self, config: CLIPTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.embeddings = _token_embeddings(config, dtype, rngs)
        self.eos_token_id = config.eos_token_id

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``tokens``; a missing ``mask`` becomes one without padding."""
        carry = dict(carry)
        tokens = carry.pop("tokens")
        mask = carry.get("mask", jnp.ones(tokens.shape, bool)).astype(bool)
        end = end_position(tokens, self.eos_token_id)
        return {**carry, "hidden": self.embeddings(tokens), "mask": mask, "end": end}


class TextHead(nnx.Module):
    """Last text stage: ``hidden`` to ``text``."""

    def __init__(self, config: CLIPTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.projection = _projection(config, dtype, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden``, ``end`` and ``mask``."""
        carry = dict(carry)
        hidden, end, _ = carry.pop("hidden"), carry.pop("end"), carry.pop("mask")
        last = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
        return {**carry, "text": _project(self.projection, self.final_norm(last))}


class Logits(nnx.Module):
    """Last stage of a CLIP with both towers: adds ``logits_per_image``."""

    def __init__(self, logit_scale_init_value: float = CLIPConfig.logit_scale_init_value, *, rngs: nnx.Rngs):
        self.logit_scale = nnx.Param(jnp.float32(logit_scale_init_value))

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Keeps ``image`` and ``text``."""
        return {**carry, "logits_per_image": similarities(self.logit_scale[...], carry)}


class VisionTower(nnx.Module):
    """Pixels to image embeddings."""

    def __init__(self, config: CLIPVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.embeddings = PatchEmbeddings(
            config.hidden_size, config.image_size, config.patch_size, False, dtype, rngs=rngs
        )
        self.pre_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.blocks = _blocks(config, dtype, rngs)
        self.post_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.projection = _projection(config, dtype, rngs)

    def __call__(self, pixels: Float[Array, "batch height width 3"]) -> Float[Array, "batch embedding"]:
        """Embeds images, not normalised."""
        carry = {"hidden": self.pre_norm(self.embeddings(pixels))}
        for block in self.blocks:
            carry = block(carry)
        return _project(self.projection, self.post_norm(carry["hidden"][:, 0]))


class TextTower(nnx.Module):
    """Tokens to text embeddings."""

    def __init__(self, config: CLIPTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.embeddings = _token_embeddings(config, dtype, rngs)
        self.blocks = _blocks(config, dtype, rngs)
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.projection = _projection(config, dtype, rngs)
        self.eos_token_id = config.eos_token_id

    def __call__(
        self, tokens: Int[Array, "batch tokens"], mask: Bool[Array, "batch tokens"] | None = None
    ) -> Float[Array, "batch embedding"]:
        """Embeds texts, not normalised."""
        carry = {"hidden": self.embeddings(tokens), "mask": jnp.ones(tokens.shape, bool) if mask is None else mask}
        for block in self.blocks:
            carry = block(carry)
        end = end_position(tokens, self.eos_token_id)
        last = jnp.take_along_axis(carry["hidden"], end[:, None, None], axis=1)[:, 0]
        return _project(self.projection, self.final_norm(last))


class CLIP(nnx.Module):
    """CLIP as one module, for training loops and others that want one; its parameters are those of the stages.

    >>> config = CLIPConfig(
    ...     CLIPVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4, projection_dim=4),
    ...     CLIPTextConfig(16, 8, 16, 2, 2, max_position_embeddings=6, eos_token_id=15, projection_dim=4),
    ... )
    >>> module = CLIP(config, rngs=nnx.Rngs(0))
    >>> outputs = module({"pixels": jnp.zeros((3, 8, 8, 3)), "tokens": jnp.full((2, 6), 15)})
    >>> outputs["logits_per_image"].shape
    (3, 2)
    """

    def __init__(self, config: CLIPConfig, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        if config.vision:
            self.vision = VisionTower(config.vision, dtype, rngs=rngs)
        if config.text:
            self.text = TextTower(config.text, dtype, rngs=rngs)
        if config.vision and config.text:
            self.logit_scale = nnx.Param(jnp.float32(config.logit_scale_init_value))

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Takes and returns what the stages of `clip` do."""
        outputs = {}
        if hasattr(self, "vision"):
            outputs["image"] = self.vision(inputs["pixels"])
        if hasattr(self, "text"):
            outputs["text"] = self.text(inputs["tokens"], inputs.get("mask"))
        if hasattr(self, "logit_scale"):
            outputs["logits_per_image"] = similarities(self.logit_scale[...], outputs)
        return outputs


def init(config: CLIPConfig, key: Array) -> PyTree:
    """Random float32 parameters, scaled as CLIP's.

    Args:
      config: shape of the model.
      key: a random key.

    Returns:
      Nested dicts with string keys.
    """
    return parameters(CLIP(config, rngs=nnx.Rngs(key)))


def clip(config: CLIPConfig, params: PyTree, dtype: DTypeLike = jnp.float32) -> Model:
    """The stages of a CLIP and its parameters.

    The inputs are ``{"pixels": [images, height, width, 3], "tokens": [texts, length], "mask": [texts, length]}``, those
    of a missing tower left out; a missing mask means no padding. The outputs are ``{"image": [images, embedding],
    "text": [texts, embedding], "logits_per_image": [images, texts]}``, the embeddings float32 and not normalised.

    Args:
      config: shape of the model; a tower that is None has no stages.
      params: parameters as nested dicts, in any floating dtype.
      dtype: dtype that activations are computed in.

    Returns:
      The model.

    >>> import jax
    >>> config = CLIPConfig(CLIPVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4, projection_dim=4), None)
    >>> model = clip(config, init(config, jax.random.key(0)))
    >>> [stage.name for stage in model.stages]
    ['vision/embeddings', 'vision/blocks/0', 'vision/blocks/1', 'vision/head']
    >>> model({"pixels": jnp.zeros((3, 8, 8, 3))})["image"].shape
    (3, 4)
    """
    dtype = jnp.dtype(dtype)
    stages: list[Stage] = []
    if config.vision:
        stages += _vision_stages(config.vision, dtype)
    if config.text:
        stages += _text_stages(config.text, dtype)
    if config.vision and config.text:
        stages.append(Stage("logits", stage_function(Logits), (("logit_scale", "logit_scale"),)))
    return Model(params, describe(TABLE, config, stages))


def vision_model(model: Model) -> Model:
    """The vision tower of a CLIP alone: ``pixels`` to ``image``, its parameters under ``vision/`` as before."""
    return tower(model, "vision")


def text_model(model: Model) -> Model:
    """The text tower of a CLIP alone: ``tokens`` to ``text``, its parameters under ``text/`` as before."""
    return tower(model, "text")


def end_position(tokens: Int[Array, "batch tokens"], eos_token_id: int) -> Int[Array, " batch"]:
    """Where a text's embedding is read: at the first end token; for the id 2, at the greatest token.

    >>> end_position(jnp.array([[5, 9, 7, 9]]), 9).tolist(), end_position(jnp.array([[5, 8, 7, 2]]), 2).tolist()
    ([1], [1])
    """
    return jnp.argmax(tokens if eos_token_id == LEGACY_END_TOKEN else tokens == eos_token_id, axis=-1)


def similarities(logit_scale: Float[Array, ""], embeddings: dict[str, Array]) -> Float[Array, "images texts"]:
    """``exp(logit_scale)`` times the cosines of ``embeddings["image"]`` and ``embeddings["text"]``."""
    image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (embeddings["image"], embeddings["text"]))
    return jnp.exp(logit_scale.astype(jnp.float32)) * image @ text.T


def _vision_stages(config: CLIPVisionConfig, dtype: jnp.dtype) -> list[Stage]:
    stream = Stream(special=1, grid=config.grid)
    embeddings = stage_function(VisionEmbeddings, config, dtype)
    return [
        Stage("vision/embeddings", embeddings, _paths("vision", "embeddings", "pre_norm"), streams=stream),
        *block_stages("vision", config.block, config.num_hidden_layers, dtype, stream),
        _head("vision", stage_function(VisionHead, config, dtype), "post_norm", config.projection_dim),
    ]


def _text_stages(config: CLIPTextConfig, dtype: jnp.dtype) -> list[Stage]:
    stream = Stream(mask="mask")
    return [
        Stage(
            "text/embeddings",
            stage_function(TextEmbeddings, config, dtype),
            _paths("text", "embeddings"),
            streams=stream,
        ),
        *block_stages("text", config.block, config.num_hidden_layers, dtype, stream),
        _head("text", stage_function(TextHead, config, dtype), "final_norm", config.projection_dim),
    ]


def _head(tower: str, function: Callable[[PyTree, PyTree], PyTree], norm: str, projection_dim: int | None) -> Stage:
    if projection_dim is None:
        return Stage(f"{tower}/head", function, _paths(tower, norm))
    return Stage(f"{tower}/head", function, _paths(tower, norm, "projection"))


def _paths(tower: str, *children: str) -> tuple[tuple[str, str], ...]:
    return tuple((child, f"{tower}/{child}") for child in children)


def _blocks(config: CLIPVisionConfig | CLIPTextConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.List:
    depth = config.num_hidden_layers
    return nnx.List([Block(config.block, dtype, depth, rngs=rngs) for _ in range(depth)])


def _token_embeddings(config: CLIPTextConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> TokenEmbeddings:
    return TokenEmbeddings(config.vocab_size, config.max_position_embeddings, config.hidden_size, dtype, rngs=rngs)


def _projection(config: CLIPVisionConfig | CLIPTextConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear | None:
    if config.projection_dim is None:
        return None
    width = config.hidden_size
    return linear(width, config.projection_dim, dtype, rngs, width**-0.5, use_bias=False)


def _project(projection: nnx.Linear | None, pooled: Float[Array, "batch width"]) -> Float[Array, "batch embedding"]:
    return (pooled if projection is None else projection(pooled)).astype(jnp.float32)
