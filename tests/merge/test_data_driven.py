"""RegMean and Fisher merging: the formulas against numpy, and what they read from models and data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, merge, tree
from tvjax.stages import Stream, single_stage


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def f64(array):
    return np.asarray(array, np.float64)


def assert_near(found, expected, tolerance=1e-4):
    error = np.linalg.norm(f64(found) - f64(expected))
    assert error <= tolerance * np.linalg.norm(f64(expected)), error / np.linalg.norm(f64(expected))


# -- RegMean ---------------------------------------------------------------------------------------------------------


def gram(rows):
    return rows.T @ rows / len(rows)


def np_regmean(kernels, grams, weights, shrink):
    grams = [
        w * (shrink * f64(g) + (1 - shrink) * np.diag(np.diag(f64(g)))) for w, g in zip(weights, grams, strict=True)
    ]
    return np.linalg.solve(sum(grams), sum(g @ f64(k) for g, k in zip(grams, kernels, strict=True)))


@pytest.mark.parametrize("shrink", [0.95, 1.0, 0.0])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_regmean_against_numpy(shape, shrink):
    kernels, grams = [draw(i, *shape) for i in range(3)], [gram(draw(9 + i, 50, shape[0])) for i in range(3)]
    taus = [{"kernel": kernel, "bias": kernel[0]} for kernel in kernels]
    rows = []
    found = merge.regmean(
        taus, [{"kernel": g, "elsewhere": g} for g in grams], weights=[1.0, 2.0, 0.5], shrink=shrink, report=rows.append
    )
    assert_near(found["kernel"], np_regmean(kernels, grams, (1, 2, 0.5), shrink))
    assert_near(found["bias"], (kernels[0][0] + 2 * kernels[1][0] + 0.5 * kernels[2][0]) / 3.5, 1e-6)
    assert {row.path: row.rule for row in rows} == {
        "kernel": "regression on the inputs",
        "bias": "averaged: no Gram matrix",
    }


def test_regmean_solves_the_regression_on_data():
    """Of the models, base included: the outputs of every task's own kernel on its own inputs, in least squares."""
    base, taus = draw(0, 6, 5), [draw(1 + i, 6, 5) for i in range(3)]
    inputs = [draw(10 + i, 40, 6) @ draw(20 + i, 6, 6) for i in range(3)]  # correlated, and differently so
    targets = [x @ (base + tau) for x, tau in zip(inputs, taus, strict=True)]
    best = np.linalg.lstsq(f64(np.vstack(inputs)), f64(np.vstack(targets)), rcond=None)[0]
    found = merge.regmean([{"k": tau} for tau in taus], [{"k": gram(x)} for x in inputs], shrink=1.0, ridge=0.0)["k"]
    assert_near(base + found, best)


def test_regmean_of_tasks_with_other_inputs_keeps_both():
    kernels = [draw(i, 6, 4) for i in range(2)]
    grams = [np.diag(np.float32(d)) for d in ([1, 2, 3, 0, 0, 0], [0, 0, 0, 5, 1, 0])]
    found = merge.regmean([{"k": k} for k in kernels], [{"k": g} for g in grams])["k"]
    expected = np.vstack([kernels[0][:3], kernels[1][3:5], (kernels[0][5:] + kernels[1][5:]) / 2])
    assert_near(found, expected, 1e-4)  # an input that nobody has seen: the average


def test_regmean_where_gram_matrices_are_singular():
    kernels, rows = [draw(i, 20, 4) for i in range(2)], [draw(5 + i, 3, 20) for i in range(2)]
    taus, grams = [{"k": k} for k in kernels], [{"k": gram(x)} for x in rows]
    for options in ({"shrink": 1.0, "ridge": 0.0}, {"shrink": 1.0}, {}):
        assert np.isfinite(merge.regmean(taus, grams, **options)["k"]).all()
    found = f64(merge.regmean(taus, grams, shrink=1.0, ridge=0.0)["k"])
    for x, kernel in zip(rows, kernels, strict=True):  # six rows, twenty inputs: all of them can be met
        assert_near(x @ found, x @ kernel, 1e-3)
    zeros = [{"k": np.zeros((20, 20), np.float32)}] * 2
    assert_near(merge.regmean(taus, zeros)["k"], sum(kernels) / 2, 1e-6)
    same = merge.regmean([taus[0], taus[0]], grams)
    np.testing.assert_array_equal(same["k"], taus[0]["k"])


