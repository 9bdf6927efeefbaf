import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvjax.checkpoints.coefficients import TrainingStore
from tvjax.compose import (
    ada_merging,
    combine,
    constant,
    entropy,
    few_shot,
    init,
    learn,
    negation,
    of_loss,
    patience,
    scaled,
    train,
    value,
)
from tvjax.compose.train import _order

KEY = jax.random.key(0)


def sgd(learning_rate):
    return optax.sgd(learning_rate)


def itself(fixed, trainable):
    return trainable


def shaken(key, inputs):
    return {"pixels": inputs["pixels"] + 0.1 * jax.random.normal(key, inputs["pixels"].shape)}


class Memory:
    """A store that fails when it is asked to, after it has saved."""

    def __init__(self, fail_at=None):
        self.state, self.fail_at, self.steps = None, fail_at, []

    def load(self, like):
        return self.state

    def save(self, step, state):
        self.state = state
        self.steps.append(step)
        if step == self.fail_at:
            raise KeyboardInterrupt


def told(scores, params):
    return next(scores)


def assert_same(one, other):
    assert (one.learning_rate, one.epochs, one.score) == (other.learning_rate, other.epochs, other.score)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def few(tiny):
    """Options of a small training, and a score."""
    objective = few_shot(tiny.model, tiny.batch, shaken)
    validation = tiny.make_batch(20, 9)

    def score(params):
        losses = tiny.model.loss(None, tiny.model.replace(params=params)(validation.inputs), validation.labels)
        return -float(losses.mean())

    options = {"key": KEY, "batch_size": 8, "epochs": 3, "batches_per_epoch": 4, "learning_rates": (0.01, 0.1)}
    return tiny.model.params, tiny.taus, objective, {**options, "score": score}


def test_one_step_of_gradient_descent_is_the_step_it_should_be(tiny):
    objective = few_shot(tiny.model, tiny.batch)
    start = init(tiny.taus, value=0.1)
    options = {"optimiser": sgd, "schedule": constant, "epochs": 1, "batches_per_epoch": 1, "batch_size": None}
    found = learn(tiny.model.params, tiny.taus, objective, key=KEY, coefficients=start, **options)

    def loss(coefficients):
        return value(objective, combine(tiny.model.params, tiny.taus, coefficients), [tiny.batch], KEY)

    expected = start.values - 0.1 * jax.grad(loss)(start).values
    np.testing.assert_allclose(found.trainable.values, expected, atol=1e-6)
    assert found.losses.shape == (1, 1) and found.losses[0, 0] == pytest.approx(float(loss(start)), rel=1e-6)


def test_the_loss_falls_and_only_coefficients_change(few):
    params, taus, objective, options = few
    before = jax.tree.map(lambda leaf: leaf.tobytes(), (params, taus))
    found = learn(params, taus, objective, key=KEY, epochs=10, batch_size=24)
    assert found.losses.shape == (10, 10) and found.losses[-1].mean() < 0.7 * found.losses[0, 0]
    assert before == jax.tree.map(lambda leaf: leaf.tobytes(), (params, taus))
    assert found.score is None and found.epochs == 10 and found.learning_rate == 0.1


def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(few):
    params, taus, objective, options = few
    whole = learn(params, taus, objective, **options)
    for fail_at in (1, 3, 5):
        memory = Memory(fail_at)
        with pytest.raises(KeyboardInterrupt):
            learn(params, taus, objective, **options, store=memory)
        memory.fail_at = None
        for _ in range(2):  # the second time nothing is left to do
            assert_same(learn(params, taus, objective, **options, store=memory), whole)
            assert memory.steps == [1, 2, 3, 4, 5, 6]


def test_orbax_resumes_to_the_bit(few, tmp_path):
    params, taus, objective, options = few
    whole = learn(params, taus, objective, **options)

    class Failing(TrainingStore):
        def save(self, step, state):
            super().save(step, state)
            if step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(params, taus, objective, **options, store=Failing(tmp_path / "run"))
    steps = []
    resumed = learn(
        params, taus, objective, **options, store=TrainingStore(tmp_path / "run"), progress=lambda *at: steps.append(at)
    )
    assert_same(resumed, whole)
    assert [step[:2] for step in steps] == [(5, 6), (6, 6)] and "learning rate 0.1, epoch 3: loss" in steps[-1][2]
    with pytest.raises(ValueError, match="another training"):
        learn(params, taus, objective, **{**options, "epochs": 4}, store=TrainingStore(tmp_path / "run"))
    with pytest.raises(ValueError, match="other settings, data shapes or key"):
        learn(params, taus, objective, **{**options, "key": jax.random.key(1)}, store=TrainingStore(tmp_path / "run"))


