"""DINOv2 as stages, and as one NNX module (Oquab et al. 2023, https://arxiv.org/abs/2304.07193).

Registers are those of Darcet et al. 2023, https://arxiv.org/abs/2309.16588.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tvjax.models.dinov2.config import Dinov2BlockConfig, Dinov2WithRegistersConfig, Shape
from tvjax.models.dinov2.positions import resized
from tvjax.models.dinov2.table import TABLE, TABLE_WITH_REGISTERS
from tvjax.models.layer_table import describe
from tvjax.models.transformer import MLP, Attention, LayerNorm, linear, parameters, silu, stage_function
from tvjax.stages import Model, PyTree, Stage, Stream

_STD = 0.02  # of every initial kernel of embeddings and head


class LayerScale(nnx.Module):
    """A factor of each feature."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """``x * scale``."""
        return x * self.scale[...].astype(x.dtype)


class GatedMLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: Dinov2BlockConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate, self.up = (linear(width, hidden, dtype, rngs, width**-0.5) for _ in range(2))
        self.down = linear(hidden, width, dtype, rngs, hidden**-0.5)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Maps each token by itself."""
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """A pre-norm block on ``carry["hidden"]``; what each half adds is scaled by feature."""

    def __init__(self, config: Dinov2BlockConfig, dtype: jnp.dtype, depth: int = 1, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1, self.norm2 = (LayerNorm(width, eps, rngs=rngs) for _ in range(2))
        self.layer_scale1, self.layer_scale2 = (LayerScale(width, rngs=rngs) for _ in range(2))
        self.attention = Attention(config, dtype, depth, rngs=rngs)
        if config.gated:
            self.gated_mlp = GatedMLP(config, dtype, rngs=rngs)
        else:
            self.mlp = MLP(config, dtype, depth, rngs=rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Adds attention, then the MLP, to the residual stream."""
        hidden = carry["hidden"]
        mlp = self.gated_mlp if hasattr(self, "gated_mlp") else self.mlp
        hidden = hidden + self.layer_scale1(self.attention(self.norm1(hidden)))
        hidden = hidden + self.layer_scale2(mlp(self.norm2(hidden)))
        return {**carry, "hidden": hidden}


class Embeddings(nnx.Module):
    """First stage: ``pixels`` to ``hidden``; for images of another size than the config's, positions are resized."""

    def __init__(self, config: Shape, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        width, patch, normal = config.hidden_size, config.patch_size, nnx.initializers.normal(_STD)
        self.class_token = nnx.Param(normal(rngs.params(), (width,), jnp.float32))
        if config.has_mask_token:
            self.mask_token = nnx.Param(jnp.zeros((width,), jnp.float32))
        if config.registers:
            self.registers = nnx.Param(normal(rngs.params(), (config.registers, width), jnp.float32))
        self.patch = nnx.Conv(
            3,
            width,
            (patch, patch),
            strides=(patch, patch),
            padding="VALID",
            dtype=dtype,
            kernel_init=normal,
            rngs=rngs,
        )
        count = 1 + config.grid[0] * config.grid[1]
        self.positions = nnx.Param(normal(rngs.params(), (count, width), jnp.float32))
        self.config, self.dtype = config, dtype

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``pixels``."""
        carry = dict(carry)
        pixels, least = carry.pop("pixels"), self.config.patch_size
        if pixels.ndim != 4 or pixels.shape[3] != 3 or min(pixels.shape[1:3]) < least:
            raise ValueError(
                f"pixels have shape {pixels.shape}, expected (batch, height, width, 3), channels last, of {least} "
                "pixels or more a side: make them with the model's processor"
            )
        patches = self.patch(pixels)
        batch, *grid, width = patches.shape
        positions = self.positions[...]
        first, others = positions[:1], positions[1:]
        if tuple(grid) != self.config.grid:
            wide = others.astype(jnp.float32)
            others = resized(wide, self.config.grid, (grid[0], grid[1]), self.config.antialias).astype(others.dtype)
        class_token = self.class_token[...].astype(self.dtype) + first.astype(self.dtype)
        tokens = [jnp.broadcast_to(class_token, (batch, 1, width))]
        if self.config.registers:
            tokens.append(
                jnp.broadcast_to(self.registers[...].astype(self.dtype), (batch, self.config.registers, width))
            )
        tokens.append(patches.reshape(batch, -1, width) + others.astype(self.dtype))
        return {**carry, "hidden": jnp.concatenate(tokens, axis=1)}


class Classifier(nnx.Module):
    """Logits of the class token and the mean of the patches, each by a kernel of its own, and one bias."""

    def __init__(self, config: Shape, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        assert config.num_labels is not None
        self.class_token, self.patches = (
            linear(config.hidden_size, config.num_labels, dtype, rngs, _STD, use_bias=False) for _ in range(2)
        )
        self.bias = nnx.Param(jnp.zeros((config.num_labels,), jnp.float32))
        self.special = 1 + config.registers

    def __call__(self, hidden: Float[Array, "batch tokens width"]) -> Float[Array, "batch classes"]:
        """Scores of the classes, float32."""
        logits = self.class_token(hidden[:, 0]) + self.patches(hidden[:, self.special :].mean(1))
        return (logits + self.bias[...].astype(logits.dtype)).astype(jnp.float32)


class Head(nnx.Module):
    """Last stage: ``hidden`` to ``logits``; of a backbone to ``image``, its class token."""

    def __init__(self, config: Shape, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.post_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        if config.num_labels is not None:
            self.head = Classifier(config, dtype, rngs=rngs)

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Replaces ``hidden``."""
        carry = dict(carry)
        hidden = self.post_norm(carry.pop("hidden"))
        if hasattr(self, "head"):
            return {**carry, "logits": self.head(hidden)}
        return {**carry, "image": hidden[:, 0].astype(jnp.float32)}


class Tower(nnx.Module):
    """Pixels to tokens after the last norm."""

    def __init__(self, config: Shape, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        depth = config.num_hidden_layers
        self.embeddings = Embeddings(config, dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config.block, dtype, depth, rngs=rngs) for _ in range(depth)])
        self.post_norm = LayerNorm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(self, carry: dict[str, Array]) -> Float[Array, "batch tokens width"]:
        """Tokens of images."""
        carry = self.embeddings(carry)
        for block in self.blocks:
            carry = block(carry)
        return self.post_norm(carry["hidden"])


class Dinov2(nnx.Module):
    """DINOv2 as one module; its parameters are those of the stages.

    >>> from tvjax.models.dinov2.config import Dinov2Config
    >>> module = Dinov2(Dinov2Config(8, 2, 2, 2, image_size=8, patch_size=4, num_labels=5), rngs=nnx.Rngs(0))
    >>> module({"pixels": jnp.zeros((3, 12, 12, 3))})["logits"].shape
    (3, 5)
    """

    def __init__(self, config: Shape, dtype: DTypeLike = jnp.float32, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(dtype)
        self.vision = Tower(config, dtype, rngs=rngs)
        if config.num_labels is not None:
            self.head = Classifier(config, dtype, rngs=rngs)

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """Takes and returns what the stages of `dinov2` do."""
        hidden = self.vision({"pixels": inputs["pixels"]})
        if hasattr(self, "head"):
            return {"logits": self.head(hidden)}
        return {"image": hidden[:, 0].astype(jnp.float32)}


def init(config: Shape, key: Array) -> PyTree:
    """Random float32 parameters.

    Args:
      config: shape of the model.
      key: a random key.

    Returns:
      Nested dicts with string keys.
    """
    return parameters(Dinov2(config, rngs=nnx.Rngs(key)))


def dinov2(config: Shape, params: PyTree, dtype: DTypeLike = jnp.float32) -> Model:
    """The stages of a DINOv2 and its parameters.

    The inputs are ``{"pixels": [images, height, width, 3]}``, of any size: for another than the config's the table of
    positions is resized as transformers does it. The outputs are ``{"logits": [images, classes]}``, or of a backbone
    ``{"image": [images, width]}``, its class token after the last norm; float32.

    Args:
      config: shape of the model, `Dinov2Config` or `Dinov2WithRegistersConfig`.
      params: parameters as nested dicts, in any floating dtype.
      dtype: dtype that activations are computed in.

    Returns:
      The model.

    >>> from tvjax.models.dinov2.config import Dinov2Config
    >>> config = Dinov2Config(8, 2, 2, 2, image_size=8, patch_size=4)
    >>> model = dinov2(config, init(config, jax.random.key(0)))
    >>> [stage.name for stage in model.stages]
    ['vision/embeddings', 'vision/blocks/0', 'vision/blocks/1', 'head']
    >>> model({"pixels": jnp.zeros((3, 12, 12, 3))})["image"].shape
    (3, 8)
    """
    dtype, stream = jnp.dtype(dtype), Stream(special=1 + config.registers, grid=config.grid)
    first, last = (stage_function(module, config, dtype) for module in (Embeddings, Head))
    block = stage_function(Block, config.block, dtype)
    names = [f"vision/blocks/{i}" for i in range(config.num_hidden_layers)]
    head = (("post_norm", "vision/post_norm"), *((("head", "head"),) if config.num_labels is not None else ()))
    stages = [
        Stage("vision/embeddings", first, (("", "vision/embeddings"),), streams=stream),
        *(Stage(name, block, (("", name),), "vision/blocks", stream) for name in names),
        Stage("head", last, head, streams=stream),
    ]
    table = TABLE_WITH_REGISTERS if isinstance(config, Dinov2WithRegistersConfig) else TABLE
    return Model(params, describe(table, config, stages))


def inputs(config: Shape, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what the model takes: so many images of the size that its positions are for."""
    return {"pixels": jax.ShapeDtypeStruct((examples, config.image_size, config.image_size, 3), jnp.float32)}
