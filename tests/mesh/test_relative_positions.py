"""Models with a table of relative positions, placed by every ready table or cut: the numbers of one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import tree
from tvjax.models.bert.config import MPNetConfig
from tvjax.models.families import family_of_config
from tvjax.models.t5 import T5Config, UMT5Config
from tvjax.sharding import fsdp, largest, leaf_shardings, rules, tensor_parallel

CONFIGS = {
    "t5": T5Config(16, 16, 4, 16, 1, 1, 4),
    "umt5": UMT5Config(16, 16, 4, 16, 1, 1, 4),
    "mpnet": MPNetConfig(16, 16, 16, 1, 4, max_position_embeddings=12),
}
TABLES = {
    "fsdp": fsdp,
    "largest": lambda mesh: rules(mesh, [(".*", largest("fsdp"))]),
    "tensor": tensor_parallel,
    "both": lambda mesh: tensor_parallel(mesh, fsdp="fsdp"),
}


def is_table(path):
    return "position_bias" in path or "relative_bias" in path


def make(name):
    """A model, its leaves, and inputs."""
    config, random = CONFIGS[name], np.random.default_rng(0)
    family = family_of_config(config)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), family.init(config, jax.random.key(0))
    )
    inputs = {"tokens": jnp.asarray(random.integers(2, 16, (8, 6)), jnp.int32)}
    if name != "mpnet":
        inputs["decoder_tokens"] = inputs["tokens"][:, :5]
    return family.build(config, params), tree.flatten(params), inputs


@pytest.mark.parametrize("kind", ("automatic", "explicit"))
@pytest.mark.parametrize("name", CONFIGS)
def test_every_ready_table_gives_the_numbers_of_one_device(name, kind, spread_of, alike):
    (model, leaves, inputs), config = make(name), CONFIGS[name]
    function = jax.jit(lambda params, inputs: model.replace(params=params)(inputs))
    expected, spread = function(model.params, inputs), spread_of("three", kind)
    for table in TABLES.values():
        places = leaf_shardings(table(spread.mesh), leaves, config)
        whole = [path for path in places if is_table(path)]
        assert whole and all(places[path].is_fully_replicated for path in whole)
        assert any(not place.is_fully_replicated for place in places.values())
        placed = tree.nest({path: jax.device_put(leaf, places[path]) for path, leaf in leaves.items()})
        alike(function(placed, spread.rows(inputs)), expected)
        alike(function(placed, spread.everywhere(inputs)), expected)


@pytest.mark.parametrize("name", ("t5", "mpnet"))
def test_a_table_that_is_cut_gives_the_numbers_of_one_device(name, spread_of, alike):
    """Over automatic axes, where the compiler places the gather; outputs and gradients."""
    model, leaves, inputs = make(name)

    def score(params, inputs):
        outputs = model.replace(params=params)(inputs)
        weights = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)), outputs)
        return sum(jax.tree.leaves(jax.tree.map(lambda w, x: w @ x.ravel(), weights, outputs))), outputs

    program, spread = jax.jit(jax.grad(score, has_aux=True)), spread_of("three", "automatic")
    placed = spread.params(model.params)
    cut = [leaf for path, leaf in tree.flatten(placed).items() if is_table(path)]
    assert cut and all(math.prod(leaf.addressable_shards[0].data.shape) * 4 == leaf.size for leaf in cut)
    (gradients, expected), (others, found) = program(model.params, inputs), program(placed, spread.rows(inputs))
    alike(found, expected, tolerance=1e-4)
    others, gradients = (tree.flatten(each) for each in (others, gradients))
    alike(*({path: each[path] for path in each if is_table(path)} for each in (others, gradients)), tolerance=1e-3)
    # Some gradients are rounding and no more (a bias of keys), so leaves are compared by the largest of all.
    alike(*({"all": np.concatenate([np.ravel(x) for x in each.values()])} for each in (others, gradients)))
    alike(model.replace(params=placed)(spread.everywhere(inputs)), expected, tolerance=1e-4)
