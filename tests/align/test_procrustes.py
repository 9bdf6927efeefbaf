"""Properties of the Procrustes maps, and numpy references in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.align.procrustes import (
    apply_left,
    apply_right,
    default_rank_tolerance,
    matrix,
    polar,
    polar_of_product,
    whiten,
)

WIDTH, HIDDEN, ROWS = 12, 48, 200


def orthogonal(rng, d):
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def deficient_rows(rng, rows=ROWS, width=WIDTH, hidden=HIDDEN, offset=2.0):
    """Outputs of a width -> hidden linear layer: rank width + 1 of hidden."""
    x = rng.standard_normal((rows, width)) + offset * rng.standard_normal(width)
    return (x @ rng.standard_normal((width, hidden)) + rng.standard_normal(hidden)).astype(np.float32)


def reference(moment, rank=None):
    u, _, vt = np.linalg.svd(np.asarray(moment, np.float64), full_matrices=False)
    return u[:, :rank] @ vt[:rank]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_full_rank_square_map_is_orthogonal_and_matches_float64(rng):
    c = rng.standard_normal((24, 24)).astype(np.float32)
    rotation = polar(c)
    r = np.asarray(matrix(rotation))
    assert int(rotation.rank) == 24
    np.testing.assert_allclose(r.T @ r, np.eye(24), atol=3e-6)
    np.testing.assert_allclose(r, reference(c), atol=1e-4)


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_rectangular_map_is_a_partial_isometry(rng, shape):
    r = np.asarray(matrix(polar(rng.standard_normal(shape).astype(np.float32))))
    small = r @ r.T if shape[0] < shape[1] else r.T @ r
    np.testing.assert_allclose(small, np.eye(min(shape)), atol=3e-6)


def test_map_maximises_the_overlap(rng):
    c = rng.standard_normal((8, 8)).astype(np.float32)
    best = np.sum(np.asarray(matrix(polar(c))) * c)
    assert all(np.sum(orthogonal(rng, 8) * c) < best for _ in range(200))


@pytest.mark.parametrize("batches", [1, 10])
@pytest.mark.parametrize("hidden", [HIDDEN, 256])
def test_same_rows_give_the_projector_on_what_they_determine(rng, batches, hidden):
    h = deficient_rows(rng, hidden=hidden)
    c = sum(jnp.matmul(part.T, part, precision="highest") for part in np.split(h, batches))
    rotation = polar(c)
    r = np.asarray(matrix(rotation))
    assert int(rotation.rank) == WIDTH + 1
    np.testing.assert_allclose(r, r.T, atol=2e-4)
    np.testing.assert_allclose(r @ r, r, atol=2e-4)
    np.testing.assert_allclose(h @ r, h, atol=1e-3 * np.abs(h).max())
    projector = reference(np.float64(h).T @ h, WIDTH + 1)
    np.testing.assert_allclose(r, projector, atol=2e-4)


def test_rotated_copy_is_recovered_on_what_the_rows_determine(rng):
    h = deficient_rows(rng)
    q = orthogonal(rng, HIDDEN)
    target = (h @ q).astype(np.float32)
    r = np.asarray(matrix(polar(h.T @ target)))
    np.testing.assert_allclose(h @ r, target, atol=2e-3 * np.abs(target).max())
    kernel = rng.standard_normal((WIDTH, h.shape[0])).astype(np.float32) @ h
    np.testing.assert_allclose(kernel @ r, kernel @ q, atol=1e-3 * np.abs(kernel).max())


def test_zero_completion_does_not_depend_on_the_order_of_the_rows(rng):
    h_a, h_b = deficient_rows(rng), deficient_rows(rng, hidden=64)
    order = rng.permutation(ROWS)
    for complete, close in (("zero", True), ("thin", False)):
        maps = [
            np.asarray(matrix(polar(jnp.matmul(h_a[i].T, h_b[i], precision="highest"), complete=complete)))
            for i in (np.arange(ROWS), order)
        ]
        assert (np.linalg.norm(maps[0] - maps[1]) < 1e-3 * np.linalg.norm(maps[0])) == close


def test_thin_keeps_every_direction_and_counts_what_is_determined(rng):
    h = deficient_rows(rng)
    rotation = polar(h.T @ h, complete="thin")
    r = np.asarray(matrix(rotation))
    assert int(rotation.rank) == WIDTH + 1
    np.testing.assert_allclose(r @ r.T, np.eye(HIDDEN), atol=1e-5)


def test_eye_completes_with_the_identity(rng):
    h = deficient_rows(rng)
    rotation = polar(h.T @ h, complete="eye")
    assert int(rotation.rank) == WIDTH + 1
    np.testing.assert_allclose(matrix(rotation), np.eye(HIDDEN), atol=0.05)
    wide = polar(jnp.diag(jnp.array([1.0, 0.0])) @ jnp.eye(2, 3), complete="eye")
    np.testing.assert_allclose(matrix(wide), np.eye(2, 3), atol=1e-6)


def test_rank_keeps_the_leading_directions(rng):
    c = rng.standard_normal((10, 16)).astype(np.float32)
    for rank, kept in ((4, 4), (0.4, 4), (1.0, 10), (1, 1), (99, 10)):
        rotation = polar(c, rank=rank)
        chex.assert_shape([rotation.left, rotation.right], [(10, kept), (kept, 16)])
        np.testing.assert_allclose(matrix(rotation), reference(c, kept), atol=1e-4)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_a_sketch_agrees_with_the_svd_where_the_spectrum_decays(rng, shape):
    values = np.exp(-np.arange(30) / 3.0)
    c = orthogonal(rng, shape[0])[:, :30] * values @ orthogonal(rng, shape[1])[:30]
    fast = matrix(polar(c.astype(np.float32), rank=6, method="randomised"))
    np.testing.assert_allclose(fast, reference(c, 6), atol=2e-3)


SPECTRA = {
    "to 1e-3": np.logspace(0, -3, 60),
    "to 1e-5": np.logspace(0, -5, 60),
    "one large": np.r_[1, np.linspace(1e-4, 5e-5, 59)],
    "half of the rank": np.r_[np.linspace(1, 0.1, 30), np.zeros(30)],
}


@pytest.mark.parametrize("shape", [(60, 60), (60, 90), (90, 60)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", ["svd", "polar"])
def test_exact_methods_keep_every_determined_direction(rng, shape, name, method):
    values = SPECTRA[name]
    c = orthogonal(rng, shape[0])[:, :60] * values @ orthogonal(rng, shape[1])[:60]
    rotation = polar(c.astype(np.float32), method=method)
    rank = np.count_nonzero(values)
    assert int(rotation.rank) == rank
    np.testing.assert_allclose(matrix(rotation), reference(c, rank), atol=1e-3)


def test_polar_finds_the_determined_subspace(rng):
    h = deficient_rows(rng, offset=0.0)
    rotation = polar(h.T @ h, method="polar")
    assert int(rotation.rank) == WIDTH + 1
    np.testing.assert_allclose(matrix(rotation), reference(np.float64(h).T @ h, WIDTH + 1), atol=2e-4)


@pytest.mark.parametrize("method", ["svd", "polar"])
def test_directions_beside_a_large_mean_are_kept(rng, method):
    # One singular value holds the mean; the others, 30 to 60 eps of it, are the data's, and all are kept.
    width = 256
    eps = np.finfo(np.float32).eps
    c = orthogonal(rng, width) * np.r_[1, np.linspace(60, 30, width - 1) * eps] @ orthogonal(rng, width)
    rotation = polar(c.astype(np.float32), method=method)
    assert int(rotation.rank) == width
    kept = np.linalg.svd(matrix(rotation), compute_uv=False)
    np.testing.assert_allclose(kept, 1, atol=1e-3)
    assert np.linalg.norm(matrix(rotation) - reference(c)) < 0.15 * np.sqrt(width)


@pytest.mark.parametrize("width", [48, 192, 512])
def test_the_tolerance_stands_well_above_what_rounding_makes_of_zero(rng, width):
    x = rng.standard_normal((1000, width // 4)).astype(np.float32)
    h_a, h_b = (x @ rng.standard_normal((width // 4, width)).astype(np.float32) for _ in range(2))
    values = np.linalg.svd(jnp.matmul(h_a.T, h_b, precision="highest"), compute_uv=False)
    tolerance = default_rank_tolerance()
    assert values[width // 4] < 0.25 * tolerance * values[0]
    assert tolerance <= 64 * np.finfo(np.float32).eps


@pytest.mark.parametrize("method", ["svd", "polar"])
def test_rounding_moves_a_direction_at_the_edge_and_does_not_switch_it(rng, method):
    left, right = orthogonal(rng, 20), orthogonal(rng, 20)
    shares = []
    for edge in np.linspace(0.25, 1.5, 51):  # of the tolerance
        c = left * np.r_[np.linspace(1, 0.5, 19), edge * 1e-3] @ right
        r = np.asarray(matrix(polar(c.astype(np.float32), rank_tolerance=1e-3, method=method)))
        shares.append(left[:, -1] @ r @ right[-1])
    assert shares[0] < 1e-3 and shares[-1] > 0.999
    assert np.all(np.diff(shares) > -1e-3) and np.max(np.diff(shares)) < 0.12


def test_randomised_is_a_function_of_its_key(rng):
    c = rng.standard_normal((40, 40)).astype(np.float32)
    maps = [polar(c, method="randomised", rank=4, key=k) for k in (None, jax.random.key(0), jax.random.key(1))]
    chex.assert_trees_all_equal(maps[0], maps[1])
    assert not np.array_equal(maps[0].left, maps[2].left)


@pytest.mark.parametrize("rows", [1, 9, 20, 60])
def test_product_form_of_rows_equals_the_dense_form(rng, rows):
    h_a, h_b = (rng.standard_normal((rows, d)).astype(np.float32) for d in (16, 24))
    product = polar_of_product(h_a.T, None, h_b.T)
    assert product.left.shape[1] <= min(rows, 16)
    assert int(product.rank) == min(rows, 16)
    np.testing.assert_allclose(matrix(product), reference(np.float64(h_a).T @ h_b, min(rows, 16)), atol=2e-4)


@pytest.mark.parametrize("method", ["svd", "polar", "randomised"])
def test_product_form_of_a_linear_output_equals_the_dense_form(rng, method):
    x_a, x_b = rng.standard_normal((ROWS, 6)), rng.standard_normal((ROWS, 8))
    x_b[:, :6] += 4 * x_a
    ones = np.ones((ROWS, 1))
    core = np.hstack([x_a, ones]).T @ np.hstack([x_b, ones])
    p, q = rng.standard_normal((32, 7)), rng.standard_normal((40, 9))
    rank = 7 if method == "randomised" else None
    product = polar_of_product(*(x.astype(np.float32) for x in (p, core, q)), method=method, rank=rank)
    assert int(product.rank) == 7
    np.testing.assert_allclose(matrix(product), reference(p @ core @ q.T, 7), atol=5e-4)


@pytest.mark.parametrize("core", [False, True], ids=["rows", "linear outputs"])
def test_a_sketch_of_a_product_agrees_with_the_svd_where_the_spectrum_decays(rng, core):
    decay = np.exp(-np.arange(40) / 3.0)
    p, q = orthogonal(rng, 60)[:, :40] * decay, orthogonal(rng, 50)[:, :40]
    middle = orthogonal(rng, 40) if core else None
    c = p @ q.T if middle is None else p @ middle @ q.T
    factors = [None if x is None else x.astype(np.float32) for x in (p, middle, q)]
    rotation = polar_of_product(*factors, method="randomised", rank=6)
    assert rotation.left.shape == (60, 6) and rotation.right.shape == (6, 50)
    np.testing.assert_allclose(matrix(rotation), reference(c, 6), atol=5e-3)


def test_a_sketch_keeps_nearly_all_that_the_leading_directions_hold(rng):
    c = orthogonal(rng, 100) / np.sqrt(np.arange(1, 101)) @ orthogonal(rng, 100)  # decays slowly
    best = 1 / np.sqrt(np.arange(1, 26))
    rotation = polar(c.astype(np.float32), rank=0.25, method="randomised")
    assert np.sum(np.asarray(matrix(rotation)) * c) > 0.97 * best.sum()


def test_product_form_completes_like_the_dense_form(rng):
    p, q = rng.standard_normal((16, 3)).astype(np.float32), rng.standard_normal((16, 3)).astype(np.float32)
    r = matrix(polar_of_product(p, None, q, complete="eye"))
    np.testing.assert_allclose(r @ r.T, np.eye(16), atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "polar", "randomised"])
def test_zero_moment_gives_the_zero_map(method):
    rank = 2 if method == "randomised" else None
    for rotation in (
        polar(jnp.zeros((6, 4)), method=method, rank=rank),
        polar_of_product(jnp.zeros((6, 2)), None, jnp.zeros((4, 2)), method=method, rank=rank),
    ):
        assert int(rotation.rank) == 0
        np.testing.assert_array_equal(matrix(rotation), np.zeros((6, 4)))


@pytest.mark.parametrize("complete", ["thin", "eye"])
def test_completions_of_a_zero_moment_are_finite(complete):
    rotation = polar(jnp.zeros((6, 4)), complete=complete)
    assert int(rotation.rank) == 0
    chex.assert_tree_all_finite(rotation)


def test_applying_the_factors_equals_applying_the_matrix(rng):
    rotation = polar(rng.standard_normal((6, 9)).astype(np.float32), rank=4)
    r = np.asarray(matrix(rotation))
    kernel, bias = rng.standard_normal((6, 5)).astype(np.float32), rng.standard_normal(6).astype(np.float32)
    for x in (kernel, bias):
        np.testing.assert_allclose(apply_left(rotation, x), r.T @ x, atol=1e-5)
        np.testing.assert_allclose(apply_right(x.T, rotation), x.T @ r, atol=1e-5)
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, rotation)
    assert apply_left(halved, kernel).dtype == jnp.float32


def test_jit_vmap_and_half_precision_moments(rng):
    c = rng.standard_normal((3, 6, 8)).astype(np.float32)
    with jax.disable_jit():
        eager = polar(c[0])
    chex.assert_trees_all_close(matrix(polar(c[0])), matrix(eager), atol=1e-5)
    many = jax.vmap(lambda x: matrix(polar(x)))(c)
    chex.assert_trees_all_close(many[1], matrix(polar(c[1])), atol=1e-5)
    assert polar(c[0].astype(jnp.bfloat16)).left.dtype == jnp.float32


@pytest.mark.parametrize("power", [0.0, 0.25, 0.4, 0.5])
def test_whitening_matches_float64(rng, power):
    h_a, h_b = rng.standard_normal((ROWS, 10)), rng.standard_normal((ROWS, 14)) * np.logspace(0, -1, 14)
    c, g_a, g_b = h_a.T @ h_b, h_a.T @ h_a, h_b.T @ h_b

    def root(g):
        values, vectors = np.linalg.eigh(g)
        return vectors * np.maximum(values, 0.05 * values[-1]) ** -power @ vectors.T

    whitened = whiten(*(x.astype(np.float32) for x in (c, g_a, g_b)), power, 0.05)
    np.testing.assert_allclose(whitened, root(g_a) @ c @ root(g_b), rtol=1e-3, atol=1e-4 * np.abs(c).max())


def test_whitening_makes_the_map_blind_to_invertible_maps_of_one_side(rng):
    h_a = rng.standard_normal((ROWS, 8)).astype(np.float32)
    mixed = (h_a @ (orthogonal(rng, 8) * np.linspace(1, 3, 8))).astype(np.float32)
    whitened = whiten(h_a.T @ mixed, h_a.T @ h_a, mixed.T @ mixed, 0.5)
    np.testing.assert_allclose(np.linalg.svd(whitened, compute_uv=False), np.ones(8), atol=1e-4)


def test_whitening_does_not_amplify_undetermined_directions(rng):
    h = deficient_rows(rng, offset=0.0)
    rotation = polar(whiten(h.T @ h, h.T @ h, h.T @ h, 0.5))
    assert int(rotation.rank) == WIDTH + 1
    np.testing.assert_allclose(matrix(rotation), reference(np.float64(h).T @ h, WIDTH + 1), atol=2e-3)
    np.testing.assert_array_equal(
        whiten(jnp.zeros((3, 4)), jnp.zeros((3, 3)), jnp.zeros((4, 4)), 0.4), np.zeros((3, 4))
    )


def test_errors_name_the_option_and_the_way_out():
    c, eye = jnp.eye(3), jnp.eye(3)
    cases = {
        "complete must be one of": lambda: polar(c, complete="ones"),
        "method must be one of": lambda: polar(c, method="qr"),
        "gram.*withdrawn.*polar": lambda: polar(c, method="gram"),
        "no rank, found complete='zero', rank=2": lambda: polar(c, method="polar", rank=2),
        "no rank, found complete='eye'": lambda: polar(c, method="polar", complete="eye"),
        "needs rank": lambda: polar(c, method="randomised"),
        "rank must be": lambda: polar(c, rank=0),
        r"fraction in \(0, 1\]": lambda: polar(c, rank=1.5),
        "must be a matrix": lambda: polar(jnp.zeros((2, 3, 4))),
        "must chain": lambda: polar_of_product(c, jnp.eye(2), c),
        "power must lie": lambda: whiten(c, eye, eye, 0.6),
        "needs Gram matrices": lambda: whiten(c, jnp.eye(2), eye, 0.4),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
