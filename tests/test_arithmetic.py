"""Task arithmetic."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import arithmetic
from tvjax.arithmetic import add, analogy, apply, interpolate, negate, scale, task_vector


def params(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "vision": {"blocks": [{"kernel": array(3, 4), "bias": array(4)} for _ in range(2)], "ids": jnp.arange(3)},
        "text": {"kernel": array(2, 2)},
        "logit_scale": array(),
    }


def leaves64(x):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(x)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_applying_the_task_vector_gives_the_finetuned_parameters(dtype):
    theta_0, theta_ft = params(0, dtype), params(1, dtype)
    tau = task_vector(theta_0, theta_ft)
    assert {leaf.dtype for leaf in jax.tree.leaves(tau)} == {jnp.dtype(jnp.float32)}
    assert tau["vision"]["ids"] is None
    edited = apply(theta_0, tau)
    chex.assert_trees_all_equal_shapes_and_dtypes(edited, theta_ft)
    if dtype == jnp.float32:
        chex.assert_trees_all_close(edited, theta_ft, rtol=1e-6, atol=1e-6)
    else:
        chex.assert_trees_all_equal(edited, theta_ft)


def test_half_precision_is_differenced_in_float32():
    before, after = {"w": jnp.asarray([256.0], jnp.bfloat16)}, {"w": jnp.asarray([1.0078125], jnp.bfloat16)}
    assert float(task_vector(before, after)["w"][0]) == 1.0078125 - 256.0
    mixed = task_vector(before, {"w": np.array([256.5], np.float32)})
    assert float(mixed["w"][0]) == 0.5


def test_stored_dtype_is_kept_and_rounded_once():
    theta = {"w": jnp.asarray([1.0], jnp.bfloat16)}
    tau = {"w": jnp.asarray([2.0**-9], jnp.float32)}
    assert apply(theta, tau, 4.0)["w"].dtype == jnp.bfloat16
    assert float(apply(theta, tau, 4.0)["w"][0]) == 1 + 2.0**-7


def test_numpy_and_python_leaves():
    theta_0, theta_ft = (
        {"a": 1.0, "b": np.ones(2, np.float32), "n": 3},
        {"a": 2.0, "b": np.zeros(2, np.float32), "n": 3},
    )
    edited = apply(theta_0, task_vector(theta_0, theta_ft), 0.5)
    chex.assert_trees_all_close(edited, {"a": 1.5, "b": np.full(2, 0.5, np.float32), "n": 3})


def test_a_subtree_applies_by_path():
    theta = params()
    tau = task_vector({"vision": theta["vision"]}, {"vision": params(1)["vision"]})
    edited = apply(theta, tau)
    chex.assert_trees_all_close(edited["vision"], params(1)["vision"], atol=1e-6)
    assert edited["text"]["kernel"] is theta["text"]["kernel"]
    assert edited["vision"]["ids"] is theta["vision"]["ids"]
    chex.assert_trees_all_equal(apply(theta, {}), theta)


def test_apply_under_jit_vmap_and_grad():
    theta = {"w": jnp.arange(3.0), "b": jnp.ones(())}
    tau = {"w": jnp.array([1.0, -1.0, 2.0])}
    chex.assert_trees_all_close(jax.jit(apply)(theta, tau, 0.5), apply(theta, tau, 0.5))
    many = jax.vmap(apply, in_axes=(None, None, 0))(theta, tau, jnp.arange(4.0))
    chex.assert_trees_all_close(many["w"][3], theta["w"] + 3 * tau["w"])

    def loss(tau, alpha):
        return jnp.sum(apply(theta, tau, alpha)["w"] ** 2)

    by_tau, by_alpha = jax.grad(loss, (0, 1))(tau, 0.5)
    edited = theta["w"] + 0.5 * tau["w"]
    np.testing.assert_allclose(by_tau["w"], edited, rtol=1e-6)
    np.testing.assert_allclose(by_alpha, 2 * edited @ tau["w"], rtol=1e-6)


def test_operations_against_numpy():
    a, b, c = (jax.tree.map(lambda x: x.astype(jnp.float32), params(seed)) for seed in range(3))
    t = 0.3
    for result, expected in (
        (add(a, b, c), [x + y + z for x, y, z in zip(*map(leaves64, (a, b, c)), strict=True)]),
        (negate(a), [-x for x in leaves64(a)]),
        (scale(a, 2.5), [2.5 * x for x in leaves64(a)]),
        (analogy(a, b, c), [z + y - x for x, y, z in zip(*map(leaves64, (a, b, c)), strict=True)]),
        (
            interpolate(params(0), params(1), t),
            [(1 - t) * x + t * y for x, y in zip(*map(leaves64, (a, b)), strict=True)],
        ),
    ):
        assert jax.tree.structure(result) == jax.tree.structure(a)
        for leaf, value in zip(jax.tree.leaves(result), expected, strict=True):
            np.testing.assert_allclose(leaf, value, atol=1e-5)


def test_analogy_recovers_a_parallelogram():
    a, b, c = ({"w": jnp.asarray(np.random.default_rng(seed).standard_normal(5))} for seed in range(3))
    d = jax.tree.map(lambda x, y, z: z + y - x, a, b, c)
    chex.assert_trees_all_close(analogy(a, b, c), d, atol=1e-6)


def test_none_is_not_covered():
    x, y = {"a": jnp.ones(2), "b": None, "c": None}, {"a": None, "b": jnp.ones(1), "c": None}
    chex.assert_trees_all_close(add(x, y), {"a": jnp.ones(2), "b": jnp.ones(1), "c": None})
    assert negate(x)["b"] is None and scale(x, 2.0)["b"] is None


def test_scale_by_patterns_is_differentiable():
    tau = params()
    result = scale(tau, {"vision": 2.0, "vision/blocks/1": {"kernel": 0.0}})
    np.testing.assert_array_equal(result["vision"]["blocks"][1]["kernel"], np.zeros((3, 4)))
    np.testing.assert_allclose(result["vision"]["blocks"][1]["bias"], 2 * tau["vision"]["blocks"][1]["bias"])
    np.testing.assert_allclose(result["text"]["kernel"], tau["text"]["kernel"])
    gradient = jax.grad(lambda s: scale({"a": jnp.array([3.0, 4.0])}, {"a": s})["a"].sum())(2.0)
    assert float(gradient) == 7


def test_no_leaf_in_silence():
    theta = {"a": jnp.ones(2), "n": jnp.arange(2)}
    cases = {
        r"b: not in the parameters": lambda: apply(theta, {"b": jnp.ones(1)}),
        r"a: parameters \(2,\), task vector \(3,\)": lambda: apply(theta, {"a": jnp.ones(3)}),
        r"n: the parameters hold int32": lambda: apply(theta, {"n": jnp.ones(2)}),
        r"scale must be a scalar": lambda: apply(theta, {"a": jnp.ones(2)}, jnp.ones(2)),
        r"n: only in the pretrained": lambda: task_vector(theta, {"a": jnp.ones(2)}),
        r"a: pretrained \(2,\), fine-tuned \(3,\)": lambda: task_vector(theta, theta | {"a": jnp.ones(3)}),
        r"a: pretrained float32, fine-tuned int32": lambda: task_vector(theta, theta | {"a": jnp.arange(2)}),
        r"integer leaf n differs": lambda: task_vector(theta, theta | {"n": jnp.ones(2, jnp.int32)}),
        r"a: \(2,\) and \(3,\)": lambda: add({"a": jnp.ones(2)}, {"a": jnp.ones(3)}),
        r"b: missing and \(2,\)": lambda: add({"a": jnp.ones(2)}, {"a": None, "b": jnp.ones(2)}),
        r"at least one task vector": add,
        r"factor of 'a' must be a scalar": lambda: scale({"a": jnp.ones(2)}, {"a": jnp.ones(2)}),
        r"'x' matches none": lambda: scale({"a": jnp.ones(2)}, {"x": 1.0}),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_long_lists_of_mismatches_are_cut():
    tau = {str(i): jnp.ones(1) for i in range(30)}
    with pytest.raises(ValueError, match="at 30 of 30 leaves(.|\n)*and 22 more"):
        arithmetic.apply({"a": jnp.ones(1)}, tau)
