"""Leaves that are stacks of matrices: merged as the matrices that the model has, whatever array holds them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import merge, tree
from tvjax.merge.views import as_matrix, from_matrix, join, leaf_axes, parts

LAYERS, WIDTH, HEADS, HEAD, HIDDEN, EXPERTS = 3, 8, 2, 5, 12, 4
BLOCK = {  # shape, the letters of its axes, and the matrix (or matrices) that the model has
    "query/kernel": ((WIDTH, HEADS, HEAD), "ioo"),
    "query/bias": ((HEADS, HEAD), "vv"),
    "out/kernel": ((HEADS, HEAD, WIDTH), "iio"),
    "out/bias": ((WIDTH,), "v"),
    "norm/scale": ((WIDTH,), "v"),
    "experts/up": ((EXPERTS, WIDTH, HIDDEN), "sio"),
    "experts/down": ((EXPERTS, HIDDEN, WIDTH), "sio"),
    "mlp/kernel": ((HIDDEN, WIDTH), "oi"),
}
MERGES = {
    "tsv_m": merge.tsv_m,
    "iso_c": merge.iso_c,
    "iso_cts": merge.iso_cts,
    "wudi": merge.wudi,
    "wudi-adam": partial(merge.wudi, solver="adam", steps=5),
}
KNOTS = {
    "knots": lambda taus, **o: merge.knots(taus, partial(merge.ties, density=0.5, scope="leaf"), **o),
    "knots-input": lambda taus, **o: merge.knots(taus, partial(merge.ties, scope="leaf"), side="input", **o),
}


def unrolled(count=3):
    """Task vectors of an unrolled model whose leaves are of the shapes that its functions take."""
    draw = np.random.default_rng(5).normal
    blocks = [[{p: jnp.asarray(draw(size=s), jnp.float32) for p, (s, _) in BLOCK.items()} for _ in range(LAYERS)]
              for _ in range(count)]  # fmt: skip
    head = [jnp.asarray(draw(size=(WIDTH, 6)), jnp.float32) for _ in range(count)]
    return [{"blocks": {str(i): tree.nest(b) for i, b in enumerate(each)}, "head": h}
            for each, h in zip(blocks, head, strict=True)]  # fmt: skip


def as_matrices(tau):
    """The same with one two-axis leaf ``[in, out]`` for each matrix, and vectors of one axis."""
    found = {}
    for path, leaf in tree.flatten(tau).items():
        axes = dict((p, a) for p, (_, a) in BLOCK.items()).get(path.split("/", 2)[-1], "io")
        for number, part in enumerate(parts(path, leaf.shape, axes)):
            piece = part.of(leaf)
            name = f"{path}.{number}" if "s" in axes else path
            found[name] = as_matrix(piece, part.axes) if "i" in axes else piece.reshape(-1)
    return tree.nest(found)


def assert_near(found, expected, tolerance=2e-5):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        error = np.linalg.norm(np.asarray(found[path]) - leaf)
        assert error <= tolerance * max(float(np.linalg.norm(leaf)), 1e-6), (path, error)


def letters(axis=0, stacked=True):
    own = {path: "l" * (stacked and axis == 0) + axes for path, (_, axes) in BLOCK.items()}
    if stacked and axis == 1:
        own = {path: axes[0] + "l" + axes[1:] for path, (_, axes) in BLOCK.items()}
    return {**{f"blocks/{'' if stacked else '*/'}{path}": axes for path, axes in own.items()}, "head": "io"}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", MERGES)
def test_a_stacked_merge_is_the_merge_of_its_matrices(name, axis):
    """Layers, experts and heads; weights by depth see the layers."""
    call, taus = MERGES[name], unrolled()
    weights = [1.0, merge.ByDepth((0.5, 1.0, 2.0), other=0.25), 0.75]
    expected = call([as_matrices(tau) for tau in taus], weights=weights)
    found = call([tv.stack(tau, "blocks", axis) for tau in taus], weights=weights, matrices=letters(axis))
    assert_near(as_matrices(tv.unstack(found, "blocks", axis)), expected)
    found = call(taus, weights=weights, matrices=letters(stacked=False))
    assert_near(as_matrices(found), expected)


@pytest.mark.parametrize("name", KNOTS)
def test_knots_of_a_stack(name):
    taus = unrolled()
    expected = KNOTS[name]([as_matrices(tau) for tau in taus])
    rows = []
    found = KNOTS[name]([tv.stack(tau, "blocks") for tau in taus], matrices=letters(), report=rows.append)
    assert_near(as_matrices(tv.unstack(found, "blocks")), expected, 2e-4)
    report = {row.path: row for row in rows}
    assert report["blocks/query/kernel"].measures == {"rank": [8, 8, 8] if name == "knots-input" else [10, 10, 10]}
    assert report["blocks/norm/scale"].rule == "merged as it is" and report["head"].measures["rank"] <= 8


def test_what_nothing_says_is_an_error_and_never_one_matrix():
    stacked = [tv.stack(tau, "blocks") for tau in unrolled()]
    for call in (*MERGES.values(), *KNOTS.values()):
        with pytest.raises(
            ValueError, match=r"(?s)more than two axes.*blocks/query/kernel: \(3, 8, 2, 5\).*matrix_views.*unstack"
        ):
            call(stacked)
        with pytest.raises(ValueError, match=r"(?s)more than two axes.*blocks/out/kernel"):
            call(stacked, matrices="blocks/out/kernel")
        with pytest.raises(ValueError, match=r"(?s)says nothing of 8 leaves.*blocks/norm/scale: \(3, 8\)"):
            call(stacked, matrices={"blocks/query/kernel": "lioo"})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("io", r"w: 'io' for \(3, 4, 5\)"),
        ("lix", r"w: 'lix' for \(3, 4, 5\)"),
        ("lii", "w: 'lii', which is neither"),
        ("liv", "w: 'liv', which is neither"),
        (3, r"w: 3 for \(3, 4, 5\)"),
    ],
)
def test_letters_that_do_not_fit(axes, message):
    with pytest.raises(ValueError, match=message):
        merge.iso_c([{"w": jnp.ones((3, 4, 5))}], matrices={"w": axes})


def test_the_report_says_how_a_leaf_was_seen():
    taus = [
        {
            "w": jnp.ones((2, 6, 4, 5)),
            "conv": jnp.ones((3, 3, 2, 10)),
            "row": jnp.ones((1, 1, 4)),
            "b": jnp.ones((2, 5)),
        }
    ]
    rows = []
    merge.iso_c(taus, matrices={"w": "lsio", "conv": "iiio", "b": "lv"}, report=rows.append)
    rules = {row.path: row.rule for row in rows}
    assert rules == {"w": "12 matrices [4, 5]", "conv": "matrix [18, 10]", "row": "averaged", "b": "averaged"}
    merge.iso_c([{"conv": jnp.ones((3, 3, 2, 10)), "positions": jnp.ones((1, 7, 4))}], report=rows.append)
    assert [row.rule for row in rows[4:]] == ["matrix [18, 10] of a convolution [h, w, in, out]", "matrix [7, 4]"]


@pytest.mark.parametrize("shape", [(7, 7, 3), (3, 5, 4, 20), (16, 16, 3, 3), (2, 3, 3, 4, 9)])
def test_shapes_that_could_be_anything(shape):
    with pytest.raises(ValueError, match="nothing says which are stacked"):
        leaf_axes({"w": shape}, None)


@pytest.mark.parametrize("axes", ["io", "oi", "ioo", "oii", "lio", "ilo", "siol", "olsi", "lvsv", "v", ""])
def test_parts_of_a_leaf_put_together_are_the_leaf(axes):
    shape = tuple(range(2, 2 + len(axes)))
    leaf = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    pieces = []
    for part in parts("w", shape, axes):
        piece = part.of(leaf)
        assert piece.shape == part.shape
        if "i" in axes:
            matrix = as_matrix(piece, part.axes)
            assert matrix.shape == part.matrix
            piece = from_matrix(matrix, part.shape, part.axes)
        pieces.append(piece)
    np.testing.assert_array_equal(join(pieces, shape, axes), leaf)


def test_a_stack_on_disk_is_read_layer_by_layer(tmp_path):
    stacks = np.random.default_rng(0).normal(size=(2, 3, 6, 5)).astype(np.float32)
    stacks.tofile(tmp_path / "w")
    mapped = np.memmap(tmp_path / "w", np.float32, "r", shape=stacks.shape)
    found = merge.iso_c([{"w": mapped[0]}, {"w": mapped[1]}], matrices={"w": "lio"}, batch_bytes=1)["w"]
    for layer in range(3):
        alone = merge.iso_c([{"w": stacks[0, layer]}, {"w": stacks[1, layer]}])["w"]
        np.testing.assert_array_equal(found[layer], alone)


def test_a_stack_inside_jit():
    taus = [{"w": jnp.asarray(np.random.default_rng(i).normal(size=(3, 6, 5)), jnp.float32)} for i in range(2)]
    call = partial(merge.iso_c, matrices={"w": "lio"})
    assert_near(jax.jit(call)(taus), call(taus))


def test_della_ranks_the_inputs_of_an_output_together():
    """In whatever array they lie; the largest entries of each stay."""
    taus = unrolled(1)
    options = {"key": jax.random.key(3), "density": 0.5, "epsilon": 0.9999998, "combine": "linear", "rescale": False}
    kept = as_matrices(merge.della(taus, matrices=letters(stacked=False), **options))
    stacked = merge.della([tv.stack(taus[0], "blocks", 1)], matrices=letters(1), **options)
    for found in (kept, as_matrices(tv.unstack(stacked, "blocks", 1))):
        for path, leaf in tree.flatten(as_matrices(taus[0])).items():
            ranks = np.argsort(np.argsort(np.abs(leaf), axis=0), axis=0)
            kept = np.asarray(tree.flatten(found)[path]) != 0
            assert kept[ranks == len(leaf) - 1].all() and not kept[ranks == 0].any(), path
    with pytest.raises(ValueError, match="nothing says which are stacked"):
        merge.della(taus, **options)


BY_LAYER = {
    "ties": partial(merge.ties, density=0.3, scope="leaf"),
    "dare": partial(merge.dare, key=jax.random.key(0), density=0.5),
    "della": partial(merge.della, key=jax.random.key(0)),
    "breadcrumbs": merge.breadcrumbs,
    "karcher_mean": merge.karcher_mean,
    "average": merge.average,
    "iso_c": partial(merge.iso_c, matrices="**/kernel"),
}


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", BY_LAYER)
def test_any_merge_layer_by_layer(name, axis):
    draw = np.random.default_rng(0).normal
    shapes = {"blocks": {str(i): {"kernel": (6, 8), "bias": (8,)} for i in range(3)}, "head": {"kernel": (8, 2)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    taus = [
        jax.tree.map(lambda shape: jnp.asarray(draw(size=shape), jnp.float32), shapes, is_leaf=is_shape)
        for _ in range(3)
    ]
    weights = {"weights": [1.0, merge.ByDepth((0.5, 2.0), other=0.25), {"**": 1.0, "blocks/1": 0.5}]}
    rows = []
    expected = BY_LAYER[name](taus, **weights)
    call = merge.by_layer(BY_LAYER[name], "blocks", axis)
    found = call([tv.stack(tau, "blocks", axis) for tau in taus], report=rows.append, **weights)
    assert_near(found, tv.stack(expected, "blocks", axis), 1e-6)
    assert {row.path for row in rows} == set(tree.flatten(expected))


# -- weights of leaves that are no matrices ---------------------------------------------------------------------------


@pytest.mark.parametrize("call", [merge.tsv_m, merge.iso_c, merge.iso_cts, merge.wudi])
def test_two_averages_of_vectors(call):
    draw = np.random.default_rng(0).normal
    taus = [{"w": draw(size=(6, 5)).astype(np.float32), "b": draw(size=5).astype(np.float32)} for _ in range(3)]
    weights = np.float32([1.0, 0.5, 2.5])
    total = sum(w * tau["b"] for w, tau in zip(weights, taus, strict=True))
    ours = call(taus, weights=weights.tolist())
    published = call(taus, weights=weights.tolist(), others="weighted_average")
    np.testing.assert_allclose(ours["b"], total / 3, rtol=1e-5)
    np.testing.assert_allclose(published["b"], total / 4, rtol=1e-5)
    np.testing.assert_array_equal(ours["w"], published["w"])
    assert_near(call(taus, others="weighted_average"), call(taus), 1e-6)  # without weights they are one
    double = call(taus, weights=(2 * weights).tolist())
    np.testing.assert_allclose(double["b"], 2 * ours["b"], rtol=1e-5)  # ours is on the scale of the matrices
    with pytest.raises(ValueError, match="weights must be of positive sum"):
        call(taus, weights=[1.0, -1.0, 0.0], others="weighted_average")


# -- views read off a function ----------------------------------------------------------------------------------------


def block(x, p):
    y = (x - x.mean(-1, keepdims=True)) * p["norm"]["scale"]
    query = jnp.einsum("btd,dhk->bthk", y, p["query"]["kernel"]) + p["query"]["bias"]
    x = x + jnp.einsum("bthk,hkd->btd", jnp.tanh(query), p["out"]["kernel"]) + p["out"]["bias"]
    routed = x * jnp.arange(1.0, 1.0 + EXPERTS)[:, None, None, None]  # each expert has its own rows
    up = jnp.einsum("ebtd,edf->ebtf", routed, p["experts"]["up"])
    up = jnp.einsum("ebtf,efd->ebtd", jax.nn.relu(up), p["experts"]["down"]).sum(0)
    return up + jnp.tanh(x @ p["mlp"]["kernel"].T) @ p["mlp"]["kernel"], None


def scanned(params, x):
    x = x + params["positions"]
    return jax.lax.scan(block, x, params["blocks"])[0] @ params["head"]


def test_the_views_of_a_scanned_model():
    params = tv.stack(unrolled(1)[0], "blocks") | {"positions": jnp.ones((7, WIDTH))}
    views = merge.matrix_views(scanned, params, jnp.ones((2, 7, WIDTH)))
    assert views == letters() | {"positions": "io"}


def test_the_views_make_the_stacked_merge_the_unrolled_one():
    """The same model, unrolled and scanned, each merged by its own views."""
    taus = [tau | {"positions": jnp.ones((7, WIDTH))} for tau in unrolled()]

    def in_turn(params, x):
        x = x + params["positions"]
        for layer in params["blocks"].values():
            x = block(x, layer)[0]
        return x @ params["head"]

    x = jnp.ones((2, 7, WIDTH))
    one = merge.tsv_m(taus, matrices=merge.matrix_views(in_turn, taus[0], x))
    stacked = [tv.stack(tau, "blocks") for tau in taus]
    two = merge.tsv_m(stacked, matrices=merge.matrix_views(scanned, stacked[0], x))
    assert_near(tv.unstack(two, "blocks"), one)


def conv(kernel, x):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


USES = {
    "heads cut at use": (lambda p, x: jnp.einsum("btd,dhk->bthk", x, p.reshape(4, 2, 3)), (4, 6), (2, 5, 4), "io"),
    "transposed": (lambda p, x: x @ p.T, (6, 4), (2, 5, 4), "oi"),
    "fused and cut": (lambda p, x: (x @ p[:, :3], x @ p[:, 3:]), (4, 6), (2, 5, 4), "io"),
    "a scale of heads": (lambda p, x: x * p, (5, 4), (2, 3, 5, 4), "vv"),
    "a scale by einsum": (lambda p, x: jnp.einsum("btd,d->btd", x, p), (4,), (2, 5, 4), "v"),
    "a wide scale": (lambda p, x: x * p, (1, 1, 4), (2, 5, 4), "vvv"),
    "one output": (lambda p, x: x @ p, (4, 1), (2, 4), "io"),
    "one input": (lambda p, x: x @ p, (1, 4), (2, 1), "io"),
    "a dot": (lambda p, x: x @ p, (4,), (2, 4), "v"),
    "positions": (lambda p, x: x + p, (5, 4), (2, 5, 4), "io"),
    "a convolution": (conv, (3, 5, 4, 7), (2, 8, 8, 4), "iiio"),
    "a table": (lambda p, x: jnp.tanh(jnp.take(p, jnp.argmax(x, -1), axis=0)), (4, 7), (2, 5, 4), "io"),
    "unclassified": (lambda p, x: x * jnp.exp(p), (5, 4), (2, 5, 4), None),
}


@pytest.mark.parametrize("name", USES)
def test_the_views_of_one_leaf(name):
    use, shape, data, expected = USES[name]
    found = merge.matrix_views(lambda p, x: use(p["w"], x), {"w": jnp.ones(shape)}, jnp.ones(data))
    assert found == ({} if expected is None else {"w": expected})


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("embeddings/projection/weight", (16, 3, 4, 4), "oiii"),
        ("encoder/conv1/weight", (16, 8, 3), "oii"),
        ("stem/kernel", (3, 3, 8, 16), "iiio"),
    ],
)
def test_convolutions_as_they_are_stored_are_matrices_of_their_patches(path, shape, axes):
    assert merge.views.leaf_axes({path: shape}, None) == {path: axes}


@pytest.mark.parametrize(("path", "shape"), [("experts/weight", (16, 8, 3)), ("query/kernel", (16, 3, 4, 4))])
def test_what_may_be_stacked_is_asked_for(path, shape):
    with pytest.raises(ValueError, match="nothing says which are stacked"):
        merge.views.leaf_axes({path: shape}, None)
