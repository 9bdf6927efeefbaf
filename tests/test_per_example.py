"""Gradients of single examples, reduced and summed stage by stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, fit, gradfix, leaf_report, tree
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
        Batch(jnp.asarray(random.normal(size=(n, 5)), jnp.float32), jax.device_put(np.float32(random.normal(size=n))))
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


def shared_bias():
    """A table that the first stage turns into a bias, which every stage adds and hands on, as T5 does."""

    def first(p, x):
        return {"h": x @ p["kernel"], "bias": jnp.tanh(p["table"])[None]}

    def block(p, c):
        return c | {"h": jnp.tanh(c["h"] @ p["kernel"] + c["bias"])}

    random = np.random.default_rng(0)
    kernels = [jnp.asarray(random.normal(size=(5, 5)), jnp.float32) for _ in range(3)]
    params = {
        "first": {"kernel": kernels[0], "table": jax.device_put(np.float32(random.normal(size=5)))},
        "blocks": {str(i): {"kernel": kernel} for i, kernel in enumerate(kernels[1:])},
    }
    stages = (
        Stage("first", first, (("", "first"),)),
        *(Stage(f"blocks/{i}", block, (("", f"blocks/{i}"),), "blocks") for i in range(2)),
    )
    return Model(params, stages, lambda scale, c, labels: loss(scale, c["h"] + c["bias"], labels), jnp.float32(2.0))


def two_towers():
    """Images beside the texts of all classes: the texts have no example axis."""
    random = np.random.default_rng(0)
    params = {name: jnp.asarray(random.normal(size=(5, 4)), jnp.float32) for name in ("image", "text")}

    def towers(p, c):
        return {"image": jnp.tanh(c["image"] @ p["image"]), "text": jnp.tanh(c["text"] @ p["text"])}

    def scores(_, c, labels):
        logits = jax.nn.log_softmax(c["image"] @ c["text"].T)
        return -jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]

    return Model(params, (Stage("towers", towers),), scores)


def by_one_example(model, batch):
    """`jax.grad` of the loss of each example of the whole batch."""
    total = {}
    for n in range(batch.labels.shape[0]):

        def one(params, n=n):
            outputs = model.replace(params=params)(batch.inputs)
            return model.loss(model.loss_params, outputs, batch.labels)[n]

        for path, g in absolute(tree.flatten(jax.grad(one)(model.params))).items():
            total[path] = total.get(path, 0) + g
    return total


@pytest.mark.parametrize("skipped", [0, 1])
def test_arrays_without_an_example_axis_are_shared_by_the_examples(skipped):
    model, (batch,) = shared_bias(), make_batches((4,))
    collected = ExampleGradients(Walk(model, [batch]), absolute)
    sums = {}
    for index in reversed(range(len(model.stages) - skipped)):  # a stage that was read from a file is not asked for
        sums |= collected.stage(index)
    expected = by_one_example(model, batch)
    assert sums.keys() == {path for path in expected if not (skipped and path == "blocks/1/kernel")}
    for path, value in sums.items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_the_texts_of_a_head_are_shared_by_the_images():
    random = np.random.default_rng(1)
    inputs = {"image": random.normal(size=(6, 5)), "text": random.normal(size=(3, 5))}
    batch = Batch({k: jnp.asarray(x, jnp.float32) for k, x in inputs.items()}, jnp.asarray([0, 1, 2, 0, 1, 2]))
    model = two_towers()
    sums = ExampleGradients(Walk(model, [batch]), absolute, chunk=2).stage(0)
    for path, value in by_one_example(model, batch).items():
        np.testing.assert_allclose(sums[path], value, rtol=1e-4, atol=1e-5, err_msg=path)
    assert "masked" in {leaf.action for leaf in leaf_report(fit(gradfix(), model, model, [batch]))}
