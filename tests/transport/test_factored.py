"""Task vectors of low rank stay so where a link only multiplies their two sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tvjax as tv
from tvjax import tree
from tvjax.factors import dense
from tvjax.transport import leaf_forms, leaf_report, summary
from tvjax.transport.factored import find_sides

RANK = 2
KEPT = {"theseus", "bico", "bico gradients", "transfusion", "identity", "scale_by", "scale_by+theseus"}


def adapter(params, rank=RANK, seed=3, patterns=("**/query/kernel", "**/up/kernel", "**/down/kernel")):
    """A low-rank task vector of some kernels."""
    random = np.random.default_rng(seed)
    found = {}
    for pattern in patterns:
        for path in tree.match(list(tree.flatten(params)), pattern):
            rows, columns = np.shape(tree.get(params, path))
            sides = (random.normal(size=size) for size in ((rows, rank), (rank, columns)))
            found[path] = tv.LowRank(*(jnp.asarray(side, jnp.float32) for side in sides))
    return tree.nest(found)


def test_every_transport_moves_it_as_it_moves_the_product(tiny, fitted, name):
    transport, state = fitted(name)
    tau = adapter(tiny.a.params)
    moved, expected = transport.apply(state, tau), tree.flatten(transport.apply(state, dense(tau)))
    low = {path for path, leaf in tree.flatten(moved).items() if isinstance(leaf, tv.LowRank)}
    assert low == (set(expected) if name in KEPT else set())
    for path, leaf in tree.flatten(moved).items():
        size = np.abs(expected[path]).max()
        np.testing.assert_allclose(np.asarray(leaf), expected[path], atol=2e-5 * size, err_msg=path)
        if path in low:
            assert leaf.rank == RANK, path


def test_the_report_says_which_link_lost_the_form(tiny, fitted):
    transport, state = fitted("theseus+gradfix")
    tau = adapter(tiny.a.params)
    forms = leaf_forms(transport, state, tau)
    path = "vision/blocks/0/mlp/up/kernel"
    assert [form[path] for form in forms] == ["rank 2", "dense, from rank 2", "dense"]
    assert all(form.keys() == tree.flatten(tau).keys() for form in forms)
    rows = {(row.link, row.target): row.form for row in leaf_report(state, forms)}
    assert rows["theseus", path] == "rank 2" and rows["gradfix", "vision/post_norm/scale"] == ""
    assert "dense, from rank 2" in summary(state, forms)


@pytest.mark.parametrize("target", ["w", "d"])
def test_widths_depths_and_ranks_may_differ(tiny, target):
    model = getattr(tiny, target)
    transport = tv.chain(tv.theseus(rank_tolerance=1e-3), tv.scale_by(2.0))
    state = tv.fit(transport, tiny.a, model, tiny.batches)
    tau = adapter(tiny.a.params) | {}
    tau["vision"]["blocks"]["0"]["mlp"]["up"]["kernel"] = adapter(tiny.a.params, 5)["vision"]["blocks"]["0"]["mlp"][
        "up"
    ]["kernel"]
    moved = jax.jit(transport.apply)(state, tau)
    expected = tree.flatten(transport.apply(state, dense(tau)))
    assert len(expected) == 3 * len(model.params["vision"]["blocks"])
    for path, leaf in tree.flatten(moved).items():
        assert leaf.rank == (5 if path.startswith("vision/blocks/0/mlp/up") else RANK) or target == "d"
        size = np.abs(expected[path]).max()
        np.testing.assert_allclose(np.asarray(leaf), expected[path], atol=2e-5 * size, err_msg=path)
    edited = tv.apply(model.params, moved)
    assert jax.tree.map(jnp.shape, edited) == jax.tree.map(jnp.shape, model.params)


def test_no_product_is_formed(tiny, fitted):
    """Of a kernel [16, 32] of rank 2, nothing of its size is computed."""
    transport, state = fitted("theseus")
    tau = adapter(tiny.a.params, patterns=("**/up/kernel",))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (var.aval.shape for var in equation.outvars)
            yield from (
                size for inner in equation.params.values() if hasattr(inner, "jaxpr") for size in sizes(inner.jaxpr)
            )

    traced = jax.make_jaxpr(transport.apply)(state, tau).jaxpr
    assert (16, 32) not in set(sizes(traced)) and (16, RANK) in set(sizes(traced))


def test_rescaled_to_the_norm_of_the_source(tiny):
    transport = tv.theseus(rank_tolerance=1e-3, rescale=True)
    state = tv.fit(transport, tiny.a, tiny.w, tiny.batches)
    tau = adapter(tiny.a.params)
    moved = transport.apply(state, tau)
    for path, leaf in tree.flatten(tau).items():
        assert tree.get(moved, path).rank == RANK
        np.testing.assert_allclose(tree.norm(tree.get(moved, path)), tree.norm(leaf), rtol=1e-4)


def test_a_kernel_that_is_zeroed_is_of_rank_zero(tiny):
    transport = tv.theseus(rank_tolerance=1e-3)
    state = tv.fit(transport, tiny.a, tiny.b, tiny.batches)
    random = np.random.default_rng(0)
    sides = (jax.device_put(np.float32(random.normal(size=size))) for size in ((48, 2), (2, 16)))
    tau = tree.nest({"vision/embeddings/patch/kernel": tv.LowRank(*sides, (4, 4, 3, 16))})
    moved = transport.apply(state, tau)["vision"]["embeddings"]["patch"]["kernel"]
    assert isinstance(moved, tv.LowRank) and moved.rank == 0 and moved.shape == (4, 4, 3, 16)


def test_the_streaming_call_is_the_same(tiny):
    transport = tv.theseus(rank_tolerance=1e-3)
    tau = adapter(tiny.a.params)
    state = tv.fit(transport, tiny.a, tiny.w, tiny.batches)
    (moved,) = tv.fit(transport, tiny.a, tiny.w, tiny.batches, stream=[tau])
    for path, leaf in tree.flatten(transport.apply(state, tau)).items():
        assert tree.get(moved, path).rank == RANK
        np.testing.assert_allclose(np.asarray(tree.get(moved, path)), np.asarray(leaf), atol=1e-6)


# -- kernels of other layouts ---------------------------------------------------------------------------------------


def models(layer, shapes, widths=(6, 8)):
    """Two models of one layer, of other widths, and rows."""
    random = np.random.default_rng(0)
    draw = lambda shape: jax.device_put(np.float32(random.normal(size=shape)))  # noqa: E731
    made = [
        tv.single_stage(layer, {"w": draw(shape), "v": draw((width, width))})
        for shape, width in zip(shapes, widths, strict=True)
    ]
    views = [tv.Batch(draw((40, width))) for width in widths]
    return (*made, [tuple(views)])


def heads(params, x):
    return jnp.einsum("ni,ihd->nhd", x, params["w"]).reshape(len(x), -1)


def stacked(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]


def fused(params, x):
    query, key, value = jnp.split(x @ params["w"], 3, axis=-1)
    return jnp.tanh(query) * key + value


def conv(params, x):
    image = jnp.tanh(x @ params["v"]).reshape(len(x), 1, 2, -1)
    image = jnp.concatenate([image, image[:, :, ::-1]], 1)
    out = jax.lax.conv_general_dilated(image, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out.reshape(len(x), -1)


@pytest.mark.parametrize(
    ("layer", "shapes", "rows", "layers"),
    [
        (heads, ((6, 2, 3), (8, 2, 4)), 6, 0),
        (stacked, ((2, 6, 6), (2, 8, 8)), 6, 2),
        (stacked, ((2, 6, 6), (4, 8, 8)), 6, 2),
        (fused, ((6, 18), (8, 24)), 6, 0),
        (conv, ((2, 2, 3, 6), (2, 2, 4, 8)), 12, 0),
    ],
    ids=["heads", "stacked", "stacked deeper", "fused", "conv"],
)  # fmt: skip
def test_kernels_of_other_layouts(layer, shapes, rows, layers):
    a, b, batches = models(layer, shapes)
    random = np.random.default_rng(4)
    columns = int(np.prod(shapes[0])) // rows // max(layers, 1)
    lead = (layers,) if layers else ()
    sides = (jax.device_put(np.float32(random.normal(size=size))) for size in ((*lead, rows, 2), (*lead, 2, columns)))
    tau = {"w": tv.LowRank(*sides, shapes[0])}
    transport = tv.theseus(rank_tolerance=1e-3)
    state = tv.fit(transport, a, b, batches)
    moved, expected = transport.apply(state, tau)["w"], transport.apply(state, dense(tau))["w"]
    assert isinstance(moved, tv.LowRank) and moved.rank == 2 and moved.shape == shapes[1]
    np.testing.assert_allclose(np.asarray(moved), expected, atol=2e-5 * np.abs(expected).max())


def test_a_layout_that_mixes_both_sides_becomes_dense():
    a, b, batches = models(lambda params, x: x @ params["w"].T, ((5, 6), (7, 8)))
    tau = {"w": tv.LowRank(jnp.ones((5, 1)), jnp.ones((1, 6)))}
    transport = tv.theseus(rank_tolerance=1e-3)
    state = tv.fit(transport, a, b, batches)
    moved = transport.apply(state, tau)["w"]
    assert isinstance(moved, jax.Array)
    np.testing.assert_allclose(moved, transport.apply(state, dense(tau))["w"], atol=1e-6)
    assert leaf_forms(transport, state, tau)[0] == {"w": "dense, from rank 1"}


def test_sides_of_views():
    assert find_sides((("each",),), (3, 2, 2), 1, 2) == (None, (0, 1), (0, 1))
    assert find_sides((("take", (0, 0, 2)), ("each",)), (3, 2, 2), 1, 2).layers == (0, 0, 2)
    assert find_sides((("rev", (0,)),), (2, 3), 0, 1).rows == (1, 0)
    assert find_sides((("reshape", (3, 2)),), (2, 3), 0, 1) is None
    assert find_sides((("times", 2.0),), (2, 3), 0, 1) is None
