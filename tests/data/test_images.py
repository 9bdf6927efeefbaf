import numpy as np
import pytest
from PIL import Image

from tvjax.data.examples import by_name, spelled, with_names
from tvjax.data.images import Images, read_image
from tvjax.tasks.catalogue import TASKS


def shades(values, labels=None, names=()):
    """Grey images of these shades."""
    pixels = np.array(values, np.uint8)[:, None, None].repeat(3, 1).repeat(4, 2)
    return Images("shades", range(len(pixels)), pixels.__getitem__, labels, names)


def test_images_are_read_when_they_are_asked_for():
    read = []

    def reader(key):
        read.append(key)
        return np.full((2, 2, 3), key, np.uint8)

    images = Images("many", range(100), reader, np.arange(100) % 3, ("a", "b", "c"))
    few = images.take([7, 3]).take([1])
    assert read == [] and len(few) == 1 and few.labels.tolist() == [0]
    assert few[0][0, 0].tolist() == [3, 3, 3] and read == [3]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.full((2, 3), 7, np.uint8), 7),
        (np.full((2, 3, 1), 7, np.uint8), 7),
        (np.full((2, 3, 3), 7, np.uint8), 7),
        (np.full((2, 3), 0.2, np.float32), 51),
    ],
)
def test_arrays_of_one_or_three_channels_become_rgb(pixels, expected):
    image = Images("arrays", [0], lambda _: pixels)[0]
    assert image.shape == (2, 3, 3) and image.dtype == np.uint8 and (image == expected).all()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"shape \[3, 8, 8\], expected \[height, width, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \[0, 8, 3\]"),
        (np.full((2, 2), 300, np.int64), "is int64, expected uint8"),
        (np.full((2, 2), -1.0), "numbers from -1 to -1, expected 0 to 1"),
        (np.full((2, 2), np.nan), "numbers from nan"),
    ],
)
def test_arrays_that_are_no_images_are_named(pixels, message):
    with pytest.raises(ValueError, match=f"the image 0 of 'arrays' .*{message}"):
        Images("arrays", [0], lambda _: pixels)[0]


def test_shares_are_disjoint_complete_and_of_each_class():
    images = shades(range(40), np.arange(40) % 2, ("even", "odd"))
    parts = [images.split(*bounds) for bounds in ((0, 0.6), (0.6, 0.8), (0.8, 1))]
    seen = [[int(image[0, 0, 0]) for image in part] for part in parts]
    assert sorted(sum(seen, [])) == list(range(40))
    assert [np.bincount(part.labels).tolist() for part in parts] == [[12, 12], [4, 4], [4, 4]]
    assert seen[0] != [int(image[0, 0, 0]) for image in images.split(0, 0.6, seed=1)]


def test_shares_depend_on_content_and_on_no_order():
    order = np.random.default_rng(0).permutation(30)
    part, shuffled = shades(range(30)).split(0, 0.5), shades(order).split(0, 0.5)
    assert sorted(image[0, 0, 0] for image in part) == sorted(image[0, 0, 0] for image in shuffled)


def test_equal_images_are_in_one_share():
    images = shades([1, 2, 3, 4] * 5)
    one, other = ({int(image[0, 0, 0]) for image in images.split(*bounds)} for bounds in ((0, 0.5), (0.5, 1)))
    assert one | other == {1, 2, 3, 4} and not one & other


def test_shares_that_cannot_be():
    for bounds in ((0.5, 0.5), (0.5, 0.1), (-1, 1), (0, 2), (float("nan"), 1)):
        with pytest.raises(ValueError, match="from one number to a greater one"):
            shades([1, 2]).split(*bounds)
    with pytest.raises(ValueError, match="share 0.9:1 of 'shades' has no images"):
        shades([1, 2]).split(0.9, 1)


