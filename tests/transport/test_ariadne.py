"""Ariadne: ten lines of NumPy, what it must reproduce, and that its state is of one task vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, Stream, apply, ariadne, chain, fit, gradfix, leaf_report, scale_by, theseus, tree
from tvjax.checkpoints import TransportStore, load_state, save_state
from tvjax.models.bert import BertConfig, bert
from tvjax.models.bert.modeling import init as init_bert
from tvjax.transport import make_transport, summary
from tvjax.transport.plan import plan

EXACT = {"ridge": 0.0}


def block(params, carry):
    """The least of a block: one kernel reads the stream, one writes it, through a LayerScale where there is one."""
    hidden = carry["hidden"]
    change = jnp.tanh(hidden @ params["up"]) @ params["down"]["kernel"]
    if "bias" in params["down"]:
        change = change + params["down"]["bias"]
    return {**carry, "hidden": hidden + (change * params["scale"] if "scale" in params else change)}


def loss(_, outputs, labels):
    return jnp.sum(outputs["hidden"].mean(1) * labels[:, None], -1)


def make(width, inner, depth, seed, bias=True, scaled=False, stream=None):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    def one():
        down = {"kernel": normal(inner, width), **({"bias": normal(width)} if bias else {})}
        return {"up": normal(width, inner), "down": down, **({"scale": 1 + normal(width)} if scaled else {})}

    params = {"blocks": {str(i): one() for i in range(depth)}}
    names = [f"blocks/{i}" for i in range(depth)]
    return Model(params, tuple(Stage(n, block, (("", n),), "blocks", stream or Stream()) for n in names), loss)


def batches_of(width_a, width_b, seed=5, count=2, tokens=4, mask=False):
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        sides = [
            {"hidden": jnp.asarray(random.normal(size=(8, tokens, width)), jnp.float32)} for width in (width_a, width_b)
        ]
        if mask:
            real = jnp.asarray(random.random((8, tokens)) < 0.7)
            sides = [{**side, "mask": real} for side in sides]
        found.append(tuple(Batch(side, jax.device_put(np.float32(random.normal(size=8)))) for side in sides))
    return found


def noise(model, seed, size=0.1):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jax.device_put(np.float32(size * random.normal(size=leaf.shape))), model.params)


def rows_of(model, batches, side):
    """By block the inputs of its down kernel and the stream that leaves it, the real rows of all batches, float64."""
    hidden = np.concatenate([np.asarray(pair[side].inputs["hidden"], np.float64) for pair in batches])
    masks = [pair[side].inputs.get("mask", jnp.ones((8, hidden.shape[1]), bool)) for pair in batches]
    found = []
    for params in model.params["blocks"].values():
        p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        h = np.tanh(hidden @ p["up"])
        hidden = hidden + (h @ p["down"]["kernel"] + p["down"].get("bias", 0)) * p.get("scale", 1)
        found.append([x[np.concatenate(masks)] for x in (h, hidden)])
    return found


@pytest.mark.parametrize(
    ("bias", "scaled", "mask", "ridge"),
    [(True, True, False, None), (False, False, True, None), (True, False, True, 0.3)],
)
def test_it_is_the_ridge_solution_in_numpy(bias, scaled, mask, ridge):
    stream = Stream(mask="mask") if mask else Stream()
    source, target = make(5, 9, 2, 0, bias, scaled, stream), make(7, 11, 3, 1, bias, scaled, stream)
    batches, tau = batches_of(5, 7, mask=mask), noise(source, 2)
    transport = ariadne(ridge=ridge)
    moved = transport.apply(fit(transport, source, target, batches, tau=tau), tau)
    before, after = (rows_of(m, batches, 0) for m in (source, source.replace(params=apply(source.params, tau))))
    for j, (h, t) in enumerate(rows_of(target, batches, 1)):
        s, changed = (rows[(0, 0, 1)[j]][1] for rows in (before, after))
        u, _, vt = np.linalg.svd((s - s.mean(0)).T @ (t - t.mean(0)), full_matrices=False)
        wanted = (changed - s) @ u @ vt
        scale = np.asarray(target.params["blocks"][str(j)].get("scale", np.ones(7)), np.float64)
        means = (h.mean(0), wanted.mean(0)) if bias else (0, 0)
        x, y = h - means[0], wanted - means[1]
        variance = np.trace((h - h.mean(0)).T @ (h - h.mean(0))) / (len(h) - 1) * np.mean(scale**2)
        penalty = variance if ridge is None else ridge * np.trace(x.T @ x) / 11
        columns = [
            np.linalg.solve(x.T @ x * k**2 + penalty * np.eye(11), k * x.T @ y[:, i]) for i, k in enumerate(scale)
        ]
        kernel = np.stack(columns, 1)
        found = moved["blocks"][str(j)]
        np.testing.assert_allclose(found["down"]["kernel"], kernel, atol=2e-4 * np.abs(kernel).max())
        if bias:
            np.testing.assert_allclose(found["down"]["bias"], means[1] / scale - means[0] @ kernel, atol=1e-3)
        assert not np.any(found["up"]) and not np.any(found.get("scale", 0))


def test_the_same_model_gets_the_same_displacement():
    """With more inputs than rows a block can do anything: its stream moves as the fine-tuned one; tau comes back."""
    model = make(5, 80, 1, 0)
    batches, tau = batches_of(5, 5, tokens=1), noise(model, 2)
    batches = [(pair[0], pair[0]) for pair in batches]
    transport = ariadne(**EXACT)
    state = fit(transport, model, model, batches, tau=tau)
    edited, tuned = (apply(model.params, change) for change in (transport.apply(state, tau), tau))
    for pair in batches:
        one, other = (model.replace(params=params)(pair[0].inputs)["hidden"] for params in (edited, tuned))
        np.testing.assert_allclose(one, other, atol=1e-3)
    measures = state.parts[0].measures["blocks/0/down/kernel"]
    assert float(measures["in_range"]) == pytest.approx(1, abs=1e-3)
    assert float(measures["realised"]) == pytest.approx(1, abs=1e-3)
    assert "realised_held_out" in measures
    narrow = make(5, 9, 1, 0)  # and with fewer inputs than rows a change of the down projection is determined
    tau = jax.tree.map(jnp.zeros_like, narrow.params)
    down = {"kernel": noise(narrow, 3)["blocks"]["0"]["down"]["kernel"], "bias": jnp.ones(5)}
    tau["blocks"]["0"]["down"] = down
    moved = transport.apply(fit(transport, narrow, narrow, batches, tau=tau), tau)
    np.testing.assert_allclose(moved["blocks"]["0"]["down"]["kernel"], down["kernel"], atol=1e-4)
    np.testing.assert_allclose(moved["blocks"]["0"]["down"]["bias"], down["bias"], atol=1e-4)


def test_a_rotated_stream_gets_the_rotated_vector():
    model = make(5, 9, 2, 0)
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(3).normal(size=(5, 5)))[0], jnp.float32)

    def turned(path, leaf):
        return turn.T @ leaf if path.endswith("up") else leaf @ turn

    rotated = model.replace(params=tree.map_with_path(turned, model.params))
    batches, tau = batches_of(5, 5), noise(model, 2)
    same = [(a, a) for a, _ in batches]
    other = [(a, a._replace(inputs={"hidden": a.inputs["hidden"] @ turn})) for a, _ in batches]
    transport = ariadne()
    moved = [transport.apply(fit(transport, model, m, b, tau=tau), tau) for m, b in ((model, same), (rotated, other))]
    for path, leaf in tree.flatten(tree.map_with_path(turned, moved[0])).items():
        np.testing.assert_allclose(tree.flatten(moved[1])[path], leaf, atol=2e-4, err_msg=path)


def test_batches_are_summed_and_stages_streamed():
    source, target = make(5, 9, 2, 0), make(7, 11, 3, 1)
    batches, tau = batches_of(5, 7), noise(source, 2)
    whole = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *batches)
    transport = ariadne()
    expected = tree.flatten(transport.apply(fit(transport, source, target, [whole], tau=tau), tau))
    (streamed,) = fit(transport, source, target, batches, stream=[tau])
    for path, leaf in tree.flatten(streamed).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-4, err_msg=path)


@pytest.fixture(scope="module")
def case():
    source, target = make(5, 9, 2, 0), make(7, 11, 3, 1)
    batches, tau = batches_of(5, 7), noise(source, 2)
    transport = ariadne()
    return source, target, batches, tau, transport, fit(transport, source, target, batches, tau=tau)


def test_the_state_is_of_one_task_vector(case, tmp_path):
    source, target, batches, tau, transport, state = case
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tau)
    transport.apply(state, rounded)  # the same one, stored in 16 bits
    half = tree.map_with_path(lambda path, x: 0.5 * x if "1/up" in path else x, tau)
    for other in (half, {"blocks": {"0": tau["blocks"]["0"]}}):
        with pytest.raises(ValueError, match="of another task vector: .*fit again"):
            transport.apply(state, other)
    compiled = jax.jit(transport.apply)
    moved = compiled(state, tau)
    np.testing.assert_allclose(moved["blocks"]["2"]["down"]["kernel"], state.parts[0].arrays["blocks/2/down/kernel"])
    assert np.isnan(compiled(state, noise(source, 9))["blocks"]["2"]["down"]["kernel"]).all()
    with pytest.raises(ValueError, match="ariadne is fitted with one task vector.*tau=tau"):
        fit(transport, source, target, batches)
    with pytest.raises(ValueError, match="no link of theseus is fitted with the task vector"):
        fit(theseus(), source, target, batches, tau=tau)
    with pytest.raises(ValueError, match="ariadne is fitted with the task vector as it is given: put it first"):
        chain(scale_by(2.0), ariadne())
    with pytest.raises(ValueError, match="no such leaf in the source"):
        fit(transport, source, target, batches, tau={"blocks": {"9": {"up": jnp.ones((5, 9))}}})
    store = TransportStore(tmp_path / "maps", {})
    fit(transport, source, target, batches, tau=tau, cache=store)
    with pytest.raises(ValueError, match="of another task vector"):  # what is resumed is of the first
        fit(transport, source, target, batches, tau=noise(source, 9), cache=store)


def test_it_is_planned_stored_resumed_chained_and_reported(case, tmp_path):
    source, target, batches, tau, transport, state = case
    both = chain(ariadne(), gradfix())
    masked = both.apply(fit(both, source, target, batches, tau=tau), tau)
    moved = transport.apply(state, tau)
    kept = np.asarray(masked["blocks"]["1"]["down"]["kernel"] == moved["blocks"]["1"]["down"]["kernel"])
    assert 0.1 < kept.mean() < 0.9
    save_state(tmp_path / "state.safetensors", state)
    loaded = load_state(tmp_path / "state.safetensors")
    store = TransportStore(tmp_path / "maps", {})
    fit(transport, source, target, batches, tau=tau, cache=store)
    resumed = fit(transport, source, target, batches[:1], tau=tau, cache=store)  # nothing is looked at again
    for other in (loaded, resumed):
        np.testing.assert_array_equal(
            tree.flatten(transport.apply(other, tau))["blocks/2/down/kernel"], moved["blocks"]["2"]["down"]["kernel"]
        )
    actions = {leaf.target: leaf for leaf in leaf_report(loaded)}
    assert actions["blocks/0/down/kernel"].action == actions["blocks/0/down/bias"].action == "fitted"
    assert actions["blocks/0/up"].action == "zeroed by rule"
    assert actions["blocks/0/down/kernel"].measures["rank_out"] == 5
    assert set(actions["blocks/0/down/kernel"].measures) >= {"rank", "in_range", "realised", "realised_held_out"}
    assert "fitted" in summary(state)
    planned = plan(transport, source, target, batches)
    assert [(leaf.target, leaf.action) for leaf in planned.leaves] == [
        (leaf.target, leaf.action) for leaf in leaf_report(state)
    ]
    assert [info.shape for info in planned.stages[0].maps] == [(5, 7)]
    assert make_transport("ariadne+gradfix", {"ariadne.ridge": 0.5}).name == "ariadne+gradfix"


def test_options_are_checked(case):
    source, target, batches, tau, *_ = case
    for options, message in (
        ({"ridge": -1.0}, "ridge must be 0 or more"),
        ({"leaves": "all"}, "leaves must be one of"),
        ({"bias": "yes"}, "bias must be one of"),
        ({"rows": "some"}, "rows must be one of"),
        ({"rank_tolerance": 2.0}, "rank_tolerance must lie in"),
        ({"rigde": 1.0}, "the nearest of .* is 'ridge'"),
    ):
        with pytest.raises(ValueError, match=message):
            ariadne(**options)
    with pytest.raises(ValueError, match="down/kernel has no bias in the target"):
        fit(ariadne(bias="always"), source, make(7, 11, 1, 1, bias=False), batches, tau=tau)
    with pytest.raises(ValueError, match="needs streams with a class token"):
        fit(ariadne(rows="class_token"), source, target, batches, tau=tau)

    def stacked(params, carry):
        return jax.lax.scan(lambda carry, layer: (block(layer, carry), None), carry, params)[0]

    model = Model(jax.tree.map(lambda *x: jnp.stack(x), *source.params["blocks"].values()), (Stage("model", stacked),))
    with pytest.raises(ValueError, match="in a scan.*unstack"):
        fit(ariadne(), model, model, [a for a, _ in batches], tau=noise(model, 2))


def test_a_head_that_a_scan_applies_piece_by_piece_is_no_stack(case):
    """As in the losses of language models, which never hold the scores of all tokens at once."""
    source, target, batches, tau, *_ = case

    def head(params, carry):
        return {"hidden": jax.lax.scan(lambda _, x: (None, x @ params), None, carry["hidden"])[1]}

    def with_head(model):
        width = model.params["blocks"]["0"]["up"].shape[0]
        params = {**model.params, "head": jnp.eye(width)[:, :3]}
        return Model(params, (*model.stages, Stage("head", head, (("", "head"),))), loss)

    tau = {**tau, "head": jnp.ones((source.params["blocks"]["0"]["up"].shape[0], 3))}
    state = fit(ariadne(), with_head(source), with_head(target), batches, tau=tau)
    found = {entry.target: entry.action for entry in leaf_report(state)}
    assert found["head"] == "zeroed by rule" and "fitted" in found.values()


def test_attention_and_mlp_together(tiny):
    """On a CLIP of another width the joint fit explains more of the displacement than the MLP's alone."""
    realised = {}
    for leaves in ("mlp", "attention_and_mlp"):
        transport = ariadne(leaves=leaves)
        state = fit(transport, tiny.a, tiny.w, tiny.batches, tau=tiny.tau)
        moved = tree.flatten(transport.apply(state, tiny.tau))
        written = {path for path, leaf in moved.items() if np.any(leaf)}
        fitted = ["mlp/down/kernel", "mlp/down/bias", *(["attention/out/kernel"] if leaves != "mlp" else [])]
        assert written == {f"vision/blocks/{i}/{leaf}" for i in range(2) for leaf in fitted}
        realised[leaves] = float(state.parts[0].measures["vision/blocks/1/mlp/down/kernel"]["realised"])
    assert realised["mlp"] < realised["attention_and_mlp"] <= 1


