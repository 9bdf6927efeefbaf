import numpy as np
import pytest
from PIL import Image

from tvjax.data.folders import read_folder


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
    assert [image.shape for image in found] == [(5, 4, 3), (6, 4, 3)] * 2
    assert found[0][0, 0, 0] == 200 and found.keys[2].parent.name == "tabby_cat"


def test_labels_follow_the_given_order_of_classes(folder):
    assert read_folder(folder, ("bird", "tabby cat", "dog")).labels.tolist() == [2, 2, 1, 1]


def test_images_without_classes(folder):
    found = read_folder(folder / "dog")
    assert len(found) == 2 and found.labels is None and found.class_names == ()


def test_unknown_classes_are_refused(folder):
    with pytest.raises(ValueError, match=r"\['tabby cat'\], which are none of the classes"):
        read_folder(folder, ("dog",))


def test_folders_that_are_no_images(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        read_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        read_folder(__file__)
    with pytest.raises(ValueError, match="has no subfolders and no images"):
        read_folder(tmp_path)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="saved Hugging Face dataset: give it as 'hf:"):
        read_folder(tmp_path)


def test_classes_without_images_or_twice_and_images_without_class_are_refused(folder):
    (folder / "bird").mkdir()
    with pytest.raises(ValueError, match="bird' has no images"):
        read_folder(folder)
    (folder / "bird").rmdir()
    (folder / "tabby cat").mkdir()
    with pytest.raises(ValueError, match="two folders of the class 'tabby cat'"):
        read_folder(folder)
    Image.new("RGB", (2, 2)).save(folder / "stray.png")
    with pytest.raises(ValueError, match=r"1 images beside its subfolders \(stray.png"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"no image", "cannot be read"), (None, "cannot be read")]
)
def test_bad_images_are_named(folder, content, message):
    file = folder / "dog" / "bad.png"
    whole = (folder / "dog" / "0.png").read_bytes()
    file.write_bytes(whole[:50] if content is None else content)
    with pytest.raises(ValueError, match=f"bad.png' {message}"):
        list(read_folder(folder))
    if content is not None:  # the hash reads headers, so that nothing long begins
        with pytest.raises(ValueError, match=f"bad.png' {message}"):
            read_folder(folder).sha256()
