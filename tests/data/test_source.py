import numpy as np
import pytest
from PIL import Image

from tvjax.data import open_images


@pytest.fixture
def places(tmp_path):
    """The same four images as a folder and as an archive."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), np.uint8)
    for i, name in enumerate(("cat", "cat", "dog", "dog")):
        (tmp_path / "folder" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(tmp_path / "folder" / name / f"{i}.png")
    labels = [0, 0, 1, 1]
    np.savez(tmp_path / "archive.npz", images=pixels, labels=labels, class_names=["cat", "dog"])
    np.savez(tmp_path / "other.npz", x=pixels, y=labels)
    return tmp_path, pixels


def test_every_place_gives_the_same_images(places):
    folder, pixels = places
    for source in ("folder", "archive.npz", "other.npz?images=x&labels=y"):
        found = open_images(f"{folder}/{source}", ("cat", "dog"))
        assert found.name == f"{folder}/{source}" and found.class_names == ("cat", "dog")
        np.testing.assert_array_equal(np.stack(list(found)), pixels)
        assert found.labels.tolist() == [0, 0, 1, 1]
    half = open_images(f"{folder}/folder?part=0:0.5")
    rest = open_images(f"{folder}/folder?part=0.5:1")
    assert half.labels.tolist() == rest.labels.tolist() == [0, 1]
    assert not set(half.keys) & set(rest.keys)


def test_a_question_mark_in_a_path_is_a_path(places):
    folder, _ = places
    (folder / "folder").rename(folder / "who?part=0:1")
    assert len(open_images(str(folder / "who?part=0:1"))) == 4


def test_the_digits():
    found = open_images("digits:base/validation?seed=3")
    again, other = open_images("digits:base/validation?seed=3"), open_images("digits:base/validation")
    assert found.sha256() == again.sha256() != other.sha256()
    assert found[0].shape == (16, 16, 3) and np.bincount(found.labels).tolist() == [20] * 10
    assert open_images("digits:base/validation", list("0123456789")).class_names[3] == "3"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("digits:thicc/test", "no style 'thicc': choose one of base, mirrored"),
        ("digits:thick", "no part '': choose one of source"),
        ("digits:thick/test?seed=x", "seed=x, expected a whole number"),
        ("digits:thick/test?splat=x", "found 'splat=x', expected each of seed=..., part=..., part_seed=..."),
        ("digits:thick/test?part=0:0.5&part=0:1", "at most once"),
        ("digits:thick/test?part=half", "part=half with part_seed=0"),
        ("digits:thick/test?part=0.5:0.2", "from one number to a greater one"),
        ("nowhere?part=0:1", "there is no folder 'nowhere'"),
        ("nowhere.npz", "there is no archive 'nowhere.npz'"),
    ],
)
def test_what_names_no_images(source, message):
    with pytest.raises(ValueError, match=message):
        open_images(source)
