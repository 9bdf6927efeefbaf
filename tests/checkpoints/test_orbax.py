"""Orbax directories: whole models, what a training run wrote, and shards on two devices."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tvjax import tree
from tvjax.checkpoints import Pretrained, load_orbax, save_orbax
from tvjax.models.vit import ViTConfig, modeling, vit

CONFIG = ViTConfig(8, 16, 1, 2, image_size=8, patch_size=4)


@pytest.fixture(scope="module")
def made_here():
    params = modeling.init(CONFIG, jax.random.key(0))
    params["head"]["bias"] = params["head"]["bias"].astype(jnp.bfloat16)
    return Pretrained(vit(CONFIG, params), CONFIG)


@pytest.fixture
def folder(made_here, tmp_path):
    save_orbax(made_here, tmp_path / "model")
    return tmp_path / "model"


def test_a_model_round_trips(made_here, folder):
    loaded = load_orbax(folder)
    chex.assert_trees_all_equal(loaded.params, made_here.params)
    chex.assert_trees_all_equal_dtypes(loaded.params, made_here.params)
    assert loaded.config == CONFIG and loaded.folder == folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "params"}
    assert list(folder.parent.iterdir()) == [folder]
    with pytest.raises(ValueError, match="exists: give a new folder"):
        save_orbax(made_here, folder)


def test_shards_and_dtypes_of_an_abstract_tree(made_here, folder):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def abstract(leaf):
        spec = PartitionSpec("x") if leaf.ndim and leaf.shape[0] % 2 == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    wanted = jax.tree.map(abstract, made_here.params)
    loaded = load_orbax(folder, abstract=wanted).params
    for path, leaf in tree.flatten(loaded).items():
        assert leaf.sharding == tree.flatten(wanted)[path].sharding and leaf.dtype == jnp.bfloat16
    kernel = loaded["vision"]["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 16)}
    chex.assert_trees_all_equal(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), made_here.params))
    sharded = made_here.with_params(loaded)
    save_orbax(sharded, folder.parent / "again")
    chex.assert_trees_all_equal(load_orbax(folder.parent / "again").params, jax.device_get(loaded))


def test_the_state_of_a_training_run(made_here, tmp_path):
    state = {"params": made_here.params, "step": 7, "momentum": {"head": jnp.ones(3)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", state)
    loaded = load_orbax(tmp_path / "run", config=CONFIG, subtree="params")
    chex.assert_trees_all_equal(loaded.params, made_here.params)
    with pytest.raises(ValueError, match="(?s)parameters do not fit .*momentum/head is surplus"):
        load_orbax(tmp_path / "run", config=CONFIG)
    with pytest.raises(ValueError, match="no subtree 'weights'"):
        load_orbax(tmp_path / "run", config=CONFIG, subtree="weights")


def test_what_is_no_model(made_here, folder, tmp_path):
    with pytest.raises(ValueError, match="has no config.json: is it a folder of save_orbax"):
        load_orbax(tmp_path)
    with pytest.raises(ValueError, match="is no complete Orbax directory"):
        load_orbax(tmp_path, config=CONFIG)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_size": 16}))
    with pytest.raises(ValueError, match=r"parameters do not fit the ViTConfig: head/kernel is \[8, 2\]"):
        load_orbax(folder)
    broken = tree.replace(made_here.params, {"head/bias": jnp.full(2, np.nan)})
    save_orbax(made_here.with_params(broken), tmp_path / "broken")
    with pytest.raises(ValueError, match="(?s)has values that are NaN or infinite.*head/bias: 2 of 2"):
        load_orbax(tmp_path / "broken")
