"""Orbax directories: whole models, what a training run wrote, and shards on two devices."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
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


def module_of(params):
    """An NNX module with these parameters, its blocks a list, and a stream of random numbers beside them."""
    if not isinstance(params, dict):
        return nnx.Param(params)
    if set(params) == {str(number) for number in range(len(params))}:
        return nnx.List([module_of(params[str(number)]) for number in range(len(params))])
    module = nnx.Module()
    for name, child in params.items():
        setattr(module, name, module_of(child))
    return module


@pytest.fixture(scope="module")
def module(made_here):
    module = module_of(made_here.params)
    module.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
    return module


def states(module):
    """What a training run saves, by the subtree where the parameters are."""
    optimizer = nnx.Optimizer(module, optax.adam(1e-3), wrt=nnx.Param)
    return [
        ("", nnx.state(module, nnx.Param)),
        ("", nnx.state(module)),
        ("", nnx.split(module)[1]),
        ("", nnx.to_pure_dict(nnx.state(module, nnx.Param))),
        ("model", {"model": nnx.state(module), "optimizer": nnx.state(optimizer)}),
    ]


@pytest.mark.parametrize("number", range(5))
def test_the_states_of_nnx(made_here, module, tmp_path, number):
    subtree, state = states(module)[number]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", state)
    loaded = load_orbax(tmp_path / "run", config=CONFIG, subtree=subtree)
    chex.assert_trees_all_equal(loaded.params, made_here.params)
    chex.assert_trees_all_equal_dtypes(loaded.params, made_here.params)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), made_here.params)
    half = load_orbax(tmp_path / "run", config=CONFIG, subtree=subtree, abstract=abstract)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}


def test_what_is_missing_in_a_state_of_nnx_is_named_as_a_parameter(module, tmp_path):
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    without = nnx.from_flat_state([(path, leaf) for path, leaf in state if path[-1] != "bias" or "head" not in path])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", without)
    with pytest.raises(ValueError, match="head/bias is missing"):
        load_orbax(tmp_path / "run", config=CONFIG)


def test_the_items_of_a_checkpoint_manager(made_here, module, tmp_path):
    state = nnx.state(module, nnx.Param)
    with ocp.CheckpointManager(tmp_path / "one") as manager:
        manager.save(3, args=ocp.args.StandardSave(state))
    with ocp.CheckpointManager(tmp_path / "several") as manager:
        items = {"state": ocp.args.StandardSave({"params": state}), "optimizer": ocp.args.StandardSave({"a": 1})}
        manager.save(7, args=ocp.args.Composite(**items, about=ocp.args.JsonSave({"task": "birds"})))
    for folder, subtree in (
        ("one/3", ""),
        ("one/3/default", ""),
        ("several/7", "state/params"),
        ("several/7/state", "params"),
    ):
        loaded = load_orbax(tmp_path / folder, config=CONFIG, subtree=subtree)
        chex.assert_trees_all_equal(loaded.params, made_here.params)
    with pytest.raises(ValueError, match=r"holds optimizer, state: name the one with the parameters"):
        load_orbax(tmp_path / "several/7", config=CONFIG)
    with pytest.raises(ValueError, match=r"(?s)holds the steps .*7\ngive one, such as .*several/7"):
        load_orbax(tmp_path / "several", config=CONFIG)


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
