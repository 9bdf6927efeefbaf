import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.align.decompositions import eigh, qr, range_basis, singular_values, svd


def batches_in_lapack(function, *arguments):
    """The shapes of batches of matrices that are handed to LAPACK at once."""
    text = jax.jit(function).lower(*arguments).as_text()
    calls = [line for line in text.splitlines() if re.search(r"custom_call @lapack_\w+", line)]
    assert calls
    return [shape for line in calls for shape in re.findall(r"tensor<(\d+x\d+x\d+)xf32>", line)]


@pytest.fixture
def matrices():
    random = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 6, 6)), jnp.float32)
    return random + random.mT


@pytest.mark.parametrize("decomposition", [eigh, svd, singular_values, qr, range_basis])
def test_a_batch_is_decomposed_in_turn_to_the_same_bits(decomposition, matrices):
    nested = jax.vmap(jax.vmap(decomposition))
    found = jax.jit(nested)(matrices)
    for i, j in np.ndindex(3, 2):
        one = jax.jit(decomposition)(matrices[i, j])
        for a, b in zip(*map(jax.tree.leaves, (found, one)), strict=True):
            np.testing.assert_array_equal(a[i, j], b)
    assert not batches_in_lapack(nested, matrices)
    assert batches_in_lapack(jnp.linalg.eigh, matrices[0])  # what is looked for would be found


def test_what_they_are(matrices):
    matrix = matrices[0, 0, :, :4]
    left, values, right = svd(matrix)
    assert (left.shape, right.shape) == ((6, 4), (4, 4))
    np.testing.assert_allclose((left * values) @ right, matrix, atol=1e-5)
    np.testing.assert_allclose(singular_values(matrix), values, atol=1e-5)
    basis, triangle = qr(matrix)
    np.testing.assert_allclose(basis @ triangle, matrix, atol=1e-5)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    values, vectors = eigh(matrices[1, 1])
    np.testing.assert_allclose((vectors * values) @ vectors.T, matrices[1, 1], atol=1e-5)
    assert np.all(np.diff(values) >= 0)
    basis = range_basis(matrix)
    np.testing.assert_allclose(basis @ jnp.linalg.lstsq(basis, matrix)[0], matrix, atol=1e-5)
    assert float(jnp.abs(basis).max()) == 1.0 and np.linalg.cond(basis) < 20