def test_learning_rate_and_epochs_are_those_of_the_best_score(few):
    params, taus, objective, options = few
    chosen = learn(params, taus, objective, **options)
    assert chosen.scores.shape == (2, 3) and np.isfinite(chosen.scores).all()
    again = options["score"](combine(params, taus, chosen.trainable))
    assert chosen.score == chosen.scores.max() == pytest.approx(again, rel=1e-6)
    rate, epoch = np.unravel_index(chosen.scores.argmax(), (2, 3))
    assert (chosen.learning_rate, chosen.epochs) == ((0.01, 0.1)[rate], epoch + 1)
    assert chosen.losses.shape == (chosen.epochs, 4)
    alone = learn(params, taus, objective, **{**options, "learning_rates": (chosen.learning_rate,)})
    np.testing.assert_array_equal(chosen.scores[rate], alone.scores[0])


def test_ties_go_to_the_smaller_learning_rate_and_then_to_fewer_epochs(few):
    params, taus, objective, options = few
    for scores, expected in (([0, 1, 1, 1, 0, 0], (0.01, 2)), ([0, 0, 1, 0, 2, 2], (0.1, 2))):
        given = {**options, "learning_rates": (0.1, 0.01), "score": partial(told, iter(scores))}
        found = learn(params, taus, objective, **given)
        assert (found.learning_rate, found.epochs) == expected


def test_a_rule_stops_one_learning_rate_and_the_next_begins(few):
    params, taus, objective, options = few
    given = iter([3, 2, 1, 4, 5, 6, 5, 4])
    found = learn(
        params, taus, objective, **{**options, "epochs": 5, "score": lambda _: next(given), "stop": patience(2)}
    )
    np.testing.assert_array_equal(found.scores, [[3, 2, 1, np.nan, np.nan], [4, 5, 6, 5, 4]])
    assert (found.learning_rate, found.epochs, found.score) == (0.1, 3, 6)


def test_pieces_of_a_batch_give_the_step_of_the_batch(tiny):
    batches = [tiny.batch, tiny.make_batch(16, 1)]
    objective = negation(*((tiny.model, b) for b in batches))
    options = {"key": KEY, "epochs": 2, "batches_per_epoch": 2, "optimiser": sgd}
    for size in (None, 8):
        one, pieces = (
            learn(tiny.model.params, tiny.taus, objective, **options, batch_size=size, micro_batches=count)
            for count in (1, 4)
        )
        np.testing.assert_allclose(pieces.trainable.values, one.trainable.values, atol=1e-6)
        np.testing.assert_allclose(pieces.losses, one.losses, atol=1e-5)
        assert np.abs(one.trainable.values).max() > 1e-3


def test_batches_over_two_devices_give_the_result_of_one(tiny):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    spread = jax.device_put(tiny.batch, NamedSharding(mesh, PartitionSpec("data")))
    options = {"key": KEY, "batch_size": 8, "epochs": 2, "batches_per_epoch": 3, "micro_batches": 1}
    one, two = (
        learn(tiny.model.params, tiny.taus, few_shot(tiny.model, batch), **options) for batch in (tiny.batch, spread)
    )
    assert len(two.trainable.values.sharding.device_set) == 2
    np.testing.assert_allclose(two.trainable.values, one.trainable.values, atol=1e-5)
    np.testing.assert_allclose(two.losses, one.losses, atol=1e-5)


def test_every_pass_shows_every_example_once():
    order = np.asarray(_order(KEY, 7, 6, 5)).reshape(-1)
    for start in range(0, 28, 7):
        assert sorted(order[start : start + 7]) == list(range(7))
    assert not np.array_equal(order[:7], order[7:14])
    assert sorted(np.asarray(_order(KEY, 100, 10, 10)).reshape(-1)) == list(range(100))


def test_the_default_epoch_has_ten_batches_at_least(tiny):
    short, long = (
        train(itself, None, {"w": jnp.zeros(())}, of_loss(lambda p, b: p["w"] * b, jnp.ones(count)), key=KEY, epochs=1)
        for count in (20, 1400)
    )
    assert short.losses.shape == (1, 10) and long.losses.shape == (1, 11)


