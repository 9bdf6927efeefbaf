"""Token alignment against scipy's and by its properties."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from tvjax.align.tokens import Alignment, align, alignment, interpolate_positions
from tvjax.stages import Stream


def resized(grid, size):
    """Bilinear resizing with half-pixel centres and clamped borders, by scipy."""
    centres = [np.clip((np.arange(n) + 0.5) * m / n - 0.5, 0, m - 1) for n, m in zip(size, grid.shape, strict=True)]
    return ndimage.map_coordinates(grid, np.meshgrid(*centres, indexing="ij"), order=1)


@pytest.mark.parametrize("grids", [((3, 4), (6, 8)), ((7, 7), (4, 5)), ((2, 8), (4, 4)), ((1, 1), (2, 2))])
def test_interpolation_matches_scipy_and_keeps_the_class_token(grids):
    rng = np.random.default_rng(0)
    rows_a, rows_b = (Stream(special=1, grid=grid) for grid in grids)
    operators = alignment(rows_a, rows_b, rows_a.tokens, rows_b.tokens)
    tokens = rng.standard_normal(rows_a.tokens).astype(np.float32)
    expected = np.concatenate([tokens[:1], resized(tokens[1:].reshape(grids[0]), grids[1]).ravel()])
    assert operators.b is None
    np.testing.assert_allclose(operators.a @ tokens, expected, atol=1e-6)
    np.testing.assert_allclose(operators.a.sum(1), 1, atol=1e-6)


def test_equal_layouts_need_no_operator():
    rows = Stream(special=1, grid=(4, 4))
    for mode in ("interpolate", "class_token", "mean"):
        assert alignment(rows, rows, 17, 17, mode) == Alignment()
        assert alignment(Stream(), Stream(mask="mask"), 9, 9, mode) == Alignment()
        assert alignment(rows, Stream(special=1, grid=(2, 2)), 1, 1, mode) == Alignment()


def test_surplus_special_tokens_are_dropped():
    plain, registers = Stream(special=1, grid=(2, 2)), Stream(special=4, grid=(2, 2))
    forward, backward = alignment(plain, registers, 5, 8), alignment(registers, plain, 8, 5)
    assert forward.a.shape == (5, 5) and forward.b.shape == (5, 8)
    np.testing.assert_array_equal(forward.a, np.eye(5))
    np.testing.assert_array_equal(forward.b @ np.arange(8), [0, 4, 5, 6, 7])
    assert backward.b is None
    np.testing.assert_array_equal(backward.a @ np.arange(8), [0, 4, 5, 6, 7])


def test_a_grid_is_recognised_without_its_special_tokens():
    operators = alignment(Stream(1, (1, 2)), Stream(1, (2, 2)), 2, 4)
    np.testing.assert_array_equal(operators.a, [[1, 0], [0, 1], [1, 0], [0, 1]])


def test_one_token_modes():
    rows_a, rows_b = Stream(special=1, grid=(2, 2)), Stream(special=1, grid=(3, 3))
    for mode, expected in (("class_token", (0.0, 0.0)), ("mean", (2.0, 4.5))):
        operators = alignment(rows_a, rows_b, 5, 10, mode)
        for operator, tokens, value in zip(operators, (5, 10), expected, strict=True):
            np.testing.assert_allclose(operator @ np.arange(tokens, dtype=np.float32), [value], rtol=1e-6)


def test_padding_takes_no_part():
    hidden = np.array([[[1.0, 1.0], [3.0, 5.0], [np.nan, np.nan]]] * 2, np.float32)
    mask = np.array([[1, 1, 0], [0, 0, 0]], bool)
    rows, weights = align(np.full((1, 3), 1 / 3, np.float32), hidden, mask)
    np.testing.assert_allclose(rows, [[[2.0, 3.0]], [[0.0, 0.0]]], rtol=1e-6)
    np.testing.assert_array_equal(weights, [[1], [0]])
    rows, weights = align(None, hidden, mask)
    np.testing.assert_array_equal(weights, mask)
    chex.assert_tree_all_finite(rows)


def test_align_is_linear_jittable_and_adjoint_friendly():
    operators = alignment(Stream(1, (2, 2)), Stream(1, (3, 3)), 5, 10)
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 3), jnp.bfloat16)
    rows, weights = jax.jit(lambda h: align(operators.a, h))(hidden)
    assert rows.dtype == jnp.float32
    chex.assert_shape([rows, weights], [(2, 10, 3), (2, 10)])
    expected = np.einsum("st,btd->bsd", operators.a, np.asarray(hidden, np.float32))
    np.testing.assert_allclose(rows, expected, atol=1e-6)


def test_positions_keep_the_class_token_and_the_dtype():
    table = np.random.default_rng(0).standard_normal((1 + 12, 5)).astype(np.float16)
    moved = interpolate_positions(jnp.asarray(table), Stream(1, (3, 4)), Stream(1, (5, 6)))
    assert moved.dtype == jnp.float16
    chex.assert_shape(moved, (31, 5))
    np.testing.assert_array_equal(moved[0], table[0])
    expected = resized(table[1:, 2].reshape(3, 4).astype(np.float32), (5, 6)).ravel()
    np.testing.assert_allclose(moved[1:, 2], expected, atol=2e-3)
    assert interpolate_positions(table, Stream(1, (3, 4)), Stream(1, (3, 4))) is table


def test_errors_name_both_layouts():
    text, image = Stream(mask="mask"), Stream(special=1, grid=(2, 2))
    cases = {
        "A has 7 tokens of .* B has 5 tokens of": lambda: alignment(text, image, 7, 5),
        "no class token": lambda: alignment(Stream(grid=(2, 2)), Stream(grid=(3, 3)), 4, 9, "class_token"),
        "mode must be one of": lambda: alignment(image, image, 5, 5, "nearest"),
        "same special tokens": lambda: interpolate_positions(jnp.ones((5, 2)), image, Stream(0, (3, 3))),
        "has 5 rows, found": lambda: interpolate_positions(jnp.ones((6, 2)), image, Stream(1, (3, 3))),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