def test_the_hash_is_of_content_labels_and_order():
    images = shades([1, 2, 3], np.array([0, 1, 1]), ("a", "b"))
    again = shades([1, 2, 3], np.array([0, 1, 1], np.int64), ("c", "d"))
    assert images.sha256() == again.sha256() and len(images.sha256()) == 64
    others = [
        shades([1, 2, 4], images.labels, ("a", "b")),
        shades([1, 2, 3], np.array([0, 0, 1]), ("a", "b")),
        shades([1, 2, 3]),
        images.take([1, 0, 2]),
        images.take([0, 1]),
    ]
    assert len({images.sha256(), *(other.sha256() for other in others)}) == 6


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2], "labels from 0 to 2, expected 0 to 1, as it has 2 classes"),
        ([-1, 0], "labels from -1 to 0"),
        ([0], r"labels of shape \(1,\)"),
        ([0.0, 1.0], r"labels of shape \(2,\) and dtype float64, expected 2 integers"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"'shades' has {message}"):
        shades([1, 2], np.array(labels), ("a", "b"))


def test_numbered_classes_may_share_a_name():
    found = shades([1, 2, 3], np.array([0, 1, 2]), ("missile", "a", "missile"))
    assert found.labels.tolist() == [0, 1, 2] and found.class_names == ("missile", "a", "missile")
    (note,) = found.take([0, 1]).notes
    assert note == "classes of one name are not told apart, the first of them is predicted: 'missile' is 0 and 2"


def test_names_are_spelled_in_one_way():
    found = shades([1, 2, 3], np.array([0, 1, 2]), ("apple_pie", "AnnualCrop", "Speed limit (20km/h)"))
    assert found.class_names == ("apple pie", "AnnualCrop", "Speed limit (20km/h)")
    assert (
        found.take([0]).split(0, 1).notes
        == found.notes
        == ("underscores in class names are spaces: 'apple_pie' is 'apple pie'",)
    )
    for task in TASKS.values():
        assert all(spelled(name) == name for name in task.class_names), task.name
    with pytest.raises(ValueError, match="the class '__', which leaves no letter"):
        shades([1], np.array([0]), ("__",))


def test_classes_that_are_stored_by_name():
    assert by_name("x", ["a_b", "c"], None) == (("a_b", "c"), {"a_b": 0, "c": 1})
    assert by_name("x", ["a b", "a_b", "c"], None)[1] == {"a b": 0, "a_b": 0, "c": 1}
    assert by_name("x", ["a_b"], ["m", "m", "a b"]) == (("m", "m", "a b"), {"a_b": 2})
    with pytest.raises(ValueError, match=r"'x' has the class 'm' by name, .* more than once \(classes 0, 2\)"):
        by_name("x", ["m"], ["m", "a", "m"])


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="'nothing' has no images"):
        Images("nothing", [], lambda key: b"")


def test_names_of_numbered_classes():
    assert with_names("x", ["a", "b"], None) == ("a", "b")
    assert with_names("x", [], ["a"]) == ("a",)
    for own, given, message in (
        ([], None, "numbers without names"),
        (["a"], ["a", "b"], "has 1 classes, but 2 class names"),
        (["a", "b"], ["b", "a"], "in the order a, b, but the names are given as b, a"),
        (["Polar_Bear", "cat"], ["cat", "polar bear"], "in the order Polar_Bear, cat"),
    ):
        with pytest.raises(ValueError, match=message):
            with_names("x", own, given)


def test_grey_transparent_and_turned_images(tmp_path):
    Image.fromarray(np.full((3, 3), 7, np.uint8)).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (3, 3, 3)
    Image.new("RGBA", (2, 5), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png")[0, 0].tolist() == [1, 2, 3]
    turned = Image.new("RGB", (2, 5)).getexif()
    turned[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (2, 5)).save(tmp_path / "turned.jpg", exif=turned)
    assert read_image(tmp_path / "turned.jpg").shape == (2, 5, 3)


def test_images_of_more_than_8_bits(tmp_path):
    Image.fromarray(np.array([[0, 1000, 30000, 65535]], np.uint16)).save(tmp_path / "16.png")
    assert read_image(tmp_path / "16.png")[0, :, 1].tolist() == [0, 3, 117, 255]
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "32.tiff")
    with pytest.raises(ValueError, match="32.tiff' has numbers of 32 bits"):
        read_image(tmp_path / "32.tiff")


def test_an_absent_image_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no image"):
        read_image(tmp_path / "absent.png")
