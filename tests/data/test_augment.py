import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tvjax.data.augment import StrongView, WeakView

KEY = jax.random.key(0)


@pytest.fixture
def inputs():
    images = np.random.default_rng(0).uniform(-1, 1, (6, 16, 12, 3))
    return {"pixels": jnp.asarray(images, jnp.float32), "other": jnp.arange(6)}


@pytest.mark.parametrize("view", [WeakView(), StrongView(0.5, 0.5), StrongView((0.5, 0.4, 0.6), (0.2, 0.3, 0.5))])
def test_views_keep_shapes_ranges_and_other_inputs_and_depend_on_the_key(view, inputs):
    one, again, other = (jax.jit(view)(jax.random.key(seed), inputs) for seed in (0, 0, 1))
    assert one["pixels"].shape == inputs["pixels"].shape and one["pixels"].dtype == jnp.float32
    np.testing.assert_array_equal(one["other"], inputs["other"])
    np.testing.assert_array_equal(one["pixels"], again["pixels"])
    assert np.abs(one["pixels"] - other["pixels"]).max() > 0.1
    if isinstance(view, StrongView):
        mean, std = (jnp.asarray(v) for v in (view.mean, view.std))
        low, high = (0 - mean) / std, (1 - mean) / std
        assert (one["pixels"] >= low - 1e-5).all() and (one["pixels"] <= high + 1e-5).all()


def test_a_weak_view_is_a_shift_or_a_mirrored_one(inputs):
    found = np.asarray(WeakView(shift=0.125)(KEY, inputs)["pixels"])
    mirrored = 0
    for image, view in zip(np.asarray(inputs["pixels"]), found, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="edge")
        shifts = [padded[r : r + 16, c : c + 12] for r in range(5) for c in range(5)]
        plain, flipped = (any(np.array_equal(s, v) for s in shifts) for v in (view, view[:, ::-1]))
        assert plain or flipped
        mirrored += flipped
    assert 0 < mirrored < 6
    still = WeakView(shift=0.0, flip=False)(KEY, inputs)["pixels"]
    np.testing.assert_array_equal(still, inputs["pixels"])


def test_at_strength_zero_nothing_but_the_square_changes(inputs):
    calm = WeakView(shift=0.0, flip=False)
    same = StrongView(0.5, 0.5, strength=0.0, hidden=0.0, weak=calm)(KEY, inputs)["pixels"]
    np.testing.assert_allclose(same, inputs["pixels"], atol=0.01)  # posterise at strength 0 keeps 256 steps
    part = StrongView(0.5, 0.5, strength=0.0, hidden=0.25, weak=calm)(KEY, inputs)["pixels"]
    changed = (np.abs(part - same) > 0.02).any(-1)
    assert (changed.sum((1, 2)) <= 4 * 3).all() and (changed.sum((1, 2)) > 0).all()
    rows = np.flatnonzero(changed[0].any(1))
    assert rows.max() - rows.min() < 4
