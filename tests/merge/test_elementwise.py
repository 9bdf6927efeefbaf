"""Each elementwise merge against a few lines of NumPy in float64, and what the papers promise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import apply, interpolate, merge, task_vector, tree
from tvjax.merge.random_bits import words

SHAPES = {"up": {"kernel": (30, 50), "bias": (50,)}, "conv": (3, 3, 4, 8), "scale": ()}
WEIGHTS = [0.5, 2.0, 1.0]
KEY = jax.random.key(11)


def draw(seed, size=1e-2):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (size * random.standard_t(4, shape)).astype(np.float32),
        SHAPES,
        is_leaf=lambda x: type(x) is tuple,
    )


TAUS = [draw(seed) for seed in range(3)]


def flat(taus=TAUS):
    return [{path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(tau).items()} for tau in taus]


def leaves(taus=TAUS):
    """``(path, [vectors, ...])`` in float64."""
    found = flat(taus)
    return [(path, np.stack([each[path] for each in found])) for path in found[0]]


def whole(taus=TAUS):
    return np.stack([np.concatenate([leaf.reshape(-1) for leaf in each.values()]) for each in flat(taus)])


def assert_is(found, expected, tolerance=2e-6):
    found = tree.flatten(found)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=tolerance, atol=tolerance * 1e-2, err_msg=path)


def column(numbers, x):
    return np.reshape(numbers, (-1, *[1] * (x.ndim - 1)))


def disjoint_mean(x, weights, divided=True):
    w = column(weights, x)
    agrees = np.sign(x) == np.sign((w * x).sum(0))
    agrees &= x != 0
    return (w * x * agrees).sum(0) / (np.maximum((w * agrees).sum(0), 1e-300) if divided else 1)


def kth(x, rank):
    return np.sort(np.abs(x).reshape(-1))[-rank]


def test_average_and_task_arithmetic():
    sums = {path: (column(WEIGHTS, x) * x).sum(0) for path, x in leaves()}
    assert_is(merge.task_arithmetic(TAUS, weights=WEIGHTS), sums)
    assert_is(merge.average(TAUS, weights=WEIGHTS), {path: leaf / sum(WEIGHTS) for path, leaf in sums.items()})
    assert_is(merge.task_arithmetic(TAUS[:1], weights=-1.0), {path: -x[0] for path, x in leaves()})


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS, [0.0, 1.0, 3.0]])
def test_ties(weights):
    densities = [0.2, 0.5, 1.0]
    vectors = whole()
    levels = [kth(x, round(d * x.size)) for x, d in zip(vectors, densities, strict=True)]
    expected = {}
    for path, x in leaves():
        expected[path] = disjoint_mean(np.where(np.abs(x) >= column(levels, x), x, 0), weights)
    rows = []
    assert_is(merge.ties(TAUS, weights=weights, density=densities, report=rows.append), expected)
    np.testing.assert_array_equal(np.float32(rows[0].measures["threshold"]), np.float32(levels))


def test_ties_by_leaf_with_a_density_by_path():
    expected = {}
    for path, x in leaves():
        rank = max(1, round((0.6 if "bias" in path else 0.3) * x[0].size))
        expected[path] = disjoint_mean(np.stack([np.where(np.abs(y) >= kth(y, rank), y, 0) for y in x]), [1, 1, 1])
    assert_is(merge.ties(TAUS, scope="leaf", density={"**": 0.3, "**/bias": 0.6}), expected)


def test_ties_over_the_whole_vector_has_one_density():
    with pytest.raises(ValueError, match=r"density must be the same for all leaves.*up/bias"):
        merge.ties(TAUS, density={"**": 0.3, "**/bias": 0.6})
    with pytest.raises(ValueError, match="scope must be one of"):
        merge.ties(TAUS, scope="tree")


def test_entries_equal_to_the_threshold_stay():
    tau = {"w": np.array([1.0, -2.0, 2.0, 2.0, 0.5], np.float32)}
    assert merge.ties([tau], density=0.4)["w"].tolist() == [0, -2, 2, 2, 0]


def test_zeros_are_no_votes_and_a_draw_is_zero():
    taus = [{"w": np.array(x, np.float32)} for x in ([1, 0, 2, 3], [0, 0, -2, 1], [0, -4, 0, -1])]
    assert merge.ties(taus, density=1.0)["w"].tolist() == [1, -4, 0, 2]


def test_a_weight_is_that_many_votes_and_members():
    several = merge.ties([TAUS[0], TAUS[1], TAUS[1], TAUS[1]])
    assert_is(merge.ties(TAUS[:2], weights=[1.0, 3.0]), flat([several])[0])
    assert_is(merge.ties(TAUS[:2], weights=[10.0, 30.0]), flat([several])[0])
    assert_is(merge.ties(TAUS, weights=[1.0, 3.0, 0.0]), flat([several])[0])


ELECTIONS = {
    "weighted": lambda x, w: (w * x).sum(0),
    "sum": lambda x, w: x.sum(0),
    "count": lambda x, w: np.sign(x).sum(0),
}


@pytest.mark.parametrize("scope", ["vector", "leaf"])
@pytest.mark.parametrize("over", ["weights", "count", "vectors", "none"])
@pytest.mark.parametrize("elect", ELECTIONS)
def test_ties_by_other_elections_and_divisors(elect, over, scope):
    expected = {}
    for path, x in leaves():
        w = column(WEIGHTS, x)
        agrees = (np.sign(x) == np.sign(ELECTIONS[elect](x, w))) & (x != 0)
        total = (w * x * agrees).sum(0)
        shares = {"weights": (w * agrees).sum(0), "count": agrees.sum(0), "vectors": len(x), "none": 1}
        expected[path] = total / np.maximum(shares[over], 1e-30)
    assert_is(merge.ties(TAUS, weights=WEIGHTS, density=1.0, elect=elect, over=over, scope=scope), expected)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize(("elect", "method"), [("sum", "total"), ("count", "frequency")])
def test_ties_of_peft(elect, method):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("peft.utils.merge_utils")
    rows = np.random.default_rng(0).normal(size=(3, 30, 41)).astype(np.float32)  # three signs: no draws
    weights = torch.tensor(WEIGHTS)
    theirs = utils.ties([torch.from_numpy(x) for x in rows], weights, 1.0, majority_sign_method=method)
    ours = merge.ties([{"w": x} for x in rows], weights=WEIGHTS, density=1.0, elect=elect, over="count")["w"]
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    cut = utils.ties([torch.from_numpy(x) for x in rows], weights, 0.4, majority_sign_method="total")
    ours = merge.ties([{"w": x} for x in rows], weights=WEIGHTS, density=0.4, scope="leaf", elect="sum", over="count")
    np.testing.assert_allclose(ours["w"], cut.numpy(), atol=1e-6)


def test_average_over_the_number_of_vectors():
    weights = [2.0, -3.0, 0.5]  # of no positive sum
    expected = {path: (column(weights, x) * x).sum(0) / 3 for path, x in leaves()}
    assert_is(merge.average(TAUS, weights=weights, over="vectors"), expected)


@pytest.mark.parametrize("call", [merge.average, merge.ties])
def test_unknown_elections_and_divisors(call):
    with pytest.raises(ValueError, match="over must be one of .*found 'n'"):
        call(TAUS, over="n")
    if call is merge.ties:
        with pytest.raises(ValueError, match="elect must be one of .*found 'mass'"):
            call(TAUS, elect="mass")


def bits(path, shape, number, vectors=3):
    """The counter-based bits again, in NumPy."""

    def mix(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    keyed = np.asarray(words(KEY, [path], vectors)[path])
    index = np.arange(np.prod(shape, dtype=int), dtype=np.uint32)
    return mix(mix(index + keyed[0]) ^ keyed[1 + number]).reshape(shape)


@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_dare(combine):
    rates, expected = [0.5, 0.9, 0.0], {}
    for path, x in leaves():
        keeps = np.stack([bits(path, y.shape, i) / 2.0**32 >= rates[i] for i, y in enumerate(x)])
        kept = keeps * x / (1 - column(rates, x))
        mean = disjoint_mean(kept, WEIGHTS)
        expected[path] = (column(WEIGHTS, x) * kept).sum(0) if combine == "linear" else mean
    assert_is(
        merge.dare(TAUS, key=KEY, density=[1 - rate for rate in rates], weights=WEIGHTS, combine=combine), expected
    )


@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_dropping_without_rescaling(combine):
    """What stays is what was there."""
    options = {"key": KEY, "weights": WEIGHTS, "combine": combine}
    rows, expected = [], {}
    for path, x in leaves():
        kept = x * np.stack([bits(path, y.shape, i) / 2.0**32 >= 0.6 for i, y in enumerate(x)])
        expected[path] = (column(WEIGHTS, x) * kept).sum(0) if combine == "linear" else disjoint_mean(kept, WEIGHTS)
    assert_is(merge.dare(TAUS, density=0.4, rescale=False, report=rows.append, **options), expected)
    assert rows[0].measures == {"density": pytest.approx([0.4] * 3), "factor": [1.0] * 3}
    found = merge.della(TAUS[:1], key=KEY, rescale=False, combine="linear")
    for path, (leaf,) in leaves(TAUS[:1]):
        moved = tree.flatten(found)[path]
        assert np.all((moved == 0) | (moved == np.float32(leaf)))


def test_the_mean_of_dare_over_keys_is_the_sum():
    merged = jax.lax.map(lambda key: merge.dare(TAUS, key=key, density=0.5), jax.random.split(KEY, 1000))
    for path, leaf in tree.flatten(merge.task_arithmetic(TAUS)).items():
        runs = tree.flatten(merged)[path]
        error = np.abs(np.mean(runs, axis=0) - leaf) / (np.std(runs, axis=0) / 1000**0.5)
        assert np.max(error) < 5, path


@pytest.mark.parametrize("combine", ["linear", "ties"])
@pytest.mark.parametrize("ranked", ["unit", "leaf"])
def test_della(combine, ranked):
    rate, epsilon, expected = 0.6, 0.3, {}
    for path, x in leaves():
        kept = []
        for i, y in enumerate(x):
            columns = y.reshape(-1, y.shape[-1]) if ranked == "unit" and y.ndim > 1 else y.reshape(-1, 1)
            ranks = np.argsort(np.argsort(np.abs(columns), axis=0, kind="stable"), axis=0)
            share = ranks / max(len(columns) - 1, 1) if len(columns) > 1 else np.full(columns.shape, 0.5)
            drop = (rate + epsilon * (0.5 - share)).reshape(y.shape)
            kept.append(np.where((bits(path, y.shape, i) >> 8) / 2.0**24 >= drop, y / (1 - drop), 0))
        total = (column(WEIGHTS, x) * np.stack(kept)).sum(0)
        expected[path] = total if combine == "linear" else disjoint_mean(np.stack(kept), WEIGHTS)
    options = {"density": 1 - rate, "epsilon": epsilon, "weights": WEIGHTS, "combine": combine, "ranked": ranked}
    assert_is(merge.della(TAUS, key=KEY, **options), expected)


def test_della_without_a_spread_is_dare():
    for combine in ("linear", "ties"):
        della = merge.della(TAUS, key=KEY, density=0.25, epsilon=0.0, combine=combine)
        assert_is(della, flat([merge.dare(TAUS, key=KEY, density=0.25, combine=combine)])[0])


@pytest.mark.parametrize("combine", ["linear", "ties", "ties_sum"])
def test_breadcrumbs(combine):
    expected = {}
    for path, x in leaves():
        kept = []
        for y in x:
            order = np.argsort(np.abs(y).reshape(-1))
            stays = order[int(0.7 * y.size) : y.size - int(0.04 * y.size)]
            kept.append(np.where(np.isin(np.arange(y.size), stays).reshape(y.shape), y, 0))
        total = (column(WEIGHTS, x) * np.stack(kept)).sum(0)
        expected[path] = total if combine == "linear" else disjoint_mean(np.stack(kept), WEIGHTS, combine == "ties")
    found = merge.breadcrumbs(TAUS, density=0.26, gamma=0.04, weights=WEIGHTS, combine=combine)
    assert_is(found, expected)
    assert float(found["scale"]) != 0  # a leaf of one entry keeps it


def test_sce():
    expected = {}
    for path, x in leaves():
        variance = x.var(0)
        chosen = x * (variance >= kth(variance, max(1, round(0.3 * variance.size))))
        squares = (chosen.reshape(3, -1) ** 2).sum(1)
        eta = column(squares / squares.sum(), x)
        agrees = (np.sign(chosen) == np.sign(chosen.sum(0))) & (chosen != 0)
        expected[path] = (eta * chosen * agrees).sum(0) / np.maximum((eta * agrees).sum(0), 1e-300)
    assert_is(merge.sce(TAUS, density=0.3), expected, 1e-5)


@pytest.mark.parametrize("scope", ["leaf", "vector"])
def test_slerp(scope):
    expected = {}
    for path, x in leaves(TAUS[:2]):
        if scope == "leaf" and x.ndim == 1:  # scalars have no angle between them
            expected[path] = 0.7 * x[0] + 0.3 * x[1]
            continue
        a, b = whole(TAUS[:2]) if scope == "vector" else x.reshape(2, -1)
        sizes = np.linalg.norm(a), np.linalg.norm(b)
        angle = np.arccos(a @ b / sizes[0] / sizes[1])
        size = 0.7 * sizes[0] + 0.3 * sizes[1]
        one, other = np.sin(0.7 * angle) * size / sizes[0], np.sin(0.3 * angle) * size / sizes[1]
        expected[path] = (one * x[0] + other * x[1]) / np.sin(angle)
    assert_is(merge.slerp(TAUS[:2], t=0.3, scope=scope), expected, 1e-5)


def test_slerp_ends_and_arcs_without_an_angle():
    one, other = TAUS[:2]
    for t, expected in ((0.0, one), (1.0, other)):
        assert_is(merge.slerp([one, other], t=t), flat([expected])[0], 1e-5)
    zero, double, back = (jax.tree.map(lambda x, f=f: f * x, one) for f in (0.0, 2.0, -1.0))
    for second, factor in ((zero, 0.75), (double, 1.25), (back, 0.5), (one, 1.0)):
        assert_is(merge.slerp([one, second], t=0.25), flat([jax.tree.map(lambda x, f=factor: f * x, one)])[0], 1e-5)
    with pytest.raises(ValueError, match="karcher_mean"):
        merge.slerp(TAUS)


def karcher(x, weights):
    """By the definition: the least mean squared angle, found by descent on the sphere."""
    sizes = np.linalg.norm(x, axis=1)
    units, weights = x / sizes[:, None], np.array(weights) / np.sum(weights)
    mean = units[0]
    for _ in range(2000):
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        pull = (weights * angles / np.maximum(np.sin(angles), 1e-12))[:, None] * (units - cosines[:, None] * mean)
        mean = mean + 0.5 * pull.sum(0)
        mean /= np.linalg.norm(mean)
    return mean * (weights @ sizes)


@pytest.mark.parametrize("scope", ["leaf", "vector"])
def test_karcher_mean(scope):
    rows = []
    merged = merge.karcher_mean(TAUS, weights=WEIGHTS, scope=scope, report=rows.append)
    if scope == "vector":
        np.testing.assert_allclose(whole([merged])[0], karcher(whole(), WEIGHTS), rtol=1e-4, atol=1e-7)
    else:
        for path, x in leaves():
            if x.ndim > 1:
                expected = karcher(x.reshape(3, -1), WEIGHTS).reshape(x.shape[1:])
                np.testing.assert_allclose(tree.flatten(merged)[path], expected, rtol=1e-4, atol=1e-7)
    assert all(row.measures["iterations"] < 60 for row in rows if row.shape)


def test_karcher_mean_of_two_is_slerp():
    for scope in ("leaf", "vector"):
        expected = flat([merge.slerp(TAUS[:2], t=0.25, scope=scope)])[0]
        found = merge.karcher_mean(TAUS[:2], weights=[0.75, 0.25], scope=scope)
        expected.pop("scale"), found.pop("scale")  # opposite scalars have no mean direction
        assert_is(found, expected, 1e-4)


@pytest.mark.parametrize("scope", ["leaf", "vector"])
def test_sphere_on_weights_instead_of_task_vectors(scope):
    base = draw(99, 0.5)
    models = [apply(base, tau) for tau in TAUS]
    for rule, count in ((merge.slerp, 2), (merge.karcher_mean, 3)):
        moved = rule(TAUS[:count], scope=scope, base=base)
        expected = task_vector(base, rule(models[:count], scope=scope))
        for path, leaf in tree.flatten(expected).items():
            np.testing.assert_allclose(tree.flatten(moved)[path], leaf, atol=2e-6, err_msg=f"{rule.__name__} {path}")
        # Models this close lie almost on a line: unlike their task vectors, they are averaged.
        mean = merge.average(TAUS[:count])
        assert tree.cosine(moved["up"]["kernel"], mean["up"]["kernel"]) > 0.99


def test_a_base_that_does_not_fit():
    with pytest.raises(ValueError, match=r"(?s)conv: \(3, 3, 4, 8\), the base has no such leaf.*that subtree"):
        merge.slerp(TAUS[:2], base={"up": TAUS[0]["up"], "scale": 1.0})
    with pytest.raises(ValueError, match=r"scale: \(\), the base has \(2,\)"):
        merge.karcher_mean(TAUS, base={**TAUS[0], "scale": np.ones(2)})


@pytest.mark.parametrize("scope", ["leaf", "vector"])
def test_model_stock(scope):
    common = draw(50, 2e-2)
    taus = [jax.tree.map(np.add, tau, common) for tau in TAUS]
    expected = {}
    for path, x in leaves(taus):
        y = whole(taus) if scope == "vector" else x.reshape(3, -1)
        units = y / np.linalg.norm(y, axis=1, keepdims=True)
        cosine = max(0, ((units @ units.T).sum() - 3) / 6)
        expected[path] = 3 * cosine / (1 + 2 * cosine) * x.mean(0)
    assert_is(merge.model_stock(taus, scope=scope), expected, 1e-5)


def test_model_stock_of_opposites_and_of_orthogonals_is_nothing():
    one, other = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
    for second in (other, {"w": -one["w"]}):
        assert merge.model_stock([one, second])["w"].tolist() == [0, 0]


def test_not_a_number_is_seen_in_the_result_inside_jit():
    bad = jax.tree.map(np.array, TAUS[1])
    bad["up"]["bias"][3] = np.nan
    taus = [TAUS[0], bad, TAUS[2]]
    for function in (
        merge.average,
        partial(merge.ties, scope="leaf"),
        partial(merge.dare, key=KEY, density=1.0, combine="ties"),
        partial(merge.breadcrumbs, gamma=0.0, combine="ties"),
        merge.sce,
        merge.karcher_mean,
    ):
        assert np.isnan(jax.jit(function)(taus)["up"]["bias"][3])


def test_an_average_is_the_average_of_the_models():
    base = draw(99, 0.5)
    half = apply(base, merge.average(TAUS[:2]))
    assert_is(half, flat([interpolate(apply(base, TAUS[0]), apply(base, TAUS[1]), 0.5)])[0], 1e-5)


def test_old_names_of_shares_give_the_same_and_warn():
    old = [
        (merge.dare, {"key": KEY, "rate": [0.5, {"**": 0.9}, 0.0]}, {"key": KEY, "density": [0.5, {"**": 0.1}, 1.0]}),
        (merge.della, {"key": KEY, "rate": 0.6}, {"key": KEY, "density": 0.4}),
        (merge.breadcrumbs, {"smallest": 0.7}, {"density": 0.29}),
        (merge.breadcrumbs, {"largest": {"**": 0.04}}, {"density": 0.11, "gamma": 0.04}),
    ]
    for method, before, now in old:
        with pytest.warns(DeprecationWarning, match=f"of {method.__name__} .*now called (density|gamma)"):
            found = method(TAUS, **before)
        assert_is(found, flat([method(TAUS, **now)])[0])
