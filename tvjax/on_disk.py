"""Arrays that stay on disk: leaves of a model that is larger than memory, read when they are asked for and not kept."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

PyTree = Any


class DiskArray:
    """An array whose values stay where they are stored until they are asked for.

    It has a shape and a dtype, and is a leaf of any pytree. ``np.asarray`` and ``jnp.asarray`` read it, each time anew;
    operators, `jax.numpy` and programs take it after that. What walks a model stage by stage (`tvjax.fit`, calling a
    `tvjax.Model`) reads the leaves of a stage when it is reached, and lets them go.

    Attributes:
      shape: of the values.
      dtype: of the values; those that are stored in another are converted when they are read.
      known_finite: whether they were read already by what checks that, so that nobody reads them for it again.

    >>> array = DiskArray((2,), np.float16, lambda: np.ones(2, np.float16))
    >>> np.asarray(array).tolist(), np.asarray(array.astype(np.float32)).dtype.name
    ([1.0, 1.0], 'float32')
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: DTypeLike, read: Callable[[], np.ndarray], *, checks: bool = False
    ):
        """Needs a function that reads the values; it raises a ValueError where they cannot be had any more.

        Args:
          shape: of the values.
          dtype: of the values.
          read: gives them.
          checks: whether `read` raises, too, where they are NaN or infinite.
        """
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._stored = read if isinstance(read, _Stored) else _Stored(read, checks)

    @property
    def known_finite(self) -> bool:
        """Whether what was read and checked is finite in this dtype too."""
        found = self._stored.found
        return found is not None and np.can_cast(found, self.dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, once they are read."""
        return self.size * self.dtype.itemsize

    def astype(self, dtype: DTypeLike) -> DiskArray:
        """The same values in another dtype; nothing is read."""
        return DiskArray(self.shape, dtype, self._stored)

    def to_device(self) -> jax.Array:
        """The values as an array of JAX, on the default device."""
        return jax.device_put(self._stored()).astype(self.dtype)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the values are on disk, and reading them makes a copy")
        return self._stored().astype(self.dtype if dtype is None else dtype, copy=False)

    def __jax_array__(self) -> jax.Array:
        return self.to_device()

    def __repr__(self) -> str:
        return f"DiskArray({self.dtype.name}{list(self.shape)})"


class _Stored:
    """What reads values, and the dtype that they were found to have and to be finite in; None while they were not."""

    def __init__(self, read: Callable[[], np.ndarray], checks: bool):
        self._read, self._checks = read, checks
        self.found: np.dtype[Any] | None = None

    def __call__(self) -> np.ndarray:
        values = self._read()
        if self._checks:
            self.found = values.dtype
        return values


def is_on_disk(leaf: Any) -> bool:
    """Whether a leaf is still to be read.

    >>> is_on_disk(np.ones(2))
    False
    """
    return isinstance(leaf, DiskArray)


def read(params: PyTree) -> PyTree:
    """The tree with its leaves on disk as arrays of JAX; the others as they are.

    >>> read({"a": 2, "b": DiskArray((1,), np.int8, lambda: np.ones(1, np.int8))})
    {'a': 2, 'b': Array([1], dtype=int8)}
    """
    return jax.tree.map(lambda leaf: leaf.to_device() if is_on_disk(leaf) else leaf, params)


def trim() -> None:
    """Gives freed memory back to the system, where the C library can: it would keep what lies between other pieces."""
    if (give_back := _malloc_trim()) is not None:
        give_back(0)


@functools.cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def difference(after: Any, before: Any) -> DiskArray:
    """``after - before`` in float32, taken whenever it is asked for; one of the two is on disk.

    >>> array = difference(DiskArray((2,), np.float16, lambda: np.ones(2, np.float16)), np.array([0.5, 2]))
    >>> np.asarray(array).tolist()
    [0.5, -1.0]
    """

    def subtract() -> np.ndarray:
        found = np.asarray(after).astype(np.float32)  # new memory, which the difference takes
        return np.subtract(found, np.asarray(before), out=found, casting="same_kind")

    return DiskArray(tuple(np.shape(after)), np.float32, subtract)
