"""The embedded data: 1797 handwritten digits, photographed in many styles.

The images are real (8 x 8 grey levels, 13 writers): the test set of Alpaydin and Kaynak's Optical Recognition of
Handwritten Digits (1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0), as
scikit-learn has it. ``digits.npz`` holds them, with their source and licence. They are split once into four disjoint
parts, then *photographed*:
drawn at `SIZE` x `SIZE` pixels in colour, with chance turns, shifts, inks, papers and noise. `BASE` is the family that
the embedded models are pre-trained on; `STYLES` holds the tasks, which no pre-training has seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tvjax.data.batches import as_batch
from tvjax.data.examples import with_names
from tvjax.data.images import Images
from tvjax.stages import Batch

SIZE = 16
PIXELS = np.arange(SIZE, dtype=np.float32)
PIXEL_MEAN = PIXEL_STD = 0.5
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}",
    "a photo of the number {}",
    "the handwritten digit {}",
    "a drawing of the number {}",
    "the figure {} in ink on paper",
    "a scan of a handwritten {}",
)
# Examples of each class in the parts that are no test images; the rest, some 500, are for the test.
PER_CLASS = {"source": 55, "target": 55, "validation": 20}


class Digits(NamedTuple):
    """Images of digits with their classes.

    Attributes:
      images: ``[n, 8, 8]`` float32, the ink from 0 (none) to 1; photographs are ``[n, SIZE, SIZE, 3]``.
      labels: ``[n]`` int32, indices of `CLASS_NAMES`.
    """

    images: np.ndarray
    labels: np.ndarray


@cache
def load_splits() -> dict[str, Digits]:
    """The disjoint parts ``source``, ``target``, ``validation`` and ``test``.

    Within a class the examples are ordered by the SHA-256 of their pixels and cut, so the parts depend on the images
    alone: on no random generator, and on no order.

    >>> {name: len(part.labels) for name, part in load_splits().items()}
    {'source': 550, 'target': 550, 'validation': 200, 'test': 497}
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images = (stored["images"] / 16).astype(np.float32)
        labels = stored["labels"].astype(np.int32)
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    order = sorted(range(len(labels)), key=digests.__getitem__)
    parts: dict[str, list[int]] = {name: [] for name in (*PER_CLASS, "test")}
    for label in range(len(CLASS_NAMES)):
        of_class = [index for index in order if labels[index] == label]
        for name, count in PER_CLASS.items():
            parts[name] += of_class[:count]
            of_class = of_class[count:]
        parts["test"] += of_class
    return {name: Digits(images[indices], labels[indices]) for name, indices in parts.items()}


def fingerprint(digits: Digits) -> str:
    """The first 16 hexadecimal figures of the SHA-256 of the images and labels.

    >>> fingerprint(Digits(np.zeros((1, 8, 8), np.float32), np.zeros(1, np.int32)))
    '9c0095c04ef53d9d'
    """
    digest = hashlib.sha256(np.ascontiguousarray(digits.images, np.float32).tobytes())
    digest.update(np.ascontiguousarray(digits.labels, np.int32).tobytes())
    return digest.hexdigest()[:16]


def _same(image: jax.Array, key: jax.Array) -> jax.Array:
    return image


@dataclasses.dataclass(frozen=True)
class Style:
    """A way to photograph digits: ``style(images, key)``.

    Attributes:
      matrix: linear map of the page, ``(x, y)`` of the photograph to ``(x, y)`` of the page (mirrored, turned).
      strokes: ``(ink, key) -> ink`` on the ink of one page, ``[SIZE, SIZE]`` from 0 to 1 (thick, hollow).
      finish: ``(photo, key) -> photo`` on one photograph, ``[SIZE, SIZE, 3]`` from 0 to 1 (blurred, inverted).
    """

    matrix: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 0.0), (0.0, 1.0))
    strokes: Callable[[jax.Array, jax.Array], jax.Array] = _same
    finish: Callable[[jax.Array, jax.Array], jax.Array] = _same

    def __call__(self, images: np.ndarray | jax.Array, key: jax.Array) -> jax.Array:
        """Photographs ``[n, SIZE, SIZE, 3]`` float32 of the images ``[n, 8, 8]``, one key each.

        >>> BASE(np.ones((2, 8, 8), np.float32), jax.random.key(0)).shape
        (2, 16, 16, 3)
        """
        if images.ndim != 3 or images.shape[1:] != (8, 8):
            raise ValueError(
                f"images: found shape {tuple(images.shape)}, expected [n, 8, 8], as load_splits gives them"
            )
        geometry, strokes, colours, finish, grain = jax.random.split(key, 5)
        inks = _drawn(jnp.asarray(images, jnp.float32), jnp.array(self.matrix), geometry)
        photos = _coloured(_changed(self.strokes, inks, strokes), colours)
        return _grainy(_changed(self.finish, photos, finish), grain)


