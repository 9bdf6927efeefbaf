"""What every transport keeps to, one battery for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvjax import apply, bico, chain, fit, gradfix, identity, leaf_report, orthogonal_shift, scale_by, theseus
from tvjax import transport_stages, tree
from tvjax.transport import load_state, save_state, summary

# A tolerance far above rounding, so that no direction stands on the edge of being kept.
TRANSPORTS = {
    "theseus": theseus(rank_tolerance=1e-3),
    "bico": bico(rank_tolerance=1e-3),
    "bico gradients": bico(input="gradients", rank_tolerance=1e-3),
    "gradfix": gradfix(),
    "orthogonal_shift": orthogonal_shift(),
    "identity": identity(),
    "scale_by": scale_by(1.5),
    "theseus+gradfix": chain(theseus(rank_tolerance=1e-3), gradfix(vote="mean"), scale_by(2.0)),
    "bico+gradfix": chain(bico(rank_tolerance=1e-3), gradfix(mode="sigmoid")),
    "scale_by+theseus": chain(scale_by(0.5), theseus(rank_tolerance=1e-3)),
}
every = pytest.mark.parametrize("name", TRANSPORTS)


@pytest.fixture(scope="session")
def fitted(tiny):
    states = {}

    def get(name):
        if name not in states:
            states[name] = fit(TRANSPORTS[name], tiny.a, tiny.b, tiny.batches)
        return TRANSPORTS[name], states[name]

    return get


def assert_close(found, expected, tolerance=1e-5):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=tolerance, err_msg=path)


@every
def test_moves_every_leaf_and_reports_it(tiny, fitted, name):
    transport, state = fitted(name)
    moved = transport.apply(state, tiny.tau)
    assert jax.tree.structure(moved) == jax.tree.structure(tiny.b.params)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, tiny.b.params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moved)} == {"float32"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    report = leaf_report(state)
    for link in transport.links:
        mine = [leaf.target for leaf in report if leaf.link == link.name]
        assert sorted(mine) == sorted(tree.flatten(tiny.b.params)), link.name
    assert all(path in summary(state) for path in tree.flatten(tiny.b.params))
    edited = apply(tiny.b.params, moved, 0.5)
    assert jax.tree.structure(edited) == jax.tree.structure(tiny.b.params)


@every
def test_streaming_equals_fit_and_apply(tiny, fitted, name):
    transport, state = fitted(name)
    other = jax.tree.map(lambda leaf: leaf[::-1], tiny.tau)
    found = transport_stages(transport, tiny.a, tiny.b, tiny.batches, [tiny.tau, other])
    for one, tau in zip(found, (tiny.tau, other), strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(tiny.b.params)
        assert_close(one, transport.apply(state, tau))


@every
def test_jit_vmap_and_grad_of_apply(tiny, fitted, name):
    transport, state = fitted(name)
    eager = transport.apply(state, tiny.tau)
    assert_close(jax.jit(transport.apply)(state, tiny.tau), eager)
    taus = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), tiny.tau)
    many = jax.jit(jax.vmap(transport.apply, (None, 0)))(state, taus)
    assert_close(jax.tree.map(lambda leaf: leaf[0], many), eager)

    def size(scale):
        return tree.norm(apply(tiny.b.params, transport.apply(state, tiny.tau), scale))

    slope = jax.grad(size)(jnp.float32(0.5))
    assert float(slope) == pytest.approx(float(size(0.5 + 1e-2) - size(0.5 - 1e-2)) / 2e-2, rel=1e-2, abs=1e-2)


@every
def test_a_saved_state_is_the_same_to_the_bit(tiny, fitted, name, tmp_path):
    transport, state = fitted(name)
    save_state(tmp_path / "state.safetensors", state)
    loaded = load_state(tmp_path / "state.safetensors")
    assert (loaded.paths, loaded.sources, loaded.notes) == (state.paths, state.sources, state.notes)
    assert [part.rules for part in loaded.parts] == [part.rules for part in state.parts]
    one, other = (tree.flatten(transport.apply(s, tiny.tau)) for s in (state, loaded))
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert leaf.tobytes() == other[path].tobytes(), path
    assert leaf_report(loaded) == leaf_report(state)


@every
def test_a_task_vector_of_a_subtree(tiny, fitted, name):
    transport, state = fitted(name)
    whole = tree.flatten(transport.apply(state, tiny.tau))
    part = tree.select(tiny.tau, "vision/blocks/1", exclude="**/bias")
    expected = {path: leaf for path, leaf in whole.items() if path in tree.flatten(part)}
    assert_close(tree.flatten(transport.apply(state, part)), expected)
    (streamed,) = transport_stages(transport, tiny.a, tiny.b, tiny.batches, [part])
    assert_close(tree.flatten(streamed), expected)


@pytest.mark.parametrize("name", ["theseus", "bico", "gradfix"])
def test_batches_sharded_over_a_mesh(tiny, fitted, name):
    transport, state = fitted(name)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    source, target = (jax.device_put(model, everywhere) for model in (tiny.a, tiny.b))
    batches = [jax.device_put(batch, rows) for batch in tiny.batches]
    assert_close(
        transport.apply(fit(transport, source, target, batches), tiny.tau), transport.apply(state, tiny.tau), 1e-3
    ) if name != "gradfix" else assert_same_votes(fit(transport, source, target, batches), state)


def assert_same_votes(found, expected):
    for path, votes in expected.parts[0].arrays.items():
        assert np.mean(np.asarray(found.parts[0].arrays[path]) != np.asarray(votes)) < 2e-3, path


@pytest.mark.parametrize("name", ["theseus", "bico", "gradfix"])
def test_residual_streams_in_host_memory(tiny, fitted, name):
    transport, state = fitted(name)
    kept = fit(transport, tiny.a, tiny.b, tiny.batches, host=True)
    assert_close(transport.apply(kept, tiny.tau), transport.apply(state, tiny.tau))


def test_identity_scale_and_shift(tiny, fitted):
    for name, factor in (("identity", 1.0), ("scale_by", 1.5)):
        transport, state = fitted(name)
        assert_close(transport.apply(state, tiny.tau), jax.tree.map(lambda leaf, f=factor: f * leaf, tiny.tau), 1e-7)
    transport, state = fitted("orthogonal_shift")
    moved, flat = (tree.flatten(t) for t in (transport.apply(state, tiny.tau), tiny.tau))
    for path, leaf in flat.items():
        a, b, tau = (np.asarray(x[path], np.float64) for x in (*map(tree.flatten, (tiny.a.params, tiny.b.params)), flat))
        d = b - a
        np.testing.assert_allclose(moved[path], tau - (tau * d).sum() / (d * d).sum() * d, atol=1e-5)
        assert abs(float((np.asarray(moved[path], np.float64) * d).sum())) < 1e-4 * np.linalg.norm(d) * np.linalg.norm(leaf)


def test_the_shift_of_equal_models_is_nothing(tiny):
    state = fit(orthogonal_shift(), tiny.a, tiny.a)
    assert_close(orthogonal_shift().apply(state, tiny.tau), tiny.tau, 0)


def test_a_chain_is_its_links_one_after_another(tiny, fitted):
    both, state = fitted("theseus+gradfix")
    first, first_state = fitted("theseus")
    votes = gradfix(vote="mean")
    after = votes.apply(fit(votes, tiny.b, tiny.b, tiny.batches), first.apply(first_state, tiny.tau))
    assert_close(both.apply(state, tiny.tau), jax.tree.map(lambda leaf: 2 * leaf, after), 1e-4)
    half, half_state = fitted("scale_by+theseus")
    moved = half.apply(half_state, tiny.tau)
    assert_close(moved, jax.tree.map(lambda leaf: 0.5 * leaf, first.apply(first_state, tiny.tau)))


def test_links_may_draw_on_different_batches(tiny, fitted):
    transport = TRANSPORTS["theseus+gradfix"]
    unlabelled = [batch._replace(labels=None) for batch in tiny.batches]
    few = tiny.make_batches(1, 4, seed=9)
    state = fit(transport, tiny.a.replace(loss=tiny.a.loss), tiny.b, {"theseus": unlabelled, "gradfix": iter(few)})
    assert state.parts[1].measures["vision/post_norm/scale"]["voters"] == 4
    first, first_state = fitted("theseus")
    votes = gradfix(vote="mean")
    after = votes.apply(fit(votes, tiny.b, tiny.b, few), first.apply(first_state, tiny.tau))
    assert_close(transport.apply(state, tiny.tau), jax.tree.map(lambda leaf: 2 * leaf, after), 1e-4)


def test_one_iterator_feeds_every_link(tiny, fitted):
    transport, state = fitted("theseus+gradfix")
    found = fit(transport, tiny.a, tiny.b, iter(tiny.batches))
    assert_close(transport.apply(found, tiny.tau), transport.apply(state, tiny.tau))


def test_the_task_of_the_labels_and_the_progress_are_told(tiny):
    seen = []
    state = fit(gradfix(), tiny.a, tiny.b, tiny.batches, task="digits", progress=lambda *args: seen.append(args))
    assert any("labels of digits" in note for note in state.notes)
    names = [stage.name for stage in reversed(tiny.b.stages)]
    assert seen == [(i + 1, len(names), name) for i, name in enumerate(names)]


def test_sixteen_bit_parameters_and_task_vectors(tiny, fitted):
    transport, _ = fitted("theseus")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (tiny.a.params, tiny.b.params, tiny.tau))
    state = fit(transport, tiny.a.replace(params=half[0]), tiny.b.replace(params=half[1]), tiny.batches)
    moved = transport.apply(state, half[2])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moved)} == {"float32"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))


def test_the_gradient_identity_can_be_checked_first(tiny):
    for transport in (theseus(), bico(), orthogonal_shift()):
        fit(transport, tiny.a, tiny.b, tiny.batches, check=True)
