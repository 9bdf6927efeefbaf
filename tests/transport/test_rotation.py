"""Theseus and BiCo: the formulas, against a second implementation in float64 and against true symmetries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, bico, fit, leaf_report, theseus, transport_stages, tree

OUTPUTS = {"theseus": "y", "bico": "g"}
TRANSPORTS = {"theseus": theseus, "bico": bico}
methods = pytest.mark.parametrize("method", ["theseus", "bico"])


@pytest.fixture(scope="session")
def observed(tiny):
    return {name: tiny.observations(getattr(tiny, name), tiny.batches) for name in "abw"}


def maps_between(tiny, seen_a, seen_b, side, **options):
    @functools.cache
    def maps(layer):
        return tuple(tiny.polar(seen_a[layer][s], seen_b[layer][s], **options) for s in ("x", side))

    return maps


@methods
@pytest.mark.parametrize("target", ["b", "w"])
@pytest.mark.parametrize("center", [False, True])
def test_equals_the_formula_in_float64(tiny, observed, method, target, center):
    if center and target == "w":
        pytest.skip("one width is enough for centring")
    transport = TRANSPORTS[method](center=center, rank_tolerance=1e-3)
    found = transport.apply(fit(transport, tiny.a, getattr(tiny, target), tiny.batches), tiny.tau)
    maps = maps_between(tiny, observed["a"], observed[target], OUTPUTS[method], center=center)
    tiny.assert_moved(found, tiny.move(tiny.tau, maps))


def projected(tiny, seen, side):
    return tiny.move(tiny.tau, lambda layer: [tiny.projector(seen[layer][s]) for s in ("x", side)])


@methods
def test_same_model_is_the_projection_onto_what_was_seen(tiny, observed, method):
    transport = TRANSPORTS[method](rank_tolerance=1e-4)
    state = fit(transport, tiny.a, tiny.a, tiny.batches)
    expected = projected(tiny, observed["a"], OUTPUTS[method])
    tiny.assert_moved(transport.apply(state, tiny.tau), expected)
    report = {leaf.target: leaf for leaf in leaf_report(state)}
    for path, leaf in expected.items():
        if leaf is not None and path.endswith("kernel") and path != "vision/projection/kernel":
            layer = path.removesuffix("/kernel")
            for key, side in (("rank_in", "x"), ("rank_out", OUTPUTS[method])):
                rank = np.trace(tiny.projector(observed["a"][layer][side]))
                assert report[path].measures[key] == pytest.approx(rank), (path, key)


def test_same_model_keeps_what_full_rank_maps_take(tiny, observed):
    # Attention outputs and MLP inputs have full rank here: there Theseus is the identity itself.
    moved = tree.flatten(theseus().apply(fit(theseus(), tiny.a, tiny.a, tiny.batches), tiny.tau))
    flat = tree.flatten(tiny.tau)
    for part in ("attention/query", "attention/value"):
        for leaf in ("kernel", "bias"):
            path = f"vision/blocks/1/{part}/{leaf}"
            np.testing.assert_allclose(moved[path], flat[path], atol=1e-4)
    # An MLP's first outputs are a linear image of 16 inputs and a bias: 17 of 32 directions.
    seen = observed["a"]["vision/blocks/1/mlp/up"]["y"]
    assert np.linalg.matrix_rank(seen, tol=1e-4 * np.linalg.norm(seen)) == 17
    up = flat["vision/blocks/1/mlp/up/bias"]
    np.testing.assert_allclose(moved["vision/blocks/1/mlp/up/bias"], up @ tiny.projector(seen), atol=1e-4)


def symmetry(width, depth, seed):
    """``(input side, output side)`` of every layer of a tower under which it computes the same: a table."""
    random = np.random.default_rng(seed)

    def permutation(n):
        return np.eye(n)[random.permutation(n)]

    def heads():  # an orthogonal matrix inside each head: rotations, reflections and sign flips
        blocks = [np.linalg.qr(random.normal(size=(width // 2, width // 2)))[0] for _ in range(2)]
        return np.block([[blocks[0], np.zeros_like(blocks[0])], [np.zeros_like(blocks[1]), blocks[1]]])

    stream, none = permutation(width), None
    table = {
        "vision/embeddings/patch": (none, stream),
        "vision/pre_norm": (stream, stream),
        "vision/post_norm": (stream, stream),
        "vision/projection": (stream, none),
    }
    for i in range(depth):
        block = f"vision/blocks/{i}"
        scores, values, units = heads(), heads(), permutation(2 * width)
        table |= {
            f"{block}/norm1": (stream, stream),
            f"{block}/norm2": (stream, stream),
            f"{block}/attention/query": (stream, scores),
            f"{block}/attention/key": (stream, scores),
            f"{block}/attention/value": (stream, values),
            f"{block}/attention/out": (values, stream),
            f"{block}/mlp/up": (stream, units),
            f"{block}/mlp/down": (units, stream),
        }

    def transform(flat):
        moved = {}
        for path, leaf in flat.items():
            layer, _, kind = path.rpartition("/")
            inner, outer = table.get(layer, (none, stream))  # class token and positions
            leaf = np.asarray(leaf, np.float64)
            if kind == "kernel" and leaf.ndim == 2 and inner is not None:
                leaf = inner.T @ leaf
            moved[path] = leaf if outer is None else leaf @ outer
        return moved

    return transform


@pytest.fixture(scope="session")
def twin(tiny):
    """A model that computes what A computes in other coordinates, and the map of parameters to it."""
    transform = symmetry(16, 2, 5)
    params = tree.nest({path: jnp.asarray(leaf, jnp.float32) for path, leaf in transform(tree.flatten(tiny.a.params)).items()})
    twin = tiny.a.replace(params=params)
    pixels = tiny.batches[0].inputs
    np.testing.assert_allclose(twin(pixels)["image"], tiny.a(pixels)["image"], atol=1e-5)
    return twin, transform


@methods
def test_a_symmetric_copy_gets_the_transformed_task_vector(tiny, twin, observed, method):
    target, transform = twin
    transport = TRANSPORTS[method](transport_embeddings=True, rank_tolerance=1e-4)
    moved = tree.flatten(transport.apply(fit(transport, tiny.a, target, tiny.batches), tiny.tau))
    kept = projected(tiny, observed["a"], OUTPUTS[method])
    patch = tiny.projector(observed["a"]["vision/embeddings/patch"][OUTPUTS[method]])
    for path, leaf in tree.flatten(tiny.tau).items():
        if path.startswith("vision/embeddings"):
            kept[path] = np.asarray(leaf, np.float64) @ patch
    tiny.assert_moved(moved, transform(kept))


def test_input_maps_from_gradients(tiny, twin):
    # dL/dx = g K^T, so its map is the stream's permutation on the span of those gradients.
    target, transform = twin
    transport = bico(input="gradients", rank_tolerance=1e-4)
    moved = tree.flatten(transport.apply(fit(transport, tiny.a, target, tiny.batches), tiny.tau))
    seen = tiny.observations(tiny.a, tiny.batches)
    params = tree.flatten(tiny.a.params)
    expected = {}
    for path, leaf in tree.flatten(tiny.tau).items():
        layer, _, kind = path.rpartition("/")
        if kind == "kernel" and "/blocks/" in path:
            g = seen[layer]["g"]
            inner = tiny.projector(g @ np.asarray(params[path], np.float64).T)
            expected[path] = inner @ np.asarray(leaf, np.float64) @ tiny.projector(g)
    expected = transform(expected)
    tiny.assert_moved({path: moved[path] for path in expected}, expected)


@methods
def test_deeper_target_repeats_the_paired_layer(tiny, method):
    transport = TRANSPORTS[method]()
    deep = tiny.make_model(tiny.make_config(depth=4), 4)
    state = fit(transport, tiny.a, deep, tiny.batches)
    rules = {rule.target: rule.source for rule in state.parts[0].rules}
    for j, i in enumerate((0, 0, 1, 1)):
        assert rules[f"vision/blocks/{j}/mlp/up/kernel"] == f"vision/blocks/{i}/mlp/up/kernel"
    assert jax.tree.structure(transport.apply(state, tiny.tau)) == jax.tree.structure(deep.params)


@methods
def test_repeated_layers_of_a_stretched_copy_keep_the_layer(tiny, method):
    # A target whose layers 0 and 1 are both source layer 0: the first of them sees what the source's layer sees.
    blocks = tiny.a.params["vision"]["blocks"]
    params = {"vision": {**tiny.a.params["vision"], "blocks": {"0": blocks["0"], "1": blocks["0"], "2": blocks["1"]}}}
    target = tiny.d.replace(params=params)
    transport = TRANSPORTS[method]()
    state = fit(transport, tiny.a, target, tiny.batches, depth=[0, 0, 1])
    moved = tree.flatten(transport.apply(state, tiny.tau))
    assert {r.source for r in state.parts[0].rules if r.target.startswith("vision/blocks/1/")} == {
        path for path in tree.flatten(tiny.a.params) if path.startswith("vision/blocks/0/")
    }
    if method == "theseus":
        query = tree.flatten(tiny.tau)["vision/blocks/0/attention/query/kernel"]
        np.testing.assert_allclose(moved["vision/blocks/0/attention/query/kernel"], query, atol=1e-4)


@methods
def test_shallower_target_skips_source_layers(tiny, method):
    # The walk backwards must pass through source layers that no target layer is paired with.
    transport = TRANSPORTS[method](rank_tolerance=1e-3)
    deep = tiny.make_model(tiny.make_config(depth=5), 4)
    state = fit(transport, deep, tiny.a, tiny.batches)
    seen_a, seen_b = tiny.observations(deep, tiny.batches), tiny.observations(tiny.a, tiny.batches)
    tau = tiny.noise_like(deep.params, 1, 0.1)
    moved = tree.flatten(transport.apply(state, tau))["vision/blocks/0/attention/value/kernel"]
    layer = "vision/blocks/0/attention/value"
    inner, outer = (tiny.polar(seen_a[layer][s], seen_b[layer][s]) for s in ("x", OUTPUTS[method]))
    leaf = np.asarray(tree.flatten(tau)[layer + "/kernel"], np.float64)
    np.testing.assert_allclose(moved, inner.T @ leaf @ outer, atol=2e-3 * np.abs(leaf).max())
    dropped = {leaf.source for leaf in leaf_report(state) if leaf.action == "dropped"}
    assert dropped == {path for path in tree.flatten(deep.params) if path.split("/")[2] in "123" and "blocks" in path}


def relative(found, expected):
    error = tree.norm(jax.tree.map(lambda a, b: a - b, found, expected)) / tree.norm(expected)
    return float(error)


@methods
def test_order_of_rows_and_split_into_batches_change_nothing(tiny, method):
    transport = TRANSPORTS[method](rank_tolerance=1e-3)
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *tiny.batches)
    shuffled = jax.tree.map(lambda leaf: leaf[np.random.default_rng(0).permutation(16)], whole)
    quarters = [jax.tree.map(lambda leaf, i=i: leaf[4 * i : 4 * i + 4], whole) for i in range(4)]
    reference = transport.apply(fit(transport, tiny.a, tiny.b, tiny.batches), tiny.tau)
    for batches in ([shuffled], quarters):
        found = transport.apply(fit(transport, tiny.a, tiny.b, batches), tiny.tau)
        assert relative(found, reference) < 1e-3


def test_fewer_rows_than_dimensions(tiny):
    batches = tiny.make_batches(1, 2)
    transport = theseus(rank_tolerance=1e-3)
    state = fit(transport, tiny.a, tiny.b, batches)
    assert any("fewer calibration rows" in note and "not unique" in note for note in state.notes)
    seen = [tiny.observations(model, batches) for model in (tiny.a, tiny.b)]
    maps = maps_between(tiny, *seen, "y")
    tiny.assert_moved(transport.apply(state, tiny.tau), tiny.move(tiny.tau, maps))
    assert not fit(theseus(), tiny.a, tiny.b, tiny.make_batches(2, 16)).notes


@pytest.mark.parametrize(
    "options",
    [
        {"complete": "thin"},
        {"complete": "eye"},
        {"rank": 0.25},
        {"rank": 8, "method": "randomised"},
        {"method": "gram"},
        {"whiten": 0.4, "center": True},
        {"scale_rule": "output"},
    ],
    ids=str,
)
def test_options_give_finite_results_of_the_target_s_shapes(tiny, options):
    transport = theseus(**options)
    state = fit(transport, tiny.a, tiny.w, tiny.batches)
    moved = transport.apply(state, tiny.tau)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, tiny.w.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    if options.get("rank") == 8:
        assert all(rotation.left.shape[-1] <= 8 for rotation in state.parts[0].arrays.values())


def test_scale_rules(tiny, observed):
    tau = tree.flatten(tiny.tau)
    layer = "vision/blocks/1/norm1"
    scale = np.asarray(tau[f"{layer}/scale"], np.float64)
    inner, outer = (tiny.polar(observed["a"][layer][s], observed["b"][layer][s]) for s in "xy")
    for rule, expected in (("diagonal", (inner * outer).T @ scale), ("output", scale @ outer), ("zero", 0 * scale)):
        transport = theseus(scale_rule=rule, rank_tolerance=1e-3)
        moved = tree.flatten(transport.apply(fit(transport, tiny.a, tiny.b, tiny.batches), tiny.tau))
        np.testing.assert_allclose(moved[f"{layer}/scale"], expected, atol=1e-4)


def test_rescale_gives_every_moved_leaf_the_source_s_norm(tiny):
    transport = theseus(rescale=True)
    moved = tree.flatten(transport.apply(fit(transport, tiny.a, tiny.b, tiny.batches), tiny.tau))
    for path, leaf in tree.flatten(tiny.tau).items():
        if not path.startswith("vision/embeddings"):
            assert float(jnp.linalg.norm(moved[path])) == pytest.approx(float(jnp.linalg.norm(leaf)), rel=1e-4)


def test_grids_of_different_sizes_are_interpolated(tiny):
    fine = tiny.make_model(tiny.make_config(image=12), 2)  # 3 x 3 patches where A has 2 x 2
    small, large = tiny.make_batches(2, 8), tiny.make_batches(2, 8, image=12)
    pairs = [(a, b._replace(labels=a.labels)) for a, b in zip(small, large, strict=True)]
    seen = tiny.observations(tiny.a, small), tiny.observations(fine, large)
    # Bilinear, half-pixel centres: 2 -> 3 samples the axis at 1/6, 1/2 and 5/6 of its length.
    axis = np.array([[1, 0], [0.5, 0.5], [0, 1]])
    operator = np.zeros((10, 5))
    operator[0, 0] = 1
    operator[1:, 1:] = np.kron(axis, axis)
    layer = "vision/blocks/0/attention/out"
    rows_a = {s: seen[0][layer][s].reshape(-1, 5, 16) for s in "xy"}
    inner, outer = (
        tiny.polar(np.einsum("st,btd->bsd", operator, rows_a[s]).reshape(-1, 16), seen[1][layer][s]) for s in "xy"
    )
    transport = theseus(transport_embeddings=True, rank_tolerance=1e-3)
    moved = tree.flatten(transport.apply(fit(transport, tiny.a, fine, pairs), tiny.tau))
    kernel = np.asarray(tree.flatten(tiny.tau)[f"{layer}/kernel"], np.float64)
    np.testing.assert_allclose(moved[f"{layer}/kernel"], inner.T @ kernel @ outer, atol=1e-3)
    patch = "vision/embeddings/patch"
    rows = np.einsum("st,btd->bsd", np.kron(axis, axis), seen[0][patch]["y"].reshape(-1, 4, 16)).reshape(-1, 16)
    rotation = tiny.polar(rows, seen[1][patch]["y"])
    positions = np.asarray(tree.flatten(tiny.tau)["vision/embeddings/positions"], np.float64)
    np.testing.assert_allclose(moved["vision/embeddings/positions"], operator @ positions @ rotation, atol=1e-3)
    for mode in ("class_token", "mean"):
        other = fit(theseus(), tiny.a, fine, pairs, tokens=mode)
        assert jax.tree.map(jnp.shape, theseus().apply(other, tiny.tau)) == jax.tree.map(jnp.shape, fine.params)


@methods
def test_reindexed_source_and_paired_source(tiny, method):
    from tvjax.stages import reindex

    transport = TRANSPORTS[method]()
    paired = transport.apply(fit(transport, tiny.a, tiny.d, tiny.batches, depth=[0, 1, 1]), tiny.tau)
    rebuilt = reindex(tiny.a, {"vision/blocks": (0, 1, 1)})
    state = fit(transport, rebuilt, tiny.d, tiny.batches)
    found = transport.apply(state, tiny.tau)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, paired)
    # The rebuilt source computes the same up to its first repeated layer.
    one, other = (tree.flatten(t)["vision/blocks/1/attention/key/kernel"] for t in (paired, found))
    if method == "theseus":
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_depth_by_cka(tiny):
    blocks = tiny.a.params["vision"]["blocks"]
    zeroed = jax.tree.map(jnp.zeros_like, blocks["0"])  # adds nothing to the residual stream
    params = {"vision": {**tiny.a.params["vision"], "blocks": {"0": blocks["0"], "1": zeroed, "2": blocks["1"]}}}
    state = fit(theseus(), tiny.a, tiny.d.replace(params=params), tiny.batches, depth="cka")
    rules = {rule.target: rule.source for rule in state.parts[0].rules}
    assert [rules[f"vision/blocks/{j}/norm1/scale"].split("/")[2] for j in range(3)] == ["0", "0", "1"]
    by_group = fit(theseus(), tiny.a, tiny.d, tiny.batches, depth={"vision/blocks": [1, 1, 0]})
    rules = {rule.target: rule.source for rule in by_group.parts[0].rules}
    assert [rules[f"vision/blocks/{j}/norm1/scale"].split("/")[2] for j in range(3)] == ["1", "1", "0"]


def test_padding_never_enters_a_text_tower_s_maps():
    from tvjax.models.clip import CLIPConfig, CLIPTextConfig, clip, init

    config = CLIPConfig(None, CLIPTextConfig(20, 12, 24, 2, 2, max_position_embeddings=6, eos_token_id=19, projection_dim=4))
    source, target = (clip(config, init(config, jax.random.key(seed))) for seed in (0, 1))
    random = np.random.default_rng(0)
    mask = np.arange(6) < random.integers(3, 7, size=(12, 1))
    tokens = np.where(mask, random.integers(0, 18, (12, 6)), 0)
    tokens[np.arange(12), mask.sum(1) - 1] = 19
    other = np.where(mask, tokens, random.integers(0, 18, (12, 6)))
    states = [
        fit(theseus(), source, target, [Batch({"tokens": jnp.asarray(t, jnp.int32), "mask": jnp.asarray(mask)})])
        for t in (tokens, other)
    ]
    for one, two in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(one, two)
    rows = states[0].parts[0].measures
    block = {name: int(m["rows"]) for name, m in rows.items() if "/blocks/" in name}
    assert set(block.values()) == {int(mask.sum())}


def test_the_streaming_call_checks_task_vectors_before_it_starts(tiny):
    with pytest.raises(ValueError, match="vision/nothing: no such leaf in the source"):
        transport_stages(theseus(), tiny.a, tiny.b, tiny.batches, [{"vision": {"nothing": jnp.ones(3)}}])
