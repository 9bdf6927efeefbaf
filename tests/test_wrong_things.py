"""A thing of another kind than the one that is meant, such as what `load` gives in the place of its model or leaves."""

import re

import jax.numpy as jnp
import pytest

import tvjax as tv
from tvjax.data.embedded import model_folder, task_vector_file

LEAVES = {"w": jnp.ones((2, 2))}


@pytest.fixture(scope="module")
def loaded():
    return tv.load(model_folder("A"))


@pytest.fixture
def model():
    return tv.single_stage(lambda params, x: x @ params["w"], LEAVES)


@pytest.mark.parametrize("function", [tv.fit, tv.plan])
def test_a_model_and_a_transport_are_what_they_say(loaded, model, function):
    rows = [tv.Batch(jnp.ones((3, 2)))]
    with pytest.raises(ValueError, match=r"the source is a Pretrained, expected a tvjax.Model: give its .model"):
        function(tv.theseus(), loaded, model, rows)
    with pytest.raises(ValueError, match="the target is a dict, expected a tvjax.Model$"):
        function(tv.theseus(), model, LEAVES, rows)
    with pytest.raises(ValueError, match="the transport is a str, expected"):
        function("theseus", model, model, rows)


def test_leaves_are_arrays_and_no_whole_model(loaded):
    found = re.escape("found a Pretrained where an array is expected: give its .params")
    for wrong in (lambda: tv.apply(loaded, LEAVES), lambda: tv.apply(LEAVES, loaded)):
        with pytest.raises(ValueError, match=found):
            wrong()
    with pytest.raises(ValueError, match=found):
        tv.task_vector(loaded, loaded)
    with pytest.raises(ValueError, match="found a str where an array is expected$"):
        tv.apply(LEAVES, LEAVES, "1")


def test_what_is_saved_loaded_and_cited(loaded, tmp_path):
    with pytest.raises(ValueError, match="found a dict to save, expected a model as tvjax.load gives it"):
        tv.save(loaded.params, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="is a file, expected the folder of a Hugging Face model, or a hub id"):
        tv.load(task_vector_file("A", "thick"))
    with pytest.raises(ValueError, match="found a int, expected the name of a method or a transport"):
        tv.cite(3)
