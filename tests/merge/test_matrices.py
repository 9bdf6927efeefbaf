"""Merges of matrices, each against a few lines of numpy in float64."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax import merge, tree
from tvjax.merge import Adapter, spectral
from tvjax.merge.matrices import run_matrices

SHAPES = {"wide": (12, 30), "tall": (30, 12), "square": (17, 17), "conv": (3, 3, 2, 20)}


def draw(count, shape, seed=0, rank=None):
    random = np.random.default_rng(seed)
    if rank is None:
        return [random.normal(size=shape).astype(np.float32) for _ in range(count)]
    return [(random.normal(size=(shape[0], rank)) @ random.normal(size=(rank, shape[1]))).astype(np.float32)
            for _ in range(count)]  # fmt: skip


def flat64(leaf):
    return np.asarray(leaf, np.float64).reshape(-1, np.shape(leaf)[-1])


def orthogonal(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0].astype(np.float32)


def merged(call, leaves, /, **options):
    return np.asarray(call([{"kernel": leaf} for leaf in leaves], **options)["kernel"])


def assert_near(found, expected, tolerance=1e-4):
    error = np.linalg.norm(np.asarray(found, np.float64) - np.reshape(expected, np.shape(found)))
    assert np.isfinite(np.asarray(found)).all()
    assert error <= tolerance * max(np.linalg.norm(expected), 1e-30), error / np.linalg.norm(expected)


# -- numpy ---------------------------------------------------------------------------------------------------------


def polar(x):
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return (u * (s > 1e-5 * s[0])) @ v


def np_tsv_m(leaves, share=None):
    count = int(min(leaves[0].shape) * (share or 1 / len(leaves)) + 1e-9) or 1
    parts = [np.linalg.svd(leaf, full_matrices=False) for leaf in leaves]
    left, right = np.hstack([u[:, :count] for u, _, _ in parts]), np.vstack([v[:count] for _, _, v in parts])
    return polar(left) * np.hstack([s[:count] for _, s, _ in parts]) @ polar(right)


def np_iso_c(leaves):
    u, s, v = np.linalg.svd(sum(leaves), full_matrices=False)
    return s.mean() * u @ v


def np_iso_cts(leaves, common=0.8, side="output"):
    rank, tasks = min(leaves[0].shape), len(leaves)
    own = round((rank - int(rank * common)) / tasks)
    kept = rank - own * tasks
    u0, s0, v0 = np.linalg.svd(sum(leaves), full_matrices=False)
    u0, s0, v0 = u0[:, :kept], s0[:kept], v0[:kept]
    rest = [leaf - (leaf @ v0.T @ v0 if side == "output" else u0 @ u0.T @ leaf) for leaf in leaves]
    parts = [np.linalg.svd(leaf, full_matrices=False) for leaf in rest]
    left = np.hstack([*(u[:, :own] for u, _, _ in parts), u0])
    right = np.vstack([*(v[:own] for _, _, v in parts), v0])
    values = np.hstack([*(s[:own] for _, s, _ in parts), s0])
    return values.mean() * polar(left) @ polar(right)


def np_wudi(leaves, ridge=1e-5):
    start, squares = sum(leaves), [(leaf**2).sum() for leaf in leaves]
    space = sum(leaf @ leaf.T / n for leaf, n in zip(leaves, squares, strict=True))
    pull = sum(leaf @ leaf.T @ (leaf - start) / n for leaf, n in zip(leaves, squares, strict=True))
    return start + np.linalg.solve(space + ridge * np.linalg.norm(space) * np.eye(len(space)), pull)


def np_ties(parts, density):
    parts = np.stack(parts)
    sizes = np.sort(np.abs(parts).reshape(len(parts), -1), axis=1)
    edges = sizes[:, -round(density * sizes.shape[1])]
    parts = np.where(np.abs(parts) >= edges[:, None, None], parts, 0)
    agree = (np.sign(parts) == np.sign(parts.sum(0))) & (parts != 0)
    return (parts * agree).sum(0) / np.maximum(agree.sum(0), 1)


METHODS = {
    "tsv_m": (merge.tsv_m, np_tsv_m),
    "iso_c": (merge.iso_c, np_iso_c),
    "iso_cts": (merge.iso_cts, np_iso_cts),
    "wudi": (merge.wudi, np_wudi),
}
SPECTRAL = ("tsv_m", "iso_c", "iso_cts")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_against_numpy(name, shape):
    method, reference = METHODS[name]
    leaves = draw(3, SHAPES[shape])
    expected = reference([flat64(leaf) for leaf in leaves])
    for options in ({"method": "gram"}, {"method": "svd"}) if name in SPECTRAL else ({},):
        found = merged(method, leaves, **options)
        assert found.shape == leaves[0].shape and found.dtype == np.float32
        assert_near(found, expected)


@pytest.mark.parametrize("name", METHODS)
def test_orthogonal_changes_of_basis_on_either_side(name):
    method, leaves = METHODS[name][0], draw(3, (24, 15))
    left, right = orthogonal(24, 1), orthogonal(15, 2)
    assert_near(merged(method, [left @ leaf @ right for leaf in leaves]), left @ merged(method, leaves) @ right)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_ranks_far_below_the_size(name, shape):
    """Three updates of rank 2 in a space of 24: nothing outside their span, and the reference within it."""
    method, reference = METHODS[name]
    leaves = draw(3, shape, rank=2)
    found = merged(method, leaves)
    basis_in, basis_out = (np.linalg.svd(np.hstack(x))[0][:, :6] for x in (leaves, [leaf.T for leaf in leaves]))
    tolerance = 5e-3 if name == "wudi" else 1e-4  # a ridge of 1e-5 lets through rounding of 6e-8 / 1e-5
    assert_near(basis_in @ (basis_in.T @ found @ basis_out) @ basis_out.T, found, tolerance)
    inner = [flat64(basis_in.T @ leaf @ basis_out) for leaf in leaves]
    options = {"share": 1 / 3} if name == "tsv_m" else {}
    if name != "iso_cts":  # the common space is a fraction of the whole rank
        assert_near(found, basis_in @ reference(inner, **options) @ basis_out.T, 5 * tolerance)
    assert np.linalg.norm(found) > 0.1 * np.linalg.norm(leaves[0])


@pytest.mark.parametrize("name", METHODS)
def test_tiny_and_huge_vectors(name):
    method, leaves = METHODS[name][0], draw(2, (9, 14))
    expected = merged(method, leaves)
    for power in (-70, 40):
        found = merged(method, [np.ldexp(leaf, power) for leaf in leaves])
        assert_near(np.ldexp(found, -power), expected, 1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_seen_inside_jit(name, value):
    leaves = draw(2, (9, 14))
    leaves[1][3, 4] = value
    assert np.isnan(merged(jax.jit(METHODS[name][0]), leaves)).any()


@pytest.mark.parametrize("name", METHODS)
def test_more_vectors_than_directions(name):
    found = merged(METHODS[name][0], draw(11, (4, 6)))
    assert np.isfinite(found).all() and np.linalg.norm(found) > 0


def assert_batches_are_alike(method, taus, **options):
    at_once, one_by_one = (method(taus, batch_bytes=size, **options) for size in (2**30, 1))
    for path, leaf in at_once.items():
        np.testing.assert_allclose(leaf, one_by_one[path], rtol=0, atol=1e-5 * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize("name", METHODS)
def test_how_leaves_are_batched_changes_nothing(name):
    leaves = draw(6, (10, 16))
    shapes = [(10, 16), (16, 10), (2, 5, 16)]
    taus = [{str(i): leaves[3 * t + i].reshape(shape) for i, shape in enumerate(shapes)} for t in range(2)]
    assert_batches_are_alike(METHODS[name][0], taus, matrices={"?": "io", "2": "iio"})


@pytest.mark.parametrize("name", METHODS)
def test_lapack_is_never_given_a_batch(name):
    """Batches of two programs at once can wait for each other for ever on a CPU (`tvjax.align.decompositions`)."""
    sizes = (12, 150)  # on either side of the size from which Gram matrices are decomposed
    taus = [{f"{n}-{i}": x for n in sizes for i, x in enumerate(draw(2, (n, n)))} for _ in range(2)]
    calls = re.findall(r"custom_call @lapack_.*", jax.jit(METHODS[name][0]).lower(taus).as_text())
    assert calls and not [call for call in calls if re.search(r"tensor<\d+x\d+x\d+xf32>", call)]


def test_a_bad_spectrum_among_good_ones():
    """It takes another branch; its neighbours do not."""
    good, bad = draw(2, (130, 140)), orthogonal(130, 0) * np.logspace(0, -4, 130, dtype=np.float32)
    taus = [{"0": good[0], "1": bad @ orthogonal(140, 1)[:130], "2": good[1]}]
    assert_batches_are_alike(merge.iso_c, taus)
    found = merge.iso_c(taus)
    for path, leaf in taus[0].items():
        assert_near(found[path], np_iso_c([flat64(leaf)]))


def test_equal_options_compile_once():
    leaves = draw(2, (6, 10))
    for _ in range(2):
        merged(merge.iso_c, leaves)
        merged(merge.tsv_m, leaves, share=0.5)
    before = run_matrices._cache_size()
    merged(merge.iso_c, leaves)
    merged(merge.tsv_m, leaves, share=0.5)
    assert run_matrices._cache_size() == before
    merged(merge.tsv_m, leaves, share=0.25)
    assert run_matrices._cache_size() == before + 1


def test_leaves_that_are_no_matrices():
    taus = [{"kernel": x, "bias": x[0], "scale": x[0, 0], "table": x} for x in draw(3, (8, 6))]
    weights = [1.0, 2.0, -1.0]
    rows = []
    found = merge.iso_c(taus, weights=weights, matrices="kernel", report=rows.append)
    for path in ("bias", "scale", "table"):
        expected = sum(w * tau[path] for w, tau in zip(weights, taus, strict=True)) / 3
        np.testing.assert_allclose(found[path], expected, atol=1e-6)
    assert {row.path: row.rule for row in rows} == {
        "kernel": "matrix [8, 6]", "bias": "averaged", "scale": "averaged", "table": "averaged"
    }  # fmt: skip
    zeroed = merge.iso_c(taus, matrices="kernel", others="zero")
    assert not any(np.any(zeroed[path]) for path in ("bias", "scale", "table")) and np.any(zeroed["kernel"])
    assert merge.tsv_m([{"kernel": np.zeros((0, 4), np.float32)}] * 2)["kernel"].shape == (0, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(merge.tsv_m, method="exact"), "method must be one of .*'randomised'.*found 'exact'"),
        (partial(merge.iso_c, method="randomised"), r"method must be one of \('gram', 'svd'\)"),
        (partial(merge.iso_cts, method="qr"), r"method must be one of \('gram', 'svd'\)"),
        (partial(merge.tsv_m, share=0.0), r"share must lie in \(0, 1\]"),
        (partial(merge.iso_cts, common=1.5), r"common must lie in \(0, 1\]"),
        (partial(merge.iso_cts, side="left"), "side must be one of"),
        (partial(merge.iso_c, others="keep"), "others must be one of"),
        (partial(merge.iso_c, matrices="head"), "matches none"),
        (partial(merge.iso_c, matrices="bias"), r"two axes or more(?s:.*)bias: \(6,\)"),
        (partial(merge.wudi, solver="sgd"), "solver must be one of"),
        (partial(merge.wudi, ridge=-1.0), "ridge and steps must be 0 or more"),
        (partial(merge.knots, merge=merge.average, side="right"), "side must be one of"),
        (partial(merge.knots, merge=merge.average, rank=0), "rank must be 1 or more"),
        (partial(merge.knots, merge=merge.average, method="randomised"), "needs rank"),
    ],
)
def test_options_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call([{"kernel": x, "bias": x[0]} for x in draw(2, (8, 6))])


# -- task singular vectors -----------------------------------------------------------------------------------------


def test_tsv_keeps_the_leading_triplets_of_orthogonal_tasks():
    """Tasks in orthogonal subspaces do not interfere: the merge is the sum of their truncations."""
    basis = orthogonal(12, 0)
    spectra = np.float32([[9, 5, 2, 0.5], [8, 4, 3, 1], [7, 6, 0.25, 0.125]])
    leaves = [basis[:, 4 * i : 4 * i + 4] * spectra[i] @ basis[:, 4 * i : 4 * i + 4].T for i in range(3)]
    assert_near(merged(merge.tsv_m, leaves), sum(leaves))
    kept = [basis[:, 4 * i : 4 * i + 2] * spectra[i, :2] @ basis[:, 4 * i : 4 * i + 2].T for i in range(3)]
    assert_near(merged(merge.tsv_m, leaves, share=1 / 6), sum(kept))


@pytest.mark.parametrize("method", ["gram", "svd"])
def test_tsv_of_equal_vectors_is_their_truncation(method):
    leaf = draw(1, (20, 31))[0]
    u, s, v = np.linalg.svd(flat64(leaf), full_matrices=False)
    assert_near(merged(merge.tsv_m, [leaf, leaf], method=method), (u[:, :10] * s[:10]) @ v[:10])


def test_tsv_of_one_vector():
    leaf = draw(1, (20, 31))[0]
    np.testing.assert_array_equal(merged(merge.tsv_m, [leaf]), leaf)
    u, s, v = np.linalg.svd(flat64(leaf), full_matrices=False)
    assert_near(merged(merge.tsv_m, [leaf], share=0.25, weights=2.0), 2 * (u[:, :5] * s[:5]) @ v[:5])


def test_a_vector_of_weight_zero_takes_no_part():
    leaves = draw(3, (16, 10))
    for method, options in ((merge.tsv_m, {"share": 0.3}), (merge.iso_c, {}), (merge.wudi, {})):
        found = merged(method, leaves, weights=[1.0, 0.0, -2.0], **options)
        assert_near(found, merged(method, [leaves[0], -2 * leaves[2]], **options), 1e-5)


def test_randomised_tsv_on_spectra_that_fall():
    spectrum = np.float32(0.8) ** np.arange(64, dtype=np.float32)
    leaves = [orthogonal(64, i) * spectrum @ orthogonal(64, i + 9) for i in range(3)]
    assert_near(merged(merge.tsv_m, leaves, method="randomised"), merged(merge.tsv_m, leaves, method="svd"))


# -- isotropic -----------------------------------------------------------------------------------------------------


def test_iso_c_has_one_singular_value_the_mean_of_the_sum():
    leaves = draw(3, (18, 11))
    values = np.linalg.svd(flat64(merged(merge.iso_c, leaves)), compute_uv=False)
    np.testing.assert_allclose(values, np.linalg.svd(flat64(sum(leaves)), compute_uv=False).mean(), rtol=1e-5)


def test_iso_c_is_on_the_scale_of_the_sum():
    leaves = draw(3, (18, 11))
    assert_near(merged(merge.iso_c, leaves, weights=1 / 3), merged(merge.iso_c, leaves) / 3, 1e-5)
    assert_near(merged(merge.iso_c, [sum(leaves)]), merged(merge.iso_c, leaves), 1e-5)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("common", [0.5, 0.8, 1.0])
def test_iso_cts_on_either_side(side, common):
    leaves = draw(3, (25, 21))
    expected = np_iso_cts([flat64(leaf) for leaf in leaves], common, side)
    assert_near(merged(merge.iso_cts, leaves, common=common, side=side), expected)
    turned = merged(merge.iso_cts, [leaf.T for leaf in leaves], common=common, side=side)
    other = "input" if side == "output" else "output"
    assert_near(turned.T, merged(merge.iso_cts, leaves, common=common, side=other))


def test_iso_cts_without_own_directions_is_iso_c():
    leaves = draw(7, (6, 9))  # a fifth of six directions is too few for seven tasks
    np.testing.assert_array_equal(merged(merge.iso_cts, leaves), merged(merge.iso_c, leaves))
    many = draw(4, (3, 5))
    assert np.isfinite(merged(merge.iso_cts, many, common=0.1)).all()


# -- decompositions --------------------------------------------------------------------------------------------------


def spectra(size):
    place = np.arange(size)
    return {
        "flat": np.ones(size),
        "power": (1.0 + place) ** -1,
        "three decades": 10.0 ** (-3 * place / size),
        "low rank": np.where(place < size // 8, 2.0 ** -(place % 5), 0),
        "one large": np.where(place == 0, 300.0, 1 + place / size),
        "six decades": 10.0 ** (-6 * place / size),
        "six decades and zeros": np.where(place < size // 2, 10.0 ** (-6 * place / size), 0),
    }


@pytest.mark.parametrize("spectrum", spectra(4))
@pytest.mark.parametrize("shape", [(128, 128), (128, 200), (200, 128)])
def test_gram_is_as_good_as_svd(spectrum, shape):
    size = min(shape)
    left, right = orthogonal(shape[0], 1)[:, :size], orthogonal(shape[1], 2)[:size]
    matrix = jnp.asarray(left * spectra(size)[spectrum] @ right, jnp.float32)
    u, s, v = np.linalg.svd(flat64(matrix), full_matrices=False)
    kept = s > 8 * max(shape) ** 0.5 * np.finfo(np.float32).eps * s[0]
    exact = (u * kept) @ v
    gram, svd = (np.linalg.norm(jax.jit(spectral.polar, static_argnums=1)(matrix, m) - exact) for m in ("gram", "svd"))
    assert gram <= 2 * svd + 1e-4 * np.linalg.norm(exact)
    count = size // 8
    found = jax.jit(spectral.leading, static_argnums=1)(matrix, count)
    basis_in, basis_out = (flat64(basis) for basis in found)
    if spectrum == "flat":
        return  # which directions lead is not determined
    best = (u[:, :count] * s[:count]) @ v[:count]
    assert_near(basis_in @ (basis_in.T @ flat64(matrix) @ basis_out.T) @ basis_out, best)
    core = basis_in.T @ flat64(matrix) @ basis_out.T
    np.testing.assert_allclose(core, core.T, atol=1e-5 * s[0])
    assert np.trace(core) == pytest.approx(s[:count].sum(), rel=1e-4)
    np.testing.assert_allclose(basis_in.T @ basis_in, np.eye(count), atol=1e-4)
    np.testing.assert_allclose(basis_out @ basis_out.T, np.eye(count), atol=1e-4)


def test_solve_with_and_without_full_rank():
    rows = np.random.default_rng(0).normal(size=(40, 12))
    full, thin = rows.T @ rows, rows[:5].T @ rows[:5]
    target = np.random.default_rng(1).normal(size=(12, 3))
    found = spectral.solve(jnp.asarray(full, jnp.float32), jnp.asarray(target, jnp.float32))
    assert_near(found, np.linalg.solve(full, target))
    target = thin @ target
    found = spectral.solve(jnp.asarray(thin, jnp.float32), jnp.asarray(target, jnp.float32))
    assert_near(thin @ np.asarray(found, np.float64), target)
    assert not np.any(spectral.solve(jnp.zeros((4, 4)), jnp.ones((4, 2))))


# -- WUDI ------------------------------------------------------------------------------------------------------------


def interference(found, leaves):
    found, leaves = jnp.asarray(found, jnp.float32), [jnp.asarray(leaf) for leaf in leaves]
    return sum(jnp.sum((leaf.T @ (found - leaf)) ** 2) / jnp.sum(leaf**2) for leaf in leaves)


@pytest.mark.parametrize("shape", [(20, 8), (9, 14), (60, 7)])
def test_wudi_annihilates_the_gradient_of_its_objective(shape):
    leaves = draw(3, shape)
    found = merged(merge.wudi, leaves)
    gradient = jax.grad(interference)
    start = np.linalg.norm(gradient(sum(leaves), leaves))
    assert np.linalg.norm(gradient(found, leaves)) < 2e-3 * start
    assert interference(found, leaves) <= (1 + 1e-5) * min(
        interference(other, leaves) for other in (sum(leaves), sum(leaves) / 3, leaves[0], 1.01 * found, 0.99 * found)
    )


def test_wudi_keeps_tasks_with_other_inputs_apart():
    leaves = [np.zeros((6, 5), np.float32) for _ in range(2)]
    leaves[0][:3], leaves[1][3:] = draw(2, (3, 5))
    assert_near(merged(merge.wudi, leaves), sum(leaves), 1e-5)


@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
def test_adam_of_wudi(shape):
    leaves = [1e-2 * leaf for leaf in draw(2, shape)]
    reference = [flat64(leaf) for leaf in leaves]
    x = sum(reference)
    first = second = np.zeros(shape)
    for step in range(1, 31):
        gradient = sum(2 * t @ t.T @ (x - t) / (t**2).sum() for t in reference)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        x = x - 1e-4 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    found = merged(merge.wudi, leaves, solver="adam", steps=30, learning_rate=1e-4)
    assert_near(found, x, 1e-5)
    assert_near(merged(merge.wudi, leaves, solver="adam", steps=0), sum(leaves), 1e-6)
    best = interference(merged(merge.wudi, leaves), leaves)
    assert best < interference(found, leaves) < interference(sum(leaves), leaves)


# -- adapters --------------------------------------------------------------------------------------------------------


KERNELS = {"up/kernel": (20, 12), "down/kernel": (12, 20)}


def random_adapters(seed, ranks, shapes=KERNELS):
    random = np.random.default_rng(seed)
    return {
        path: Adapter(
            random.normal(size=(shape[0], rank)).astype(np.float32),
            random.normal(size=(rank, shape[1])).astype(np.float32),
            0.25 + rank,
        )
        for (path, shape), rank in zip(shapes.items(), ranks, strict=True)
    }


def products(adapters):
    return {path: a.scale * flat64(a.a) @ flat64(a.b) for path, a in adapters.items()}


def test_merged_adapters_are_the_merge_of_the_products():
    each = [random_adapters(0, (3, 2)), random_adapters(1, (4, 1)), random_adapters(2, (2, 2))]
    del each[2]["down/kernel"]
    weights = [1.0, {"**": 2.0, "down": -1.0}, 0.5]
    found = merge.merge_adapters(each, weights=weights)
    up, down = found["up/kernel"], found["down/kernel"]
    assert (up.a.shape, up.b.shape, down.a.shape, down.b.shape) == ((20, 9), (9, 12), (12, 3), (3, 20))
    dense = [products(one) for one in each]
    for path, factors in (("up/kernel", (1, 2, 0.5)), ("down/kernel", (1, -1))):
        expected = sum(w * one[path] for w, one in zip(factors, dense, strict=False))
        assert_near(flat64(found[path].a) @ flat64(found[path].b), expected, 1e-5)
        assert_near(tree.flatten(merge.to_task_vector(found))[path], expected, 1e-5)
    taus = [merge.to_task_vector(one) for one in each[:2]]
    total = tree.flatten(merge.task_arithmetic(taus))
    exact = tree.flatten(merge.to_task_vector(merge.merge_adapters(each[:2])))
    for path, leaf in total.items():
        assert_near(exact[path], leaf, 1e-5)


def test_factors_are_no_coordinates():
    """The same adapters in other factors merge to the same products."""
    each = [random_adapters(0, (3, 2)), random_adapters(1, (3, 2))]
    turn = np.float32(np.random.default_rng(5).normal(size=(3, 3)))
    other = [each[0], {**each[1]}]
    up = each[1]["up/kernel"]
    other[1]["up/kernel"] = Adapter(up.a @ turn, np.linalg.inv(turn) @ up.b, up.scale)
    for call in (merge.merge_adapters, partial(merge.merge_adapters, rank=2)):
        one, two = (merge.to_task_vector(call(x))["up"]["kernel"] for x in (each, other))
        assert_near(two, one, 1e-4)


@pytest.mark.parametrize("rank", [1, 4, 7, 50])
def test_compression_is_the_best_approximation(rank):
    each = [random_adapters(i, (4, 3)) for i in range(2)]
    found = merge.merge_adapters(each, rank=rank)
    for path in each[0]:
        total = sum(products(one)[path] for one in each)
        u, s, v = np.linalg.svd(total)
        kept = min(rank, each[0][path].a.shape[1] * 2)
        assert found[path].a.shape[1] == kept
        assert_near(flat64(found[path].a) @ flat64(found[path].b), (u[:, :kept] * s[:kept]) @ v[:kept], 1e-5)


def test_no_product_is_ever_formed():
    def shapes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (tuple(v.aval.shape) for v in eqn.outvars)
            for value in eqn.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                        yield from shapes(getattr(inner, "jaxpr", inner))

    each = [random_adapters(i, (3, 2)) for i in range(2)]
    for call in (merge.merge_adapters, partial(merge.merge_adapters, rank=2)):
        seen = set(shapes(jax.make_jaxpr(call)(each).jaxpr))
        assert not seen & {(20, 12), (12, 20)} and seen


def test_adapters_of_kernels_with_more_axes():
    each = random_adapters(0, (3,), {"query/kernel": (8, 12)})
    params = {"query": {"kernel": jnp.zeros((8, 3, 4))}, "other": jnp.zeros(2)}
    tau = merge.to_task_vector(each, params)
    assert tau["query"]["kernel"].shape == (8, 3, 4)
    assert_near(tau["query"]["kernel"], products(each)["query/kernel"], 1e-6)
    with pytest.raises(ValueError, match=r"query/kernel: adapter of \(8, 12\), kernel \(8, 5\)"):
        merge.to_task_vector(each, {"query": {"kernel": jnp.zeros((8, 5))}})
    with pytest.raises(ValueError, match="query/kernel: adapter of .*missing"):
        merge.to_task_vector(each, {"other": jnp.zeros(2)})


def test_adapters_that_do_not_fit():
    one, two = random_adapters(0, (3, 2)), random_adapters(1, (3, 2))
    with pytest.raises(ValueError, match=r"up/kernel of task 1: a kernel of \(20, 13\), another task has \(20, 12\)"):
        merge.merge_adapters([one, {"up/kernel": Adapter(np.ones((20, 2)), np.ones((2, 13)))}])
    with pytest.raises(ValueError, match=r"up/kernel of task 0: a \(20, 2\), b \(3, 12\)"):
        merge.merge_adapters([{"up/kernel": Adapter(np.ones((20, 2)), np.ones((3, 12)))}])
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        merge.merge_adapters([one, two], rank=0)
    with pytest.raises(ValueError, match="a list of one or more"):
        merge.merge_adapters([])
    with pytest.raises(ValueError, match="no adapters"):
        merge.merge_adapters([{}])
    del two["up/kernel"]
    with pytest.raises(ValueError, match="up/kernel of task 1"):
        merge.knots_adapters([one, two], merge.average)


# -- KnOTS -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_knots_is_ties_in_the_shared_basis(side, shape):
    leaves = draw(3, shape, rank=3)
    stacked = np.vstack if side == "output" else np.hstack
    u, s, v = np.linalg.svd(stacked([flat64(leaf) for leaf in leaves]), full_matrices=False)
    basis = v[:9] if side == "output" else u.T[:9]
    parts = [(flat64(leaf) @ basis.T if side == "output" else basis @ flat64(leaf)) for leaf in leaves]
    whole = np_ties(parts, 0.3)
    expected = whole @ basis if side == "output" else basis.T @ whole
    rows = []
    inner = partial(merge.ties, density=0.3)
    taus = [{"kernel": leaf} for leaf in leaves]
    found = merge.knots(taus, inner, side=side, report=rows.append)["kernel"]
    assert_near(found, expected, 2e-4)
    assert rows[0].measures == {"rank": 9}
    straight = merged(inner, leaves)
    assert np.linalg.norm(found - straight) > 0.1 * np.linalg.norm(straight)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("method", ["gram", "svd"])
def test_knots_with_a_linear_merge_changes_nothing(side, method):
    taus = [{"kernel": x, "bias": x[0, 0, 0]} for x in draw(3, (2, 2, 3, 10))]
    for inner in (merge.average, partial(merge.task_arithmetic, weights=[1.0, -0.5, 2.0])):
        found, expected = merge.knots(taus, inner, side=side, method=method), inner(taus)
        for path in expected:
            assert_near(found[path], expected[path], 1e-5)
    found = merge.knots(taus[:1], partial(merge.ties, density=1.0), side=side, method=method)
    assert_near(found["kernel"], taus[0]["kernel"], 1e-5)
    found = merge.knots([jax.tree.map(np.zeros_like, taus[0])] * 2, merge.ties, side=side, method=method)
    assert not any(np.any(leaf) for leaf in found.values())


def test_knots_of_a_lower_rank():
    leaves = draw(2, (30, 24), rank=6)
    tall = flat64(np.vstack(leaves))
    v = np.linalg.svd(tall)[2][:4]
    expected = sum(flat64(leaf) for leaf in leaves) / 2 @ v.T @ v
    for method in ("gram", "svd", "randomised"):
        found = merge.knots([{"kernel": x} for x in leaves], merge.average, rank=4, method=method)["kernel"]
        assert_near(found, expected, 1e-3 if method == "randomised" else 1e-4)


@pytest.mark.parametrize("side", ["output", "input"])
def test_knots_of_adapters_equals_knots_of_their_products(side):
    each = [random_adapters(i, (3, 2)) for i in range(3)]
    each[2]["down/kernel"] = each[0]["down/kernel"]._replace(scale=-1.0)  # of the same span: rank 4, not 6
    inner = partial(merge.ties, density=0.4, scope="leaf")
    found = merge.knots_adapters(each, inner, side=side)
    expected = tree.flatten(merge.knots([merge.to_task_vector(one) for one in each], inner, side=side))
    for path, leaf in expected.items():
        assert_near(flat64(found[path].a) @ flat64(found[path].b), leaf, 2e-4)
    assert (found["up/kernel"].a.shape[1], found["down/kernel"].a.shape[1]) == (9, 4)
    assert merge.knots_adapters(each, merge.average, side=side, rank=2)["up/kernel"].b.shape[0] == 2
    alone = merge.knots_adapters(each[:1], merge.average, side=side)
    for path, leaf in products(each[0]).items():
        assert_near(flat64(alone[path].a) @ flat64(alone[path].b), leaf, 1e-5)