def photograph(digits: Digits, style: Style, key: jax.Array, repeats: int = 1) -> Batch:
    """Photographs as one batch of a CLIP's examples, ``{"pixels": [n, SIZE, SIZE, 3]}`` from -1 to 1, with labels.

    Args:
      digits: the images.
      style: how to photograph them.
      key: a random key.
      repeats: photographs of each image, all different; the images in order, `repeats` times over.

    >>> photograph(load_splits()["test"], BASE, jax.random.key(0)).inputs["pixels"].shape
    (497, 16, 16, 3)
    """
    photos = style(np.tile(digits.images, (repeats, 1, 1)), key)
    return as_batch({"pixels": (photos - PIXEL_MEAN) / PIXEL_STD}, np.tile(digits.labels, repeats), len(CLASS_NAMES))


def read_photographs(style: str, part: str, class_names: Sequence[str] | None = None, seed: int = 0) -> Images:
    """Photographs of one part as images of 8-bit values, as a model's own processor takes them.

    Args:
      style: ``base``, or one of `STYLES`.
      part: ``source``, ``target``, ``validation`` or ``test``.
      class_names: other names of the figures from zero to nine.
      seed: of the random key that they are photographed with.

    Raises:
      ValueError: for another style or part.

    >>> len(read_photographs("thick", "test"))
    497
    """
    styles, parts = {"base": BASE, **STYLES}, load_splits()
    for what, name, known in (("style", style, styles), ("part", part, parts)):
        if name not in known:
            raise ValueError(f"the embedded digits have no {what} {name!r}: choose one of {', '.join(known)}")
    name = f"digits:{style}/{part}"
    photos = styles[style](parts[part].images, jax.random.key(seed))
    pixels = np.rint(255 * np.asarray(photos)).astype(np.uint8)
    names = with_names(name, CLASS_NAMES, class_names)
    return Images(name, range(len(pixels)), pixels.__getitem__, parts[part].labels, names)


@jax.jit
def _drawn(images: jax.Array, matrix: jax.Array, key: jax.Array) -> jax.Array:
    return jax.vmap(_draw, (0, None, 0))(images, matrix, jax.random.split(key, images.shape[0]))


@jax.jit
def _coloured(inks: jax.Array, key: jax.Array) -> jax.Array:
    return jax.vmap(_colour)(inks, jax.random.split(key, inks.shape[0]))


@partial(jax.jit, static_argnums=0)
def _changed(change: Callable[[jax.Array, jax.Array], jax.Array], images: jax.Array, key: jax.Array) -> jax.Array:
    return jax.vmap(change)(images, jax.random.split(key, images.shape[0]))


@jax.jit
def _grainy(photos: jax.Array, key: jax.Array) -> jax.Array:
    level_key, grain_key = jax.random.split(key)
    levels = jax.random.uniform(level_key, (photos.shape[0], 1, 1, 1), maxval=0.08)
    return jnp.clip(photos + levels * jax.random.normal(grain_key, photos.shape), 0.0, 1.0)


def _draw(image: jax.Array, matrix: jax.Array, key: jax.Array) -> jax.Array:
    """The ink on the page, ``[SIZE, SIZE]``: mildly turned, slanted, scaled and shifted, then mapped by `matrix`."""
    angle, slant, width, height, right, down = jax.random.uniform(key, (6,), minval=-1.0, maxval=1.0)
    angle, slant = 0.2 * angle, 0.2 * slant
    size = 0.85 + 0.15 * jnp.stack([width, height])
    shift = 0.08 * jnp.stack([right, down])
    turn = jnp.array([[jnp.cos(angle), jnp.sin(angle)], [-jnp.sin(angle), jnp.cos(angle)]])
    slanted = jnp.array([[jnp.ones(()), slant], [jnp.zeros(()), jnp.ones(())]])
    to_page = jnp.diag(1 / size) @ slanted @ turn @ matrix
    axis = (PIXELS + 0.5) / SIZE - 0.5
    x, y = jnp.meshgrid(axis, axis)
    positions = to_page @ jnp.stack([x.ravel(), y.ravel()]) + shift[:, None]
    fine = jnp.clip(jax.image.resize(image, (2 * SIZE, 2 * SIZE), "cubic"), 0.0, 1.0)
    rows_columns = (positions[::-1] + 0.5) * (2 * SIZE) - 0.5
    return jax.scipy.ndimage.map_coordinates(fine, list(rows_columns), order=1).reshape(SIZE, SIZE)