def test_the_schedule_ends_where_the_training_does():
    def loss(params, batch):
        return params["w"] * batch

    options = {"optimiser": sgd, "learning_rates": (1.0,), "epochs": 2, "batches_per_epoch": 4, "batch_size": None}
    found = train(itself, None, {"w": jnp.zeros(())}, of_loss(loss, jnp.ones(3)), key=KEY, **options)
    steps = 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8))
    np.testing.assert_allclose(found.trainable["w"], -steps.sum(), rtol=1e-5)


def test_the_random_numbers_of_each_epoch_differ(tiny):
    def loss(params, batch):
        return params["w"] * batch.sum()

    found = train(
        itself, None, {"w": jnp.ones(())}, of_loss(loss, jnp.arange(50.0)), key=KEY, epochs=2, batch_size=3,
        learning_rates=(1e-30,),  # moves nothing
    )  # fmt: skip
    assert not np.allclose(np.sort(found.losses[0]), np.sort(found.losses[1]))


def test_negation_forgets_the_target_and_keeps_the_control(tiny):
    model, control = tiny.model, tiny.make_batch(24, 5)
    taus = [tiny.noise(model.params, seed) for seed in range(8)]
    both = few_shot(model, tiny.batch)[0], few_shot(model, control)[0]

    def change(objective, **options):
        """How the losses on the target and on the control change."""
        found = learn(model.params, taus, objective, key=KEY, batch_size=None, schedule=constant, **options)
        points = [combine(model.params, taus, c) for c in (init(taus), found.trainable)]
        before, after = ([float(value((term,), p, [term.examples], KEY)) for term in both] for p in points)
        return np.subtract(after, before)

    options = {"learning_rates": (5e-3,), "epochs": 2}
    kept = change(negation((model, tiny.batch), (model, control)), **options)
    lost = change(scaled(few_shot(model, tiny.batch), -1.0), **options)
    assert kept[0] > 0.1 and kept[1] < 0 and lost[1] > 0.1


def test_entropy_falls(tiny):
    objective = entropy(tiny.model, tiny.batch.inputs)
    found = learn(tiny.model.params, tiny.taus, objective, key=KEY, batch_size=None, epochs=3)
    assert (np.diff(found.losses.reshape(-1)) < 0).mean() > 0.9
    assert found.losses[-1, -1] < 0.8 * found.losses[0, 0]


@pytest.mark.parametrize("blocks", ["leaf", "vector"])
def test_ada_merging_lowers_the_entropy_of_the_even_merge(tiny, blocks):
    tasks = [(tiny.model, tiny.batch.inputs), (tiny.model, tiny.make_batch(16, 3).inputs)]
    found = ada_merging(tiny.model.params, tiny.taus, tasks, key=KEY, blocks=blocks, epochs=4, learning_rates=(1e-2,))
    even = init(tiny.taus, blocks=blocks, value=0.3)

    def total(coefficients):
        params = combine(tiny.model.params, tiny.taus, coefficients)
        return sum(float(value(entropy(m, x), params, [x], KEY)) for m, x in tasks)

    assert total(found.trainable) < 0.9 * total(even)
    assert found.trainable.layout == even.layout


def test_bad_requests_are_refused(few, tiny):
    params, taus, objective, options = few
    for changes, message in (
        ({"learning_rates": ()}, "one of each at least"),
        ({"epochs": 0}, "one of each at least"),
        ({"score": None}, "but no score"),
        ({"score": None, "learning_rates": (0.1,), "stop": patience(1)}, "a rule to stop but no score"),
        ({"batch_size": 0}, "None for all examples"),
        ({"micro_batches": 3}, "do not divide a batch of 8"),
        ({"score": lambda _: float("nan")}, "found NaN after epoch 1"),
        ({"coefficients": init(taus[:1])}, "found 3 task vectors"),
    ):
        with pytest.raises(ValueError, match=message):
            learn(params, taus, objective, **{**options, **changes})
    with pytest.raises(ValueError, match="found no terms"):
        learn(params, taus, (), **options)
    with pytest.raises(ValueError, match=r"leading axes \[2, 3\]"):
        learn(params, taus, of_loss(lambda p, b: 0.0, [jnp.ones(2), jnp.ones(3)]), **options)
    with pytest.raises(ValueError, match="1 epoch or more"):
        patience(0)
    assert dataclasses.is_dataclass(objective[0])
