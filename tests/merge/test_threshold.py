"""The k-th largest magnitude against a sort, and sums over entries against NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tvjax.merge import threshold
from tvjax.merge.base import Vectors
from tvjax.merge.entries import sum_entries

CASES = {
    "normal": lambda random, n: random.normal(size=n),
    "heavy tails": lambda random, n: random.standard_cauchy(size=n) ** 3,
    "few values": lambda random, n: random.integers(-3, 4, n) * 0.25,
    "all equal": lambda random, n: np.full(n, -0.7),
    "almost all zero": lambda random, n: np.where(random.uniform(size=n) < 0.01, 1.0, 0.0),
    "denormal": lambda random, n: random.normal(size=n) * 1e-40,
    "neighbours": lambda random, n: 1 + random.integers(0, 50, n) * 2.0**-23,
}


def expected(values, rank):
    return np.sort(np.abs(np.asarray(values, np.float32)))[-rank]


@pytest.mark.parametrize("case", CASES)
def test_of_a_leaf(case):
    random = np.random.default_rng(0)
    n = 30_000
    leaves = [np.asarray(CASES[case](random, n), np.float32) for _ in range(2)]
    ranks = [[1, 17, n // 5], [n, n // 2, 1]]
    found = jax.jit(threshold.kth_largest)(leaves, jnp.array(ranks, jnp.uint32))
    wanted = [[expected(leaf, rank) for rank in row] for leaf, row in zip(leaves, ranks, strict=True)]
    np.testing.assert_array_equal(np.asarray(found).view(np.float32), wanted)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sample", [2**22, 16])
def test_of_whole_vectors(case, dtype, sample, monkeypatch):
    monkeypatch.setattr(threshold, "_SAMPLE", sample)
    random = np.random.default_rng(1)
    taus = []
    for _ in range(2):
        values = CASES[case](random, 6000)
        values = (values / max(1, np.max(np.abs(values)) / 1e4)).astype(dtype)
        taus.append({"a": values[:5000].reshape(50, 100), "b": values[5000:]})
    ranks = [1200, 3]
    found = threshold.kth_largest_of_all(Vectors(taus), ranks)
    for number, rank in enumerate(ranks):
        values = np.concatenate([leaf.reshape(-1) for leaf in taus[number].values()])
        assert found.view(np.float32)[number] == expected(values, rank)


def test_an_unlucky_sample_costs_passes_not_exactness(monkeypatch):
    monkeypatch.setattr(threshold, "_SAMPLE", 60)
    values = np.random.default_rng(0).normal(size=6000).astype(np.float32)
    values[::100] = 1e-30  # all that the sample sees
    found = threshold.kth_largest_of_all(Vectors([{"w": values}]), [600])
    assert found.view(np.float32)[0] == expected(values, 600)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_entries_that_are_not_finite(bad):
    tau = {"w": np.ones(10, np.float32), "v": np.ones((3, 4), np.float32)}
    tau["v"][1, 2] = bad
    with pytest.raises(ValueError, match="task vector 1 has values that are NaN or infinite:\n  v: 1 of 12"):
        threshold.kth_largest_of_all(Vectors([{**tau, "v": np.ones((3, 4), np.float32)}, tau]), [2, 2])


def test_inside_jit_it_is_the_same():
    tau = {"v": jnp.array([[0.5, -3.0], [2.0, 0.0]]), "w": jnp.array([1.0, -2.5, 2.0])}
    for k in range(1, 8):
        found = jax.jit(lambda tau, k=k: jnp.stack(threshold.kth_largest_of_all(Vectors([tau]), [k])))(tau)
        np.testing.assert_array_equal(found, np.stack(threshold.kth_largest_of_all(Vectors([tau]), [k])))


@pytest.mark.parametrize("size", [0, 1, 127, 4095, 4096, 4097, 128 * 128, 128 * 128 + 128, 3 * 128 * 128 + 129])
def test_sums_over_entries(size):
    random = np.random.default_rng(size)
    x = random.integers(-9, 10, size).astype(np.float32)
    y = random.integers(-9, 10, size).astype(ml_dtypes.bfloat16)

    def rows(x, y):
        y = y.astype(jnp.float32)
        return jnp.stack([x * y, x * x, jnp.ones_like(x)])

    found = jax.jit(lambda x, y: sum_entries(rows, [x, y]))(x, y)
    np.testing.assert_array_equal(found, [np.sum(x * y.astype(np.float32)), np.sum(x * x), size])


def test_a_float32_sum_of_millions_keeps_its_digits():
    x = np.random.default_rng(0).uniform(0.5, 1.5, 3 * 2**20 + 5).astype(np.float32)
    found = jax.jit(lambda x: sum_entries(jnp.square, [x]))(x)
    assert float(found) == pytest.approx(float(np.sum(x.astype(np.float64) ** 2)), rel=1e-6)
