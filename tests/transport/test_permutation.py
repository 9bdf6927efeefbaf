"""TransFusion as a transport: permutations of whole models, applied leaf by leaf."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import apply, chain, fit, gradfix, leaf_report, scale_by, theseus, transfusion, tree
from tvjax.align.permutations import permute, random_permutations
from tvjax.align.weight_matching import match_weights
from tvjax.checkpoints import load_state, save_state
from tvjax.models import clip, llama
from tvjax.models.symmetry import symmetry_of_config
from tvjax.transport import summary


@pytest.fixture(scope="module")
def copied(tiny):
    """A, a randomly permuted copy of it, and a task vector of A with that of the copy."""
    symmetry = symmetry_of_config(tiny.make_config())
    order = random_permutations(symmetry, tiny.a.params, jax.random.key(1))
    copy = tiny.a.replace(params=permute(symmetry, order, tiny.a.params))
    transport = transfusion(symmetry, key=jax.random.key(0))
    return SimpleNamespace(
        symmetry=symmetry,
        order=order,
        a=tiny.a,
        copy=copy,
        transport=transport,
        state=fit(transport, tiny.a, copy),
        tau=tiny.tau,
        expected=permute(symmetry, order, tiny.tau),
    )


def assert_same_bits(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


def test_a_task_vector_follows_a_permuted_copy_to_the_bit(tiny, copied):
    moved = copied.transport.apply(copied.state, copied.tau)
    assert jax.tree.structure(moved) == jax.tree.structure(copied.copy.params)
    assert_same_bits(moved, copied.expected)
    assert any((leaf != tree.flatten(copied.tau)[path]).any() for path, leaf in tree.flatten(moved).items())
    pixels = tiny.batches[0].inputs
    tuned = copied.a.replace(params=apply(copied.a.params, copied.tau))
    again = copied.copy.replace(params=apply(copied.copy.params, moved))
    np.testing.assert_allclose(again(pixels)["image"], tuned(pixels)["image"], rtol=1e-4, atol=1e-4)


def test_every_leaf_is_reported_with_its_cosines(copied):
    report = leaf_report(copied.state)
    params = tree.flatten(copied.copy.params)
    assert sorted(leaf.target for leaf in report) == sorted(params)
    for leaf in report:
        assert (leaf.link, leaf.source, leaf.action) == ("transfusion", leaf.target, "permuted")
        assert leaf.measures["cosine"] == pytest.approx(1, abs=1e-5)
        before = tree.cosine(tree.flatten(copied.a.params)[leaf.target], params[leaf.target])
        assert leaf.measures["cosine_before"] == pytest.approx(float(before), abs=1e-5)
    assert all(path in summary(copied.state) for path in params)


def test_what_the_table_fixes_passes_through(tiny):
    text = clip.CLIPTextConfig(16, 16, 32, 1, 2, max_position_embeddings=5, eos_token_id=15, projection_dim=6)
    config = clip.CLIPConfig(tiny.make_config().vision, text)
    a, b = (clip.clip(config, tiny.random_params(config, seed)) for seed in (0, 1))
    transport = transfusion(symmetry_of_config(config), key=jax.random.key(0))
    state = fit(transport, a, b)
    actions = {leaf.target: leaf.action for leaf in leaf_report(state)}
    assert {path for path, action in actions.items() if action == "passed through"} == {"logit_scale"}
    moved = transport.apply(state, jax.tree.map(jnp.ones_like, a.params))
    assert_same_bits(moved, jax.tree.map(jnp.ones_like, b.params))


def test_between_other_models_it_is_the_match_of_all_their_weights(tiny, copied):
    found = match_weights(copied.symmetry, tiny.a.params, tiny.b.params, key=jax.random.key(0))
    state = fit(copied.transport, tiny.a, tiny.b)
    assert_same_bits(copied.transport.apply(state, tiny.tau), permute(copied.symmetry, found.permutations, tiny.tau))
    assert found.after > found.before
    assert_same_bits(fit(copied.transport, tiny.a, tiny.b, [], stream=[tiny.tau])[0],
                     copied.transport.apply(state, tiny.tau))  # fmt: skip
    assert_same_bits(state.parts[0].arrays, fit(copied.transport, tiny.a, tiny.b).parts[0].arrays)


def test_a_task_vector_of_a_subtree(copied):
    part = tree.select(copied.tau, "vision/blocks/1", exclude="**/bias")
    expected = {path: leaf for path, leaf in tree.flatten(copied.expected).items() if path in tree.flatten(part)}
    assert_same_bits(tree.flatten(copied.transport.apply(copied.state, part)), expected)


def test_a_saved_state_applies_the_same(copied, tmp_path):
    save_state(tmp_path / "state.safetensors", copied.state)
    loaded = load_state(tmp_path / "state.safetensors")
    assert [part.rules for part in loaded.parts] == [part.rules for part in copied.state.parts]
    assert leaf_report(loaded) == leaf_report(copied.state)
    assert_same_bits(copied.transport.apply(loaded, copied.tau), copied.expected)


def test_a_state_of_another_table_is_refused(copied):
    rows = tuple(row._replace(axes=tuple(a and a.replace("hidden", "units") for a in row.axes)) for row in
                 copied.symmetry.rows)  # fmt: skip
    other = transfusion(copied.symmetry._replace(rows=rows), key=jax.random.key(0))
    with pytest.raises(ValueError, match="no permutation of 'vision/blocks/0/units'.*another symmetry table"):
        other.apply(copied.state, copied.tau)


def test_jit_vmap_and_grad_of_apply(copied):
    taus = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), copied.tau)

    @jax.jit
    def both(state, taus):
        def weighed(taus):
            moved = jax.vmap(copied.transport.apply, (None, 0))(state, taus)
            return tree.dot(jax.tree.map(lambda leaf: leaf[0], moved), copied.copy.params), moved

        (_, moved), gradient = jax.value_and_grad(weighed, has_aux=True)(taus)
        return moved, gradient

    moved, gradient = both(copied.state, taus)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[0], moved), copied.expected)
    assert_same_bits(jax.tree.map(lambda leaf: leaf[0], gradient), copied.a.params)  # the adjoint is the inverse


def test_chains(tiny, fitted, copied):
    both = chain(scale_by(2.0), copied.transport, gradfix())
    state = fit(both, tiny.a, tiny.b, tiny.batches)
    first, mask = fit(copied.transport, tiny.a, tiny.b), fitted("gradfix")[1]
    doubled = jax.tree.map(lambda leaf: 2 * leaf, tiny.tau)
    expected = gradfix().apply(mask, copied.transport.apply(first, doubled))
    assert_same_bits(both.apply(state, tiny.tau), expected)
    kept = np.mean([np.mean(leaf != 0) for leaf in jax.tree.leaves(expected)])
    assert 0.2 < kept < 0.8
    with pytest.raises(ValueError, match="put transfusion first"):
        chain(theseus(), copied.transport)


def test_models_that_differ_are_refused_before_any_matching(tiny, copied):
    def never(*_):
        raise AssertionError("matching has begun")

    transport = transfusion(copied.symmetry, key=jax.random.key(0), progress=never)
    with pytest.raises(ValueError, match="transfusion needs models of one shape: vision/"):
        fit(transport, tiny.a, tiny.w)
    with pytest.raises(ValueError, match="missing in the source"):
        fit(transport, tiny.a, tiny.d)
    rows = tuple(row for row in copied.symmetry.rows if "mlp/up" not in row.path)
    with pytest.raises(ValueError, match="it has no row for\n  vision/blocks/0/mlp/up/bias"):
        fit(transfusion(copied.symmetry._replace(rows=rows), key=jax.random.key(0), progress=never), tiny.a, tiny.b)


def test_layers_are_paired_as_they_stand(tiny, copied):
    with pytest.raises(ValueError, match="found vision/blocks/1/.* for vision/blocks/0/"):
        fit(copied.transport, tiny.a, tiny.b, depth=[1, 0])


def test_progress_is_told_once_for_all_stages(tiny, copied):
    seen = []
    fit(transfusion(copied.symmetry, key=jax.random.key(0), progress=lambda *x: seen.append(x[2])), tiny.a, tiny.b)
    assert [name for name in seen if name.startswith("start")].count("start: vision/residual") == 1


LLAMA = llama.LlamaConfig(20, 12, 16, 1, 4, 2, head_dim=4, qk_norm=True)


def test_a_task_vector_follows_a_copy_with_other_signs_to_the_bit():
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: llama.init(LLAMA, jax.random.key(0)))
    params, tau = (
        jax.tree.map(lambda x: jax.device_put(np.float32(random.normal(size=x.shape))), shapes) for _ in "ab"
    )
    symmetry = symmetry_of_config(LLAMA)
    order = random_permutations(symmetry, params, jax.random.key(1))
    signs = order["sign of residual"]
    assert set(signs.tolist()) == {1, -1}
    a, b = (llama.llama(LLAMA, each) for each in (params, permute(symmetry, order, params)))
    tokens = {"tokens": jnp.asarray(random.integers(0, 20, (3, 5)), jnp.int32)}
    np.testing.assert_allclose(a(tokens)["logits"], b(tokens)["logits"], rtol=1e-4, atol=1e-4)
    transport = transfusion(symmetry, key=jax.random.key(0))
    state = fit(transport, a, b)
    expected = permute(symmetry, order, tau)
    assert_same_bits(transport.apply(state, tau), expected)
    np.testing.assert_array_equal(expected["final_norm"]["scale"], tau["final_norm"]["scale"][order["residual"]])
    assert all(leaf.measures["cosine"] > 0.9999 for leaf in leaf_report(state))
