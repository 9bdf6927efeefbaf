"""A table of positions for another grid of patches, resized as transformers does it in PyTorch: bicubically."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float


def resized(
    table: Float[Array, "positions width"], grid: tuple[int, int], wanted: tuple[int, int], antialias: bool
) -> Float[Array, "resized width"]:
    """The rows of a grid of patches, in row order, resized to another grid.

    Each axis is resized by itself, centres at half pixels. Without `antialias` an entry is made of its four neighbours,
    those outside being the nearest inside; with it the cubic is as wide as the coarser of the two grids, and what lies
    outside takes no part.

    Args:
      table: of the patches alone.
      grid: height and width of the table's grid.
      wanted: those of the other.
      antialias: see above.

    >>> import jax.numpy as jnp
    >>> resized(jnp.arange(4.0)[:, None], (2, 2), (2, 2), antialias=False).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    weigh = _antialiased if antialias else _sampled
    down, across = (weigh(*sizes)[:, :, None] for sizes in zip(grid, wanted, strict=True))
    rows = (down[..., None] * table.reshape(1, *grid, -1)).sum(1)  # elementwise: the table is no kernel to be captured
    return (across * rows[:, None]).sum(2).reshape(wanted[0] * wanted[1], -1)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel (Keys 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _sampled(size: int, wanted: int) -> Float[np.ndarray, "wanted size"]:
    centres = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    taps = np.floor(centres).astype(int)[:, None] + np.arange(-1, 3)
    found = np.zeros((wanted, size))
    np.add.at(found, (np.arange(wanted)[:, None], np.clip(taps, 0, size - 1)), _cubic(taps - centres[:, None], a=-0.75))
    return found.astype(np.float32)


def _antialiased(size: int, wanted: int) -> Float[np.ndarray, "wanted size"]:
    centres = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    found = _cubic((np.arange(size) - centres[:, None]) / max(size / wanted, 1), a=-0.5)
    return (found / found.sum(1, keepdims=True)).astype(np.float32)
