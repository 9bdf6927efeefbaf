"""NuSLERP, multi-SLERP, LiNeS, SVC and ACE, each against a few lines of numpy in float64."""

from functools import partial

import jax
import numpy as np
import pytest

from tvjax import apply, merge, tree

SHAPES = {"blocks": [{"up": (12, 30)}, {"up": (12, 30)}, {"up": (12, 30)}], "head": (30, 12), "norm": (30,)}


def draw(seed, size=1e-2, common=0.0):
    def leaf(shape):
        return (size * (random.normal(size=shape) + common * shared.normal(size=shape))).astype(np.float32)

    random, shared = np.random.default_rng(seed), np.random.default_rng(99)
    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: type(x) is tuple)


TAUS = [draw(seed, common=1.0) for seed in range(3)]


def f64(taus):
    return [{path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(tau).items()} for tau in taus]


def assert_is(found, rule, taus=TAUS, tolerance=2e-5):
    """A leaf is what the rule makes of the vectors' leaves ``[T, ...]``."""
    flats = f64(taus)
    for path, leaf in tree.flatten(found).items():
        expected = rule(np.stack([flat[path] for flat in flats]))
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=path)


# -- on the sphere -----------------------------------------------------------------------------------------------------


def np_nuslerp(a, b, t, axis=None, straight=1e-8):
    """As mergekit has it, along an axis or of all."""
    sizes = [np.sqrt((x**2).sum(axis, keepdims=True)) for x in (a, b)]
    cosine = ((a / sizes[0]) * (b / sizes[1])).sum(axis, keepdims=True)
    theta = np.arccos(np.clip(cosine, -1, 1))
    turned = (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)
    return np.where(np.sin(theta) < straight, (1 - t) * a + t * b, turned)


@pytest.mark.parametrize(("along", "axis"), [("leaf", None), ("inputs", 0), ("outputs", -1)])
def test_nuslerp(along, axis):
    rule = partial(np_nuslerp, t=0.75, axis=axis)
    found = merge.nuslerp(TAUS[:2], weights=[0.5, 1.5], along=along)
    assert_is(found, lambda x: rule(*x), TAUS[:2])
    base = draw(7, 0.05)
    models = [apply(base, tau) for tau in TAUS[:2]]
    moved = apply(base, merge.nuslerp(TAUS[:2], weights=[0.5, 1.5], along=along, base=base))
    assert_is(moved, lambda x: rule(*x), models)


def test_nuslerp_is_slerp_where_the_norms_are_equal_and_a_line_where_there_is_no_arc():
    one = TAUS[0]
    other = jax.tree.map(lambda x, y: np.float32(np.linalg.norm(x) / np.linalg.norm(y)) * y, *TAUS[:2])
    found, expected = merge.nuslerp([one, other], weights=[0.75, 0.25]), merge.slerp([one, other], t=0.25)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7), found, expected)
    for second in (jax.tree.map(lambda x: -2 * x, one), jax.tree.map(lambda x: 0 * x, one)):
        for along in ("leaf", "inputs"):
            assert_is(merge.nuslerp([one, second], along=along), lambda x: x.mean(0), [one, second])
    assert_is(merge.nuslerp(TAUS[:2], straight=1.0), lambda x: x.mean(0), TAUS[:2])


def np_multi_slerp(x, weights):
    """All of mergekit's steps, the ones that do nothing too."""
    flat, weights = x.reshape(len(x), -1), np.asarray(weights) / np.sum(weights)
    norms = np.linalg.norm(flat, axis=1)
    units = flat / norms[:, None]
    mean = weights @ units
    mean = mean / np.linalg.norm(mean)
    tangents = weights @ (units - (units @ mean)[:, None] * mean)
    step = np.linalg.norm(tangents) + 1e-8
    return ((mean * np.cos(step) + tangents * np.sin(step) / step) * (weights @ norms)).reshape(x.shape[1:])


