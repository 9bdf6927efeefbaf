"""An operation sees automatic axes, and its results lie like its arguments."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from tvjax import placement


def joined(params, inputs):
    """What explicit axes refuse: a concatenation and a contraction of arrays that lie differently."""
    return {"out": jnp.concatenate([jnp.ones((1, 16)), inputs @ params["w"]])[1:], "sum": inputs.sum()}


door = placement.automatic(lambda params, inputs: inputs)(joined)


@pytest.fixture
def arguments():
    return {"w": jnp.arange(128.0).reshape(8, 16)}, jnp.arange(64.0).reshape(8, 8)


@pytest.mark.parametrize("wrap", (lambda f: f, jax.jit), ids=("eager", "jit"))
def test_the_numbers_of_one_device_and_the_rows_of_the_inputs(spread, arguments, alike, wrap):
    expected = jax.tree.map(jax.device_get, joined(*arguments))
    params, inputs = spread.params(arguments[0]), spread.rows(arguments[1])
    found = wrap(door)(params, inputs)
    alike(found, expected)
    if AxisType.Explicit in spread.mesh.axis_types:
        assert found["out"].sharding.spec[0] == inputs.sharding.spec[0]
        assert found["out"].sharding.mesh == spread.mesh


def test_explicit_arrays_are_seen_without_a_copy(three, arguments):
    array = three.params(arguments[0])["w"]
    seen = []
    placement.automatic(lambda x: x)(lambda x: seen.append(x) or x)(array)
    pointers = [[s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in (array, seen[0])]
    assert pointers[0] == pointers[1]
    assert AxisType.Explicit not in seen[0].sharding.mesh.axis_types


def test_gradients_and_vmap(three, arguments, alike):
    def loss(params, inputs):
        return (door(params, inputs)["out"] ** 2).sum()

    expected = jax.device_get(jax.grad(loss)(*arguments))
    params, inputs = three.params(arguments[0]), three.rows(arguments[1])
    explicit = AxisType.Explicit in three.mesh.axis_types
    alike(jax.jit(jax.grad(loss))(params, inputs), expected, params if explicit else None)
    by_example = jax.vmap(lambda x: door(params, x[None])["out"][0])(inputs)
    alike({"out": by_example}, {"out": joined(*arguments)["out"]})


def test_iterators_are_followed(three, arguments):
    @placement.automatic(lambda arrays: ())
    def total(arrays):
        return sum(float(jnp.stack([x, jnp.ones_like(x)]).sum()) for x in arrays)

    arrays = [three.params(arguments[0]["w"]), three.rows(arguments[0]["w"])]
    assert total(iter(arrays)) == 2 * (arguments[0]["w"].sum() + 128)


def test_two_meshes_are_refused(arguments):
    one, other = (jax.make_mesh((8,), (name,)) for name in ("data", "fsdp"))
    arrays = [
        jax.device_put(arguments[1], jax.sharding.NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))
        for mesh in (one, other)
    ]
    with pytest.raises(ValueError, match=r"over one mesh, found \(data=8\) and \(fsdp=8\)"):
        door({"w": arrays[0]}, arrays[1])


def test_one_device_in_turn(three, arguments):
    array = three.params(arguments[0]["w"])
    found = [placement.on_one_device(turn, jnp.negative, array) for turn in range(2)]
    assert [len(x.sharding.device_set) for x in found] == [1, 1]
    assert found[0].devices() != found[1].devices()
    assert placement.like(found[1], array).sharding == array.sharding
    assert jax.jit(lambda x: placement.on_one_device(0, jnp.negative, x))(array).shape == array.shape