def test_regmean_of_stacked_and_of_multi_axis_kernels():
    layers = [draw(i, 3, 6, 5) for i in range(2)]
    heads = [kernel.reshape(3, 6, 5)[0].reshape(6, 5) for kernel in layers]
    grams = [np.stack([gram(draw(10 * i + j, 30, 6)) for j in range(3)]) for i in range(2)]
    found = merge.regmean([{"k": k} for k in layers], [{"k": g} for g in grams])["k"]
    for j in range(3):
        one = merge.regmean([{"k": k[j]} for k in layers], [{"k": g[j]} for g in grams])["k"]
        assert_near(found[j], one, 1e-5)
    split = merge.regmean([{"k": k.reshape(6, 5, 1)} for k in heads], [{"k": g[0]} for g in grams])["k"]
    assert_near(split.reshape(6, 5), found[0], 1e-5)


@pytest.mark.parametrize(
    ("grams", "options", "message"),
    [
        ([{"k": np.eye(4)}], {}, "Gram matrices of each of the 2 task vectors, found 1"),
        ([{"k": np.eye(4)}, {}], {}, r"(?s)k: \[\(4, 4\), 'missing'\], must be the same"),
        ([{"k": np.eye(5)}] * 2, {}, r"(?s)k: \(5, 5\) for a kernel of \(4, 3\)"),
        ([{"other": np.eye(4)}] * 2, {}, "no leaf has a Gram matrix"),
        ([({"k": np.eye(4)}, {})] * 2, {}, r"by path, input_grams\(...\).matrices, found a tuple"),
        ([{"k": np.eye(4)}, {"k": np.full((4, 4), np.nan)}], {}, "(?s)Gram matrices of task 1 has .*k: 16 of 16"),
        ([{"k": np.eye(4)}] * 2, {"shrink": 1.5}, "shrink must lie in"),
        ([{"k": np.eye(4)}] * 2, {"ridge": -1.0}, "ridge be 0 or more"),
        ([{"k": np.eye(4)}] * 2, {"weights": [1.0, -1.0]}, "weights must be 0 or more"),
        ([{"k": np.eye(4)}] * 2, {"weights": 0.0}, "of positive sum"),
    ],
)
def test_regmean_of_what_does_not_fit(grams, options, message):
    with pytest.raises(ValueError, match=message):
        merge.regmean([{"k": draw(i, 4, 3)} for i in range(2)], grams, **options)


# -- Gram matrices of a model ------------------------------------------------------------------------------------------


def embed(params, carry):
    return {**carry, "hidden": carry["x"] @ params["kernel"]}


def block(params, carry):
    hidden = carry["hidden"]
    inner = jax.nn.gelu(hidden @ params["up"]["kernel"] + params["up"]["bias"]) + hidden @ params["gate"]
    return {**carry, "hidden": hidden + inner @ params["down"]}


def head(params, carry):
    return {"scores": carry["hidden"].mean(1) @ params["kernel"] * params["scale"]}


def tied_head(params, carry):
    return {"scores": (carry["hidden"].mean(1) @ params["first"]["up"]["kernel"]) @ params["kernel"] * params["scale"]}


def cross_entropy(_, outputs, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs["scores"]), labels[:, None], 1)[:, 0]


