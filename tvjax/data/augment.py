"""Random views of images, on the device: weak (shifted, flipped) and strong (warped, recoloured, partly hidden)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tvjax.stages import PyTree

Channels = float | tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class WeakView:
    """Shifts every image by a few pixels, the border repeated, and mirrors half of them.

    Called with a key and the inputs of a batch, a dict with the images ``[batch, height, width, 3]``; returns the
    inputs with other images.

    Attributes:
      shift: greatest shift, as a share of the size.
      flip: whether to mirror left and right; not for digits and letters.
      images: name of the images among the inputs.

    >>> WeakView()(jax.random.key(0), {"pixels": jnp.zeros((2, 8, 8, 3))})["pixels"].shape
    (2, 8, 8, 3)
    """

    shift: float = 0.125
    flip: bool = True
    images: str = "pixels"

    def __call__(self, key: Array, inputs: PyTree) -> PyTree:
        """The view."""
        images = inputs[self.images]
        keys = jax.random.split(key, images.shape[0])
        return {**inputs, self.images: jax.vmap(self._one)(images, keys)}

    def _one(self, image: Float[Array, "height width 3"], key: Array) -> Float[Array, "height width 3"]:
        height, width = image.shape[:2]
        shift_key, flip_key = jax.random.split(key)
        rows, columns = round(self.shift * height), round(self.shift * width)
        padded = jnp.pad(image, ((rows, rows), (columns, columns), (0, 0)), mode="edge")
        start = jax.random.randint(shift_key, (2,), 0, jnp.array([2 * rows + 1, 2 * columns + 1]))
        shifted = jax.lax.dynamic_slice(padded, (start[0], start[1], 0), image.shape)
        return jnp.where(jax.random.bernoulli(flip_key), shifted[:, ::-1], shifted) if self.flip else shifted


@dataclasses.dataclass(frozen=True)
class StrongView:
    """A weak view, then one random warp, some random changes of colour, and a hidden square, as in RandAugment.

    The warp is a turn, a shear or a scaling. The changes are drawn from brightness, contrast, colour, sharper steps of
    grey (posterise), inverted lights (solarise), and none. (Cubuk et al. 2019, arXiv 1909.13719, has one pool of all;
    here a warp always comes with the colours, which a compiled program does at little cost.)

    Attributes:
      mean: that the pixels were normalised with.
      std: that the pixels were normalised with.
      strength: of every change, from 0 (none) to 1.
      colours: how many changes of colour.
      hidden: side of the hidden square, as a share of the image's.
      weak: what comes first.

    >>> view = StrongView(mean=0.5, std=0.5)
    >>> view(jax.random.key(0), {"pixels": jnp.zeros((2, 8, 8, 3))})["pixels"].shape
    (2, 8, 8, 3)
    """

    mean: Channels
    std: Channels
    strength: float = 0.5
    colours: int = 2
    hidden: float = 0.3
    weak: WeakView = WeakView()

    def __call__(self, key: Array, inputs: PyTree) -> PyTree:
        """The view."""
        weak_key, strong_key = jax.random.split(key)
        inputs = self.weak(weak_key, inputs)
        images = inputs[self.weak.images]
        mean, std = (jnp.asarray(value, images.dtype) for value in (self.mean, self.std))
        keys = jax.random.split(strong_key, images.shape[0])
        changed = jax.vmap(self._one)(jnp.clip(images * std + mean, 0, 1), keys)
        return {**inputs, self.weak.images: (jnp.clip(changed, 0, 1) - mean) / std}

    def _one(self, image: Float[Array, "height width 3"], key: Array) -> Float[Array, "height width 3"]:
        warp_key, colour_key, hidden_key = jax.random.split(key, 3)
        image = _warped(image, self.strength, warp_key)
        for one in jax.random.split(colour_key, self.colours):
            image = _recoloured(image, self.strength, one)
        return _hidden(image, self.hidden, hidden_key)


def _warped(image: Float[Array, "height width 3"], strength: float, key: Array) -> Float[Array, "height width 3"]:
    """Turned by up to half a radian, sheared or scaled, about its middle; what is outside is the nearest border."""
    which_key, size_key = jax.random.split(key)
    size = jax.random.uniform(size_key, (), image.dtype, -0.5, 0.5) * strength
    one, nil = jnp.ones((), image.dtype), jnp.zeros((), image.dtype)
    maps = jnp.array(
        [
            [[jnp.cos(size), -jnp.sin(size)], [jnp.sin(size), jnp.cos(size)]],
            [[one, size], [nil, one]],
            [[one, nil], [size, one]],
            [[one + size, nil], [nil, one + size]],
        ]
    )
    matrix = maps[jax.random.randint(which_key, (), 0, len(maps))]
    middle = (jnp.array(image.shape[:2], image.dtype) - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(n, dtype=image.dtype) for n in image.shape[:2]), indexing="ij"))
    places = jnp.einsum("ij,jhw->ihw", matrix, grid - middle[:, None, None]) + middle[:, None, None]
    sample = jax.vmap(
        lambda channel: jax.scipy.ndimage.map_coordinates(channel, list(places), order=1, mode="nearest"), -1, -1
    )
    return sample(image)


def _recoloured(image: Float[Array, "height width 3"], strength: float, key: Array) -> Float[Array, "height width 3"]:
    """One change of colour, drawn at random; values from 0 to 1."""
    which_key, size_key = jax.random.split(key)
    size = jax.random.uniform(size_key, (), image.dtype, -1, 1) * strength
    grey = image.mean(-1, keepdims=True)
    steps = 2 ** jnp.round(8 - 5 * jnp.abs(size))
    changes = jnp.stack(
        [
            image,
            image * (1 + size),
            image.mean() + (1 + size) * (image - image.mean()),
            grey + (1 + size) * (image - grey),
            jnp.floor(image * steps) / steps,
            jnp.where(image > 1 - jnp.abs(size), 1 - image, image),
        ]
    )
    return jnp.clip(changes[jax.random.randint(which_key, (), 0, len(changes))], 0, 1)


def _hidden(image: Float[Array, "height width 3"], share: float, key: Array) -> Float[Array, "height width 3"]:
    """A square of mid grey at a random place."""
    height, width = image.shape[:2]
    rows, columns = round(share * height), round(share * width)
    top, left = jax.random.randint(key, (2,), 0, jnp.array([height - rows + 1, width - columns + 1]))
    row, column = jnp.arange(height) - top, jnp.arange(width) - left
    inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))
    return jnp.where(inside[..., None], jnp.asarray(0.5, image.dtype), image)
