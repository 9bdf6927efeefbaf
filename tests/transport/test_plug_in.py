"""A transport of one's own: a file and a registration; it is planned, stored, resumed, chained and reported."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, fit, leaf_report, single_stage
from tvjax.checkpoints.transport_state import TransportStore, load_state, save_state
from tvjax.transport import chain, gradfix, make_transport, methods, register, registry
from tvjax.transport.base import Link, LinkState, MapInfo, Needs, Rule, Transport, register_state
from tvjax.transport.plan import plan


@register_state
class Means(NamedTuple):
    """A state that nobody in the package knows: the mean input of each side of a kernel."""

    source: jax.Array
    target: jax.Array


def mean_shift(*, strength: float = 1.0) -> Transport:
    """Adds ``strength * m_B m_A^T tau / |m_A|^2`` to the task vector: a toy that moves kernels of one shape."""
    link = Link(
        "mean_shift", "source_to_target", Needs(activations=True), _fit, partial(_transform, strength), same_shapes=True
    )
    return Transport((link,))


def _fit(pair) -> LinkState:
    arrays, measures, rules, infos = {}, {}, [], []
    for leaf in pair.leaves:
        sites = [site for site in pair.target_table.sites if site.path == leaf.local and site.kind == "dense"]
        if not sites:
            rules.append(Rule(leaf.target, leaf.source, "passed through", leaf.shape, leaf.shape))
            continue
        means, rows = [], 0
        for walk, index in ((pair.source, pair.source_index), (pair.target, pair.target_index)):
            seen = [
                walk.observe(index, batch, frozenset({sites[0].input}), frozenset()) for batch in range(pair.batches)
            ]
            inputs = jnp.concatenate([captured.input(sites[0]) for captured in seen])
            means.append(inputs.mean(0))
            rows = inputs.shape[0]
        name = f"{pair.name}:{leaf.local}"
        arrays[name] = Means(*means)
        measures[name] = {"rows": jnp.float32(rows)}
        infos.append(MapInfo(name, leaf.shape, rows, leaf.shape[0]))
        rules.append(Rule(leaf.target, leaf.source, "shifted", leaf.shape, leaf.shape, why=name))
    return LinkState("mean_shift", arrays, measures, tuple(rules), tuple(infos))


def _transform(strength, part, flat):
    rules = {rule.source: rule for rule in part.rules}
    moved = {}
    for path, leaf in flat.items():
        means = part.arrays.get(rules[path].why)
        shift = 0.0
        if means is not None:
            shift = strength * jnp.outer(means.target, means.source @ leaf) / jnp.sum(means.source**2)
        moved[rules[path].target] = leaf + shift
    return moved


@pytest.fixture(autouse=True, scope="module")
def registered():
    """Here alone: other tests ask what the package itself knows."""
    register("mean_shift", mean_shift)
    yield
    del registry._METHODS["mean_shift"]


def loss(_, outputs, labels):
    return jnp.sum(outputs * labels[:, None], -1)


@pytest.fixture
def case():
    random = np.random.default_rng(0)

    def normal(*shape):
        return jax.device_put(np.float32(random.normal(size=shape)))

    source, target = (
        single_stage(lambda p, x: jnp.tanh(x @ p["w"] + p["b"]), {"w": normal(4, 3), "b": normal(3)}, loss=loss)
        for _ in range(2)
    )
    return source, target, [Batch(normal(6, 4), normal(6)) for _ in range(2)], {"w": normal(4, 3), "b": normal(3)}


def test_it_is_known_by_its_name():
    assert "mean_shift" in methods()
    assert make_transport("mean_shift+gradfix", {"mean_shift.strength": 2.0}).name == "mean_shift+gradfix"
    with pytest.raises(ValueError, match="there is a method 'mean_shift' already"):
        register("mean_shift", gradfix)
    with pytest.raises(ValueError, match="cannot name a method"):
        register("a+b", gradfix)


def test_it_is_fitted_planned_reported_and_chained(case):
    source, target, batches, tau = case
    state = fit(mean_shift(), source, target, batches)
    moved = jax.jit(mean_shift().apply)(state, tau)
    x = jnp.concatenate([batch.inputs for batch in batches]).mean(0)
    np.testing.assert_allclose(moved["w"], tau["w"] + jnp.outer(x, x @ tau["w"]) / (x @ x), rtol=1e-4, atol=1e-5)
    assert [(leaf.target, leaf.action) for leaf in leaf_report(state)] == [("b", "passed through"), ("w", "shifted")]
    planned = plan(mean_shift(), source, target, batches)
    assert [info.name for info in planned.stages[0].maps] == ["model:w"] and planned.memory["maps"] == 2 * 4 * 4
    both = chain(mean_shift(), gradfix())
    masked = both.apply(fit(both, source, target, batches), tau)
    assert set(np.unique(np.asarray(masked["w"] == moved["w"]) | (np.asarray(masked["w"]) == 0))) == {True}


def test_it_is_saved_and_resumed(case, tmp_path):
    source, target, batches, tau = case
    state = fit(mean_shift(), source, target, batches)
    save_state(tmp_path / "state.safetensors", state)
    loaded = load_state(tmp_path / "state.safetensors")
    assert isinstance(loaded.parts[0].arrays["model:w"], Means) and loaded.parts[0].maps == state.parts[0].maps
    np.testing.assert_array_equal(mean_shift().apply(loaded, tau)["w"], mean_shift().apply(state, tau)["w"])
    store = TransportStore(tmp_path / "maps", {"method": "mean_shift"})
    fit(mean_shift(), source, target, batches, cache=store)
    resumed = fit(mean_shift(), source, target, [batches[0]], cache=store)  # nothing is looked at again
    np.testing.assert_array_equal(resumed.parts[0].arrays["model:w"].source, state.parts[0].arrays["model:w"].source)
