import itertools

import jax
import numpy as np
import pytest

from tvjax.data import digits

FINGERPRINTS = {
    "source": "f52318acc4299792",
    "target": "ff5f1167ae51da6d",
    "validation": "8380ba47a5a160a5",
    "test": "7a1159e066e15037",
}


@pytest.fixture(scope="module")
def parts():
    return digits.load_splits()


def test_splits_are_disjoint_and_complete(parts):
    images = {name: {image.tobytes() for image in part.images} for name, part in parts.items()}
    for one, other in itertools.combinations(images, 2):
        assert not images[one] & images[other], (one, other)
    assert sum(len(part.labels) for part in parts.values()) == 1797


def test_splits_are_those_recorded(parts):
    assert {name: digits.fingerprint(part) for name, part in parts.items()} == FINGERPRINTS


def test_splits_hold_every_class_equally_often(parts):
    for name, count in digits.PER_CLASS.items():
        assert np.bincount(parts[name].labels).tolist() == [count] * 10
    assert np.bincount(parts["test"].labels).min() > 40


@pytest.mark.parametrize("name", ["base", *digits.STYLES])
def test_style_is_a_pure_function_of_images_and_key(parts, name):
    style = {"base": digits.BASE, **digits.STYLES}[name]
    images = parts["validation"].images[::50]
    photos = style(images, jax.random.key(0))
    assert photos.shape == (4, digits.SIZE, digits.SIZE, 3) and photos.dtype == np.float32
    assert 0 <= photos.min() and photos.max() <= 1 and photos.std() > 0.05
    np.testing.assert_array_equal(photos, style(images, jax.random.key(0)))
    assert np.abs(photos - style(images, jax.random.key(1))).max() > 0.1


def test_mirrored_is_the_mirror_image_of_base(parts):
    """Geometry draws from the same keys, so it is the mirror image up to the chance turn, and no other map is nearer."""
    images = parts["validation"].images
    inks = [1 - np.asarray(style(images, jax.random.key(0))).mean(-1) for style in digits.STYLES.values()]
    mirrored = dict(zip(digits.STYLES, inks, strict=True))["mirrored"]
    base = 1 - np.asarray(digits.BASE(images, jax.random.key(0))).mean(-1)

    def correlation(a, b):
        return np.corrcoef(a.mean(0).ravel(), b.mean(0).ravel())[0, 1]

    candidates = {"flipped": base[:, :, ::-1], "same": base, "upside_down": base[:, ::-1, ::-1]}
    likeness = {
        name: np.mean(
            [correlation(mirrored[labels], image[labels]) for labels in _by_class(parts["validation"].labels)]
        )
        for name, image in candidates.items()
    }
    assert max(likeness, key=likeness.get) == "flipped" and likeness["flipped"] > 0.9


def _by_class(labels):
    return [np.flatnonzero(labels == label) for label in range(10)]


def test_photograph_repeats_images_with_other_draws(parts):
    few = digits.Digits(parts["test"].images[:3], parts["test"].labels[:3])
    batch = digits.photograph(few, digits.BASE, jax.random.key(0), repeats=2)
    assert batch.labels.tolist() == [*few.labels, *few.labels]
    pixels = batch.inputs["pixels"]
    assert pixels.shape == (6, 16, 16, 3) and -1 <= pixels.min() < 0 < pixels.max() <= 1
    assert np.abs(pixels[:3] - pixels[3:]).max() > 0.1


def test_photographs_of_photographs_are_refused():
    with pytest.raises(ValueError, match=r"found shape \(2, 16, 16, 3\), expected \[n, 8, 8\]"):
        digits.BASE(np.zeros((2, 16, 16, 3)), jax.random.key(0))
