import numpy as np
import pytest
from PIL import Image

from tvjax.data import open_examples


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
        found = open_examples(f"{folder}/{source}", ("cat", "dog"))
        assert found.name == f"{folder}/{source}" and found.class_names == ("cat", "dog")
        np.testing.assert_array_equal(np.stack(list(found)), pixels)
        assert found.labels.tolist() == [0, 0, 1, 1]
    half = open_examples(f"{folder}/folder?part=0:0.5")
    rest = open_examples(f"{folder}/folder?part=0.5:1")
    assert half.labels.tolist() == rest.labels.tolist() == [0, 1]
    assert not set(half.keys) & set(rest.keys)


NAMES = ["AnnualCrop", "apple_pie", "sea"]


@pytest.fixture
def everywhere(tmp_path):
    """The same three images as a folder, an archive, and datasets of numbers and of texts."""
    datasets = pytest.importorskip("datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), np.uint8)
    for name, image in zip(NAMES, pixels, strict=True):
        (tmp_path / "folder" / name).mkdir(parents=True)
        Image.fromarray(image).save(tmp_path / "folder" / name / "0.png")
    np.savez(tmp_path / "archive.npz", images=pixels, labels=[0, 1, 2], class_names=NAMES)
    rows = [str(tmp_path / "folder" / name / "0.png") for name in NAMES]
    for kind, labels, feature in (
        ("numbers", [0, 1, 2], datasets.ClassLabel(names=NAMES)), ("texts", NAMES, datasets.Value("string"))
    ):  # fmt: skip
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        datasets.Dataset.from_dict({"image": rows, "label": labels}, features=features).save_to_disk(tmp_path / kind)
    return [f"{tmp_path}/folder", f"{tmp_path}/archive.npz", f"hf:{tmp_path}/numbers", f"hf:{tmp_path}/texts"]


@pytest.mark.parametrize("given", [None, NAMES, ["AnnualCrop", "apple pie", "sea"]])
def test_every_place_spells_names_alike(everywhere, given):
    for source in everywhere:
        found = open_examples(source, given)
        assert found.class_names == ("AnnualCrop", "apple pie", "sea") and found.labels.tolist() == [0, 1, 2], source
        if given is None:
            assert found.notes == ("underscores in class names are spaces: 'apple_pie' is 'apple pie'",)


def test_lists_with_a_name_twice_are_of_numbered_classes(everywhere):
    folder, archive, numbers, texts = everywhere
    for source in (archive, numbers):
        found = open_examples(source, ["missile", "pie", "missile"])
        assert found.labels.tolist() == [0, 1, 2] and "'missile' is 0 and 2" in found.notes[-1]
    for source in (folder, texts):
        assert open_examples(source, [*NAMES, "missile", "missile"]).labels.tolist() == [0, 1, 2]
        with pytest.raises(ValueError, match=r"'apple pie' by name, .* more than once \(classes 1, 3\)"):
            open_examples(source, [*NAMES, "apple pie"])


def test_a_question_mark_in_a_path_is_a_path(places):
    folder, _ = places
    (folder / "folder").rename(folder / "who?part=0:1")
    assert len(open_examples(str(folder / "who?part=0:1"))) == 4


def test_the_digits():
    found = open_examples("digits:base/validation?seed=3")
    again, other = open_examples("digits:base/validation?seed=3"), open_examples("digits:base/validation")
    assert found.sha256() == again.sha256() != other.sha256()
    assert found[0].shape == (16, 16, 3) and np.bincount(found.labels).tolist() == [20] * 10
    assert open_examples("digits:base/validation", list("0123456789")).class_names[3] == "3"


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
        open_examples(source)
