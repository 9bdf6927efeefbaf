"""Images with their classes, wherever they are stored: drawn and split by labels, decoded when they are asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = UInt8[np.ndarray, "height width 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images that stay where they are stored until they are asked for, with their classes.

    A sequence of arrays ``[height, width, 3]`` of 8-bit values, of any sizes: ``images[i]`` reads and decodes one.

    Attributes:
      name: of the whole, for messages and records.
      keys: what `read` takes, one for each image; a path is named in messages as it is.
      read: a key to what is stored: an encoded file's bytes, or an array of pixels.
      labels: ``[n]`` int32, indices of `class_names`; None where there are none.
      class_names: names of the classes, in the order of the labels, spelled as prompts have them (`spelled`). Numbered
        classes may share a name.
      notes: what a user should know of how they were read.

    Raises:
      ValueError: for no images, labels that are not one of the classes for each image, or a class without a name.

    >>> photos = np.zeros((3, 4, 5, 3), np.uint8)
    >>> images = Images("photos", range(3), photos.__getitem__, np.array([0, 1, 0]), ("cat", "dog"))
    >>> len(images), images[0].shape, images.take([2, 1]).labels.tolist()
    (3, (4, 5, 3), [0, 1])
    """

    name: str
    keys: Sequence[Any]
    read: Callable[[Any], bytes | np.ndarray]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.keys):
            raise ValueError(f"{self.name!r} has no images")
        names = tuple(spelled(name) for name in self.class_names)
        if "" in names:
            nameless = self.class_names[names.index("")]
            raise ValueError(
                f"{self.name!r} has the class {nameless!r}, which leaves no letter for a prompt: rename it"
            )
        notes = [*self.notes, *_notes_of_names(self.class_names, names)]
        object.__setattr__(self, "class_names", names)
        object.__setattr__(self, "notes", tuple(dict.fromkeys(notes)))
        if self.labels is None:
            return
        labels = np.asarray(self.labels)
        if labels.shape != (len(self.keys),) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{self.name!r} has labels of shape {labels.shape} and dtype {labels.dtype}, expected "
                f"{len(self.keys)} integers, the class of each image"
            )
        low, high, count = int(labels.min()), int(labels.max()), len(self.class_names)
        if low < 0 or high >= count:
            raise ValueError(
                f"{self.name!r} has labels from {low} to {high}, expected 0 to {count - 1}, as it has {count} classes"
            )
        object.__setattr__(self, "labels", labels.astype(np.int32))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Pixels:
        return _decode(self.read(self.keys[index]), self._place(index))

    def __iter__(self) -> Iterator[Pixels]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Sequence[int] | np.ndarray) -> Images:
        """The images at these indices; none is read."""
        chosen = np.asarray(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return dataclasses.replace(self, keys=[self.keys[index] for index in chosen], labels=labels)

    def part(self, start: float, stop: float, seed: int = 0) -> Images:
        """A share of each class, such as 0 to 0.8; shares that do not overlap have no image in common.

        Within a class the images are ordered by the SHA-256 of their stored content and the seed, and cut: the share
        depends on no order and on no random generator, and equal images of a class are on one side of a cut.

        Args:
          start: where the share starts, from 0 to 1.
          stop: where it ends.
          seed: another seed, another order.

        Raises:
          ValueError: for bounds that are none, or a share without images.

        >>> photos = np.arange(10, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
        >>> images = Images("photos", range(10), photos.__getitem__)
        >>> len(images.part(0, 0.8)), len(images.part(0.8, 1))
        (8, 2)
        """
        if not 0 <= start < stop <= 1:
            raise ValueError(f"a share goes from one number to a greater one, both from 0 to 1; found {start}:{stop}")
        salt = str(seed).encode()
        digests = [hashlib.sha256(salt + self._digest(index)).digest() for index in range(len(self))]
        groups = np.zeros(len(self), np.int32) if self.labels is None else self.labels
        chosen: list[int] = []
        for label in np.unique(groups):
            own = sorted(np.flatnonzero(groups == label), key=digests.__getitem__)
            rank = 0
            for place, index in enumerate(own):
                rank = rank if place and digests[index] == digests[own[place - 1]] else place
                if start <= rank / len(own) < stop:
                    chosen.append(int(index))
        if not chosen:
            raise ValueError(f"the share {start}:{stop} of {self.name!r} has no images: its classes are too small")
        return self.take(sorted(chosen))

    def sha256(self) -> str:
        """The SHA-256 of the stored images and their labels, in order: the identity of what was looked at.

        Everything is read once, and what is empty or no image is found.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self._digest(index))
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels, "<i4").tobytes())
        return digest.hexdigest()

    def _digest(self, index: int) -> bytes:
        stored = self.read(self.keys[index])
        if isinstance(stored, bytes):
            _open(stored, self._place(index)).close()
            return hashlib.sha256(stored).digest()
        about = f"{stored.dtype.str}{stored.shape}".encode()
        return hashlib.sha256(about + np.ascontiguousarray(stored).tobytes()).digest()

    def _place(self, index: int) -> str:
        key = self.keys[index]
        return repr(str(key)) if isinstance(key, Path) else f"{key} of {self.name!r}"


def spelled(name: str) -> str:
    """A class name as prompts have it, wherever it is stored: underscores are spaces, and all else is kept.

    Spaces around it, and the slash that ``ls -d */`` puts behind it, are no part of it. Capitals inside a word are not
    taken apart: whether ``AnnualCrop`` is two words and ``McLaren`` one, only a list of names can say.

    >>> spelled("apple_pie"), spelled("AnnualCrop"), spelled("polar_bear/")
    ('apple pie', 'AnnualCrop', 'polar bear')
    """
    return " ".join(name.replace("_", " ").rstrip("/").split())


def by_name(
    place: str, stored: Sequence[str], given: Sequence[str] | None, what: str = "classes"
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Classes that are stored by name: the names in the order of the labels, and the label of each stored name.

    Args:
      place: where they are stored, for messages.
      stored: the names that occur, each once.
      given: the names that are asked for, in the order of the labels; None: those that are stored.
      what: what bears the names, for messages.

    Raises:
      ValueError: a stored name that is none of those given, or one of several alike.

    >>> by_name("photos", ["polar_bear"], ["cat", "polar bear"])
    (('cat', 'polar bear'), {'polar_bear': 1})
    """
    names = tuple({spelled(name): name for name in stored}.values()) if given is None else tuple(given)
    order = [spelled(name) for name in names]
    surplus = sorted({spelled(name) for name in stored} - set(order))
    if surplus:
        raise ValueError(f"{place!r} has the {what} {surplus}, which are none of the classes {list(names)}")
    for name in map(spelled, stored):
        if order.count(name) > 1:
            numbers = [str(number) for number, other in enumerate(order) if other == name]
            raise ValueError(
                f"{place!r} has the class {name!r} by name, which the list names more than once (classes "
                f"{', '.join(numbers)}): give each its own name"
            )
    return names, {name: order.index(spelled(name)) for name in stored}


def _notes_of_names(stored: Sequence[str], names: Sequence[str]) -> list[str]:
    """What to say of class names, as they were stored and as they are spelled."""
    notes = []
    changed = [f"{one!r} is {other!r}" for one, other in zip(stored, names, strict=True) if one != other]
    if changed:
        notes.append(f"underscores in class names are spaces: {changed[0]}" + (", ..." if len(changed) > 1 else ""))
    numbers: dict[str, list[str]] = {}
    for number, name in enumerate(names):
        numbers.setdefault(name, []).append(str(number))
    shared = [f"{name!r} is {' and '.join(own)}" for name, own in numbers.items() if len(own) > 1]
    if shared:
        notes.append(f"classes of one name are not told apart, the first of them is predicted: {', '.join(shared)}")
    return notes


def with_names(name: str, own: Sequence[str], given: Sequence[str] | None) -> tuple[str, ...]:
    """The names of classes that are stored as numbers: those given, in the order of the labels, or else their own.

    Args:
      name: of the images, for messages.
      own: the names that are stored with the images; none where there are none.
      given: the names that are asked for.

    Raises:
      ValueError: where neither is there, they differ in number, or they are the same names in another order, but for
        capitals and signs.

    >>> with_names("photos", ["annual crop", "forest"], ["annual crop land", "forest"])
    ('annual crop land', 'forest')
    """
    if given is None:
        if not own:
            raise ValueError(f"{name!r} stores its classes as numbers without names: give their names, in that order")
        return tuple(own)
    if own and len(given) != len(own):
        raise ValueError(f"{name!r} has {len(own)} classes, but {len(given)} class names are given")
    stored, asked = ([re.sub(r"[^a-z0-9]+", " ", one.lower()).strip() for one in names] for names in (own, given))
    if sorted(stored) == sorted(asked) and stored != asked:
        raise ValueError(
            f"{name!r} stores its classes as numbers in the order {', '.join(own)}, but the names are given as "
            f"{', '.join(given)}: give them in the order of the numbers"
        )
    return tuple(given)


def read_image(file: str | os.PathLike[str]) -> Pixels:
    """One image as ``[height, width, 3]`` 8-bit values, upright as its camera says.

    Raises:
      ValueError: for a file that is not there, is empty, or is no complete image.
    """
    return _decode(read_file(Path(file)), repr(str(file)))


def read_file(file: Path) -> bytes:
    """The bytes of an image file.

    Raises:
      ValueError: for a file that is not there or may not be read.
    """
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {str(file)!r}") from error
    except OSError as error:
        raise ValueError(f"the image {str(file)!r} cannot be read ({error.strerror})") from error


def _decode(stored: bytes | np.ndarray, place: str) -> Pixels:
    if isinstance(stored, np.ndarray):
        return _rgb(stored, place)
    try:
        with _open(stored, place) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow would cut what is above 255
                return _rgb((np.asarray(upright) >> 8).astype(np.uint8), place)
            if upright.mode in ("I", "F"):
                raise ValueError(f"the image {place} has numbers of 32 bits, expected 8 or 16: save it as one of those")
            return np.asarray(upright.convert("RGB"))
    except (OSError, SyntaxError) as error:  # the header is sound, and what follows is not
        raise ValueError(f"the image {place} cannot be read ({error}): remove it, or copy it again") from error


def _open(stored: bytes, place: str) -> Image.Image:
    if not stored:
        raise ValueError(f"the image {place} is empty (0 bytes): remove it, or copy it again")
    try:
        return Image.open(io.BytesIO(stored))
    except UnidentifiedImageError as error:
        raise ValueError(f"the image {place} cannot be read (no known format): remove it, or copy it again") from error
    except (Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise ValueError(f"the image {place} cannot be read ({error}): remove it, or copy it again") from error


def _rgb(pixels: np.ndarray, place: str) -> Pixels:
    """Three channels of 8 bits, from one or three channels of 8 bits or of numbers from 0 to 1."""
    grey = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 1)
    if not pixels.size or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(
            f"the image {place} has the shape {list(pixels.shape)}, expected [height, width, 3] or [height, width]"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        if not (pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(
                f"the image {place} has numbers from {pixels.min():g} to {pixels.max():g}, expected 0 to 1, or 8-bit "
                "values"
            )
        pixels = np.rint(255 * pixels.astype(np.float64)).astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise ValueError(f"the image {place} is {pixels.dtype}, expected uint8, or floating numbers from 0 to 1")
    return np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))
