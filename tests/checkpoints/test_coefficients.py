import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.checkpoints import save_tree
from tvjax.checkpoints.coefficients import TrainingStore, load_coefficients, save_coefficients
from tvjax.compose import init


@pytest.mark.parametrize(
    "options", [{}, {"matrices_only": True, "names": ["a", "b"]}, {"partitions": 3, "key": jax.random.key(7)}]
)
def test_saved_and_loaded_coefficients_are_the_same(options, tmp_path):
    taus = [{"w": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, {"w": {"kernel": jnp.ones((2, 2))}}]
    coefficients = init(taus, **options)
    values = jax.random.normal(jax.random.key(0), coefficients.values.shape)
    coefficients = dataclasses.replace(coefficients, values=values)
    save_coefficients(tmp_path / "c.safetensors", coefficients, {"base_model": "tiny"})
    loaded, metadata = load_coefficients(tmp_path / "c.safetensors")
    assert loaded.layout == coefficients.layout and hash(loaded.layout) == hash(coefficients.layout)
    assert loaded.values.tobytes() == coefficients.values.tobytes()
    assert metadata == {"base_model": "tiny"}


def test_other_files_are_refused(tmp_path):
    save_tree(tmp_path / "tau.safetensors", {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="holds no coefficients"):
        load_coefficients(tmp_path / "tau.safetensors")


def test_the_store_gives_back_the_newest_state(tmp_path):
    store = TrainingStore(tmp_path / "run", keep=2)
    state = {"w": jnp.arange(3.0), "scores": np.full((2, 2), np.nan), "at": np.array([1, 2], np.int32)}
    assert store.load(state) is None
    for step in (1, 2, 3):
        store.save(step, {**state, "w": state["w"] + step})
    found = TrainingStore(tmp_path / "run").load(state)
    np.testing.assert_array_equal(found["w"], state["w"] + 3)
    np.testing.assert_array_equal(found["scores"], state["scores"])
    assert found["at"].dtype == np.int32
    assert sorted(int(f.name) for f in (tmp_path / "run").iterdir() if f.name.isdigit()) == [2, 3]
    with pytest.raises(ValueError, match="another training"):
        store.load({**state, "w": jnp.arange(4.0)})
