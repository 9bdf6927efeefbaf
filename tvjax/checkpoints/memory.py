"""Host memory for tensors: aligned as JAX wants it, reused from one to the next, filled fast from transposed views."""

from __future__ import annotations

import math
import mmap

import jax
import numpy as np

_LARGE = 2**20  # bytes from which on memory is asked of the system for itself
_BLOCK = 64  # columns that are transposed at once: one line of the cache holds 16 entries, so a row is few lines


class Scratch:
    """Memory by name that grows to the largest tensor and is then reused; new memory costs more than a copy.

    >>> scratch = Scratch()
    >>> first = scratch.take("raw", 8)
    >>> np.shares_memory(first, scratch.take("raw", 4)), scratch.size
    (True, 8)
    """

    def __init__(self) -> None:
        self._pieces: dict[str, np.ndarray] = {}

    def take(self, name: str, size: int) -> np.ndarray:
        """So many bytes, flat; what was taken under this name before is overwritten."""
        if name not in self._pieces or self._pieces[name].size < size:
            self._pieces.pop(name, None)
            self._pieces[name] = aligned_memory(size)
        return self._pieces[name][:size]

    def wide(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array in the memory of that name."""
        return self.take(name, 4 * math.prod(shape)).view(np.float32).reshape(shape)

    @property
    def size(self) -> int:
        """Bytes of all pieces."""
        return sum(piece.size for piece in self._pieces.values())


def aligned_memory(size: int) -> np.ndarray:
    """New memory of so many bytes, aligned so that an array of JAX on a CPU takes it without a copy."""
    if size >= _LARGE and hasattr(mmap, "MAP_POPULATE"):
        # All pages at once: touched one after another, by several threads, they take as long as reading the file does.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)
    memory = np.empty(size + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def contiguous(view: np.ndarray, memory: np.ndarray | None = None) -> np.ndarray:
    """The values in C order: the view itself where it has it, else a copy.

    Args:
      view: any strides.
      memory: flat 8-bit values to copy into, as many bytes or more; None takes new memory.

    >>> contiguous(np.arange(6).reshape(2, 3).T).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    if view.flags.c_contiguous:
        return view
    memory = aligned_memory(view.nbytes) if memory is None else memory
    out = memory[: view.nbytes].view(view.dtype).reshape(view.shape)
    if view.ndim == 2 and view.T.flags.c_contiguous:
        for start in range(0, view.shape[1], _BLOCK):
            columns = slice(start, start + _BLOCK)
            np.copyto(out[:, columns], view[:, columns])
    else:
        np.copyto(out, view)
    return out


def to_jax(array: np.ndarray) -> jax.Array:
    """The array as one of JAX, without a copy where it is in `aligned_memory` and the device is a CPU."""
    return jax.device_put(array)
