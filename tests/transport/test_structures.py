"""Transports of convolutions, blocks, fused kernels and stacks; rows that do not correspond; streams; odd trees."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tvjax import Batch, Model, Stage, Stream, bico, fit, gradfix, leaf_report, single_stage, theseus, tree

METHODS = {"theseus": theseus, "bico": bico}
methods = pytest.mark.parametrize("method", METHODS)
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def loss(_, outputs, labels):
    return jnp.sum(jnp.sin(outputs) * labels[:, None], -1)


def model(function, params, **options):
    return single_stage(function, params, loss=loss, **options)


def moved(method, source, target, batches, tau, **options):
    state = fit(METHODS[method](rank_tolerance=1e-5, **options), source, target, batches)
    return tree.flatten(METHODS[method](rank_tolerance=1e-5, **options).apply(state, tau)), {
        leaf.target: leaf for leaf in leaf_report(state)
    }


# -- convolutions ------------------------------------------------------------------------------------------------------


def convolve(x, w, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = options.pop("window_strides", (1, 1))
    return jax.lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=numbers, **options)


def convnet(p, x):
    x = jnp.tanh(convolve(x, p["stem"]))
    x = jnp.tanh(convolve(x, p["conv"], window_strides=(2, 2)) + p["bias"])
    x = jnp.tanh(convolve(x, p["depthwise"], feature_group_count=p["depthwise"].shape[-1]))
    x = jnp.tanh(convolve(x, p["grouped"], feature_group_count=2))
    return x.mean((1, 2)) @ p["head"]


def conv_params():
    return {
        "stem": normal(3, 3, 3, 8),
        "conv": normal(3, 3, 8, 12) / 5,
        "bias": normal(12) / 5,
        "depthwise": normal(3, 3, 1, 12) / 2,
        "grouped": normal(1, 2, 6, 10) / 2,
        "head": normal(10, 4),
    }


def permuted_channels(p):
    """The same function with its channels in another order; groups keep their members."""
    random = np.random.default_rng(1)
    a, b = random.permutation(8), np.concatenate([6 + random.permutation(6), random.permutation(6)])
    c = np.concatenate([5 + random.permutation(5), random.permutation(5)])
    inside = b.reshape(2, 6) % 6
    grouped = p["grouped"].reshape(1, 2, 6, 2, 5)[:, :, :, ::-1]  # blocks [in of a group, group, out]
    grouped = jnp.stack([grouped[:, :, inside[g], g] for g in (0, 1)], 3)
    grouped = jnp.stack([grouped[:, :, :, g][..., c.reshape(2, 5)[g] % 5] for g in (0, 1)], 3)
    return {
        "stem": p["stem"][..., a],
        "conv": p["conv"][:, :, a][..., b],
        "bias": p["bias"][b],
        "depthwise": p["depthwise"][..., b],
        "grouped": grouped.reshape(p["grouped"].shape),
        "head": p["head"][c],
    }


def images(count=24, size=6):
    return [Batch(normal(count, size, size, 3), normal(count)) for _ in range(2)]


@methods
def test_a_copy_with_permuted_channels_receives_the_permuted_vector(method):
    params, batches = conv_params(), images()
    copy = permuted_channels(params)
    source, target = (model(convnet, p, fixed=("head",)) for p in (params, copy))
    np.testing.assert_allclose(target(batches[0].inputs), source(batches[0].inputs), atol=1e-5)
    tau = jax.tree.map(lambda leaf: normal(*leaf.shape), params)
    found, report = moved(method, source, target, batches, tau)
    seen, _ = moved(method, source, source, batches, tau)  # the part of it that the data determine
    expected = permuted_channels(seen | {"stem": tau["stem"]})
    for path in ("conv", "bias", "depthwise", "grouped", "head"):
        assert report[path].action == "rotated"
        np.testing.assert_allclose(found[path], expected[path], atol=2e-3, err_msg=path)
    assert report["stem"].action == "zeroed by rule"  # what reads the pixels is an embedding
    found, _ = moved(method, source, target, batches, tau, transport_embeddings=True)
    np.testing.assert_allclose(found["stem"], expected["stem"], atol=2e-3)
    if method == "bico":
        np.testing.assert_allclose(seen["conv"], tau["conv"], atol=2e-3)


# -- blocks, scales, and work on a parameter before it meets the activation -------------------------------------------


def gemma_like(p, x):
    x = jnp.tanh(x @ p["up"])
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)) * (1 + p["scale"])
    x = jnp.einsum("btd,d->btd", x, p["einsum"]) - p["shift"]
    x = jnp.einsum("bthk,hkm->bthm", x.reshape(*x.shape[:2], 3, 4), p["heads"])
    return jnp.tanh(x.reshape(*x.shape[:2], -1)).mean(1) @ (p["out"] * 0.5)


def gemma_params():
    return {
        "up": normal(6, 12),
        "scale": normal(12) / 3,
        "einsum": normal(12),
        "shift": normal(12),
        "heads": normal(3, 4, 5),
        "out": normal(15, 4),
    }


def permuted_units(p):
    heads, inside, outside = np.array([2, 0, 1]), np.array([3, 1, 0, 2]), np.array([4, 2, 0, 1, 3])
    units = (heads[:, None] * 4 + inside).ravel()
    outputs = (heads[:, None] * 5 + outside).ravel()
    return {
        "up": p["up"][:, units],
        "scale": p["scale"][units],
        "einsum": p["einsum"][units],
        "shift": p["shift"][units],
        "heads": p["heads"][heads][:, inside][:, :, outside],
        "out": p["out"][outputs],
    }


def texts(count=30, width=6):
    return [Batch(normal(count, 5, width), normal(count)) for _ in range(2)]


@methods
def test_a_copy_with_permuted_units_receives_the_permuted_vector(method):
    params, batches = gemma_params(), texts()
    source, target = (model(gemma_like, p, fixed=("out",)) for p in (params, permuted_units(params)))
    np.testing.assert_allclose(target(batches[0].inputs), source(batches[0].inputs), atol=1e-5)
    tau = jax.tree.map(lambda leaf: normal(*leaf.shape), params)
    found, report = moved(method, source, target, batches, tau)
    assert {leaf.action for leaf in report.values()} == {"rotated"}
    seen, _ = moved(method, source, source, batches, tau)
    for path, leaf in permuted_units(seen).items():
        np.testing.assert_allclose(found[path], leaf, atol=5e-3, err_msg=path)


def fused(p, x):
    q, k, v = jnp.split(x @ p["qkv"] + p["bias"], 3, axis=-1)
    return jnp.tanh(jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v).mean(1) @ p["out"]


@methods
def test_a_fused_kernel_moves_part_by_part(method):
    width = 8
    params = {"qkv": normal(6, 3 * width) / 2, "bias": normal(3 * width), "out": normal(width, 4)}
    orders = [RANDOM.permutation(width) for _ in range(2)]
    columns = np.concatenate([orders[0], width + orders[0], 2 * width + orders[1]])

    def permuted(p):
        return {"qkv": p["qkv"][:, columns], "bias": p["bias"][columns], "out": p["out"][orders[1]]}

    source, target = model(fused, params, fixed=("out",)), model(fused, permuted(params), fixed=("out",))
    only_values = jax.tree.map(jnp.zeros_like, params)
    only_values["qkv"] = only_values["qkv"].at[:, 2 * width :].set(normal(6, width))
    found, report = moved(method, source, target, texts(60), only_values)
    assert report["qkv"].action == "rotated" and "rank_out#2" in report["qkv"].measures
    assert not np.any(found["qkv"][:, : 2 * width])  # nothing of v leaks into q and k
    if method == "bico":
        np.testing.assert_allclose(found["qkv"], permuted(only_values)["qkv"], atol=5e-3)


# -- stacks of unlike depth --------------------------------------------------------------------------------------------


def scanned(p, x):
    return jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, p["layers"])[0].mean(1)


@methods
def test_stacks_of_unlike_depth_are_paired_layer_by_layer(method):
    deep = normal(3, 6, 6) / 3
    source = model(scanned, {"layers": deep})
    target = model(scanned, {"layers": jnp.concatenate([deep, jnp.zeros((2, 6, 6))])})
    transport = METHODS[method]()
    tau = {"layers": normal(3, 6, 6)}
    state = fit(transport, source, target, texts(40), depth=[0, 1, 2, 2, 0])
    found = transport.apply(state, tau)["layers"]
    np.testing.assert_allclose(found[:3], tau["layers"], atol=5e-3)
    assert found.shape == (5, 6, 6)
    uniform = fit(transport, source, target, texts(40)).parts[0].rules[0].pieces[0].source_view
    assert uniform == (("take", (0, 0, 1, 2, 2)), ("each",))
    with pytest.raises(ValueError, match="depth='cka' does not see"):
        fit(transport, source, target, texts(4), depth="cka")


# -- rows that do not correspond ---------------------------------------------------------------------------------------


def mixer(p, x):
    x = x + jnp.swapaxes(jnp.swapaxes(x @ p["in"], 1, 2) @ p["tokens"], 1, 2) @ p["back"]
    return x.mean(1)


def routed(p, x):
    rows = x.reshape(-1, x.shape[-1])
    rows = rows[jnp.argsort(rows[:, 0])] @ p["expert"]
    return (x @ p["in"]).mean(1) + rows.sum(0)


def dispatched(p, x):
    rows = x.reshape(-1, x.shape[-1])
    places = jax.nn.one_hot(jnp.argmax(rows @ p["router"], -1), 2)
    inside = jnp.einsum("ne,nd->end", places, rows)
    taken = jnp.einsum("nc,end->ecd", jnp.ones((rows.shape[0], 7)), inside)
    return (x @ p["in"]).mean(1) + jnp.einsum("ecd,edf->ecf", taken, p["expert"]).sum((0, 1))


def test_only_the_leaf_whose_rows_do_not_correspond_is_left_out():
    cases = {
        "tokens": (mixer, {"in": normal(6, 6), "tokens": normal(5, 5), "back": normal(6, 6)}, "rows are features"),
        "expert": (routed, {"in": normal(6, 6), "expert": normal(6, 6)}, "order that the data decide"),
    }
    for path, (function, params, why) in cases.items():
        tau = jax.tree.map(lambda leaf: normal(*leaf.shape), params)
        found, report = moved("theseus", model(function, params), model(function, params), texts(), tau)
        assert report[path].action == "zeroed by rule" and why in report[path].why
        assert not np.any(found[path])
        np.testing.assert_allclose(found["in"], tau["in"], atol=5e-3)


def test_places_that_a_router_fills_do_not_correspond():
    params = {"in": normal(6, 6), "router": normal(6, 2), "expert": normal(2, 6, 6)}
    _, report = moved("theseus", model(dispatched, params), model(dispatched, params), texts(), params)
    assert "places that each model fills" in report["expert"].why and report["in"].action == "rotated"


def test_a_norm_inside_heads_is_left_out_where_head_counts_differ():
    def normed(p, x, heads):
        q = (x @ p["q"]).reshape(*x.shape[:2], heads, -1)
        return (q / jnp.sqrt(jnp.mean(q**2, -1, keepdims=True)) * p["scale"]).sum((1, 2)) @ p["out"]

    params = {"q": normal(6, 12), "scale": normal(4), "out": normal(4, 6)}
    source, target = (
        model(lambda p, x: normed(p, x, 3), params),
        model(lambda p, x: normed(p, x, 6), {"q": normal(6, 24), "scale": normal(4), "out": normal(4, 6)}),
    )
    _, report = moved("theseus", source, target, texts(), params)
    assert "3 rows a token in the source (heads), 6 in the target" in report["scale"].why
    assert report["q"].action == report["out"].action == "rotated"


# -- streams -----------------------------------------------------------------------------------------------------------


def cross(p, c):
    scores = jnp.where(c["memory_mask"][:, None], c["hidden"] @ p["q"] @ jnp.swapaxes(c["memory"] @ p["k"], 1, 2), -1e9)
    return c | {"hidden": c["hidden"] + jax.nn.softmax(scores) @ (c["memory"] @ p["v"])}


def two_streams(seed, fill, length=5):
    """Inputs whose padding is filled with something."""
    random = np.random.default_rng(seed)
    real = jnp.asarray(random.random((20, length)) > 0.4), jnp.asarray(random.random((20, 5)) > 0.4)
    arrays = [jnp.asarray(random.normal(size=(20, n, 6)), jnp.float32) for n in (length, 5)]
    hidden, memory = (jnp.where(m[..., None], a, fill) for m, a in zip(real, arrays, strict=True))
    return Batch({"hidden": hidden, "memory": memory, "mask": real[0], "memory_mask": real[1]})


STREAMS = {"hidden": Stream(mask="mask"), "memory": Stream(mask="memory_mask")}


@pytest.mark.parametrize("length", [5, 7])
def test_each_stream_has_its_own_padding(length):
    params = {name: normal(6, 6) for name in "qkv"}
    twin = Model(params, (Stage("cross", cross, streams=STREAMS),))
    tau = {name: normal(6, 6) for name in "qkv"}
    found = [
        tree.flatten(theseus().apply(fit(theseus(), twin, twin, [two_streams(3, fill, length)]), tau))
        for fill in (0.0, 50.0)
    ]
    for name in "qkv":
        np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-4, err_msg=name)


def test_one_layout_for_two_streams_is_refused():
    params = {name: normal(6, 6) for name in "qkv"}
    for layout in (Stream(mask="mask"), Stream(special=1, grid=(2, 2))):
        twin = Model(params, (Stage("cross", cross, streams=layout),))
        with pytest.raises(ValueError, match=r"tokens of 'hidden', 'memory'.*streams=\{'hidden'"):
            fit(theseus(), twin, twin, [two_streams(3, 0.0)])


def test_streams_that_are_not_declared_are_named():
    params = {name: normal(6, 6) for name in "qkv"}
    twin = Model(params, (Stage("cross", cross, streams={"hidden": Stream(mask="mask")}),))
    with pytest.raises(ValueError, match="tokens of 'memory'.*declares the streams"):
        fit(theseus(), twin, twin, [two_streams(3, 0.0)])


def test_merged_rows_keep_their_padding():
    def flattened(p, c):
        return c | {"hidden": (c["hidden"].reshape(-1, 6) @ p["w"]).reshape(c["hidden"].shape)}

    twin = Model({"w": normal(6, 6)}, (Stage("block", flattened, streams=Stream(mask="mask")),))
    tau = {"w": normal(6, 6)}
    found = []
    for fill in (0.0, 50.0):
        batch = two_streams(3, fill)
        batch = Batch({name: batch.inputs[name] for name in ("hidden", "mask")})
        found.append(theseus().apply(fit(theseus(), twin, twin, [batch]), tau)["w"])
    np.testing.assert_allclose(*found, atol=1e-4)


# -- trees, and what was accepted in silence ---------------------------------------------------------------------------


def test_stages_of_any_tree():
    dense = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    trees = {
        "nnx list": {"layers": [nnx.state(dense), nnx.state(dense)]},
        "equinox": {"layers": [eqx.nn.Linear(6, 6, key=jax.random.key(i)) for i in range(2)]},
        "haiku": {"layers/0": {"kernel": normal(6, 6)}, "layers/1": {"kernel": normal(6, 6)}},
    }
    for name, params in trees.items():

        def function(p, x):
            weight = jax.tree.leaves(p["layer"])[-1 if name == "nnx list" else 0]  # noqa: B023
            return jnp.tanh(x @ weight)

        stages = tuple(Stage(f"layers/{i}", function, (("layer", f"layers/{i}"),), "layers") for i in range(2))
        twin = Model(params, stages)
        state = fit(theseus(), twin, twin, texts(40))
        assert any(leaf.action == "rotated" for leaf in leaf_report(state)), name


def test_functions_as_leaves_are_refused():
    module = eqx.nn.MLP(6, 6, 8, 1, key=jax.random.key(0))
    twin = single_stage(lambda m, x: jax.vmap(jax.vmap(m))(x), module)
    with pytest.raises(ValueError, match="is a .* and no array: split off what is static"):
        fit(theseus(), twin, twin, texts())


def test_names_that_are_not_there_are_refused():
    params = {"w": normal(6, 6)}

    def function(p, c):
        return {**c, "hidden": c["hidden"] @ p["w"]}

    batch = Batch({"hidden": normal(4, 5, 6), "mask": jnp.ones((4, 5), bool)})
    wrong = Model(params, (Stage("block", function, fixed=("kernel",)),))
    with pytest.raises(ValueError, match=r"calls \['kernel'\] fixed, and has no such leaves"):
        fit(theseus(), wrong, wrong, [batch])
    wrong = Model(params, (Stage("block", function, streams=Stream(mask="padding")),))
    with pytest.raises(ValueError, match="padding mask 'padding', which its carry does not hold"):
        fit(theseus(), wrong, wrong, [batch])


@pytest.mark.parametrize("transport", [theseus, bico, gradfix])
def test_models_without_a_common_leaf_are_refused(transport):
    source = model(lambda p, x: (x @ p["kernel"]).mean(1), {"kernel": normal(6, 6)})
    target = model(lambda p, x: (x @ p["w"]).mean(1), {"w": normal(6, 6)})
    with pytest.raises(ValueError, match="no leaf of the target has a partner|models of one shape"):
        fit(transport(), source, target, texts())


def test_a_check_that_compares_nothing_is_no_check():
    lookup = model(lambda p, x: p["table"][x].mean(1), {"table": normal(9, 6)})
    batch = Batch(jnp.ones((4, 5), jnp.int32), normal(4))
    with pytest.raises(ValueError, match="no stage has a parameter at an operation with a rule"):
        fit(theseus(), lookup, lookup, [batch], check_gradients=True)
