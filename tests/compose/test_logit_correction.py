"""The closed form of distillation: against NumPy, exact where rank allows, still where nothing is missing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import Batch, Model, Stage, Stream, apply, logit_correction, tree
from tvjax.compose import class_scores
from tvjax.tasks.losses import OWN_HEAD

HEAD = jnp.asarray(np.random.default_rng(9).normal(size=(6, 4)), jnp.float32)


def block(params, carry):
    change = jnp.tanh(carry["hidden"] @ params["up"]) @ params["down"]["kernel"] + params["down"]["bias"]
    return {**carry, "hidden": carry["hidden"] + change * params["scale"]}


def pooled(carry):
    real = carry["mask"][..., None].astype(jnp.float32)
    return jnp.tanh(carry["hidden"] * real).sum(1) / real.sum(1)


def fixed_head(params, carry):
    """No parameter stands between the last block and the logits."""
    return {"logits": pooled(carry) @ HEAD}


def own_head(params, carry):
    return {"logits": pooled(carry) @ params["kernel"] + params["bias"]}


def make(depth, with_head, seed=0):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    def one():
        return {"up": normal(6, 9), "down": {"kernel": normal(9, 6), "bias": normal(6)}, "scale": 1 + normal(6)}

    params = {f"block{i}": one() for i in range(depth)}
    stages = [Stage(f"block{i}", block, (("", f"block{i}"),), "blocks", Stream(mask="mask")) for i in range(depth)]
    if with_head:
        params["head"] = {"kernel": normal(6, 4), "bias": normal(4)}
    last = (Stage("head", own_head, (("", "head"),)),) if with_head else (Stage("head", fixed_head, ()),)
    return Model(params, (*stages, *last), OWN_HEAD)


@pytest.fixture(scope="module")
def seen():
    random = np.random.default_rng(1)
    mask = np.arange(3) < random.integers(1, 4, (5, 1))
    inputs = {"hidden": jnp.asarray(random.normal(size=(5, 3, 6)), jnp.float32), "mask": jnp.asarray(mask)}
    return Batch(inputs), jnp.asarray(random.normal(size=(5, 4)), jnp.float32)


def centred(x):
    return np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(-1, keepdims=True)


def test_one_block_in_numpy(seen):
    """By the Jacobian of each example, and the ridge solution of the change on the block's own inputs."""
    batch, teacher = seen
    model = make(1, with_head=False)
    found = logit_correction(model, teacher, batch, passes=1)["block0"]["down"]
    p = model.params["block0"]
    hidden, mask = batch.inputs["hidden"], np.asarray(batch.inputs["mask"])
    stream = block(p, batch.inputs)["hidden"]
    wanted = []
    for h, m, target in zip(stream, batch.inputs["mask"], teacher, strict=True):
        logits = lambda h, m=m: fixed_head({}, {"hidden": h[None], "mask": m[None]})["logits"][0]  # noqa: E731
        j = np.asarray(jax.jacobian(logits)(h), np.float64).reshape(4, -1)
        j, missing = j - j.mean(0), centred(target) - centred(logits(h))
        damped = j @ j.T + 0.1 * np.trace(j @ j.T) / 3 * np.eye(4)
        wanted.append((j.T @ np.linalg.solve(damped, missing)).reshape(3, 6))
    x, d = np.tanh(np.asarray(hidden, np.float64) @ np.asarray(p["up"]))[mask], np.stack(wanted)[mask]
    scale, centre = np.asarray(p["scale"], np.float64), (x.mean(0), d.mean(0))
    x, d = x - centre[0], d - centre[1]
    gram = x.T @ x
    penalty = np.trace(gram) / 9 * np.eye(9)
    kernel = np.stack([np.linalg.solve(gram * s**2 + penalty, s * x.T @ d[:, i]) for i, s in enumerate(scale)], 1)
    np.testing.assert_allclose(found["kernel"], kernel, atol=1e-4)
    np.testing.assert_allclose(found["bias"], centre[1] / scale - centre[0] @ kernel, atol=1e-4)


def test_the_logits_become_the_teachers_where_rank_allows(seen):
    """Five examples, a head of six inputs; without damping and penalty its kernel alone can do it."""
    batch, teacher = seen
    model = make(2, with_head=True)
    tau = logit_correction(model, teacher, batch, passes=1, mu=0.0, ridge=0.0)
    assert set(tree.flatten(tau)) == {
        *(f"block{i}/down/{leaf}" for i in range(2) for leaf in ("kernel", "bias")),
        *("head/kernel", "head/bias"),
    }
    edited = model.replace(params=apply(model.params, tau))
    np.testing.assert_allclose(centred(edited(batch.inputs)["logits"]), centred(teacher), atol=1e-3)


def test_conjugate_gradients_and_batches_give_the_same(seen):
    batch, teacher = seen
    model = make(2, with_head=True)
    whole = tree.flatten(logit_correction(model, teacher, batch, passes=1, mu=0.0))
    parts = [jax.tree.map(lambda x, cut=cut: x[cut], batch) for cut in (slice(0, 3), slice(3, 5))]
    cut = tree.flatten(logit_correction(model, teacher, iter(parts), passes=1, mu=0.0))
    by_steps = tree.flatten(logit_correction(model, teacher, batch, passes=1, mu=0.0, all_classes=1))
    for path, leaf in whole.items():
        np.testing.assert_allclose(cut[path], leaf, atol=1e-4, err_msg=path)
        np.testing.assert_allclose(by_steps[path], leaf, atol=2e-3, err_msg=path)


def test_a_start_that_says_what_the_teacher_says_stays(seen):
    batch, _ = seen
    model = make(2, with_head=True)
    random = np.random.default_rng(3)
    start = {"block0": {"up": jnp.asarray(0.1 * random.normal(size=(6, 9)), jnp.float32)}}
    said = class_scores(model.replace(params=apply(model.params, start)), batch)
    tau = tree.flatten(logit_correction(model, said, batch, start=start))
    np.testing.assert_allclose(tau.pop("block0/up"), start["block0"]["up"], atol=1e-6)
    assert all(np.abs(leaf).max() < 1e-4 for leaf in tau.values())


def test_what_cannot_be_corrected(seen):
    batch, teacher = seen
    model = make(1, with_head=False)
    with pytest.raises(ValueError, match="expected .examples, classes. of 5 examples"):
        logit_correction(model, teacher[:3], batch)
    with pytest.raises(ValueError, match="one pass at least"):
        logit_correction(model, teacher, batch, passes=0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        logit_correction(model, teacher * jnp.nan, batch)
    with pytest.raises(ValueError, match="not in the parameters"):
        logit_correction(model, teacher, batch, start={"block7": {"up": jnp.ones((6, 9))}})
    with pytest.raises(ValueError, match="no kernel that writes a residual stream"):
        logit_correction(Model({}, (Stage("head", fixed_head, ()),), OWN_HEAD), teacher, batch)
