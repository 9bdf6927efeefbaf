"""Images in folders, one folder a class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class ImageFolder(NamedTuple):
    """Images with their classes.

    Attributes:
      images: arrays ``[height, width, 3]`` of 8-bit values, of any sizes.
      labels: ``[n]`` int32, indices of `class_names`.
      class_names: names of the folders, or those that were asked for.
      files: where each image was read.
    """

    images: list[np.ndarray]
    labels: np.ndarray
    class_names: tuple[str, ...]
    files: list[Path]


def read_folder(folder: str | os.PathLike[str], class_names: tuple[str, ...] | None = None) -> ImageFolder:
    """Reads the images of a folder whose subfolders are the classes, in the order of names.

    Args:
      folder: a folder of folders of images; files of other kinds are left alone.
      class_names: the classes in the order of a model's outputs; None: the subfolders, sorted. Underscores in the
        names of folders count as spaces.

    Returns:
      The images and their classes.

    Raises:
      ValueError: for a folder that is not there, a class without images, a subfolder that is none of the given
        classes, and an image that is empty or cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "polar_bear").mkdir()
    ...     Image.new("RGB", (4, 3)).save(Path(folder) / "polar_bear" / "1.png")
    ...     found = read_folder(folder)
    >>> found.class_names, found.labels.tolist(), found.images[0].shape
    (('polar bear',), [0], (3, 4, 3))
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}: give one whose subfolders are the classes")
    folders = {path.name.replace("_", " "): path for path in sorted(folder.iterdir()) if path.is_dir()}
    if not folders:
        raise ValueError(f"{str(folder)!r} has no subfolders: put the images of each class into a folder of its name")
    names = tuple(folders) if class_names is None else tuple(class_names)
    surplus = sorted(folders.keys() - set(names))
    if surplus:
        raise ValueError(f"{str(folder)!r} has the subfolders {surplus}, which are none of the classes {list(names)}")
    files: list[Path] = []
    labels: list[int] = []
    for name, path in folders.items():
        own = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not own:
            raise ValueError(f"{str(path)!r} has no images ({', '.join(SUFFIXES)}): remove it, or put some there")
        files += own
        labels += [names.index(name)] * len(own)
    return ImageFolder([read_image(file) for file in files], np.array(labels, np.int32), names, files)


def read_image(file: str | os.PathLike[str]) -> np.ndarray:
    """One image as ``[height, width, 3]`` 8-bit values.

    Raises:
      ValueError: for a file that is not there, is empty, or is no complete image.
    """
    file = Path(file)
    if file.is_file() and file.stat().st_size == 0:
        raise ValueError(f"the image {str(file)!r} is empty (0 bytes): remove it, or copy it again")
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {str(file)!r}") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"the image {str(file)!r} cannot be read ({error}): remove it, or copy it again") from error