def make_model(tied=False, streams=Stream()):  # noqa: B008
    def layer(seed):
        kernel, bias = draw(seed, 4, 6), draw(seed + 1, 6)
        return {"up": {"kernel": kernel, "bias": bias}, "gate": draw(seed + 2, 4, 6), "down": draw(seed + 3, 6, 4)}

    params = {
        "embed": {"kernel": draw(1, 3, 4)},
        "blocks": {"0": layer(10), "1": layer(20)},
        "head": {"kernel": draw(2, 6 if tied else 4, 5), "scale": np.float32(0.7)},
    }
    paths = (("", "head"), ("first", "blocks/0")) if tied else (("", "head"),)
    stages = (
        Stage("embed", embed, (("", "embed"),), streams=streams),
        *(Stage(f"blocks/{i}", block, (("", f"blocks/{i}"),), "blocks", streams=streams) for i in range(2)),
        Stage("head", tied_head if tied else head, paths),
    )
    return Model(jax.tree.map(jnp.asarray, params), stages, cross_entropy)


def make_batches(sizes=(4, 3), tokens=5):
    return [
        Batch(
            {"x": jnp.asarray(draw(30 + i, size, tokens, 3)), "real": jnp.asarray(draw(40 + i, size, tokens) > -0.5)},
            jnp.asarray(np.arange(size) % 5),
        )
        for i, size in enumerate(sizes)
    ]


def activations(model, batches):
    """What each kernel reads, written out, and which of these rows are no padding."""
    seen, real = {}, []
    for batch in batches:
        hidden = f64(batch.inputs["x"])
        real.append(np.asarray(batch.inputs["real"]).reshape(-1))
        rows = {"embed/kernel": hidden}
        hidden = hidden @ f64(model.params["embed"]["kernel"])
        for name, p in model.params["blocks"].items():
            rows[f"blocks/{name}/up/kernel"] = rows[f"blocks/{name}/gate"] = hidden
            inner = jax.nn.gelu(hidden @ f64(p["up"]["kernel"]) + f64(p["up"]["bias"]))
            rows[f"blocks/{name}/down"] = f64(inner) + hidden @ f64(p["gate"])
            hidden = hidden + rows[f"blocks/{name}/down"] @ f64(p["down"])
        rows["head/kernel"] = hidden.mean(1)
        for path, x in rows.items():
            seen.setdefault(path, []).append(x.reshape(-1, x.shape[-1]))
    return {path: np.concatenate(parts) for path, parts in seen.items()}, np.concatenate(real)


@pytest.mark.parametrize("host", [False, True])
def test_gram_matrices_of_a_model(host):
    model, batches, told = make_model(), make_batches(), []
    found = merge.input_grams(model, batches, offload=host, progress=lambda *stage: told.append(stage))
    rows, _ = activations(model, batches)
    assert found.matrices.keys() == rows.keys() and found.left_out == {}
    for path, x in rows.items():
        assert_near(found.matrices[path], gram(x), 1e-5)
    assert told == [(1, 4, "embed"), (2, 4, "blocks/0"), (3, 4, "blocks/1"), (4, 4, "head")]


def test_padding_rows_do_not_count():
    model, batches = make_model(streams=Stream(mask="real")), make_batches()
    found = merge.input_grams(model, batches).matrices
    rows, real = activations(model, batches)
    assert 0 < real.sum() < len(real)
    for path, x in rows.items():
        assert_near(found[path], gram(x[real] if len(x) == len(real) else x), 1e-5)


def test_the_uses_of_a_tied_kernel_are_added():
    model, batches = make_model(tied=True), make_batches()
    found = merge.input_grams(model, batches).matrices["blocks/0/up/kernel"]
    rows, _ = activations(model, batches)
    expected = np.concatenate([rows["blocks/0/up/kernel"], rows["head/kernel"]])
    assert_near(found, gram(expected), 1e-5)


