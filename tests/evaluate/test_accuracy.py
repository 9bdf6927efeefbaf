import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.data.batches import as_batch, split
from tvjax.evaluate.accuracy import Accuracy, accuracy, predict, predictions
from tvjax.evaluate.scale import choose_scale
from tvjax.stages import Batch, Model, Stage
from tvjax.tasks.zero_shot import ZERO_SHOT


def linear(params, carry):
    return {"logits": carry @ params["kernel"]}


def embed(params, carry):
    return {"image": carry @ params["kernel"]}


@pytest.fixture
def model():
    return Model({"kernel": jnp.eye(3)}, (Stage("linear", linear),))


def test_accuracy_counts_over_uneven_batches(model):
    inputs = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]
    batches = split(as_batch(inputs, [0, 1, 2, 1, 1]), 2)
    assert accuracy(model, batches) == Accuracy(4, 5)
    assert accuracy(model, batches[0]).fraction == 1.0


def test_predictions_of_a_zero_shot_head_use_the_cosine():
    head = {"classifier": jnp.eye(2), "logit_scale": jnp.float32(0)}
    model = Model({"kernel": jnp.eye(2)}, (Stage("embed", embed),), ZERO_SHOT, head)
    assert predict(model, jnp.array([[1.0, 3.0], [9.0, 2.0]])).tolist() == [1, 0]


def test_models_without_classes_are_refused():
    refused = r"returns image \[1, 2\], which the task .*the model's own head.* cannot score: it expects logits"
    with pytest.raises(ValueError, match=refused):
        predict(Model({"kernel": jnp.eye(2)}, (Stage("embed", embed),)), jnp.ones((1, 2)))


def test_unlabelled_and_absent_batches_are_refused(model):
    with pytest.raises(ValueError, match="has no labels"):
        accuracy(model, Batch(jnp.ones((1, 3))))
    with pytest.raises(ValueError, match="no examples to evaluate on"):
        accuracy(model, [])


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_scores_that_are_not_numbers_are_no_accuracy(model, bad):
    inputs = jnp.eye(3).at[1, 2].set(bad)
    batches = [as_batch(jnp.eye(3), [0, 1, 2]), as_batch(inputs, [0, 1, 2])]
    for evaluate in (
        accuracy,
        predictions,
        lambda *given: choose_scale(given[0], {"kernel": jnp.eye(3)}, [0, 1], given[1]),
    ):
        with pytest.raises(ValueError, match=r"1 of 3 examples have scores that are NaN or infinite \(first: number 1"):
            evaluate(model, batches)
    masked = jnp.where(jnp.eye(3) == 0, -jnp.inf, 1.0)  # of classes that cannot be
    constant = Model({}, (Stage("scores", lambda params, carry: {"logits": carry}),))
    assert accuracy(constant, as_batch(masked, [0, 1, 2])).correct == 3
    assert jax.jit(predict)(model, inputs).shape == (3,)


def test_a_model_that_scores_tokens_is_no_classifier(model):
    tokens = np.zeros((4, 15, 3), np.float32)
    for labels in (np.zeros((4, 15), int), np.zeros(4, int)):
        with pytest.raises(ValueError, match=r"returns logits \[4, 15, 3\], which the task .* cannot score: .*causal"):
            accuracy(model, Batch(tokens, labels))
    with pytest.raises(ValueError, match=r"labels of shape \[4, 15\] for 4 predictions"):
        accuracy(model, Batch(tokens[:, 0], np.zeros((4, 15), int)))


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (3, 7)])
def test_wilson_interval_holds_the_accuracy(correct, total):
    low, high = Accuracy(correct, total).interval()
    assert 0 <= low <= correct / total <= high <= 1 and high - low > 0.1


def test_wilson_interval_is_the_closed_formula_at_any_confidence():
    for confidence, z in ((0.95, 1.959963984540054), (0.99, 2.5758293035489004)):
        share, n = 0.3, 50
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        np.testing.assert_allclose(Accuracy(15, 50).interval(confidence), (centre - half, centre + half), atol=1e-12)
