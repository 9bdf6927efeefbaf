"""Walking a model: what it sees, stage by stage, is what one trace of the whole model sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, bico, chain, fit, gradfix, tree
from tvjax.capture.check import site_gradient
from tvjax.capture.views import transpose_view
from tvjax.walk import Walk, differentiable


def embed(params, carry):
    return {"hidden": carry["x"] @ params["kernel"], "kind": carry["kind"]}


def block(params, carry):
    hidden = carry["hidden"]
    inner = jax.nn.gelu(hidden @ params["up"]["kernel"] + params["up"]["bias"])
    return {**carry, "hidden": hidden + inner @ params["down"]["kernel"] + params["down"]["bias"]}


def head(params, carry):
    return {"scores": carry["hidden"].mean(1) @ params["kernel"], "kind": carry["kind"]}


def cross_entropy(loss_params, outputs, labels):
    scores = jax.nn.log_softmax(outputs["scores"] * loss_params)
    return -jnp.take_along_axis(scores, labels[:, None], 1)[:, 0]


def make_model(depth, seed=0, width=6):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jax.device_put(np.float32(0.5 * random.normal(size=shape)))

    def layer():
        return {
            "up": {"kernel": normal(width, 2 * width), "bias": normal(2 * width)},
            "down": {"kernel": normal(2 * width, width), "bias": normal(width)},
        }

    params = {
        "embed": {"kernel": normal(3, width)},
        "blocks": {str(i): layer() for i in range(depth)},
        "head": {"kernel": normal(width, 4)},
    }
    stages = (
        Stage("embed", embed, (("", "embed"),)),
        *(Stage(f"blocks/{i}", block, (("", f"blocks/{i}"),), "blocks") for i in range(depth)),
        Stage("head", head, (("", "head"),), fixed=("kernel",)),
    )
    return Model(params, stages, cross_entropy, jnp.float32(2))


def make_batches(count=2, size=4, seed=0):
    random = np.random.default_rng(seed)
    return [
        Batch(
            {"x": jnp.asarray(random.normal(size=(size, 5, 3)), jnp.float32), "kind": jnp.arange(size)},
            jnp.asarray(random.integers(0, 4, size), jnp.int32),
        )
        for _ in range(count)
    ]


def whole_gradient(model, batches):
    def loss(params):
        return sum(
            model.loss(model.loss_params, model.replace(params=params)(b.inputs), b.labels).sum() for b in batches
        )

    return tree.flatten(jax.grad(loss)(model.params))


@pytest.mark.parametrize("host", [False, True])
def test_sites_of_all_stages_give_the_gradient_of_the_whole_loss(host):
    model, batches = make_model(3), make_batches()
    walk = Walk(model, batches, host)
    found = {}
    for index in reversed(range(len(model.stages))):
        table = walk.table(index)
        activations = frozenset(site.input for site in table.sites if site.input is not None)
        gradients = frozenset(site.gradient for site in table.sites)
        leaves = tree.flatten(walk.params(index))
        ((_, prefix),) = model.stages[index].paths
        for batch in range(len(batches)):
            seen = walk.observe(index, batch, activations, gradients)
            for site in table.sites:
                part = transpose_view(site.view, site_gradient(site, seen), leaves[site.path].shape)
                path = f"{prefix}/{site.path}"
                found[path] = found[path] + part if path in found else part
        walk.release_after(index)
    expected = whole_gradient(model, batches)
    assert found.keys() == expected.keys()
    for path, gradient in expected.items():
        np.testing.assert_allclose(found[path], gradient, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("host", [False, True])
def test_cotangents_are_gradients_of_the_residual_stream(host):
    model, batches = make_model(2), make_batches()
    walk = Walk(model, batches, host)
    for index in range(len(model.stages) - 1):
        for batch, carry in enumerate(walk.carries(index + 1)):
            assert isinstance(carry["hidden"], np.ndarray if host else jax.Array)

            def loss(hidden, carry=carry, batch=batch, rest=model.stages[index + 1 :]):
                outputs = {**carry, "hidden": hidden}
                for stage in rest:
                    outputs = stage.function(tree.get(model.params, stage.paths[0][1]), outputs)
                return model.loss(model.loss_params, outputs, batches[batch].labels).sum()

            (found,) = walk.cotangents(index)[batch]
            np.testing.assert_allclose(found, jax.grad(loss)(jnp.asarray(carry["hidden"])), rtol=1e-5, atol=1e-6)


def test_releasing_forgets_and_keeps_what_is_needed():
    model, batches = make_model(4), make_batches()
    forwards = Walk(model, batches)
    forwards.release_before(3)  # three stages ahead at once: layers that no target layer is paired with
    assert np.isfinite(forwards.carries(3)[0]["hidden"]).all()
    reference = Walk(model, batches).cotangents(1)
    backwards = Walk(model, batches)
    names = frozenset(site.gradient for site in backwards.table(4).sites)
    for batch in range(len(batches)):
        backwards.observe(4, batch, frozenset(), names)
    backwards.cotangents(1)
    backwards.release_after(1)  # likewise, backwards
    for found, expected in zip(backwards.cotangents(1), reference, strict=True):
        np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


def test_differentiable_keeps_what_is_not_floating_in_place():
    carry = {"a": jnp.ones(2), "b": jnp.arange(3), "c": jnp.ones((), jnp.bfloat16)}
    leaves, rebuild = differentiable(carry)
    assert [leaf.dtype.name for leaf in leaves] == ["float32", "bfloat16"]
    rebuilt = rebuild([leaf * 2 for leaf in leaves])
    assert rebuilt["b"] is carry["b"] and rebuilt["a"].tolist() == [2, 2]


def test_a_loss_must_give_one_number_an_example():
    def mean_loss(loss_params, outputs, labels):
        return cross_entropy(loss_params, outputs, labels).mean()

    model = make_model(1).with_loss(mean_loss, jnp.float32(2))
    with pytest.raises(ValueError, match=r"one value for each example.*found shape \(\)"):
        Walk(model, make_batches()).cotangents(1)


# -- compilations ----------------------------------------------------------------------------------------------------

COMPILED = []


def count_compilations(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(event)


@pytest.fixture(scope="module", autouse=True)
def compilation_listener():
    jax.monitoring.register_event_duration_secs_listener(count_compilations)


def compilations(function):
    before = len(COMPILED)
    function()
    return len(COMPILED) - before


def test_compilations_do_not_grow_with_depth():
    # Everything of depth 2 is compiled; three layers more need nothing new, in the fit, its state and its use.
    batches, transport = make_batches(), chain(bico(), gradfix())

    def run(depth):
        source, target = make_model(depth), make_model(depth, seed=1)
        tau = jax.tree.map(lambda leaf: 0.1 * leaf, source.params)
        transport.apply(fit(transport, source, target, batches), tau)
        fit(transport, source, target, batches, stream=[tau])

    shallow = compilations(lambda: run(2))
    assert shallow > 0
    assert compilations(lambda: run(5)) == 0
