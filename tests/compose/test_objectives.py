import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.compose import (
    addition,
    average,
    entropy,
    few_shot,
    fix_match,
    negation,
    of_loss,
    scaled,
    trusted_examples,
    value,
)
from tvjax.stages import Batch, single_stage

KEY = jax.random.key(0)


def table(params, inputs):
    """A model that returns its inputs, scaled: the examples are their own logits."""
    return {"logits": params["w"] * inputs["scores"]}


def doubled(key, inputs):
    return {"scores": 2 * inputs["scores"]}


def noisy(key, inputs):
    return {"scores": inputs["scores"] + jax.random.normal(key, inputs["scores"].shape)}


def same(key, inputs):
    return inputs


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture
def mirror():
    return single_stage(table, {"w": jnp.float32(1)})


def test_few_shot_is_the_mean_loss(tiny):
    losses = tiny.model.loss(None, tiny.model(tiny.batch.inputs), tiny.batch.labels)
    found = value(few_shot(tiny.model, tiny.batch), tiny.model.params, [tiny.batch], KEY)
    np.testing.assert_allclose(found, losses.mean(), rtol=1e-6)


def test_views_are_drawn_from_the_key(tiny):
    def shaken(key, inputs):
        return {"pixels": inputs["pixels"] + jax.random.normal(key, inputs["pixels"].shape)}

    objective = few_shot(tiny.model, tiny.batch, shaken)
    one, again, other = (
        float(value(objective, tiny.model.params, [tiny.batch], jax.random.key(seed))) for seed in (0, 0, 1)
    )
    assert one == again != other


def test_addition_is_the_mean_over_tasks_with_their_own_heads(tiny):
    head = tiny.model.replace(loss_params=jnp.arange(5.0))
    batches = [tiny.batch, tiny.make_batch(12, 1)]
    found = value(addition([(tiny.model, batches[0]), (head, batches[1])]), tiny.model.params, batches, KEY)
    own = [value(few_shot(m, b), tiny.model.params, [b], KEY) for m, b in zip((tiny.model, head), batches, strict=True)]
    np.testing.assert_allclose(found, (own[0] + own[1]) / 2, rtol=1e-6)
    assert abs(own[0] - own[1]) > 0.1


def test_negation_is_minus_the_target_plus_the_control(tiny):
    batches = [tiny.batch, tiny.make_batch(12, 1)]
    objective = negation((tiny.model, batches[0]), (tiny.model, batches[1]))
    target, control = (value(few_shot(tiny.model, b), tiny.model.params, [b], KEY) for b in batches)
    np.testing.assert_allclose(value(objective, tiny.model.params, batches, KEY), control - target, rtol=1e-5)
    np.testing.assert_allclose(
        value(scaled(objective, -2.0), tiny.model.params, batches, KEY), 2 * (target - control), rtol=1e-5
    )


