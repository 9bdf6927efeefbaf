"""A small classifier with a convolution, matrices, a bias, a scalar and an integer leaf, and task vectors of it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tvjax import tree
from tvjax.stages import Batch, Model, Stage

CLASSES = 5


def features(params, carry):
    hidden = jax.lax.conv_general_dilated(
        carry["pixels"], params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return {"hidden": jnp.tanh(hidden).reshape(hidden.shape[0], -1)[:, params["order"]]}


def head(params, carry):
    return {"logits": params["scale"] * (carry["hidden"] @ params["dense"]["kernel"] + params["dense"]["bias"])}


@jax.jit
def cross_entropy(loss_params, outputs, labels):
    scores = outputs["logits"] + (0 if loss_params is None else loss_params)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels)


def make_model():
    random = np.random.default_rng(0)

    def normal(*shape):
        return jax.device_put(np.float32(0.4 * random.normal(size=shape)))

    params = {
        "conv": {"kernel": normal(3, 3, 3, 4)},
        "order": jnp.asarray(random.permutation(64), jnp.int32),
        "dense": {"kernel": normal(64, CLASSES), "bias": normal(CLASSES)},
        "scale": jnp.float32(1.3),
    }
    stages = (
        Stage("features", features, (("conv", "conv"), ("order", "order"))),
        Stage("head", head, (("dense", "dense"), ("scale", "scale"))),
    )
    return Model(params, stages, cross_entropy)


def noise(params, seed, size=0.3):
    """A task vector of normal numbers; None at the integer leaf."""
    random = np.random.default_rng(seed)

    def leaf(x):
        return jnp.asarray(size * random.normal(size=x.shape), x.dtype) if x.dtype == jnp.float32 else None

    return jax.tree.map(leaf, params)


def make_batch(count=24, seed=0):
    random = np.random.default_rng(seed)
    return Batch(
        {"pixels": jnp.asarray(random.normal(size=(count, 6, 6, 3)), jnp.float32)},
        jnp.asarray(np.arange(count) % CLASSES, jnp.int32),
    )


def assert_close(found, expected, tolerance=1e-5):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=tolerance, rtol=tolerance, err_msg=path)


@pytest.fixture(scope="session")
def tiny():
    """The model, task vectors (float32, bfloat16, of a subtree), a batch, and the tools above."""
    model = make_model()
    taus = [
        noise(model.params, 1),
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), noise(model.params, 2)),
        {"dense": noise(model.params, 3)["dense"], "scale": jnp.float32(-0.4)},
    ]
    return SimpleNamespace(
        model=model, taus=taus, batch=make_batch(), make_batch=make_batch, noise=noise, assert_close=assert_close
    )
