"""Leaves of low rank: one leaf everywhere, and what its product is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import tree
from tvjax.factors import core, dense, dot, total
from tvjax.finite import check_finite


def low(d_in=6, d_out=4, rank=2, seed=0, shape=()):
    random = np.random.default_rng(seed)
    draw = lambda *sizes: jax.device_put(np.float32(random.normal(size=sizes)))  # noqa: E731
    return tv.LowRank(draw(d_in, rank), draw(rank, d_out), shape)


@pytest.fixture
def tau():
    return {"up": {"kernel": low(), "bias": jnp.arange(4.0)}, "query": low(6, 8, 3, 1, (6, 2, 4)), "off": None}


@pytest.fixture
def params():
    return {"up": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}, "query": jnp.ones((6, 2, 4)), "off": jnp.ones(2)}


def close(found, expected, tolerance=1e-5):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(np.asarray(found[path]), np.asarray(leaf), atol=tolerance, err_msg=path)


def kept(tree_):
    return {path for path, leaf in tree.flatten(tree_).items() if isinstance(leaf, tv.LowRank)}


def test_it_is_one_leaf(tau):
    assert list(tree.flatten(tau)) == ["query", "up/bias", "up/kernel"]
    assert {path: leaf.shape for path, leaf in tree.flatten(tau).items()} == {
        "query": (6, 2, 4), "up/bias": (4,), "up/kernel": (6, 4)
    }  # fmt: skip
    assert tau["query"].rank == 3 and tau["query"].ndim == 3 and tau["query"].cut == 1 and tau["query"].size == 48
    assert tree.structure(tau).num_leaves == 3
    assert kept(tree.select(tau, "**/kernel")) == {"up/kernel"}
    assert tree.leaf_type(tau["query"]) == jax.ShapeDtypeStruct((6, 2, 4), jnp.float32)


def test_the_product_is_what_arrays_expect(tau):
    leaf = tau["up"]["kernel"]
    expected = np.asarray(leaf.left, np.float64) @ np.asarray(leaf.right, np.float64)
    np.testing.assert_allclose(np.asarray(leaf), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.ones((6, 4)) + leaf, 1 + expected, rtol=1e-5, atol=1e-6)
    assert jnp.asarray(leaf).dtype == leaf.dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_apply_adds_the_product_in_float32(tau, params, dtype):
    stored = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    edited = jax.jit(tv.apply)(stored, tau, 0.5)
    close(edited, tv.apply(stored, dense(tau), 0.5), 1e-6 if dtype == jnp.float32 else 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(edited)} == {jnp.dtype(dtype)}


def test_apply_takes_half_precision_factors_at_full_precision(params):
    leaf = low()
    half = tv.LowRank(leaf.left.astype(jnp.bfloat16), leaf.right.astype(jnp.bfloat16))
    edited = tv.apply(params, {"up": {"kernel": half}})["up"]["kernel"]
    exact = 1 + np.asarray(half.left, np.float64) @ np.asarray(half.right, np.float64)
    np.testing.assert_allclose(edited, exact, rtol=1e-6, atol=1e-6)


def test_arithmetic_keeps_the_form(tau):
    other = {
        "up": {"kernel": low(rank=1, seed=5), "bias": jnp.ones(4)},
        "query": low(6, 8, 2, 6, (6, 2, 4)),
        "off": None,
    }
    for found, expected in (
        (tv.negate(tau), tv.negate(dense(tau))),
        (tv.scale(tau, -2.5), tv.scale(dense(tau), -2.5)),
        (tv.scale(tau, {"up": 3.0}), tv.scale(dense(tau), {"up": 3.0})),
        (tv.add(tau, other), tv.add(dense(tau), dense(other))),
        (tv.analogy(tau, other, tau), tv.analogy(*map(dense, (tau, other, tau)))),
    ):
        assert kept(found) == {"up/kernel", "query"}
        close(found, expected)
    assert tv.add(tau, other)["up"]["kernel"].rank == 3
    mixed = tv.add(tau, dense(other))
    assert kept(mixed) == set()
    close(mixed, tv.add(dense(tau), dense(other)))


def test_factors_that_split_an_axis_elsewhere_are_added_as_arrays():
    one, two = low(6, 8, 2, 0, (6, 2, 4)), low(12, 4, 2, 1, (6, 2, 4))
    assert total([one, two]) is None
    close({"w": tv.add({"w": one}, {"w": two})["w"]}, {"w": jnp.asarray(one) + jnp.asarray(two)})
    np.testing.assert_allclose(dot(one, two), np.vdot(np.asarray(one), np.asarray(two)), rtol=1e-4)


def test_norms_without_a_product(tau):
    other = jax.tree.map(lambda leaf: 2 * leaf + 0.1, tau)
    np.testing.assert_allclose(tree.norm(tau), tree.norm(dense(tau)), rtol=1e-6)
    for second in (other, dense(other)):
        np.testing.assert_allclose(tree.dot(tau, second), tree.dot(dense(tau), dense(other)), rtol=1e-5)
        np.testing.assert_allclose(tree.cosine(tau, second), tree.cosine(dense(tau), dense(other)), rtol=1e-5)
    shapes = [
        var.aval.shape
        for eqn in jax.make_jaxpr(lambda x: tree.norm({"w": x}))(low(200, 300)).eqns
        for var in eqn.outvars
    ]
    assert (200, 300) not in shapes
    assert list(tree.by_leaf(tree.norm, tau)) == list(tree.flatten(tau))


def test_a_difference_that_cancels_has_its_own_norm():
    """A Gram matrix would square the rounding of the factors: 1e-3 of them here, and no digit of the rest."""
    leaf = low()
    near = tv.add({"w": leaf}, tv.scale({"w": leaf}, -(1 - 1e-4)))
    np.testing.assert_allclose(tree.norm(near), 1e-4 * tree.norm({"w": leaf}), rtol=1e-2)


def test_stacked_layers():
    leaf = tv.LowRank(jnp.ones((3, 6, 2)), jnp.ones((3, 2, 4)))
    assert leaf.shape == (3, 6, 4) and leaf.layers == 1 and core(leaf).shape == (3, 2, 2)
    np.testing.assert_allclose(tree.norm({"w": leaf}), tree.norm({"w": jnp.asarray(leaf)}), rtol=1e-6)


def test_rank_zero_is_no_change(params):
    nothing = tv.LowRank.zeros((6, 4))
    assert nothing.rank == 0 and not np.any(np.asarray(nothing))
    assert float(tree.norm({"w": nothing})) == 0
    assert tv.add({"w": nothing}, {"w": low()})["w"].rank == 2


def test_transformations_pass_through(tau):
    many = jax.tree.map(lambda *leaves: jnp.stack(leaves), tau, tv.scale(tau, 2.0))
    norms = jax.vmap(tree.norm)(many)
    np.testing.assert_allclose(norms, [tree.norm(tau), tree.norm(tv.scale(tau, 2.0))], rtol=1e-5)
    gradient = jax.grad(lambda t: jnp.sum(tv.apply({"w": jnp.ones((6, 4))}, {"w": t})["w"]))(low())
    np.testing.assert_allclose(gradient.left, np.broadcast_to(low().right.sum(1), (6, 2)), rtol=1e-5)


def test_what_cannot_be_is_said(params):
    with pytest.raises(ValueError, match=r"\[..., d_in, r\] and \[..., r, d_out\], found \(6, 2\) and \(3, 4\)"):
        tv.LowRank(jnp.ones((6, 2)), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"up/kernel: parameters \(6, 4\), task vector \(6, 5\)"):
        tv.apply(params, {"up": {"kernel": low(6, 5)}})
    bad = low()
    with pytest.raises(ValueError, match="w/left: 1 of 12"):
        check_finite({"w": tv.LowRank(bad.left.at[0, 0].set(jnp.nan), bad.right)}, "the task vector")


def test_merges_and_coefficients_take_the_product(tau):
    taus = [tau, tv.scale(tau, 3.0)]
    close(tv.merge.average(taus), tv.merge.average([dense(t) for t in taus]))
    coefficients = tv.compose.init(taus, value=0.5)
    close(tv.compose.weighted_sum(taus, coefficients), tv.compose.weighted_sum([dense(t) for t in taus], coefficients))
