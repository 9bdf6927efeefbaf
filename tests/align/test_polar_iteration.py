"""The polar factor by products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.align.polar_iteration import polar_factor


@pytest.mark.parametrize("cut", [1.5e-6, 1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_singular_values_go_to_one_or_to_zero(cut, scale):
    shares = np.array([2, 4 / 3, 1, 2 / 3, 0.5])  # of the cut
    values = np.r_[1, shares * cut] * scale
    found = np.asarray(polar_factor(jnp.diag(jnp.asarray(values, jnp.float32)), cut))
    np.testing.assert_allclose(np.diag(found), [1, 1, 0.99, 0.5, 0.01, 0], atol=0.01)
    assert np.max(np.abs(found - np.diag(np.diag(found)))) < 1e-6


def test_several_large_values_are_no_harm():
    # The power iteration finds a value between those that are nearly the largest: all must still converge.
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.normal(size=(40, 40)))[0] for _ in range(2))
    matrix = (left * np.linspace(1, 0.98, 40) @ right).astype(np.float32)
    np.testing.assert_allclose(polar_factor(matrix, 1e-5), left @ right, atol=1e-5)


def test_there_is_no_decomposition_and_a_batch_is_each_of_its_matrices():
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 9)), jnp.float32)
    many = jax.jit(jax.vmap(lambda x: polar_factor(x, 1e-5)))
    assert "custom_call" not in many.lower(batch).as_text()
    for found, matrix in zip(many(batch), batch, strict=True):
        np.testing.assert_allclose(found, polar_factor(matrix, 1e-5), atol=1e-6)
        np.testing.assert_allclose(found @ found.T, np.eye(6), atol=1e-5)


def test_float64():
    with jax.enable_x64(True):
        values = np.logspace(0, -12, 30)
        found = polar_factor(jnp.diag(jnp.asarray(values)), 1e-14)
        np.testing.assert_allclose(found, np.eye(30), atol=1e-9)
