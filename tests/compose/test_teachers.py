"""Distillation: what a teacher says in the place of labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, apply, single_stage
from tvjax.compose import class_scores, distillation, few_shot, learn, train, tune, value
from tvjax.evaluate import scale_of_least_loss
from tvjax.tasks.losses import OWN_HEAD, distilled


def linear(width, seed):
    random = np.random.default_rng(seed)
    params = {"w": jnp.asarray(random.normal(size=(width, 3)), jnp.float32)}
    return single_stage(lambda p, x: {"logits": x @ p["w"]}, params, loss=OWN_HEAD)


@pytest.fixture(scope="module")
def case():
    """A teacher of four inputs, a student of six, which see the same 24 examples each in its own way."""
    random = np.random.default_rng(0)
    seen = jnp.asarray(random.normal(size=(24, 6)), jnp.float32)
    teacher, student = linear(4, 1), linear(6, 2)
    said = class_scores(teacher, [Batch(seen[:16, :4]), Batch(seen[16:, :4])])
    return student, seen, said, jnp.zeros((6, 3)).at[:4].set(teacher.params["w"])


def test_the_losses_in_numpy(case):
    student, seen, said, _ = case
    scores = np.asarray(seen @ student.params["w"], np.float64)
    assert said.shape == (24, 3)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    soft = -9 * (softmax(said / 3) * np.log(softmax(scores / 3))).sum(-1).mean()
    difference = scores - scores.mean(-1, keepdims=True) - said + said.mean(-1, keepdims=True)
    batch = Batch(seen, jnp.asarray(said))
    for expected, settings in ((soft, {"temperature": 3.0}), ((difference**2).mean(), {"match": "logits"})):
        goal = distillation(student, seen, said, **settings)
        assert float(value(goal, student.params, [batch], jax.random.key(0))) == pytest.approx(expected, rel=1e-5)
        loss = distilled(student.loss, **settings)
        assert float(loss(None, student(seen), batch.labels).mean()) == pytest.approx(expected, rel=1e-5)


def test_a_student_comes_to_say_what_the_teacher_says(case):
    """Coefficients where a vector leads there, leaves where none does, and both with labels as well."""
    student, seen, said, goal_params = case
    tau = {"w": goal_params - student.params["w"]}
    goal = distillation(student, seen, said, match="logits")
    key, options = jax.random.key(0), {"batch_size": None, "epochs": 30}
    found = learn(student.params, [tau], goal, key=key, **options)
    assert float(found.trainable.values[0, 0, 0]) == pytest.approx(1, abs=0.02)
    tuned = tune(student.params, [tau], goal + few_shot(student, Batch(seen, said.argmax(-1))), key=key, **options)
    assert tuned.losses[-1].mean() < 0.3 * tuned.losses[0].mean()  # the labels' part has a floor
    free = train(lambda fixed, params: params, (), student.params, goal, key=key, batch_size=None, epochs=100)
    spread = np.asarray(seen @ free.trainable["w"] - said)
    assert np.abs(spread - spread.mean(-1, keepdims=True)).max() < 0.3


def test_the_scale_of_least_loss_needs_no_labels(case):
    student, seen, said, goal_params = case
    model = student.replace(loss=distilled(student.loss, match="logits"))
    batches = [Batch(seen[:16], said[:16]), Batch(seen[16:], said[16:])]
    tau = {"w": 0.5 * (goal_params - student.params["w"])}
    found = scale_of_least_loss(model, tau, (0, 1, 2, 3), iter(batches))
    assert found.scale == 2 and found.loss < 1e-10 and found.curve[0] > 0.1
    edited = student.replace(params=apply(student.params, tau, 1.0))
    scores = edited(seen)["logits"]
    centred = scores - scores.mean(-1, keepdims=True) - said + said.mean(-1, keepdims=True)
    assert found.curve[1] == pytest.approx(float((centred**2).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "expected a positive number"),
        ({"match": "scores"}, "match must be one of"),
        ({"match": "logits", "temperature": 2.0}, "leave it at 1"),
    ],
)
def test_what_cannot_be_distilled(case, settings, message):
    student, seen, said, _ = case
    with pytest.raises(ValueError, match=message):
        distillation(student, seen, said, **settings)
    with pytest.raises(ValueError, match="expected .examples, classes. of 24 examples"):
        distillation(student, seen, said[:3])
    with pytest.raises(ValueError, match="both are of the same examples and classes"):
        value(distillation(student, seen, said[:, :2]), student.params, [Batch(seen, said[:, :2])], jax.random.key(0))
    with pytest.raises(ValueError, match="no examples for the teacher"):
        class_scores(student, [])
