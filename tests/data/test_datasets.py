"""Hugging Face datasets on disk, with encoded images and with arrays."""

import io
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from tvjax.data import open_examples, read_dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
LABELS = [0, 1, 1, 2, 0, 2]
NAMES = ["ant", "bee", "cow"]


def encoded(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return {"bytes": content.getvalue(), "path": None}


def dataset(labels=LABELS, feature=None, image="image", label="label", **more):
    rows = {image: [encoded(one) for one in PIXELS], label: labels, **more}
    features = datasets.Features(
        {
            image: datasets.Image(),
            label: feature or datasets.ClassLabel(names=NAMES),
            **{name: datasets.Value("string") for name in more},
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    one = dataset(caption=["x"] * 6)
    one.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": one, "test": one.select([4, 1])}).save_to_disk(folder / "two")
    return folder


def test_images_and_classes(saved):
    found = read_dataset(str(saved / "one"))
    assert found.class_names == tuple(NAMES) and found.labels.tolist() == LABELS
    np.testing.assert_array_equal(np.stack(list(found)), PIXELS)
    np.testing.assert_array_equal(found.take([3])[0], PIXELS[3])


def test_splits_by_the_text(saved):
    found = open_examples(f"hf:{saved}/two?split=test")
    assert found.labels.tolist() == [0, 1] and found.name == f"hf:{saved}/two?split=test"
    np.testing.assert_array_equal(found[1], PIXELS[1])
    assert len(open_examples(f"hf:{saved}/two?split=train&part=0:0.5")) == 3
    assert len(open_examples(f"hf:{saved}/one", ["a", "b", "c"]).class_names) == 3


def test_a_folder_that_load_dataset_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    dataset().to_parquet(tmp_path / "set" / "train.parquet")
    found = open_examples(f"hf:{tmp_path}/set?split=train[:4]")
    assert found.labels.tolist() == LABELS[:4] and found.class_names == tuple(NAMES)
    np.testing.assert_array_equal(found[2], PIXELS[2])


def test_other_columns_and_kinds_of_labels(tmp_path):
    dataset([NAMES[i] for i in LABELS], datasets.Value("string"), "img", "animal").save_to_disk(tmp_path / "texts")
    found = read_dataset(str(tmp_path / "texts"), image="img", label="animal")
    assert found.class_names == tuple(NAMES) and found.labels.tolist() == LABELS
    order = read_dataset(str(tmp_path / "texts"), ["cow", "bee", "ant"], label="animal")
    assert order.labels.tolist() == [2 - label for label in LABELS]
    assert read_dataset(str(tmp_path / "texts"), label="").labels is None
    with pytest.raises(ValueError, match=r"has the classes \['cow'\], which are none of"):
        read_dataset(str(tmp_path / "texts"), ["ant", "bee"], label="animal")

    dataset(feature=datasets.Value("int64")).save_to_disk(tmp_path / "numbers")
    assert read_dataset(str(tmp_path / "numbers"), NAMES).labels.tolist() == LABELS
    with pytest.raises(ValueError, match="numbers without names"):
        read_dataset(str(tmp_path / "numbers"))
    with pytest.raises(ValueError, match="labels from 0 to 2, expected 0 to 1"):
        read_dataset(str(tmp_path / "numbers"), NAMES[:2])


def test_images_as_arrays(tmp_path):
    features = {"pixels": datasets.Array3D((5, 4, 3), "uint8"), "label": datasets.ClassLabel(names=NAMES)}
    rows = {"pixels": list(PIXELS), "label": LABELS}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "arrays")
    np.testing.assert_array_equal(read_dataset(str(tmp_path / "arrays"), image="pixels")[5], PIXELS[5])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("two", "has the splits train, test; found no split"),
        ("two?split=val", "has the splits train, test; found split=val"),
        ("one?split=test", "is one split"),
        ("one?revision=main", "no config and no revision"),
        ("one?image=img", "no column 'img'; its columns are image, label, caption: name one with image=COLUMN"),
        ("one?image=caption", r"the image 0 of .* has the shape \[\], expected"),
        ("one?label=fine", "no column 'fine'; its columns are image, label, caption: name one with label=COLUMN"),
        ("none", "none' cannot be read"),
    ],
)
def test_what_is_not_in_the_dataset(saved, source, message):
    with pytest.raises(ValueError, match=message):
        open_examples(f"hf:{saved}/{source}")[0]


def test_rows_without_images_or_classes(tmp_path):
    dataset([0, None, 1, 2, 0, 2]).save_to_disk(tmp_path / "gaps")
    with pytest.raises(ValueError, match="1 rows have nothing in the column 'label'"):
        read_dataset(str(tmp_path / "gaps"))
    dataset([0, -1, 1, 2, 0, 2]).save_to_disk(tmp_path / "hidden")
    with pytest.raises(ValueError, match="labels from -1 to 2"):
        read_dataset(str(tmp_path / "hidden"))
    rows = {"image": [encoded(PIXELS[0]), {"bytes": b"no image", "path": None}, None], "label": [0, 1, 2]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "bad")
    found = read_dataset(str(tmp_path / "bad"))
    with pytest.raises(ValueError, match="the image 1 of 'hf:.*bad' cannot be read"):
        found[1]
    with pytest.raises(ValueError, match="the image 2 of 'hf:.*bad' is empty"):
        found[2]


def test_files_that_are_no_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.json").write_text('{"a": 1}')
    (tmp_path / "set" / "b.json").write_text('{"b": {"c": 2}}')
    with pytest.raises(ValueError, match="set' (cannot be read|has no columns)"):
        open_examples(f"hf:{tmp_path}/set")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'tvjax\[datasets\]'"):
        open_examples("hf:tanganke/dtd?split=test")
