"""Maps by head: true symmetries of a grouped-query model with rotary positions, and models of other heads."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, bico, fit, plan, single_stage, theseus, tree
from tvjax.align import procrustes
from tvjax.checkpoints import TransportStore, load_state, save_state
from tvjax.models.llama import LlamaConfig, init, llama
from tvjax.models.llama.modeling import rotate
from tvjax.stages import HeadAxis

METHODS = {"theseus": theseus, "bico": bico}
CONFIG = LlamaConfig(20, 12, 16, 1, 4, 2, head_dim=4, attention_bias=True, rms_norm_eps=1e-3)
NORMED = dataclasses.replace(CONFIG, model_type="qwen3", qk_norm=True, attention_bias=False)
BLOCK = "blocks/0/attention"


def next_token_loss(_, outputs, labels):
    scores = jax.nn.log_softmax(outputs["logits"][:, :-1])
    losses = -jnp.take_along_axis(scores, labels["tokens"][:, 1:, None], -1)[..., 0]
    return jnp.sum(losses * labels["mask"][:, 1:].astype(losses.dtype), axis=1)


def noise(config, seed, size=0.4):
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return jax.tree.map(lambda leaf: np.asarray(size * random.normal(size=leaf.shape), np.float32), shapes)


def params_of(config, seed):
    return tree.map_with_path(lambda path, leaf: 1 + leaf if path.endswith("scale") else leaf, noise(config, seed))


def model_of(config, params):
    return llama(config, jax.tree.map(jnp.asarray, params)).with_loss(next_token_loss)


def batches(texts=12, length=9, seed=0):
    random = np.random.default_rng(seed)
    mask = np.arange(length) < random.integers(4, length + 1, (texts, 1))
    inputs = {"tokens": jnp.asarray(random.integers(0, 20, (texts, length)), jnp.int32), "mask": jnp.asarray(mask)}
    return [Batch(inputs, inputs)]


def by_head(leaf, heads, axis=-1):
    """A leaf with an axis of heads before that of their units."""
    return np.stack(np.split(np.asarray(leaf), heads, axis), 0)


def joined(heads, axis=-1):
    return np.concatenate(list(heads), axis)


def on_attention(config, change):
    """A function of trees that changes leaves of the attention, ``change(layer, leaf, axis)``."""

    def apply(params):
        def moved(path, leaf):
            if not path.startswith(BLOCK) or "norm" in path:
                return leaf
            layer = path.split("/")[3]
            if layer == "out" and path.endswith("bias"):
                return leaf
            return change(layer, leaf, 0 if layer == "out" else -1)

        return tree.map_with_path(moved, params)

    return apply


def permuted_groups(config):
    """Key heads exchanged with their queries, and queries exchanged inside each."""
    groups, inside = (1, 0), ((1, 0), (0, 1))
    queries = [groups[g] * 2 + inside[g][j] for g in range(2) for j in range(2)]

    def change(layer, leaf, axis):
        order = queries if layer in ("query", "out") else groups
        return joined(by_head(leaf, len(order), axis)[list(order)], axis)

    return on_attention(config, change)


def turned_pairs(config):
    """A phase for each key head and frequency, on its key and its queries."""
    angles = np.random.default_rng(5).uniform(0, 2 * np.pi, (config.num_key_value_heads, config.head_dim // 2))
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def change(layer, leaf, axis):
        if layer not in ("query", "key"):
            return leaf
        number = config.num_attention_heads if layer == "query" else config.num_key_value_heads
        turned = []
        for h, head in enumerate(by_head(leaf, number)):
            first, second = np.split(head, 2, -1)
            c, s = (side[h * config.num_key_value_heads // number] for side in (cosine, sine))
            turned.append(np.concatenate([first * c - second * s, second * c + first * s], -1))
        return joined(turned)

    return on_attention(config, change)


def orthogonal(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0].astype(np.float32)


def turned_values(config):
    """An orthogonal matrix on the values of each head, and its inverse on what reads them."""
    turns = [orthogonal(config.head_dim, g) for g in range(config.num_key_value_heads)]

    def change(layer, leaf, axis):
        if layer == "value":
            return joined([head @ turn for head, turn in zip(by_head(leaf, len(turns)), turns, strict=True)])
        if layer == "out":
            heads = by_head(leaf, config.num_attention_heads, 0)
            shared = len(heads) // len(turns)
            return joined([turns[h // shared].T @ head for h, head in enumerate(heads)], 0)
        return leaf

    return on_attention(config, change)


def turned_residual(config, matrix):
    """The residual stream in other coordinates; scales by the squares, which is right for signed permutations."""

    def apply(params):
        def moved(path, leaf):
            if path.endswith("scale"):
                return leaf if "query_norm" in path or "key_norm" in path else (matrix**2).T @ leaf
            if path == "embeddings/tokens" or path.endswith(("out/kernel", "down/kernel")):
                return leaf @ matrix
            return matrix.T @ leaf if path.endswith("kernel") else leaf

        return tree.map_with_path(moved, params)

    return apply


def signed_permutation(size, seed):
    random = np.random.default_rng(seed)
    return (np.eye(size)[random.permutation(size)] * random.choice([-1, 1], size)).astype(np.float32)


SYMMETRIES = {
    "permuted groups": (permuted_groups, "assignment"),
    "turned pairs": (turned_pairs, "index"),
    "turned values": (turned_values, "index"),
    "residual": (lambda config: turned_residual(config, signed_permutation(config.hidden_size, 3)), "index"),
}


def assert_close(found, expected, atol=2e-3, paths=None):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path in expected if paths is None else paths:
        np.testing.assert_allclose(found[path], expected[path], atol=atol, err_msg=path)


@pytest.fixture(scope="module")
def own():
    """Task vectors moved from a model into itself, by method and structure of the heads."""
    found = {}

    def moved(method, structure, config=CONFIG):
        key = method, structure, config
        if key not in found:
            model, tau = model_of(config, params_of(config, 0)), noise(config, 9, 0.1)
            transport = METHODS[method](heads=structure, rank_tolerance=1e-4)
            found[key] = transport.apply(fit(transport, model, model, batches()), tau)
        return found[key]

    return moved


@pytest.mark.parametrize("name", SYMMETRIES)
def test_the_symmetries_keep_what_the_model_computes(name):
    params, move = params_of(CONFIG, 0), SYMMETRIES[name][0](CONFIG)
    before, after = (model_of(CONFIG, each)(batches()[0].inputs)["logits"] for each in (params, move(params)))
    np.testing.assert_allclose(before, after, atol=1e-4)
    assert any(np.abs(a - b).max() > 1e-2 for a, b in zip(*map(jax.tree.leaves, (params, move(params))), strict=True))


@pytest.mark.parametrize("structure", ["free", "blocks", "rotary"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_itself_keeps_the_task_vector_of_its_heads(own, method, structure):
    moved, tau = (tree.flatten(each) for each in (own(method, structure), noise(CONFIG, 9, 0.1)))
    paths = [path for path in tau if path.startswith(BLOCK)]
    if (method, structure) == ("theseus", "free"):  # 16 units of queries, an image of 12 and a bias: not all determined
        paths = [path for path in paths if "query" not in path]
    for path in paths:
        np.testing.assert_allclose(moved[path], tau[path], atol=2e-3, err_msg=path)


@pytest.mark.parametrize("name", SYMMETRIES)
@pytest.mark.parametrize("structure", ["blocks", "rotary"])
@pytest.mark.parametrize("method", METHODS)
def test_a_symmetric_copy_receives_the_transformed_task_vector(own, method, structure, name):
    make, matching = SYMMETRIES[name]
    move, params, tau = make(CONFIG), params_of(CONFIG, 0), noise(CONFIG, 9, 0.1)
    source, copy = model_of(CONFIG, params), model_of(CONFIG, move(params))
    transport = METHODS[method](heads=structure, head_matching=matching, rank_tolerance=1e-4)
    found = transport.apply(fit(transport, source, copy, batches()), tau)
    assert_close(found, move(own(method, structure)))


@pytest.mark.parametrize("structure", ["free", "blocks", "rotary"])
def test_any_orthogonal_residual_once_scales_are_folded(structure):
    params = tree.map_with_path(lambda path, x: 0 * x + 1 if path.endswith("scale") else x, params_of(CONFIG, 0))
    matrix = orthogonal(CONFIG.hidden_size, 4)

    def move(tau):  # an RMS norm without scale commutes with every orthogonal matrix
        moved = turned_residual(CONFIG, matrix)(tau)
        return tree.map_with_path(lambda path, x: 0 * x if path.endswith("scale") else x, moved)

    copy = tree.map_with_path(lambda path, x: params_at(params, path) if path.endswith("scale") else x, move(params))
    before, after = (model_of(CONFIG, each)(batches()[0].inputs)["logits"] for each in (params, copy))
    np.testing.assert_allclose(before, after, atol=1e-4)
    tau, transport = noise(CONFIG, 9, 0.1), theseus(heads=structure, rank_tolerance=1e-4, scale_rule="zero")
    source = model_of(CONFIG, params)
    own, found = (
        transport.apply(fit(transport, source, each, batches()), tau) for each in (source, model_of(CONFIG, copy))
    )
    assert_close(found, move(own))


def params_at(params, path):
    return tree.flatten(params)[path]


SINGLE = dataclasses.replace(CONFIG, num_attention_heads=2)


def copies(config, number):
    """Every head that many times, side by side; what reads them gets a share of the kernel."""

    def change(layer, leaf, axis):
        heads = np.repeat(by_head(leaf, 2, axis), number, 0)
        return joined(heads / number if layer == "out" else heads, axis)

    return on_attention(config, change)


@pytest.mark.parametrize("structure", ["blocks", "rotary"])
def test_copies_of_heads_receive_copies_and_give_their_mean(structure):
    few, many = SINGLE, dataclasses.replace(CONFIG, num_attention_heads=4, num_key_value_heads=4)
    move, params, tau = copies(few, 2), params_of(few, 0), noise(few, 9, 0.1)
    source, target = model_of(few, params), model_of(many, move(params))
    np.testing.assert_allclose(*(m(batches()[0].inputs)["logits"] for m in (source, target)), atol=1e-4)
    transport = theseus(heads=structure, rank_tolerance=1e-4)
    own = transport.apply(fit(transport, source, source, batches()), tau)
    assert_close(transport.apply(fit(transport, source, target, batches()), tau), move(own))
    assert_close(transport.apply(fit(transport, target, source, batches()), move(tau)), own)


def heads_of(state, layer, numbers):
    """The output map of a layer by pairs of heads, ``[H_A, H_B, d_a, d_b]``."""
    rule = next(rule for rule in state.parts[0].rules if rule.target == f"{BLOCK}/{layer}/kernel")
    whole = np.asarray(procrustes.matrix(state.parts[0].arrays[rule.pieces[0].outer]))
    (rows, columns), (a, b) = whole.shape, numbers
    return whole.reshape(a, rows // a, b, columns // b).transpose(0, 2, 1, 3)


@pytest.mark.parametrize("method", METHODS)
def test_rotary_maps_keep_the_scores_at_every_distance(method):
    wide = dataclasses.replace(CONFIG, hidden_size=16, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    source, target = model_of(CONFIG, params_of(CONFIG, 0)), model_of(wide, params_of(wide, 1))
    state = fit(METHODS[method](heads="rotary"), source, target, batches())
    of_queries, of_keys = heads_of(state, "query", (4, 6)), heads_of(state, "key", (2, 2))
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.normal(size=(1, 6, 1, 4)), jnp.float32) for _ in range(2))

    def scores(q, k, rope):
        angles = np.arange(6)[None, :, None] * rope.frequencies(q.shape[-1])
        q, k = (rotate(x, jnp.asarray(angles, jnp.float32))[0, :, 0] for x in (q, k))
        return np.asarray(q @ k.T)

    expected = scores(q, k, CONFIG.rope)
    for h in range(6):
        moved = scores(q @ of_queries[h * 4 // 6, h], k @ of_keys[h // 3, h // 3], wide.rope)
        np.testing.assert_allclose(moved, expected, atol=1e-4)
    free = fit(METHODS[method](heads="blocks"), source, target, batches())
    moved = scores(q @ heads_of(free, "query", (4, 6))[0, 0], k @ heads_of(free, "key", (2, 2))[0, 0], wide.rope)
    assert np.abs(moved - expected).max() > 0.1


@pytest.mark.parametrize("structure", ["blocks", "rotary"])
def test_heads_take_from_their_partners_alone(structure):
    wide = dataclasses.replace(CONFIG, num_attention_heads=6, num_key_value_heads=2)
    source, target = model_of(CONFIG, params_of(CONFIG, 0)), model_of(wide, params_of(wide, 1))
    found = heads_of(fit(theseus(heads=structure), source, target, batches()), "query", (4, 6))
    for s, h in np.ndindex(4, 6):
        assert np.any(found[s, h]) == (s == h * 4 // 6), (s, h)


@pytest.mark.parametrize(
    ("method", "structure", "heads"),
    [
        ("theseus", "free", (6, 2, 4)),
        ("theseus", "blocks", (2, 1, 4)),
        ("theseus", "rotary", (6, 2, 6)),
        ("bico", "free", (2, 1, 6)),
    ],
)
def test_norms_inside_heads_move_between_other_heads(method, structure, heads):
    queries, keys, size = heads
    shape = {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": size}
    other = dataclasses.replace(NORMED, hidden_size=10, **shape)
    source, target = model_of(NORMED, params_of(NORMED, 0)), model_of(other, params_of(other, 1))
    transport = METHODS[method](heads=structure)
    state = fit(transport, source, target, batches())
    moved = tree.flatten(transport.apply(state, noise(NORMED, 9, 0.1)))
    for rule in state.parts[0].rules:
        if "blocks" in rule.target:
            assert rule.action == "rotated", rule
            assert np.isfinite(moved[rule.target]).all() and np.any(moved[rule.target]), rule.target


@pytest.mark.parametrize("method", METHODS)
def test_permuted_groups_under_norms_inside_heads(own, method):
    move, params, tau = permuted_groups(NORMED), params_of(NORMED, 0), noise(NORMED, 9, 0.1)
    transport = METHODS[method](heads="blocks", head_matching="assignment", rank_tolerance=1e-4)
    source, copy = model_of(NORMED, params), model_of(NORMED, move(params))
    moved = transport.apply(fit(transport, source, copy, batches()), tau)
    assert_close(moved, move(own(method, "blocks", NORMED)))
    if method == "theseus":
        paths = [f"{BLOCK}/{norm}/scale" for norm in ("query_norm", "key_norm")]
        assert_close(moved, tau, paths=paths)


def test_maps_are_stored_resumed_and_planned(tmp_path):
    wide = dataclasses.replace(NORMED, hidden_size=10, num_attention_heads=6, head_dim=6)
    source, target = model_of(NORMED, params_of(NORMED, 0)), model_of(wide, params_of(wide, 1))
    transport, tau = theseus(heads="rotary", head_matching="assignment"), noise(NORMED, 9, 0.1)
    stores = [TransportStore(tmp_path / "maps", {"heads": "rotary"}) for _ in range(2)]
    state = fit(transport, source, target, batches(), cache=stores[0])
    save_state(tmp_path / "state.safetensors", state)
    moved = transport.apply(state, tau)
    for again in (
        load_state(tmp_path / "state.safetensors"),
        fit(transport, source, target, batches(), cache=stores[1]),
    ):
        jax.tree.map(np.testing.assert_array_equal, transport.apply(again, tau), moved)
        assert again.parts[0].maps == state.parts[0].maps
    planned = plan(transport, source, target, batches())
    maps = {info.name: info for stage in planned.stages for info in stage.maps}
    assert maps == {info.name: info for info in state.parts[0].maps}
    assert planned.memory["maps"] == tree.nbytes(state.parts[0].arrays)
    by_heads = [info for info in maps.values() if info.heads != (1, 1)]
    assert {(info.heads, info.shared) for info in by_heads} == {
        ((4, 6), False), ((2, 2), False), ((4, 6), True), ((2, 2), True)
    }  # fmt: skip
    for info in by_heads:
        measured = state.parts[0].measures[info.name]
        assert info.dimensions == 4 and 0 < measured["residual"] < 2, info
        assert 0 < measured["rank"] <= info.dimensions * (1 if info.shared else max(info.heads)), info


def test_heads_whitened_and_centred():
    wide = dataclasses.replace(NORMED, num_attention_heads=6)
    source, target = model_of(NORMED, params_of(NORMED, 0)), model_of(wide, params_of(wide, 1))
    moved = []
    for options in ({}, {"center": True, "whiten": 0.4}):
        transport = theseus(heads="blocks", **options)
        moved.append(tree.flatten(transport.apply(fit(transport, source, target, batches()), noise(NORMED, 9, 0.1))))
    for path in moved[0]:
        assert np.isfinite(moved[1][path]).all()
    assert np.abs(moved[0][f"{BLOCK}/query/kernel"] - moved[1][f"{BLOCK}/query/kernel"]).max() > 1e-2


@pytest.mark.parametrize("matching", ["index", "assignment"])
def test_stacked_layers_have_pairs_of_their_own(matching):
    def layer(x, p):
        q, k = ((x @ p[name]).reshape(*x.shape[:-1], 2, 3) for name in ("query", "key"))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        values = jnp.einsum("bhqk,bkhd->bqhd", weights, (x @ p["value"]).reshape(q.shape))
        return x + values.reshape(*x.shape[:-1], -1) @ p["out"], None

    def function(params, x):
        return jax.lax.scan(layer, x, params)[0]

    random = np.random.default_rng(0)
    params = {name: np.asarray(random.normal(size=(2, 6, 6)), np.float32) for name in ("query", "key", "value", "out")}
    inner, outer = HeadAxis("heads:query_key", 2), HeadAxis("heads:value_out", 2)
    heads = {"query": (None, inner), "key": (None, inner), "value": (None, outer), "out": (outer, None)}
    exchanged = [params[name].copy() for name in params]  # the two heads of the second layer
    for name, leaf in zip(params, exchanged, strict=True):
        view = leaf[1].T if name == "out" else leaf[1]
        view[:] = view[:, [3, 4, 5, 0, 1, 2]]
    source, copy = (
        single_stage(function, jax.tree.map(jnp.asarray, each), heads=heads)
        for each in (params, dict(zip(params, exchanged, strict=True)))
    )
    rows = [Batch(jnp.asarray(random.normal(size=(8, 5, 6)), jnp.float32))]
    transport = theseus(heads="blocks", head_matching=matching)
    found = transport.apply(fit(transport, source, copy, rows), params)
    kept = [name for name, leaf in zip(params, exchanged, strict=True) if np.allclose(found[name], leaf, atol=1e-2)]
    assert kept == (list(params) if matching == "assignment" else [])


@pytest.mark.parametrize("options", [{"heads": "block"}, {"head_matching": "nuclear"}])
def test_unknown_structures_are_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be one of"):
        theseus(**options)


def test_models_that_do_not_say_their_heads_are_refused():
    model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.eye(3)})
    with pytest.raises(ValueError, match="no stage of the source says which they are"):
        fit(theseus(heads="blocks"), model, model, [Batch(jnp.eye(3))])


def test_rotary_maps_need_positions_that_rotate():
    model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, heads={"w": (None, HeadAxis("a:query_key", 3))})
    with pytest.raises(ValueError, match="no position of the source rotates its heads: use heads='blocks'"):
        fit(theseus(heads="rotary"), model, model, [Batch(jnp.eye(3))])


def test_heads_that_do_not_divide_a_layer_are_refused():
    heads = {"w": (None, HeadAxis("heads:units", 2))}
    model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, heads=heads)
    with pytest.raises(ValueError, match="w: 3 units in the source are declared to be 2 heads"):
        fit(theseus(heads="blocks"), model, model, [Batch(jnp.eye(3))])


def test_heads_that_positions_rotate_in_part_are_refused():
    heads = {"w": (None, HeadAxis("heads:units", 2, (1.0,)))}
    model = single_stage(lambda p, x: x @ p["w"], {"w": jnp.eye(8)}, heads=heads)
    with pytest.raises(ValueError, match="w: heads of 4 units in the source, of which positions rotate 2"):
        fit(theseus(heads="rotary"), model, model, [Batch(jnp.eye(8))])


# -- tied and separate heads of the vocabulary ----------------------------------------------------------------------


def test_a_tied_table_moves_onto_a_separate_head_by_its_inputs():
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    wide = dataclasses.replace(CONFIG, hidden_size=16)
    source, target = model_of(tied, params_of(tied, 0)), model_of(wide, params_of(wide, 1))
    tau, transport = noise(tied, 9, 0.1), theseus()
    state = fit(transport, source, target, batches())
    moved = transport.apply(state, tau)
    rules = {rule.target: rule for rule in state.parts[0].rules}
    head = rules["head/kernel"]
    assert (head.source, head.action, head.pieces[0].outer) == ("embeddings/tokens", "rotated", None)
    inner = procrustes.matrix(state.parts[0].arrays[head.pieces[0].inner])
    np.testing.assert_allclose(moved["head"]["kernel"], inner.T @ tau["embeddings"]["tokens"].T, atol=1e-5)
    assert rules["embeddings/tokens"].action == "zeroed by rule" and not moved["embeddings"]["tokens"].any()
    same = model_of(CONFIG, tree.put(params_of(tied, 0), "head/kernel", params_of(tied, 0)["embeddings"]["tokens"].T))
    own = transport.apply(fit(transport, source, same, batches()), tau)  # the same network, its head stored twice
    np.testing.assert_allclose(own["head"]["kernel"], tau["embeddings"]["tokens"].T, atol=1e-3)


def test_a_separate_head_onto_a_tied_table_leaves_the_table_unless_asked():
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True, hidden_size=16)
    source, target = model_of(CONFIG, params_of(CONFIG, 0)), model_of(tied, params_of(tied, 1))
    tau = noise(CONFIG, 9, 0.1)
    tables = []
    for asked in (False, True):
        transport = theseus(transport_embeddings=asked)
        state = fit(transport, source, target, batches())
        tables.append(transport.apply(state, tau)["embeddings"]["tokens"])
        assert all(rule.source != "head/kernel" for rule in state.parts[0].rules)
    assert not tables[0].any()
    a, b = (np.asarray(m.params["embeddings"]["tokens"], np.float64) for m in (source, target))
    u, _, vt = np.linalg.svd(a.T @ b, full_matrices=False)
    np.testing.assert_allclose(tables[1], tau["embeddings"]["tokens"] @ (u @ vt), atol=1e-4)


def test_vocabularies_of_other_sizes_are_never_rotated():
    larger = dataclasses.replace(CONFIG, vocab_size=24)
    source, target = model_of(CONFIG, params_of(CONFIG, 0)), model_of(larger, params_of(larger, 1))
    rules = {rule.target: rule for rule in fit(theseus(), source, target, batches()).parts[0].rules}
    assert rules["head/kernel"].action == "zeroed by rule"
    assert rules["head/kernel"].why == "20 outputs of their own meaning in the source, 24 in the target"


def test_vocabularies_that_differ_by_padding_are_those_of_the_smaller():
    larger = dataclasses.replace(CONFIG, vocab_size=21, tie_word_embeddings=True)
    models = [model_of(config, params_of(config, seed)) for seed, config in enumerate((CONFIG, larger))]
    transport = theseus(transport_embeddings=True)
    for source, target in (models, models[::-1]):
        tau = jax.tree.map(lambda leaf: np.asarray(0.1 * leaf), source.params)
        state = fit(transport, source, target, batches())
        moved = transport.apply(state, tau)
        shapes = [each.params["embeddings"]["tokens"].shape for each in (source, target)]
        assert moved["embeddings"]["tokens"].shape == shapes[1]
        assert np.abs(moved["embeddings"]["tokens"][:20]).max() > 0.01
        assert not moved["embeddings"]["tokens"][20:].any()
        rules = {rule.target: rule for rule in state.parts[0].rules}
        if "head/kernel" in rules:
            assert rules["head/kernel"].source == "embeddings/tokens" and rules["head/kernel"].action == "rotated"
            inner = procrustes.matrix(state.parts[0].arrays[rules["head/kernel"].pieces[0].inner])
            expected = inner.T @ tau["embeddings"]["tokens"][:20].T
            np.testing.assert_allclose(moved["head"]["kernel"], expected, atol=1e-5)