def test_multi_slerp():
    rule = partial(np_multi_slerp, weights=[0.5, 2.0, 1.0])
    assert_is(merge.multi_slerp(TAUS, weights=[0.5, 2.0, 1.0]), rule)
    base = draw(7, 0.05)
    models = [apply(base, tau) for tau in TAUS]
    assert_is(apply(base, merge.multi_slerp(TAUS, weights=[0.5, 2.0, 1.0], base=base)), rule, models)
    wide = merge.multi_slerp(TAUS, weights=[0.5, 2.0, 1.0], normalize=False)
    assert_is(wide, lambda x: 3.5 * rule(x))
    flat = merge.multi_slerp(TAUS, scope="vector")["head"]
    whole = np.stack([np.concatenate([leaf.ravel() for leaf in each.values()]) for each in f64(TAUS)])
    expected = np_multi_slerp(whole, np.ones(3))
    np.testing.assert_allclose(np.ravel(flat), expected[-390:-30], rtol=0, atol=1e-6)


def test_directions_that_cancel_are_averaged():
    opposite = [TAUS[0], jax.tree.map(lambda x: -3 * x, TAUS[0])]
    assert_is(merge.multi_slerp(opposite), lambda x: x.mean(0), opposite)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge.nuslerp(TAUS), "multi_slerp takes several"),
        (lambda: merge.nuslerp(TAUS[:2], along="rows"), "along must be one of"),
        (lambda: merge.nuslerp(TAUS[:2], straight=2.0), "sine of an angle"),
        (lambda: merge.nuslerp(TAUS[:2], base={"head": TAUS[0]["head"]}, along="inputs"), "no such leaf"),
        (lambda: merge.lines(TAUS, alpha=float("nan")), "alpha must be a finite number"),
        (lambda: merge.lines([{"w": np.ones(2)}]), "ByDepth finds no layers"),
        (lambda: merge.svc(TAUS, floor=0.0), r"floor must lie in \(0, 1\]"),
        (lambda: merge.ace(TAUS, epsilon=-1.0), "epsilon must be 0 or more"),
        (lambda: merge.ace(TAUS, share=1.5), r"share in \[0, 1\]"),
    ],
)
def test_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- LiNeS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [merge.task_arithmetic, partial(merge.ties, density=0.3)])
def test_lines(inner):
    merged, rows = f64([inner(TAUS)])[0], []
    found = tree.flatten(merge.lines(TAUS, inner, beta=0.7, report=rows.append))
    flats = f64(TAUS)
    of_sum = sum(np.abs(sum(flat[path] for flat in flats)).sum() for path in merged)
    alpha = of_sum / sum(np.abs(leaf).sum() for leaf in merged.values()) / 3
    scales = {path: alpha + 0.7 * (int(path[7]) / 2 if path.startswith("blocks") else 0) for path in merged}
    for path, leaf in merged.items():
        np.testing.assert_allclose(found[path], scales[path] * leaf, rtol=1e-4, atol=1e-7)
    assert {row.path: round(row.measures["scale"], 4) for row in rows} == {
        path: round(scale, 4) for path, scale in scales.items()
    }


def test_lines_of_one_vector_and_as_weights_by_depth():
    found = tree.flatten(merge.lines(TAUS[:1], alpha=0.4))
    expected = {"blocks/0/up": 0.4, "blocks/1/up": 0.7, "blocks/2/up": 1.0, "head": 0.4, "norm": 0.4}
    for path, leaf in tree.flatten(TAUS[0]).items():
        np.testing.assert_allclose(found[path], expected[path] * leaf, rtol=1e-5)
    weights = merge.ByDepth((0.4, 1.0), other=0.4)
    same = merge.task_arithmetic(TAUS, weights=weights)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), merge.lines(TAUS, alpha=0.4), same)


# -- SVC ---------------------------------------------------------------------------------------------------------------


def np_svc(x, merged, floor):
    """In the paper's orientation, ``[out, in]``."""
    x, (u, s, v) = x.mT, np.linalg.svd(merged.T, full_matrices=False)
    answers = np.einsum("or,tok->trk", u, x)
    times = np.einsum("rk,trk->tr", u.T @ merged.T, answers) / (answers**2).sum(-1)
    return ((u * s * len(x) / np.maximum(times, floor).sum(0)) @ v).T


