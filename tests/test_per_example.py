"""Gradients of single examples, reduced and summed stage by stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, tree
from tvjax.per_example import ExampleGradients
from tvjax.walk import Walk


def layer(p, h):
    return jnp.tanh(h @ p["kernel"] + p["bias"])


def tied_head(p, h):
    return h @ p["kernel"].T


def loss(scale, outputs, labels):
    return scale * jnp.sum(jnp.sin(outputs) * labels[:, None], -1)


def make_model():
    random = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(random.normal(size=(5, 5)), jnp.float32), "bias": jnp.full(5, 0.1)}
        for name in ("first", "second")
    }
    stages = (
        Stage("first", layer, (("", "first"),)),
        Stage("second", layer, (("", "second"),)),
        Stage("head", tied_head, (("", "first"),)),
    )
    return Model(params, stages, loss, jnp.float32(2.0))


def make_batches(sizes=(4, 3)):
    random = np.random.default_rng(1)
    return [
        Batch(jnp.asarray(random.normal(size=(n, 5)), jnp.float32), jnp.asarray(random.normal(size=n), jnp.float32))
        for n in sizes
    ]


def absolute(gradients):
    return {path: jnp.abs(g) for path, g in gradients.items()}


def reference(model, batches):
    """`jax.grad` of one example after the other."""

    def one(params, x, label):
        return model.loss(model.loss_params, model.replace(params=params)(x[None]), label[None])[0]

    total = None
    for batch in batches:
        for x, label in zip(batch.inputs, batch.labels, strict=True):
            found = absolute(tree.flatten(jax.grad(one)(model.params, x, label)))
            total = found if total is None else {path: total[path] + g for path, g in found.items()}
    return total


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_the_sum_over_examples_of_what_is_made_of_the_gradient_of_each(chunk):
    model, batches = make_model(), make_batches()
    collected = ExampleGradients(Walk(model, batches), absolute, chunk)
    assert collected.examples == 7
    sums, waiting = {}, []
    for index in (2, 1, 0):
        found = collected.stage(index)
        assert not sums.keys() & found.keys()
        sums |= found
        waiting.append(bool(collected))
    assert waiting == [True, True, False]  # the tied kernel, until its owner has been visited
    expected = reference(model, batches)
    assert sums.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(sums[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


def test_arrays_without_the_example_axis_are_refused():
    def shared(p, c):
        return {"h": c["h"] @ p["kernel"], "bias": c["bias"]}

    model = Model(
        {"kernel": jnp.ones((5, 5))},
        (Stage("one", shared), Stage("two", lambda p, c: c["h"] + c["bias"], ())),
        loss,
        jnp.float32(1.0),
    )
    batch = Batch({"h": jnp.ones((4, 5)), "bias": jnp.ones((1, 5))}, jnp.ones(4))
    with pytest.raises(ValueError, match="example axis first on every array between stages"):
        ExampleGradients(Walk(model, [batch]), absolute).stage(0)
