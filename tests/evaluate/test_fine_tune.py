import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tvjax.data.batches import as_batch
from tvjax.evaluate.accuracy import accuracy
from tvjax.evaluate.fine_tune import fine_tune
from tvjax.stages import Batch, Model, Stage


def hidden(params, carry):
    return jnp.tanh(carry @ params["kernel"].astype(carry.dtype))


def head(params, carry):
    return {"logits": carry @ params["kernel"]}


def cross_entropy(loss_params, outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], labels)


@pytest.fixture
def model():
    one, two = jax.random.split(jax.random.key(1))
    params = {
        "hidden": {"kernel": jax.random.normal(one, (4, 8)).astype(jnp.float16)},
        "head": {"kernel": jax.random.normal(two, (8, 3))},
    }
    stages = (Stage("hidden", hidden, (("", "hidden"),)), Stage("head", head, (("", "head"),)))
    return Model(params, stages, cross_entropy)


@pytest.fixture
def data(key):
    one, two = jax.random.split(key)
    inputs = jax.random.normal(one, (90, 4))
    labels = np.asarray((inputs @ jax.random.normal(two, (4, 3))).argmax(1))
    return as_batch(inputs[:60], labels[:60]), as_batch(inputs[60:], labels[60:])


@pytest.mark.parametrize("batch_size", [None, 16])
def test_the_loss_falls_and_examples_are_learned(model, data, key, batch_size):
    train, test = data
    tuned = fine_tune(model, train, steps=200, learning_rates=(0.02,), batch_size=batch_size, key=key)
    assert tuned.losses.shape == (200,) and tuned.losses[-20:].mean() < 0.4 * tuned.losses[0]
    assert tuned.steps == 200 and tuned.accuracy is None
    before, after = (accuracy(m, test).fraction for m in (model, model.replace(params=tuned.params)))
    assert after > before + 0.2


def test_full_batch_gradient_descent_takes_the_step_it_should(model, data, key):
    train, _ = data
    tuned = fine_tune(model, train, steps=1, learning_rates=(0.1,), optimiser=optax.sgd, key=key)

    def loss(params):
        outputs = model.replace(params=params)(train.inputs)
        return cross_entropy(None, outputs, train.labels).mean()

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    expected = jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, params, jax.grad(loss)(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), tuned.params, expected)


def test_only_the_chosen_leaves_change(model, data, key):
    tuned = fine_tune(model, data[0], steps=5, trainable=("hidden/*",), key=key).params
    assert tuned["head"]["kernel"] is model.params["head"]["kernel"]
    assert tuned["hidden"]["kernel"].dtype == jnp.float32
    assert np.abs(tuned["hidden"]["kernel"] - model.params["hidden"]["kernel"].astype(jnp.float32)).max() > 1e-3


def test_same_key_same_bytes(model, data, key):
    one, two = (fine_tune(model, data[0], steps=10, batch_size=8, key=key).params for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_learning_rate_and_steps_are_those_of_the_best_validation_accuracy(model, data, key):
    train, validation = data
    rates = (1e-6, 0.03)
    chosen = fine_tune(model, train, steps=60, checkpoints=3, learning_rates=rates, validation=validation, key=key)
    curve = {
        (rate, steps): accuracy(
            model.replace(params=fine_tune(model, train, steps=steps, learning_rates=(rate,), key=key).params),
            validation,
        ).fraction
        for rate in rates
        for steps in (20, 40, 60)
    }
    assert chosen.accuracy == max(curve.values())
    assert (chosen.learning_rate, chosen.steps) == pytest.approx(max(curve, key=curve.get))
    assert len(chosen.losses) == chosen.steps
    assert accuracy(model.replace(params=chosen.params), validation).fraction == chosen.accuracy


def test_a_score_chooses_in_the_place_of_validation_data(model, data, key):
    train, validation = data
    asked = []

    def score(params):
        asked.append(accuracy(model.replace(params=params), validation).fraction)
        return -asked[-1]

    options = {"steps": 20, "checkpoints": 2, "learning_rates": (0.03, 1e-6), "key": key}
    worst = fine_tune(model, train, score=score, **options)
    assert len(asked) == 4 and worst.accuracy == -min(asked)
    assert worst.learning_rate == pytest.approx(1e-6)
    best = fine_tune(model, train, validation=validation, **options)
    assert best.accuracy == max(asked) > min(asked)


def test_bad_requests_are_refused(model, data, key):
    train, _ = data
    with pytest.raises(ValueError, match="found no labels"):
        fine_tune(model, Batch(train.inputs), steps=1, key=key)
    with pytest.raises(ValueError, match="positive multiple of checkpoints"):
        fine_tune(model, train, steps=5, checkpoints=2, key=key)
    with pytest.raises(ValueError, match="expected validation data"):
        fine_tune(model, train, steps=5, learning_rates=(0.1, 0.2), key=key)
    with pytest.raises(ValueError, match="found validation data and a score"):
        fine_tune(model, train, steps=5, validation=train, score=lambda params: 0.0, key=key)
    with pytest.raises(ValueError, match=r"no floating leaf matches \['nothing/\*'\]"):
        fine_tune(model, train, steps=5, trainable=("nothing/*",), key=key)