@pytest.mark.parametrize("floor", [None, 1.0])
def test_svc(floor):
    inner = partial(merge.ties, density=0.5)
    merged = tree.flatten(inner(TAUS))
    found = tree.flatten(merge.svc(TAUS, inner, floor=floor))
    flats = f64(TAUS)
    for path, leaf in merged.items():
        expected = np.asarray(leaf, np.float64)
        if path != "norm":
            expected = np_svc(np.stack([flat[path] for flat in flats]), expected, floor or 1 / 3)
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=2e-5 * np.abs(expected).max(), err_msg=path)


def test_svc_counts_what_tasks_share_once():
    left, right = (np.linalg.qr(np.random.default_rng(s).normal(size=(12, 12)))[0][:, :4] for s in (0, 1))
    shared = 5.0 * np.outer(left[:, 0], right[:, 0])
    taus = [{"k": np.float32(shared + (3 - i) * np.outer(left[:, 1 + i], right[:, 1 + i]))} for i in range(3)]
    found = merge.svc(taus, floor=1.0)["k"]
    np.testing.assert_allclose(np.linalg.svd(found)[1][:5], [5, 3, 2, 1, 0], atol=1e-4)
    # 15 of the shared direction in the sum, and the others as they are: no answer counts as none, not as rounding.
    np.testing.assert_allclose(np.linalg.svd(merge.task_arithmetic(taus)["k"])[1][:4], [15, 3, 2, 1], atol=1e-4)
    doubled = merge.svc(taus, partial(merge.task_arithmetic, weights=2.0), floor=1e-6)["k"]
    single = merge.svc(taus, floor=5e-7)["k"]
    np.testing.assert_allclose(doubled, single, rtol=1e-3, atol=1e-3)


# -- ACE ---------------------------------------------------------------------------------------------------------------


def np_ace(x, epsilon, share, balance):
    """The released code's steps, in its orientation, ``[out, in]``."""
    x = x.mT
    energies = (x**2).sum((1, 2))
    unlike = np.log(energies).var(ddof=1) / np.log(energies).mean() ** 2 > 0.3 if balance is None else balance
    x = x - x.mean(1, keepdims=True)
    sizes = (x**2).sum((1, 2))[:, None, None] if unlike else 1
    sigma = x.mT @ x / sizes
    ridged = sigma + epsilon / sizes * np.eye(x.shape[2])
    prior = sigma.sum(0).mean(0, keepdims=True) / (energies.mean() if unlike else 1)
    found = (x @ ridged).sum(0) @ np.linalg.inv(ridged.sum(0) + prior)
    if unlike:
        u, s, v = np.linalg.svd((x @ (sigma - ridged.mean(0))).sum(0) + found, full_matrices=False)
        k = int(len(s) * share)
        found = found + s[:k].mean() * u[:, :k] @ v[:k]
    return found.T


@pytest.mark.parametrize("balance", [True, None])
def test_ace(balance):
    taus = [
        jax.tree.map(lambda x, f=factor: np.float32(f) * x, tau) for tau, factor in zip(TAUS, (1, 4, 12), strict=True)
    ]
    options = {"epsilon": 1e-3, "share": 0.5, "balance": balance}
    found = tree.flatten(jax.jit(partial(merge.ace, **options))(taus))
    for path, leaf in found.items():
        x = np.stack([flat[path] for flat in f64(taus)])
        expected = x.mean(0) if path == "norm" else np_ace(x, **options)
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=2e-4 * np.abs(expected).max(), err_msg=path)


def test_ace_of_like_tasks_is_not_balanced_and_a_large_ridge_averages():
    heads = [{"head": tau["head"]} for tau in TAUS]
    np.testing.assert_array_equal(merge.ace(heads)["head"], merge.ace(heads, balance=False)["head"])
    mean = np.mean([tau["head"] - tau["head"].mean(1, keepdims=True) for tau in TAUS], axis=0)
    np.testing.assert_allclose(merge.ace(heads, epsilon=1e6, balance=False)["head"], mean, atol=1e-6)