def test_gram_matrices_by_the_kernels_own_order():
    """A convolution, a kernel of heads, a transposed kernel, a scanned stack, and tables that are no kernels."""

    def network(p, x):
        image = jax.lax.conv_general_dilated(x, p["conv"], (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        hidden = image.reshape(len(x), -1, 5) + p["positions"]
        hidden = jnp.einsum("btd,dhk->bthk", hidden, p["heads"]).reshape(*hidden.shape[:2], -1)
        hidden, _ = jax.lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), hidden, p["stack"])
        return hidden @ p["turned"].T

    params = {
        "conv": draw(0, 2, 2, 3, 5), "positions": draw(1, 4, 5), "heads": draw(2, 5, 2, 3), "stack": draw(3, 4, 6, 6),
        "turned": draw(4, 7, 6),
    }  # fmt: skip
    x = jnp.asarray(draw(5, 3, 4, 4, 3))
    found = merge.input_grams(single_stage(network, jax.tree.map(jnp.asarray, params)), [Batch(x)])
    patches = np.stack([f64(x)[:, i : i + 2, j : j + 2].reshape(3, -1) for i in (0, 2) for j in (0, 2)], 1)
    hidden = patches @ f64(params["conv"]).reshape(12, 5) + f64(params["positions"])
    rows = {"conv": patches, "heads": hidden}
    hidden = hidden @ f64(params["heads"]).reshape(5, 6)
    stack = []
    for kernel in f64(params["stack"]):
        stack.append(gram(hidden.reshape(-1, 6)))
        hidden = np.tanh(hidden @ kernel)
    assert found.matrices.keys() == {"conv", "heads", "stack"}
    for path, seen in rows.items():
        assert_near(found.matrices[path], gram(seen.reshape(-1, seen.shape[-1])), 1e-5)
    assert_near(found.matrices["stack"], np.stack(stack), 1e-5)
    assert found.left_out == {"positions": "used as a shift", "turned": "its leading axes are not the inputs"}
    taus = [jax.tree.map(lambda leaf, s=s: s * leaf, params) for s in (1.0, 2.0)]
    merged = merge.regmean(taus, [found.matrices] * 2)
    for path, leaf in merged.items():
        assert_near(leaf, 1.5 * params[path], 1e-4)


def test_merged_layer_serves_both_tasks_better_than_the_average():
    """Two fine-tuned models, each read on its own data."""
    base, batches = (
        make_model(),
        [make_batches((40,)), [jax.tree.map(lambda x: x[::-1], b) for b in make_batches((40,))]],
    )
    batches[1][0].inputs["x"] *= jnp.asarray([4.0, 0.1, 1.0])
    taus = [jax.tree.map(lambda leaf, i=i: 0.1 * draw(50 + i, *leaf.shape), base.params) for i in range(2)]
    tuned = [base.replace(params=jax.tree.map(jnp.add, base.params, tau)) for tau in taus]
    grams = [merge.input_grams(model, data).matrices for model, data in zip(tuned, batches, strict=True)]
    path = "embed/kernel"

    def error(tau):
        kernel = tree.flatten(tau)[path]
        return sum(
            np.sum(np.square(activations(base, data)[0][path] @ f64(kernel - tree.flatten(own)[path])))
            for data, own in zip(batches, taus, strict=True)
        )

    assert error(merge.regmean(taus, grams)) < 0.8 * error(merge.average(taus))


@pytest.mark.parametrize("tied", [False, True])
def test_regmean_plus_plus_reads_what_merged_stages_make(tied):
    """Stage by stage against numpy: every kernel on the inputs that merged stages before it and its own task give."""
    base, data = make_model(tied), [make_batches((4, 3)), make_batches((6,))]  # of rank 3 in 4 dimensions
    data[1][0].inputs["x"] *= jnp.asarray([4.0, 0.1, 1.0])
    taus = [jax.tree.map(lambda leaf, i=i: 0.3 * draw(50 + i, *leaf.shape), base.params) for i in range(2)]
    rows, told = [], []
    found = merge.regmean_plus_plus(
        taus, base, data, weights=[2.0, 1.0], shrink=0.9, report=rows.append, progress=lambda *step: told.append(step)
    )
    flat = tree.flatten(found)
    for stage in ("embed", "blocks/0", "blocks/1", "head"):
        seen = []
        for tau, batches in zip(taus, data, strict=True):
            own = {path: leaf for path, leaf in tree.flatten(tau).items() if path.startswith(stage)}
            params = jax.tree.map(jnp.add, base.params, tree.replace(found, own))
            if tied and stage == "head":
                break
            seen.append(activations(base.replace(params=params), batches)[0])
        for path in flat:
            if seen and path.startswith(stage) and path in seen[0]:
                kernels = [tree.flatten(tau)[path] for tau in taus]
                assert_near(flat[path], np_regmean(kernels, [gram(each[path]) for each in seen], (2, 1), 0.9), 1e-4)
    np.testing.assert_allclose(flat["head/scale"], (2 * taus[0]["head"]["scale"] + taus[1]["head"]["scale"]) / 3)
    rules = {row.path: row.rule for row in rows}
    assert rules.keys() == flat.keys() and len(rows) == len(flat)
    assert {path for path, rule in rules.items() if rule != "regression on the inputs"} == {
        "blocks/0/up/bias", "blocks/1/up/bias", "head/scale",
    }  # fmt: skip
    assert [name for _, _, name in told] == ["embed", "blocks/0", "blocks/1", "head"]


