"""Sums of leaves on the host, in float32 and rounded once: a block of entries at a time, which stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

_BLOCK = 2**18  # entries


def difference(after: np.ndarray, before: np.ndarray, out: np.ndarray) -> float:
    """``out = after - before``, of contiguous arrays.

    Returns:
      The sum of the squares, before the rounding to the dtype of `out`.

    >>> out = np.empty(2, np.float16)
    >>> difference(np.array([3, 1], np.float32), np.array([1, 1], np.float16), out), out.tolist()
    (4.0, [2.0, 0.0])
    """
    flat, subtracted, squares = after.reshape(-1), before.reshape(-1), 0.0
    minuend, subtrahend = _wide(out), _wide(out)
    for entries, rounded in _blocks(out):
        change, other = minuend[: rounded.size], subtrahend[: rounded.size]
        np.copyto(change, flat[entries], casting="same_kind")
        np.copyto(other, subtracted[entries], casting="same_kind")
        np.subtract(change, other, out=change)
        squares += float(np.vdot(change, change))
        _round(change, rounded)
    return squares


def edited(theta: np.ndarray, change: np.ndarray, scale: float, out: np.ndarray) -> None:
    """``out = theta + scale * change``, of contiguous arrays; where theta is float64 the sum is taken so.

    >>> out = np.empty(2, np.float16)
    >>> edited(np.ones(2, np.float16), np.array([1, 2], np.float32), 0.5, out)
    >>> out.tolist()
    [1.5, 2.0]
    """
    before, added = theta.reshape(-1), change.reshape(-1)
    wide, scaled = _wide(out, np.promote_types(theta.dtype, np.float32)), _wide(out)
    for entries, rounded in _blocks(out):
        own, other = wide[: rounded.size], scaled[: rounded.size]
        np.copyto(own, before[entries])
        np.copyto(other, added[entries], casting="same_kind")
        with np.errstate(over="ignore"):  # reported where it is written
            np.multiply(other, np.float32(scale), out=other)
            np.add(own, other, out=other, casting="same_kind")
        _round(other, rounded)


def _blocks(out: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Where each block of entries is, and that part of the output."""
    flat = out.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield slice(start, start + _BLOCK), flat[start : start + _BLOCK]


def _wide(like: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    return np.empty(min(_BLOCK, like.size), dtype)


def _round(values: np.ndarray, out: np.ndarray) -> None:
    with np.errstate(over="ignore"):  # reported where it is written
        np.copyto(out, values, casting="same_kind")