def test_the_class_token_counts_as_all_others():
    """Four tokens, the first of them special: as if each of its rows stood there three times."""
    stream = Stream(special=1, grid=(1, 3))
    source, target = make(5, 9, 1, 0, stream=stream), make(7, 11, 1, 1, stream=stream)
    batches, tau = batches_of(5, 7), noise(source, 2)

    def repeated(batch):
        rows = batch.inputs["hidden"]
        return Batch({"hidden": jnp.concatenate([rows, rows[:, :1], rows[:, :1]], 1)})

    plain = [
        m.replace(stages=tuple(Stage(s.name, block, s.paths, s.group) for s in m.stages)) for m in (source, target)
    ]
    weighed, uniform = ariadne(rows="class_token", ridge=0.1), ariadne(ridge=0.1)
    one = weighed.apply(fit(weighed, source, target, batches, tau=tau), tau)
    twice = [(repeated(a), repeated(b)) for a, b in batches]
    other = uniform.apply(fit(uniform, *plain, twice, tau=tau), tau)
    for path, leaf in tree.flatten(one).items():
        np.testing.assert_allclose(leaf, tree.flatten(other)[path], atol=1e-4, err_msg=path)


def test_a_block_that_normalises_after_its_sum():
    """The stream of a BERT is the sum before the last normalisation; attention's part is normalised before."""
    config = BertConfig(16, 8, 12, 2, 2, max_position_embeddings=6)
    model = bert(config, init_bert(config, jax.random.key(0)))
    random = np.random.default_rng(0)
    tokens = {"tokens": jnp.asarray(random.integers(0, 16, (6, 5))), "mask": jnp.asarray(random.random((6, 5)) < 0.8)}
    tau = jax.tree.map(jnp.zeros_like, model.params)
    tau["blocks"]["0"]["mlp"]["down"]["bias"] = jax.device_put(np.float32(random.normal(size=8)))
    transport = ariadne(**EXACT)
    moved = transport.apply(fit(transport, model, model, [Batch(tokens)], tau=tau), tau)
    edited, tuned = (apply(model.params, {"blocks": {"0": t["blocks"]["0"]}}) for t in (moved, tau))
    one, other = (model.replace(params=params)(tokens)["text"] for params in (edited, tuned))
    np.testing.assert_allclose(one, other, atol=1e-4)
    with pytest.raises(ValueError, match="attention/out/kernel writes is normalised.*leaves='mlp'"):
        fit(ariadne(leaves="attention_and_mlp"), model, model, [Batch(tokens)], tau=tau)
