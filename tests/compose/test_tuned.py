"""Coefficients and leaves trained at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tvjax import tree
from tvjax.checkpoints.coefficients import TrainingStore
from tvjax.compose import Tuned, best_start, combine, constant, few_shot, init, learn, train, tune, value
from tvjax.compose.tuned import SCALES

KEY = jax.random.key(0)
SHORT = {"key": KEY, "epochs": 2, "batches_per_epoch": 3, "batch_size": None}


@pytest.fixture
def objective(tiny):
    return few_shot(tiny.model, tiny.batch)


def test_the_loss_falls_below_that_of_coefficients_and_of_leaves_alone(tiny, objective):
    params, taus = tiny.model.params, tiny.taus
    options = {**SHORT, "epochs": 5}
    both = tune(params, taus, objective, share=0.1, **options)

    start = {path: leaf for path, leaf in tree.flatten(params).items() if leaf.dtype == jnp.float32}
    adam = {"optimiser": optax.adam, "learning_rates": (0.01,)}
    alone = [
        learn(params, taus, objective, **options),
        train(tree.replace, params, start, objective, **adam, **options),
    ]
    assert all(both.losses[-1, -1] < one.losses[-1, -1] for one in alone)
    assert both.trainable.leaves.keys() == start.keys()


def test_the_parameters_are_the_trained_leaves_and_the_vectors_in_the_stored_dtypes(tiny, objective):
    half = tree.map_with_path(
        lambda path, leaf: leaf.astype(jnp.bfloat16) if path == "dense/kernel" else leaf, tiny.model.params
    )
    tuned = tune(half, tiny.taus, objective, **SHORT).trainable
    found = jax.jit(Tuned.combine)(tuned, half, tiny.taus)
    assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, half)
    wide = tree.replace(half, tuned.leaves)
    expected = combine(wide, tiny.taus, tuned.coefficients)
    for path, leaf in tree.flatten(expected).items():
        assert not np.array_equal(wide["dense"]["kernel"], half["dense"]["kernel"])
        tolerance = 1e-2 if path == "dense/kernel" else 1e-6
        np.testing.assert_allclose(np.float32(tree.flatten(found)[path]), leaf, rtol=tolerance, atol=tolerance)
    assert found["order"] is half["order"] or np.array_equal(found["order"], half["order"])


def test_only_the_chosen_leaves_are_trained(tiny, objective):
    tuned = tune(tiny.model.params, tiny.taus, objective, leaves=["dense/*"], **SHORT).trainable
    assert sorted(tuned.leaves) == ["dense/bias", "dense/kernel"]
    for path, leaf in tuned.leaves.items():
        assert np.any(leaf != tree.flatten(tiny.model.params)[path]), path


def test_by_default_the_leaves_that_a_vector_moves_are_trained(tiny, objective):
    still = [{**tau, "scale": jnp.zeros(())} for tau in tiny.taus]
    assert "scale" not in tune(tiny.model.params, still, objective, **SHORT).trainable.leaves
    assert "scale" in tune(tiny.model.params, [*still[:2], tiny.taus[2]], objective, **SHORT).trainable.leaves


def test_a_share_near_zero_is_learning_coefficients(tiny, objective):
    options = {**SHORT, "schedule": constant}
    alone = learn(tiny.model.params, tiny.taus, objective, **options).trainable
    both = tune(tiny.model.params, tiny.taus, objective, share=1e-9, **options).trainable
    np.testing.assert_allclose(both.coefficients.values, alone.values, atol=1e-4)


def test_resumed_is_uninterrupted_to_the_bit(tiny, objective, tmp_path):
    whole = tune(tiny.model.params, tiny.taus, objective, **SHORT)

    class Failing(TrainingStore):
        def save(self, step, state):
            super().save(step, state)
            if step == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tiny.model.params, tiny.taus, objective, **SHORT, store=Failing(tmp_path / "run"))
    resumed = tune(tiny.model.params, tiny.taus, objective, **SHORT, store=TrainingStore(tmp_path / "run"))
    for a, b in zip(*map(jax.tree.leaves, (resumed.trainable, whole.trainable)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_best_start_is_the_least_objective_of_one_vector_at_one_scale(tiny, objective):
    params, taus = tiny.model.params, tiny.taus
    start = best_start(params, taus, objective, key=KEY)

    def at(coefficients):
        return float(value(objective, combine(params, taus, coefficients), [tiny.batch], KEY))

    grid = [(i, s) for i in range(len(taus)) for s in SCALES]
    zero = init(taus)
    losses = [at(dataclasses.replace(zero, values=zero.values.at[i].set(s))) for i, s in grid]
    assert at(start) == pytest.approx(min(losses), rel=1e-5)
    i, s = grid[int(np.argmin(losses))]
    assert np.all(start.values[i] == s) and not np.any(np.delete(np.asarray(start.values), i, axis=0))
    kept = init(taus, blocks="vector", names=["a", "b", "c"])
    assert best_start(params, taus, objective, key=KEY, coefficients=kept).layout == kept.layout


def test_what_cannot_be_tuned(tiny, objective):
    params, taus = tiny.model.params, tiny.taus
    for options, message in (
        ({"share": 0.0}, "share: found 0.0"),
        ({"leaves": ["nowhere/*"]}, "matches none"),
        ({"leaves": ["order"]}, "(?s)only floating.*order"),
        ({"coefficients": init(taus[:1])}, "made for 1"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(params, taus, objective, **{**SHORT, **options})
    with pytest.raises(ValueError, match="scales: found none"):
        best_start(params, taus, objective, key=KEY, scales=())
    with pytest.raises(ValueError, match="NaN at every scale"):
        best_start(params, [jax.tree.map(lambda x: x * jnp.nan, taus[0])], objective, key=KEY)
