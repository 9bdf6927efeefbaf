"""Paths, selection, norms and similarities."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import tree

PARAMS = {
    "vision": {"blocks": {str(i): {"up": {"kernel": i, "bias": -i}} for i in (0, 1, 10)}, "projection": {"kernel": 7}},
    "logit_scale": 5,
}


def selected(include, exclude=()):
    return list(tree.flatten(tree.select(PARAMS, include, exclude)))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("logit_scale", (), ["logit_scale"]),
        ("vision/blocks/1", (), ["vision/blocks/1/up/bias", "vision/blocks/1/up/kernel"]),
        ("vision/blocks/1*/**/bias", (), ["vision/blocks/1/up/bias", "vision/blocks/10/up/bias"]),
        ("vision/blocks/[01]", "**/bias", ["vision/blocks/0/up/kernel", "vision/blocks/1/up/kernel"]),
        ("vision/*/kernel", (), ["vision/projection/kernel"]),
        (["**/projection", "logit_*"], (), ["logit_scale", "vision/projection/kernel"]),
        ("**", "vision", ["logit_scale"]),
    ],
)
def test_patterns(include, exclude, expected):
    assert selected(include, exclude) == expected


def test_selection_keeps_the_structure():
    part = tree.select(PARAMS, "logit_scale")
    assert jax.tree.structure(part, is_leaf=lambda x: x is None) == jax.tree.structure(PARAMS)
    assert part["vision"]["projection"]["kernel"] is None


def test_a_pattern_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(ValueError, match=r"'vision/block/1' matches none of 8 paths; nearest: 'vision/blocks/1'"):
        tree.select(PARAMS, "vision/block/1")
    with pytest.raises(ValueError, match="nearest"):
        tree.select(PARAMS, "**", exclude="up")


def test_flatten_and_nest_are_inverse():
    assert tree.nest(tree.flatten(PARAMS)) == PARAMS
    with pytest.raises(ValueError, match="share the path 'a/b'"):
        tree.flatten({"a/b": 1, "a": {"b": 2}})
    with pytest.raises(ValueError, match="passes through a leaf"):
        tree.nest({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="already taken"):
        tree.nest({"a/b": 2, "a": 1})


def test_get_and_put():
    assert tree.get(PARAMS, "vision/projection") == {"kernel": 7}
    assert tree.get(PARAMS, "") is PARAMS
    assert tree.put({}, "a/b", 1) == {"a": {"b": 1}}
    with pytest.raises(ValueError, match="'missing' is missing"):
        tree.get(PARAMS, "vision/missing")


def random_tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.standard_normal((3, 4)), dtype),
        "b": [jnp.asarray(rng.standard_normal(5), dtype), None],
    }


def flat64(x):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(x)])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_measures_match_numpy_in_float32(dtype):
    x, y = random_tree(0, dtype), random_tree(1, dtype)
    u, v = flat64(x), flat64(y)
    expected = {
        tree.dot: u @ v,
        tree.cosine: u @ v / np.linalg.norm(u) / np.linalg.norm(v),
        tree.sign_agreement: np.mean(np.sign(u) == np.sign(v)),
    }
    for measure, value in expected.items():
        result = measure(x, y)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, value, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(measure)(x, y), value, rtol=1e-5)
    np.testing.assert_allclose(tree.norm(x), np.linalg.norm(u), rtol=1e-5)


def test_half_precision_does_not_overflow():
    assert np.isfinite(tree.norm({"a": jnp.full(100, 6e4, jnp.float16)}))


def test_mixed_dtypes_and_scalars():
    x = {"a": jnp.ones(2, jnp.bfloat16), "b": np.float32(2.0), "c": 3.0, "d": np.ones((1, 1), np.float16)}
    np.testing.assert_allclose(tree.dot(x, x), 2 + 4 + 9 + 1)


def test_measures_of_zero_and_of_nothing():
    zero = jax.tree.map(jnp.zeros_like, random_tree(0))
    assert float(tree.cosine(zero, random_tree(1))) == 0
    assert float(tree.sign_agreement(zero, random_tree(1))) == 0
    assert float(tree.norm({"a": None})) == 0
    assert float(tree.sign_agreement({}, {})) == 0


def test_by_leaf_uses_paths():
    x, y = random_tree(0), random_tree(1)
    values = tree.by_leaf(tree.dot, x, y)
    assert list(values) == ["a", "b/0"]
    chex.assert_trees_all_close(sum(values.values()), tree.dot(x, y), rtol=1e-5)


def test_trees_that_differ_are_named():
    x = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"b: \(3,\) and \(4,\)"):
        tree.dot(x, {"a": jnp.ones(2), "b": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"b: \(3,\) and missing\n  c: missing and \(3,\)"):
        tree.by_leaf(tree.cosine, x, {"a": jnp.ones(2), "c": jnp.ones(3)})


def test_a_norm_is_one_program_for_each_shape(programs):
    def ones(*shape):
        return jax.device_put(np.ones(shape, np.float32))

    tree.norm([ones(2), ones(3)])  # what is done with scalars
    assert programs(tree.norm, [ones(3, 1, 2), ones(2, 1, 3), ones(3, 1, 2)]) == ["_sum_of_squares"] * 2