def test_regmean_plus_plus_of_a_model_of_one_stage_is_regmean():
    model = single_stage(lambda p, x: x @ p["kernel"], {"kernel": jnp.asarray(draw(0, 6, 5))})
    taus = [{"kernel": draw(1 + i, 6, 5)} for i in range(2)]
    data = [[Batch(jnp.asarray(draw(9 + i, 7, 6)))] for i in range(2)]
    found = merge.regmean_plus_plus(taus, model, data)["kernel"]
    grams = [{"kernel": gram(batch.inputs)} for (batch,) in data]
    assert_near(found, merge.regmean(taus, grams)["kernel"], 1e-5)
    with pytest.raises(ValueError, match=r"needs batches of its task, found \[1\]"):
        merge.regmean_plus_plus(taus, model, data[:1])
    for option, value in (("shrink", 2.0), ("ridge", float("nan")), ("weights", -1.0), ("weights", [1.0])):
        with pytest.raises(ValueError, match=option):
            merge.regmean_plus_plus(taus, model, data, **{option: value})
    with pytest.raises(ValueError, match="the base has no such leaf"):
        merge.regmean_plus_plus([{"other": tau["kernel"]} for tau in taus], model, data)


def test_gram_matrices_need_batches():
    with pytest.raises(ValueError, match="need batches"):
        merge.input_grams(make_model(), [])


# -- Fisher ------------------------------------------------------------------------------------------------------------


def test_fisher_against_numpy():
    shapes = {"kernel": (4, 3), "conv": (2, 2, 3, 5), "bias": (6,), "scale": ()}
    taus = [{path: draw(i, *shape) for path, shape in shapes.items()} for i in range(3)]
    fishers = [{path: draw(9 + i, *shape) ** 2 for path, shape in shapes.items()} for i in range(3)]
    fishers[0]["kernel"][0] = 0
    weights = (1.0, 0.0, 2.0)
    found = merge.fisher(taus, [{**f, "unused": np.ones(2)} for f in fishers], weights=list(weights))
    for path in shapes:
        parts = [w * (f64(f[path]) + 1e-12) for w, f in zip(weights, fishers, strict=True)]
        expected = sum(f * f64(tau[path]) for f, tau in zip(parts, taus, strict=True)) / sum(parts)
        np.testing.assert_allclose(found[path], expected, rtol=1e-4, atol=1e-5)


def test_fisher_information_of_any_size_and_none():
    taus = [{"w": np.float32([1, 1, 1])}, {"w": np.float32([3, 3, 3])}]
    for size in (1e-35, 1.0, 1e30):
        fishers = [{"w": np.float32(size) * np.float32(f)} for f in ([3, 1, 0], [1, 1, 0])]
        np.testing.assert_allclose(merge.fisher(taus, fishers)["w"], [1.5, 2, 2], rtol=1e-6)
    zeros = [{"w": np.zeros(3, np.float32)}] * 2
    np.testing.assert_allclose(merge.fisher(taus, zeros, weights=[3.0, 1.0])["w"], [1.5] * 3)


