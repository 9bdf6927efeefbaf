"""Images in folders, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tvjax.data.images import Images, read_file

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def read_folder(folder: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> Images:
    """The images of a folder whose subfolders are the classes, in the order of names.

    Args:
      folder: a folder of folders of images, or of images without classes; files of other kinds are left alone.
      class_names: the classes in the order of a model's outputs; None: the subfolders, sorted. Underscores in the
        names of folders count as spaces.

    Returns:
      The images, none of them read yet.

    Raises:
      ValueError: for a folder that is not there, a class without images, images beside the classes, or a subfolder
        that is none of the given classes.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "polar_bear").mkdir()
    ...     Image.new("RGB", (4, 3)).save(Path(folder) / "polar_bear" / "1.png")
    ...     found = read_folder(folder)
    ...     found.class_names, found.labels.tolist(), found[0].shape
    (('polar bear',), [0], (3, 4, 3))
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{str(folder)!r} is a file: give a folder of images, or an archive that ends in .npz")
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}: give one whose subfolders are the classes")
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise ValueError(f"{str(folder)!r} is a saved Hugging Face dataset: give it as 'hf:{folder}'")
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir())
    loose = _images(folder)
    if not subfolders:
        if not loose:
            raise ValueError(
                f"{str(folder)!r} has no subfolders and no images: put the images of each class into a folder of its "
                "name"
            )
        return Images(str(folder), loose, read_file)
    if loose:
        raise ValueError(
            f"{str(folder)!r} has {len(loose)} images beside its subfolders ({loose[0].name}, ...), which are in no "
            "class: move or remove them"
        )
    classes: dict[str, Path] = {}
    for path in subfolders:
        name = path.name.replace("_", " ")
        if name in classes:
            raise ValueError(f"{str(folder)!r} has two folders of the class {name!r}: put their images into one")
        classes[name] = path
    names = tuple(classes) if class_names is None else tuple(class_names)
    surplus = sorted(classes.keys() - set(names))
    if surplus:
        raise ValueError(f"{str(folder)!r} has the subfolders {surplus}, which are none of the classes {list(names)}")
    files: list[Path] = []
    labels: list[int] = []
    for name, path in classes.items():
        own = _images(path)
        if not own:
            raise ValueError(f"{str(path)!r} has no images ({', '.join(SUFFIXES)}): remove it, or put some there")
        files += own
        labels += [names.index(name)] * len(own)
    return Images(str(folder), files, read_file, np.array(labels, np.int32), names)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
