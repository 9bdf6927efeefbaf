import numpy as np
import pytest
from PIL import Image

from tvjax.data.images import read_folder, read_image


@pytest.fixture
def folder(tmp_path):
    for name, shade in (("tabby_cat", 10), ("dog", 200)):
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(np.full((5 + i, 4, 3), shade, np.uint8)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    return tmp_path


def test_classes_are_the_subfolders(folder):
    found = read_folder(folder)
    assert found.class_names == ("dog", "tabby cat")
    assert found.labels.tolist() == [0, 0, 1, 1] and found.labels.dtype == np.int32
    assert [image.shape for image in found.images] == [(5, 4, 3), (6, 4, 3)] * 2
    assert found.images[0][0, 0, 0] == 200 and found.files[2].parent.name == "tabby_cat"


def test_labels_follow_the_given_order_of_classes(folder):
    assert read_folder(folder, ("bird", "tabby cat", "dog")).labels.tolist() == [2, 2, 1, 1]


def test_grey_and_transparent_images_become_rgb(tmp_path):
    Image.fromarray(np.full((3, 3), 7, np.uint8)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (3, 3, 3)


def test_unknown_classes_are_refused(folder):
    with pytest.raises(ValueError, match=r"\['tabby cat'\], which are none of the classes"):
        read_folder(folder, ("dog",))


def test_missing_and_flat_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no subfolders"):
        read_folder(tmp_path)


def test_a_class_without_images_is_refused(folder):
    (folder / "bird").mkdir()
    with pytest.raises(ValueError, match="bird' has no images"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"no image", "cannot be read"), (None, "cannot be read")]
)
def test_bad_images_are_named(folder, content, message):
    file = folder / "dog" / "bad.png"
    whole = (folder / "dog" / "0.png").read_bytes()
    file.write_bytes(whole[:50] if content is None else content)
    with pytest.raises(ValueError, match=f"bad.png' {message}"):
        read_folder(folder)


def test_an_absent_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no image"):
        read_image(tmp_path / "absent.png")
