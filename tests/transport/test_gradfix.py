"""GradFix: votes against a loop of whole-model gradients, masks against the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, fit, gradfix, leaf_report, tree
from tvjax.transport.gradfix import Masking, mask


def samples(batches):
    for batch in batches:
        for i in range(len(batch.labels)):
            yield jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)


@pytest.fixture(scope="session")
def eight(tiny):
    return tiny.make_batches(1, 8, seed=3)


@pytest.fixture(scope="session")
def loop(tiny, eight):
    """One gradient a sample, by a plain Python loop over the written-out model."""
    return [tiny.naive_gradient(tiny.b, sample) for sample in samples(eight)]


def votes_of(state):
    return {path: np.asarray(votes, np.float64) for path, votes in state.parts[0].arrays.items()}


def test_majority_equals_a_loop_of_gradients(tiny, eight, loop):
    state = fit(gradfix(), tiny.a, tiny.b, eight)
    found = votes_of(state)
    assert found.keys() == loop[0].keys()
    largest = max(float(np.abs(g).max()) for sample in loop for g in sample.values())
    compared = []
    for path, votes in found.items():
        stacked = np.stack([np.asarray(sample[path], np.float64) for sample in loop])
        clear = (np.abs(stacked) > 1e-5 * largest).all(0)  # away from zero, where rounding decides
        compared.append((clear.sum(), clear.size))
        np.testing.assert_array_equal(votes[clear], -np.sign(stacked).sum(0)[clear], err_msg=path)
    assert np.divide(*np.sum(compared, 0)) > 0.6


def test_the_bias_of_a_key_projection_gets_no_votes(tiny, eight):
    found = votes_of(fit(gradfix(), tiny.a, tiny.b, eight))
    keys = [votes for path, votes in found.items() if path.endswith("key/bias")]
    assert len(keys) == 2 and not any(votes.any() for votes in keys)


def test_mean_votes_are_the_summed_gradient(tiny, eight, loop):
    found = votes_of(fit(gradfix(vote="mean"), tiny.a, tiny.b, eight))
    for path, votes in found.items():
        expected = -sum(np.asarray(sample[path], np.float64) for sample in loop)
        np.testing.assert_allclose(votes, expected, atol=1e-4, rtol=1e-3, err_msg=path)


@pytest.mark.parametrize("mode", ["agree", "force", "tanh", "ratio"])
def test_no_masked_task_vector_raises_the_first_order_loss(tiny, eight, loop, mode):
    transport = gradfix(vote="mean", mode=mode)
    delta = tree.flatten(transport.apply(fit(transport, tiny.a, tiny.b, eight), tiny.tau))
    raw = tree.flatten(tiny.tau)
    products = {p: float(sum((np.asarray(s[p]) * np.asarray(delta[p])).sum() for s in loop)) for p in delta}
    assert max(products.values()) <= 1e-4, max(products, key=products.get)
    assert sum(products.values()) < 0
    assert sum(float(sum((np.asarray(s[p]) * np.asarray(raw[p])).sum() for s in loop)) > 0 for p in raw) > 0


def test_kept_coordinates_are_those_of_the_task_vector(tiny, eight):
    state = fit(gradfix(), tiny.a, tiny.b, eight)
    delta, raw = (tree.flatten(t) for t in (gradfix().apply(state, tiny.tau), tiny.tau))
    for path, votes in votes_of(state).items():
        kept = (np.sign(raw[path]) == np.sign(votes)) & (votes != 0)
        np.testing.assert_array_equal(delta[path], np.where(kept, raw[path], 0))
    measures = {leaf.target: leaf.measures for leaf in leaf_report(state)}
    path = "vision/blocks/0/mlp/up/kernel"
    assert measures[path]["ties"] == pytest.approx(float((votes_of(state)[path] == 0).mean()))
    assert 0 < measures[path]["ties"] < 0.6 and measures[path]["voters"] == 8


# -- the formulas of the modes ---------------------------------------------------------------------------------------

TAU = np.array([[1.0, -2.0, 0.5], [-0.3, 0.0, 2.0], [4.0, -1.0, -1.0]])
VOTES = np.array([[3.0, 2.0, 0.0], [-1.0, 4.0, 4.0], [-2.0, -4.0, 1.0]])
SIGN, SHARE = np.sign(VOTES), VOTES / 4
AGREE = (np.sign(TAU) == SIGN) & (SIGN != 0)


def sigmoid_mask(v):
    cosine = (TAU * v).sum(0) / np.sqrt((TAU**2).sum(0) * (v**2).sum(0))
    return TAU / (1 + np.exp(-3 * cosine))


@pytest.mark.parametrize(
    ("mode", "soft", "expected"),
    [
        ("agree", "sign", AGREE * TAU),
        ("force", "sign", np.abs(TAU) * SIGN),
        ("sigmoid", "sign", sigmoid_mask(SIGN)),
        ("sigmoid", "share", sigmoid_mask(SHARE)),
        ("tanh", "sign", np.maximum(0, np.tanh(2 * TAU * SIGN)) * TAU),
        ("tanh", "share", np.maximum(0, np.tanh(2 * TAU * SHARE)) * TAU),
        ("ratio", "sign", AGREE * np.abs(SIGN) / (np.abs(SIGN) + 0.5) * TAU),
        ("ratio", "share", AGREE * np.abs(SHARE) / (np.abs(SHARE) + 0.5) * TAU),
    ],
)
def test_modes(mode, soft, expected):
    masking = Masking(mode=mode, soft_vote=soft, beta=3.0, gamma=2.0, c=0.5)
    found = mask(masking, jnp.asarray(TAU, jnp.float32), jnp.asarray(VOTES, jnp.float32), 4.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_votes_mask_everything_out():
    zero = jnp.zeros((3, 3), jnp.float32)
    for mode in ("agree", "force", "tanh", "ratio"):
        assert not mask(Masking(mode=mode), jnp.asarray(TAU, jnp.float32), zero).any()


# -- leaves that two stages share, and leaves out of reach -----------------------------------------------------------


def encode(params, carry):
    return {"hidden": jnp.tanh(carry["x"] @ params["table"] + params["shift"])}


def decode(params, carry):
    return {"scores": carry["hidden"] @ params["table"].T, "aside": params["aside"] * carry["hidden"]}


def unused(params, carry):
    return {**carry, "scores": carry["scores"] * 1.0}


def squared(loss_params, outputs, labels):
    return ((outputs["scores"] - labels) ** 2).sum(-1)


def tied_model(seed):
    random = np.random.default_rng(seed)
    params = {
        name: jax.device_put(np.float32(random.normal(size=shape)))
        for name, shape in (("table", (4, 3)), ("shift", (3,)), ("aside", (3,)), ("lonely", (2,)))
    }
    params["steps"] = jnp.arange(3)  # an integer leaf is no parameter
    stages = (
        Stage("encode", encode, (("table", "table"), ("shift", "shift"), ("steps", "steps"))),
        Stage("decode", decode, (("table", "table"), ("aside", "aside"))),
        Stage("unused", unused, (("lonely", "lonely"),)),
    )
    return Model(params, stages, squared)


@pytest.fixture(scope="module")
def tied_batches():
    random = np.random.default_rng(1)
    draw = lambda: jnp.asarray(random.normal(size=(3, 4)), jnp.float32)  # noqa: E731
    return [Batch({"x": draw()}, draw()) for _ in range(2)]


@pytest.mark.parametrize("vote", ["majority", "mean"])
def test_gradients_of_tied_leaves_are_summed_before_the_sign(tied_batches, vote):
    model = tied_model(0)
    state = fit(gradfix(vote=vote), model, model, tied_batches)

    def loss(params, sample):
        hidden = jnp.tanh(sample.inputs["x"] @ params["table"] + params["shift"])
        return ((hidden @ params["table"].T - sample.labels) ** 2).sum()

    moving = {name: model.params[name] for name in ("table", "shift")}
    gradients = [jax.grad(loss)(moving, sample) for sample in samples(tied_batches)]
    for name in moving:
        parts = [-np.asarray(g[name]) for g in gradients]
        expected = sum(map(np.sign, parts)) if vote == "majority" else sum(parts)
        np.testing.assert_allclose(votes_of(state)[name], expected, atol=1e-5, err_msg=name)


def test_leaves_that_the_loss_does_not_reach_pass_through(tied_batches):
    model = tied_model(0)
    state = fit(gradfix(), model, model, tied_batches)
    tau = {"aside": jnp.array([1.0, -2.0, 3.0]), "lonely": jnp.array([4.0, -5.0])}
    moved = gradfix().apply(state, tau)
    actions = {leaf.target: (leaf.action, leaf.why) for leaf in leaf_report(state)}
    for name in tau:  # `lonely` is read by no equation; `aside` goes into an output that the loss ignores
        np.testing.assert_array_equal(moved[name], tau[name])
        assert actions[name] == ("passed through", "the loss does not reach it")


@pytest.mark.parametrize("vote", ["majority", "mean"])
def test_batches_and_chunks_change_no_vote(vote):
    model, random = tied_model(0), np.random.default_rng(2)
    whole = Batch({"x": jnp.asarray(random.normal(size=(8, 4)), jnp.float32)}, jnp.ones((8, 4)))
    reference = votes_of(fit(gradfix(vote=vote), model, model, [whole]))
    assert any((votes == 0).any() for votes in reference.values()) == (vote == "majority")  # eight voters can tie
    for parts, chunk in ((2, 1), (4, 1), (1, 4), (1, 3)):
        batches = [jax.tree.map(lambda leaf, i=i, n=8 // parts: leaf[i * n : (i + 1) * n], whole) for i in range(parts)]
        found = votes_of(fit(gradfix(vote=vote, chunk=chunk), model, model, batches))
        for path, votes in found.items():
            np.testing.assert_allclose(votes, reference[path], atol=1e-4, err_msg=path)


@pytest.mark.parametrize("shape", [(3, 11), (5, 13)])
def test_leaves_of_one_shape_are_masked_by_one_program(shape, caplog):
    taus = [jnp.asarray(np.full(shape, size, np.float32)) for size in (1, -1)]
    votes, voters = jnp.asarray(np.ones(shape, np.int8)), jnp.float32(5)
    with jax.log_compiles():
        for tau in taus:
            mask(Masking(), tau, votes, voters)
    compiled = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    assert len(compiled) == 1, compiled
