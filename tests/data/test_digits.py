import itertools
import subprocess
import sys
from pathlib import Path

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
    images = parts["validation"].images[:100]
    photos = style(images, jax.random.key(0))
    assert photos.shape == (100, digits.SIZE, digits.SIZE, 3) and photos.dtype == np.float32
    assert 0 <= photos.min() and photos.max() <= 1 and photos.std() > 0.05
    np.testing.assert_array_equal(photos, style(images, jax.random.key(0)))
    assert np.abs(photos - style(images, jax.random.key(1))).max() > 0.1


@pytest.mark.parametrize(("name", "axes"), [("mirrored", (2,)), ("upside_down", (1, 2)), ("flipped", (1,))])
def test_turned_pages_are_those_of_base_but_for_the_grain(parts, name, axes):
    images = parts["validation"].images[:100]
    base, turned = (style(images, jax.random.key(0)) for style in (digits.BASE, digits.STYLES[name]))
    assert np.abs(turned - np.flip(base, axes)).mean() < 0.06
    assert np.abs(turned - base).mean() > 0.09


def test_photograph_repeats_images_with_other_draws(parts):
    few = digits.Digits(parts["test"].images[:50], parts["test"].labels[:50])
    batch = digits.photograph(few, digits.BASE, jax.random.key(0), repeats=2)
    assert batch.labels.tolist() == [*few.labels, *few.labels]
    pixels = batch.inputs["pixels"]
    assert pixels.shape == (100, 16, 16, 3) and -1 <= pixels.min() < 0 < pixels.max() <= 1
    assert np.abs(pixels[:50] - pixels[50:]).max() > 0.1


def test_photographs_of_photographs_are_refused():
    with pytest.raises(ValueError, match=r"found shape \(2, 16, 16, 3\), expected \[n, 8, 8\]"):
        digits.BASE(np.zeros((2, 16, 16, 3)), jax.random.key(0))


def test_the_archive_names_its_source_and_licence_and_no_scikit_learn_is_needed():
    file = Path(digits.__file__).with_name("digits.npz")
    assert file.stat().st_size < 64 * 1024
    with np.load(file, allow_pickle=False) as stored:
        assert "C50P49" in str(stored["source"]) and str(stored["licence"]).startswith("CC BY 4.0")
    code = "import sys; sys.modules['sklearn'] = None; from tvjax.data.digits import load_splits; load_splits()"
    subprocess.run([sys.executable, "-c", code], check=True)
