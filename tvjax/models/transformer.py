"""The pieces that families are made of, and how a Flax NNX module becomes the function of a stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tvjax import tree
from tvjax.placement import automatic
from tvjax.stages import PyTree, Stage, Stream


def gelu(x: Array) -> Array:
    """The exact Gaussian error linear unit, ``x Phi(x)``."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """The Gaussian error linear unit with the hyperbolic tangent for the error function."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation, ``x sigmoid(1.702 x)``."""
    return x * jax.nn.sigmoid(1.702 * x)


def relu(x: Array) -> Array:
    """``max(x, 0)``."""
    return jnp.maximum(x, 0)


def silu(x: Array) -> Array:
    """``x sigmoid(x)``."""
    return x * jax.nn.sigmoid(x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "silu": silu,
    "swish": silu,
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The shape of one transformer block; blocks of equal configs share one stage function.

    Attributes:
      hidden_size: width of the residual stream.
      intermediate_size: width inside the MLP.
      num_attention_heads: number of heads; divides `hidden_size`.
      hidden_act: a key of `ACTIVATIONS`.
      layer_norm_eps: epsilon of both norms.
      qkv_bias: whether queries, keys and values have biases.
      causal: whether a token sees only itself and those before it.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    qkv_bias: bool = True
    causal: bool = False

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not supported: use one of {sorted(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )


class LayerNorm(nnx.LayerNorm):
    """Layer normalisation with the exact variance, in float32 whatever the dtype of what it normalises."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*batch width"], *, mask: Bool[Array, "*batch width"] | None = None
    ) -> Float[Array, "*batch width"]:
        """Normalises each token by itself; `mask` is True at the features that the statistics are of."""
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + epsilon) * scale``, in float32 whatever the dtype of what it normalises."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises each token by itself."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def linear(
    inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs, std: float, use_bias: bool = True
) -> nnx.Linear:
    """A linear layer whose kernel starts normal with the given deviation and whose bias starts at zero."""
    kernel_init = nnx.initializers.normal(std)
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, kernel_init=kernel_init, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, depth: int, *, rngs: nnx.Rngs):
        width = config.hidden_size
        std = width**-0.5
        self.heads = config.num_attention_heads
        self.query, self.key, self.value = (
            linear(width, width, dtype, rngs, std * (2 * depth) ** -0.5, config.qkv_bias) for _ in range(3)
        )
        self.out = linear(width, width, dtype, rngs, std)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Bool[Array, "#batch 1 #tokens tokens"] | None = None,
        bias: Float[Array, "heads tokens tokens"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Mixes the tokens.

        Args:
          x: the tokens.
          mask: True where a query (second last axis) may see a key.
          bias: added to the scores.
        """
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        query, key, value = (layer(x).reshape(split) for layer in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * split[-1] ** -0.5
        if bias is not None:
            scores = scores + bias.astype(scores.dtype)
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(value.dtype)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, depth: int, *, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.intermediate_size
        self.up = linear(width, hidden, dtype, rngs, (2 * width) ** -0.5)
        self.down = linear(hidden, width, dtype, rngs, (2 * depth * width) ** -0.5)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Maps each token by itself."""
        return self.down(self.activation(self.up(x)))


class Block(nnx.Module):
    """A pre-norm transformer block on ``carry["hidden"]``; ``carry["mask"]`` is read by causal blocks only.

    `depth`, the number of blocks of the model, only sets the scale of the initial kernels, as CLIP does.
    """

    def __init__(self, config: BlockConfig, dtype: jnp.dtype, depth: int = 1, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = LayerNorm(width, eps, rngs=rngs)
        self.attention = Attention(config, dtype, depth, rngs=rngs)
        self.norm2 = LayerNorm(width, eps, rngs=rngs)
        self.mlp = MLP(config, dtype, depth, rngs=rngs)
        self.causal = config.causal

    def __call__(self, carry: dict[str, Array]) -> dict[str, Array]:
        """Adds attention, then the MLP, to the residual stream."""
        hidden = carry["hidden"]
        hidden = hidden + self.attention(self.norm1(hidden), causal_mask(carry["mask"]) if self.causal else None)
        hidden = hidden + self.mlp(self.norm2(hidden))
        return {**carry, "hidden": hidden}


def causal_mask(padding: Bool[Array, "batch tokens"]) -> Bool[Array, "batch 1 tokens tokens"]:
    """Which key each query may see: itself and the real tokens before it.

    >>> causal_mask(jnp.array([[True, True, False]]))[0, 0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    """
    tokens = padding.shape[-1]
    return jnp.tril(jnp.ones((tokens, tokens), bool)) & padding[:, None, None, :].astype(bool)


class PatchEmbeddings(nnx.Module):
    """The image's patches, with learned positions; before them a class token, where there is one."""

    def __init__(
        self,
        width: int,
        image_size: int,
        patch_size: int,
        use_bias: bool,
        dtype: jnp.dtype,
        class_token: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        normal = nnx.initializers.normal(0.02)
        grid = image_size // patch_size
        if class_token:
            self.class_token = nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,), jnp.float32))
        self.patch = nnx.Conv(
            3, width, (patch_size, patch_size), strides=(patch_size, patch_size), padding="VALID",
            use_bias=use_bias, dtype=dtype, kernel_init=normal, rngs=rngs,
        )  # fmt: skip
        self.positions = nnx.Param(normal(rngs.params(), (class_token + grid**2, width), jnp.float32))
        self.image_size = image_size
        self.dtype = dtype

    def __call__(self, pixels: Float[Array, "batch height width 3"]) -> Float[Array, "batch tokens features"]:
        """The class token, and the patches in row order."""
        expected = (self.image_size, self.image_size, 3)
        if pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise ValueError(
                f"pixels have shape {pixels.shape}, expected (batch, {', '.join(map(str, expected))}), channels last: "
                "resize the images with the model's processor"
            )
        patches = self.patch(pixels)
        batch, _, _, width = patches.shape
        tokens = patches.reshape(batch, -1, width)
        if hasattr(self, "class_token"):
            class_token = jnp.broadcast_to(self.class_token[...].astype(self.dtype), (batch, 1, width))
            tokens = jnp.concatenate([class_token, tokens], axis=1)
        return tokens + self.positions[...].astype(self.dtype)


class StageFunction:
    """``(params, carry) -> carry`` of an NNX module; made by `stage_function`.

    Attributes:
      parameters: shape and dtype of each parameter that it takes, as nested dicts.
    """

    def __init__(self, module_class: Callable[..., nnx.Module], arguments: tuple[Any, ...]):
        module = nnx.eval_shape(lambda: module_class(*arguments, rngs=nnx.Rngs(0)))
        self._graphdef, _ = nnx.split(module)
        self._name = module_class.__name__
        self.parameters = parameters(module)

    @automatic(lambda self, params, carry: carry)
    def __call__(self, params: PyTree, carry: PyTree) -> PyTree:
        """Runs the module with these parameters; what it returns lies like the examples that it is of."""
        return nnx.merge(self._graphdef, nnx.State(params))(carry)

    def __repr__(self) -> str:
        return f"StageFunction({self._name})"


@functools.cache
def stage_function(module_class: Callable[..., nnx.Module], *arguments: Any) -> StageFunction:
    """The function of the stage that the NNX module ``module_class(*arguments, rngs=...)`` computes.

    The same arguments give the same object, so blocks of one shape are compiled once.

    Args:
      module_class: a module whose call takes the carry and returns the next one.
      *arguments: hashable; what the module is built from.
    """
    return StageFunction(module_class, arguments)


def parameter_shapes(stages: Iterable[Stage]) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter that stages made of `stage_function` take, by path."""
    shapes = {}
    for stage in stages:
        assert isinstance(stage.function, StageFunction), stage.name
        for local, prefix in stage.paths:
            for path, leaf in tree.flatten(tree.get(stage.function.parameters, local)).items():
                shapes[f"{prefix}/{path}".strip("/")] = leaf.shape  # an empty path: the prefix names a leaf
    return shapes


def block_stages(tower: str, config: BlockConfig, count: int, dtype: jnp.dtype, stream: Stream) -> list[Stage]:
    """The stages ``<tower>/blocks/0``, ``<tower>/blocks/1``, ..., which share one function."""
    function, group = stage_function(Block, config, dtype), f"{tower}/blocks"
    return [Stage(f"{group}/{i}", function, (("", f"{group}/{i}"),), group, stream) for i in range(count)]


def parameters(module: nnx.Module) -> PyTree:
    """The parameters of a module as nested dicts with string keys."""
    return tree.nest(tree.flatten(nnx.to_pure_dict(nnx.state(module, nnx.Param))))


def set_parameters(module: nnx.Module, params: PyTree) -> None:
    """Gives a module the parameters of nested dicts, as `parameters` returns them.

    >>> config = BlockConfig(8, 16, 2, "gelu", 1e-5)
    >>> one, other = (Block(config, jnp.dtype("float32"), rngs=nnx.Rngs(seed)) for seed in (0, 1))
    >>> set_parameters(one, parameters(other))
    >>> bool((one.mlp.up.kernel[...] == other.mlp.up.kernel[...]).all())
    True
    """
    variables = nnx.to_flat_state(nnx.state(module, nnx.Param))
    leaves = [(path, variable.replace(tree.get(params, "/".join(map(str, path))))) for path, variable in variables]
    nnx.update(module, nnx.from_flat_state(leaves))


def two_tower_inputs(config: Any, examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what a vision tower, a text tower or both take: so many images, and texts of the greatest length.

    Args:
      config: with the configs ``vision`` and ``text``, or None for a tower that is not there.
      examples: how many of each.
    """
    shapes = {}
    if config.vision:
        side = config.vision.image_size
        shapes["pixels"] = jax.ShapeDtypeStruct((examples, side, side, 3), jnp.float32)
    if config.text:
        length = config.text.max_position_embeddings
        shapes["tokens"] = jax.ShapeDtypeStruct((examples, length), jnp.int32)
        shapes["mask"] = jax.ShapeDtypeStruct((examples, length), bool)
    return shapes
