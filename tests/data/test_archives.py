import numpy as np
import pytest

from tvjax.data.archives import read_archive

PIXELS = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
LABELS = np.array([1, 0, 1, 1])


@pytest.fixture
def archive(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "images.npz", **arrays)
        return tmp_path / "images.npz"

    return write


def test_images_labels_and_names(archive):
    found = read_archive(archive(images=PIXELS, labels=LABELS, class_names=["cat", "dog"]))
    assert found.class_names == ("cat", "dog") and found.labels.tolist() == LABELS.tolist()
    np.testing.assert_array_equal(found[2], PIXELS[2][..., None].repeat(3, -1))


def test_other_names_of_arrays_and_columns_of_labels(archive):
    file = archive(test_images=PIXELS, test_labels=LABELS[:, None])
    found = read_archive(file, ("cat", "dog"), images="test_images", labels="test_labels")
    assert found.labels.tolist() == LABELS.tolist() and found.class_names == ("cat", "dog")
    assert read_archive(file, images="test_images", labels="").labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": PIXELS, "y": LABELS}, "no array 'images' and no array 'labels', only x, y"),
        ({"images": PIXELS}, "no array 'labels', only images"),
        ({"images": PIXELS, "labels": LABELS}, "numbers without names"),
        ({"images": PIXELS[0], "labels": LABELS, "class_names": ["a", "b"]}, r"'images' has the shape \[6, 5\]"),
        ({"images": PIXELS, "labels": LABELS + 1, "class_names": ["a", "b"]}, "labels from 1 to 2, expected 0 to 1"),
        ({"images": PIXELS, "labels": LABELS[:3], "class_names": ["a", "b"]}, r"shape \(3,\)"),
        ({"images": PIXELS[:0], "labels": LABELS[:0], "class_names": ["a", "b"]}, "has no images"),
        ({"images": PIXELS, "labels": np.array([0, 1, None, "a"], object)}, "is no numpy archive of images"),
    ],
)
def test_archives_without_the_arrays(archive, arrays, message):
    with pytest.raises(ValueError, match=f"images.npz'.*{message}"):
        read_archive(archive(**arrays))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04broken"])
def test_files_that_are_no_archives(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match="bad.npz' is no numpy archive"):
        read_archive(tmp_path / "bad.npz")


def test_one_array_is_no_archive(tmp_path):
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, PIXELS)
    with pytest.raises(ValueError, match="one array"):
        read_archive(tmp_path / "one.npz")
    with pytest.raises(ValueError, match="there is no archive"):
        read_archive(tmp_path / "none.npz")
