"""SigLIP as stages, and as one NNX module (Zhai et al. 2023, https://arxiv.org/abs/2303.15343).

SigLIP 2 of fixed resolution (Tschannen et al. 2025, https://arxiv.org/abs/2502.14786) is the same model.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tvjax.models.clip.modeling import TokenEmbeddings, similarities
from tvjax.models.layer_table import describe
from tvjax.models.siglip.config import SiglipConfig, SiglipTextConfig, SiglipVisionConfig
from tvjax.models.siglip.table import TABLE
from tvjax.models.transformer import (
    MLP,
    Block,
    LayerNorm,
    PatchEmbeddings,
    block_stages,
    linear,
    parameters,
    stage_function,
)
from tvjax.stages import Model, PyTree, Stage, Stream


class TextBlock(Block):
    """A block whose tokens see all others that ``carry["mask"]`` calls real."""

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Adds attention, then the MLP, to the residual stream."""
        hidden = carry["hidden"]
        hidden = hidden + self.attention(self.norm1(hidden), carry["mask"][:, None, None])
        return {**carry, "hidden": hidden + self.mlp(self.norm2(hidden))}


class CrossAttention(nnx.Module):
    """Multi-head attention of one learned token, the probe, to all tokens of an image."""

    def __init__(self, config: SiglipVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.query, self.key, self.value, self.out = (linear(width, width, dtype, rngs, width**-0.5) for _ in range(4))
        self.heads = config.num_attention_heads

    def __call__(
        self, probe: Float[Array, " width"], x: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch width"]:
        """What the probe finds in each image."""
        split = (self.heads, x.shape[-1] // self.heads)
        query, key, value = (
            layer(read).reshape(*read.shape[:-1], *split)
            for layer, read in ((self.query, probe), (self.key, x), (self.value, x))
        )
        scores = jnp.einsum("hd,bkhd->bhk", query, key, preferred_element_type=jnp.float32) * split[1] ** -0.5
        weights = jax.nn.softmax(scores).astype(value.dtype)
        return self.out(jnp.einsum("bhk,bkhd->bhd", weights, value).reshape(x.shape[0], -1))


class PoolingHead(nnx.Module):
    """Attention pooling and an MLP: the tokens of each image to its embedding."""

    def __init__(self, config: SiglipVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.probe = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,), jnp.float32))
        self.attention = CrossAttention(config, dtype, rngs=rngs)
        self.norm = LayerNorm(width, config.layer_norm_eps, rngs=rngs)
        self.mlp = MLP(config.block, dtype, 1, rngs=rngs)
        self.dtype = dtype

    def __call__(self, hidden: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        """Embeds images, not normalised."""
        pooled = self.attention(self.probe[...].astype(self.dtype), hidden)
        return (pooled + self.mlp(self.norm(pooled))).astype(jnp.float32)


class VisionEmbeddings(nnx.Module):
    """First vision stage: ``pixels`` to ``hidden``."""

    def __init__(self, config: SiglipVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.embeddings = _patches(config, dtype, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``pixels``."""
        carry = dict(carry)
        carry["hidden"] = self.embeddings(carry.pop("pixels"))
        return carry


class VisionHead(nnx.Module):
    """Last vision stage: ``hidden`` to ``image``."""

    def __init__(self, config: SiglipVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.post_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.head = PoolingHead(config, dtype, rngs=rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden``."""
        carry = dict(carry)
        carry["image"] = self.head(self.post_norm(carry.pop("hidden")))
        return carry


class TextEmbeddings(nnx.Module):
    """First text stage: ``tokens`` to ``hidden``."""

    def __init__(self, config: SiglipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.embeddings = _token_embeddings(config, dtype, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``tokens``; a missing ``mask`` calls all of them real, as the model was trained."""
        carry = dict(carry)
        tokens = carry.pop("tokens")
        mask = carry.get("mask", jnp.ones(tokens.shape, bool)).astype(bool)
        return {**carry, "hidden": self.embeddings(tokens), "mask": mask}


class TextHead(nnx.Module):
    """Last text stage: ``hidden`` to ``text``, which is read at the last token, be it padding."""

    def __init__(self, config: SiglipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.projection = _projection(config, dtype, rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden`` and ``mask``."""
        carry = dict(carry)
        hidden, _ = carry.pop("hidden"), carry.pop("mask")
        return {**carry, "text": self.projection(self.final_norm(hidden[:, -1])).astype(jnp.float32)}


class Logits(nnx.Module):
    """Last stage of a SigLIP with both towers: adds ``logits_per_image``."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.logit_scale, self.logit_bias = _scale_and_bias()

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Keeps ``image`` and ``text``."""
        return {**carry, "logits_per_image": _logits(self.logit_scale, self.logit_bias, carry)}


class VisionTower(nnx.Module):
    """Pixels to image embeddings."""

    def __init__(self, config: SiglipVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        depth = config.num_hidden_layers
        self.embeddings = _patches(config, dtype, rngs)
        self.blocks = nnx.List([Block(config.block, dtype, depth, rngs=rngs) for _ in range(depth)])
        self.post_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.head = PoolingHead(config, dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "batch height width 3"]) -> Float[Array, "batch embedding"]:
        """Embeds images, not normalised."""
        carry = {"hidden": self.embeddings(pixels)}
        for block in self.blocks:
            carry = block(carry)
        return self.head(self.post_norm(carry["hidden"]))


class TextTower(nnx.Module):
    """Tokens to text embeddings."""

    def __init__(self, config: SiglipTextConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        depth = config.num_hidden_layers
        self.embeddings = _token_embeddings(config, dtype, rngs)
        self.blocks = nnx.List([TextBlock(config.block, dtype, depth, rngs=rngs) for _ in range(depth)])
        self.final_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.projection = _projection(config, dtype, rngs)

    def __call__(
        self, tokens: Int[Array, "batch tokens"], mask: Bool[Array, "batch tokens"] | None = None
    ) -> Float[Array, "batch embedding"]:
        """Embeds texts, not normalised."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        carry = {"hidden": self.embeddings(tokens), "mask": mask}
        for block in self.blocks:
            carry = block(carry)
        return self.projection(self.final_norm(carry["hidden"][:, -1])).astype(jnp.float32)


class Siglip(nnx.Module):
    """SigLIP as one module, for training loops and others that want one; its parameters are those of the stages.

    >>> config = SiglipConfig(
    ...     SiglipVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4),
    ...     SiglipTextConfig(16, 8, 16, 2, 2, max_position_embeddings=6, projection_size=8),
    ... )
    >>> module = Siglip(config, rngs=nnx.Rngs(0))
    >>> outputs = module({"pixels": jnp.zeros((3, 8, 8, 3)), "tokens": jnp.full((2, 6), 15)})
    >>> outputs["logits_per_image"].shape
    (3, 2)
    """

    def __init__(self, config: SiglipConfig, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        if config.vision:
            self.vision = VisionTower(config.vision, dtype, rngs=rngs)
        if config.text:
            self.text = TextTower(config.text, dtype, rngs=rngs)
        if config.vision and config.text:
            self.logit_scale, self.logit_bias = _scale_and_bias()

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Takes and returns what the stages of `siglip` do."""
        outputs = {}
        if hasattr(self, "vision"):
            outputs["image"] = self.vision(inputs["pixels"])
        if hasattr(self, "text"):
            outputs["text"] = self.text(inputs["tokens"], inputs.get("mask"))
        if hasattr(self, "logit_scale"):
            outputs["logits_per_image"] = _logits(self.logit_scale, self.logit_bias, outputs)
        return outputs


def init(config: SiglipConfig, key: Array) -> PyTree:
    """Random float32 parameters.

    Args:
      config: shape of the model.
      key: a random key.

    Returns:
      Nested dicts with string keys.
    """
    return parameters(Siglip(config, rngs=nnx.Rngs(key)))


def siglip(config: SiglipConfig, params: PyTree, dtype: DTypeLike = jnp.float32) -> Model:
    """The stages of a SigLIP and its parameters.

    The inputs are ``{"pixels": [images, height, width, 3], "tokens": [texts, length], "mask": [texts, length]}``, those
    of a missing tower left out. The model was trained on texts that are padded to ``max_position_embeddings`` tokens
    and on no mask: leave it out, and padding is read as any other token. The outputs are ``{"image": [images,
    embedding], "text": [texts, embedding], "logits_per_image": [images, texts]}``, the embeddings float32 and not
    normalised. ``sigmoid(logits_per_image)`` is the probability of each pair by itself. A zero-shot classifier
    (`tvjax.tasks.zero_shot`) takes the softmax over the classes of an image, of which `logit_bias`, the same for all,
    is no part: the class of the greatest sigmoid is that of the greatest softmax.

    Args:
      config: shape of the model; a tower that is None has no stages.
      params: parameters as nested dicts, in any floating dtype.
      dtype: dtype that activations are computed in.

    Returns:
      The model.

    >>> config = SiglipConfig(SiglipVisionConfig(8, 16, 2, 2, image_size=8, patch_size=4), None)
    >>> model = siglip(config, init(config, jax.random.key(0)))
    >>> [stage.name for stage in model.stages]
    ['vision/embeddings', 'vision/blocks/0', 'vision/blocks/1', 'vision/head']
    >>> model({"pixels": jnp.zeros((3, 8, 8, 3))})["image"].shape
    (3, 8)
    """
    dtype = jnp.dtype(dtype)
    stages: list[Stage] = []
    if config.vision:
        stages += _vision_stages(config.vision, dtype)
    if config.text:
        stages += _text_stages(config.text, dtype)
    if config.vision and config.text:
        names = (("logit_scale", "logit_scale"), ("logit_bias", "logit_bias"))
        stages.append(Stage("logits", stage_function(Logits), names))
    return Model(params, describe(TABLE, config, stages))


def _vision_stages(config: SiglipVisionConfig, dtype: jnp.dtype) -> list[Stage]:
    stream = Stream(grid=config.grid)
    first, last = (stage_function(module, config, dtype) for module in (VisionEmbeddings, VisionHead))
    return [
        Stage("vision/embeddings", first, _paths("vision", "embeddings"), streams=stream),
        *block_stages("vision", config.block, config.num_hidden_layers, dtype, stream),
        Stage("vision/head", last, _paths("vision", "post_norm", "head"), streams=stream),
    ]


def _text_stages(config: SiglipTextConfig, dtype: jnp.dtype) -> list[Stage]:
    stream = Stream(mask="mask")
    first, last = (stage_function(module, config, dtype) for module in (TextEmbeddings, TextHead))
    block = stage_function(TextBlock, config.block, dtype)
    names = [f"text/blocks/{i}" for i in range(config.num_hidden_layers)]
    return [
        Stage("text/embeddings", first, _paths("text", "embeddings"), streams=stream),
        *(Stage(name, block, (("", name),), "text/blocks", stream) for name in names),
        Stage("text/head", last, _paths("text", "final_norm", "projection")),
    ]


def _paths(tower: str, *children: str) -> tuple[tuple[str, str], ...]:
    return tuple((child, f"{tower}/{child}") for child in children)


def _patches(config: SiglipVisionConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> PatchEmbeddings:
    return PatchEmbeddings(
        config.hidden_size, config.image_size, config.patch_size, True, dtype, class_token=False, rngs=rngs
    )


def _token_embeddings(config: SiglipTextConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> TokenEmbeddings:
    return TokenEmbeddings(config.vocab_size, config.max_position_embeddings, config.hidden_size, dtype, rngs=rngs)


def _projection(config: SiglipTextConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(config.hidden_size, config.projection_size, dtype, rngs, config.hidden_size**-0.5)


def _scale_and_bias() -> tuple[nnx.Param, nnx.Param]:
    return nnx.Param(jnp.float32(math.log(10.0))), nnx.Param(jnp.float32(-10.0))  # the paper's


def _logits(scale: nnx.Param, bias: nnx.Param, embeddings: dict[str, Array]) -> Float[Array, "images texts"]:
    return similarities(scale[...], embeddings) + bias[...].astype(jnp.float32)