def test_entropy_is_what_numpy_says(mirror):
    scores = jnp.array([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    logs = log_softmax(scores)
    found = value(entropy(mirror, {"scores": scores}), mirror.params, [{"scores": scores}], KEY)
    np.testing.assert_allclose(found, -(np.exp(logs) * logs).sum(-1).mean(), rtol=1e-6)


def test_any_loss_of_parameters_is_an_objective():
    objective = of_loss(lambda params, batch: params["w"] * batch, jnp.arange(4.0))
    assert float(value(objective, {"w": jnp.float32(2)}, [jnp.array([1.0, 3.0])], KEY)) == 4.0
    assert objective[0].count == 4


def test_the_trusted_examples_are_the_surest_of_each_class():
    probabilities = np.full((40, 2), 0.5, np.float32)
    probabilities[7], probabilities[3], probabilities[30] = (0.9, 0.1), (0.8, 0.2), (0.05, 0.95)
    found = trusted_examples(jnp.asarray(probabilities))  # 40 examples, 2 classes: 2 of each class
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.indices[:3].tolist() == [7, 3, 30]
    assert [trusted_examples(jnp.ones((n, 3))).indices.size for n in (10, 59, 60, 9000)] == [3, 3, 6, 300]
    assert trusted_examples(jnp.ones((9, 3)), per_class=2).indices.size == 6
    with pytest.raises(ValueError, match="expected 1 to 9"):
        trusted_examples(jnp.ones((9, 3)), per_class=10)


def test_fix_match_on_a_hand_example(mirror):
    # Two classes. The weak view doubles the scores, so a margin of m gives, sharpened with T = 0.5, sigmoid(4 m).
    margins = np.array([6.0, -6.0, 2.0, 1.0, -1.5, 0.3])
    inputs = {"scores": jnp.stack([jnp.asarray(margins, jnp.float32), jnp.zeros(6)], -1)}
    objective = fix_match(mirror, inputs, weak=doubled, strong=same, threshold=0.99)
    trusted, others = objective
    assert trusted.examples.labels.tolist() == [0, 1]
    np.testing.assert_allclose(trusted.examples.inputs["scores"][:, 0], [6, -6])
    np.testing.assert_allclose(others.examples["scores"][:, 0], [2, 1, -1.5, 0.3])
    assert (trusted.share, others.share, trusted.weight, others.weight) == (0.25, 0.75, 0.25, 0.75)
    sure = 1 / (1 + np.exp(-4 * np.abs(margins[2:]))) >= 0.99
    assert sure.tolist() == [True, False, True, False]  # sigmoid(4) = 0.982
    loss = np.log1p(np.exp(-np.abs(margins)))  # cross-entropy of the class of the greater score
    expected = 0.25 * loss[:2].mean() + 0.75 * (loss[2:] * sure).sum() / 4
    found = value(objective, mirror.params, [term.examples for term in objective], KEY)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_fix_match_learns_from_the_strong_view_alone(mirror):
    inputs = {"scores": jnp.array([[6.0, 0.0], [0.0, 6.0], [4.0, 0.0], [0.0, 4.0]])}

    def loss(params, strong):
        objective = fix_match(mirror, inputs, weak=doubled, strong=strong)
        return value(objective, params, [term.examples for term in objective], KEY)

    # Strong views hidden to nothing leave no way to the parameters, whatever the weak view shows.
    hidden = jax.grad(loss)(mirror.params, lambda key, x: {"scores": 0 * x["scores"]})
    seen = jax.grad(loss)(mirror.params, same)
    assert float(hidden["w"]) == 0 and float(seen["w"]) < 0
    assert float(loss(mirror.params, noisy)) != float(loss(mirror.params, same))


def test_fix_match_predicts_in_batches(mirror):
    scores = jax.random.normal(KEY, (30, 3))
    whole, parts = (
        fix_match(mirror, {"scores": scores}, weak=same, strong=same, prediction_batch=size)[0].examples
        for size in (30, 7)
    )
    np.testing.assert_array_equal(whole.inputs["scores"], parts.inputs["scores"])


def test_what_is_not_the_objective_s_is_refused(tiny, mirror):
    with pytest.raises(ValueError, match="found no labels"):
        few_shot(tiny.model, Batch(tiny.batch.inputs))
    with pytest.raises(ValueError, match="has no loss"):
        few_shot(mirror, tiny.batch)
    with pytest.raises(ValueError, match="one task at least"):
        average([])
    with pytest.raises(ValueError, match="none is left"):
        fix_match(mirror, {"scores": jnp.eye(2)}, weak=same, strong=same)
    with pytest.raises(ValueError, match="found trusted_share 1.5"):
        fix_match(mirror, {"scores": jnp.eye(2)}, weak=same, strong=same, trusted_share=1.5)
    plain = single_stage(lambda params, x: x, {})
    with pytest.raises(ValueError, match="expected 'logits' among them"):
        value(entropy(plain, jnp.eye(2)), {}, [jnp.eye(2)], KEY)


def test_equal_objectives_compile_once(tiny):
    @jax.jit
    def loss(objective, params, batch):
        traced.append(1)
        return value(objective, params, [batch], KEY)

    traced = []
    for seed in (0, 1):
        batch = tiny.make_batch(8, seed)
        for objective in (
            few_shot(tiny.model, batch),
            entropy(tiny.model, batch.inputs),
            fix_match(tiny.model, batch.inputs, weak=same, strong=same)[:1],
        ):
            if len(objective[0].examples) == 2:
                loss(objective, tiny.model.params, objective[0].examples)
            else:
                loss(objective, tiny.model.params, batch.inputs)
    assert len(traced) == 3
    assert dataclasses.is_dataclass(few_shot(tiny.model, batch)[0])
