"""A thing of another kind than the one that is meant, such as what `load` gives in the place of its model or leaves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import checkpoints, compose, evaluate
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


def test_a_factor_at_hand_is_finite():
    for wrong in (float("nan"), np.float32("inf"), np.array(-np.inf)):
        for edit in (lambda x: tv.apply(LEAVES, LEAVES, x), lambda x: tv.interpolate(LEAVES, LEAVES, x)):
            with pytest.raises(ValueError, match=f"the scale must be finite, found {wrong}$"):
                edit(wrong)
        with pytest.raises(ValueError, match=r"the factor of '\*\*' must be finite"):
            tv.scale(LEAVES, wrong)
        with pytest.raises(ValueError, match="the factor must be finite"):
            tv.scale_by(wrong)
    nothing = tv.apply(LEAVES, LEAVES, jnp.float32(jnp.nan))  # no sum waits for a device to look
    assert bool(jnp.isnan(nothing["w"]).all())


def entries_of_a_model():
    rows, key = [tv.Batch(jnp.ones((3, 2)), jnp.zeros(3, jnp.int32))], jax.random.key(0)
    inputs = rows[0].inputs
    return {
        "few_shot": lambda model: compose.few_shot(model, rows[0]),
        "addition": lambda model: compose.addition([(model, rows[0])]),
        "entropy": lambda model: compose.entropy(model, inputs),
        "fix_match": lambda model: compose.fix_match(model, inputs, weak=lambda k, x: x, strong=lambda k, x: x),
        "distillation": lambda model: compose.distillation(model, inputs, jnp.ones((3, 2))),
        "class_scores": lambda model: compose.class_scores(model, rows),
        "linearise": compose.linearise,
        "logit_correction": lambda model: tv.logit_correction(model, jnp.ones((3, 2)), rows),
        "predictions": lambda model: evaluate.predictions(model, rows),
        "predict": lambda model: evaluate.predict(model, inputs),
        "choose_scale": lambda model: evaluate.choose_scale(model, LEAVES, [0.0, 1.0], rows),
        "scale_of_least_loss": lambda model: evaluate.scale_of_least_loss(model, LEAVES, [0.0, 1.0], rows),
        "fine_tune": lambda model: evaluate.fine_tune(model, rows[0], steps=1, key=key),
        "diagonal_fisher": lambda model: tv.merge.diagonal_fisher(model, rows),
        "input_grams": lambda model: tv.merge.input_grams(model, rows),
        "regmean_plus_plus": lambda model: tv.merge.regmean_plus_plus([LEAVES], model, [rows]),
    }


@pytest.mark.parametrize("name", entries_of_a_model())
def test_whatever_takes_a_model_says_when_it_is_none(name, loaded):
    call = entries_of_a_model()[name]
    for wrong, found in ((loaded, "a Pretrained, expected a tvjax.Model: give its .model$"), (LEAVES, "a dict, exp")):
        with pytest.raises(ValueError, match=f"the (model|teacher) is {found}"):
            call(wrong)


def test_what_is_learned_from_is_parameters_and_an_objective(loaded, model):
    goal, key = compose.of_loss(lambda params, x: x @ params["w"], jnp.ones((3, 2))), jax.random.key(0)
    for function in (compose.learn, compose.tune, compose.best_start):
        with pytest.raises(ValueError, match=r"found a Pretrained where an array is expected: give its \.params"):
            function(loaded, [LEAVES], goal, key=key)
        with pytest.raises(ValueError, match=r"the objective is a Model, expected what tvjax\.compose\.few_shot"):
            function(LEAVES, [LEAVES], model, key=key)
    with pytest.raises(ValueError, match=r"the coefficients are a float, expected what tvjax\.compose\.init gives"):
        compose.combine(LEAVES, [LEAVES], 0.3)
    with pytest.raises(TypeError, match="PRNG key"):
        compose.learn(LEAVES, [LEAVES], goal, key=0)


@pytest.mark.parametrize("wrong, found", [(None, "None"), (3, "an int"), (b"x", "a bytes"), (LEAVES, "a dict")])
def test_a_path_is_a_path(wrong, found, loaded, tmp_path):
    coefficients = compose.init([LEAVES])
    calls = [
        lambda: tv.load(wrong),
        lambda: tv.load_task_vector(wrong),
        lambda: tv.save(loaded, wrong),
        lambda: tv.save_task_vector(wrong, LEAVES),
        lambda: checkpoints.map_tree(wrong),
        lambda: checkpoints.load_coefficients(wrong),
        lambda: checkpoints.save_coefficients(wrong, coefficients),
        lambda: checkpoints.load_orbax(wrong),
        lambda: checkpoints.save_orbax(loaded, wrong),
        lambda: checkpoints.load_state(wrong),
        lambda: checkpoints.load_processor(wrong),
        lambda: checkpoints.load_adapter(wrong, loaded),
        lambda: checkpoints.save_adapter({}, wrong, loaded),
        lambda: checkpoints.convert(wrong, tmp_path / "converted"),
        lambda: checkpoints.convert(model_folder("A"), wrong),
        lambda: checkpoints.TransportStore(wrong, depends_on={}),
        lambda: checkpoints.TrainingStore(wrong),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"found {found}, expected (the path|the folder|a model's folder)"):
            call()


def test_what_is_saved_loaded_and_cited(loaded, tmp_path):
    with pytest.raises(ValueError, match="found a dict to save, expected a model as tvjax.load gives it"):
        tv.save(loaded.params, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="is a file, expected the folder of a Hugging Face model, or a hub id"):
        tv.load(task_vector_file("A", "thick"))
    with pytest.raises(ValueError, match="found an int, expected the name of a method or a transport"):
        tv.cite(3)
