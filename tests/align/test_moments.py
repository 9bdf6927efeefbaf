"""Streaming moments against float64 sums."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.align import moments
from tvjax.align.procrustes import matrix, polar, polar_of_product

ROWS, D_A, D_B = 120, 5, 7


def rows(offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((ROWS, D_A)) + offset
    b = a @ rng.standard_normal((D_A, D_B)) + 0.3 * rng.standard_normal((ROWS, D_B)) - 2 * offset
    return a.astype(np.float32), b.astype(np.float32)


def stream(a, b, sizes=(ROWS,), weights=None, **options):
    m = moments.init(a.shape[-1], b.shape[-1], **options)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        m = moments.update(m, a[part], b[part], None if weights is None else weights[part])
        start += size
    assert start == len(a)
    return m


def centered(x):
    x = np.asarray(x, np.float64)
    return x - x.mean(0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("sizes", [(ROWS,), (1, 19, 60, 40), (30,) * 4])
def test_moments_match_float64_whatever_the_batches(offset, sizes):
    a, b = rows(offset)
    m = stream(a, b, sizes, gram=True)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    np.testing.assert_allclose(moments.cross(m), wide_a.T @ wide_b, rtol=1e-5, atol=1e-3)
    # With an offset of 1000 the centred moment is a millionth of the uncentred one.
    np.testing.assert_allclose(moments.cross(m, center=True), centered(a).T @ centered(b), rtol=1e-3, atol=2e-3)
    for gram, x in zip(moments.grams(m, center=True), (a, b), strict=True):
        np.testing.assert_allclose(gram, centered(x).T @ centered(x), rtol=1e-3, atol=2e-3)
    for gram, x in zip(moments.grams(m), (wide_a, wide_b), strict=True):
        np.testing.assert_allclose(gram, x.T @ x, rtol=1e-5, atol=1e-3)
    for center in (False, True):
        for energy, x in zip(moments.energies(m, center), (a, b), strict=True):
            x = centered(x) if center else x.astype(np.float64)
            np.testing.assert_allclose(energy, np.sum(x**2), rtol=1e-4)
    for mean, x in zip(moments.means(m), (wide_a, wide_b), strict=True):
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5, atol=1e-5)


def test_padding_takes_no_part_even_in_the_first_batch():
    a, b = rows(3.0)
    padded_a, padded_b = (np.concatenate([np.full((10, x.shape[1]), np.nan, np.float32), x]) for x in (a, b))
    weights = np.concatenate([np.zeros(10), np.ones(ROWS)]).astype(np.float32)
    for sizes in ((ROWS + 10,), (10, ROWS), (40, ROWS - 30)):
        m = stream(padded_a, padded_b, sizes, weights)
        assert float(m.count) == ROWS
        for center in (False, True):
            expected = moments.cross(stream(a, b), center)
            chex.assert_trees_all_close(moments.cross(m, center), expected, rtol=1e-4, atol=1e-3)


def test_rows_of_zeros_add_no_rounding():
    # Output gradients of a block that only one token in 17 leaves: the sums are those of that token's rows.
    rng = np.random.default_rng(0)
    spread = np.exp(2 * rng.standard_normal((50, 1)))
    x = rng.standard_normal((50, 8)) * spread + 0.3 * spread
    a, b = ((x @ rng.standard_normal((8, 64))).astype(np.float32) for _ in range(2))
    sparse_a, sparse_b = (np.concatenate([y[:, None], np.zeros((50, 16, 64), np.float32)], 1) for y in (a, b))
    found = np.float64(moments.cross(moments.update(moments.init(64, 64), sparse_a, sparse_b)))
    exact = np.float64(a).T @ np.float64(b)
    eps = np.finfo(np.float32).eps
    assert np.linalg.norm(found - exact, 2) < 2 * eps * np.linalg.norm(exact, 2)


def test_a_weight_counts_as_repeated_rows():
    a, b = rows()
    twice = stream(np.concatenate([a, a]), np.concatenate([b, b]), (2 * ROWS,))
    weighted = stream(a, b, weights=np.full(ROWS, 2, np.float32))
    chex.assert_trees_all_close(moments.cross(weighted, True), moments.cross(twice, True), rtol=1e-4, atol=1e-3)


def test_leading_axes_are_rows_and_half_precision_is_summed_in_float32():
    a, b = rows()
    m = moments.update(moments.init(D_A, D_B), a.reshape(4, 30, D_A), b.reshape(4, 30, D_B), np.ones((4, 30), bool))
    chex.assert_trees_all_close(m, stream(a, b), rtol=1e-5, atol=1e-5)
    half = moments.update(moments.init(D_A, D_B), a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    assert half.cross.dtype == jnp.float32


@pytest.mark.parametrize("center", [False, True])
def test_augmented_moment_gives_that_of_linear_outputs(center):
    a, b = rows(1.0)
    rng = np.random.default_rng(1)
    kernels = [rng.standard_normal((d, n)).astype(np.float32) for d, n in ((D_A, 20), (D_B, 24))]
    biases = [rng.standard_normal(20).astype(np.float32), None]
    y_a, y_b = a @ kernels[0] + biases[0], b @ kernels[1]
    p, q = (moments.output_factor(k, bias) for k, bias in zip(kernels, biases, strict=True))
    m, outputs = stream(a, b, gram=True), stream(y_a, y_b, gram=True)
    core = moments.augmented(m, center)
    expected = moments.cross(outputs, center)
    np.testing.assert_allclose(p @ core @ q.T, expected, atol=1e-4 * np.abs(expected).max())
    rotation = polar_of_product(p, core, q)
    chex.assert_trees_all_close(matrix(rotation), matrix(polar(expected, rank=D_A + (not center))), atol=2e-3)
    for measure in (moments.residual, moments.similarity):
        of_outputs = measure(outputs, rotation, center)
        of_inputs = measure(m, rotation, center, output_a=p, output_b=q)
        np.testing.assert_allclose(of_inputs, of_outputs, atol=2e-3)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_residual_and_similarity_match_the_rows(center, rank):
    a, b = rows(1.0)
    x_a, x_b = (centered(x) if center else x.astype(np.float64) for x in (a, b))
    m = stream(a, b, gram=True)
    rotation = polar(moments.cross(m, center), rank=rank)
    mapped = x_a @ np.asarray(matrix(rotation))
    exact = np.linalg.norm(mapped - x_b) / np.linalg.norm(x_b)
    np.testing.assert_allclose(moments.residual(m, rotation, center), exact, rtol=1e-3)
    bound = moments.residual(m._replace(gram_a=None, gram_b=None), rotation, center)
    if rank is None:  # d_a <= d_b and full rank: nothing of A is lost
        np.testing.assert_allclose(bound, exact, rtol=1e-3)
    else:
        assert bound > exact
    cosine = np.sum(mapped * x_b) / (np.linalg.norm(x_a) * np.linalg.norm(x_b))
    np.testing.assert_allclose(moments.similarity(m, rotation, center), cosine, rtol=1e-4)


def test_no_rows_are_no_nan():
    m = moments.init(D_A, D_B, gram=True)
    rotation = polar(moments.cross(m, True))
    chex.assert_tree_all_finite(
        (moments.cross(m, True), moments.residual(m, rotation), moments.similarity(m, rotation))
    )


def test_errors_name_the_shapes():
    m = moments.init(D_A, D_B)
    cases = {
        "aligned one to one": lambda: moments.update(m, jnp.ones((3, D_A)), jnp.ones((4, D_B))),
        "weights": lambda: moments.update(m, jnp.ones((3, D_A)), jnp.ones((3, D_B)), jnp.ones(2)),
        "do not take rows": lambda: moments.update(m, jnp.ones((3, D_B)), jnp.ones((3, D_B))),
        "gram=True": lambda: moments.grams(m),
        "go together": lambda: moments.residual(m, polar(m.cross), output_a=jnp.ones((3, D_A + 1))),
        "not enabled": lambda: moments.init(2, 2, dtype=jnp.float64),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_float64_where_the_caller_enabled_it():
    a, b = rows(1e3)
    with jax.enable_x64(True):
        m = stream(a, b, (60, 60), dtype=jnp.float64)
        np.testing.assert_allclose(moments.cross(m, True), centered(a).T @ centered(b), rtol=1e-9, atol=1e-9)
        assert polar(moments.cross(m)).left.dtype == jnp.float64
