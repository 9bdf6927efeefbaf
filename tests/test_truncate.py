"""The best low-rank approximation of a task vector, and what it says of the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import tree
from tvjax.truncate import not_smaller, truncate


def matrix(rows, columns, decay=0.7, seed=0):
    random = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(random.normal(size=(rows, columns)), full_matrices=False)
    return jnp.asarray((u * decay ** np.arange(len(vt))) @ vt, jnp.float32)


def tail(array, rank):
    values = np.linalg.svd(np.asarray(array, np.float64), compute_uv=False)
    return np.sqrt((values[rank:] ** 2).sum() / (values**2).sum())


def test_it_is_the_nearest_of_its_rank_and_says_how_near():
    tau, rows = {"a": {"kernel": matrix(12, 9)}, "b": {"kernel": matrix(5, 20, seed=1)}}, []
    found = tv.low_rank(tau, 3, report=rows.append)
    for row in rows:
        leaf, dense = tree.get(found, row.path), tree.get(tau, row.path)
        assert leaf.rank == row.rank == 3 and row.rule == "truncated"
        error = np.linalg.norm(np.asarray(leaf) - dense) / np.linalg.norm(dense)
        np.testing.assert_allclose([row.error, error], tail(dense, 3), rtol=1e-4)
    np.testing.assert_allclose(sum(row.share for row in rows), 1, rtol=1e-6)


def test_factors_that_are_no_smaller_than_their_matrix_are_named():
    rows = []
    tv.low_rank({"wide": matrix(4, 20), "square": matrix(6, 6)}, 3, report=rows.append)
    (note,) = not_smaller(rows)
    assert "of 1 of 2 layers" in note and "square: rank 3 of 6x6" in note
    assert not_smaller(rows[:1] if rows[0].path == "wide" else rows[1:]) == ()


def test_energy_is_the_least_rank_that_holds_it():
    tau = {"kernel": matrix(12, 9)}
    for energy in (0.5, 0.9, 0.999):
        rank = tv.low_rank(tau, energy=energy)["kernel"].rank
        assert tail(tau["kernel"], rank) ** 2 <= 1 - energy < tail(tau["kernel"], rank - 1) ** 2 + 1e-9
    assert tv.low_rank(tau, 2, energy=0.999)["kernel"].rank == 2
    assert tv.low_rank(tau, energy=1.0)["kernel"].rank == 9


def test_leaves_that_are_no_matrices_are_never_dropped_in_silence():
    tau, rows = {"kernel": matrix(6, 6), "bias": jnp.ones(6), "gone": jnp.zeros(3)}, []
    with pytest.raises(ValueError, match=r"1 leaves are no matrices.*\n  bias: \(6,\), 7\d\.\d\d% of the squared norm"):
        tv.low_rank(tau, 2)
    out = tv.low_rank(tau, 2, others="leave out", report=rows.append)
    assert out["bias"] is None and out["gone"] is None and out["kernel"].rank == 2
    by_path = {row.path: row for row in rows}
    assert by_path["bias"].rule == "left out" and by_path["bias"].error == 1 and by_path["bias"].share > 0.7
    assert by_path["gone"].share == by_path["gone"].error == 0
    kept = tv.low_rank(tau, 2, others="keep")
    np.testing.assert_array_equal(kept["bias"], tau["bias"])


def test_low_rank_leaves_are_compressed_without_their_product():
    left, right = matrix(30, 6), matrix(6, 40, seed=2)
    leaf = tv.LowRank(left, right)
    found, error = truncate(leaf, 2, None)
    exact, wanted = truncate(jnp.asarray(leaf), 2, None)
    np.testing.assert_allclose(np.asarray(found), np.asarray(exact), atol=1e-5)
    np.testing.assert_allclose(error, wanted, rtol=1e-3)
    assert tv.low_rank({"w": tv.LowRank.zeros((4, 4))}, 2)["w"] is None


def test_stacks_heads_and_convolutions():
    tau = {"scan": jnp.stack([matrix(6, 8), matrix(6, 8, seed=3)]), "query": matrix(6, 8).reshape(6, 2, 4)}
    tau["patch"] = matrix(12, 16).reshape(2, 2, 3, 16)
    found = tv.low_rank(tau, 2, matrices={"scan": "lio", "query": "ioo", "patch": "iiio"})
    assert found["scan"].left.shape == (2, 6, 2) and found["query"].shape == (6, 2, 4) and found["patch"].rank == 2
    one = tv.low_rank({"w": tau["scan"][1]}, 2)["w"]
    np.testing.assert_allclose(np.asarray(found["scan"])[1], np.asarray(one), atol=1e-6)
    alone = tv.low_rank({"w": matrix(6, 8)}, 2)["w"]
    np.testing.assert_allclose(np.asarray(found["query"]).reshape(6, 8), np.asarray(alone), atol=1e-6)


def test_large_matrices_are_sketched_with_a_key():
    """Within a few per cent of the least error, on a spectrum that falls slowly."""
    tau = {"w": matrix(520, 600, decay=0.97)}
    rows = []
    for key in (jax.random.key(0), None):
        tv.low_rank(tau, 16, key=key, report=rows.append)
    sketched, exact = (row.error for row in rows)
    assert exact <= sketched + 1e-6 <= 1.02 * exact
    first, again = (tv.low_rank(tau, 16, key=jax.random.key(1))["w"].left for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a rank, such as 16, or an energy"),
        ({"rank": 0}, "rank must be a whole number from 1 on, found 0"),
        ({"rank": 2.5}, "found 2.5"),
        ({"energy": 1.5}, r"energy must lie in \(0, 1\], found 1.5"),
        ({"rank": 2, "others": "drop"}, "others must be one of"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        tv.low_rank({"w": matrix(4, 4)}, **options)
