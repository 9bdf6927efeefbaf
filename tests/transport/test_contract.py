"""What every transport keeps to, one battery for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tvjax import (
    apply,
    bico,
    fit,
    gradfix,
    leaf_report,
    orthogonal_shift,
    theseus,
    tree,
)
from tvjax.checkpoints import load_state, save_state
from tvjax.transport import summary


def assert_close(found, expected, tolerance=1e-5):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=tolerance, err_msg=path)


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


def test_streaming_equals_fit_and_apply(tiny, fitted, name):
    transport, state = fitted(name)
    other = jax.tree.map(lambda leaf: leaf[::-1], tiny.tau)
    found = fit(transport, tiny.a, tiny.b, tiny.batches, stream=[tiny.tau, other])
    for one, tau in zip(found, (tiny.tau, other), strict=True):
        assert jax.tree.structure(one) == jax.tree.structure(tiny.b.params)
        assert_close(one, transport.apply(state, tau))


def test_jit_vmap_and_grad_of_apply(tiny, fitted, name):
    transport, state = fitted(name)
    taus = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), tiny.tau)

    @jax.jit
    def both(state, taus, scale):
        def size(scale):
            edited = apply(tiny.b.params, jax.tree.map(lambda leaf: leaf[0], moved), scale)
            return tree.norm(edited)

        moved = jax.vmap(transport.apply, (None, 0))(state, taus)
        return moved, jax.value_and_grad(size)(scale)

    moved, (size, slope) = both(state, taus, jnp.float32(0.5))
    assert_close(jax.tree.map(lambda leaf: leaf[0], moved), transport.apply(state, tiny.tau))
    further = both(state, taus, jnp.float32(0.6))[1][0]
    assert float(further - size) == pytest.approx(0.1 * float(slope), rel=0.3, abs=1e-2)


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


def test_a_task_vector_of_a_subtree(tiny, fitted, name):
    transport, state = fitted(name)
    whole = tree.flatten(transport.apply(state, tiny.tau))
    part = tree.select(tiny.tau, "vision/blocks/1", exclude="**/bias")
    expected = {path: leaf for path, leaf in whole.items() if path in tree.flatten(part)}
    assert_close(tree.flatten(transport.apply(state, part)), expected)


def test_batches_sharded_over_a_mesh(tiny, fitted):
    transport, state = fitted("bico+gradfix")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    source, target = (jax.device_put(model, everywhere) for model in (tiny.a, tiny.b))
    found = fit(transport, source, target, [jax.device_put(batch, rows) for batch in tiny.batches])
    bridge, votes = transport.links[0], state.parts[1].arrays
    flat = tree.flatten(tiny.tau)
    moved, expected = (bridge.transform(s.parts[0], flat) for s in (found, state))
    assert_close(moved, expected, 1e-3)
    for path, kept in votes.items():  # rounding may move a gradient across the noise floor
        assert np.mean(np.asarray(found.parts[1].arrays[path]) != np.asarray(kept)) < 1e-2, path


@pytest.mark.parametrize("name", ["theseus", "bico", "gradfix"])
def test_residual_streams_in_host_memory(tiny, fitted, name):
    transport, state = fitted(name)
    kept = fit(transport, tiny.a, tiny.b, tiny.batches, offload=True)
    assert_close(transport.apply(kept, tiny.tau), transport.apply(state, tiny.tau))


def test_identity_scale_and_shift(tiny, fitted):
    for name, factor in (("identity", 1.0), ("scale_by", 1.5)):
        transport, state = fitted(name)
        assert_close(transport.apply(state, tiny.tau), jax.tree.map(lambda leaf, f=factor: f * leaf, tiny.tau), 1e-7)
    transport, state = fitted("orthogonal_shift")
    moved, flat = (tree.flatten(t) for t in (transport.apply(state, tiny.tau), tiny.tau))
    for path, leaf in flat.items():
        a, b, tau = (
            np.asarray(x[path], np.float64) for x in (*map(tree.flatten, (tiny.a.params, tiny.b.params)), flat)
        )
        d = b - a
        np.testing.assert_allclose(moved[path], tau - (tau * d).sum() / (d * d).sum() * d, atol=1e-5)
        assert abs(float((np.asarray(moved[path], np.float64) * d).sum())) < 1e-4 * np.linalg.norm(d) * np.linalg.norm(
            leaf
        )


def test_a_share_of_the_shift(tiny, fitted):
    """Linear between the task vector as it is and without its component; a fitted state serves any share."""
    whole, state = fitted("orthogonal_shift")
    assert_close(orthogonal_shift(beta=0.0).apply(state, tiny.tau), tiny.tau, 0)
    moved = whole.apply(state, tiny.tau)
    between = jax.tree.map(lambda tau, shifted: 0.75 * tau + 0.25 * shifted, tiny.tau, moved)
    assert_close(orthogonal_shift(beta=0.25).apply(state, tiny.tau), between)
    with pytest.raises(ValueError, match="orthogonal_shift has no option 'share'; the nearest of beta is 'beta'"):
        orthogonal_shift(share=0.5)
    with pytest.raises(ValueError, match="orthogonal_shift: beta is nan, expected a finite number"):
        orthogonal_shift(beta=float("nan"))


def test_the_shift_of_equal_models_is_nothing(tiny):
    state = fit(orthogonal_shift(), tiny.a, tiny.a)
    assert_close(orthogonal_shift().apply(state, tiny.tau), tiny.tau, 0)


def test_a_chain_is_its_links_one_after_another(tiny, fitted):
    votes = fitted("gradfix")[1]
    for link, mode, factor in (("theseus", "agree", 2), ("bico", "tanh", 1)):
        (both, state), (first, first_state) = fitted(f"{link}+gradfix"), fitted(link)
        after = gradfix(mode=mode).apply(votes, first.apply(first_state, tiny.tau))
        assert_close(both.apply(state, tiny.tau), jax.tree.map(lambda leaf, f=factor: f * leaf, after), 1e-3)
    (half, half_state), (first, first_state) = fitted("scale_by+theseus"), fitted("theseus")
    moved = half.apply(half_state, tiny.tau)
    assert_close(moved, jax.tree.map(lambda leaf: 0.5 * leaf, first.apply(first_state, tiny.tau)))


def test_links_may_draw_on_different_batches(tiny, fitted):
    transport, reference = fitted("theseus+gradfix")
    unlabelled = [batch._replace(labels=None) for batch in tiny.batches]
    state = fit(transport, tiny.a, tiny.b, {"theseus": unlabelled, "gradfix": iter(tiny.batches[:1])})
    assert state.parts[1].measures["vision/post_norm/scale"]["voters"] == 8
    for one, other in zip(*(jax.tree.leaves(s.parts[0]) for s in (state, reference)), strict=True):
        np.testing.assert_array_equal(one, other)
    votes = fit(gradfix(), tiny.b, tiny.b, tiny.batches[:1]).parts[0]
    for one, other in zip(*map(jax.tree.leaves, (state.parts[1], votes)), strict=True):
        np.testing.assert_array_equal(one, other)


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
    for transport in (theseus(), orthogonal_shift()):
        fit(transport, tiny.a, tiny.b, tiny.batches, check_gradients=True)


@pytest.mark.parametrize("method", [theseus, bico])
def test_the_last_batch_may_be_smaller(tiny, method):
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *tiny.batches)
    cut = len(whole.labels) - 3
    uneven = [jax.tree.map(lambda leaf, part=part: leaf[part], whole) for part in (slice(0, cut), slice(cut, None))]
    transport = method(rank_tolerance=1e-3)
    moved = [transport.apply(fit(transport, tiny.a, tiny.w, batches), tiny.tau) for batches in ([whole], uneven)]
    for path, leaf in tree.flatten(moved[0]).items():
        np.testing.assert_allclose(tree.flatten(moved[1])[path], leaf, atol=5e-3, err_msg=path)
