"""What every merge keeps to, one battery for all of them."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvjax import merge, tree


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Hundreds of tiny programs are compiled here; test_elementwise.py and test_matrices.py run them optimised."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def scaled(taus, factor):
    return jax.tree.map(lambda leaf: factor * leaf, taus)


def test_the_structure_of_the_first_in_float32(method, taus):
    merged = method.merge(taus)
    assert jax.tree.structure(merged) == jax.tree.structure(taus[0])
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, taus[0])
    assert merged["patch"]["frozen"] is None
    for path, leaf in tree.flatten(merged).items():
        assert isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32, path
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf != 0) or leaf.size == 1, path


def test_the_vectors_are_left_as_they_are(method, taus):
    before = jax.tree.map(np.array, taus)
    method.merge(jax.tree.map(np.asarray, taus))
    method.merge(taus)
    jax.tree.map(np.testing.assert_array_equal, taus, before)


def test_one_vector_is_the_identity(method, taus, close):
    if method.one is None:
        pytest.skip("declared not to be")
    close(method.merge(taus[:1], **method.one), taus[0], method.tolerance)


def test_two_equal_vectors_are_the_identity(method, taus, close):
    if method.two is None:
        pytest.skip("declared not to be")
    close(method.merge([taus[0], taus[0]], **method.two), taus[0], method.tolerance)


def test_the_order_does_not_matter(method, taus, close):
    if not method.symmetric:
        pytest.skip("the place in the list decides on the mask or on the data")
    close(method.merge(taus[::-1]), method.merge(taus), 10 * method.tolerance)


def test_a_zero_vector_changes_nothing(method, taus, close):
    if method.zeros is None:
        pytest.skip("declared to count")
    paths = [path for path, leaf in tree.flatten(taus[0]).items() if method.zeros == "all" or jnp.ndim(leaf) > 1]
    close(method.merge([*taus[:2], scaled(taus[0], 0)]), method.merge(taus[:2]), 10 * method.tolerance, paths)


def test_zero_vectors_merge_to_zero(method, taus):
    merged = method.merge(scaled(taus, 0))
    assert all(np.array_equal(leaf, np.zeros_like(leaf)) for leaf in jax.tree.leaves(merged))


def test_it_scales_with_the_vectors(method, taus, close):
    close(method.merge(scaled(taus, 4.0)), scaled(method.merge(taus), 4.0), 10 * method.tolerance)


def test_sixteen_bits_and_memory_maps_on_host_are_the_same_numbers(method, taus, close, tmp_path):
    def on_disk(path, leaf):
        file = tmp_path / path.replace("/", "_")
        np.asarray(leaf).tofile(file)
        return np.memmap(file, np.float32, "r", shape=leaf.shape or (1,)).reshape(leaf.shape)

    half = [jax.tree.map(lambda x, t=t: np.asarray(x).astype(t), taus[1]) for t in (np.float16, ml_dtypes.bfloat16)]
    stored = (tree.map_with_path(on_disk, taus[0]), *half[: len(taus) - 1])
    same = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tau) for tau in stored]
    close(method.merge(stored), method.merge(same), method.tolerance)


def test_inside_jit(method, taus, close):
    if not method.traced:
        pytest.skip("looks at numbers on the host, and says so")
    close(jax.jit(method.merge)(taus), method.merge(taus), 10 * method.tolerance)


def test_two_devices(method, taus, close):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def place(leaf):
        split = [axis for axis, size in enumerate(leaf.shape) if size % 2 == 0][-1:]
        spec = [None] * leaf.ndim
        for axis in split:
            spec[axis] = "data"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    merged, expected = method.merge(jax.tree.map(place, taus)), method.merge(taus)
    close(merged, expected, 10 * method.tolerance)
    for path, leaf in tree.flatten(expected).items():
        same = np.asarray(leaf == 0) == (np.asarray(tree.flatten(merged)[path]) == 0)
        assert same.all(), f"{path}: other entries are masked"


def test_every_leaf_is_reported(method, taus):
    rows = []
    method.merge(taus, report=rows.append)
    shapes = {path: np.shape(leaf) for path, leaf in tree.flatten(taus[0]).items()}
    assert {row.path: row.shape for row in rows} == shapes and len(rows) == len(shapes)
    assert all(row.rule for row in rows)
    assert all(path in merge.summary(rows) for path in shapes)


def test_vectors_that_do_not_fit(method, taus):
    one = taus[0]
    wrong = {**one, "norm": one["norm"][:-1]}
    with pytest.raises(ValueError, match=r"norm: \(40,\) and \(39,\)"):
        method.merge([one, wrong])
    with pytest.raises(ValueError, match="norm: .* and missing"):
        method.merge([one, {**one, "norm": None}])
    with pytest.raises(ValueError, match=r"(?s)floating.*norm: int32"):
        method.merge([{**tau, "norm": jnp.arange(40)} for tau in taus])
    with pytest.raises(ValueError, match="at least"):
        method.merge([])
    with pytest.raises(ValueError, match="a list of task vectors, found a dict"):
        method.merge(one)
    with pytest.raises(ValueError, match="no leaves"):
        method.merge([{"norm": None}, {"norm": None}])
    if method.least > 1:
        with pytest.raises(ValueError, match="at least 2 task vectors, found 1"):
            method.merge(taus[:1])


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_values_that_are_not_finite_are_refused(method, taus, value, place):
    bad = jax.tree.map(np.array, taus[-1])
    bad["blocks"][1]["kernel"][3, 5] = value
    with pytest.raises(ValueError, match=f"task vector {len(taus) - 1} has .*\n  blocks/1/kernel: 1 of 960\n"):
        method.merge([*taus[:-1], jax.tree.map(place, bad)])


def test_settings_out_of_range(method, taus):
    for name, values in method.settings.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                method.merge(taus, **{name: value})
        for value in (float("nan"), "much", None):
            with pytest.raises(ValueError, match="must be"):
                method.merge(taus, **{name: value})
        with pytest.raises(ValueError, match="nowhere"):
            method.merge(taus, **{name: {"**": 0.5, "nowhere": 0.5}})
        with pytest.raises(ValueError, match="bias"):
            method.merge(taus, **{name: {"**/kernel": 0.5}})
    if "weights" in method.settings:
        with pytest.raises(ValueError, match=f"weights: {len(taus) - 1} given for {len(taus)}"):
            method.merge(taus, weights=[1.0] * (len(taus) - 1))


def test_weights_by_path_and_by_depth(method, taus, close):
    if "weights" not in method.settings:
        pytest.skip("takes no weights")
    weights = [{"**": 1.0, "blocks/1": 0.5}, merge.ByDepth((1.0, 0.25), other=1.0), 1.0]
    found = tree.flatten(method.merge(taus, weights=weights[: len(taus)]))
    for block, each in (("blocks/0", [1.0, 1.0, 1.0]), ("blocks/1", [0.5, 0.25, 1.0])):
        expected = tree.flatten(method.merge(taus, weights=each[: len(taus)]))
        paths = [path for path in expected if path.startswith(block)]
        close(found, expected, method.tolerance, paths)
        assert len(paths) == 2


def test_every_public_merge_is_in_the_battery(methods):
    merges = {
        name
        for name in merge.__all__
        if inspect.isfunction(getattr(merge, name)) and "taus" in inspect.signature(getattr(merge, name)).parameters
    }
    assert merges - {"cover"} == {name.split("-")[0] for name in methods}  # which fills up what merges take
