"""Pairing of layers."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.align.depth import linear_cka, monotone_pairing, pair_layers


def test_uniform_rule():
    assert pair_layers(12, 24) == tuple(i // 2 for i in range(24))
    assert pair_layers(12, 12) == tuple(range(12))
    assert pair_layers(5, 1) == (0,)
    assert pair_layers(1, 3) == (0, 0, 0)
    # Halves go to even: j * 3 / 2 at j = 1 is 1.5, and j * 1 / 2 at j = 1 is 0.5.
    assert pair_layers(4, 3) == (0, 2, 3)
    assert pair_layers(2, 3) == (0, 0, 1)
    for depth_a, depth_b in itertools.product((2, 3, 12, 24), (2, 5, 6, 12, 32)):
        pairs = pair_layers(depth_a, depth_b)
        assert (pairs[0], pairs[-1], list(pairs)) == (0, depth_a - 1, sorted(pairs))


def test_explicit_rule():
    assert pair_layers(4, 3, rule=[0, 0, 3]) == (0, 0, 3)
    for message, rule in {
        "lists 2 source layers, the target has 3": [0, 1],
        r"source layers \[-1, 4\]": [0, 4, -1],
        "must be": "nearest",
    }.items():
        with pytest.raises(ValueError, match=message):
            pair_layers(4, 3, rule=rule)
    with pytest.raises(ValueError, match="at least one layer"):
        pair_layers(0, 3)


@pytest.mark.parametrize("n", [8, 100])
def test_cka_matches_float64_and_ignores_rotation_and_scale(n):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((n, 10)).astype(np.float32) + 5
    b = (a @ rng.standard_normal((10, 6)) + rng.standard_normal((n, 6))).astype(np.float32)
    x, y = (np.float64(h) - np.float64(h).mean(0) for h in (a, b))
    expected = np.linalg.norm(x.T @ y) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    np.testing.assert_allclose(linear_cka(a, b), expected, rtol=1e-4)
    turned = 300 * b @ np.linalg.qr(rng.standard_normal((6, 6)))[0].astype(np.float32)
    np.testing.assert_allclose(linear_cka(a, turned), expected, rtol=1e-4)
    assert float(linear_cka(a, jnp.ones((n, 3)))) == 0
    with pytest.raises(ValueError, match="must be aligned"):
        linear_cka(a, b[1:])


def test_monotone_pairing_beats_every_other():
    rng = np.random.default_rng(0)
    for depth_a, depth_b in ((3, 4), (4, 3), (1, 3), (3, 1)):
        scores = rng.standard_normal((depth_a, depth_b))

        def total(pairs, scores=scores):
            return sum(scores[i, j] for j, i in enumerate(pairs))

        pairs = monotone_pairing(scores)
        others = itertools.combinations_with_replacement(range(depth_a), depth_b)
        assert list(pairs) == sorted(pairs)
        assert total(pairs) == max(total(other) for other in others)
    with pytest.raises(ValueError, match="finite matrix"):
        monotone_pairing(np.full((2, 2), np.nan))