@pytest.mark.parametrize(
    ("fishers", "options", "message"),
    [
        ([{"w": np.ones(3)}], {}, "a Fisher matrix of each of the 2 task vectors, found 1"),
        ([{"w": np.ones(3)}, {"v": np.ones(3)}], {}, "w of task 1: missing"),
        ([{"w": np.ones(3)}, {"w": np.ones(4)}], {}, r"w of task 1: \(4,\), the task vector has \(3,\)"),
        ([{"w": np.ones(3)}] * 2, {"floor": -1.0}, r"floor must lie in \[0, 1\)"),
        ([{"w": np.ones(3)}] * 2, {"weights": -1.0}, "weights must be 0 or more"),
        ([{"w": np.ones(3)}, {"w": np.array([0, np.inf, 0])}], {}, "(?s)Fisher matrix of task 1 has .*w: 1 of 3"),
    ],
)
def test_fisher_of_what_does_not_fit(fishers, options, message):
    with pytest.raises(ValueError, match=message):
        merge.fisher([{"w": np.ones(3, np.float32)}] * 2, fishers, **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 3])
def test_diagonal_fisher_of_a_model(tied, chunk):
    model, batches = make_model(tied), make_batches()

    def loss(params, x, label):
        one = Batch({"x": x[None], "real": jnp.ones((1, 5), bool)}, label[None])
        return model.loss(None, model.replace(params=params)(one.inputs), one.labels)[0]

    total = None
    for batch in batches:
        gradients = jax.vmap(jax.grad(loss), (None, 0, 0))(model.params, batch.inputs["x"], batch.labels)
        squares = jax.tree.map(lambda g: jnp.sum(g**2, 0), gradients)
        total = squares if total is None else jax.tree.map(jnp.add, total, squares)
    told = []
    found = merge.diagonal_fisher(model, batches, chunk=chunk, progress=lambda *stage: told.append(stage))
    assert jax.tree.structure(found) == jax.tree.structure(model.params)
    for path, leaf in tree.flatten(found).items():
        assert leaf.dtype == jnp.float32
        assert_near(leaf, tree.flatten(total)[path] / 7, 1e-4)
    assert [name for _, _, name in told] == ["head", "blocks/1", "blocks/0", "embed"]


def test_fisher_merging_of_models():
    model = make_model()
    taus = [jax.tree.map(lambda leaf, i=i: 0.1 * draw(60 + i, *leaf.shape), model.params) for i in range(2)]
    fishers = [
        merge.diagonal_fisher(model.replace(params=jax.tree.map(jnp.add, model.params, tau)), make_batches())
        for tau in taus
    ]
    found = merge.fisher(taus, fishers)
    for path, leaf in tree.flatten(found).items():
        low, high = (f([tree.flatten(tau)[path] for tau in taus], 0) for f in (np.min, np.max))
        assert np.all((leaf >= low - 1e-6) & (leaf <= high + 1e-6)), path


def test_diagonal_fisher_of_what_has_no_gradients():
    model, batches = make_model(), make_batches()
    unlabelled = [batch._replace(labels=None) for batch in batches]
    for call, message in (
        (partial(merge.diagonal_fisher, model, unlabelled), "batches with labels"),
        (partial(merge.diagonal_fisher, model, []), "batches with labels"),
        (partial(merge.diagonal_fisher, Model(model.params, model.stages), batches), "has no loss"),
        (partial(merge.diagonal_fisher, model, batches, chunk=0), "chunk must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    params = {"w": jnp.ones(2), "ids": jnp.arange(2)}
    counted = single_stage(lambda p, x: x * p["w"] + p["ids"].astype(x.dtype), params, loss=lambda _, y, t: y[:, 0] * t)
    found = merge.diagonal_fisher(counted, [Batch(jnp.ones((3, 2)), jnp.ones(3))])
    assert found["ids"] is None and found["w"].tolist() == [1.0, 0.0]
