"""Coefficients of leaves that are stacked over layers: those of the unstacked model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import tree
from tvjax.checkpoints.coefficients import load_coefficients, save_coefficients
from tvjax.compose import ada_merging, combine, entries, init, weighted_sum
from tvjax.report.inspection_tables import coefficient_table
from tvjax.stages import single_stage

LAYOUTS = {
    "leaf": {},
    "vector": {"blocks": "vector"},
    "groups": {"blocks": {"**": "rest", "blocks/1": "second", "**/bias": "biases"}},
    "leaf x 3": {"partitions": 3, "key": jax.random.key(4)},
    "matrices": {"matrices_only": True},
}


def unrolled(seed, layers=3):
    draw = np.random.default_rng(seed).normal
    block = {"kernel": (4, 6), "bias": (6,)}
    shapes = {"blocks": {str(i): block for i in range(layers)}, "head": {"kernel": (6, 2)}}
    return jax.tree.map(
        lambda s: jnp.asarray(draw(size=s), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def filled(coefficients, by_block):
    """Coefficients with the given values, matched by the names of the blocks."""
    values = np.stack([by_block[name] for name in coefficients.layout.blocks], axis=1)
    return dataclasses.replace(coefficients, values=jnp.asarray(values, jnp.float32))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layer_of_a_stack_is_a_leaf(name, axis):
    params, taus = unrolled(0), [unrolled(1), unrolled(2), {"head": unrolled(3)["head"]}]
    one = init(taus, **LAYOUTS[name])
    stacked = [tv.stack(tau, "blocks", axis) if "blocks" in tau else tau for tau in taus]
    two = init(stacked, stacks="blocks", axis=axis, **LAYOUTS[name])
    assert set(one.layout.blocks) == set(two.layout.blocks)
    draw = np.random.default_rng(0).normal
    values = {block: draw(size=(3, one.layout.partitions)) for block in one.layout.blocks}
    one, two = filled(one, values), filled(two, values)
    expected = combine(params, taus, one)
    for call in (combine, jax.jit(combine)):
        found = tv.unstack(call(tv.stack(params, "blocks", axis), stacked, two), "blocks", axis)
        for path, leaf in tree.flatten(expected).items():
            np.testing.assert_allclose(tree.flatten(found)[path], leaf, atol=1e-6, err_msg=path)
    assert {e for e in entries(one) if e.values} == {e for e in entries(two) if e.values}
    assert len(coefficient_table(two).rows) == 3

    def gradient(params, taus, coefficients):
        loss = lambda c: tree.norm(combine(params, taus, c)) ** 2  # noqa: E731
        return dict(
            zip(coefficients.layout.blocks, jax.jit(jax.grad(loss))(coefficients).values.swapaxes(0, 1), strict=True)
        )

    theirs = gradient(tv.stack(params, "blocks", axis), stacked, two)
    for block, leaf in gradient(params, taus, one).items():
        np.testing.assert_allclose(theirs[block], leaf, rtol=1e-4, atol=1e-4)


def test_without_a_word_a_stacked_leaf_is_one_block():
    stacked = [tv.stack(unrolled(1), "blocks")]
    assert init(stacked).layout.blocks == ("blocks/bias", "blocks/kernel", "head/kernel")
    assert len(init(stacked, stacks="blocks").layout.blocks) == 7


def test_stacked_coefficients_on_disk(tmp_path):
    stacked = [tv.stack(unrolled(1), "blocks", 1)]
    coefficients = init(stacked, stacks="blocks", axis=1, value=0.5, partitions=2, key=jax.random.key(1))
    save_coefficients(tmp_path / "c.safetensors", coefficients)
    loaded, _ = load_coefficients(tmp_path / "c.safetensors")
    assert loaded.layout == coefficients.layout
    for one, two in zip(*(jax.tree.leaves(weighted_sum(stacked, c)) for c in (coefficients, loaded)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_layer_wise_ada_merging_of_a_scanned_model():
    """It learns the same coefficients as for the unrolled model."""

    def scanned(params, x):
        x = jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["kernel"]), None), x, params["blocks"])[0]
        return {"logits": x @ params["head"]}

    def in_turn(params, x):
        for layer in params["blocks"].values():
            x = jnp.tanh(x @ layer["kernel"])
        return {"logits": x @ params["head"]}

    draw = np.random.default_rng(0).normal

    def make():
        blocks = {str(i): {"kernel": jnp.asarray(draw(size=(4, 4)), jnp.float32)} for i in range(3)}
        return {"blocks": blocks, "head": jnp.asarray(draw(size=(4, 2)), jnp.float32)}

    params, taus, x = make(), [make(), make()], jnp.asarray(draw(size=(16, 4)), jnp.float32)
    options = {"key": jax.random.key(0), "epochs": 1, "batches_per_epoch": 3}
    one = ada_merging(params, taus, [(single_stage(in_turn, params), x)], **options).trainable
    params, taus = tv.stack(params, "blocks"), [tv.stack(tau, "blocks") for tau in taus]
    two = ada_merging(params, taus, [(single_stage(scanned, params), x)], stacks="blocks", **options).trainable
    assert one.layout.blocks == two.layout.blocks and np.any(np.abs(one.values - 0.3) > 1e-3)
    np.testing.assert_allclose(two.values, one.values, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stacks": "block"}, "'block' matches none"),
        ({"stacks": "blocks", "axis": 2}, r"(?s)1 leaves have no layer axis 2.*blocks/bias: \(3, 6\)"),
    ],
)
def test_stacks_that_are_not_there(options, message):
    with pytest.raises(ValueError, match=message):
        init([tv.stack(unrolled(1), "blocks")], **options)


def test_vectors_of_another_depth():
    coefficients = init([tv.stack(unrolled(1), "blocks")], stacks="blocks")
    with pytest.raises(ValueError, match=r"blocks/bias: 0 has \(2, 6\), expected 3 layers at axis 0"):
        weighted_sum([tv.stack(unrolled(1, layers=2), "blocks")], coefficients)
