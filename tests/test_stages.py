"""Models as tuples of stages."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, Stream, bico, fit, leaf_report, single_stage, theseus, tree
from tvjax.stages import layer_groups, local_params, owner_paths, reindex, run_stage


def times(params, carry):
    return carry * params["factor"]


def plus(params, carry):
    return carry + params["offset"]


def make_model():
    params = {"layers": {str(i): {"factor": jnp.float32(i + 2)} for i in range(3)}, "end": {"offset": jnp.float32(1)}}
    stages = (
        *(Stage(f"layers/{i}", times, (("", f"layers/{i}"),), "layers") for i in range(3)),
        Stage("end", plus, (("", "end"),)),
    )
    return Model(params, stages)


def test_a_model_runs_its_stages_in_order():
    assert float(make_model()(jnp.float32(1))) == 2 * 3 * 4 + 1


def test_a_model_is_a_pytree_of_its_parameters():
    model = make_model()
    assert len(jax.tree.leaves(model)) == 4
    doubled = jax.tree.map(lambda leaf: 2 * leaf, model)
    assert float(doubled(jnp.float32(1))) == 4 * 6 * 8 + 2
    gradient = jax.grad(lambda m: m(jnp.float32(1)))(model)
    assert float(gradient.params["layers"]["0"]["factor"]) == 12
    assert float(jax.jit(lambda m, x: m(x))(model, jnp.float32(2))) == 49


def test_equal_stages_are_compiled_once():
    def cubed(params, carry):
        return carry * params["factor"] ** 3

    stages = tuple(Stage(f"layers/{i}", cubed, (("", f"layers/{i}"),), "layers") for i in range(3))
    model = Model(make_model().params, stages)
    before = run_stage._cache_size()
    model(jnp.float32(1))
    assert run_stage._cache_size() == before + 1


def test_local_params_and_their_owners():
    params = {"a": {"x": 1.0, "y": 2.0}, "b": {"z": 3.0}}
    stage = Stage("s", times, (("", "a"), ("inner/b", "b")))
    assert local_params(stage, params) == {"x": 1.0, "y": 2.0, "inner": {"b": {"z": 3.0}}}
    assert owner_paths(stage, params) == {"x": "a/x", "y": "a/y", "inner/b/z": "b/z"}
    assert local_params(Stage("s", times), params) is params
    with pytest.raises(ValueError, match="no subtree 'c'"):
        local_params(Stage("s", times, (("", "c"),)), params)


def test_reindex_repeats_and_drops_layers():
    model = make_model()
    rebuilt = reindex(model, {"layers": (0, 0, 2)})
    assert [stage.name for stage in rebuilt.stages] == ["layers/0", "layers/1", "layers/2", "end"]
    assert [stage.paths[0][1] for stage in rebuilt.stages] == ["layers/0", "layers/0", "layers/2", "end"]
    assert float(rebuilt(jnp.float32(1))) == 2 * 2 * 4 + 1
    assert {name: len(stages) for name, stages in layer_groups(rebuilt).items()} == {"layers": 3, "end": 1}
    with pytest.raises(ValueError, match=r"cannot rebuild 'layers' from layers \(3,\).*layers \(3\), end \(1\)"):
        reindex(model, {"layers": (3,)})
    with pytest.raises(ValueError, match="cannot rebuild 'blocks'"):
        reindex(model, {"blocks": (0,)})


def test_a_model_without_a_loss_says_so():
    model = make_model()
    assert not model.has_loss
    with pytest.raises(ValueError, match="no loss: give one with Model.with_loss"):
        model.loss(None, jnp.ones(1), jnp.ones(1))
    assert model.with_loss(lambda p, o, y: o).has_loss


def test_rows_count_the_tokens_of_their_grid():
    assert Stream(1, (2, 3)).tokens == 7 and Stream().tokens is None


# -- functions of any make as models of one stage ---------------------------------------------------------------------


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def squared(loss_params, outputs, labels):
    return ((outputs - labels) ** 2).sum(-1)


ROWS = [Batch(normal(20, 6, seed=seed), normal(20, 3, seed=seed + 9)) for seed in (1, 2)]


def plain(params, x):
    return jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"]


def plain_params(seed):
    return {
        "in": {"kernel": normal(6, 8, seed=seed), "bias": normal(8, seed=seed)},
        "out": {"kernel": normal(8, 3, seed=seed)},
    }


@pytest.mark.parametrize("transport", [theseus(), bico()], ids=lambda t: t.name)
def test_a_plain_function(transport):
    model = single_stage(plain, plain_params(0), loss=squared)
    state = fit(transport, model, model, ROWS, check_gradients=True)
    tau = plain_params(5)
    moved = transport.apply(state, tau)
    if transport.name == "theseus":  # outputs of the first layer: 7 of 8 directions
        kept = tree.flatten(moved)["in/bias"] @ model.params["in"]["kernel"].T
        np.testing.assert_allclose(kept, tau["in"]["bias"] @ model.params["in"]["kernel"].T, atol=1e-3)
    np.testing.assert_allclose(moved["out"]["kernel"], tau["out"]["kernel"], atol=1e-3)


class Net(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def run_net(net, x):
    return jax.vmap(net)(x)


def make_net(seed, width):
    one, two = jax.random.split(jax.random.key(seed))
    return Net(eqx.nn.Linear(6, width, key=one), eqx.nn.Linear(width, 3, key=two))


@pytest.mark.parametrize("transport", [theseus(), bico()], ids=lambda t: t.name)
def test_an_equinox_model(transport):
    source, target = (single_stage(run_net, make_net(seed, width), loss=squared) for seed, width in ((0, 5), (1, 7)))
    state = fit(transport, source, target, ROWS)
    moved = transport.apply(state, source.params)
    assert isinstance(moved, Net)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, target.params)
    # The same model: Equinox kernels are [out, in], and the second reads full-rank inputs.
    itself = transport.apply(fit(transport, source, source, ROWS), source.params)
    np.testing.assert_allclose(itself.second.weight, source.params.second.weight, atol=1e-3)
    assert {leaf.action for leaf in leaf_report(state)} == {"rotated"}


def scanned(params, x):
    def step(hidden, layer):
        return hidden + jnp.tanh(hidden @ layer["kernel"] + layer["bias"]), None

    return jax.lax.scan(step, x, params["layers"])[0] @ params["out"]


def unrolled(params, x):
    for i in range(params["layers"]["kernel"].shape[0]):
        x = x + jnp.tanh(x @ params["layers"]["kernel"][i] + params["layers"]["bias"][i])
    return x @ params["out"]


def stacked_params(seed, width):
    layers = {"kernel": normal(3, width, width, seed=seed), "bias": normal(3, width, seed=seed)}
    return {"layers": layers, "out": normal(width, 3, seed=seed)}


@pytest.mark.parametrize("transport", [theseus(), bico()], ids=lambda t: t.name)
def test_a_scanned_stack_is_moved_layer_by_layer(transport):
    source, target = (stacked_params(seed, 6) for seed in (0, 1))
    tau = stacked_params(2, 6)
    found = [
        transport.apply(fit(transport, *(single_stage(f, p, loss=squared) for p in (source, target)), ROWS), tau)
        for f in (scanned, unrolled)
    ]
    for path, leaf in tree.flatten(found[0]).items():
        assert leaf.shape == tree.flatten(target)[path].shape
        np.testing.assert_allclose(leaf, tree.flatten(found[1])[path], atol=5e-3, err_msg=path)


def shared_scan(params, x):
    def step(hidden, _):
        return jnp.tanh(hidden @ params["kernel"] + params["bias"]), None

    return jax.lax.scan(step, x, None, length=3)[0].mean(1) @ params["out"]


@pytest.mark.parametrize("transport", [theseus(), bico()], ids=lambda t: t.name)
def test_a_layer_that_a_scan_repeats_sees_the_rows_of_every_pass(transport):
    params = {"kernel": normal(6, 6), "bias": normal(6), "out": normal(6, 3)}
    model = single_stage(shared_scan, params, loss=squared)
    batches = [Batch(normal(10, 2, 6, seed=seed), normal(10, 3, seed=seed)) for seed in (1, 2)]
    state = fit(transport, model, model, batches)
    rows = {leaf.target: leaf.measures["rows_in"] for leaf in leaf_report(state) if "rows_in" in leaf.measures}
    assert rows["kernel"] == 3 * 40
    np.testing.assert_allclose(transport.apply(state, params)["kernel"], params["kernel"], atol=1e-3)
