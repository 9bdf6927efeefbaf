"""Images in numpy archives."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tvjax.data.examples import with_names
from tvjax.data.images import Images


def read_archive(
    file: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    images: str = "images",
    labels: str = "labels",
) -> Images:
    """The images of a numpy archive (``.npz``), held in memory as they are stored; no pickle is opened.

    Args:
      file: holds arrays of images ``[n, height, width, 3]`` or ``[n, height, width]``, 8-bit values or numbers from 0
        to 1; of labels ``[n]``, integers; and, if it likes, of names, ``class_names``.
      class_names: the names in the order of the labels; None: those of the archive.
      images: name of the array of images.
      labels: name of the array of labels; "" for images without.

    Returns:
      The images.

    Raises:
      ValueError: for no archive, arrays that are not there or do not fit, labels out of range, or no class names.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "photos.npz"
    ...     np.savez(file, images=np.zeros((2, 4, 4), np.uint8), labels=[1, 0], class_names=["cat", "dog"])
    ...     found = read_archive(file)
    >>> found.class_names, found.labels.tolist(), found[1].shape
    (('cat', 'dog'), [1, 0], (4, 4, 3))
    """
    name = str(file)
    if not Path(file).is_file():
        raise ValueError(f"there is no archive {name!r}")
    try:
        with open(file, "rb") as opened:
            archive = np.load(opened, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array and no names")
            wanted = [images, *([labels] if labels else [])]
            absent = [repr(array) for array in wanted if array not in archive.files]
            if absent:
                raise ValueError(f"it has no array {' and no array '.join(absent)}, only {', '.join(archive.files)}")
            pixels = archive[images]
            numbers = archive[labels] if labels else None
            own = [str(one) for one in archive["class_names"]] if "class_names" in archive.files else []
    except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{name!r} is no numpy archive of images: {error}") from error
    if pixels.ndim not in (3, 4):
        raise ValueError(
            f"{name!r}: {images!r} has the shape {list(pixels.shape)}, expected [n, height, width, 3] or "
            "[n, height, width]"
        )
    if numbers is None:
        return Images(name, range(len(pixels)), pixels.__getitem__)
    if numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    names = with_names(name, own, class_names)
    return Images(name, range(len(pixels)), pixels.__getitem__, numbers, names)
