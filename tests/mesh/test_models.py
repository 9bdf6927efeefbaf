"""Our families, and capture, over meshes: the numbers of one device, rows where the examples lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tvjax.capture import capture_gradients
from tvjax.models.bert import BertConfig
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from tvjax.models.families import family_of_config
from tvjax.models.gpt2 import GPT2Config
from tvjax.models.llama import LlamaConfig
from tvjax.models.vit import ViTConfig

CONFIGS = {
    "clip": CLIPConfig(
        CLIPVisionConfig(8, 16, 1, 2, image_size=8, patch_size=4, projection_dim=4),
        CLIPTextConfig(16, 8, 16, 1, 2, max_position_embeddings=6, eos_token_id=15, projection_dim=4),
    ),
    "vit": ViTConfig(8, 16, 1, 2, image_size=8, patch_size=4, num_labels=3),
    "llama": LlamaConfig(16, 8, 16, 1, 2, 1, head_dim=4),
    "bert": BertConfig(16, 8, 16, 1, 2, max_position_embeddings=6),
    "gpt2": GPT2Config(16, 8, 16, 1, 2, max_position_embeddings=6),
}


def built(name, examples=8):
    """The function of a family's outputs, its parameters and inputs."""
    config, random = CONFIGS[name], np.random.default_rng(0)
    family = family_of_config(config)
    params = family.init(config, jax.random.key(0))
    inputs = {"tokens": random.integers(0, 16, (examples, 6)), "mask": np.arange(6) < random.integers(3, 7, (8, 1))}
    if name in ("clip", "vit"):
        inputs = {"pixels": random.normal(size=(examples, 8, 8, 3)).astype(np.float32)} | (
            inputs if name == "clip" else {}
        )
    inputs = {key: jnp.asarray(value, jnp.int32 if "tokens" in key else value.dtype) for key, value in inputs.items()}
    model = family.build(config, params)
    return (lambda params, inputs: model.replace(params=params)(inputs)), params, inputs


def lies_like(outputs, inputs, spread):
    """Under explicit axes every output has the rows of the inputs."""
    if AxisType.Explicit in spread.mesh.axis_types:
        rows = jax.tree.leaves(inputs)[0].sharding.spec[0]
        for leaf in jax.tree.leaves(outputs):
            assert leaf.sharding.mesh == spread.mesh and leaf.sharding.spec[0] == rows


def test_clip_on_every_mesh(spread, alike):
    function, params, inputs = built("clip")
    placed = spread.rows(inputs)
    outputs = function(spread.params(params), placed)
    alike(outputs, jax.jit(function)(params, inputs))
    lies_like(outputs, placed, spread)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "clip"])
def test_families(name, spread_of, alike):
    function, params, inputs = built(name)
    spread = spread_of("three", "explicit")
    placed = spread.rows(inputs)
    outputs = jax.jit(function)(spread.params(params), placed)
    alike(outputs, jax.jit(function)(params, inputs))
    lies_like(outputs, placed, spread)


def observed(function, params, inputs):
    """The results with x, y and g of every site, in one program."""

    def loss(params, inputs):
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(function(params, inputs)))

    return jax.jit(lambda *arguments: capture_gradients(loss, *arguments)[1])(params, inputs)


def scanned(params, inputs):
    """A stack of layers in the way of code that is written for explicit axes, or for none."""
    sharding = jax.typeof(inputs).sharding

    def contract(x, kernel, axes):
        if not (sharding.mesh.explicit_axes and any(sharding.spec)):
            return x @ kernel
        place = lambda *axes: jax.sharding.NamedSharding(sharding.mesh, PartitionSpec(*axes))  # noqa: E731
        kernel = jax.sharding.reshard(kernel, place(*axes))
        return jnp.einsum("bti,io->bto", x, kernel, out_sharding=place("data", None, axes[1]))

    @jax.checkpoint
    def layer(x, kernels):
        return x + contract(jnp.tanh(contract(x, kernels["up"], (None, "tensor"))), kernels["down"], ("tensor", None))

    return jax.lax.scan(lambda x, kernels: (layer(x, kernels), None), inputs, params)[0]


@pytest.mark.parametrize("name", ("vit", "scanned"))
def test_what_sites_see(name, three, alike):
    if name == "vit":
        function, params, inputs = built("vit")
        placed = three.params(params), three.rows(inputs)
    else:
        random = np.random.default_rng(0)
        draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
        function, params, inputs = scanned, {"up": draw(3, 8, 16), "down": draw(3, 16, 8)}, draw(8, 5, 8)
        rows = jax.sharding.NamedSharding(three.mesh, PartitionSpec("data"))
        placed = three.params(params), jax.device_put(inputs, rows)
    expected, found = observed(function, params, inputs), observed(function, *placed)
    for part, other in zip(found, expected, strict=True):
        alike(part, other, None, 1e-4)
        if AxisType.Explicit in three.mesh.axis_types:
            rows = jax.tree.leaves(placed[1])[0].sharding.spec[0]
            for key, leaf in part.items():
                assert leaf.sharding.spec[-2] == rows, f"{key}: {leaf.sharding.spec}"
