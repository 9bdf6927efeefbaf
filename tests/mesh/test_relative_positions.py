"""Models with a table of relative positions, placed by every ready table: the numbers of one device."""

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


@pytest.mark.parametrize("kind", ("automatic", "explicit"))
@pytest.mark.parametrize("name", CONFIGS)
def test_every_ready_table_gives_the_numbers_of_one_device(name, kind, spread_of, alike):
    config, random = CONFIGS[name], np.random.default_rng(0)
    family = family_of_config(config)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), family.init(config, jax.random.key(0))
    )
    model, leaves = family.build(config, params), tree.flatten(params)
    inputs = {"tokens": jnp.asarray(random.integers(2, 16, (8, 6)), jnp.int32)}
    if name != "mpnet":
        inputs["decoder_tokens"] = inputs["tokens"][:, :5]
    function = jax.jit(lambda params, inputs: model.replace(params=params)(inputs))
    expected, spread = function(params, inputs), spread_of("three", kind)
    for table in TABLES.values():
        places = leaf_shardings(table(spread.mesh), leaves, config)
        whole = [path for path in places if "position_bias" in path or "relative_bias" in path]
        assert whole and all(places[path].is_fully_replicated for path in whole)
        assert any(not place.is_fully_replicated for place in places.values())
        placed = tree.nest({path: jax.device_put(leaf, places[path]) for path, leaf in leaves.items()})
        alike(function(placed, spread.rows(inputs)), expected)
        alike(function(placed, spread.everywhere(inputs)), expected)
