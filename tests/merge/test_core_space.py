"""Core Space: lossless for each adapter, the same as outside for linear merges, and as published for others."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import LowRank, merge, tree
from tvjax.factors import dense

SHAPES = {"up": {"kernel": (24, 40)}, "down": {"kernel": (40, 24)}}


def adapter(seed, rank=3, shapes=SHAPES):
    random = np.random.default_rng(seed)

    def leaf(shape):
        left, right = random.normal(size=(shape[0], rank)), random.normal(size=(rank, shape[1]))
        return LowRank(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))

    return jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))


def reference(taus, combine):
    """The published method, for one kernel, in numpy."""
    a = np.concatenate([np.asarray(tau.left, np.float64) for tau in taus], 1)
    b = np.concatenate([np.asarray(tau.right, np.float64) for tau in taus], 0)
    u = np.linalg.svd(a, full_matrices=False)[0]
    v = np.linalg.svd(b, full_matrices=False)[2]
    cores = [u.T @ np.asarray(tau.left, np.float64) @ np.asarray(tau.right, np.float64) @ v.T for tau in taus]
    return u @ combine(cores) @ v


@pytest.fixture
def taus():
    return [adapter(seed, rank) for seed, rank in ((0, 2), (1, 3), (2, 4))]


def close(found, expected, tolerance=2e-5):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        size = np.abs(np.asarray(leaf)).max()
        np.testing.assert_allclose(np.asarray(found[path]), np.asarray(leaf), atol=tolerance * size, err_msg=path)


def test_each_adapter_comes_back_whole(taus):
    for number, tau in enumerate(taus):
        found = merge.core_space(taus, lambda cores, number=number: cores[number])
        close(found, tau)
        assert {leaf.rank for leaf in tree.flatten(found).values()} == {9}  # the sum of the ranks


@pytest.mark.parametrize(
    "linear", [merge.average, merge.task_arithmetic, partial(merge.task_arithmetic, weights=[1, 0, -2])]
)
def test_linear_merges_are_the_same_outside(taus, linear):
    close(merge.core_space(taus, linear), linear([dense(tau) for tau in taus]))


@pytest.mark.parametrize(
    ("inner", "combine"),
    [
        (lambda trees: jax.tree.map(lambda *x: jnp.max(jnp.abs(jnp.stack(x)), 0), *trees), lambda c: np.abs(c).max(0)),
        (lambda trees: jax.tree.map(lambda *x: sum(y**3 for y in x), *trees), lambda c: sum(x**3 for x in c)),
    ],
)
def test_merges_of_entries_against_numpy(taus, inner, combine):
    """The second is odd in each entry, so that the signs of the bases drop out; of the first only the size is told."""
    found = merge.core_space(taus, inner)
    for path, leaf in tree.flatten(found).items():
        expected = reference([tree.flatten(tau)[path] for tau in taus], combine)
        if combine([np.array([-1.0])])[0] < 0:
            np.testing.assert_allclose(np.asarray(leaf), expected, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(np.linalg.norm(leaf), np.linalg.norm(expected), rtol=1e-4)


def test_ties_in_the_core_differ_from_ties_outside(taus):
    inner = partial(merge.ties, density=0.2)
    found, outside = merge.core_space(taus, inner), inner([dense(tau) for tau in taus])
    assert all(isinstance(leaf, LowRank) for leaf in tree.flatten(found).values())
    path = "up/kernel"
    assert np.abs(np.asarray(tree.get(found, path)) - np.asarray(tree.get(outside, path))).max() > 0.1


def test_adapters_of_other_modules_and_other_leaves(taus):
    one, two = {"up": taus[0]["up"]}, {"up": taus[1]["up"], "down": taus[1]["down"], "bias": jnp.ones(3)}
    filled, partly = merge.cover([one, two])
    assert partly == {"down/kernel": [1], "bias": [1]} and filled[0]["down"]["kernel"].rank == 0
    rows = []
    found = merge.core_space(filled, merge.task_arithmetic, report=rows.append)
    close(found, merge.task_arithmetic([dense(tau) for tau in filled]))
    assert found["up"]["kernel"].rank == 5 and found["down"]["kernel"].rank == 3
    assert {row.path: row.rule for row in rows} == {
        "bias": "merged as it is", "down/kernel": "merged in a shared basis", "up/kernel": "merged in a shared basis"
    }  # fmt: skip


def test_more_ranks_than_dimensions():
    taus = [adapter(seed, 5, {"w": (8, 30)}) for seed in range(4)]
    found = merge.core_space(taus, merge.task_arithmetic)
    assert found["w"].rank == 8
    close(found, merge.task_arithmetic([dense(tau) for tau in taus]))


def test_a_rank_is_the_best_approximation(taus):
    whole, short = (merge.core_space(taus, merge.average, rank=rank) for rank in (None, 4))
    for path, leaf in tree.flatten(short).items():
        u, s, vt = np.linalg.svd(np.asarray(tree.get(whole, path)), full_matrices=False)
        assert leaf.rank == 4
        np.testing.assert_allclose(np.asarray(leaf), (u[:, :4] * s[:4]) @ vt[:4], atol=1e-4)
    with pytest.raises(ValueError, match="rank must be 1 or more, found 0"):
        merge.core_space(taus, merge.average, rank=0)


def test_stacked_layers_one_by_one(taus):
    def stacked(first, second):
        sides = (jnp.stack([getattr(x["up"]["kernel"], side) for x in (first, second)]) for side in ("left", "right"))
        return {"w": LowRank(*sides)}

    many = [stacked(adapter(seed), adapter(seed + 10)) for seed in (0, 1)]
    inner = partial(merge.ties, density=0.5, scope="leaf")
    found = merge.core_space(many, inner)["w"]
    for layer in (0, 1):
        alone = [{"w": LowRank(tau["w"].left[layer], tau["w"].right[layer])} for tau in many]
        np.testing.assert_allclose(np.asarray(found)[layer], np.asarray(merge.core_space(alone, inner)["w"]), atol=1e-4)


def test_inside_jit(taus):
    merged = jax.jit(partial(merge.core_space, merge=merge.average))(taus)
    close(merged, merge.core_space(taus, merge.average))
