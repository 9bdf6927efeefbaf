"""Theseus and BiCo: the formulas, against a second implementation in float64 and against true symmetries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, bico, fit, leaf_report, single_stage, theseus, tree
from tvjax.demo.base import draw_examples
from tvjax.demo.setup import QUICK, load, photographs, style_of
from tvjax.models.clip import CLIPConfig, CLIPTextConfig, clip
from tvjax.stages import reindex
from tvjax.transport.statistics import MomentAccumulator, Options, settings

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
@pytest.mark.parametrize(("target", "center"), [("b", False), ("b", True), ("w", False)])
def test_equals_the_formula_in_float64(tiny, observed, method, target, center):
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
                squares = np.linalg.svd(observed["a"][layer][side], compute_uv=False) ** 2
                assert report[path].measures[key] == np.sum(squares > 1e-4 * squares[0]), (path, key)


def test_same_model_keeps_what_full_rank_maps_take(tiny, observed):
    moved = tree.flatten(theseus().apply(fit(theseus(), tiny.a, tiny.a, tiny.batches), tiny.tau))
    flat = tree.flatten(tiny.tau)

    def full(rows):
        return np.linalg.matrix_rank(rows, tol=5e-3 * np.linalg.norm(rows, 2)) == rows.shape[1]

    layers = [layer for layer, seen in observed["a"].items() if full(seen["x"]) and full(seen["y"])]
    assert sum("attention" in layer for layer in layers) >= 3
    for layer in layers:
        for path in {f"{layer}/kernel", f"{layer}/bias"} & flat.keys():
            if "embeddings" not in path:
                np.testing.assert_allclose(moved[path], flat[path], atol=1e-4, err_msg=path)
    # An MLP's first outputs are an affine image of a LayerNorm's: 15 directions and the bias, of 32.
    seen = observed["a"]["vision/blocks/1/mlp/up"]["y"]
    assert np.linalg.matrix_rank(seen, tol=1e-5 * np.linalg.norm(seen, 2)) == 16
    up = flat["vision/blocks/1/mlp/up/bias"]
    np.testing.assert_allclose(moved["vision/blocks/1/mlp/up/bias"], up @ tiny.projector(seen), atol=1e-4)


def coordinates(depth, stream, heads, units):
    """A table: the isometries (input side, output side) of every layer of a tower, None where nothing changes."""
    table = {
        "vision/embeddings/class_token": (None, stream),
        "vision/embeddings/positions": (None, stream),
        "vision/embeddings/patch/kernel": (None, stream),
        "vision/pre_norm": (stream, stream),
        "vision/post_norm": (stream, stream),
        "vision/projection": (stream, None),
    }
    for i in range(depth):
        block = f"vision/blocks/{i}"
        scores, values, inside = heads(), heads(), units()
        table |= {
            f"{block}/norm1": (stream, stream),
            f"{block}/norm2": (stream, stream),
            f"{block}/attention/query": (stream, scores),
            f"{block}/attention/key": (stream, scores),
            f"{block}/attention/value": (stream, values),
            f"{block}/attention/out": (values, stream),
            f"{block}/mlp/up": (stream, inside),
            f"{block}/mlp/down": (inside, stream),
        }
    return table


def transform(table, flat, factor):
    """``R_in^T K R_out`` for kernels and ``v R_out`` for vectors, each times ``factor(layer, kind, has_input)``."""
    moved = {}
    for path, leaf in flat.items():
        layer, _, kind = path.rpartition("/")
        inner, outer = table[path if path in table else layer]
        leaf = np.asarray(leaf, np.float64)
        by_input = kind == "kernel" and inner is not None
        leaf = inner.T @ leaf if by_input else leaf
        moved[path] = (leaf if outer is None else leaf @ outer) * factor(layer, kind, by_input, outer is not None)
    return moved


def in_heads(make):
    blocks = [make(), make()]
    rows, columns = blocks[0].shape
    whole = np.zeros((2 * rows, 2 * columns))
    for i, block in enumerate(blocks):
        whole[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = block
    return whole


def permuted_copy(tiny):
    """Residual stream and MLP units permuted; any orthogonal matrix inside a head, sign flips among them."""
    random = np.random.default_rng(5)

    def permutation(n):
        return np.eye(n)[random.permutation(n)]

    def heads():
        return in_heads(lambda: np.linalg.qr(random.normal(size=(8, 8)))[0])

    table = coordinates(2, permutation(16), heads, lambda: permutation(32))
    unchanged = lambda *_: 1.0  # noqa: E731
    params = transform(table, tree.flatten(tiny.a.params), unchanged)
    return tiny.a, params, lambda flat: transform(table, flat, unchanged)


def doubled_copy(tiny):
    """A target twice as wide: every coordinate stands there twice, so LayerNorm sees the same mean and variance."""

    def twice(n):
        return np.tile(np.eye(n), 2) / np.sqrt(2)  # an isometry: half the energy to each copy

    table = coordinates(2, twice(16), lambda: in_heads(lambda: twice(8)), lambda: twice(32))

    def of_params(layer, kind, by_input, by_output):
        outer = 1.0 if layer.endswith("query") else np.sqrt(2)  # scores: two copies, and heads of twice the width
        return (1 / np.sqrt(2) if by_input else 1.0) * (outer if by_output else 1.0)

    def of_task_vectors(layer, kind, by_input, by_output):
        return 1 / np.sqrt(2) if kind == "scale" else 1.0  # (R_in * R_out)^T s has the product of both entries

    params = transform(table, tree.flatten(tiny.a.params), of_params)
    target = tiny.make_model(tiny.make_config(width=32), 0).replace(loss_params=tiny.a.loss_params)
    return target, params, lambda flat: transform(table, flat, of_task_vectors)


@pytest.fixture(scope="session", params=[permuted_copy, doubled_copy], ids=lambda make: make.__name__)
def twin(request, tiny):
    """A model that computes what A computes in other coordinates, and the map of task vectors to it."""
    target, params, moves = request.param(tiny)
    target = target.replace(params=tree.nest({path: jnp.asarray(leaf, jnp.float32) for path, leaf in params.items()}))
    pixels = tiny.batches[0].inputs
    np.testing.assert_allclose(target(pixels)["image"], tiny.a(pixels)["image"], atol=2e-5)
    return target, moves


@methods
def test_a_copy_in_other_coordinates_gets_the_transformed_task_vector(tiny, twin, observed, method):
    target, moves = twin
    transport = TRANSPORTS[method](transport_embeddings=True, rank_tolerance=1e-4)
    moved = tree.flatten(transport.apply(fit(transport, tiny.a, target, tiny.batches), tiny.tau))
    kept = projected(tiny, observed["a"], OUTPUTS[method])
    patch = tiny.projector(observed["a"]["vision/embeddings/patch"][OUTPUTS[method]])
    for path, leaf in tree.flatten(tiny.tau).items():
        if path.startswith("vision/embeddings"):
            kept[path] = np.asarray(leaf, np.float64) @ patch
    tiny.assert_moved(moved, moves(kept))


def test_input_maps_from_gradients(tiny, twin):
    # dL/dx = g K^T, so its map is the stream's permutation on the span of those gradients.
    target, moves = twin
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
    expected = moves(expected)
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
def test_order_of_rows_changes_nothing(tiny, fitted, method):
    transport, state = fitted(method)
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *tiny.batches)
    order = np.random.default_rng(0).permutation(16)
    shuffled = [jax.tree.map(lambda leaf, half=half: leaf[half], whole) for half in (order[:8], order[8:])]
    found, reference = (transport.apply(s, tiny.tau) for s in (fit(transport, tiny.a, tiny.b, shuffled), state))
    difference = jax.tree.map(lambda a, b: a - b, found, reference)
    assert float(tree.norm(difference) / tree.norm(reference)) < 1e-3


# -- a small function, for what does not need a tower ------------------------------------------------------------------


def two_layers(params, x):
    return jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"]) @ params["out"]["kernel"]


def squared(loss_params, outputs, labels):
    return ((outputs - labels) ** 2).sum(-1)


def small_model(width, seed):
    random = np.random.default_rng(seed)
    shapes = {"in": {"kernel": (6, width), "bias": (width,)}, "out": {"kernel": (width, 3)}}
    params = jax.tree.map(
        lambda s: jax.device_put(np.float32(random.normal(size=s))), shapes, is_leaf=lambda s: type(s) is tuple
    )
    return single_stage(two_layers, params, loss=squared)


def small_rows(count, seed=5):
    random = np.random.default_rng(seed)
    return Batch(*(jnp.asarray(random.normal(size=(count, n)), jnp.float32) for n in (6, 3)))


def small_seen(model, rows):
    params, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (model.params, rows.inputs))
    before = x @ params["in"]["kernel"] + params["in"]["bias"]
    after = np.tanh(before)
    y = after @ params["out"]["kernel"]
    g = 2 * (y - np.asarray(rows.labels, np.float64))
    back = g @ params["out"]["kernel"].T * (1 - after**2)
    return {"in": {"x": x, "y": before, "g": back}, "out": {"x": after, "y": y, "g": g}}


@methods
@pytest.mark.parametrize(("rows", "center"), [(4, False), (40, False), (40, True)])
def test_few_and_many_rows_in_any_batches(tiny, method, rows, center):
    source, target, batch = small_model(8, 0), small_model(10, 1), small_rows(rows)
    tau = small_model(8, 2).params
    transport = TRANSPORTS[method](center=center, rank_tolerance=1e-4)
    seen = [small_seen(model, batch) for model in (source, target)]
    side = OUTPUTS[method]
    maps = {n: [tiny.polar(seen[0][n][s], seen[1][n][s], center, 1e-4) for s in ("x", side)] for n in ("in", "out")}
    for parts in (1, 2, 4):
        split = [jax.tree.map(lambda leaf, i=i, n=parts: leaf[i::n], batch) for i in range(parts)]
        state = fit(transport, source, target, split)
        moved = transport.apply(state, tau)
        for layer in maps:
            expected = maps[layer][0].T @ np.asarray(tau[layer]["kernel"], np.float64) @ maps[layer][1]
            np.testing.assert_allclose(moved[layer]["kernel"], expected, atol=2e-3)
        np.testing.assert_allclose(moved["in"]["bias"], np.asarray(tau["in"]["bias"]) @ maps["in"][1], atol=2e-3)
        notes = [note for note in state.notes if "fewer calibration rows (4" in note and "not unique" in note]
        assert bool(notes) == (rows == 4)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (4, {"complete": "thin"}),
        (4, {"complete": "eye"}),
        (4, {"rank": 0.25}),
        (40, {"complete": "thin"}),
        (40, {"rank": 2, "method": "randomised"}),
        (40, {"method": "polar"}),
        (40, {"whiten": 0.4, "center": True}),
    ],
    ids=str,
)
def test_options_of_the_maps(rows, options):
    source, target = small_model(8, 0), small_model(10, 1)
    transport = theseus(**options)
    state = fit(transport, source, target, [small_rows(rows)])
    moved = transport.apply(state, source.params)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, target.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    for rotation in state.parts[0].arrays.values():
        singular = np.linalg.svd(np.asarray(rotation.left @ rotation.right), compute_uv=False)
        assert ((singular < 1e-3) | (abs(singular - 1) < 1e-3)).all()  # a partial isometry
        if "rank" in options:
            assert (singular > 0.5).sum() <= max(2, round(0.25 * len(singular)))
        if options.get("complete") in ("thin", "eye"):
            assert (singular > 0.5).all()


@methods
def test_the_order_of_the_examples_moves_a_task_vector_by_rounding(method):
    # The embedded models: real spectra, which have values on both sides of any tolerance and no gap there.
    source, target = (load(name, ("mirrored",)) for name in ("A", "B"))
    pool = photographs("mirrored", style_of("mirrored"), QUICK).pool
    examples = draw_examples(pool, "mirrored", 0, QUICK)
    order = np.random.default_rng(0).permutation(len(examples.labels))
    transport = TRANSPORTS[method]()
    first, second = (
        tree.flatten(transport.apply(fit(transport, source.model, target.model, [batch]), source.taus["mirrored"]))
        for batch in (examples, jax.tree.map(lambda leaf: leaf[order], examples))
    )
    sizes = {path: float(np.linalg.norm(leaf)) for path, leaf in first.items()}
    moved = {path: float(np.linalg.norm(leaf - second[path])) for path, leaf in first.items()}
    assert np.linalg.norm(list(moved.values())) < 0.005 * np.linalg.norm(list(sizes.values()))
    assert all(moved[path] <= 0.05 * size for path, size in sizes.items())


@methods
@pytest.mark.parametrize("options", [{}, {"whiten": 0.4, "center": True}], ids=str)
@pytest.mark.parametrize("rows", [4, 40])
def test_float64_is_the_formula_and_asks_for_64_bits(tiny, method, options, rows):
    with pytest.raises(ValueError, match="dtype='float64' needs JAX with 64 bits.*jax_enable_x64"):
        TRANSPORTS[method](dtype="float64")
    source, target, tau = small_model(8, 0), small_model(10, 1), small_model(8, 2).params
    with jax.enable_x64(True):
        batch = small_rows(rows)
        transport = TRANSPORTS[method](dtype="float64", rank_tolerance=1e-11, **options)
        moved = transport.apply(fit(transport, source, target, [batch]), tau)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(moved))
        state = fit(transport, source, target, [batch, batch])
        assert all(leaf.left.dtype == jnp.float32 for leaf in state.parts[0].arrays.values())
    if not options:
        seen = [small_seen(model, batch) for model in (source, target)]
        maps = [tiny.polar(seen[0]["in"][s], seen[1]["in"][s], False, 1e-11) for s in ("x", OUTPUTS[method])]
        expected = maps[0].T @ np.asarray(tau["in"]["kernel"], np.float64) @ maps[1]
        np.testing.assert_allclose(moved["in"]["kernel"], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "options", "expected"),
    [
        ("cpu", {}, "svd"),
        ("gpu", {}, "polar"),
        ("tpu", {}, "polar"),
        ("gpu", {"method": "svd"}, "svd"),
        ("gpu", {"rank": 4}, "svd"),
        ("gpu", {"complete": "thin"}, "svd"),
        ("gpu", {"rank": 4, "method": "randomised"}, "randomised"),
    ],
)
def test_the_decomposition_is_chosen_by_the_device(monkeypatch, backend, options, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert settings(Options(**options))["method"] == expected
    theseus(**options)  # and is allowed


def test_the_floor_of_whitening_is_an_option():
    # With the floor at the largest eigenvalue all are alike: the map is that without whitening.
    source, target, batch = small_model(8, 0), small_model(10, 1), [small_rows(40)]

    def moved(**options):
        transport = theseus(**options)
        return transport.apply(fit(transport, source, target, batch), source.params)["in"]["kernel"]

    plain, high, low = moved(), moved(whiten=0.5, whiten_floor=0.999), moved(whiten=0.5)
    np.testing.assert_allclose(high, plain, atol=5e-2)
    assert np.linalg.norm(low - plain) > 0.1 * np.linalg.norm(plain)


def test_no_gradient_asked_for_in_the_last_stage():
    # A head whose outputs are fixed needs no gradient; the stages before it still do.
    def first(params, x):
        return jnp.tanh(x @ params["kernel"])

    def last(params, x):
        return x @ params["kernel"]

    params = {"a": {"kernel": small_model(3, 0).params["in"]["kernel"]}, "b": {"kernel": jnp.eye(3)}}
    stages = (Stage("a", first, (("", "a"),)), Stage("b", last, (("", "b"),), fixed=("kernel",)))
    model = Model(params, stages, squared)
    moved = bico().apply(fit(bico(), model, model, [small_rows(40)]), params)
    np.testing.assert_allclose(moved["a"]["kernel"], params["a"]["kernel"], atol=1e-4)
    np.testing.assert_allclose(moved["b"]["kernel"], params["b"]["kernel"], atol=1e-4)


def test_a_map_has_a_name_of_its_own():
    # `both` is used on x and on tanh(x), `one` on x alone: two maps that begin with the same activation.
    def function(params, x):
        return x @ params["both"] + jnp.tanh(x) @ params["both"] + x @ params["one"]

    random = np.random.default_rng(0)
    params = {n: jnp.asarray(random.normal(size=(6, 3)), jnp.float32) for n in ("both", "one")}
    model = single_stage(function, params, loss=squared)
    state = fit(theseus(), model, model, [small_rows(40)])
    report = {leaf.target: leaf.measures for leaf in leaf_report(state)}
    assert (report["both"]["rows_in"], report["one"]["rows_in"]) == (80, 40)


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
    by_class_token = transport.apply(fit(transport, tiny.a, fine, pairs, tokens="class_token"), tiny.tau)
    inner, outer = (tiny.polar(rows_a[s][:, 0], seen[1][layer][s].reshape(-1, 10, 16)[:, 0]) for s in "xy")
    found = tree.flatten(by_class_token)[f"{layer}/kernel"]
    np.testing.assert_allclose(found, inner.T @ kernel @ outer, atol=1e-3)


@methods
def test_reindexed_source_and_paired_source(tiny, method):
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


def test_padding_never_enters_a_text_tower_s_maps(tiny):
    config = CLIPConfig(
        None, CLIPTextConfig(20, 12, 24, 2, 2, max_position_embeddings=6, eos_token_id=19, projection_dim=4)
    )
    source, target = (clip(config, tiny.random_params(config, seed)) for seed in (0, 1))
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


def test_rows_are_added_to_moments_by_one_program(programs):
    a, b, weights = (jax.device_put(np.ones(shape, np.float32)) for shape in ((41, 11), (41, 13), (41,)))
    rows = MomentAccumulator(Options())
    assert programs(rows.add, a, b, weights) == ["add_rows"]
