"""Where the parameters of another code lie in what its training run wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tvjax import interop, tree
from tvjax.checkpoints import Pretrained, save_pretrained
from tvjax.checkpoints.code_trees import find_code_tree, load_code_tree
from tvjax.models.families import shapes_of
from tvjax.models.llama import LlamaConfig, llama

CONFIG = LlamaConfig(20, 16, 24, 2, 4, 2, head_dim=4)


def save(folder, state):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(folder, state)


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0).normal
    return tree.nest({path: draw(size=shape).astype(np.float32) for path, shape in shapes_of(CONFIG).items()})


def test_the_parameters_beside_the_moments_of_an_optimizer(params, tmp_path):
    theirs = {"params": interop.to_maxtext(params, CONFIG)}
    moments = jax.tree.map(np.zeros_like, theirs)
    save(tmp_path / "run/7/items", {"step": jnp.array(7), "params": theirs, "opt_state": {"mu": moments}})
    save_pretrained(Pretrained(llama(CONFIG, params), CONFIG), tmp_path / "model")
    found = find_code_tree(tmp_path / "run")
    assert found == ("maxtext", tmp_path / "run/7/items", "params/params")
    loaded = load_code_tree(found, tmp_path / "run", like=tmp_path / "model")
    assert loaded.config == CONFIG
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, params))
    deep = LlamaConfig(20, 16, 24, 3, 4, 2, head_dim=4)
    grown = tree.nest({path: np.zeros(shape, np.float32) for path, shape in shapes_of(deep).items()})
    save_pretrained(Pretrained(llama(deep, grown), deep), tmp_path / "deeper")
    with pytest.raises(ValueError, match=r"(?s)9 leaves are not those of MaxText's tree.*decoder/layers/2/.*: missing"):
        load_code_tree(found, tmp_path / "run", like=tmp_path / "deeper")


def test_two_trees_in_one_and_none(params, tmp_path):
    theirs = interop.to_tunix(params, CONFIG)["embedder"]
    save(tmp_path / "two", {"policy": {"embedder": theirs}, "reference": {"embedder": theirs}})
    with pytest.raises(ValueError, match=r"holds 2 parameter trees, under \['policy', 'reference'\]"):
        find_code_tree(tmp_path / "two")
    save(tmp_path / "none", {"kernel": np.ones(2)})
    assert find_code_tree(tmp_path / "none") is None and find_code_tree(tmp_path / "nowhere") is None
