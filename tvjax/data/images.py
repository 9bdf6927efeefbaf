"""Images, of files and of arrays, decoded when they are asked for."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from tvjax.data.examples import Examples

Pixels = UInt8[np.ndarray, "height width 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Images(Examples):
    """Images as arrays ``[height, width, 3]`` of 8-bit values, of any sizes: ``images[i]`` reads and decodes one.

    `read` takes a key to what is stored: an encoded file's bytes, or an array of pixels.

    >>> photos = np.zeros((3, 4, 5, 3), np.uint8)
    >>> images = Images("photos", range(3), photos.__getitem__, np.array([0, 1, 0]), ("cat", "dog"))
    >>> len(images), images[0].shape, images.take([2, 1]).labels.tolist()
    (3, (4, 5, 3), [0, 1])
    """

    kind = "images"

    def _decode(self, stored: bytes | np.ndarray, place: str) -> Pixels:
        return _decode(stored, place)

    def _content(self, stored: bytes | np.ndarray, place: str) -> bytes:
        if isinstance(stored, bytes):
            _open(stored, place).close()
            return stored
        return f"{stored.dtype.str}{stored.shape}".encode() + np.ascontiguousarray(stored).tobytes()


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
