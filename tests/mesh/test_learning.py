"""Learned composition, judging, and what single examples say, over meshes: the numbers of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import Batch, merge, per_example, tree
from tvjax.compose import few_shot, learn, tune
from tvjax.evaluate import accuracy
from tvjax.models.vit import ViTConfig, init, vit
from tvjax.tasks.losses import OWN_HEAD

CONFIG = ViTConfig(8, 16, 1, 2, image_size=8, patch_size=4, num_labels=3)
SETTINGS = {"key": jax.random.key(0), "batch_size": 8, "epochs": 1, "batches_per_epoch": 2}


@pytest.fixture(scope="module")
def params():
    """The parameters, and a task vector."""
    both = [init(CONFIG, jax.random.key(seed)) for seed in (0, 1)]
    return both[0], jax.tree.map(lambda a, b: 0.3 * (b - a), *both)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    pixels = jnp.asarray(random.normal(size=(16, 8, 8, 3)), jnp.float32)
    return Batch({"pixels": pixels}, jnp.asarray(np.arange(16) % 3, jnp.int32))


def model_at(params):
    return vit(CONFIG, params).with_loss(OWN_HEAD)


def learned(params, tau, batch):
    """Coefficients with a score on the way, and what was found of them."""
    model = model_at(params)
    score = lambda params: accuracy(model.replace(params=params), batch).fraction  # noqa: E731
    found = learn(params, [tau], few_shot(model, batch), score=score, **SETTINGS)
    return found, tv.compose.combine(params, [tau], found.trainable)


def tuned(params, tau, batch):
    found = tune(params, [tau], few_shot(model_at(params), batch), leaves=["**/kernel"], **SETTINGS)
    return found.trainable.leaves, found.losses


@pytest.fixture(scope="module")
def expected(params, batch):
    """Of one device."""
    found, combined = learned(*params, batch)
    model = model_at(params[0])
    return {
        "learned": (found.trainable.values, found.losses, found.score, combined),
        "tuned": tuned(*params, batch),
        "accuracy": accuracy(model, batch),
        "fisher": merge.diagonal_fisher(model, [batch]),
        "grams": merge.input_grams(model, [batch]).matrices,
    }


@pytest.mark.parametrize("kind", ("automatic", "explicit"))
def test_learned_coefficients(kind, spread_of, params, batch, expected, alike):
    three = spread_of("three", kind)
    placed = [three.params(each) for each in params]
    found, combined = learned(*placed, three.rows(batch))
    values, losses, score, whole = expected["learned"]
    np.testing.assert_allclose(found.trainable.values, values, atol=1e-4)
    np.testing.assert_allclose(found.losses, losses, atol=1e-4)
    assert found.score == score
    alike(combined, whole, placed[0], 1e-4)


def test_tuned_leaves_stay_spread(spread_of, params, batch, expected, alike, bytes_per_device):
    three = spread_of("three", "explicit")
    placed = [three.params(each) for each in params]
    with jax.set_mesh(three.mesh):
        leaves, losses = tuned(*placed, three.rows(batch))
    alike(leaves, expected["tuned"][0], tree.flatten(placed[0]), 1e-3)
    np.testing.assert_allclose(losses, expected["tuned"][1], atol=1e-4)
    assert bytes_per_device(leaves) < tree.nbytes(leaves) / 2


def test_accuracy(spread, params, batch, expected):
    assert accuracy(model_at(spread.params(params[0])), iter([spread.rows(batch)])) == expected["accuracy"]


def test_what_merges_read_of_examples(three, params, batch, expected, alike):
    placed = three.params(params[0])
    model, examples = model_at(placed), three.rows(batch)
    alike(merge.diagonal_fisher(model, [examples]), expected["fisher"], placed, 1e-4)
    alike(merge.input_grams(model, [examples]).matrices, expected["grams"], None, 1e-4)


def _block(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def _signs(gradients):
    return {path: jnp.sign(gradient) for path, gradient in gradients.items()}


def test_every_device_asks_its_own_examples(spread_of):
    """In turn it takes as many as it has, not as many as there are, and only what they say in sum is sent."""
    spread, random = spread_of("data", "automatic"), np.random.default_rng(0)
    shapes = {"up": (8, 32), "down": (32, 8)}
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    rows = jnp.asarray(random.normal(size=(32, 4, 8)), jnp.float32)
    programs = []
    for params_there, rows_there in ((params, rows), (spread.params(params), spread.rows(rows))):
        lie = per_example._rows_lie({"rows": rows_there}, params_there)
        options = (_block, frozenset(), _signs, 1, True, 32, lie)
        programs.append(
            per_example.per_example_gradients.lower(*options, params_there, rows_there, [rows_there]).compile()
        )
    one, over = (program.as_text() for program in programs)
    assert '"known_trip_count":{"n":"32"}' in one and '"known_trip_count":{"n":"4"}' in over
    assert not any(name in over for name in ("all-gather", "all-to-all", "permute("))
