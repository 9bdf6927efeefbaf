"""Arithmetic over meshes: the numbers of one device, each leaf lying like that of the first tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import tree

SHAPES = {"up": {"kernel": (16, 24), "bias": (24,)}, "scale": ()}
OPERATIONS = {
    "task_vector": (tv.task_vector, 2),
    "apply": (lambda params, tau: tv.apply(params, tau, 0.3), 2),
    "add": (tv.add, 3),
    "negate": (tv.negate, 1),
    "scale": (lambda tau: tv.scale(tau, {"**": 2.0, "**/bias": 0.5}), 1),
    "analogy": (tv.analogy, 3),
    "interpolate": (lambda a, b: tv.interpolate(a, b, 0.3), 2),
}


@pytest.fixture
def trees():
    random = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    return [jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple)) for _ in range(3)]


def test_every_operation(spread, trees, alike):
    """The second tree lies on every device, the third as the first."""
    placed = [spread.params(trees[0]), spread.everywhere(trees[1]), spread.params(trees[2])]
    for function, count in OPERATIONS.values():
        expected = function(*trees[:count])
        alike(function(*placed[:count]), expected, placed[0])
    found = jax.jit(tv.apply)(placed[0], placed[2], 0.3)
    alike(found, OPERATIONS["apply"][0](trees[0], trees[2]), placed[0])


def test_measures(three, trees):
    placed = [three.params(trees[0]), three.everywhere(trees[1])]
    for function in (tree.dot, tree.cosine, tree.sign_agreement):
        np.testing.assert_allclose(function(*placed), function(*trees[:2]), rtol=1e-5)
    np.testing.assert_allclose(tree.norm(placed[0]), tree.norm(trees[0]), rtol=1e-6)


def test_many_scales_at_once(three, trees, alike):
    params, tau = three.params(trees[0]), three.params(trees[1])
    edited = jax.vmap(lambda scale: tv.apply(params, tau, scale))(jnp.array([0.1, 1.0]))
    alike(edited, jax.vmap(lambda scale: tv.apply(*trees[:2], scale))(jnp.array([0.1, 1.0])))
