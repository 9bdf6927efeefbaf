import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvjax import tree
from tvjax.compose import combine, entries, few_shot, init, value, weighted_sum
from tvjax.compose.partitions import partition_ids

LAYOUTS = {
    "leaf": {},
    "vector": {"blocks": "vector"},
    "groups": {"blocks": {"**": "rest", "dense": "dense"}},
    "function": {"blocks": lambda path: path[0]},
    "leaf x 3": {"partitions": 3, "key": jax.random.key(4)},
    "vector x 3": {"blocks": "vector", "partitions": 3, "key": jax.random.key(4)},
    "matrices": {"matrices_only": True},
}


def filled(coefficients, seed=0):
    values = np.random.default_rng(seed).normal(size=coefficients.values.shape)
    return dataclasses.replace(coefficients, values=jnp.asarray(values, jnp.float32))


def words(*numbers):
    return jnp.array(numbers, jnp.uint32)


def parts(coefficients, path, shape):
    """For each partition of a leaf, where it is."""
    layout = coefficients.layout
    if layout.partitions == 1:
        return [np.ones(shape, bool)]
    seed = words(*layout.seed, zlib.crc32(path.encode()))
    ids = np.asarray(partition_ids(shape, layout.partitions, seed))
    return [ids == part for part in range(layout.partitions)]


