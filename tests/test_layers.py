"""Stacks of layers, taken apart and put together."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import tvjax as tv
from tvjax import tree


def scanned(axis=0, layers=3):
    """Parameters of a scanned model, and the same of the unrolled one."""
    draw = np.random.default_rng(0).normal
    shapes = {"attention": {"kernel": (4, 2, 3), "bias": (2, 3)}, "norm": {"scale": (4,)}, "frozen": None}
    blocks = [
        jax.tree.map(lambda s: jnp.asarray(draw(size=s), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
        for _ in range(layers)
    ]
    other = {"embed": jnp.ones((5, 4)), "skipped": None}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *blocks)
    return {**other, "blocks": stacked}, {**other, "blocks": {str(i): block for i, block in enumerate(blocks)}}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, leaf in tree.flatten(expected).items():
        other = tree.flatten(found)[path]
        assert other.dtype == leaf.dtype
        np.testing.assert_array_equal(other, leaf, err_msg=path)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("layers", [1, 3, 11])
def test_each_is_the_inverse_of_the_other(axis, layers):
    stacked, unrolled = scanned(axis, layers)
    assert_same(tv.unstack(stacked, "blocks", axis), unrolled)
    assert_same(tv.stack(unrolled, "blocks", axis), stacked)
    assert_same(jax.jit(lambda p: tv.stack(tv.unstack(p, "blocks", axis), "blocks", axis))(stacked), stacked)


def test_scans_in_scans_and_patterns():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).astype(np.float32)
    params = {tower: {"groups": {"layers": {"kernel": kernel}}} for tower in ("text", "vision")}
    outer = tv.unstack(params, "*/groups")
    inner = tv.unstack(outer, ["text/groups/*/layers", "vision/groups/*/layers"])
    flat = tree.flatten(inner)
    assert len(flat) == 12 and flat["text/groups/1/layers/2/kernel"].tolist() == kernel[1, 2].tolist()
    assert np.shares_memory(flat["text/groups/1/layers/2/kernel"], kernel)
    back = tv.stack(tv.stack(inner, "**/layers"), "*/groups")
    assert_same(back, params)
    assert isinstance(back["text"]["groups"]["layers"]["kernel"], np.ndarray)


def test_the_whole_tree_and_a_bare_leaf():
    assert list(tree.flatten(tv.unstack({"w": jnp.ones((2, 3))}, ""))) == ["0/w", "1/w"]
    assert_same(tv.stack(tv.unstack({"w": jnp.ones((2, 3))}, "w"), "w"), {"w": jnp.ones((2, 3))})
    assert_same(tv.stack(tv.unstack({"w": jnp.ones((2, 3))}, ""), ""), {"w": jnp.ones((2, 3))})


def test_modules_and_lists_keep_their_kind():
    layer = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), layer)
    layers = tv.unstack({"layers": [stacked]}, "layers/0")["layers"][0]
    assert isinstance(layers["1"], eqx.nn.Linear)
    np.testing.assert_array_equal(layers["1"].weight, 2 * layer.weight)
    assert_same(
        tv.stack({"layers": [layer, layer]}, "layers"), {"layers": jax.tree.map(lambda x: jnp.stack([x, x]), layer)}
    )


def test_gradients_pass():
    stacked, _ = scanned()
    grads = jax.grad(lambda p: tree.norm(tv.unstack(p, "blocks")["blocks"]["1"]) ** 2)(stacked)["blocks"]
    np.testing.assert_allclose(grads["norm"]["scale"][1], 2 * stacked["blocks"]["norm"]["scale"][1], rtol=1e-5)
    assert not np.any(grads["norm"]["scale"][0])


def test_states_of_nnx_and_frozen_collections_keep_their_kind():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(2, 3, rngs=rngs)

    graph, state = nnx.split(nnx.Dict(blocks=make(nnx.Rngs(0))))
    for params in (state, freeze(nnx.to_pure_dict(state))):
        apart = tv.unstack(params, "blocks")
        assert type(apart) is type(params) and apart["blocks"]["2"]["kernel"].shape == (2, 3)
        assert_same(tv.stack(apart, "blocks"), params)
    assert nnx.merge(graph, tv.stack(tv.unstack(state, "blocks"), "blocks")).blocks.kernel.shape == (3, 2, 3)


def pair_of_layers(params, carry):
    """The body of a scan whose block holds two unlike layers, local and global."""
    x = carry["hidden"] + jnp.tanh(carry["hidden"] @ params["local"]["kernel"])
    return {**carry, "hidden": x * params["global"]["scale"]}


def stacked_model(axis, depth=3, function=None):
    draw = np.random.default_rng(0).normal
    blocks = [{"local": {"kernel": draw(size=(4, 4))}, "global": {"scale": draw(size=4)}} for _ in range(depth)]
    params = {"embed": jnp.ones((4, 4)), "decoder": {"layers": jax.tree.map(lambda *x: jnp.stack(x, axis), *blocks)}}
    stages = (
        tv.Stage("embed", lambda p, x: {"hidden": x @ p["embed"], "count": jnp.zeros(())}, (("embed", "embed"),)),
        tv.Stage(
            "blocks", function or tv.scanned(pair_of_layers, axis), (("", "decoder/layers"),), fixed=("local/kernel",)
        ),
    )
    return tv.Model(jax.tree.map(lambda x: x.astype(jnp.float32), params), stages)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_scanned_stage_becomes_one_for_each_layer(axis):
    model = stacked_model(axis)
    apart = tv.unstack(model, "decoder/layers", axis)
    assert [stage.name for stage in apart.stages] == ["embed", "blocks/0", "blocks/1", "blocks/2"]
    assert {stage.group for stage in apart.stages[1:]} == {"blocks"} and apart.stages[2].fixed == ("local/kernel",)
    assert {stage.function for stage in apart.stages[1:]} == {pair_of_layers}
    x = jnp.eye(4)
    np.testing.assert_allclose(apart(x)["hidden"], model(x)["hidden"], rtol=1e-6)
    assert_same(tv.stack(apart.params, "decoder/layers", axis), model.params)


ODD = {"w": jnp.ones((2, 3)), "s": jnp.ones(4)}
BAD = {
    "nothing": (lambda: tv.unstack(scanned()[0], "block"), "'block' matches none of .*nearest: 'blocks'"),
    "a scalar": (lambda: tv.unstack({"b": {"s": jnp.ones(())}}, "b"), r"(?s)'b': 1 leaves have no axis 0.*s: \(\)"),
    "lengths": (lambda: tv.unstack({"b": ODD}, "b"), r"(?s)one number of layers.*\[2, 4\].*w: \(2, 3\)"),
    "a gap": (lambda: tv.stack({"b": {"0": ODD, "2": ODD}}, "b"), r"holds no layers.*\['0', '2'\]"),
    "no numbers": (lambda: tv.stack({"b": ODD}, "b"), r"holds no layers.*\['s', 'w'\]"),
    "an array": (lambda: tv.stack({"b": jnp.ones(2)}, "b"), "holds no layers.*Array"),
    "a stage of its own": (
        lambda: tv.unstack(stacked_model(0, function=pair_of_layers), "decoder/layers"),
        r"stage 'blocks' reads, in a function of its own, \['decoder/layers'\].*scanned\(layer, axis=0\), \(\('', ",
    ),
    "another axis": (
        lambda: tv.unstack(stacked_model(1, depth=4), "decoder/layers", -1),
        "stage 'blocks' scans axis 1 of .*axis -1",
    ),
    "unlike": (lambda: tv.stack({"b": [ODD, {**ODD, "s": jnp.ones(3)}]}, "b"), r"(?s)b/0 and b/1 cannot.*s: "),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