def _colour(ink: jax.Array, key: jax.Array) -> jax.Array:
    """The page in colour, ``[SIZE, SIZE, 3]``: dark ink on light paper."""
    dark, light = jax.random.uniform(key, (2, 3), maxval=0.4) + jnp.array([[0.0], [0.6]])
    return light + ink[..., None] * (dark - light)


def _grown(ink: jax.Array, size: int) -> jax.Array:
    """The ink's maximum over a square of `size` pixels."""
    return jax.lax.reduce_window(ink, -jnp.inf, jax.lax.max, (size, size), (1, 1), "SAME")


def _smooth(photo: jax.Array, width: float) -> jax.Array:
    """Gaussian blur of this standard deviation in pixels, the borders repeated."""
    kernel = np.exp(-0.5 * ((PIXELS[:, None] - PIXELS) / width) ** 2)
    kernel = kernel / kernel.sum(1, keepdims=True)
    return jnp.einsum("ij,jkc,lk->ilc", kernel, photo, kernel)


def _thick(ink: jax.Array, key: jax.Array) -> jax.Array:
    return _grown(ink, 4)


def _hollow(ink: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.clip(1.3 * (_grown(ink, 3) - ink), 0.0, 1.0)


def _broken(ink: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 0.5, ink.shape), ink, 0.0)


def _striped(ink: jax.Array, key: jax.Array) -> jax.Array:
    start = jax.random.randint(key, (), 0, 4)
    return jnp.maximum(ink, jnp.where((jnp.arange(SIZE) + start) % 4 < 2, 0.6, 0.0)[None, :])


def _ruled(ink: jax.Array, key: jax.Array) -> jax.Array:
    start = jax.random.randint(key, (), 0, 4)
    return jnp.maximum(ink, jnp.where((jnp.arange(SIZE) + start) % 4 < 2, 0.6, 0.0)[:, None])


def _framed(ink: jax.Array, key: jax.Array) -> jax.Array:
    near = (PIXELS < 3) | (PIXELS >= SIZE - 3)
    return jnp.where(near[:, None] | near[None, :], 1.0, ink)


def _inverted(photo: jax.Array, key: jax.Array) -> jax.Array:
    return 1.0 - photo


def _blurred(photo: jax.Array, key: jax.Array) -> jax.Array:
    return _smooth(photo, 1.7)


def _occluded(photo: jax.Array, key: jax.Array) -> jax.Array:
    place, colour = jax.random.split(key)
    rows, columns = jax.random.randint(place, (2,), 1, SIZE - 6)
    index = jnp.arange(SIZE)
    hidden = ((index >= rows) & (index < rows + 5))[:, None] & ((index >= columns) & (index < columns + 5))
    return jnp.where(hidden[..., None], jax.random.uniform(colour, (3,)), photo)


def _noisy(photo: jax.Array, key: jax.Array) -> jax.Array:
    return photo + 0.25 * jax.random.normal(key, photo.shape)


def _shaded(photo: jax.Array, key: jax.Array) -> jax.Array:
    """Lit from one side: the other half lies in a shadow with a hard edge."""
    angle = jax.random.uniform(key, (), maxval=2 * jnp.pi)
    axis = PIXELS - (SIZE - 1) / 2
    side = jnp.cos(angle) * axis[None, :] + jnp.sin(angle) * axis[:, None] > 0
    return jnp.where(side[..., None], 1.0 - photo, photo)


def _chequered(photo: jax.Array, key: jax.Array) -> jax.Array:
    index = PIXELS // 4
    return jnp.where(((index[:, None] + index) % 2 == 1)[..., None], 1.0 - photo, photo)


BASE = Style()
STYLES: dict[str, Style] = {
    "mirrored": Style(matrix=((-1.0, 0.0), (0.0, 1.0))),
    "upside_down": Style(matrix=((-1.0, 0.0), (0.0, -1.0))),
    "flipped": Style(matrix=((1.0, 0.0), (0.0, -1.0))),
    "turned": Style(matrix=((0.0, 1.0), (-1.0, 0.0))),
    "tilted": Style(matrix=((0.6, 0.8), (-0.8, 0.6))),
    "tiny": Style(matrix=((2.0, 0.0), (0.0, 2.0))),
    "thick": Style(strokes=_thick),
    "hollow": Style(strokes=_hollow),
    "broken": Style(strokes=_broken),
    "striped": Style(strokes=_striped),
    "ruled": Style(strokes=_ruled),
    "framed": Style(strokes=_framed),
    "inverted": Style(finish=_inverted),
    "blurred": Style(finish=_blurred),
    "occluded": Style(finish=_occluded),
    "noisy": Style(finish=_noisy),
    "shaded": Style(finish=_shaded),
    "chequered": Style(finish=_chequered),
}