def factors(coefficients, path, shape):
    """For each task vector that covers a leaf, its coefficients entry by entry."""
    place = next(place for place in coefficients.layout.places if place.path == path)
    if place.block is None:
        return {}
    values = np.asarray(coefficients.values, np.float64)[:, place.block]
    where = parts(coefficients, path, shape)
    return {index: sum(values[index, part] * mask for part, mask in enumerate(where)) for index in place.vectors}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_sum_is_what_numpy_says(tiny, name):
    coefficients = filled(init(tiny.taus, **LAYOUTS[name]))
    flat = [tree.flatten(tau) for tau in tiny.taus]
    found, theta = (tree.flatten(p) for p in (combine(tiny.model.params, tiny.taus, coefficients), tiny.model.params))
    assert found.keys() == theta.keys()
    for path, leaf in theta.items():
        expected = np.asarray(leaf, np.float64)
        if path != "order":
            for index, factor in factors(coefficients, path, leaf.shape).items():
                expected = expected + factor * np.asarray(flat[index][path], np.float64)
        assert found[path].dtype == leaf.dtype
        np.testing.assert_allclose(found[path], expected, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_jit_is_eager(tiny, name):
    coefficients = filled(init(tiny.taus, **LAYOUTS[name]))
    for function in (combine, lambda _, taus, c: weighted_sum(taus, c)):
        arguments = tiny.model.params, tiny.taus, coefficients
        tiny.assert_close(jax.jit(function)(*arguments), function(*arguments), 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_zero_coefficients_are_the_base_model_to_the_bit(tiny, name, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, tiny.model.params)
    found = jax.jit(combine)(params, tiny.taus, init(tiny.taus, **LAYOUTS[name]))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for one, other in zip(*map(jax.tree.leaves, (found, params)), strict=True):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradient_of_a_coefficient_is_the_inner_product_of_gradient_and_task_vector(tiny, name):
    objective, model = few_shot(tiny.model, tiny.batch), tiny.model
    coefficients = filled(init(tiny.taus, **LAYOUTS[name]))

    def loss(params):
        return value(objective, params, [tiny.batch], jax.random.key(0))

    @jax.jit
    def both(coefficients):
        params = combine(model.params, tiny.taus, coefficients)
        of_params = jax.grad(loss, allow_int=True)(params)
        return of_params, jax.grad(lambda c: loss(combine(model.params, tiny.taus, c)))(coefficients)

    gradient, found = both(coefficients)
    gradient, flat = tree.flatten(gradient), [tree.flatten(tau) for tau in tiny.taus]
    expected = np.zeros(coefficients.values.shape)
    for place in coefficients.layout.places:
        g = np.asarray(gradient[place.path], np.float64)
        for index in place.vectors if place.block is not None else ():
            product = g * np.asarray(flat[index][place.path], np.float64)
            for part, mask in enumerate(parts(coefficients, place.path, g.shape)):
                expected[index, place.block, part] += product[mask].sum()
    assert np.count_nonzero(expected) > 0.5 * expected.size
    np.testing.assert_allclose(found.values, expected, atol=1e-5)


def test_equal_partitions_are_one_coefficient_a_leaf(tiny):
    whole = filled(init(tiny.taus))
    split = init(tiny.taus, partitions=4, key=jax.random.key(0))
    split = dataclasses.replace(split, values=jnp.broadcast_to(whole.values, split.values.shape))
    tiny.assert_close(combine(tiny.model.params, tiny.taus, split), combine(tiny.model.params, tiny.taus, whole), 1e-6)


def test_leaves_that_are_no_matrices_stay(tiny):
    found = combine(tiny.model.params, tiny.taus, filled(init(tiny.taus, matrices_only=True)))
    same = {path for path, leaf in tree.flatten(found).items() if leaf is tree.flatten(tiny.model.params)[path]}
    assert same == {"dense/bias", "scale", "order"}


def test_partitions_are_even_and_differ_by_leaf_and_key():
    ids = np.asarray(partition_ids((300, 40), 7, words(1, 2)))
    counts = np.bincount(ids.ravel(), minlength=7)
    assert ids.dtype == np.int32 and abs(counts - 12000 / 7).max() < 5 * np.sqrt(12000 / 7)
    for other in ((1, 3), (2, 2)):
        agreement = (ids == np.asarray(partition_ids((300, 40), 7, words(*other)))).mean()
        assert abs(agreement - 1 / 7) < 0.02
    assert abs((ids[1:] == ids[:-1]).mean() - 1 / 7) < 0.02 and abs((ids[:, 1:] == ids[:, :-1]).mean() - 1 / 7) < 0.02
    np.testing.assert_array_equal(ids, np.asarray(partition_ids((12000,), 7, words(1, 2))).reshape(300, 40))


def test_partitions_are_the_same_when_leaves_lie_over_a_mesh(tiny):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    coefficients = filled(init(tiny.taus[:1], partitions=3, key=jax.random.key(1)))

    def placed(leaf):
        axis = next((i for i, size in enumerate(leaf.shape) if size % 2 == 0), None)
        spec = [None] * leaf.ndim
        if axis is not None:
            spec[axis] = "data"
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    params, taus = jax.tree.map(placed, (tiny.model.params, tiny.taus[:1]))
    assert not params["dense"]["kernel"].is_fully_replicated
    tiny.assert_close(
        jax.jit(combine)(params, taus, coefficients), combine(tiny.model.params, tiny.taus[:1], coefficients), 1e-6
    )


def test_the_compiled_gradient_keeps_no_wide_copy_of_the_vectors():
    """One model, one gradient, and the vectors as they are stored: 8 vectors in 16 bits, kept wide, take 8 models."""
    size = 512
    params = {name: jnp.zeros((size, size)) for name in "abcd"}
    taus = [jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)] * 8
    model_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def loss(coefficients, params, taus, x):
        edited = combine(params, taus, coefficients)
        for name in "abcd":
            x = jnp.tanh(x @ edited[name])
        return x.sum()

    for options, limit in (({}, 2), ({"partitions": 5, "key": jax.random.key(0)}, 6)):
        arguments = init(taus, **options), params, taus, jnp.ones((4, size))
        memory = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < limit * model_bytes, options


def test_entries_tell_every_leaf(tiny):
    coefficients = filled(init(tiny.taus, names=["one", "two", "part"], matrices_only=True))
    found = {(entry.vector, entry.path): entry for entry in entries(coefficients)}
    assert len(found) == sum(len(jax.tree.leaves(tau)) for tau in tiny.taus)
    assert found["part", "scale"].block is None and found["part", "scale"].values == ()
    block = coefficients.layout.blocks.index("dense/kernel")
    assert found["two", "dense/kernel"].values == (float(coefficients.values[1, block, 0]),)


def test_a_weighted_sum_has_the_structure_of_the_first_vector_where_that_covers_all(tiny):
    assert jax.tree.structure(weighted_sum(tiny.taus, init(tiny.taus))) == jax.tree.structure(tiny.taus[0])
    found = weighted_sum(tiny.taus[::-1], init(tiny.taus[::-1]))
    assert tree.flatten(found).keys() == tree.flatten(tiny.taus[0]).keys()


def test_bad_requests_are_refused(tiny):
    taus, model = tiny.taus, tiny.model
    for options, message in (
        ({"blocks": {"dense": "dense"}}, "matches 2 leaves"),
        ({"blocks": {"dens": "dense"}}, "nearest: 'dense"),
        ({"blocks": "layer"}, "expected 'leaf', 'vector'"),
        ({"partitions": 2}, "no key"),
        ({"partitions": 0}, "expected 1 or more"),
        ({"names": ["a", "a", "b"]}, "a different one for each"),
    ):
        with pytest.raises(ValueError, match=message):
            init(taus, **options)
    with pytest.raises(ValueError, match="one at least"):
        init([])
    with pytest.raises(ValueError, match="a list of task vectors"):
        init(taus[0])
    with pytest.raises(ValueError, match=r"scale: \(\), in task vector 1 \(2,\)"):
        init([taus[0], {"scale": jnp.ones(2)}])
    with pytest.raises(ValueError, match="w: int32 in task vector 0"):
        init([{"w": jnp.ones(2, jnp.int32)}])
    with pytest.raises(ValueError, match="no leaf that may take part"):
        init([{"w": jnp.ones(2)}], matrices_only=True)
    coefficients = init(taus)
    with pytest.raises(ValueError, match="found 2 task vectors"):
        combine(model.params, taus[:2], coefficients)
    with pytest.raises(ValueError, match="conv/kernel: 2 had no such leaf"):
        combine(model.params, [*taus[:2], taus[0]], coefficients)
    with pytest.raises(ValueError, match="scale: 0 lacks it"):
        combine(model.params, [{**taus[0], "scale": None}, *taus[1:]], coefficients)
    with pytest.raises(ValueError, match="does not fit the parameters"):
        combine({"scale": model.params["scale"]}, taus, coefficients)
