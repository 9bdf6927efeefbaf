"""Sums block by block are those of whole arrays, bit by bit."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from tvjax.checkpoints import elementwise

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
PAIRS = list(itertools.product(DTYPES, DTYPES))


def leaf(seed, dtype):
    return np.random.default_rng(seed).normal(size=(9, 11)).astype(dtype)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(elementwise, "_BLOCK", 16)


@pytest.mark.parametrize(("dtype", "stored"), PAIRS)
def test_a_difference_is_rounded_once(dtype, stored):
    before, after = leaf(0, dtype), leaf(1, dtype)
    out = np.empty(before.shape, stored)
    squares = elementwise.difference(after, before, out)
    change = np.subtract(after, before, dtype=np.float32, casting="same_kind")
    np.testing.assert_array_equal(out, change.astype(stored))
    np.testing.assert_allclose(squares, np.sum(change.astype(np.float64) ** 2), rtol=1e-6)


@pytest.mark.parametrize(("dtype", "stored"), PAIRS)
def test_an_edit_is_rounded_once(dtype, stored):
    theta, tau = leaf(0, dtype), leaf(1, ml_dtypes.bfloat16)
    out = np.empty(theta.shape, stored)
    elementwise.edited(theta, tau, 0.3, out)
    total = tau.astype(np.float32) * np.float32(0.3)
    total = np.add(theta, total, out=total, casting="same_kind")
    np.testing.assert_array_equal(out, total.astype(stored))
