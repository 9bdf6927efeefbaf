"""Values that are not finite are found wherever they lie, and nothing else is taken for them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tvjax import tree
from tvjax.finite import check_finite, count_not_finite

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, np.complex64, ">f4"]
BAD = [np.nan, -np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_on_the_host(dtype):
    values = np.array([[0, 1, -1], [-0.0, 2**-14, -448]], dtype)
    assert count_not_finite(values) == count_not_finite(values[:0]) == 0
    for bad in BAD:
        for place in ((0, 0), (1, 2)):
            spoilt = values.copy()
            spoilt[place] = bad
            assert count_not_finite(spoilt) == count_not_finite(spoilt.T) == 1
            assert count_not_finite(spoilt[place]) == 1


def test_what_has_no_values_is_finite():
    check_finite(
        {"ids": np.arange(3), "mask": jnp.ones(2, bool), "key": jax.random.key(0), "none": None, "one": 1.0}, "it"
    )
    check_finite({"shape": jax.ShapeDtypeStruct((3,), jnp.float32), "empty": jnp.zeros((0, 3))}, "it")

    @jax.jit
    def traced(x):
        check_finite({"x": x}, "it")
        return x

    assert np.isnan(traced(jnp.nan))


@pytest.mark.parametrize("bad", BAD)
def test_leaves_are_named_wherever_they_lie(bad, tmp_path):
    (tmp_path / "leaf").write_bytes(np.array([0, bad, bad], np.float32).tobytes())
    leaves = {
        "device": jnp.array([bad, 0], jnp.bfloat16),
        "map": np.memmap(tmp_path / "leaf", np.float32, "r"),
        "number": float(bad),
        "sound": jnp.ones(4),
    }
    with pytest.raises(
        ValueError, match=r"it has .* NaN or infinite:\n  device: 1 of 2\n  map: 2 of 3\n  number: 1 of 1\n"
    ):
        check_finite(leaves, "it")


def test_answers_are_fetched_together(monkeypatch):
    fetched = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or device_get(tree))
    check_finite([jnp.ones(3) for _ in range(20)], "it")
    assert len(fetched) == 1


def test_similarities_of_what_is_not_finite_are_no_numbers():
    one, bad = {"a": jnp.ones(3)}, {"a": jnp.array([1.0, jnp.nan, 0.0])}
    for similarity in (tree.cosine, tree.sign_agreement):
        assert np.isnan(similarity(one, bad)) and similarity(one, {"a": jnp.zeros(3)}) == 0


def test_arrays_that_a_jitted_function_closes_over_are_looked_at():
    def scaled(tau):
        @jax.jit
        def function(factor):
            check_finite(tau, "the task vector")
            return factor * tau["w"]

        return function(2.0)

    np.testing.assert_array_equal(scaled({"w": jnp.ones(3)}), np.full(3, 2.0))
    with pytest.raises(ValueError, match="w: 1 of 3"):
        scaled({"w": jnp.array([1.0, jnp.nan, 2.0])})


def test_arrays_on_the_host_need_no_program(monkeypatch):
    def reduce(leaf):
        raise AssertionError("compiled")

    monkeypatch.setattr("tvjax.finite._all_finite", reduce)
    one, other = jax.devices()[:2]
    check_finite({"shape": jnp.ones((3, 17)), "moved": jax.device_put(jnp.ones(5, jnp.bfloat16), other)}, "it")
    mesh = jax.make_mesh((2,), ("data",), devices=[one, other])
    spread = jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, jax.P("data")))
    with pytest.raises(AssertionError, match="compiled"):
        check_finite({"spread": spread}, "it")
