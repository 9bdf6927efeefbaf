import shutil

import numpy as np
import pytest
from PIL import Image, features

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


def test_a_list_made_by_ls_fits_its_folder(folder):
    (folder / "README.md").write_text("about")
    (folder / "__MACOSX").mkdir()
    for names in (("README.md", "__MACOSX", "dog", "tabby_cat"), ("dog/", "tabby_cat/"), ("dog", "tabby cat")):
        found = read_folder(folder, names)
        assert found.class_names == ("dog", "tabby cat") and found.labels.tolist() == [0, 0, 1, 1]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "__MACOSX", "dog", "tabby_cat"]


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir"])
def test_hidden_and_service_folders_are_no_classes(folder, name):
    expected = read_folder(folder)
    for place in (folder / name, folder / "dog" / name):
        place.mkdir()
        shutil.copy(folder / "dog" / "0.png", place / "0-checkpoint.png")
    found = read_folder(folder)
    assert found.class_names == expected.class_names and found.keys == expected.keys
    (note,) = set(found.notes) - set(expected.notes)
    assert note.startswith("folders that are hidden or made by a system were passed over: ")
    assert note.count(name) == 2 and f"dog/{name}" in note
    shutil.rmtree(folder / "tabby_cat")
    shutil.copy(folder / "dog" / "0.png", folder / "dog" / "._0.png")  # the other half of a file of macOS
    assert [key.name for key in read_folder(folder / "dog").keys] == ["0.png", "1.png"]
    assert "1 .txt, 1 hidden" in read_folder(folder / "dog").notes[1]


KINDS = {
    "jfif": "JPEG", "jpe": "JPEG", "pgm": "PPM", "pbm": "PPM", "avif": "AVIF", "jp2": "JPEG2000", "": "PNG",
    "ABC": "WEBP",
}  # fmt: skip


@pytest.mark.parametrize("ending", KINDS)
def test_images_of_every_ending_count(folder, ending):
    needs = {"avif": "avif", "jp2": "jpg_2000", "ABC": "webp"}.get(ending)
    if needs is not None and needs not in features.get_supported():
        pytest.skip(f"this Pillow was built without {needs}")
    file = folder / "dog" / (f"photo.{ending}" if ending else "photo")
    Image.new({"pbm": "1", "pgm": "L"}.get(ending, "RGB"), (16, 12), 1).save(file, KINDS[ending])
    found = read_folder(folder)
    assert file in found.keys and found[found.keys.index(file)].shape == (12, 16, 3)


def test_files_that_are_no_images_are_counted_by_kind(folder):
    for name in ("a.heic", "b.HEIC", "c", "P5 is no header"):
        (folder / "dog" / name).write_bytes(b"P5 is no header")
    found = read_folder(folder)
    assert len(found) == 4 and found.notes[0] == "5 files are no images: 2 .heic, 1 .txt, 2 without ending"
    for file in (folder / "tabby_cat").iterdir():
        file.rename(file.with_suffix(".heic"))
        file.with_suffix(".heic").write_bytes(b"ftypheic")
    with pytest.raises(ValueError, match=r"tabby_cat' has no images \(2 .heic\): remove it"):
        read_folder(folder)


def test_images_in_folders_inside_a_class_count(folder):
    for place in ("dog/2020", "tabby_cat/a/b"):
        (folder / place).mkdir(parents=True)
        shutil.copy(folder / "dog" / "0.png", folder / place / "0.png")
    (folder / "dog" / "link").symlink_to(folder / "dog")
    found = read_folder(folder)
    assert found.labels.tolist() == [0] * 3 + [1] * 3
    assert "2 images lie in folders inside those of their classes (dog/2020, tabby_cat/a/b)" in found.notes
    assert any("1 links to folders" in note for note in found.notes)
    only = folder / "tabby_cat" / "a"
    for file in (folder / "tabby_cat").glob("*.png"):
        file.rename(only / file.name)
    assert read_folder(folder).labels.tolist() == [0] * 3 + [1] * 3


def test_splits_are_no_classes(folder):
    (folder / "all" / "train").mkdir(parents=True)
    for name in ("dog", "tabby_cat"):
        (folder / name).rename(folder / "all" / "train" / name)
    with pytest.raises(ValueError, match=r"train' has no images of its own, .*\(train/dog, ...\): it looks"):
        read_folder(folder / "all")
    assert read_folder(folder / "all" / "train").class_names == ("dog", "tabby cat")


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
